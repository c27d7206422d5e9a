"""A LoRA on a backbone's denoiser: put on for a while, switched off for the reference, saved as diffusers loads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prism import files
from prism.backbone import Backbone
from prism.backbone.pipeline import unwrapped
from prism.errors import PrismError, quoted, reason

NAME = "prism"  # of the adapter while it is on
OLD = "prism_old"  # of a frozen second one: the model that sampled
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention's linear layers, by diffusers' names."""
PROJECTIONS = ("to_query", "to_key", "to_value", "q_proj", "k_proj", "v_proj", "out_proj", "out_layer", "qkv")
"""Names of the same in denoisers that have none of `TARGETS`."""


class Lora:
    """The LoRA that is on a denoiser, see `applied`. ``weights``: its parameters by name, which alone are trained."""

    def __init__(self, backbone: Backbone, denoiser: Any) -> None:
        self.backbone, self.denoiser = backbone, denoiser
        self.weights = {
            name: value for name, value in denoiser.named_parameters() if f".{NAME}." in name and "lora_" in name
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open the denoiser is the original one, to the bit."""
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @contextmanager
    def old(self) -> Iterator[None]:
        """While open the frozen second LoRA is on in place of this one; without a second one the original is."""
        if OLD not in self.denoiser.peft_config:
            with self.off():
                yield
            return
        self.denoiser.set_adapter(OLD)
        try:
            yield
        finally:
            self.denoiser.set_adapter(NAME)
            self._freeze()

    def _freeze(self) -> None:
        """Let gradients reach this LoRA alone: peft sets `requires_grad` where it switches adapters."""
        for name, value in self.denoiser.named_parameters():
            value.requires_grad_(name in self.weights)

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: value.detach().clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over weights by name."""
        for name, value in self.weights.items():
            value.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write the file that `pipe.load_lora_weights(folder)` and `denoiser.load_lora_adapter(folder)` load."""
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        prefix = _prefix(self.denoiser)
        state = get_peft_model_state_dict(self.denoiser, adapter_name=NAME)
        config = self.denoiser.peft_config[NAME].to_dict()
        told = {f"{prefix}.{key}": sorted(each) if isinstance(each, set) else each for key, each in config.items()}
        # One key alone: safetensors writes several in any order, and a resumed run must give the same file.
        metadata = {"lora_adapter_metadata": json.dumps(told, indent=2, sort_keys=True, default=str)}
        tensors = {f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        with files.new_file(folder / FILE) as whole:
            save_file(tensors, whole, metadata=metadata)


@contextmanager
def applied(
    backbone: Backbone,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    seed: int = 0,
    start: Path | None = None,
    old: Path | None = None,
    trains: bool = False,
) -> Iterator[Lora]:
    """While open a LoRA is on the backbone's denoiser; afterwards the pipeline is as it was, to the bit.

    Args:
        rank: of the update; alpha: its scale times the rank; None: the rank.
        targets: names, or ends of names, of the linear layers that get it; (): the attention's.
        seed: of its initial weights, whose update is zero.
        start: folder of a saved LoRA to begin from, of the same rank and layers.
        old: folder of a saved LoRA that is put on beside it, frozen, see `Lora.old`.
        trains: keep its weights in float32, whatever the denoiser's dtype, so that small steps are not rounded away;
            else they have the denoiser's, as where diffusers loads them.

    Raises:
        PrismError: where peft is not installed, the denoiser takes no LoRA or has adapters already, or no layer of it
            has such a name.
    """
    denoiser = check(backbone)
    from peft import LoraConfig

    chosen = list(targets) or default_targets(denoiser)
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "target_modules": chosen}
    trained = {name: value.requires_grad for name, value in denoiser.named_parameters()}
    training = {name: each.training for name, each in denoiser.named_modules()}
    with backbone.held():
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                torch.manual_seed(seed)
                try:
                    denoiser.add_adapter(LoraConfig(**settings, init_lora_weights=True), adapter_name=NAME)
                    if old is not None:
                        denoiser.add_adapter(LoraConfig(**settings), adapter_name=OLD)
                except ValueError as error:
                    raise PrismError(
                        f"The denoiser {type(denoiser).__name__} takes no LoRA at {quoted(', '.join(chosen), 120)} "
                        f"({quoted(error, 160)}); name linear layers of it in targets."
                    ) from error
            lora = Lora(backbone, denoiser)
            for value in lora.weights.values() if trains else ():
                value.data = value.data.float()
            if start is not None:
                _fill(lora, start, NAME)
            if old is not None:
                _fill(lora, old, OLD)
            denoiser.set_adapter(NAME)
            lora._freeze()
            yield lora
        finally:
            denoiser.unload_lora()
            for name, value in denoiser.named_parameters():
                value.requires_grad_(trained.get(name, value.requires_grad))
                value.grad = None
            for name, each in denoiser.named_modules():
                each.training = training.get(name, each.training)
            vars(denoiser).pop("_hf_peft_config_loaded", None)  # `unload_lora` leaves None where there was none


def check(backbone: Backbone) -> Any:
    """The denoiser that would get a LoRA. Raises PrismError where it cannot have one."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise PrismError(
            'Tuning puts a LoRA on the denoiser by peft, which is not installed; pip install "prism-video[improve]".'
        ) from error
    denoiser = unwrapped(backbone.denoiser)
    kind = type(denoiser).__name__
    if backbone.partial:
        raise PrismError("Of this backbone the first blocks alone were loaded; tuning needs all of them.")
    if not hasattr(denoiser, "add_adapter") or not hasattr(denoiser, "unload_lora"):
        raise PrismError(
            f"The denoiser {kind} cannot take a LoRA: it has none of diffusers' methods for one (PeftAdapterMixin); "
            "tune another backbone."
        )
    if getattr(denoiser, "peft_config", None):
        raise PrismError(
            f"The denoiser {kind} has adapters already ({quoted(', '.join(denoiser.peft_config), 80)}); fuse them into "
            "its weights (pipe.fuse_lora, then pipe.unload_lora_weights), or unload them."
        )
    return denoiser


def default_targets(denoiser: nn.Module) -> list[str]:
    """The attention's linear layers by the ends of their names: diffusers' names, else any projection's."""
    names = [name for name, each in denoiser.named_modules() if isinstance(each, nn.Linear)]
    present = [end for end in TARGETS if any(name.endswith(f".{end}") for name in names)]
    others = [name for name in names if name.rpartition(".")[2] in PROJECTIONS]  # by their whole names
    if present or others:
        return present or others
    raise PrismError(
        f"The denoiser {type(denoiser).__name__} has no linear layer named {', '.join(TARGETS)}; name the layers that "
        "get the LoRA in targets."
    )


def _prefix(denoiser: Any) -> str:
    """The word before the names of a saved LoRA, by which diffusers' loaders tell a denoiser's weights."""
    return "unet" if type(denoiser).__name__.startswith("UNet") else "transformer"


def _fill(lora: Lora, folder: Path, adapter: str) -> None:
    """Give an adapter the weights of a saved LoRA."""
    from peft.utils import set_peft_model_state_dict

    tensors = files.load_safetensors(folder / FILE)
    state = {name.removeprefix(f"{_prefix(lora.denoiser)}."): value for name, value in tensors.items()}
    try:
        result = set_peft_model_state_dict(lora.denoiser, state, adapter_name=adapter)
    except RuntimeError as error:
        raise PrismError(f"The LoRA in {files.shown(folder)} does not fit this run: {reason(error, 160)}.") from error
    if getattr(result, "unexpected_keys", None):
        raise PrismError(f"The LoRA in {files.shown(folder)} is of another denoiser.")

"""The judge: a frozen backbone, the block it is tapped at, and a trained head that scores noisy latents.

A judge on disk is a folder: config.json, model.safetensors and a model card. It holds the head alone; what it says
about the backbone is a fingerprint, checked when the head is put onto one.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism import files
from prism.backbone import Backbone, Tokens
from prism.errors import PrismError
from prism.judge.card import model_card
from prism.judge.head import QueryHead

FORMAT, SCHEMA = "prism-head", 1
DIMENSIONS = ("VQ", "MQ", "TA", "overall")
PAPER_DIM = 1536
# What a head cannot do without; other weights, or another pipeline class around the same parts, only make it less sure.
ARCHITECTURE = {"denoiser": "denoiser", "denoiser_config": "denoiser", "vae": "VAE", "vae_config": "VAE"}


class Judge:
    """Scores noisy latents; use ``Judge.untrained`` or ``Judge.from_pretrained``.

    Attributes:
        backbone: the frozen generator.
        tap: 1-based number of blocks that are run before the tokens are read (N_b of the paper).
        head: the trained part, float32, on the backbone's device.
        dimensions: what the columns of scores mean, such as ("VQ", "MQ", "TA", "overall").
        eta: the tie threshold the head was trained with (Eq. 3-4).
        trained_on: what is known of its training: store, steps, seed, source, prompts.
    """

    def __init__(
        self,
        backbone: Backbone,
        tap: int,
        head: QueryHead,
        dimensions: Sequence[str] = DIMENSIONS,
        eta: float = 5.0,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        if not 1 <= tap <= backbone.num_blocks:
            raise PrismError(f"The tap must be a block from 1 to {backbone.num_blocks} of this backbone, found {tap}.")
        if head.width != backbone.width:
            raise PrismError(f"The head reads tokens of width {head.width}, this backbone's are {backbone.width} wide.")
        if head.num_dimensions != len(dimensions) or len(set(dimensions)) != len(dimensions):
            names = ", ".join(dimensions)
            raise PrismError(f"The head gives {head.num_dimensions} scores, which does not fit the dimensions {names}.")
        self.backbone, self.tap = backbone, tap
        self.head = head.to(backbone.device, torch.float32)
        self.dimensions, self.eta, self.trained_on = tuple(dimensions), float(eta), dict(trained_on or {})

    @classmethod
    def untrained(
        cls,
        pipe: Any,
        tap: int | None = None,
        dim: int | None = None,
        dimensions: Sequence[str] = DIMENSIONS,
        aggregation: str = "query",
        seed: int = 0,
        **head_options: Any,
    ) -> Judge:
        """A judge with a fresh head.

        Args:
            pipe: a diffusers pipeline or a ``Backbone``.
            tap: block to read; None: the backbone's default (12 of 30 on Wan2.1-1.3B, as in the paper).
            dim: D; None: 1536 as in the paper, less (twice D_vis) on small backbones.
            dimensions: names of the scores.
            aggregation: "query", or the ablations "mean" and "linear".
            seed: of the head's initial weights; the global random state is left alone.
            **head_options: further arguments of ``QueryHead``.
        """
        backbone = _backbone(pipe)
        dim = min(PAPER_DIM, 2 * backbone.width) if dim is None else dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = QueryHead(backbone.width, dim, len(dimensions), aggregation=aggregation, **head_options)
        return cls(backbone, backbone.default_tap if tap is None else tap, head, dimensions)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], pipe: Any, revision: str | None = None) -> Judge:
        """Put a saved head onto a backbone.

        Args:
            source: a folder written by ``save_pretrained``, or the id of such a repository on the Hub.
            pipe: a diffusers pipeline or a ``Backbone``: the one the head was trained on, or a finetune of it.
            revision: branch, tag or commit on the Hub.

        Raises:
            PrismError: where a file is missing, truncated, altered or a pickle, or the head was trained on another
                denoiser or VAE (both are named). Other weights of the same architecture give a warning.
        """
        folder = _locate(source, revision)
        config = files.read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("schema") != SCHEMA:
            raise PrismError(f"The file {folder / 'config.json'} does not describe a PRISM head of schema {SCHEMA}.")
        weights = folder / "model.safetensors"
        files.load_safetensors(weights)  # first, as it tells a pickle from a truncated file
        if files.sha256(weights) != config.get("weights_sha256"):
            raise PrismError(f"The file {weights} is not the one its config.json was written for; it was altered.")
        backbone = _backbone(pipe)
        _check_fingerprint(folder, config.get("backbone") or {}, backbone.fingerprint())
        try:
            head = QueryHead(**{name: config[name] for name in _head_options()})
            judge = cls(backbone, config["tap"], head, config["dimensions"], config["eta"], config["trained_on"])
        except KeyError as error:
            raise PrismError(f"The file {folder / 'config.json'} lacks the field {error}.") from error
        except TypeError as error:
            raise PrismError(f"The file {folder / 'config.json'} holds a value of the wrong type ({error}).") from error
        judge.head.load_weights(weights)
        judge.head.eval()
        return judge

    def save_pretrained(
        self, folder: str | os.PathLike[str], trained_on: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write config.json, model.safetensors and README.md (a model card) as a folder that appears whole.

        Args:
            folder: where to; an existing one is refused unless ``overwrite``.
            trained_on: replaces ``self.trained_on``.
        """
        if trained_on is not None:
            self.trained_on = dict(trained_on)
        with files.new_folder(folder, overwrite) as temporary:
            weights = temporary / "model.safetensors"
            save_file({name: value.contiguous().cpu() for name, value in self.head.state_dict().items()}, weights)
            config = self.config() | {"weights_sha256": files.sha256(weights), "trained_on": self.trained_on}
            files.write_json(temporary / "config.json", config)
            (temporary / "README.md").write_text(model_card(config), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """What describes this judge apart from its weights, as JSON."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            **{name: getattr(self.head, name) for name in _head_options()},
            "dimensions": list(self.dimensions),
            "tap": self.tap,
            "eta": self.eta,
            "backbone": self.backbone.fingerprint(),
        }

    @torch.no_grad()
    def score(self, noisy_latents: Tensor, prompts: str | Sequence[str], t: float | Tensor, **call: Any) -> Tensor:
        """Scores of latents that are already at noise level t.

        Args:
            noisy_latents: (B, ...) as the denoiser gets them, in the layout of the sampling loop.
            prompts: one per row, or one for all.
            t: scalar or (B,) in [0, 1000], 0 clean and 1000 noise.
            **call: further arguments of the pipeline's call (height, images, ...); conditioning is captured with them.

        Returns:
            (B, num_dimensions) float32, higher is better.

        Raises:
            PrismError: where a row's latents give no finite score.
        """
        conditioning = self.backbone.condition(self._prompts(prompts, len(noisy_latents)), **call)
        return self._finite(self.score_tokens(self.backbone.tokens(noisy_latents, conditioning, t, self.tap)))

    @torch.no_grad()
    def score_clean(
        self,
        latents: Tensor,
        prompts: str | Sequence[str],
        t: float,
        num_draws: int = 2,
        generator: torch.Generator | None = None,
        **call: Any,
    ) -> tuple[Tensor, Tensor]:
        """Scores of finished latents, re-noised to level t (Eq. 1) with the same noise for every row.

        Shared noise makes candidates comparable: what it adds to all their scores cancels in the ranking.

        Args:
            latents: (B, ...) normalised latents of finished videos.
            prompts: one per row, or one for all.
            t: noise level in [0, 1000].
            num_draws: noise draws to average over.
            generator: CPU generator of the noise; None: seeded with 0.
            **call: further arguments of the pipeline's call.

        Returns:
            Mean over draws and its standard error (NaN for one draw), each (B, num_dimensions) float32.
        """
        if num_draws < 1:
            raise PrismError(f"num_draws must be 1 or more, found {num_draws}.")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        conditioning = self.backbone.condition(self._prompts(prompts, len(latents)), **call)
        latents = latents.to(self.backbone.device)
        draws = []
        for _ in range(num_draws):
            noise = torch.randn((1, *latents.shape[1:]), generator=generator).to(latents).expand_as(latents)
            noisy = self.backbone.add_noise(latents, t, noise)
            draws.append(self._finite(self.score_tokens(self.backbone.tokens(noisy, conditioning, t, self.tap))))
        scores = torch.stack(draws)
        error = scores.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(scores[0], torch.nan)
        return scores.mean(0), error

    @torch.no_grad()
    def score_tokens(self, tokens: Tokens) -> Tensor:
        """Scores (B, num_dimensions) float32 of tokens that were tapped at ``self.tap``."""
        return self.head(tokens.visual, tokens.text, tokens.text_mask)

    @staticmethod
    def _prompts(prompts: str | Sequence[str], rows: int) -> list[str]:
        listed = [prompts] * rows if isinstance(prompts, str) else list(prompts)
        if len(listed) != rows:
            raise PrismError(f"Each row of the latents needs its prompt, found {len(listed)} prompts for {rows} rows.")
        return listed

    @staticmethod
    def _finite(scores: Tensor) -> Tensor:
        bad = ~scores.isfinite().all(1)
        if bool(bad.any()):
            raise PrismError(f"Row {int(bad.nonzero()[0])} has no finite score; its latents hold NaN or infinity.")
        return scores


def _backbone(pipe: Any) -> Backbone:
    return pipe if isinstance(pipe, Backbone) else Backbone(pipe)


def _head_options() -> list[str]:
    return [name for name in inspect.signature(QueryHead.__init__).parameters if name != "self"]


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The local folder of a head: as given, or its snapshot from the Hub."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise PrismError(f"A head is a folder with config.json and model.safetensors, but {folder} is a file.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise PrismError(f"The head folder {folder} does not exist.")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "model.safetensors", "README.md"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises many kinds: no network, no such repository, no access
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PrismError(
            f"There is no folder {folder}, and no head of this name came from the Hub: {reason}"
        ) from error


def _check_fingerprint(folder: Path, saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for field, part in ARCHITECTURE.items():
        if saved.get(field) != found.get(field):
            raise PrismError(
                f"The head in {folder} was trained on the {part} {saved.get(part.lower())} "
                f"({_short(saved.get(f'{part.lower()}_config'))}), this pipeline has {found.get(part.lower())} "
                f"({_short(found.get(f'{part.lower()}_config'))}); load the backbone it was trained on."
            )
    if saved.get("weights") != found.get("weights"):
        warnings.warn(
            f"The head in {folder} was trained on other weights of this architecture; "
            "check its accuracy on this backbone before relying on it.",
            stacklevel=3,
        )


def _short(digest: Any) -> str:
    return f"configuration {str(digest)[:8]}"

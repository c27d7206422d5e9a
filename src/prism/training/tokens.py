"""The token cache: what heads read of training videos at fixed draws of noise, kept in a folder for further trainings.

    FOLDER/DIGEST/cache.json                     what the tokens depend on, in words and as JSON
    FOLDER/DIGEST/GROUP-DRAW-KIND.safetensors    tokens after each tapped block, of a prompt's videos of one shape

The backbone is frozen, so that a head of another size, aggregation, objective or learning rate reads the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism import files
from prism.backbone import Backbone, Tokens
from prism.backbone.fingerprint import VERSIONED
from prism.errors import PrismError, quoted
from prism.preference import LatentStore
from prism.preference.store import store_identity
from prism.training.config import TrainConfig

FORMAT, SCHEMA = "prism-tokens", 1
READ_BY = (
    *("seed", "max_prompts", "per_prompt", "source", "trajectory_share", "t_low", "t_high", "levels"),
    *("noise_draws", "shared_noise"),
)
"""Settings of the training that decide what the tokens are."""


class TokenCache:
    """Tokens of groups at fixed draws of noise, from the folder where they are there, else read and kept.

    Tokens of a group's videos of one kind are read by themselves, so that they do not depend on what else is in a
    batch. Files appear whole; several processes and runs may share a folder.

    Args:
        config: with a `token_cache` and `noise_draws`.
        store, dimensions, taps: what is read.
        units: number of files that there will be, for the estimate of the space.

    Raises:
        PrismError: where the folder cannot be written or holds something else.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Mapping[str, Any],
        backbone: Backbone,
        dimensions: Sequence[str],
        taps: Sequence[int],
        units: int,
    ) -> None:
        fingerprint = {name: value for name, value in backbone.fingerprint().items() if name not in VERSIONED}
        identity = {
            "format": FORMAT,
            "schema": SCHEMA,
            "store": {name: value for name, value in store.items() if name != "name"},
            "backbone": fingerprint,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "taps": list(taps),
            "dimensions": list(dimensions),
            "train": {name: getattr(config, name) for name in READ_BY},
        }
        identity = json.loads(json.dumps(identity))
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        blocks = ", ".join(map(str, taps))
        draws = f"{config.noise_draws} fixed draws of noise and t per prompt"
        what = f"Tokens after blocks {blocks} at {draws}, to train heads on"
        self.folder, self.taps, self.units, self.made = Path(config.token_cache) / digest, list(taps), units, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            label = self.folder / "cache.json"
            if not label.is_file():
                files.write_json(label, {"what": what, **identity})
        except OSError as error:
            raise PrismError(
                f"The token cache {quoted(config.token_cache, 150)} cannot be written ({error.strerror or error}); "
                "choose another folder, or leave it out."
            ) from error
        kept = files.read_json(label)
        if not isinstance(kept, dict) or {name: kept.get(name) for name in identity} != identity:
            raise PrismError(f"The file {label} does not describe these tokens; delete its folder.")
        self.description = {"what": what, "folder": str(self.folder), "digest": digest}

    def tokens(self, group: int, draw: int, number: int, read: Callable[[], Tokens], device: Any) -> Tokens:
        """The tokens of a group's videos, those of its `number`-th kind; `read` makes them where they are missing."""
        path = self.folder / f"{group:07d}-{draw:04d}-{number:02d}.safetensors"
        if path.is_file():
            try:
                return _loaded(path, device)
            except Exception:  # damaged: read anew
                path.unlink(missing_ok=True)
        tokens = read()
        self._keep(path, tokens)
        return tokens

    def _keep(self, path: Path, tokens: Tokens) -> None:
        tensors = {"visual": tokens.visual, **{f"lower.{block}": value for block, value in tokens.lower.items()}}
        tensors |= {name: value for name in ("text", "text_mask") if (value := getattr(tokens, name)) is not None}
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if not self.made:
            self._check_space(sum(value.nbytes for value in kept.values()))
        notes = {"grid": json.dumps(list(tokens.grid)), "block": json.dumps(tokens.block)}
        try:
            with files.new_file(path) as whole:
                save_file(kept, whole, metadata=notes)
        except OSError as error:
            raise PrismError(
                f"The token cache {self.folder} cannot be written ({error.strerror or error}); make room, or leave it "
                "out and go on with --resume."
            ) from error
        self.made += 1

    def _check_space(self, size: int) -> None:
        """Say how large the cache will be, judged by its first file, and refuse what the disk does not hold."""
        existing = sum(1 for _ in self.folder.glob("*.safetensors"))
        needed, free = size * max(1, self.units - existing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise PrismError(
                f"The token cache {self.folder} would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                "free; lower noise_draws, max_prompts or per_prompt, or leave it out."
            )
        print(f"prism: tokens are kept in {self.folder}, about {needed / 1e9:.2f} GB more", file=sys.stderr, flush=True)


def _loaded(path: Path, device: Any) -> Tokens:
    with safe_open(path, framework="pt") as opened:
        notes = opened.metadata()
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name).to(device, copy=True) for name in opened.keys()}  # noqa: SIM118

    lower = {int(name.partition(".")[2]): value for name, value in tensors.items() if name.startswith("lower.")}
    grid, block = json.loads(notes["grid"]), json.loads(notes["block"])
    return Tokens(tensors["visual"], tuple(grid), tensors.get("text"), tensors.get("text_mask"), lower, block)


def cache_of(
    config: TrainConfig,
    store: LatentStore,
    backbone: Backbone,
    dimensions: Sequence[str],
    taps: Sequence[int],
    groups: int,
) -> TokenCache | None:
    """The cache that the configuration asks for, or None."""
    if not config.token_cache:
        return None
    units = groups * config.noise_draws
    return TokenCache(config, store_identity(store), backbone, dimensions, sorted(taps), units)

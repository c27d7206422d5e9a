"""Labelled candidates: many seeds a prompt, sampled, decoded and refereed, kept as latents and preference pairs."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from prism import files, runs
from prism.backbone import Backbone
from prism.backbone.fingerprint import VERSIONED
from prism.checks import SEEDS, whole
from prism.errors import PrismError
from prism.preference import pairs_from_scores, write_store

from . import CALL, grammar, referee

SHIPPED = {"train": (750, 4), "validation": (40, 6), "test": (100, 4)}
"""Split -> prompts and candidates of each, of the store that ships with the package."""
BATCH = 32  # videos sampled together


def candidate_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's candidate: fixed by the run's seed and the prompt, whatever else is sampled."""
    return int(hashlib.sha256(f"{seed} {prompt} {index}".encode()).hexdigest()[:15], 16)


def parse_share(text: str) -> tuple[str, tuple[int, int]]:
    """`train`, `train:200` or `train:200x6`: a split, how many of its prompts, and candidates of each (8).

    Raises PrismError where the text is none of these."""
    found = re.fullmatch(rf"({'|'.join(grammar.SPLITS)})(?::(\d+)(?:x(\d+))?)?", text)
    if not found:
        raise PrismError(f'The --split "{text}" is not one of {", ".join(grammar.SPLITS)}, or like train:200x6.')
    name, prompts, per_prompt = found.groups()
    return name, (int(prompts or grammar.SPLITS[name]), int(per_prompt or 8))


def run(
    out: Path,
    splits: Mapping[str, tuple[int, int]] = SHIPPED,
    seed: int = 0,
    trajectories: bool = False,
    backbone: Backbone | None = None,
    overwrite: bool = False,
    command: str = "",
    share: tuple[int, int] = (0, 1),
) -> None:
    """Sample candidates of the first prompts of `splits` with `CALL`, and write a latent store to `out`.

    splits: name -> prompts, candidates of each. With `trajectories`, the states after each step but the last are kept
    too, with their noise level. Parts go to `<out>.parts` as they are done, so that a killed run goes on where it was.
    share: (i, n) with n > 1 makes the parts i, i + n, ... alone, so that n processes work side by side; a run without
    it then joins them. Raises PrismError where another run's parts lie there, unless `overwrite`.
    """
    whole("--seed", seed, 0, SEEDS)
    for split, (prompts, per_prompt) in splits.items():
        whole(f"The prompts of --split {split}", prompts, 1, 10**7)
        whole(f"The candidates of --split {split}", per_prompt, 1, 10_000)
    runs.check(out, overwrite, "store")
    if backbone is None:
        from . import pipeline

        backbone = Backbone(pipeline())
    work = [
        (split, p, candidate_seed(seed, p, i))
        for split, (prompts, per_prompt) in splits.items()
        for p in grammar.prompts(split, prompts)
        for i in range(per_prompt)
    ]
    call = dict(CALL)
    meta = {
        "command": command or f"prism shapeworld candidates --seed {seed}",
        "seed": seed,
        "call": call,
        "backbone": backbone.fingerprint(),
        "dimensions": list(referee.DIMENSIONS),
        "tie_margins": referee.TIE_MARGINS,
    }
    shares = {split: list(share) for split, share in splits.items()}
    identity = {**meta, "splits": shares, "trajectories": trajectories}
    changeable = [f"backbone.{name}" for name in VERSIONED]
    parts = runs.Parts(runs.parts_of(out), identity, restart=overwrite, shared=share[1] > 1, changeable=changeable)
    chunks = [work[start : start + BATCH] for start in range(0, len(work), BATCH)]
    done = []
    for number, chunk in enumerate(tqdm(chunks, disable=None, desc="candidates", unit=f"x{BATCH} videos")):
        if number % share[1] != share[0]:
            continue
        path = parts.folder / f"{number:05d}.safetensors"
        part = _whole(path, len(chunk))
        if part is None:
            part = _sample(backbone, call, chunk, trajectories)
            with files.new_file(path) as finished:
                save_file(part, finished)
        done.append(part)
    if share[1] > 1:
        return
    joined = {name: torch.cat([part[name] for part in done]) for name in done[0]}
    columns: dict[str, Any] = {
        "video": [f"{split}-{s}" for split, _, s in work],
        "prompt": [prompt for _, prompt, _ in work],
        "seed": [s for _, _, s in work],
        "split": [split for split, _, _ in work],
    }
    columns |= {name: joined[f"score/{name}"].tolist() for name in referee.DIMENSIONS}
    videos = pa.table(columns)
    recorded = {name: joined[name] for name in ("states", "t")} if trajectories else None
    with runs.new(out, overwrite, "store") as folder:
        pairs = pairs_from_scores(videos, referee.TIE_MARGINS)
        write_store(folder, videos, joined["latents"], pairs, meta, recorded, eight_bits=True)
    parts.remove()


def _whole(path: Path, count: int) -> dict[str, torch.Tensor] | None:
    """A part of `count` videos that was made before; None where it is to be made, anew if its file is damaged."""
    if not path.is_file():
        return None
    try:
        part = files.load_safetensors(path)
    except PrismError as error:
        warnings.warn(f"{error} It is made anew.", stacklevel=3)
        return None
    return part if part and all(len(value) == count for value in part.values()) else None


def _sample(
    backbone: Backbone, call: dict[str, Any], chunk: list[tuple[str, str, int]], trajectories: bool
) -> dict[str, torch.Tensor]:
    pipe, prompts = backbone.pipe, [prompt for _, prompt, _ in chunk]
    states, levels = [], []

    def record(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        sigma = float(pipe.scheduler.sigmas[step + 1])
        if sigma > 0:
            states.append(tensors["latents"].half())
            levels.append(1000 * sigma)
        return tensors

    latents = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for _, _, seed in chunk],
        output_type="latent",
        callback_on_step_end=record if trajectories else None,
        **call,
    ).frames
    scores = [referee.batch(backbone.decode(rows).cpu(), names) for rows, names in _in_eights(latents, prompts)]
    part = {f"score/{name}": torch.cat([score[name] for score in scores]) for name in referee.DIMENSIONS}
    part["latents"] = latents.half().contiguous()
    if trajectories:
        part |= {"states": torch.stack(states, 1), "t": torch.tensor(levels).expand(len(chunk), -1).contiguous()}
    return part


def _in_eights(latents: torch.Tensor, prompts: list[str]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for start in range(0, len(prompts), 8):
        yield latents[start : start + 8], prompts[start : start + 8]

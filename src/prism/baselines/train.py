"""Train a pixel judge on the same pairs and with the same objective as the judge on hidden states.

Decoding is what costs: every video is decoded once, and where noisy videos are wanted a few re-noised copies too, into
a file of frames beside the run that a resumed run goes on with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from prism import files
from prism.backbone import Backbone
from prism.baselines.pixel import DECODE_ROWS, PixelJudge
from prism.errors import PrismError
from prism.evaluation.evaluator import pair_margins
from prism.preference import LatentStore, PromptGroup
from prism.training import TrainConfig
from prism.training.batches import training_groups
from prism.training.checkpoint import load_checkpoint, save_checkpoint
from prism.training.learner import Learner


@dataclass(frozen=True)
class PixelConfig:
    """Settings of a pixel judge's training."""

    steps: int = 600
    prompts_per_step: int = 4
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    dropout: float = 0.1
    width: int = 48
    layers: int = 3
    noise_draws: int = 2
    """Re-noised copies of each training video that a judge trained on noisy videos sees, each at a level of its own."""
    validate_every: int = 50
    seed: int = 0

    def for_learner(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup_steps=20,
            validate_every=self.validate_every,
            keep_best=True,
            seed=self.seed,
        )


class Frames:
    """Decoded videos as bytes in a memory-mapped file, filled once, resumable: copy 0 clean, further ones re-noised."""

    def __init__(
        self,
        path: Path,
        store: LatentStore,
        backbone: Backbone,
        groups: Sequence[PromptGroup],
        draws: int,
        seed: int,
        progress: bool = True,
    ) -> None:
        self.place = {video: row for row, video in enumerate(v for group in groups for v in group.videos)}
        work = [(draw, number) for draw in range(draws + 1) for number in range(len(groups))]
        one = backbone.decode(store.latents(groups[0].videos[:1]))
        shape = (draws + 1, len(self.place), *one.shape[1:])
        done_path = path.with_suffix(".json")
        found = done_path.is_file() and path.is_file()
        known: dict[str, Any] = files.read_json(done_path) if found else {"shape": None, "done": 0}
        fresh = known["shape"] != list(shape)
        self.bytes = np.lib.format.open_memmap(path, "w+" if fresh else "r+", np.uint8, shape)  # type: ignore[no-untyped-call]
        start = 0 if fresh else int(known["done"])
        bar = tqdm(work[start:], initial=start, total=len(work), desc="decode", disable=None if progress else True)
        for position, (draw, number) in enumerate(bar, start):
            videos = groups[number].videos
            latents = store.latents(videos).to(backbone.device)
            if draw:  # one level a group, as the judge on hidden states trains
                rng = np.random.default_rng([seed, draw, number])
                generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                latents = backbone.add_noise(latents, float(rng.uniform(0, 1000)), noise)
            seen = torch.cat([backbone.decode(rows) for rows in latents.split(DECODE_ROWS)])
            rows = [self.place[video] for video in videos]
            self.bytes[draw, rows] = (seen * 255).round().to(torch.uint8).cpu().numpy()
            if (position + 1) % 20 == 0 or position + 1 == len(work):
                self.bytes.flush()
                files.write_json(done_path, {"shape": list(shape), "done": position + 1})

    def __call__(self, videos: Sequence[str], draw: int = 0) -> Tensor:
        """(B, T, H, W, 3) float32 in [0, 1]."""
        rows = [self.place[video] for video in videos]
        return torch.from_numpy(np.asarray(self.bytes[draw, rows])).float() / 255


class _Validation:
    """Accuracy on clean decoded validation videos."""

    def __init__(self, frames: Frames, groups: Sequence[PromptGroup], call: dict[str, Any]) -> None:
        self.frames, self.groups, self.call = frames, groups, call

    def accuracy(self, judge: Any) -> list[float]:
        scores: dict[str, np.ndarray] = {}
        for group in self.groups:
            values = judge.score_videos(self.frames(group.videos), group.prompt, **self.call)
            scores.update(zip(group.videos, values.double().cpu().numpy(), strict=True))
        labels, margins, _ = pair_margins(self.groups, scores)
        decided = np.abs(labels) == 1
        judge.head.train()
        return (((labels * margins > 0) & decided).sum(0) / np.maximum(decided.sum(0), 1)).tolist()


def train_pixel(
    store: LatentStore,
    backbone: Backbone,
    config: PixelConfig,
    out: str | Path,
    noisy: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pixel judge on the store's training pairs and save it as the folder `out`.

    With `noisy`, a prompt's videos are shown as often decoded from re-noised latents as clean. The weights of the best
    validation (clean videos, mean over dimensions) are kept. Frames and checkpoints lie in `<out>.parts` until the run
    is done; one that was killed goes on from there.

    Returns {"history", "steps", "seconds", "prompts", "pairs", "parameters"}; raises PrismError where `out` exists or
    the store has no training or validation pairs."""
    started, out = time.perf_counter(), Path(out)
    files.check_new_folder(out)
    settings = config.for_learner()
    groups = training_groups(store, store.dimensions, settings)
    validation = store.groups("validation", store.dimensions)
    if not validation:
        raise PrismError(
            f"The store {store.folder} has no validation pairs, by which a pixel judge's weights are chosen."
        )
    name = "pixel-noisy" if noisy else "pixel"
    options = {"width": config.width, "layers": config.layers, "dropout": config.dropout}
    judge = PixelJudge.untrained(backbone, store.dimensions, config.seed, name, **options)
    parts = out.absolute().with_name(f"{out.name}.parts")
    identity = {"config": asdict(config), "noisy": noisy, "store": store.meta, "backbone": backbone.fingerprint()}
    if parts.is_dir() and files.read_json(parts / "config.json") != identity:
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    files.write_json(parts / "config.json", identity)

    draws = config.noise_draws if noisy else 0
    seen = Frames(parts / "train.npy", store, backbone, groups, draws, config.seed, progress)
    held_out = _Validation(
        Frames(parts / "validation.npy", store, backbone, validation, 0, config.seed, progress), validation, store.call
    )
    text, mask = judge.text([group.prompt for group in groups], **store.call)
    accelerator = Accelerator(cpu=backbone.device.type == "cpu", device_placement=False)
    learner = Learner(judge, settings, accelerator)  # type: ignore[arg-type]  # it asks for head, dimensions and eta alone
    first = load_checkpoint(parts / "checkpoints", learner)
    for step in tqdm(
        range(first, config.steps), initial=first, total=config.steps, desc=f"train {name}",
        disable=None if progress else True,
    ):  # fmt: skip
        torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout, so that a resumed run is the same
        rng = np.random.default_rng([config.seed, step])
        videos, rows, batch = [], [], {"first": [], "second": [], "labels": []}  # type: ignore[var-annotated]
        for place in range(config.prompts_per_step):
            number = _group(step * config.prompts_per_step + place, len(groups), config.seed)
            group, offset = groups[number], len(rows)
            draw = int(rng.integers(1, draws + 1)) if draws and rng.uniform() < 0.5 else 0
            videos.append(seen(group.videos, draw))
            rows += [number] * len(group.videos)
            batch["first"].append(group.first + offset)
            batch["second"].append(group.second + offset)
            batch["labels"].append(group.labels)
        tensors = {key: torch.from_numpy(np.concatenate(value)).to(backbone.device) for key, value in batch.items()}
        frames = torch.cat(videos).to(backbone.device)
        scores = judge.head(frames, text[rows], None if mask is None else mask[rows])
        pairs = SimpleNamespace(first=tensors["first"], second=tensors["second"], labels=tensors["labels"].float())
        learner.update(step, scores, pairs)  # type: ignore[arg-type]
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            learner.validate(step, held_out)  # type: ignore[arg-type]
        if (step + 1) % 100 == 0 and step + 1 < config.steps:
            save_checkpoint(parts / "checkpoints", step + 1, learner)
    learner.finish(store, groups)
    judge.trained_on |= {"noisy": noisy, "source": "decoded", "config": asdict(config), "history": learner.history}
    judge.save_pretrained(out)
    shutil.rmtree(parts)
    return {
        "history": learner.history,
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "prompts": len(groups),
        "pairs": judge.trained_on["pairs"],
        "parameters": sum(p.numel() for p in judge.head.parameters()),
    }


def _group(position: int, count: int, seed: int) -> int:
    """The prompt at a position of the endless sequence of shuffled epochs."""
    epoch, place = divmod(position, count)
    return int(np.random.default_rng([seed, epoch]).permutation(count)[place])

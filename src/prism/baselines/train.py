"""Train a pixel judge on the same pairs, groups and objective as the judge on hidden states, by the same machinery.

Only what a batch shows differs: decoded frames. Decoding is what costs, so that frames are kept (see `frames`) and a
noisy video is one of a few re-noised copies, which come up again epoch by epoch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from prism import files
from prism.backbone import Backbone
from prism.baselines.frames import DecodedCache
from prism.baselines.pixel import PixelJudge
from prism.errors import PrismError
from prism.evaluation.evaluator import noised, pair_margins
from prism.preference import LatentStore, PromptGroup
from prism.training import TrainConfig
from prism.training.batches import Batch, Batches, training_groups
from prism.training.checkpoint import load_checkpoint, save_checkpoint
from prism.training.learner import Learner, store_identity
from prism.training.validation import LEVELS


@dataclass(frozen=True)
class PixelConfig:
    """Settings of a pixel judge's training, chosen on validation prompts (docs/pixel-judge.md)."""

    steps: int = 4000
    prompts_per_step: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    width: int = 64
    layers: int = 2
    noise_draws: int = 4
    """Re-noised copies of each training video that a judge trained on noisy videos sees; a prompt's videos share t."""
    noisy_share: float = 0.5
    """How often such a judge is shown a prompt's videos noisy."""
    validate_every: int = 200
    precision: str = "auto"
    """Of the arithmetic in training: "float32", "bfloat16", or "auto": bfloat16 where the machine is fast at it."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.for_learner()  # checks what it takes over
        least = {"width": 8, "layers": 1, "noise_draws": 1, "validate_every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PrismError(f"The pixel setting {name} must be {low} or more, found {getattr(self, name)!r}.")
        if self.width % 8:
            raise PrismError(f"The pixel setting width must be a multiple of 8, found {self.width!r}.")
        for name in ("dropout", "noisy_share"):
            if not 0 <= getattr(self, name) < 1:
                raise PrismError(
                    f"The pixel setting {name} must be at least 0 and below 1, found {getattr(self, name)!r}."
                )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise PrismError(
                f"The pixel setting precision must be auto, float32 or bfloat16, found {self.precision!r}."
            )

    def for_learner(self) -> TrainConfig:
        """What the machinery of the judge on hidden states is told."""
        return TrainConfig(
            steps=self.steps,
            prompts_per_step=self.prompts_per_step,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup_steps=20,
            noise_draws=self.noise_draws,
            validate_every=self.validate_every,
            keep_best=True,
            checkpoint_every=100,
            seed=self.seed,
        )


def train_pixel(
    store: LatentStore,
    backbone: Backbone,
    config: PixelConfig,
    out: str | Path,
    noisy: bool = False,
    progress: bool = True,
    frames: DecodedCache | None = None,
) -> dict[str, Any]:
    """Train a pixel judge on the store's training pairs and save it as the folder `out`.

    The saved weights are those of the best validation accuracy, mean over dimensions: on clean videos, and with `noisy`
    on these and on videos at t = 899, 699 and 499.

    Args:
        store: opened store with training and validation pairs; all of its dimensions are learned.
        backbone: whose VAE made the latents.
        config: settings.
        out: the judge's folder, which must not exist. Checkpoints, and frames unless `frames` is given, lie in
            `<out>.parts` until the run is done; one that was killed goes on from there, on a CPU to the same weights.
        noisy: show videos as often decoded from a re-noised latent (t ~ U(0, 1000)) as clean.
        progress: show a progress bar (on a terminal).
        frames: where decoded frames are kept, to be shared by several runs.

    Returns:
        {"history", "steps", "seconds", "decoded", "prompts", "pairs", "parameters"}; the history is as of
        `prism.training.train`, and `decoded` counts the videos that had to be decoded.

    Raises:
        PrismError: where `out` exists, or the store has no training or validation pairs.
    """
    started, out = time.perf_counter(), Path(out)
    files.check_new_folder(out)
    settings = config.for_learner()
    groups = training_groups(store, store.dimensions, settings)
    held_out = store.groups("validation", store.dimensions)
    if not held_out:
        raise PrismError(
            f"The store {store.folder} has no validation pairs, by which a pixel judge's weights are chosen."
        )
    parts = _parts(out, store, backbone, config, noisy)
    frames = DecodedCache(parts / "frames", backbone) if frames is None else frames
    decoded = frames.decoded

    name = "pixel-noisy" if noisy else "pixel"
    options = {"width": config.width, "layers": config.layers, "dropout": config.dropout}
    judge = PixelJudge.untrained(backbone, store.dimensions, config.seed, name, **options)
    accelerator = Accelerator(cpu=backbone.device.type == "cpu", device_placement=False)
    learner = Learner(judge, settings, accelerator)  # type: ignore[arg-type]  # of a judge it asks head, dimensions, eta
    text, mask = judge.text([group.prompt for group in groups], **store.call)
    shown = _Shown(store, groups, frames, config, noisy)
    validation = _Validation(store, held_out, frames, (0, *LEVELS) if noisy else (0,))
    batches = Batches(store, groups, backbone, settings)
    low = torch.autocast(backbone.device.type, torch.bfloat16, enabled=_bfloat16(config, backbone))

    first = load_checkpoint(parts / "checkpoints", learner)
    bar = tqdm(total=config.steps, initial=first, desc=f"train {name}", disable=None if progress else True)
    for step in range(first, config.steps):
        batch = batches.draw(step, range(config.prompts_per_step))
        videos = shown(step, batch).to(backbone.device).float() / 255
        with torch.random.fork_rng(devices=[]), low:
            torch.manual_seed(config.seed * 1_000_003 + step)  # of dropout: a resumed run draws the same
            scores = judge.head(videos, text[batch.prompts], None if mask is None else mask[batch.prompts])
        learner.update(step, scores, batch)
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            learner.validate(step, validation)  # type: ignore[arg-type]
            judge.head.train()
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < config.steps:
            save_checkpoint(parts / "checkpoints", step + 1, learner)
        bar.update()
    bar.close()

    learner.finish(store, groups)
    judge.trained_on |= {"source": "decoded", "noisy": noisy, "config": asdict(config), "history": learner.history}
    judge.save_pretrained(out)
    shutil.rmtree(parts, ignore_errors=True)
    return {
        "history": learner.history,
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "decoded": frames.decoded - decoded,
        "prompts": len(groups),
        "pairs": judge.trained_on["pairs"],
        "parameters": sum(value.numel() for value in judge.head.parameters()),
    }


@dataclass(frozen=True)
class _Shown:
    """The frames of a step's batch, each prompt's videos clean or noisy."""

    store: LatentStore
    groups: Sequence[PromptGroup]
    frames: DecodedCache
    config: PixelConfig
    noisy: bool

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """(rows, T, H, W, 3) uint8. A function of (seed, step) and the batch."""
        rng, latents, start = np.random.default_rng([self.config.seed, step, 1]), [], 0
        while start < len(batch.prompts):
            videos = self.groups[batch.prompts[start]].videos
            rows = slice(start, start + len(videos))
            is_noisy = self.noisy and rng.uniform() < self.config.noisy_share
            latents.append(batch.noisy_latents[rows].cpu() if is_noisy else self.store.latents(videos))
            start = rows.stop
        return self.frames(torch.cat(latents))


@dataclass(frozen=True)
class _Validation:
    """Accuracy on validation pairs, mean over levels, under the noise that `prism.training` validates with."""

    store: LatentStore
    groups: Sequence[PromptGroup]
    frames: DecodedCache
    levels: Sequence[float]

    def accuracy(self, judge: PixelJudge) -> list[float]:
        """By dimension; one without decided pairs counts 0."""
        shares = []
        for t in self.levels:
            scores: dict[str, np.ndarray] = {}
            for videos, prompts, latents in noised(judge.backbone, self.store, self.groups, t, 1, 0, 16):
                found = judge.score_videos(self.frames(latents).float() / 255, prompts, **self.store.call)
                scores.update(zip(videos, found.double().cpu().numpy()))
            labels, margins, _ = pair_margins(self.groups, scores)
            decided = np.abs(labels) == 1
            shares.append(((labels * margins > 0) & decided).sum(0) / np.maximum(decided.sum(0), 1))
        return np.mean(shares, 0).tolist()


def _parts(out: Path, store: LatentStore, backbone: Backbone, config: PixelConfig, noisy: bool) -> Path:
    """The folder of an unfinished run; checkpoints of another one in it are removed, frames stay good."""
    parts = out.absolute().with_name(f"{out.name}.parts")
    wanted = {"config": asdict(config), "noisy": noisy, "store": store_identity(store)}
    wanted["backbone"] = backbone.fingerprint()
    known = parts / "config.json"
    if not known.is_file() or files.read_json(known) != wanted:
        shutil.rmtree(parts / "checkpoints", ignore_errors=True)
        parts.mkdir(parents=True, exist_ok=True)
        files.write_json(known, wanted)
    return parts


def _bfloat16(config: PixelConfig, backbone: Backbone) -> bool:
    """Whether to train in bfloat16. On CPUs without matrix units it is emulated, and slow."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if backbone.device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16", False))

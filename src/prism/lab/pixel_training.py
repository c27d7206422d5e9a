"""Train a pixel judge on the same pairs, groups and objective as the judge on hidden states, by the same machinery.

The only difference is the input: decoded frames. Decoding takes most of the time. Therefore frames are cached in a
folder (`DecodedCache`) that several judges share, and a noisy video is one of a few re-noised copies, which repeat from
epoch to epoch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism import files, runs, temporary
from prism.backbone import Backbone
from prism.backbone.fingerprint import VERSIONED, vae_hash, vae_hashes
from prism.errors import PrismError
from prism.evaluation.evaluator import Video, noised, videos_of
from prism.lab.pixel import FORMAT, ROWS, PixelJudge, decode
from prism.preference import LatentStore, PromptGroup
from prism.preference.store import store_identity
from prism.team import Team, in_batches
from prism.training import TrainConfig
from prism.training.batches import Batch, Batches, training_groups
from prism.training.conditionings import Conditionings
from prism.training.learner import Learner, Steps, load_checkpoint, save_checkpoint
from prism.training.validation import LEVELS, mean_accuracy


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
    """Re-noised copies of each training video, for a judge that is trained on noisy videos; a prompt's videos share
    t."""
    noisy_share: float = 0.5
    """Share of the steps at which such a judge sees a prompt's videos noisy."""
    validate_every: int = 200
    precision: str = "auto"
    """Number format of training: "float32", "bfloat16", or "auto": bfloat16 where the machine is fast at it."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.for_learner()  # `TrainConfig` checks the settings that it shares
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
        """The settings for the training machinery of the judge on hidden states."""
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
    store: LatentStore | str | Path,
    backbone: Backbone,
    config: PixelConfig,
    out: str | Path,
    noisy: bool = False,
    progress: bool = True,
    frames: DecodedCache | None = None,
) -> dict[str, Any]:
    """Train a pixel judge on the store's training pairs and save it as the folder `out`.

    The saved weights are those of the best validation accuracy, the mean over dimensions: on clean videos, with `noisy`
    also on videos at t = 899, 699 and 499.

    Args:
        store: opened store, or its folder, with training and validation pairs; all of its dimensions are learned.
        backbone: whose VAE made the latents.
        config: settings.
        out: the judge's folder, which must not exist. Checkpoints, and frames unless `frames` is given, lie in
            `<out>.parts` until the run is done. A run that was killed continues from there, on a CPU to the same
            weights.
        noisy: train also on videos decoded from re-noised latents (t ~ U(0, 1000)), at `noisy_share` of the steps.
        progress: show a progress bar (on a terminal).
        frames: cache of decoded frames, which several runs may share.

    Returns:
        {"history", "steps", "seconds", "decoded", "prompts", "pairs", "parameters"}; the history is as of
        `prism.training.train`, and `decoded` counts the videos that had to be decoded.

    Raises:
        PrismError: where `out` exists, another run's parts lie beside it, or the store has no training or validation
            pairs.
    """
    started, out = time.perf_counter(), Path(out)
    team = Team.gathered(backbone.device)
    team.on_first(lambda: runs.check(out, False, FORMAT))
    store, settings = LatentStore.of(store), config.for_learner()
    groups = training_groups(store, store.dimensions, settings)
    held_out = store.groups("validation", store.dimensions)
    if not held_out:
        raise PrismError(
            f"The store {store.folder} has no validation pairs, by which a pixel judge's weights are chosen."
        )
    if team.size > config.prompts_per_step:
        raise PrismError(
            f"The pixel setting prompts_per_step must be at least the number of processes, {team.size}; found "
            f"{config.prompts_per_step}."
        )
    identity = {"config": asdict(config), "noisy": noisy, "store": store_identity(store)}
    identity["backbone"] = backbone.fingerprint()
    changeable = ("store.name", *(f"backbone.{name}" for name in VERSIONED))
    parts_folder = runs.parts_of(out)
    parts: list[runs.Parts] = []  # the first process holds them
    team.on_first(
        lambda: parts.append(runs.claim(parts_folder, identity, True, name=runs.IDENTITY, changeable=changeable))
    )
    frames = DecodedCache(parts_folder / "frames", backbone) if frames is None else frames
    decoded = frames.decoded

    name = "pixel-noisy" if noisy else "pixel"
    options = {"width": config.width, "layers": config.layers, "dropout": config.dropout}
    judge = PixelJudge.untrained(backbone, store.dimensions, config.seed, name, store.call, **options)
    learner = Learner(judge, settings, team)  # type: ignore[arg-type]  # it uses the judge's head, dimensions and eta
    conditionings = Conditionings(backbone, store, groups)
    conditionings.capture()
    show = _Shown(store, groups, frames, config, noisy)
    validation = _Validation(store, held_out, frames, (0, *LEVELS) if noisy else (0,))
    batches = Batches(store, groups, backbone, settings)
    low = torch.autocast(backbone.device.type, torch.bfloat16, enabled=_bfloat16(config, backbone))

    def forward(step: int, videos: Tensor, part: Batch, _rows: int) -> list[Tensor]:
        videos = videos[part.start : part.start + len(part.t)].to(backbone.device).float() / 255
        text, mask = judge.text_of(conditionings.of(part.prompts))
        with torch.random.fork_rng(devices=[]), low:
            # For dropout: a resumed run draws the same.
            torch.manual_seed((config.seed * 1_000_003 + step) * team.size + team.rank)
            return [judge.head(videos, text, mask)]

    first, steps = load_checkpoint(parts_folder / "checkpoints", learner), Steps(settings.max_rows)
    slots = range(team.rank, config.prompts_per_step, team.size)  # this process's prompts of each step
    hidden = None if progress and team.first else True
    for step in tqdm(
        range(first, config.steps), initial=first, total=config.steps, desc=f"train {name}", disable=hidden
    ):
        batch = batches.draw(step, slots)
        videos = show(step, batch, slots)
        steps.take(step, [learner], batch, partial(iter, [batch]), partial(forward, step, videos))
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            learner.validate(step, validation)  # type: ignore[arg-type]
            judge.head.train()
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < config.steps and team.first:
            save_checkpoint(parts_folder / "checkpoints", step + 1, learner)

    learner.finish(store, groups)
    judge.trained_on |= {"source": "decoded", "noisy": noisy, "config": asdict(config), "history": learner.history}

    def publish() -> None:
        judge.save_pretrained(out)
        parts[0].remove()

    team.on_first(publish)
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

    def __call__(self, step: int, batch: Batch, slots: Sequence[int]) -> Tensor:
        """(rows, T, H, W, 3) uint8 of a batch that was drawn for some slots of a step; a function of (seed, step)."""
        chances = np.random.default_rng([self.config.seed, step, 1]).uniform(size=self.config.prompts_per_step)
        latents, start = [], 0
        for slot, (rows, _) in zip(slots, batch.groups, strict=True):
            videos, is_noisy = self.groups[batch.prompts[start]].videos, chances[slot] < self.config.noisy_share
            noisy = batch.noisy_latents[start : start + rows].cpu()
            latents.append(noisy if self.noisy and is_noisy else self.store.latents(videos))
            start += rows
        return self.frames(torch.cat(latents))


@dataclass(frozen=True)
class _Validation:
    """Accuracy on validation pairs, the mean over levels, under the noise that `prism.training` validates with."""

    store: LatentStore
    groups: Sequence[PromptGroup]
    frames: DecodedCache
    levels: Sequence[float]

    def accuracy(self, judge: PixelJudge) -> list[float]:
        """Accuracy per dimension; 0 for a dimension without decided pairs."""
        scores: dict[float, dict[str, np.ndarray]] = {t: {} for t in self.levels}

        def work(batch: Sequence[Video]) -> None:
            videos, prompts = [video for video, _ in batch], [prompt for _, prompt in batch]
            latents = self.store.latents(videos)
            for t, by_video in scores.items():
                frames = self.frames(noised(judge.backbone, latents, videos, t)).float() / 255
                values = judge.score_videos(frames, prompts, **self.store.call)
                by_video.update(zip(videos, values.double().cpu().numpy()))

        in_batches(videos_of(self.groups), ROWS, work, "validating")
        return mean_accuracy(self.groups, list(scores.values()))


def _bfloat16(config: PixelConfig, backbone: Backbone) -> bool:
    """True to train in bfloat16, which CPUs without matrix units emulate slowly."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if backbone.device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


DECODED, DECODED_SCHEMA = "prism-decoded", 1


class DecodedCache:
    """A folder of decoded frames. A call returns what `decode` returns, but decodes each latent only once.

    Frames are bytes, as in a video file. The name of a file is a hash of the latent that it was decoded from: equal
    latents (of the same store, level, seed and draw) share a file, and no stale frames are ever read.

    A file holds a video of T * H * W * 3 bytes, for example 209 kB for 17 frames of 64 x 64. Files appear whole, so
    that a run that was killed continues where it was, and several processes may share a folder.

    Args:
        folder: made where it does not exist.
        backbone: whose VAE decodes.

    Raises:
        PrismError: where the folder holds something else, or frames of another VAE.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: Backbone) -> None:
        self.folder, self.backbone = Path(folder), backbone
        self.decoded = 0  # videos that this process had to decode
        expected = {"format": DECODED, "schema": DECODED_SCHEMA, "vae": vae_hash(backbone)}
        label = self.folder / "cache.json"
        if not label.is_file():
            self._begin(label, expected)
        stored = files.read_json(label)
        if not isinstance(stored, dict) or stored.get("format") != DECODED or stored.get("schema") != DECODED_SCHEMA:
            raise PrismError(
                f"The file {label} does not describe decoded frames of schema {DECODED_SCHEMA}; delete it."
            )
        if {**stored, "vae": None} != {**expected, "vae": None} or str(stored.get("vae")) not in vae_hashes(backbone):
            raise PrismError(f"The frames in {self.folder} were decoded by another VAE; choose another folder.")

    def _begin(self, label: Path, content: dict[str, Any]) -> None:
        """Make the folder and its label, unless the folder holds something else; other processes may do so too."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            taken = any(
                path.suffix == ".npy" or (path.is_dir() and not temporary.NAME.fullmatch(path.name))
                for path in self.folder.iterdir()
            )
            if label.is_file():  # looked for after the frames: another process writes its label before any frames
                return
            if taken:
                raise PrismError(f"The folder {self.folder} holds something else than frames; choose another one.")
            files.write_json(label, content)
        except OSError as error:
            raise PrismError(
                f"Decoded frames cannot be kept in {self.folder}: {error.strerror or error}; choose another folder."
            ) from error

    def __call__(self, latents: Tensor) -> Tensor:
        """Frames (B, T, H, W, 3) uint8 of latents (B, ...), as from `decode`."""
        return torch.stack([self._one(row) for row in latents])

    def __len__(self) -> int:
        """The number of videos in the folder."""
        return sum(1 for _ in self.folder.glob("*.npy"))

    def _one(self, latent: Tensor) -> Tensor:
        values = latent.detach().cpu().float().contiguous().numpy()
        name = hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}.npy"
        if path.is_file():
            try:
                return torch.from_numpy(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError):  # damaged: decoded anew
                path.unlink(missing_ok=True)
        frames = decode(self.backbone, latent[None])[0]
        self.decoded += 1
        try:
            with files.new_file(path) as whole, whole.open("wb") as stream:
                np.save(stream, frames.numpy(), allow_pickle=False)
        except OSError as error:
            raise PrismError(
                f"Decoded frames cannot be kept in {self.folder}: {error.strerror or error}; make room and start "
                "again, what is decoded already is found again."
            ) from error
        return frames

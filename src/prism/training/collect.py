"""Collect candidates of a user's backbone, labelled by rewards, into a latent store, in several processes and with
resumption after a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from prism import files
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.backbone.fingerprint import VERSIONED, fits
from prism.errors import SEEDS, PrismError, listed, quoted, whole
from prism.preference import LatentStore, StoreWriter, unit_name
from prism.preference.prompts import Prompt
from prism.preference.shards import SCHEMA, shard_tables
from prism.preference.sources import Place
from prism.sampling.arguments import batch_size_of
from prism.sampling.trajectory import Trajectory, candidate_seed, sample_together
from prism.team import in_batches
from prism.training.conditionings import check_bare
from prism.training.encode import check_shares, split_of
from prism.training.fan_out import Crew, Make, crew_of, tell_left_out, writing
from prism.training.labels import (
    ByDimension,
    Labels,
    check_fps,
    check_margins,
    check_names,
    check_prompts,
    check_scales,
)
from prism.training.reward import Reward

UNIT = 1
"""Prompts per shard: what a kill can cost."""


class Candidate(NamedTuple):
    """A video to be sampled."""

    video: str
    prompt: Prompt
    seed: int


def collect(
    prompts: Sequence[Prompt | str],
    backbone: Backbone | Crew,
    call: Mapping[str, Any],
    out: str | os.PathLike[str],
    rewards: Sequence[Reward] = (),
    *,
    candidates: int = 4,
    seed: int = 0,
    states: Sequence[int] = (),
    predicted: bool = True,
    half: bool = False,
    margins: ByDimension = 0.0,
    scales: ByDimension | None = None,
    held_out: tuple[float, float] = (0.1, 0.1),
    fps: float | None = None,
    unit: int = UNIT,
    batch_size: int = 1,
    loras: Sequence[str] = (),
    reports: bool = True,
    resume: bool = False,
    command: str = "prism collect",
    progress: bool = True,
) -> LatentStore:
    """Sample candidates of each prompt, have rewards label them, and write both as a store of schema 2.

    With `batch_size` 1 a candidate is a stock call of its own, so that its latents depend on its seed alone, and not on
    the process that makes it or on other candidates; in larger batches they do up to rounding. Candidates whose
    latents are not finite are left out, with a message. The processes of a launcher, or the actors of a Ray cluster,
    share the prompts.

    Args:
        prompts: texts, or prompts from `prism.preference.prompts.read_prompts`. A prompt without a split gets one by a
            hash of its words; a prompt with an image starts from it.
        backbone: its pipeline samples; or a crew that holds one, such as `prism.training.actors.Actors`.
        call: the pipeline's arguments, as JSON; kept in the store.
        out: the store's folder; new, or with `resume` the same run's.
        rewards: they label the videos; without any, videos have no labels (see `label`).
        candidates: per prompt.
        seed: of the run; a candidate's seed follows from it, the prompt and the candidate's number.
        states: steps whose states are stored, counted from 1 as cuts are.
        predicted: store the clean latents that the denoiser predicts at these steps.
        half: keep all latents in float16, instead of the dtype that the pipeline computes in.
        margins: largest difference of scores that is a tie: one for all dimensions, or by dimension.
        scales: pairs also have probabilities, sigmoid(difference of scores / scale), which training takes in place of
            labels: one scale for all dimensions, or by dimension; None: labels alone.
        held_out: shares of the prompts that become validation and test prompts.
        fps: frames per second, for rewards that take them.
        unit: prompts per shard.
        batch_size: candidates per stock call, of one shard and one image; 1 for families whose rows depend on each
            other. Halved, with a warning, where memory runs out.
        loras: names of the loaded LoRAs with their scales; recorded in the store, and the same when it is resumed.
        reports: say on stderr what training and evaluation of a head would lack.
        resume: continue a run that was stopped or killed; sampled and labelled candidates stay.

    Raises:
        PrismError: for a call that the pipeline does not take, steps that it does not make, an `out` that holds
            something else, or a reward that fails; units that were made before stay.
    """
    check_names(rewards)
    check_fps(rewards, fps)
    check_margins(margins, rewards)
    check_scales(scales, rewards)
    candidates, seed = whole("candidates", candidates, 1, 10_000), whole("seed", seed, 0, SEEDS)
    unit, shares = whole("unit", unit, 1, 100_000), check_shares(held_out)
    batch_size = whole("batch_size", batch_size, 1, 10_000)
    steps = sorted({whole("A step of states", step, 1, 10_000) for step in listed("states", states, object)})
    call = {name: value for name, value in call.items() if name != "output_type"}
    arguments = normalised(call)
    requested = [each if isinstance(each, Prompt) else Prompt(each, Place("", row)) for row, each in enumerate(prompts)]
    check_prompts(rewards, [each.text for each in requested])
    crew = crew_of(backbone)
    fingerprint, digests = crew.ask(partial(_checked, prompts=requested, call=arguments, steps=steps))
    key, meta = _identity(requested, digests, fingerprint, call, candidates, seed, steps, predicted, half, shares)
    key |= {"loras": [str(each) for each in loras]} if loras else {}
    key |= {"batch_size": batch_size} if batch_size > 1 else {}  # latents differ by rounding
    meta["command"] = command
    opened = partial(StoreWriter, os.path.abspath(out), key, meta, resume, changeable=_CHANGEABLE)
    with writing(crew, opened) as writer:
        labels = Labels(writer, rewards, margins=margins, scales=scales, reports=reports)
        units = [
            (unit_name(number, [each.video for each in rows]), rows)
            for number, rows in enumerate(
                _candidates(requested[start : start + unit], candidates, seed, digests)
                for start in range(0, len(requested), unit)
            )
        ]
        done = crew.on_first(lambda: [writer.has(name) and not labels.missing(name) for name, _ in units])
        if candidates == 1 and crew.first and reports:
            print(
                "prism: warning: one candidate a prompt gives no pairs; give --candidates 2 or more.", file=sys.stderr
            )
        begin = partial(
            _sampler,
            opened=opened,
            rewards=rewards,
            call=arguments,
            fps=fps,
            margins=margins,
            scales=scales,
            steps=steps,
            predicted=predicted,
            half=half,
            shares=shares,
            batch_size=batch_size,
        )
        sentences = crew.share("collecting", "videos", units, done, begin, progress)

        def finish() -> None:
            tell_left_out("candidates are left out", sentences)
            if not labels.finish():
                raise PrismError("No candidate has finite latents; sample in a wider dtype (--dtype bf16 or fp32).")

        crew.on_first(finish)
    return LatentStore.open(out)


def label(
    store: str | os.PathLike[str],
    backbone: Backbone | Crew,
    rewards: Sequence[Reward],
    *,
    margins: ByDimension = 0.0,
    scales: ByDimension | None = None,
    fps: float | None = None,
    resume: bool = False,
    progress: bool = True,
) -> LatentStore:
    """Label the videos of a collected store anew, without sampling, so that pairs have labels by these rewards.

    Ratings by other rewards stay in the store. resume: continue a labelling that was stopped or killed.

    Raises:
        PrismError: for a store that `collect` did not make, a backbone with another VAE, or a reward that fails.
    """
    if not rewards:
        raise PrismError("No reward is named to label the store by; give --reward.")
    check_fps(rewards, fps)
    check_margins(margins, rewards)
    check_scales(scales, rewards)
    folder = Path(store)
    if not (folder / "store.json").is_file():
        raise PrismError(f"The folder {files.shown(folder)} is no store; name one that prism collect made.")
    meta = files.read_json(folder / "store.json")
    key = meta.get("key") if isinstance(meta, dict) else None
    if not isinstance(key, dict) or "candidates" not in key or meta.get("schema") != SCHEMA:
        raise PrismError(
            f"The store {files.shown(folder)} was not made by prism collect, and its labels are not replaced."
        )
    crew = crew_of(backbone)
    refusals, _ = crew.ask(partial(_fits, fingerprint=meta.get("backbone") or {}))
    if refusals:
        was, present = refusals[0]
        raise PrismError(f"The store {files.shown(folder)} is of the {was}, and the backbone has {present}.")
    identity = {name: value for name, value in meta.items() if name not in ("schema", "key")}
    opened = partial(StoreWriter, os.path.abspath(folder), key, identity, True)
    with writing(crew, opened) as writer:
        labels = Labels(writer, rewards, margins=margins, scales=scales)
        if not resume:
            crew.on_first(labels.drop)
        shards = shard_tables(folder, writer.key)
        units = [(name, rows.to_pylist()) for name, (rows, _) in shards.items()]
        done = crew.on_first(lambda: [not labels.missing(name) for name, _ in units])
        arguments = normalised(meta.get("call") or {})
        begin = partial(
            _labeller, opened=opened, rewards=rewards, call=arguments, fps=fps, margins=margins, scales=scales
        )
        crew.share("labelling", "videos", units, done, begin, progress)
        crew.on_first(labels.finish)
    return LatentStore.open(folder)


_CHANGEABLE = ("command", *(f"backbone.{name}" for name in VERSIONED))


def _identity(
    prompts: Sequence[Prompt], digests: Mapping[str, str], fingerprint: Mapping[str, Any], call: Mapping[str, Any],
    candidates: int, seed: int, steps: Sequence[int], predicted: bool, half: bool, held_out: tuple[float, float],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The store's key, which holds all that the latents depend on, and further fields of store.json."""
    try:
        plain_call = json.loads(json.dumps(dict(call), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PrismError(
            f"The call holds what a store cannot keep as JSON ({quoted(error, 120)}); give paths of files in place of "
            "pictures, and texts in place of embeddings."
        ) from error
    text = json.dumps([[each.text, each.split, *([digests[each.image]] if each.image else [])] for each in prompts])
    key = {
        "backbone": {name: value for name, value in fingerprint.items() if name not in VERSIONED},
        "call": plain_call,
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "candidates": candidates,
        "seed": seed,
        "states": list(steps),
        "predicted": predicted and bool(steps),
        "held_out": list(held_out),
        "dtype": "float16" if half else "the pipeline's",
    }
    return key, {"call": plain_call, "backbone": dict(fingerprint), "seed": seed}


def _checked(
    backbone: Backbone, prompts: Sequence[Prompt], call: dict[str, Any], steps: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The backbone's fingerprint, and the SHA-256 of each image. Raises PrismError for a call that it does not take."""
    if not backbone.family.takes_prompts:
        raise PrismError(f"{type(backbone.pipe).__name__} takes no prompt, and candidates are collected by prompt.")
    backbone.check_call([prompt.text for prompt in prompts], call)
    count = call.get("num_inference_steps", backbone.default("num_inference_steps"))
    others = any(
        call.get(name) is not None for name in ("timesteps", "sigmas", "strength")
    )  # which change the number of steps
    if steps and isinstance(count, int) and not others and steps[-1] > count:
        raise PrismError(f"The call makes no step {steps[-1]}; --states takes steps from 1 to {count}.")
    return backbone.fingerprint(), _image_digests(prompts, backbone, call)


def _fits(backbone: Backbone, fingerprint: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    return fits(fingerprint, backbone, ("vae",))


def _image_digests(prompts: Sequence[Prompt], backbone: Backbone, call: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of the prompts' images by path. Raises PrismError for an image that cannot be opened or used."""
    digests: dict[str, str] = {}
    for prompt in prompts:
        if prompt.image is None or prompt.image in digests:
            continue
        if not backbone.takes("image"):
            raise PrismError(
                f"{type(backbone.pipe).__name__} takes no image, and {prompt.place} names one; leave the column image "
                "out."
            )
        try:
            normalised({"image": prompt.image})
            digests[prompt.image] = files.sha256(prompt.image)
        except (PrismError, OSError) as error:
            raise PrismError(f"The image of {prompt.place} cannot be sampled with: {error}") from error
    bare = next((prompt for prompt in prompts if prompt.image is None), None)
    if bare is not None:
        check_bare(backbone, bare.text, call, f'The prompt "{quoted(bare.text, 100)}"')
    return digests


def _candidates(prompts: Sequence[Prompt], count: int, seed: int, digests: Mapping[str, str]) -> list[Candidate]:
    texts = [f"{each.text}\0{digests[each.image]}" if each.image else each.text for each in prompts]
    seeds = [
        (prompt, candidate_seed(seed, text, index)) for prompt, text in zip(prompts, texts) for index in range(count)
    ]
    return [Candidate(f"seed-{each}", prompt, each) for prompt, each in seeds]


def _sampler(
    backbone: Backbone, *, opened: Callable[..., StoreWriter], rewards: Sequence[Reward], call: Mapping[str, Any],
    fps: float | None, margins: ByDimension, scales: ByDimension | None, **settings: Any,
) -> Make:  # fmt: skip
    """A function that samples and labels a unit in this process; `settings`: further arguments of `_write`."""
    writer = opened(main=False)
    labels = Labels(writer, rewards, backbone, call, fps, margins, scales)

    def make(name: str, candidates: Sequence[Any], count: Callable[[int], Any]) -> list[str]:
        dropped = [] if writer.has(name) else _write(writer, name, candidates, backbone, call, **settings)
        if writer.has(name):  # not if all its candidates were dropped
            labels.label(name)
        count(len(candidates))
        return dropped

    return make


def _labeller(
    backbone: Backbone, *, opened: Callable[..., StoreWriter], rewards: Sequence[Reward], call: Mapping[str, Any],
    fps: float | None, margins: ByDimension, scales: ByDimension | None,
) -> Make:  # fmt: skip
    """A function that labels a unit in this process."""
    labels = Labels(opened(main=False), rewards, backbone, call, fps, margins, scales)

    def make(name: str, rows: Sequence[Any], count: Callable[[int], Any]) -> list[str]:
        labels.label(name)
        count(len(rows))
        return []

    return make


def _sampled(
    backbone: Backbone, batch: Sequence[Candidate], call: Mapping[str, Any], steps: Sequence[int], predicted: bool
) -> list[Trajectory]:
    """The trajectories of candidates that start from one image, or from none, in one stock call."""
    path = batch[0].prompt.image
    arguments = call if path is None else {**call, **normalised({"image": path})}
    prompts, seeds = [each.prompt.text for each in batch], [each.seed for each in batch]
    return sample_together(backbone, prompts, seeds, arguments, steps, predicted=predicted)


def _write(
    writer: StoreWriter, name: str, candidates: Sequence[Candidate], backbone: Backbone, call: Mapping[str, Any],
    steps: Sequence[int], predicted: bool, half: bool, shares: tuple[float, float], batch_size: int,
) -> list[str]:  # fmt: skip
    """Sample and write one unit; return a sentence for each candidate whose latents are not finite."""
    finite: list[Candidate] = []
    sampled: list[Trajectory] = []
    dropped = []

    def take(batch: Sequence[Candidate]) -> None:
        for candidate, trajectory in zip(batch, _sampled(backbone, batch, call, steps, predicted)):
            if half:
                halves = {
                    name: each.half() for name, each in trajectory._asdict().items() if name != "t" and each is not None
                }
                trajectory = trajectory._replace(**halves)
            if all(each.isfinite().all() for each in trajectory if each is not None):
                finite.append(candidate)
                sampled.append(trajectory)
            else:
                dropped.append(f"the latents of seed {candidate.seed} hold NaN or infinity; a wider dtype may help")

    size = batch_size_of(backbone, batch_size, len(candidates), call)
    for _, same in groupby(candidates, lambda each: each.prompt.image):
        size = in_batches(list(same), size, take, "sampling")
    if not finite:
        return dropped
    columns = {
        "video": [each.video for each in finite],
        "prompt": [each.prompt.text for each in finite],
        "split": [each.prompt.split or split_of(each.prompt.text, shares) for each in finite],
        "seed": [each.seed for each in finite],
        "model": [type(backbone.pipe).__name__] * len(finite),
        "image": pa.array(
            [None if each.prompt.image is None else writer.keep_image(each.prompt.image) for each in finite],
            pa.string(),
        ),
        "source": [each.prompt.place.source for each in finite],
        "source_row": [each.prompt.place.row for each in finite],
    }
    tensors: dict[str, Tensor] = {}
    for field in Trajectory._fields:
        rows = [getattr(each, field) for each in sampled]
        if rows[0] is not None:
            tensors[field] = torch.stack(rows)
    writer.write(name, pa.table(columns), tensors)
    return dropped

"""Encode the clips of a preference set into a latent store, once: by several processes, resumed after a kill."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from prism.backbone import Backbone
from prism.backbone.fingerprint import VERSIONED
from prism.clips import FramePolicy, read_clip
from prism.errors import PrismError, quoted, whole
from prism.preference import LatentStore, StoreWriter, check_disjoint, prompt_key, unit_name
from prism.preference.pairs import SPLITS, dimensions_of
from prism.preference.readers import PreferenceSet, pairs
from prism.preference.shards import indexed
from prism.runs import Clock
from prism.team import Team

UNIT = 64
"""Clips per shard: what a kill can cost, and what is held at once."""


def encode(
    found: PreferenceSet,
    backbone: Backbone,
    call: Mapping[str, Any],
    policy: FramePolicy,
    out: str | os.PathLike[str],
    *,
    rule: str = "majority",
    margin: float = 0.0,
    soft: bool = False,
    held_out: tuple[float, float] = (0.1, 0.1),
    unit: int = UNIT,
    resume: bool = False,
    command: str = "prism encode",
    progress: bool = True,
) -> LatentStore:
    """Encode every clip that a pair names, and write the pairs beside the latents, as a store of schema 2.

    A clip is encoded by itself, so that its latent does not depend on the others. Clips that cannot be read are told,
    and left out with their pairs. The processes of a launcher share the units.

    Args:
        found: clips and votes, as of `prism.preference.readers.read`.
        backbone: whose VAE encodes.
        call: the pipeline's arguments for videos of this size (height, width, num_frames, ...); kept in the store.
        policy: which frames of a clip are taken, and at which size.
        out: the store's folder; new, or with `resume` the same run's.
        rule, margin, soft: how votes become labels, as of `prism.preference.readers.pairs`.
        held_out: shares of the prompts that are validation and test prompts, where the set names no splits; a prompt's
            split depends on its words alone.
        unit: clips per shard.
        resume: go on with a run that was stopped or killed.

    Raises:
        PrismError: where there is nothing to encode, the policy's frames do not give the latents that `call` makes, or
            `out` holds something else.
    """
    unit = whole("unit", unit, 1, 100_000)
    labelled = with_splits(pairs(found, rule, margin, soft), held_out)
    clips = _clips(found, labelled)
    team = Team.gathered(backbone.device)
    fingerprint = backbone.fingerprint()
    key = {
        "backbone": {name: value for name, value in fingerprint.items() if name not in VERSIONED},
        "frames": asdict(policy),
        "dtype": "float16",
    }
    dimensions = list(dimensions_of(labelled))
    meta = {"call": dict(call), "backbone": fingerprint, "dimensions": dimensions, "command": command, "seed": None}
    changeable = ("command", *(f"backbone.{name}" for name in VERSIONED))
    writers: list[StoreWriter] = []

    def begin(main: bool) -> None:
        writers.append(StoreWriter(out, key, meta, resume, main, changeable))

    team.on_first(lambda: begin(True))
    if not team.first:
        begin(False)
    writer = writers[0]
    units = [clips[start : start + unit] for start in range(0, len(clips), unit)]
    mine = list(itertools.islice(enumerate(units), team.rank, None, team.size))
    shape = tuple(backbone.condition([clips[0]["prompt"]], **call).shape)  # type: ignore[union-attr]
    bar = tqdm(
        total=sum(len(rows) for _, rows in mine),
        desc="encode",
        unit=" clips",
        disable=None if progress and team.first else True,
    )
    clock = Clock("encoding clips", len(mine))

    def work() -> list[str]:
        unread: list[str] = []
        for done, (place, rows) in enumerate(mine):
            name = unit_name(place, [row["video"] for row in rows])
            if not (there := writer.has(name)):
                unread.extend(_write(writer, name, rows, found.root, backbone, policy, shape, bar))
            else:
                bar.update(len(rows))
            if team.first:
                clock.tick(done + 1, not there)
        return unread

    parts = team.agree(work)
    bar.close()

    def finish() -> None:
        unread = [sentence for part in parts for sentence in part]
        if unread:
            print(
                f"prism: {len(unread)} clips could not be read and are left out with their pairs: "
                f"{quoted(unread[0], 200)}{' ...' if len(unread) > 1 else ''}",
                file=sys.stderr,
            )
        if not writer.finish():
            raise PrismError(f"None of the {len(clips)} clips could be read: {quoted(unread[0], 300)}")
        videos = indexed(writer.folder, writer.key)[0]["video"]
        there = pc.and_(pc.is_in(labelled["video_a"], videos), pc.is_in(labelled["video_b"], videos))
        ratings = found.ratings if len(found.ratings) else None
        writer.label(labelled.filter(there), found.votes if len(found.votes) else None, ratings)

    team.on_first(finish)
    return LatentStore.open(out)


def with_splits(labelled: pa.Table, held_out: tuple[float, float]) -> pa.Table:
    """The pairs with a split each: the set's, or by a hash of the prompt's words where the set names none."""
    shares = [float(share) for share in held_out]
    if len(shares) != 2 or min(shares) < 0 or sum(shares) >= 1:
        raise PrismError(f"held_out must be two shares from 0 that leave some prompts to train on; found {held_out}.")
    given = labelled["split"].to_pylist()
    strange = sorted({split for split in given if split is not None and split not in SPLITS})
    if strange:
        raise PrismError(f"The set has the split {quoted(strange[0], 60)}; a store has {', '.join(SPLITS)}.")
    splits = [
        _split_of(prompt, shares) if split is None else split
        for prompt, split in zip(labelled["prompt"].to_pylist(), given)
    ]
    place = labelled.column_names.index("split")
    found = labelled.set_column(place, "split", pa.array(splits, pa.string()))
    check_disjoint(found)
    return found


def _split_of(prompt: str, shares: Sequence[float]) -> str:
    chance = int(prompt_key(prompt)[:12], 16) / 16**12
    if chance < shares[0]:
        return "validation"
    return "test" if chance < shares[0] + shares[1] else "train"


def _clips(found: PreferenceSet, labelled: pa.Table) -> list[dict[str, Any]]:
    """The clips that pairs name, in the set's order, each with its pairs' prompt and split."""
    heads: dict[str, tuple[str, str]] = {}
    for prompt, a, b, split in zip(*(labelled[name].to_pylist() for name in ("prompt", "video_a", "video_b", "split"))):
        for video in (a, b):
            if heads.setdefault(video, (prompt, split)) != (prompt, split):
                raise PrismError(
                    f"The clip {quoted(video, 120)} is in pairs of two prompts, {quoted(heads[video][0], 80)} and "
                    f"{quoted(prompt, 80)}; a clip is judged for one prompt."
                )
    clips = [
        {**row, "prompt": heads[row["video"]][0], "split": heads[row["video"]][1]}
        for row in found.videos.to_pylist()
        if row["video"] in heads
    ]
    if not clips:
        raise PrismError("The set names no pair of clips, so that there is nothing to encode.")
    return clips


def _source(root: Path, row: Mapping[str, Any]) -> Any:
    return str(root / row["path"]) if row["path"] is not None else [str(root / name) for name in row["frames"]]


def _write(
    writer: StoreWriter,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    root: Path,
    backbone: Backbone,
    policy: FramePolicy,
    shape: tuple[int, ...],
    bar: Any,
) -> list[str]:
    """Encode and write one unit; the sentences of those clips that cannot be read."""
    latents, kept, unread = [], [], []
    for row in rows:
        try:
            clip = read_clip(_source(root, row), policy, row["fps"] if row["frames"] else None)
        except PrismError as error:
            unread.append(str(error))
        else:
            latent = backbone.encode(clip.frames[None])
            if tuple(latent.shape[1:]) != shape:
                raise PrismError(
                    f"{len(clip.frames)} frames of {clip.frames.shape[1]} x {clip.frames.shape[2]} give latents "
                    f"{tuple(latent.shape[1:])}, and the pipeline makes {shape} at its own arguments; give --height, "
                    "--width and --num-frames that it takes."
                )
            latents.append(latent.cpu().half())
            kept.append(row)
        bar.update()
    if kept:
        columns = {each: [row[each] for row in kept] for each in ("video", "prompt", "split", "model", "source")}
        places = [row["row"] for row in kept]
        writer.write(name, pa.table({**columns, "source_row": places}), {"latents": torch.cat(latents)})
    return unread

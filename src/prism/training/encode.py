"""Encode the clips of a preference set into a latent store, by one or several processes; a killed run is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from prism import files
from prism.backbone import Backbone
from prism.backbone.arguments import normalised
from prism.backbone.fingerprint import VERSIONED
from prism.backbone.videos import encode_frames
from prism.clips import FramePolicy, clip_facts, read_clip
from prism.errors import PrismError, quoted, whole
from prism.preference import LatentStore, StoreWriter, check_disjoint, prompt_key, unit_name
from prism.preference.caches import LatentCache
from prism.preference.pairs import SPLITS, dimensions_of
from prism.preference.readers import PreferenceSet, pairs
from prism.preference.shards import indexed
from prism.training.cached import CachedLatents
from prism.training.conditionings import check_bare
from prism.training.fan_out import Crew, Make, crew_of, tell_left_out, writing
from prism.training.labels import without_pairs

UNIT = 64
"""Clips per shard: as many are lost at most when a process is killed, and their latents held in memory at once."""
AHEAD = 4
"""Clips that are decoded by as many threads while the VAE encodes another one."""
Facts = dict[str, float | None]
Results = Generator[Callable[[], tuple[dict[str, torch.Tensor], Facts]], None, None]


def encode(
    preference_set: PreferenceSet,
    backbone: Backbone | Crew,
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
    latents: LatentCache | None = None,
    command: str = "prism encode",
    progress: bool = True,
) -> LatentStore:
    """Encode every clip that a pair names, and write the pairs beside the latents, as a store of schema 2.

    Each clip is encoded alone, so that its latent does not depend on the others. Clips that cannot be read, or whose
    image cannot, are reported and left out with their pairs. Images are kept where the pipeline takes one. The
    processes of a launcher (``torchrun``) share the shards, or the actors of a Ray cluster.

    Args:
        preference_set: clips and votes, from `prism.preference.readers.read`.
        backbone: its VAE encodes; or a crew that holds one, such as `prism.training.actors.Actors`.
        call: the pipeline's arguments for videos of this size (height, width, num_frames, ...); kept in the store.
        policy: the frames taken from a clip, and their size.
        out: the store's folder; new, or with `resume` that of the run to continue.
        rule, margin, soft: how votes become labels, as in `prism.preference.readers.pairs`.
        held_out: shares of the prompts that become validation and test prompts, for a set without splits; a prompt's
            split depends on its text alone.
        unit: clips per shard.
        resume: continue a run that was stopped or killed.
        latents: a cache in which the clips' latents are looked up; no clip is decoded, `policy` is not used, and shards
            follow the cache's order.

    Raises:
        PrismError: if there is nothing to encode, if latents of the policy's frames differ in shape from those that
            `call` makes, or if `out` holds something else.
    """
    unit = whole("unit", unit, 1, 100_000)
    labelled = with_splits(pairs(preference_set, rule, margin, soft), held_out)
    clips = _clips(preference_set, labelled)
    if latents is None:
        _check_there(preference_set, clips)
    crew = crew_of(backbone)
    reader = partial(
        _reader,
        preference_set=replace(preference_set, root=preference_set.root.absolute()),
        policy=policy,
        call=dict(call),
        clips=clips,
        latents=None if latents is None else replace(latents, _open=None),
    )
    fingerprint, reader_key, clips, absent, images = crew.ask(partial(_planned, reader=reader))
    key = {
        "backbone": {name: value for name, value in fingerprint.items() if name not in VERSIONED},
        **({"frames": asdict(policy)} if latents is None else {"latents": reader_key}),
        "dtype": "float16",
        **({"images": images} if images else {}),
    }
    dimensions = list(dimensions_of(labelled))
    meta = {"call": dict(call), "backbone": fingerprint, "dimensions": dimensions, "command": command, "seed": None}
    changeable = ("command", *(f"backbone.{name}" for name in VERSIONED))
    opened = partial(StoreWriter, os.path.abspath(out), key, meta, resume, changeable=changeable)
    with writing(crew, opened) as writer:
        units = [
            (unit_name(number, [row["video"] for row in rows]), rows)
            for number, rows in enumerate(clips[start : start + unit] for start in range(0, len(clips), unit))
        ]
        done = crew.on_first(lambda: [writer.has(name) for name, _ in units])
        begin = partial(_encoder, opened=opened, reader=reader)
        sentences = crew.share("encoding", "clips", units, done, begin, progress)

        def finish() -> None:
            unread = absent + sentences
            tell_left_out("clips could not be read and are left out with their pairs", unread)
            if not writer.finish():
                raise PrismError(f"None of the {len(clips)} clips could be read: {quoted(unread[0], 300)}")
            videos = indexed(writer.folder, writer.key)[0]["video"]
            readable = pc.and_(pc.is_in(labelled["video_a"], videos), pc.is_in(labelled["video_b"], videos))
            ratings = preference_set.ratings if len(preference_set.ratings) else None
            for sentence in without_pairs(labelled.filter(readable)):
                print(f"prism: warning: {sentence}", file=sys.stderr)
            writer.label(
                labelled.filter(readable), preference_set.votes if len(preference_set.votes) else None, ratings
            )

        crew.on_first(finish)
    return LatentStore.open(out)


def with_splits(labelled: pa.Table, held_out: tuple[float, float]) -> pa.Table:
    """The pairs, each with a split: that of the set, or one by a hash of the prompt's text if the set names none."""
    shares = check_shares(held_out)
    column = labelled["split"].to_pylist()
    unknown = sorted({split for split in column if split is not None and split not in SPLITS})
    if unknown:
        raise PrismError(f"The set has the split {quoted(unknown[0], 60)}; a store has {', '.join(SPLITS)}.")
    splits = [
        split_of(prompt, shares) if split is None else split
        for prompt, split in zip(labelled["prompt"].to_pylist(), column)
    ]
    index = labelled.column_names.index("split")
    split_pairs = labelled.set_column(index, "split", pa.array(splits, pa.string()))
    check_disjoint(split_pairs)
    return split_pairs


def check_shares(held_out: Sequence[float]) -> tuple[float, float]:
    """The shares of validation and test prompts, checked."""
    shares = [float(share) for share in held_out]
    if len(shares) != 2 or not min(shares) >= 0 or not sum(shares) < 1:
        raise PrismError(f"held_out must be two shares from 0, together below 1; found {held_out}.")
    return shares[0], shares[1]


def split_of(prompt: str, shares: Sequence[float]) -> str:
    """The split of a prompt by a hash of its words; `shares`: of validation and of test prompts."""
    chance = int(prompt_key(prompt)[:12], 16) / 16**12
    if chance < shares[0]:
        return "validation"
    return "test" if chance < shares[0] + shares[1] else "train"


def _clips(preference_set: PreferenceSet, labelled: pa.Table) -> list[dict[str, Any]]:
    """The clips that pairs name, in the set's order, each with its pairs' prompt and split, and its image's path."""
    prompt_of: dict[str, tuple[str, str]] = {}
    for prompt, a, b, split in zip(*(labelled[name].to_pylist() for name in ("prompt", "video_a", "video_b", "split"))):
        for video in (a, b):
            if prompt_of.setdefault(video, (prompt, split)) != (prompt, split):
                raise PrismError(
                    f"The clip {quoted(video, 120)} is in pairs of two prompts, {quoted(prompt_of[video][0], 80)} and "
                    f"{quoted(prompt, 80)}; a clip is judged for one prompt."
                )
    clips = [
        {
            **row,
            "prompt": prompt_of[row["video"]][0],
            "split": prompt_of[row["video"]][1],
            "image": row["image"] and str(preference_set.root.absolute() / row["image"]),
        }
        for row in preference_set.videos.to_pylist()
        if row["video"] in prompt_of
    ]
    if not clips:
        why = "; ".join(f"{len(places):,} left out, {each}" for each, places in preference_set.dropped.items())
        raise PrismError(f"The set names no pair of clips, so there is nothing to encode{f' ({why})' if why else ''}.")
    return clips


def _check_there(preference_set: PreferenceSet, clips: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a set none of whose clips is there, before any work."""
    missing = set(preference_set.missing)
    if missing and all(missing & {row["path"], *(row["frames"] or ())} for row in clips):
        raise PrismError(
            f"None of the {len(clips)} clips of pairs is there, such as {quoted(preference_set.missing[0], 100)} in "
            f"{quoted(str(preference_set.root), 120)}; name the folder that they are in with --root."
        )


def _images_of(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many clips start from an image, and a digest of which image each starts from; empty where none does."""
    of_clips = [(row["video"], row["image"]) for row in clips if row["image"]]
    whole, digests = hashlib.sha256(), {}
    for video, image in of_clips:
        if image not in digests:
            try:
                size, content = files.ends(image)
                digests[image] = f"{size} {hashlib.sha256(content).hexdigest()}"
            except (PrismError, OSError, ValueError):  # told when its clip is encoded
                digests[image] = "none"
        whole.update(f"{video}\0{digests[image]}\0".encode(errors="surrogatepass"))
    return {"clips": len(of_clips), "digest": whole.hexdigest()[:16]} if of_clips else {}


class _Encoder:
    """The latents of clips, each decoded and encoded by itself."""

    key: ClassVar[dict[str, Any]] = {}

    def __init__(self, source: PreferenceSet, backbone: Backbone, policy: FramePolicy, shape: tuple[int, ...]) -> None:
        self.source, self.backbone, self.policy, self.shape = source, backbone, policy, shape

    def each(self, rows: Sequence[Mapping[str, Any]]) -> Results:
        """A function per clip, in their order, that gives its tensor "latents" (1, ...), float16, and its facts.

        It raises PrismError if the clip cannot be read. The next clips are read meanwhile; closing this ends that.
        """
        pool, reading = ThreadPoolExecutor(AHEAD, "prism-clips"), deque[Future[tuple[np.ndarray, Facts]]]()
        try:
            for row in rows:
                reading.append(pool.submit(self._read, row))
                if len(reading) > AHEAD:
                    yield partial(self._latents, reading.popleft())
            while reading:
                yield partial(self._latents, reading.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, row: Mapping[str, Any]) -> tuple[np.ndarray, Facts]:
        source = self.source.source(row["path"], row["frames"])
        clip = read_clip(source, self.policy, row["fps"] if row["frames"] else None)
        return clip.frames, clip_facts(clip)

    def _latents(self, reading: Future[tuple[np.ndarray, Facts]]) -> tuple[dict[str, torch.Tensor], Facts]:
        frames, facts = reading.result()
        return {"latents": encode_frames(self.backbone, frames, self.shape).cpu().half()}, facts


def _reader(
    backbone: Backbone, *, preference_set: PreferenceSet, policy: FramePolicy, call: Mapping[str, Any],
    clips: list[dict[str, Any]], latents: LatentCache | None,
) -> tuple[CachedLatents | _Encoder, list[dict[str, Any]], list[str]]:  # fmt: skip
    """A process's source of latents, the clips that it holds in its order, and a sentence for each other clip."""
    shape = _shape(backbone, clips, call)
    if latents is None:
        return _Encoder(preference_set, backbone, policy, shape), clips, []
    reader = CachedLatents(latents, backbone, shape)
    return reader, *reader.find(clips)


def _shape(backbone: Backbone, clips: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the latents that the pipeline makes; it is asked with the first image that can be read.

    Raises:
        PrismError: for a clip without an image where the pipeline needs one.
    """
    bare = next((row for row in clips if row["image"] is None), None) if backbone.takes("image") else clips[0]
    if bare is not None:
        check_bare(backbone, bare["prompt"], call, f"The clip {quoted(bare['video'], 100)}")
        return tuple(backbone.condition([bare["prompt"]], **call).shape)  # type: ignore[union-attr]
    for row in clips[:-1]:
        with contextlib.suppress(PrismError):
            normalised({"image": row["image"]})
            break
    else:
        row = clips[-1]
    return tuple(backbone.condition([row["prompt"]], **{**call, "image": row["image"]}).shape)  # type: ignore[union-attr]


def _planned(
    backbone: Backbone, reader: Callable[[Backbone], Any]
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], list[str], dict[str, Any]]:
    """The backbone's fingerprint, the reader's key, the clips that it holds, a sentence for each other clip, and what
    of their images the store's key holds."""
    source, clips, absent = reader(backbone)
    return backbone.fingerprint(), source.key, clips, absent, _images_of(clips) if backbone.takes("image") else {}


def _encoder(backbone: Backbone, *, opened: Callable[..., StoreWriter], reader: Callable[[Backbone], Any]) -> Make:
    """A process's function that writes the shard of some clips; a sentence per clip that it cannot read."""
    writer, (source, _, _) = opened(main=False), reader(backbone)

    def make(name: str, rows: Sequence[Any], count: Callable[[int], Any]) -> list[str]:
        made, kept, facts, unread = [], [], [], []
        with contextlib.closing(source.each(rows)) as results:
            for row, result in zip(rows, results):
                try:
                    image = writer.keep_image(row["image"]) if row["image"] and backbone.takes("image") else None
                    tensors, numbers = result()
                except PrismError as error:
                    unread.append(str(error))
                else:
                    made.append(tensors)
                    kept.append({**row, "image": image})
                    facts.append(numbers)
                count(1)
        if kept:
            columns = {each: [row[each] for row in kept] for each in ("video", "prompt", "split", "model", "source")}
            columns["image"] = pa.array([row["image"] for row in kept], pa.string())
            columns["source_row"] = [row["row"] for row in kept]
            columns |= {each: pa.array([clip[each] for clip in facts], pa.float64()) for each in facts[0]}
            writer.write(name, pa.table(columns), {each: torch.cat([one[each] for one in made]) for each in made[0]})
        return unread

    return make

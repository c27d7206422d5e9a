"""Export a store's videos for people to compare, as a table and as Label Studio tasks, and read answers back."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import posixpath
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pyarrow as pa
from tqdm import tqdm

from prism import files, runs
from prism.backbone import Backbone
from prism.backbone.fingerprint import fits
from prism.errors import SEEDS, PrismError, number, quoted, whole
from prism.preference import LatentStore, StoreWriter
from prism.preference.formats import KNOWN
from prism.preference.pairs import PAIR_COLUMNS, SPLITS
from prism.preference.readers import PreferenceSet, pairs, read
from prism.preference.sets import VOTES, check_dimension, joined, kept_rows
from prism.training.labels import Decoder
from prism.video import write_video

_COLUMN = re.compile(r"(path|video|fps|num_frames|model|image)_[ab]|[ab]_model|mos_.*", re.IGNORECASE)
LOCAL_FILES = "/data/local-files/?d="
"""Prefix by which Label Studio serves files below its LOCAL_FILES_DOCUMENT_ROOT."""


def clip_name(video: str) -> str:
    """File name of a video in an export: a digest of its id, so that people see neither seed nor model."""
    return f"{hashlib.sha256(video.encode(errors='surrogatepass')).hexdigest()[:16]}.mp4"


def check_questions(dimensions: Sequence[str]) -> None:
    """Raise PrismError for dimensions that cannot be the columns of people's answers."""
    if not dimensions:
        raise PrismError("People need a question; give at least one dimension, such as overall.")
    for name in dimensions:
        check_dimension(name, "the questions")
        if name.casefold() in KNOWN or _COLUMN.fullmatch(name) or list(dimensions).count(name) > 1:
            raise PrismError(
                f"The question {quoted(name, 60)} cannot be a column of answers: the name stands for something else, "
                "or twice among the questions; rename it."
            )


def export(
    store: LatentStore | str | os.PathLike[str],
    backbone: Backbone,
    out: str | os.PathLike[str],
    *,
    dimensions: Sequence[str] = ("overall",),
    split: str | None = None,
    pairs_per_prompt: int | None = None,
    seed: int = 0,
    fps: float = 8.0,
    url: str = LOCAL_FILES,
    resume: bool = False,
) -> list[tuple[str, str, str]]:
    """Decode the videos of a store and write pairs of them for people to label.

    Writes to `out`: clips/ (mp4); pairs.csv in VideoAlign's columns, whose columns of dimensions are to be filled with
    A, B or same; tasks.json and labels.xml, which Label Studio imports as tasks and as labelling interface. The order
    of pairs and their sides are random, by `seed`, so that they hint at no answer.

    Args:
        store: a store, such as `prism collect` makes; videos of one prompt, image and shape are compared.
        backbone: whose VAE decodes.
        dimensions: questions that people answer per pair.
        split: videos of this split alone.
        pairs_per_prompt: random pairs per prompt; None: all.
        fps: frames per second of the clips.
        url: prefix of the clips' paths in tasks.json.
        resume: continue an export that was stopped; clips that exist stay.

    Returns:
        Prompt, video A and video B of each pair.

    Raises:
        PrismError: if there is no pair, or `out` holds something else.
    """
    store, fps, seed = LatentStore.of(store), number("fps", fps, 0.1, 240), whole("seed", seed, 0, SEEDS)
    check_questions(dimensions)
    refusals, _ = fits(store.meta.get("backbone") or {}, backbone, ("vae",))
    if refusals:
        raise PrismError(f"The store {store.folder} is of the {refusals[0][0]}, and the backbone has {refusals[0][1]}.")
    chosen = drawn_pairs(store, split, pairs_per_prompt, seed)
    columns = [name.replace("overall", "Overall") for name in dimensions]  # as VideoAlign calls it
    folder = Path(out)
    identity = {
        **{"schema": 1, "store": store.meta.get("key"), "dimensions": list(dimensions), "split": split, "fps": fps},
        **{"pairs_per_prompt": pairs_per_prompt, "seed": seed, "videos": len(store.videos)},
    }
    runs.claim(folder, identity, resume, name="export.json")
    (folder / "clips").mkdir(exist_ok=True)
    prompts = {video: prompt for prompt, *sides in chosen for video in sides}
    decoder = Decoder(backbone)
    for video in tqdm(prompts, "decode", unit=" clips", disable=None):
        path = folder / "clips" / clip_name(video)
        if not path.exists():
            frames = decoder.frames(store.latents([video]), prompts[video], store.call_of(video))
            with files.new_file(path) as work:
                write_video(work, frames, fps)
    rows = [
        {"path_A": f"clips/{clip_name(a)}", "path_B": f"clips/{clip_name(b)}", "prompt": prompt}
        for prompt, a, b in chosen
    ]
    if not (folder / "pairs.csv").exists():  # it may hold answers
        with files.new_file(folder / "pairs.csv") as work, open(work, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ["path_A", "path_B", "prompt", *columns])
            table.writeheader()
            table.writerows(rows)
    served = [{"video_A": f"{url}{row['path_A']}", "video_B": f"{url}{row['path_B']}"} for row in rows]
    tasks = [{"data": {**row, **each}} for row, each in zip(rows, served)]
    with files.new_file(folder / "tasks.json") as work:
        work.write_text(json.dumps(tasks, ensure_ascii=False, indent=1), encoding="utf-8")
    with files.new_file(folder / "labels.xml") as work:
        work.write_text(_interface(columns), encoding="utf-8")
    return chosen


def read_back(
    store: LatentStore | str | os.PathLike[str],
    answers: str | os.PathLike[str],
    *,
    form: str | None = None,
    rule: str = "majority",
    soft: bool = False,
    overwrite: bool = False,
) -> LatentStore:
    """Write people's answers about an export into the store that was exported, as labels of its pairs.

    Args:
        store: the store's folder (schema 2), or the opened store.
        answers: the filled table, or what Label Studio exports (JSON, JSON-MIN or CSV).
        form, rule, soft: as of `prism.preference.readers.read` and `.pairs`.
        overwrite: replace labels that the store has in the answered dimensions; otherwise such answers are refused.

    Raises:
        PrismError: for clips that are not of this store, dimensions that it has labels in, or a damaged file.
    """
    store = LatentStore.of(store)
    if not isinstance(store.meta.get("key"), dict):
        raise PrismError(f"The store {store.folder} has the first schema, which takes no further labels.")
    preference_set = _of_store(read(answers, form), store)
    labelled = pairs(preference_set, rule, soft=soft)
    answered = set(preference_set.votes["dimension"].to_pylist())  # without an overall that follows from others
    dimensions = [name for name in labelled.column_names if name.split(":")[0] in answered]
    labelled = labelled.select([*PAIR_COLUMNS, *dimensions])
    taken = [name for name in dimensions if name in store.pairs.column_names and ":" not in name]
    if taken and not overwrite:
        raise PrismError(
            f"The store {store.folder} has labels in {quoted(taken[0], 60)} already; give --overwrite to replace them, "
            "or rename the column of the answers to keep both."
        )
    key, identity = store.meta["key"], {name: store.meta[name] for name in store.meta if name not in ("schema", "key")}
    again = "import the answers again: the labels that the store had are kept"
    writer = StoreWriter(store.folder, key, identity, resume=True, again=again)
    earlier = kept_rows(store.folder / "votes.parquet", VOTES, "dimension", answered)
    writer.label(joined(store.pairs, labelled, dimensions), votes=pa.concat_tables([earlier, preference_set.votes]))
    return LatentStore.open(store.folder)


def drawn_pairs(
    store: LatentStore, split: str | None, pairs_per_prompt: int | None, seed: int
) -> list[tuple[str, str, str]]:
    """Pairs of videos of one prompt, image and shape, in random order and on random sides."""
    if split is not None and split not in SPLITS:
        raise PrismError(f"There is no split {quoted(split, 60)}; a store has {', '.join(SPLITS)}.")
    if pairs_per_prompt is not None:
        whole("pairs_per_prompt", pairs_per_prompt)
    groups: dict[tuple[str, tuple[int, ...], Path | None], list[str]] = {}
    for video, prompt, each in zip(*(store.videos[name].to_pylist() for name in ("video", "prompt", "split"))):
        if split in (None, each):
            groups.setdefault((prompt, store.shape_of(video), store.image_of(video)), []).append(video)
    chance, chosen = random.Random(seed), []
    for (prompt, *_), videos in groups.items():
        every = list(itertools.combinations(sorted(videos), 2))
        sampled = every if pairs_per_prompt is None else chance.sample(every, min(pairs_per_prompt, len(every)))
        chosen += [(prompt, *(pair if chance.random() < 0.5 else pair[::-1])) for pair in sampled]
    if not chosen:
        raise PrismError(f"The store {store.folder} has no two videos of one prompt{' in this split' * bool(split)}.")
    chance.shuffle(chosen)
    return chosen


def _interface(columns: Sequence[str]) -> str:
    """Label Studio's labelling interface: both clips side by side, and a choice with a tie per dimension."""
    questions = "\n".join(
        f"  <Header value={quoteattr(name)}/>\n"
        f'  <Choices name={quoteattr(name)} toName="A" choice="single" showInline="true" required="true">\n'
        '    <Choice value="A"/><Choice value="same"/><Choice value="B"/>\n'
        "  </Choices>"
        for name in columns
    )
    videos = "".join(
        f'<View><Header value="{side}"/><Video name="{side}" value="$video_{side}"/></View>' for side in "AB"
    )
    return f'<View>\n  <Header value="$prompt"/>\n  <View style="display: flex">{videos}</View>\n{questions}\n</View>\n'


def _of_store(answers: PreferenceSet, store: LatentStore) -> PreferenceSet:
    """The answers with the store's ids, prompts and splits instead of file names of clips."""
    videos = {name: store.videos[name].to_pylist() for name in ("video", "prompt", "split")}
    facts = {video: (prompt, split) for video, prompt, split in zip(*videos.values())}
    by_file = {clip_name(video): video for video in facts}
    ids: dict[str, str] = {}
    for name in answers.videos["video"].to_pylist():
        video = by_file.get(posixpath.basename(name), name)
        if video not in facts:
            raise PrismError(
                f"The clip {quoted(name, 120)} is none of the store {store.folder}; give the answers about its export."
            )
        ids[name] = video
    votes = answers.votes.to_pylist()
    if not votes:
        raise PrismError("The answers hold no label; fill the columns of dimensions with A, B or same.")
    for row in votes:
        row["video_a"], row["video_b"] = ids[row["video_a"]], ids[row["video_b"]]
        row["prompt"], row["split"] = facts[row["video_a"]]
    return replace(answers, votes=pa.Table.from_pylist(votes, answers.votes.schema))

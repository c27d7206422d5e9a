"""`prism score`: finished clips, each with its score, how sure that is, and its place among clips of a reference."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism import files
from prism.commands.encode import Frames
from prism.commands.evaluate import Judged
from prism.commands.options import Seed, levels_of, option
from prism.errors import DRAWS, SEEDS, PrismError, first_difference, quoted, whole

ENDINGS = (".csv", ".json")
SHOWN = 20  # clips that are printed where a file has them all
COLUMNS = ("video", "prompt", "t", "dimension", "score", "standard_error", "draws")
BESIDE = ("percentile", "win_probability", "reference_clips", "reference_of")


@dataclass(frozen=True)
class Tables:
    """How tables of clips are read."""

    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    root: Annotated[Path | None, option("FOLDER", "the file's own")] = None
    """Folder that paths in the file are relative to."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of text files, such as cp1252."""


@dataclass(frozen=True)
class Score:
    """Score finished clips: with standard errors, and their place among the clips of the head's reference.

    FILES are clips, folders of clips, and tables with the columns prompt and video. Ends with exit code 1 where some of
    the clips could not be read.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, option("FILES")]
    """Clips, folders of clips, or tables: CSV, JSON, JSONL, Parquet, or the id of a data set on the Hub."""
    prompt: Annotated[str | None, option("TEXT", "of each clip: a .txt of the same name beside it")] = None
    """Prompt of all clips that are not in a table."""
    image: Annotated[str | None, option("FILE", "a table's column image")] = None
    """Image that the clips were made from, for pipelines that start from one."""
    levels: Annotated[str | None, option("T,T", "the reference's, else those the head is best at", name="t")] = None
    """Noise levels to judge at, 0 (clean) to 1000 (noise)."""
    draws: int = 4
    """Noise draws averaged over at each level."""
    batch_size: Annotated[int, option(about="Rows per denoiser call; halved where memory runs out.")] = 16
    seed: Seed = 0
    out: Annotated[Path | None, option("FILE", "none: the table is printed")] = None
    """File to write, .csv or .json; it appears whole."""
    overwrite: bool = False
    """Replace the file."""
    resume: bool = False
    """Go on with a run for the same file that was stopped or killed."""
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options; flags go before it."""
    tables: Tables = Tables()
    frames: Frames = field(default_factory=Frames)
    models: Judged = field(default_factory=Judged)

    def main(self) -> int:
        """Score, print the table, and return the exit code."""
        document = run(self)
        _show(document, self.out)
        return 1 if document["unread"] else 0


def run(config: Score) -> dict[str, Any]:
    """Score the clips, and write `out`; returns what a .json file of it holds."""
    from tqdm import tqdm

    from prism.backbone.arguments import normalised
    from prism.backbone.videos import call_frames
    from prism.clips import read_clip
    from prism.judge.checks import noise_levels
    from prism.judge.scoring import default_levels, head_digest
    from prism.loading import check_alone, describe, load_backbone, load_judge

    check_alone("score")
    whole("--draws", config.draws, 1, DRAWS)
    whole("--batch-size", config.batch_size)
    whole("--seed", config.seed, 0, SEEDS)
    asked = None if config.levels is None else levels_of("--t", config.levels)
    out = None if config.out is None else _checked_out(config)
    clips = list(clips_of(config))
    backbone, call, name = load_backbone(config.models.backbone, config.models.device, config.models.dtype)
    judge = load_judge(config.models.head, backbone, embedded=config.models.backbone is None)
    policy, call = call_frames(backbone, call, **asdict(config.frames))
    levels = default_levels(judge) if asked is None else noise_levels(backbone, asked)
    check_inputs(backbone, call, clips)
    facts = {
        **{"seed": config.seed, "draws": config.draws, "levels": list(levels), "dimensions": list(judge.dimensions)},
        **{"head": head_digest(judge), "backbone": describe(backbone, name), "frames": asdict(policy)},
        **{"call": json.loads(json.dumps(call, default=str)), "reference": _described(judge.reference)},
    }
    journal = Journal(out, facts, config.resume)
    rows, unread = [], []
    for clip in tqdm(clips, desc="score", unit="clip", disable=None):
        row = journal.rows.get(journal.key(clip))
        if row is None:
            try:
                given = call if clip["image"] is None else {**call, **normalised({"image": clip["image"]})}
                pixels = read_clip(clip["source"], policy, clip["fps"]).frames
            except PrismError as error:
                unread.append({"video": clip["video"], "reason": str(error)})
                continue
            scored = judge.score_video(
                [pixels], clip["prompt"] or "", levels, config.draws, config.seed, None, config.batch_size, **given
            )
            row = {"video": clip["video"], "prompt": clip["prompt"], "image": clip["image"]}
            if scored.compared:
                of = "prompt" if scored.same_prompt[0] else "all"
                row |= {"reference_clips": scored.compared[0], "reference_of": of}
            row["scores"] = _cells(scored)
            journal.add(clip, row)
        rows.append(row)
    for each in unread:
        print(f"prism: left out: {each['reason']}", file=sys.stderr)
    if not rows:
        raise PrismError(f"None of the {len(clips)} clips could be read: {quoted(unread[0]['reason'], 300)}")
    document = {"schema": 1, "command": "score", **facts, "clips": rows, "unread": unread}
    if out is not None:
        _write(out, document)
        journal.end()
    return document


# -- which clips


def clips_of(config: Score) -> Iterator[dict[str, Any]]:
    """The clips that the words name: video (its name), source, prompt, image, fps; each once."""
    from prism.clip_sources import MOVIES, picture_files
    from prism.preference.sources import TABLES

    seen = set()
    if not config.files:
        raise PrismError("Which clips to score is not said; name files, folders or tables.")
    for word in config.files:
        path = Path(word)
        suffix = path.suffix.lower()
        folder = path.is_dir()
        movies = sorted(each for each in path.rglob("*") if each.suffix.lower() in MOVIES) if folder else []
        if movies:
            found = [_single(str(each), config) for each in movies if each.is_file()]
        elif (folder and not picture_files(path)) or (not folder and (suffix in TABLES or not path.exists())):
            clip_or_table = suffix in TABLES or folder or (not suffix and word.count("/") == 1)
            found = _tabled(word, config) if clip_or_table else [_single(word, config)]
        else:
            found = [_single(word, config)]
        for clip in found:
            identity = (clip["video"], clip["prompt"], clip["image"])
            if identity not in seen:
                seen.add(identity)
                yield clip


def _single(path: str, config: Score) -> dict[str, Any]:
    prompt = config.prompt
    beside = Path(path).with_suffix(".txt")
    if prompt is None and beside.is_file():
        try:
            prompt = " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise PrismError(f"The prompt in {quoted(str(beside), 200)} is not UTF-8; save it as such.") from None
    return {"video": path, "source": path, "prompt": prompt, "image": config.image, "fps": None}


def _tabled(word: str, config: Score) -> list[dict[str, Any]]:
    """The clips of a table."""
    from prism.preference.readers import read_clips

    if config.prompt is not None:
        raise PrismError(f"The table {quoted(word, 120)} has a prompt for each clip; leave --prompt out.")
    tables = config.tables
    found = read_clips(word, tables.form, root=tables.root, encoding=tables.encoding)
    for why, places in found.dropped.items():
        print(f"prism: {len(places)} rows of {quoted(word, 120)} are left out: {why}.", file=sys.stderr)
    return [
        {
            **{"video": row["video"], "source": found.source(row["path"], row["frames"]), "prompt": row["prompt"]},
            "image": config.image or (row["image"] and str(found.root / row["image"])),
            "fps": row["fps"] if row["frames"] else None,
        }
        for row in found.videos.to_pylist()
    ]


def check_inputs(backbone: Any, call: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> None:
    """Refuse clips that lack what the pipeline cannot do without, a prompt or an image, before any is read."""
    import inspect

    parameter = inspect.signature(type(backbone.pipe).__call__).parameters.get("image")
    needs = parameter is not None and parameter.default is inspect.Parameter.empty and not call.get("image")
    for clip in clips:
        if backbone.family.takes_prompts and not (clip["prompt"] or "").strip():
            raise PrismError(
                f"The clip {quoted(clip['video'], 120)} has no prompt; give --prompt, a text file of the same name "
                "beside it, or name a table."
            )
        if clip["image"] is None and needs:
            raise PrismError(
                f"{type(backbone.pipe).__name__} starts from an image, and the clip {quoted(clip['video'], 120)} has "
                "none; give --image FILE, or a table with a column image."
            )
        if clip["image"] is not None and parameter is None:
            raise PrismError(f"{type(backbone.pipe).__name__} takes no image; leave --image out.")


# -- what comes out


def _cells(scored: Any) -> list[dict[str, Any]]:
    """One entry per level and dimension of a `VideoScores` of one video."""
    cells = []
    beside = {"percentile": scored.percentiles, "win_probability": scored.win_probabilities}
    for place, t in enumerate(scored.levels):
        for column, dimension in enumerate(scored.dimensions):
            values = {"score": scored.scores, "standard_error": scored.errors}
            values |= {name: value for name, value in beside.items() if value is not None}
            numbers = {name: _number(value[0, place, column].item()) for name, value in values.items()}
            cells.append({"t": t, "dimension": dimension, **numbers})
    return cells


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


def _described(reference: Any) -> dict[str, Any] | None:
    return None if reference is None else {"levels": list(reference.levels), **reference.facts}


def _checked_out(config: Score) -> Path:
    out = Path(config.out)  # type: ignore[arg-type]
    if out.suffix.lower() not in ENDINGS:
        raise PrismError(f"The --out {quoted(str(out), 200)} must end in {' or '.join(ENDINGS)}.")
    if out.is_dir():
        raise PrismError(f"The --out {quoted(str(out), 200)} is a folder; name a file.")
    if out.exists() and not config.overwrite and not (config.resume and Journal.path(out).exists()):
        raise PrismError(f"The --out {quoted(str(out), 200)} exists already; choose another, or give --overwrite.")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrismError(f"The --out {quoted(str(out), 200)} cannot be made: {error.strerror}.") from error
    return out


def _write(out: Path, document: dict[str, Any]) -> None:
    """Write the .csv, a row per clip, level and dimension, or the .json."""
    if out.suffix.lower() == ".json":
        files.write_json(out, document)
        return
    beside = BESIDE if document["reference"] else ()
    images = ("image",) if any(clip["image"] for clip in document["clips"]) else ()
    with files.new_file(out) as work, work.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, *beside, *images], lineterminator="\n")
        writer.writeheader()
        for clip in document["clips"]:
            same = {name: clip[name] for name in ("video", "prompt", *images, *beside[2:])}
            for cell in clip["scores"]:
                writer.writerow({**same, "draws": document["draws"] if cell["t"] else 1, **cell})


class Journal:
    """The clips that are scored, line by line beside `out`, so that a run that was stopped can go on."""

    def __init__(self, out: Path | None, facts: Mapping[str, Any], resume: bool) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.file = None if out is None else self.path(out)
        if self.file is None:
            return
        head = json.dumps({"journal": json.loads(json.dumps(facts))})
        if self.file.exists():
            if not resume:
                raise PrismError(
                    f"The file {files.shown(self.file)} is of a run that stopped; go on with --resume, or delete it."
                )
            self._read(json.loads(head)["journal"])
            return
        with files.new_file(self.file) as work:
            work.write_text(f"{head}\n", encoding="utf-8")

    @staticmethod
    def path(out: Path) -> Path:
        return out.with_name(f"{out.name}.partial")

    @staticmethod
    def key(clip: Mapping[str, Any]) -> str:
        return json.dumps([clip["video"], clip["prompt"], clip["image"]])

    def _read(self, facts: Mapping[str, Any]) -> None:
        """Take over the whole lines of an earlier run with the same facts, and cut off a line that broke."""
        assert self.file is not None
        files.check_regular(self.file)
        data = self.file.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        try:
            before, *rows = (json.loads(line) for line in lines)
            before = before["journal"]
            self.rows = {self.key(row): row for row in rows if isinstance(row["scores"], list)}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PrismError(
                f"The file {files.shown(self.file)} is no list of scored clips, or was altered; delete it."
            ) from None
        if before != facts:
            raise PrismError(
                f"The run in {files.shown(self.file)} was another: {first_difference(before, facts)}; delete it, or "
                "choose another --out."
            )
        os.truncate(self.file, sum(map(len, lines)))

    def add(self, clip: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Note a clip's row."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def end(self) -> None:
        """Remove the list, once `out` is there."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _show(document: Mapping[str, Any], out: Path | None) -> None:
    """Print the table, what it is beside, and where the file is."""
    from rich.console import Console
    from rich.markup import escape

    from prism.report.tables import Column, Table

    clips = document["clips"]
    shown = clips if out is None else clips[:SHOWN]
    rows = [
        {**clip, "t": t, "cells": {cell["dimension"]: cell for cell in clip["scores"] if cell["t"] == t}}
        for clip in shown
        for t in document["levels"]
    ]
    columns: list[Any] = [
        Column("clip", lambda row: escape(quoted(str(row["video"]), 60)), left=True),
        Column("t", lambda row: f"{row['t']:g}"),
        *(Column(escape(name), partial(_cell, name)) for name in document["dimensions"]),
    ]
    console = Console(highlight=False)
    console.print(Table(columns, rows))
    for line in _read_as(document):
        console.print(line, soft_wrap=True, markup=False)
    if out is not None:
        more = f" ({len(clips) - len(shown):,} more clips than shown)" if len(clips) > len(shown) else ""
        console.print(f"Scores: {out}{more}", soft_wrap=True, markup=False)


def _read_as(document: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what the percentiles and probabilities are among."""
    reference = document["reference"]
    if not reference:
        yield "This head has no reference to read scores beside: prism reference --head HEAD --data STORE adds one."
        return
    store = reference["store"] if isinstance(reference.get("store"), dict) else {}
    name, split = (quoted(str(each), 60) for each in (store.get("name"), reference.get("split")))
    yield (
        f"Percentile, and probability of being preferred (half of a tie counts), among clips of {name} ({split}) at "
        f"t = {', '.join(f'{t:g}' for t in reference['levels'])}."
    )
    apart = sum(clip["reference_of"] == "all" for clip in document["clips"])
    if apart:
        shares = reference.get("between_prompts") or {}
        numbers = [share for by_name in shares.values() for share in by_name.values() if share is not None]
        most = f", and up to {max(numbers):.0%} of their variance is between prompts" if numbers else ""
        yield (
            f"The reference lacks the prompts of {apart} of {len(document['clips'])} clips: these stand among clips of "
            f"other prompts{most}, so that their place says more of the prompt than of the clip."
        )


def _cell(dimension: str, row: Mapping[str, Any]) -> str:
    cell = row["cells"][dimension]
    error = cell["standard_error"]
    text = f"{cell['score']:+.2f}" + ("" if error is None else f" ± {error:.2f}")
    if cell.get("percentile") is not None:
        text += f"\n{cell['percentile']:.0f} %, {cell['win_probability']:.2f}"
    return text

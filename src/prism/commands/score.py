"""`prism score`: scores of finished clips, with standard errors, and percentiles among the clips of a reference."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism.commands.encode import Frames
from prism.commands.options import Head, Models, Seed, levels_of, option
from prism.commands.scores import Journal, cells, show, write
from prism.errors import DRAWS, SEEDS, PrismError, quoted, whole

ENDINGS = (".csv", ".json")


@dataclass(frozen=True)
class Tables:
    """Options for reading tables of clips."""

    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    root: Annotated[Path | None, option("FOLDER", "the file's own")] = None
    """Folder that paths in the file are relative to."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of text files, such as cp1252."""


@dataclass(frozen=True)
class Judged(Models):
    """Models and their precision."""

    head: Head = None


@dataclass(frozen=True)
class Score:
    """Score finished clips, with standard errors, and percentiles among the clips of the head's reference.

    FILES are clips, folders of clips, and tables with the columns prompt and video. Ends with exit code 1 where some of
    the clips could not be read. A launcher's processes share the clips.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, option("FILES", "")]
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
    """Continue a run for the same file that was stopped or killed."""
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options; flags override it."""
    tables: Tables = Tables()
    frames: Frames = field(default_factory=Frames)
    models: Judged = field(default_factory=Judged)

    def main(self) -> int:
        """Score, print the table, and return the exit code."""
        document = run(self)
        if os.environ.get("RANK", "0") != "0":  # the first of several processes prints, and tells of unread clips
            return 0
        show(document, self.out)
        return 1 if document["unread"] else 0


def run(config: Score) -> dict[str, Any]:
    """Score the clips, and write `out`; return the document that a .json file holds. A launcher's processes share the
    clips, and the first one writes.
    """
    from tqdm import tqdm

    from prism.backbone.videos import call_frames
    from prism.judge.checks import noise_levels
    from prism.judge.scoring import default_levels, head_digest
    from prism.loading import describe, load_backbone, load_judge
    from prism.team import Team, merged

    whole("--draws", config.draws, 1, DRAWS)
    whole("--batch-size", config.batch_size)
    whole("--seed", config.seed, 0, SEEDS)
    if config.out is None and (config.resume or config.overwrite):
        what = "goes on with" if config.resume else "replaces"
        raise PrismError(f"The --{'resume' if config.resume else 'overwrite'} {what} the file of --out; name it too.")
    requested = None if config.levels is None else levels_of("--t", config.levels)
    team = Team.gathered(config.models.device)
    out, clips = team.on_first(lambda: (_checked_out(config), list(clips_of(config))))
    if not clips:
        raise PrismError(f"There is no clip in {quoted(' '.join(config.files), 200)}.")
    backbone, call, name = load_backbone(config.models.backbone, config.models.device, config.models.dtype)
    judge = load_judge(config.models.head, backbone, embedded=config.models.backbone is None)
    policy, call = call_frames(backbone, call, **asdict(config.frames))
    levels = default_levels(judge) if requested is None else noise_levels(backbone, requested)
    check_inputs(backbone, call, clips)
    facts = {
        **{"seed": config.seed, "draws": config.draws, "levels": list(levels), "dimensions": list(judge.dimensions)},
        **{"head": head_digest(judge), "backbone": describe(backbone, name), "frames": asdict(policy)},
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **{"call": json.loads(json.dumps(call, default=str)), "reference": _described(judge.reference)},
    }
    journal = Journal(out, facts, team.rank)
    before = team.on_first(lambda: journal.begin(config.resume))
    remaining = [index for index, clip in enumerate(clips) if journal.key(clip) not in before]

    def share() -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        rows, unread = {}, {}
        mine = remaining[team.rank :: team.size]
        for index in tqdm(mine, desc="score", unit="clip", disable=None if team.first else True):
            try:
                rows[index] = _scored(judge, clips[index], policy, call, levels, config)
            except Unread as error:
                unread[index] = str(error)
            else:
                journal.add(rows[index])
        return rows, unread

    shares = team.agree(share)
    rows, reasons = merged(rows for rows, _ in shares), merged(reasons for _, reasons in shares)
    scored = [rows.get(index) or before.get(journal.key(clip)) for index, clip in enumerate(clips)]
    unread = [{"video": clips[index]["video"], "reason": reason} for index, reason in reasons.items()]
    document = {"schema": 1, "command": "score", **facts, "clips": [row for row in scored if row], "unread": unread}

    def finish() -> None:
        for each in unread:
            print(f"prism: left out: {each['reason']}", file=sys.stderr)
        if document["clips"] and out is not None:
            write(out, document)
        journal.end()

    team.on_first(finish)
    if not document["clips"]:
        several = f"None of the {len(clips)} clips could be read: " if len(clips) > 1 else ""
        raise PrismError(f"{several}{quoted(unread[0]['reason'], 300)}")
    return document


class Unread(Exception):
    """A clip, or its image, that cannot be read."""


def _scored(
    judge: Any, clip: Mapping[str, Any], policy: Any, call: Mapping[str, Any], levels: Sequence[float], config: Score
) -> dict[str, Any]:
    """The row of one clip. Raises Unread."""
    from prism.backbone.arguments import normalised
    from prism.clips import read_clip

    try:
        arguments = call if clip["image"] is None else {**call, **normalised({"image": clip["image"]})}
        pixels = read_clip(clip["source"], policy, clip["fps"]).frames
    except PrismError as error:
        raise Unread(str(error)) from error
    scored = judge.score_video(
        [pixels], clip["prompt"] or "", levels, config.draws, config.seed, None, config.batch_size, **arguments
    )
    row = {"video": clip["video"], "prompt": clip["prompt"], "image": clip["image"]}
    if scored.compared:
        of = "prompt" if scored.same_prompt[0] else "all"
        row |= {"reference_clips": scored.compared[0], "reference_of": of}
    return {**row, "scores": cells(scored)}


# -- which clips


def clips_of(config: Score) -> Iterator[dict[str, Any]]:
    """The clips that FILES name, each once, as dicts of video (its name), source, prompt, image and fps."""
    from prism.clip_sources import MOVIES, picture_files
    from prism.preference.sources import TABLES

    seen = set()
    if not config.files:
        raise PrismError("Which clips to score is not said; name files, folders or tables.")
    for word in config.files:
        path = Path(word)
        movies = sorted(each for each in path.rglob("*") if each.suffix.lower() in MOVIES) if path.is_dir() else []
        on_the_hub = not path.exists() and re.fullmatch(r"[\w-]+/[\w-]+", word)
        if movies:
            entries = [_single(str(each), config) for each in movies if each.is_file()]
        elif path.suffix.lower() in TABLES or on_the_hub or (path.is_dir() and not picture_files(path)):
            entries = _tabled(word, config)
        else:
            entries = [_single(word, config)]
        for clip in entries:
            identity = (clip["video"], clip["prompt"], clip["image"])
            if identity not in seen:
                seen.add(identity)
                yield clip


def _single(path: str, config: Score) -> dict[str, Any]:
    """A clip of its own, with its prompt from --prompt or from a text file of the same name."""
    prompt = config.prompt
    text_file = Path(path).with_suffix(".txt")
    if prompt is None and text_file.is_file():
        try:
            prompt = " ".join(text_file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise PrismError(f"The prompt in {quoted(str(text_file), 200)} is not UTF-8; save it as such.") from None
    return {"video": path, "source": path, "prompt": prompt, "image": config.image, "fps": None}


def _tabled(word: str, config: Score) -> list[dict[str, Any]]:
    """The clips of a table."""
    from prism.preference.readers import read_clips

    if config.prompt is not None and Path(word).is_dir():
        raise PrismError(f"The folder {quoted(word, 120)} holds no video; name a folder of clips, or a clip.")
    if config.prompt is not None:
        raise PrismError(f"The table {quoted(word, 120)} has a prompt for each clip; leave --prompt out.")
    tables = config.tables
    table = read_clips(word, tables.form, root=tables.root, encoding=tables.encoding)
    for why, places in table.dropped.items():
        print(f"prism: {len(places)} rows of {quoted(word, 120)} are left out: {why}.", file=sys.stderr)
    return [
        {
            **{"video": row["video"], "source": table.source(row["path"], row["frames"]), "prompt": row["prompt"]},
            "image": config.image or (row["image"] and str(table.root / row["image"])),
            "fps": row["fps"] if row["frames"] else None,
        }
        for row in table.videos.to_pylist()
    ]


def check_inputs(backbone: Any, call: Mapping[str, Any], clips: Sequence[Mapping[str, Any]]) -> None:
    """Refuse clips without a prompt or image that the pipeline needs, before any clip is read."""
    for clip in clips:
        if backbone.family.takes_prompts and not (clip["prompt"] or "").strip():
            if isinstance(clip["source"], str) and "#" not in clip["source"] and not os.path.exists(clip["source"]):
                raise PrismError(f"The clip {quoted(clip['source'], 120)} does not exist; name a file or a folder.")
            raise PrismError(
                f"The clip {quoted(clip['video'], 120)} has no prompt; give --prompt, a text file of the same name "
                "beside it, or name a table."
            )
        if clip["image"] is not None and not backbone.takes("image"):
            raise PrismError(f"{type(backbone.pipe).__name__} takes no image; leave --image out.")
    bare = next((clip for clip in clips if clip["image"] is None), None)
    if bare is not None and backbone.takes("image") and not call.get("image"):
        try:
            backbone.condition([bare["prompt"] or ""], **call)
        except PrismError as error:
            raise PrismError(
                f"The clip {quoted(bare['video'], 100)} has no image; give --image FILE, or a table with a column "
                f"image ({quoted(error, 200)})"
            ) from error


def _described(reference: Any) -> dict[str, Any] | None:
    if reference is None:
        return None
    return {**reference.facts, "levels": list(reference.levels), "intervals": reference.intervals()}


def _checked_out(config: Score) -> Path | None:
    if config.out is None:
        return None
    out = Path(config.out)
    if out.suffix.lower() not in ENDINGS:
        raise PrismError(f"The --out {quoted(str(out), 200)} must end in {' or '.join(ENDINGS)}.")
    if out.is_dir():
        raise PrismError(f"The --out {quoted(str(out), 200)} is a folder; name a file.")
    if out.exists() and not config.overwrite and not (config.resume and Journal.every(out)):
        raise PrismError(f"The --out {quoted(str(out), 200)} exists already; choose another, or give --overwrite.")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrismError(f"The --out {quoted(str(out), 200)} cannot be made: {error.strerror}.") from error
    return out

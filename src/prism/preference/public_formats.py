"""Formats of public sets of videos, a function each; its docstring lists a row's fields, its ties and its pitfalls.

Sources: the loaders and cards of the sets themselves, as of 2026.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from prism.preference.formats import NO_CLIP, NO_LABEL, NO_PROMPT, SAME_CLIP, Clips, Format
from prism.preference.sets import Collector
from prism.preference.sources import Row, Source, open_source

TIGER = {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0, "bothbad": 0}


def genai_tiger(source: Source, collector: Collector) -> None:
    """GenAI-Bench of TIGER-Lab: `left_video`, `right_video` (on the Hub) or `video_left`, `video_right`; `vote_type`.
    Two of its four labels are ties, `tievote` and `bothbad_vote`; the column `given` keeps which."""
    names = ("left_video", "right_video") if source.has("left_video") else ("video_left", "video_right")
    clips = Clips(source, collector)
    for row in source:
        pair = clips.pair(row, names, ("left_model", "right_model"))
        label = row.label("vote_type", TIGER) if pair else None
        if pair and label is None:
            collector.drop(row, NO_LABEL)
        elif pair:
            collector.vote(row, *pair, "overall", label, row.cells["vote_type"])


def genai_cmu(source: Source, collector: Collector) -> None:
    """GenAI-Bench of CMU, another benchmark of the same name: per id an object with a prompt and, per model, scores
    1 to 5. Clips are `MODEL/ID.mp4`; not every model has a clip of every id. Equal means are a tie."""
    for row in source:
        prompt, models, key = row.text("prompt"), row.cells.get("models"), row.text("")
        if prompt is None or not isinstance(models, dict) or key is None:
            collector.drop(row, NO_PROMPT if prompt is None else NO_LABEL)
            continue
        for model, scores in models.items():
            cell = Row({model: scores}, row.place)
            video = collector.video(row, "models", prompt, path=f"{model}/{key}.mp4", model=str(model))
            for number, score in enumerate(cell.items(model)):
                value = Row({model: score}, row.place).number(model)
                if value is not None:
                    collector.rating(row, video, prompt, "overall", value, str(number))


def videodpo(source: Source, collector: Collector) -> None:
    """VideoDPO's pair.json: `video1` is better than `video2`. Both are indices into the list of metadata.json in the
    same folder, counted *without* its clips shorter than a second. Without metadata.json, an even index 2k is clip k of
    winvideos/ and an odd index 2k + 1 is clip k of losevideos/. No ties; labels of a model (OmniScore); a `score` from
    0.5 to 1 is the probability that `video1` is better."""
    metadata = source.path.parent / "metadata.json"
    kept = _kept(metadata, collector) if metadata.is_file() else None
    for row in source:
        sides: list[tuple[str, str | None]] = []
        for name in ("video1", "video2"):
            number = row.number(name)
            if number is None or number < 0 or number != int(number):
                raise row.wrong(name, "a whole number from 0")
            if kept is None:
                sides.append((f"{('winvideos', 'losevideos')[int(number) % 2]}/{int(number) // 2:06d}.mp4", None))
            elif number >= len(kept):
                raise row.wrong(name, f"a number below {len(kept)}, the clips of a second or more in metadata.json")
            else:
                sides.append(kept[int(number)])
        prompt = row.text("frame_caption") or sides[0][1]
        if prompt is None or sides[0] == sides[1]:
            collector.drop(row, NO_PROMPT if prompt is None else SAME_CLIP)
            continue
        first, second = (collector.video(row, "video1", prompt, path=path) for path, _ in sides)
        score = row.number("score")
        p = (score, 1 - score) if score is not None and 0.5 <= score <= 1 else None
        text = "video1" if score is None else f"video1, score {score:g}"
        collector.vote(row, first, second, prompt, "overall", 1, text, p=p, by_id=True)


def _kept(metadata: Any, collector: Collector) -> list[tuple[str, str | None]]:
    """Path and caption of the clips of at least a second."""
    kept: list[tuple[str, str | None]] = []
    for row in open_source(metadata, collector.root):
        basic, misc = row.cells.get("basic"), row.cells.get("misc")
        if not isinstance(basic, dict):
            raise row.wrong("basic", "clip_path and clip_duration")
        facts = Row({**basic, **(misc if isinstance(misc, dict) else {})}, row.place)
        path, duration = facts.text("clip_path"), facts.number("clip_duration")
        if path is None or duration is None:
            raise row.wrong("basic", "clip_path and clip_duration")
        captions = facts.cells.get("frame_caption")
        caption = captions[0] if isinstance(captions, list) and captions else captions
        if duration >= 1:
            kept.append((path, Row({"frame_caption": caption}, row.place).text("frame_caption")))
    return kept


def fractions(source: Source, collector: Collector) -> None:
    """Sets of Rapidata and Datapoint: per dimension the shares of annotators for either side, weighted by their
    reliability, as `weighted_results1_NAME` and `weighted_results2_NAME`. Only equal shares are a tie, unless
    `readers.pairs` gets a margin. Clips are `video1` (bytes, path or URL), or `file_name1` below videos/."""
    names = [name[len("weighted_results1_") :] for name in source.columns if name.startswith("weighted_results1_")]
    clips = Clips(source, collector)
    columns = ("file_name1", "file_name2")
    if "video1" in source.embedded or not source.has(*columns):
        columns = ("video1", "video2")
    for row in source:
        pair = clips.pair(row, columns, ("model1", "model2"))
        if pair is None:
            continue
        num_labels = 0
        for name in names:
            first, second = (row.number(f"weighted_results{side}_{name}") for side in (1, 2))
            if first is None or second is None:
                continue
            total = first + second
            if min(first, second) < 0 or not 0 < total <= 1.02:
                column = f"weighted_results1_{name}"
                raise row.wrong(column, f"a share that is, with the other side’s {second:g}, at most 1")
            num_labels += 1
            dimension = "overall" if name in ("Preference", "Overall") else name
            scale = total if total > 0.98 else 1.0
            p = (first / scale, second / scale)
            collector.vote(row, *pair, dimension, None, f"{first:g}, {second:g}", p=p)
        if not num_labels:
            collector.drop(row, NO_LABEL)


ANSWERS = {"a": 1, "b": -1, "video1": 1, "video2": -1, "tie": 0, "same": 0}


def visionreward(source: Source, collector: Collector) -> None:
    """Pairs of VisionReward: `video1_path`, `video2_path`, `prompt`, `standard_answer` A or B."""
    clips = Clips(source, collector)
    for row in source:
        pair = clips.pair(row, ("video1_path", "video2_path"))
        label = row.label("standard_answer", ANSWERS) if pair else None
        if pair and label is None:
            collector.drop(row, NO_LABEL)
        elif pair:
            collector.vote(row, *pair, "overall", label, row.cells["standard_answer"])


_SCORE = re.compile(r"^[ \t]*(?:\(\d\)[ \t]*)?([A-Za-z][\w /-]*?)[ \t]*:[ \t]*(-?\d+(?:\.\d+)?)[ \t]*$", re.MULTILINE)
_PROMPT = (
    re.compile(r'text prompt is "(.*?)"\s*,?\s*all the frames', re.DOTALL),
    re.compile(r'(?:text )?prompt(?: is)?:?\s*"(.*)"', re.DOTALL),
)


def videofeedback(source: Source, collector: Collector) -> None:
    """VideoFeedback and VideoFeedback2 as chats: the scores are in the answer's text, the prompt is in the question's.
    Clips are `images` (a list of frames, without a frame rate) or `videos`. Real (filmed) clips do not share their
    prompts, so that no pair has one. Clips of VideoFeedback2 are `PROMPT_MODEL.mp4`, with a letter for the model."""
    clips = Clips(source, collector)
    for row in source:
        question, answer = (_first_text(row, speaker) for speaker in ("human", "gpt"))
        match = next((match for match in (each.search(question) for each in _PROMPT) if match), None)
        prompt = Row({"prompt": match.group(1) if match else None}, row.place).text("prompt")
        if prompt is None:
            collector.drop(row, "no prompt in the question’s text")
            continue
        if source.has("images"):
            clip = clips.get(row, "images")
        else:
            paths = row.items("videos")
            clip = {"path": paths[0]} if paths and isinstance(paths[0], str) else None
        if clip is None:
            collector.drop(row, NO_CLIP)
            continue
        if "frames" in clip:
            clip["video"] = row.text("id") or clip["video"]
        _rate(row, collector, prompt, clip, answer)


def _first_text(row: Row, speaker: str) -> str:
    """The first text of one speaker of a chat; "" if there is none."""
    for each in row.items("conversations"):
        if not isinstance(each, dict):
            raise row.wrong("conversations", "a chat: objects with from and value")
        if each.get("from") == speaker and isinstance(each.get("value"), str):
            return str(each["value"])
    return ""


def _rate(row: Row, collector: Collector, prompt: str, clip: dict[str, Any], answer: str) -> None:
    """Add the scores of an answer's text: one per line or separated by semicolons, after any ``</think>``."""
    lines = re.sub(r"</?answer>", "\n", answer.rsplit("</think>", 1)[-1]).replace(";", "\n")
    scores = {name.strip().casefold(): float(score) for name, score in _SCORE.findall(lines)}
    if not scores:
        collector.drop(row, "no scores in the answer’s text")
        return
    video = collector.video(row, "videos", prompt, **clip, model=_letter(clip.get("path")))
    if collector.rated(video):
        collector.drop(row, "the clip was rated in an earlier row")
        return
    for name, score in scores.items():
        collector.rating(row, video, prompt, name, score)


def _letter(path: str | None) -> str | None:
    match = re.search(r"\d_([a-z]{1,2})(?:\.\w+)?$", path or "")
    return match.group(1) if match else None


def videofeedback2_answers(source: Source, collector: Collector) -> None:
    """VideoFeedback2's file for reinforcement learning: `problem`, `solution` with scores in its text, `path`. Some
    clips are in several rows: all but the first are dropped."""
    clips = Clips(source, collector)
    for row in source:
        problem, solution, clip = row.text("problem") or "", row.text("solution") or "", clips.get(row, "path")
        match = next((match for match in (each.search(problem) for each in _PROMPT) if match), None)
        prompt = Row({"prompt": match.group(1) if match else None}, row.place).text("prompt")
        if prompt is None or clip is None:
            collector.drop(row, "no prompt in the question’s text" if prompt is None else NO_CLIP)
        else:
            _rate(row, collector, prompt, clip, solution)


SCORES = {"visual_score": "visual quality", "t2v_score": "text-to-video alignment"}
SCORES["phy_score"] = "physical/common-sense consistency"


def videofeedback2_test(source: Source, collector: Collector) -> None:
    """VideoFeedback2's test rows: `video_name`, `prompt`, `visual_score`, `t2v_score`, `phy_score`, 1 to 5."""
    clips = Clips(source, collector)
    for row in source:
        prompt, clip = row.text("prompt"), clips.get(row, "video_name")
        scores = {name: row.number(column) for column, name in SCORES.items()}
        if prompt is None or clip is None or all(score is None for score in scores.values()):
            collector.drop(row, NO_PROMPT if prompt is None else NO_CLIP if clip is None else NO_LABEL)
            continue
        if "path" in clip and not posixpath.splitext(clip["path"])[1]:
            clip["path"] += ".mp4"
        video = collector.video(row, "video_name", prompt, **clip, model=_letter(clip.get("path")))
        for name, score in scores.items():
            if score is not None:
                collector.rating(row, video, prompt, name, score)


FORMATS = {
    "genai-bench-tiger": Format(
        "GenAI-Bench of TIGER-Lab: prompt, left_video, right_video, vote_type",
        lambda source: (
            source.has("prompt", "vote_type")
            and (source.has("left_video", "right_video") or source.has("video_left", "video_right"))
        ),
        genai_tiger,
    ),
    "genai-bench-cmu": Format(
        "GenAI-Bench of CMU: objects by id with prompt and models",
        lambda source: source.shape == "object" and source.has("prompt", "models"),
        genai_cmu,
    ),
    "videodpo": Format(
        "VideoDPO, VidProM: video1, video2, frame_caption",
        lambda source: source.has("video1", "video2", "frame_caption"),
        videodpo,
    ),
    "fractions": Format(
        "Rapidata, Datapoint: prompt, video1 or file_name1, weighted_results1_NAME",
        lambda source: (
            source.has("prompt")
            and (source.has("video1", "video2") or source.has("file_name1", "file_name2"))
            and any(
                name.startswith("weighted_results1_") and source.has(name.replace("results1", "results2", 1))
                for name in source.columns
            )
        ),
        fractions,
    ),
    "visionreward": Format(
        "VisionReward: prompt, video1_path, video2_path, standard_answer",
        lambda source: source.has("prompt", "video1_path", "video2_path", "standard_answer"),
        visionreward,
    ),
    "videofeedback": Format(
        "VideoFeedback, VideoFeedback2: conversations, and images or videos",
        lambda source: source.has("conversations") and (source.has("images") or source.has("videos")),
        videofeedback,
    ),
    "videofeedback2-answers": Format(
        "VideoFeedback2 with answers: problem, solution, path",
        lambda source: source.has("problem", "solution", "path"),
        videofeedback2_answers,
    ),
    "videofeedback2-test": Format(
        "VideoFeedback2, test: video_name, prompt, visual_score, t2v_score, phy_score",
        lambda source: source.has("video_name", "prompt", *SCORES),
        videofeedback2_test,
    ),
}

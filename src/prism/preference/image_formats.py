"""Formats of public sets of images, read as videos of one frame, and of groups scored by several reward models."""

from __future__ import annotations

from typing import Any

from prism.preference.formats import NO_CLIP, NO_LABEL, NO_PROMPT, SAME_CLIP, Clips, Format
from prism.preference.sets import Collector
from prism.preference.sources import Row, Source


def pickapic(source: Source, collector: Collector) -> None:
    """Pick-a-Pic: `caption`, two images by uid, as bytes (`jpg_0`) or by `image_0_url`; `label_0`, `label_1` are 1 and
    0, or both 0.5, a tie. Rows without a label or with the same image twice are dropped; each pair has the weight
    1 / `num_example_per_prompt`, as in its authors' training."""
    clips = Clips(source, collector)
    columns = ("jpg_0", "jpg_1") if source.has("jpg_0", "jpg_1") else ("image_0_url", "image_1_url")
    for row in source:
        prompt = row.text("caption")
        if row.cells.get("has_label") is False or prompt is None:
            collector.drop(row, NO_PROMPT if prompt is None else NO_LABEL)
            continue
        uids = [row.text("image_0_uid"), row.text("image_1_uid")]
        if row.cells.get("are_different") is False or uids[0] == uids[1]:
            collector.drop(row, SAME_CLIP)
            continue
        sides = [clips.get(row, column) for column in columns]
        labels = [row.number("label_0"), row.number("label_1")]
        if None in sides or None in labels:
            collector.drop(row, NO_CLIP if None in sides else NO_LABEL)
            continue
        if labels not in ([1, 0], [0, 1], [0.5, 0.5]):
            raise row.wrong("label_0", "1, 0 or 0.5, and label_1 the rest of 1")
        first, second = (
            collector.video(row, column, prompt, **{**(side or {}), "video": uid}, model=row.text(f"model_{number}"))
            for number, (column, side, uid) in enumerate(zip(columns, sides, uids))
        )
        label = (labels == [1, 0]) - (labels == [0, 1])
        share = row.number("num_example_per_prompt")
        facts: dict[str, Any] = {"annotator": row.text("user_id"), "confidence": 1 / share if share else None}
        collector.vote(row, first, second, prompt, "overall", label, f"{labels[0]:g}, {labels[1]:g}", **facts)


def hpdv3(source: Source, collector: Collector) -> None:
    """HPDv3: `path1` is always the better image, without ties; optionally `choice_dist`, the numbers of votes for
    either, and `confidence` of the annotators. HPDv3++ names images that it does not hold: they count as missing."""
    clips = Clips(source, collector)
    for row in source:
        pair = clips.pair(row, ("path1", "path2"), ("model1", "model2"))
        if pair is None:
            continue
        votes = [Row({"choice_dist": each}, row.place).number("choice_dist") for each in row.items("choice_dist")]
        p = None
        if votes:
            if len(votes) != 2 or any(each is None or each < 0 for each in votes) or not sum(votes):  # type: ignore[arg-type]
                raise row.wrong("choice_dist", "the number of votes for either image")
            total = float(sum(votes))  # type: ignore[arg-type]
            p = (votes[0] / total, votes[1] / total)  # type: ignore[operator]
        text = f"path1, votes {votes}" if votes else "path1"
        collector.vote(row, *pair, "overall", 1, text, p=p, confidence=row.number("confidence"), by_id=True)


RATED = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")


def imagerewarddb(source: Source, collector: Collector) -> None:
    """ImageRewardDB: one row per image with its `rank` among those of `prompt_id`: 1 is best, equal ranks are a tie.
    The rating in the dimension overall is minus the rank; its ratings 1 to 7 are further dimensions."""
    clips = Clips(source, collector)
    column = "image_path" if source.has("image_path") else "image"
    for row in source:
        prompt, clip, rank = row.text("prompt"), clips.get(row, column), row.number("rank")
        if prompt is None or clip is None or rank is None:
            collector.drop(row, NO_PROMPT if prompt is None else NO_CLIP if clip is None else NO_LABEL)
            continue
        video = collector.video(row, column, prompt, **clip)
        if collector.rated(video):
            collector.drop(row, "the clip was rated in an earlier row")
            continue
        collector.rating(row, video, prompt, "overall", -rank)
        for name in RATED:
            score = row.number(name)
            if score is not None:
                collector.rating(row, video, prompt, name, score)


def groups(source: Source, collector: Collector) -> None:
    """Group manifests of Latent Reward Registers: a prompt per line, and `image_records` with the scores of several
    teachers (reward models). Each teacher is a dimension. Left out: z-scores, which follow from `teacher_score_raw`,
    and cached tensors, which are pickles; the images are read instead."""
    for row in source:
        prompt = row.text("prompt")
        if prompt is None:
            collector.drop(row, NO_PROMPT)
            continue
        scored = 0
        for cells in row.items("image_records"):
            if not isinstance(cells, dict):
                raise row.wrong("image_records", "objects with image_path and scores")
            record = Row(cells, row.place)
            path = record.text("image_path")
            numbers = [name for name in cells if name.endswith(("score", "score_raw")) and "zscore" not in name]
            scores = {name: record.number(name) for name in numbers}
            if path is None or all(score is None for score in scores.values()):
                collector.drop(row, NO_CLIP if path is None else NO_LABEL)
                continue
            video = collector.video(row, "image_records", prompt, path=path)
            scored += 1
            for name, score in scores.items():
                if score is not None:
                    collector.rating(row, video, prompt, TEACHERS.get(name, name), score)
        if not scored:
            collector.drop(row, NO_LABEL)


TEACHERS = {"teacher_score_raw": "hpsv3", "imagereward_score": "imagereward"}

FORMATS = {
    "pickapic": Format(
        "Pick-a-Pic: caption, image_0_uid, image_1_uid, label_0, label_1",
        lambda source: source.has("caption", "image_0_uid", "image_1_uid", "label_0", "label_1"),
        pickapic,
    ),
    "hpdv3": Format(
        "HPDv3: prompt, path1, path2",
        lambda source: source.has("prompt", "path1", "path2"),
        hpdv3,
    ),
    "imagerewarddb": Format(
        "ImageRewardDB: prompt, prompt_id, rank, image or image_path",
        lambda source: source.has("prompt", "prompt_id", "rank") and (source.has("image") or source.has("image_path")),
        imagerewarddb,
    ),
    "groups": Format(
        "groups of Latent Reward Registers: prompt, image_records",
        lambda source: source.has("prompt", "image_records"),
        groups,
    ),
}

"""The tabs Score and Compare: clips that somebody brings, beside the head's reference, or beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism.errors import PrismError
from prism.report import wording
from prism.serving import fragments
from prism.serving.annotate_tab import stage
from prism.serving.fragments import esc, named
from prism.serving.judged_clips import Judged, judged, opinion, playable
from prism.serving.web import typed

if TYPE_CHECKING:
    from prism.serving.page import Desk

CLIPS = [".mp4", ".webm", ".m4v", ".mov", ".mkv", ".avi", ".gif", ".webp", ".png", ".jpg", ".jpeg"]
MOST = 100  # clips at once
EMPTY = (
    '<div class="pz-empty"><b>No clip yet.</b> Drop clips and say what they should show. Each is re-noised, judged '
    "under several draws of noise, and set beside the clips of the head’s reference.</div>"
)


def build(gradio: Any, desk: Desk) -> None:
    """Put the components and events of Score into the open block."""
    with gradio.Row():
        with gradio.Column(scale=4, min_width=300):
            clips = gradio.File(
                label="Clips", file_count="multiple", file_types=CLIPS, type="filepath", elem_id="pz-clips", height=150
            )
            prompt = gradio.Textbox(label="Prompt", lines=2, placeholder="What they should show", elem_id="pz-asked")
            image = gradio.Image(
                label="Image that they start from", type="filepath", format="png", visible=desk.backbone.takes("image")
            )
            start = gradio.Button("Score", variant="primary", elem_id="pz-score")
        with gradio.Column(scale=9, min_width=320):
            shown = gradio.HTML(EMPTY, elem_id="pz-scores")

    def score(paths: Sequence[str] | None, text: str, picture: str | None) -> Iterator[str]:
        if not paths:
            yield fragments.note("Drop a clip first.", "error")
            return
        done = ""
        for number, path in enumerate(paths[:MOST], 1):
            yield done + fragments.note(f"Clip {number} of {len(paths)} is being judged.")
            try:
                with desk.lock:
                    verdict = judged(desk.judge, path, text or "", desk.call, picture)
                done += clip(desk, path, verdict)
            except PrismError as error:
                done += fragments.note(f"{Path(path).name}: {error}", "error")
        yield done

    quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 2}
    start.click(score, [clips, prompt, image], shown, **quiet)
    prompt.submit(score, [clips, prompt, image], shown, **quiet)


def clip(desk: Desk, path: str, verdict: Judged) -> str:
    """A clip with its scores, the places of these in the reference, and a strip of where the query looks."""
    scores, address = verdict.scores, desk.shelf.file(playable(path))
    ranks = "".join(_rank(scores, column, name) for column, name in enumerate(scores.dimensions))
    head = ("Dimension", *(f"t = {level:g}" for level in scores.levels))
    rows = [
        (named(name), *(_with_error(scores, level, column) for level in range(len(scores.levels))))
        for column, name in enumerate(scores.dimensions)
    ]
    if not scores.compared:
        of = "The head has no reference to compare with; prism reference makes one."
    elif scores.same_prompt[0]:
        of = f"Set beside the {scores.compared[0]} clips of this prompt in the head’s reference."
    else:
        of = (
            f"Set beside all {scores.compared[0]} clips of the head’s reference, as it has too few of this prompt: "
            "such a place tells more of the prompt than of the clip."
        )
    look = ""
    if verdict.attention is not None:
        import io

        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(verdict.strip()).save(stream, "WEBP", quality=90)
        squares = "pz-squares" if verdict.frames.shape[1] <= fragments.STRIP_HEIGHT else ""
        picture = desk.shelf.picture(stream.getvalue(), "webp")
        look = (
            f'<div class="wide"><span class="pz-soft">Where the query looks, at t = {verdict.level:g}: warm is more. '
            "It shows what the score is read from, not what is good or bad.</span>"
            f'<img class="{squares}" src="{picture}" alt="Attention of the query, laid over the frames"></div>'
        )
    player = f'<video src="{address}" autoplay loop muted controls playsinline></video>'
    return (
        f'<section class="pz-clip"><div>{player}</div><div>'
        f"<h3>{esc(Path(path).name)}</h3>{ranks}{fragments.note(of)}{fragments.table(head, rows)}</div>{look}</section>"
    )


def _rank(scores: Any, column: int, name: str) -> str:
    """A dimension's place in the reference, at the first level that it has."""
    if scores.percentiles is None:
        return ""
    places = scores.percentiles[0, :, column].tolist()
    level = next((index for index, place in enumerate(places) if not math.isnan(place)), None)
    if level is None:
        return ""
    win = float(scores.win_probabilities[0, level, column])
    return (
        f'<div class="pz-rank"><b>{esc(named(name))}</b><div class="pz-scale"><i style="left:{places[level]:.0f}%"></i>'
        f"</div><span>above {places[level]:.0f} % · wins {100 * win:.0f} %</span></div>"
    )


def _with_error(scores: Any, level: int, column: int) -> str:
    value, error = float(scores.scores[0, level, column]), float(scores.errors[0, level, column])
    return wording.signed(value) + ("" if math.isnan(error) else f" ± {error:.2f}")


def build_compare(gradio: Any, desk: Desk) -> None:
    """Put the components and events of Compare into the open block."""
    dimensions = desk.judge.dimensions
    with gradio.Row():
        left = gradio.File(label="Left clip", file_types=CLIPS, type="filepath", elem_id="pz-left", height=130)
        right = gradio.File(label="Right clip", file_types=CLIPS, type="filepath", elem_id="pz-right", height=130)
        with gradio.Column():
            prompt = gradio.Textbox(label="Prompt", lines=1, placeholder="What both should show", elem_id="pz-both")
            start = gradio.Button("Compare", variant="primary", elem_id="pz-compare")
    said = gradio.HTML("")
    empty = (
        '<div class="pz-empty"><b>Two clips, side by side and in step.</b> Say which one is better; then the judge '
        "says what it thinks.</div>"
    )
    script = "prismStage(element, trigger, watch, 'judged');"
    board = gradio.HTML(empty, js_on_load=script, elem_id="pz-pair")
    verdict = gradio.HTML("", elem_id="pz-verdict")
    both = gradio.State(None)

    def show(first: str | None, second: str | None, text: str) -> list[Any]:
        if not first or not second or not (text or "").strip():
            return [None, fragments.note("Two clips and their prompt are needed.", "error"), gradio.skip(), ""]
        try:
            addresses = [desk.shelf.file(playable(path), "clip.mp4") for path in (first, second)]
        except PrismError as error:
            return [None, fragments.note(str(error), "error"), gradio.skip(), ""]
        foot = (
            '<div class="pz-foot"><span class="pz-soft"></span><button class="pz-button main" data-act="next" disabled>'
            "What does the judge think?<kbd>↵</kbd></button></div>"
        )
        return [(first, second, text), "", stage("pair", text, addresses, dimensions, foot), ""]

    def say(event: Any, pair: Any) -> Iterator[str]:
        choices = dict(event.choices)
        yield '<div class="pz-verdict pz-soft">The judge is looking.</div>'
        try:
            first, second, text = pair
            with desk.lock:
                one, other = (judged(desk.judge, path, text, desk.call).scores for path in (first, second))
            yield _verdict(opinion(desk.judge, one, other), choices)
        except PrismError as error:
            yield fragments.note(str(error), "error")

    start.click(show, [left, right, prompt], [both, said, board, verdict], show_progress="hidden", queue=False,
                api_visibility="private")  # fmt: skip
    board.judged(typed(say, event=gradio.EventData), [both], verdict, show_progress="hidden", api_visibility="private")


def _verdict(opinions: dict[str, dict[str, float]], choices: dict[str, str]) -> str:
    """The judge's opinion beside somebody's own, as HTML."""
    rows, same = [], 0
    for name, each in opinions.items():
        shares = {side: each[f"p_{side}"] for side in ("left", "tie", "right")}
        preferred = max(shares, key=lambda side: shares[side])
        same += preferred == choices.get(name)
        own = choices.get(name, "")
        sides = (wording.signed(each["left"]), wording.signed(each["right"]))
        rows.append((named(name), own, preferred, *(f"{share:.0%}" for share in shares.values()), *sides))
    head = ("Dimension", "You", "The judge", "P(left)", "P(tie)", "P(right)", "Score, left", "Score, right")
    agreed = f"You and the judge agree in {same} of {len(rows)}." if len(rows) > 1 else ""
    agreed = agreed or ("You and the judge agree." if same else "You and the judge do not agree.")
    return (
        f'<div class="pz-verdict"><b>{agreed}</b>{fragments.table(head, rows)}<p class="pz-note">Probabilities by Eq. '
        "3-4, on average over the levels; uncalibrated, they are too sure.</p></div>"
    )

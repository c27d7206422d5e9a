"""The tab Annotate: one pair after another, judged by mouse or keyboard and written before the next is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prism.errors import PrismError
from prism.serving import fragments
from prism.serving.annotators import Item
from prism.serving.fragments import esc, named
from prism.serving.web import typed

if TYPE_CHECKING:
    from prism.serving.page import Desk

KEYS = {"left": "←", "tie": "↓", "right": "→"}
WORDS = {"left": "Left", "tie": "Tie", "right": "Right"}


def stage(
    key: str,
    prompt: str,
    clips: Sequence[str],
    dimensions: Sequence[str],
    foot: str,
    question: str = "Which is better?",
) -> str:
    """Two clips that play in step, a row of choices per dimension, and a foot; page.js makes it work.

    clips: the addresses of the left and the right one.
    """
    videos = "".join(
        f'<figure><video src="{address}" muted playsinline preload="auto" aria-label="{side} clip"></video>'
        f"<figcaption>{side}</figcaption></figure>"
        for side, address in zip(("Left", "Right"), clips)
    )
    rows = "".join(
        f'<div class="pz-question" data-dimension="{esc(name)}" role="group" aria-label="{esc(named(name))}">'
        f"<b>{esc(named(name) if len(dimensions) > 1 or name != 'overall' else question)}</b><div>"
        + "".join(
            f'<button class="pz-choice" data-choice="{choice}" aria-pressed="false">{WORDS[choice]}<kbd>{KEYS[choice]}'
            "</kbd></button>"
            for choice in KEYS
        )
        + "</div></div>"
        for name in dimensions
    )
    speeds = "".join(f'<option value="{rate}">{rate}×</option>' for rate in ("1", "0.5", "0.25"))
    return (
        f'<div class="pz-stage" data-key="{esc(key)}"><p class="pz-prompt">{esc(prompt)}</p>'
        f'<div class="pz-duo">{videos}</div><div class="pz-transport"><button class="pz-button">Play</button>'
        '<input type="range" min="0" max="1000" value="0" aria-label="Place in the clips">'
        f'<select aria-label="Speed">{speeds}</select></div><div class="pz-questions">{rows}</div>{foot}</div>'
    )


def build(gradio: Any, desk: Desk) -> None:
    """Put the tab's components and events into the open block."""
    annotation, comparisons = desk.annotation, desk.comparisons
    assert annotation is not None
    assert comparisons is not None

    with gradio.Row(equal_height=True):
        name = gradio.Textbox(
            label="Your name", placeholder="It stands in the answers", scale=3, elem_id="pz-name", max_lines=1
        )
        start = gradio.Button("Start, or go on", variant="primary", scale=1, elem_id="pz-start")
    said = gradio.HTML("")
    welcome = (
        f'<div class="pz-empty"><b>{len(annotation.pairs):,} pairs to compare.</b> Say who you are. Each answer is on '
        "the disk before the next pair is shown; close the tab whenever you like, and go on under the same name.</div>"
    )
    script = "prismStage(element, trigger, watch, 'judged'); // 'undo'"
    board = gradio.HTML(welcome, js_on_load=script, elem_id="pz-board")
    with gradio.Accordion("Agreement", open=False) as accordion:
        shown = gradio.HTML("", elem_id="pz-agreement")
        again = gradio.Button("Count again", size="sm")
    who = gradio.State("")

    def page_of(annotator: str) -> str:
        item, done, total = annotation.next(annotator)
        if item is None:
            return (
                f'<div class="pz-empty"><b>All {total:,} are judged.</b> Thank you. The answers are in '
                f"{esc(annotation.answers.path)}.</div>"
            )
        return _shown(desk, item, done, total)

    def begin(text: str, request: Any) -> list[Any]:
        try:
            annotator = str(getattr(request, "username", None) or text or "")
            return [annotator, "", page_of(annotator)]
        except PrismError as error:
            return ["", fragments.note(str(error), "error"), gradio.skip()]

    def judged(event: Any, annotator: str) -> list[Any]:
        try:
            fresh = annotation.record(annotator, str(event.key), dict(event.choices), float(event.seconds))
            sentence = "" if fresh else "That pair was judged already; here is the next."
            return [fragments.note(sentence), page_of(annotator)]
        except PrismError as error:
            return [fragments.note(str(error), "error"), gradio.skip()]

    def undo(annotator: str) -> list[Any]:
        try:
            taken = annotation.undo(annotator)
            sentence = "Your last answer was taken back." if taken else "There is no answer of yours to take back."
            return [fragments.note(sentence), page_of(annotator)]
        except PrismError as error:
            return [fragments.note(str(error), "error"), gradio.skip()]

    quiet = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    begin = typed(begin, request=gradio.Request)
    start.click(begin, [name], [who, said, board], **quiet)
    name.submit(begin, [name], [who, said, board], **quiet)
    board.judged(typed(judged, event=gradio.EventData), [who], [said, board], **quiet)
    board.undo(undo, [who], [said, board], **quiet)
    again.click(lambda: agreement(annotation), None, shown, **quiet)
    accordion.expand(lambda: agreement(annotation), None, shown, **quiet)


def _shown(desk: Desk, item: Item, done: int, total: int) -> str:
    assert desk.comparisons is not None
    assert desk.annotation is not None
    clips = [desk.shelf.file(desk.comparisons.clip(path), "clip.mp4") for path in item.sides()]
    several = len(desk.annotation.dimensions) > 1
    following = '<button class="pz-button main" data-act="next" disabled>Next<kbd>↵</kbd></button>' if several else ""
    undo = '<button class="pz-button" data-act="undo">Undo<kbd>⌫</kbd></button>' if done else ""
    foot = (
        f'<div class="pz-bar" style="max-width:54rem;margin:1.1rem auto 0"><i style="width:{100 * done / total:.1f}%">'
        f'</i></div><div class="pz-foot">{undo}<span class="pz-soft">{done + 1:,} of {total:,}'
        f"<kbd>space: play or pause</kbd></span>{following}</div>"
    )
    return stage(item.key, item.pair.prompt, clips, desk.annotation.dimensions, foot)


def agreement(annotation: Any) -> str:
    """The annotators, each with the agreement of their repeats, and Krippendorff's alpha among them, as HTML."""
    try:
        people, among = annotation.annotators(), annotation.agreement()
    except PrismError as error:
        return fragments.note(str(error), "error")
    if not people:
        return fragments.note("There is no answer yet.")
    rows = []
    for person in people:
        alike = ", ".join(f"{share:.0%} {named(name)}" for name, share in person["alike"].items())
        repeated = f"{alike} of {person['repeats']}" if person["repeats"] else "none yet"
        cells = (f"{person['pairs']:,}", f"{person['seconds']:.1f} s", f"{person['left']:.0%}", f"{person['ties']:,}")
        rows.append((person["annotator"], *cells, repeated))
    columns = ("Annotator", "Pairs", "Median time", "Chose left", "Ties", "Same answer to a pair asked again")
    words = []
    for name, value in among.items():
        if value is None:
            words.append((named(name), "one vote per pair", "", ""))
            continue
        alpha = "all alike" if value["alpha"] is None else f"{value['alpha']:.2f}"
        span = "" if value["low"] is None else f"{value['low']:.2f} to {value['high']:.2f}"
        words.append((named(name), alpha, span, f"{value['units']:,}"))
    shown = fragments.table(("Dimension", "Krippendorff’s alpha", "95 % interval", "Pairs with several votes"), words)
    return fragments.table(columns, rows) + shown

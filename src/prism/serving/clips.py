"""Finished clips as JSON: the bodies of UniRL's `POST /score` and Flow-Factory's `POST /compute`, and their answers.

Both are read from their own clients and servers. UniRL: ``{"requests": [{"history": [{"text", "image_b64" |
"video_b64"}], "required_rewards": [name], "metadata"}]}`` to ``{"results": [{name: {dimension: score}}], "errors":
[{}]}``. Flow-Factory: ``{"prompt": [text], "image": [png] | "video": [[png, ...]], "condition_images": [[png]]}`` to
``{"rewards": [score]}``. Media come in base64. A path on this machine is never opened.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from prism.clips import read_clip
from prism.errors import PrismError, quoted
from prism.rewards.scorer import ClipRow, Scorer
from prism.serving.tensors import MOST_ROWS, Malformed, no_constant, shown

MOST_PICTURES = 4096  # per clip
MOST_PROMPT = 100_000  # characters
MOST_PARTS = 1_000_000  # commas and brackets of a body


def parsed(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises `Malformed` for anything else."""
    if body[:1] in (b"\x80", b"P"):
        raise Malformed("The body is no JSON, and a pickle is never loaded; send a JSON object.")
    if (parts := sum(map(body.count, (b",", b"[", b"{")))) > MOST_PARTS:  # before they are made
        raise Malformed(f"The body has {parts:,} parts, of at most {MOST_PARTS:,}; send fewer clips at once.")
    try:
        document = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        nested = isinstance(error, RecursionError)
        raise Malformed(f"The body is no JSON ({'nested too deeply' if nested else quoted(error, 100)}).") from error
    if not isinstance(document, dict):
        raise Malformed(f"The body is {shown(document)}; send a JSON object.")
    return document


# -- UniRL


def unirl_requests(document: Mapping[str, Any], names: Sequence[str]) -> list[tuple[list[dict[str, Any]], list[str]]]:
    """History and required rewards of each request, checked; media are not decoded yet.

    Args:
        document: the body.
        names: of the judges that are served.
    """
    requests = _list("requests", document.get("requests"), dict, "objects")
    if len(requests) > MOST_ROWS:
        raise Malformed(f"The body has {len(requests)} requests, of at most {MOST_ROWS}; send fewer at once.")
    checked = []
    for index, request in enumerate(requests):
        label = f"requests[{index}]"
        history = _list(f"{label}.history", request.get("history"), dict, "objects")
        wanted = _list(f"{label}.required_rewards", request.get("required_rewards"), str, "names")
        if not history:
            raise Malformed(f"{label}.history is empty; give the prompt and the video in a turn.")
        for name in wanted:
            if name not in names:
                raise Malformed(f"There is no reward {quoted(name, 60)}; there are {', '.join(names)}.")
        for turn in history:
            _check_turn(label, turn)
        checked.append((history, list(dict.fromkeys(wanted))))
    return checked


def unirl_row(scorer: Scorer, history: Sequence[Mapping[str, Any]]) -> ClipRow:
    """The clip of a history's last turn; a picture in the first of several turns is the image it was made from."""
    last = history[-1]
    images = [turn["image_b64"] for turn in history[:-1] if turn.get("image_b64") is not None]
    if last.get("video_b64") is not None:
        images += [] if last.get("image_b64") is None else [last["image_b64"]]
        media: Any = _bytes("video_b64", last["video_b64"])
    elif last.get("image_b64") is not None:
        media = _bytes("image_b64", last["image_b64"])
    else:
        raise Malformed("The last turn of the history has no image_b64 and no video_b64; it is the one that is scored.")
    return _row(scorer, media, str(last["text"]), images)


def unirl_answer(outcomes: Sequence[Mapping[str, Mapping[str, float] | PrismError]]) -> dict[str, Any]:
    """The answer: per request the scores of each reward by dimension, the reward's own first, or a sentence."""
    results, errors = [], []
    for outcome in outcomes:
        errors.append({name: str(value) for name, value in outcome.items() if isinstance(value, PrismError)})
        results.append({name: value for name, value in outcome.items() if name not in errors[-1]})
    return {"results": results, "errors": errors}


def _check_turn(label: str, turn: Mapping[str, Any]) -> None:
    text = turn.get("text")
    if not isinstance(text, str) or len(text) > MOST_PROMPT:
        raise Malformed(f"The text of a turn of {label} must be the prompt; found {shown(text)}.")
    if turn.get("video_path") is not None:
        raise Malformed(
            f"{label} has a video_path, and no file of this machine is opened; send the bytes as video_b64."
        )
    for name in ("image_b64", "video_b64"):
        if turn.get(name) is not None and not isinstance(turn[name], str):
            raise Malformed(f"The {name} of {label} must be a text in base64; found {shown(turn[name])}.")
    if turn.get("image_b64") is None and turn.get("video_b64") is None:
        raise Malformed(f"A turn of {label} has neither image_b64 nor video_b64; give one.")


# -- Flow-Factory


def flow_factory_rows(document: Mapping[str, Any], scorer: Scorer) -> list[ClipRow]:
    """The clips of a body of Flow-Factory, decoded."""
    prompts = _list("prompt", document.get("prompt"), str, "texts")
    if not 1 <= len(prompts) <= MOST_ROWS:
        raise Malformed(f"The body has {len(prompts)} prompts; send 1 to {MOST_ROWS}.")
    if any(len(prompt) > MOST_PROMPT for prompt in prompts):
        raise Malformed(f"A prompt has more than {MOST_PROMPT:,} characters; send the text that the video was made of.")
    videos, pictures = document.get("video"), document.get("image")
    if (videos is None) == (pictures is None):
        raise Malformed(f"The body has {'neither' if videos is None else 'both'} of video and image; send one.")
    name, values = ("image", pictures) if videos is None else ("video", videos)
    media = _list(name, values, str if videos is None else list, "base64" if videos is None else "lists of frames")
    conditions = document.get("condition_images")
    conditions = [[]] * len(prompts) if conditions is None else _list("condition_images", conditions, list, "lists")
    for label, each in ((name, media), ("condition_images", conditions)):
        if len(each) != len(prompts):
            raise Malformed(f"The body has {len(prompts)} prompts and {len(each)} of {label}; send one for each.")
    rows = []
    for prompt, each, images in zip(prompts, media, conditions):
        if videos is None:
            decoded: Any = _bytes("image", each)
        else:
            if not 1 <= len(each) <= MOST_PICTURES:
                raise Malformed(f"A video has {len(each):,} frames; send 1 to {MOST_PICTURES:,}.")
            decoded = [_bytes("a frame of video", frame) for frame in each]
        rows.append(_row(scorer, decoded, prompt, images))
    return rows


def flow_factory_answer(scorer: Scorer, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The answer: a reward per sample, and beside it the scores of each dimension."""
    named = {name: [each[k] for each in scores] for k, name in enumerate(scorer.judge.dimensions)}
    return {"rewards": [scorer.reward(each) for each in scores], "scores": named}


# -- media


def _row(scorer: Scorer, media: Any, prompt: str, images: Sequence[Any]) -> ClipRow:
    """A clip, decoded and cut to what the judge takes."""
    pipeline = type(scorer.judge.backbone.pipe).__name__
    if scorer.judge.backbone.family.takes_prompts and not prompt.strip():
        raise Malformed("A prompt is empty; send the text that the video was made of.")
    if images and not scorer.judge.backbone.takes("image"):
        raise Malformed(f"The body has an image to start from, and {pipeline} takes none; leave it out.")
    if scorer.takes_image and not images:
        raise Malformed(
            f"{pipeline} starts from an image; send it too (a turn before the video's, or condition_images)."
        )
    image = _picture(images[0]) if images else None
    return ClipRow(read_clip(media, scorer.policy).frames, prompt, image)


def _picture(text: Any) -> Any:
    """A picture in base64, through the reader of clips, which bounds its size and refuses what is no picture."""
    from PIL import Image

    frames = read_clip(_bytes("the image", text)).frames
    return Image.fromarray(frames[0])


def _bytes(name: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise Malformed(f"{name} must be a text in base64; found {shown(text)}.")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Malformed(f"{name} is no base64 ({quoted(error, 80)}).") from error
    if not data:
        raise Malformed(f"{name} is empty; send the file's bytes in base64.")
    return data


def _list(name: str, value: Any, kind: type, words: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise Malformed(f"{name} must be a list of {words}; found {shown(value)}.")
    return value

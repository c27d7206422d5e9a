"""verl-omni's latent protocol v1: a safetensors body with finished latents, checked before anything is allocated.

The format is read from its client (verl-omni, `utils/reward_score/latent_http_scorer_client.py`): ``latents``,
``prompt_embeds``, ``pooled_prompt_embeds``, ``u`` (noise level from 0 to 1) and, optionally, ``seeds``; the answer is
``{"protocol_version": "1", "raw_scores": [...]}``. That is for images, of rank 4; videos come with rank 5 under the
same names. Beyond it, further embeddings and masks that the pipeline takes may come by their names, and a prompt as
text in the metadata ``prompt`` in place of embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prism.errors import SEEDS, PrismError, quoted
from prism.rewards.scorer import LatentRow, Scorer

PROTOCOL_HEADER, PROTOCOL_VERSION = "x-drm-protocol-version", "1"
MOST_HEADER = 64 * 2**10  # bytes of a safetensors header; that of a request has some five entries
MOST_ROWS = 64  # per request
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
WHOLES = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_SEVERAL = "latents, prompt_embeds, pooled_prompt_embeds, u and seeds"


class Malformed(PrismError):
    """A body that is not of the protocol."""


def header_of(body: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """The dtype and shape of each tensor of a safetensors body, and its metadata; no tensor is made.

    Raises:
        Malformed: where the body is no whole safetensors file.
    """
    if body[:4] == b"PK\x03\x04" or (len(body) > 1 and body[0] == 0x80 and body[1] <= 5):
        raise Malformed("The body is a pickle, which is never loaded; send safetensors.")
    if len(body) < 8:
        raise Malformed(f"The body has {len(body)} bytes, which is no safetensors file; send one whole.")
    length = int.from_bytes(body[:8], "little")
    if length > MOST_HEADER:
        raise Malformed(f"The body's header states {length:,} bytes, of at most {MOST_HEADER:,}; send safetensors.")
    if length > len(body) - 8:
        raise Malformed(f"The body ends within its header of {length:,} bytes; send it whole.")
    try:
        header = json.loads(body[8 : 8 + length].decode(), object_pairs_hook=_each_once, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"The body's header is no JSON ({quoted(error, 100)}); send safetensors.") from error
    if not isinstance(header, dict):
        raise Malformed("The body's header is no JSON object; send safetensors.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Malformed("The body's metadata must be texts by name; send safetensors.")
    tensors, spans = {}, []
    for name, entry in header.items():
        kind, shape, span = _entry(name, entry)
        size = math.prod(shape) * {**FLOATS, **WHOLES}[kind]
        if span[1] - span[0] != size:
            raise Malformed(
                f"The tensor {quoted(name, 60)} of shape {quoted(list(shape), 60)} has {size:,} bytes, and the header "
                f"gives it {span[1] - span[0]:,}; send safetensors."
            )
        tensors[name] = (kind, shape)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise Malformed("The body's tensors overlap or leave gaps; send safetensors.")
        end = stop
    if end != len(body) - 8 - length:
        raise Malformed(f"The body has {len(body) - 8 - length:,} bytes of tensors, and its header gives {end:,}.")
    return tensors, metadata


def rows_of(body: bytes, scorer: Scorer, most_elements: int) -> list[LatentRow]:
    """The rows that a body asks to score.

    Args:
        body: the request's body, whole.
        scorer: the judge that is asked.
        most_elements: numbers that all tensors of a body may hold.

    Raises:
        PrismError: where the body is malformed, too large, or of another pipeline than the judge's.
    """
    described, metadata = header_of(body)
    _check_names(described, metadata, scorer)
    count = sum(math.prod(shape) for _, shape in described.values())
    if count > most_elements:
        raise Malformed(f"The body holds {count:,} numbers, of at most {most_elements:,}; send fewer rows.")
    shape = _checked_latents(described["latents"], scorer)
    rows = shape[0]
    for name, (kind, sizes) in described.items():
        _check_tensor(name, kind, sizes, rows)
    tensors = _loaded(body)
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Malformed(f"The tensor {quoted(name, 60)} holds NaN or infinity; send finite numbers.")
    levels = [1000 * float(each) for each in tensors["u"].expand(rows)]
    if not all(0 <= level <= 1000 for level in levels):
        raise Malformed(
            f"u is the noise level, from 0 (clean) to 1 (noise); found {quoted(tensors['u'].tolist(), 80)}."
        )
    seeds = [int(each) for each in tensors["seeds"].expand(rows)] if "seeds" in tensors else [0] * rows
    if not all(0 <= seed <= SEEDS for seed in seeds):
        raise Malformed(f"seeds must be from 0 to 2**32 - 1; found {quoted(seeds, 80)}.")
    latents = tensors["latents"].reshape(shape)
    prompt = metadata.get("prompt")
    given = {} if prompt is not None else scorer.embeddings(tensors)
    return [
        LatentRow(
            latents[row : row + 1],
            levels[row],
            seeds[row],
            prompt,
            {name: value[row : row + 1] if len(value) > 1 else value for name, value in given.items()},
        )
        for row in range(rows)
    ]


def answer(scorer: Scorer, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The answer's JSON: `raw_scores` of the protocol, and beside it the scores of each dimension."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "raw_scores": [scorer.reward(each) for each in scores],
        "scores": {name: [each[k] for each in scores] for k, name in enumerate(scorer.judge.dimensions)},
    }


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and bytes of a header's entry."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in {**FLOATS, **WHOLES}:
        raise Malformed(
            f"The tensor {quoted(name, 60)} is of {shown(kind)}; {', '.join({**FLOATS, **WHOLES})} are read."
        )
    if not isinstance(shape, list) or not _are_sizes(shape) or len(shape) > 6:
        raise Malformed(f"The tensor {quoted(name, 60)} has the shape {shown(shape)}; send safetensors.")
    if not isinstance(span, list) or not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise Malformed(f"The tensor {quoted(name, 60)} has the offsets {shown(span)}; send safetensors.")
    return kind, tuple(shape), (span[0], span[1])


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**40 for value in values)


def _check_names(described: Mapping[str, Any], metadata: Mapping[str, str], scorer: Scorer) -> None:
    takes_prompts = scorer.judge.backbone.family.takes_prompts
    if takes_prompts and ("prompt" in metadata) == ("prompt_embeds" in described):
        both = "both of these" if "prompt" in metadata else "neither"
        raise Malformed(
            f"The prompt is needed once, as the tensor prompt_embeds or the text prompt in the metadata; found {both}."
        )
    for name in ("latents", "u"):
        if name not in described:
            raise Malformed(f"The body has no tensor {name}; the protocol has {_SEVERAL}.")
    protocol = ("latents", "u", "seeds", "prompt_embeds", "pooled_prompt_embeds")
    for name in described:
        if name not in protocol and not scorer.embeddings({name: torch.empty(0)}):
            raise Malformed(
                f"The body has the tensor {quoted(name, 60)}, of which {type(scorer.judge.backbone.pipe).__name__} "
                f"knows nothing; the protocol has {_SEVERAL}."
            )


def _checked_latents(described: tuple[str, tuple[int, ...]], scorer: Scorer) -> tuple[int, ...]:
    """The shape of the latents in the pipeline's layout."""
    kind, shape = described
    ranks = ranks_of(scorer)
    if kind not in FLOATS:
        raise Malformed(f"The latents are of {kind}; {', '.join(FLOATS)} are scored.")
    if len(shape) not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise Malformed(f"The latents have rank {len(shape)}, and this judge takes rank {wanted} with rows first.")
    if not 1 <= shape[0] <= MOST_ROWS or 0 in shape:
        raise Malformed(f"The latents have the shape {list(shape)}; send 1 to {MOST_ROWS} rows, none empty.")
    return scorer.fitted(shape)


def ranks_of(scorer: Scorer) -> list[int]:
    """The ranks that latents may have: the pipeline's, and 4 for videos of one frame."""
    family, shape = scorer.judge.backbone.family, scorer.shape
    if shape is None:
        return [3, 4, 5]
    one_frame = "T" in family.layout and len(shape) == 4 and shape[family.layout.index("T") - 1] == 1
    return [4, 5] if one_frame else [len(shape) + 1]


def _check_tensor(name: str, kind: str, shape: tuple[int, ...], rows: int) -> None:
    if name in ("u", "seeds"):
        kinds = ("F32", "F64", "F16", "BF16") if name == "u" else ("I64", "I32")
        if kind not in kinds or len(shape) != 1 or shape[0] not in (1, rows):
            raise Malformed(
                f"{name} must be one number of {kinds[0]}, or one per row of the latents; found {kind} of shape "
                f"{list(shape)} for {rows} rows."
            )
    elif name != "latents":
        rank = 3 if name == "prompt_embeds" else 2 if name == "pooled_prompt_embeds" else None
        if len(shape) < 2 or (rank is not None and len(shape) != rank) or shape[0] not in (1, rows) or 0 in shape:
            wanted = f"rank {rank}" if rank else "rank 2 or more"
            raise Malformed(
                f"{quoted(name, 60)} must have {wanted}, with one row or one per row of the latents; found "
                f"{list(shape)} for {rows} rows."
            )
        if "mask" not in name and kind not in FLOATS:
            raise Malformed(f"{quoted(name, 60)} is of {kind}; {', '.join(FLOATS)} are embeddings.")


def _loaded(body: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        return load(body)
    except Exception as error:  # safetensors raises errors of several kinds
        raise Malformed(f"The body is no safetensors file ({quoted(error, 100)}).") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name comes twice")
    return names


def no_constant(name: str) -> Any:
    """Refuse NaN and infinity, which Python's reader of JSON takes."""
    raise ValueError(f"{name} is no number of JSON")


def shown(value: Any) -> str:
    """A foreign value for a sentence: a text's beginning, a number, or what else it is."""
    if isinstance(value, str):
        return quoted(value[:80], 60)
    return quoted(value, 60) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"

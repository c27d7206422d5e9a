"""Numbers in the answers of teachers that write text, and the models that write them.

An answer is read only if it gives every dimension one number of the published range. Any other answer gives NaN for all
dimensions; teachers count these.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism import files
from prism.errors import PrismError, quoted
from prism.teachers import weights
from prism.teachers.qwen import Reader

# An optional "(1-5)" or bold, a colon, a number; none of "3-4", "3/4", "3 or 4", "3.5.1", "2,5"
_NUMBER = (
    r"\s*(?:\([^()\n]*\))?\s*\**\s*[:：]\s*\**\s*\[?(-?\d+(?:\.\d+)?)(?![\d.,]*\d)(?!\s*(?:[-–—~/%]|to\b|or\b)\s*\d)"
)


class Label(NamedTuple):
    """A dimension's words in an answer, and the range of the number that follows them."""

    words: str
    low: float
    high: float


def labelled(answer: str, labels: Mapping[str, Label]) -> dict[str, float] | None:
    """The number that follows each label in an answer, by dimension.

    None where a label is missing, or is followed by no number, one outside its range, or different numbers in several
    places.
    """
    numbers = {}
    for dimension, label in labels.items():
        pattern = rf"(?<![\w-]){re.escape(label.words)}{_NUMBER}"
        values = {float(value) for value in re.findall(pattern, answer, re.IGNORECASE | re.ASCII)}
        if len(values) != 1 or not label.low <= (value := values.pop()) <= label.high:
            return None
        numbers[dimension] = value
    return numbers


def missing(dimensions: Sequence[str]) -> dict[str, float]:
    """The scores of a video whose answer could not be read: NaN in every dimension."""
    return dict.fromkeys(dimensions, math.nan)


@dataclass
class Answer:
    """The text that a model wrote.

    Attributes:
        text: without special tokens.
        ids: the tokens written.
        scores: (tokens written, vocabulary) logits at each token, after temperature and truncation of unlikely tokens.
        tokenizer: of the model.
    """

    text: str
    ids: list[int]
    scores: Tensor
    tokenizer: Any

    def token_at(self, position: int) -> int:
        """The index of the token with the character at this position of `written()`."""
        return bisect.bisect_right(range(len(self.ids)), position, key=lambda index: len(self.written(index)))

    def written(self, index: int | None = None) -> str:
        """The text with special tokens; all of it, or up to the token `index` and with it."""
        ids = self.ids if index is None else self.ids[: index + 1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Writer:
    """A model for generation of the Qwen-VL families, with its reader.

    Args:
        model: on its device, for use.
        reader: of its folder.
    """

    def __init__(self, model: Any, reader: Reader) -> None:
        self.model, self.reader = model, reader

    @classmethod
    def load(cls, source: str, revision: str | None, device: str | None, dtype: str | None) -> Writer:
        """Load a Qwen2-VL, Qwen2.5-VL or Qwen3-VL from a folder or a repository of the Hub; safetensors alone."""
        import transformers

        classes = {
            "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
            "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
            "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
        }
        folder = weights.folder(source, revision)
        device, kind = weights.chosen(device, dtype)
        if not list(folder.glob("*.safetensors")):
            raise PrismError(f"The folder {files.shown(folder)} has no weights as safetensors; {weights.CONVERT}.")
        config = weights.config(folder, tuple(classes))
        model = _opened(classes[config.model_type], folder, kind)
        return cls(model.requires_grad_(False).eval().to(device), Reader.open(folder, config))

    @torch.inference_mode()
    def write(
        self, question: str, pixels: Tensor, kind: str, tokens: int, seconds: float | None = None,
        temperature: float | None = None, seed: int = 0,
    ) -> Answer:  # fmt: skip
        """The answer to a question about frames.

        Args:
            question, pixels, kind: as of `Reader.inputs`.
            tokens: largest number of tokens that are written.
            seconds: time between two of a video's frames, for Qwen2.5-VL's positions; None for Qwen2-VL.
            temperature: of the draws; None: the likeliest token each time.
            seed: of the draws. The same question about the same frames gets the same answer, and the global random
                state is not touched.
        """
        if kind == "video" and self.model.config.model_type == "qwen3_vl":
            raise PrismError("A Qwen3-VL writes times between a video's frames, which no teacher's question does.")
        device, dtype = self.model.device, self.model.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.reader.inputs(question, pixels, kind).items()
        }
        if seconds is not None and kind == "video" and self.model.config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([seconds * self.reader.temporal], device=device)
        drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature is not None:
            drawing = {"do_sample": True, "temperature": temperature}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self.model.generate(
                **inputs, **drawing, max_new_tokens=tokens, output_scores=True, return_dict_in_generate=True
            )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.reader.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scores = torch.stack([step[0].float().cpu() for step in output.scores])
        return Answer(text, ids, scores, self.reader.tokenizer)


def _opened(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # damaged shards raise many kinds
        raise PrismError(f"The model in {files.shown(folder)} cannot be loaded: {quoted(error, 160)}.") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        name = str(next(iter([*report["missing_keys"], *report["mismatched_keys"]])))
        raise PrismError(f"The model in {files.shown(folder)} lacks {quoted(name, 100)}; download it again.")
    return model


def frame_interval(positions: np.ndarray, total: int, fps: float) -> float:
    """Seconds between the frames at `positions` of `total` at `fps`, as qwen-vl-utils computes it: duration / count."""
    return total / fps / len(positions)

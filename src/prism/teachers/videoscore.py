"""VideoScore: Mantis Idefics2-8B with a regression head for five dimensions.

Facts from TIGER-AI-Lab/VideoScore at 8e44973, examples/run_videoscore.py (MIT): the question (prompts/videoscore.txt)
followed by the frames, 16 frames (48 for v1.1), the head on the last token (Idefics2ForSequenceClassification of
Mantis).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prism import files
from prism.errors import PrismError, quoted, whole
from prism.teachers import frames, prompts, weights

WEIGHTS = "TIGER-Lab/VideoScore-v1.1"


class VideoScore:
    """Scores in five dimensions, trained on grades from 1 to 4; a regression may leave this range a little.

    Args:
        count: the most frames that are shown.
    """

    name = "videoscore"
    dimensions = (
        "visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency",
    )  # fmt: skip

    def __init__(self, model: Any, head: nn.Module, processor: Any, count: int = 48) -> None:
        self.model, self.head, self.processor = model, head, processor
        self.count = whole("frames of videoscore", count)

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, device: str | None = None, dtype: str | None = None,
        count: int | None = None,
    ) -> VideoScore:  # fmt: skip
        """Load from a folder or a repository of the Hub.

        Args:
            count: frames; by default 48 where the name of the source says v1.1, or else 16.
        """
        from transformers import AutoProcessor, Idefics2Model

        folder = weights.folder(source, revision)
        device, kind = weights.chosen(device, dtype)
        state = weights.tensors(folder)
        if state is None:
            raise PrismError(f"The folder {files.shown(folder)} has no model.safetensors; {weights.CONVERT}.")
        config = weights.config(folder, ("idefics2",))
        try:
            processor = AutoProcessor.from_pretrained(folder)
        except Exception as error:  # tokenizers raise many kinds
            raise PrismError(f"The model in {files.shown(folder)} cannot be opened: {quoted(error, 160)}.") from error
        scores = {name.removeprefix("score."): value for name, value in state.items() if name.startswith("score.")}
        body = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        head = nn.Linear(config.text_config.hidden_size, len(cls.dimensions), bias="bias" in scores)
        model = weights.empty(lambda: Idefics2Model(config))
        if count is None:
            count = 48 if "v1.1" in source.rstrip("/").rpartition("/")[2] else 16
        return cls(
            weights.fill(model, body, kind, device, folder),
            weights.fill(head, scores, torch.float32, device, folder),
            processor,
            count,
        )

    @torch.inference_mode()
    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """Scores of videos (T, H, W, 3) of uint8; `fps` is not needed."""
        from PIL import Image

        frames.check(videos, prompts, self.name)
        rows = []
        for video, prompt in zip(videos, prompts):
            chosen = chosen_frames(len(video), self.count)
            pictures = [Image.fromarray(video[position]) for position in chosen]
            inputs = self.processor(text=question(prompt, len(chosen)), images=[pictures], return_tensors="pt")
            placed = {
                name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
            hidden = self.model(**placed, use_cache=False).last_hidden_state[0, -1]
            rows.append(dict(zip(self.dimensions, self.head(hidden.float()).tolist())))
        return rows

    __call__ = score


def chosen_frames(total: int, count: int) -> list[int]:
    """Positions of `count` frames, the first of each of `count` equal parts of a video; all frames of a shorter one."""
    return list(range(total)) if total <= count else np.arange(0, total, total / count).astype(int)[:count].tolist()


def question(prompt: str, count: int) -> str:
    """The published question about `count` frames; tokens of the model in the prompt are broken up."""
    for token in ("<image>", "<fake_token_around_image>", "<end_of_utterance>"):
        prompt = prompt.replace(token, f"< {token[1:]}")
    return prompts.filled("videoscore", prompt) + "<image> " * count

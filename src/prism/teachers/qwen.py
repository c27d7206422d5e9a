"""Frames and a question as the input of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and Qwen2-VL with a reward head.

The layouts are those of transformers' processors (Apache 2.0) and of qwen-vl-utils (Apache 2.0). They are built here
from frames in memory, as the processors for video need torchvision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prism import files
from prism.errors import PrismError, quoted
from prism.teachers import weights
from prism.teachers.frames import normalised

# qwen-vl-utils: a frame of a video has 128 to 768 tokens of 28 x 28 pixels
LEAST_PIXELS, MOST_PIXELS = 128 * 28 * 28, 768 * 28 * 28
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and deviation of a channel
_TYPES = {"image": 1, "video": 2}  # token types, by which M-RoPE counts


def harmless(prompt: str) -> str:
    """A prompt whose special tokens, such as <|im_end|>, are broken up, so that it cannot end the user's turn."""
    return re.sub(r"<(?=\|\w+\|>)", "< ", prompt)


@dataclass(frozen=True)
class Reader:
    """The preprocessing of frames and a question into tensors.

    Attributes:
        tokenizer: of transformers, with a chat template.
        patch: pixels along a patch's side. temporal: frames per patch. merge: patches along a token's side.
        mean, std: of the channels, on a scale of 0 to 1.
        limits: least and most pixels of a picture.
    """

    tokenizer: Any
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    mean: tuple[float, ...] = CLIP[0]
    std: tuple[float, ...] = CLIP[1]
    limits: tuple[int, int] = (4 * 28 * 28, 16384 * 28 * 28)

    @classmethod
    def open(cls, folder: Path, config: Any) -> Reader:
        """The reader of a model's folder, from its tokenizer, its configuration and preprocessor_config.json."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizers raise many kinds
            raise PrismError(
                f"The tokenizer in {files.shown(folder)} cannot be opened: {quoted(error, 160)}."
            ) from error
        if not tokenizer.chat_template:
            raise PrismError(f"The tokenizer in {files.shown(folder)} has no chat template; download it again.")
        path = folder / "preprocessor_config.json"
        stated = files.read_json(path) if path.is_file() else {}
        stated = stated if isinstance(stated, dict) else {}
        size, vision = stated.get("size") or {}, config.vision_config
        try:
            mean, std = (
                tuple(map(float, stated.get(f"image_{name}", CLIP[k]))) for k, name in enumerate(("mean", "std"))
            )
            limits = (
                int(stated.get("min_pixels") or size.get("shortest_edge") or cls.limits[0]),
                int(stated.get("max_pixels") or size.get("longest_edge") or cls.limits[1]),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise PrismError(f"The file {files.shown(path)} does not describe a Qwen-VL's pictures.") from error
        return cls(
            tokenizer,
            vision.patch_size,
            vision.temporal_patch_size,
            vision.spatial_merge_size,
            mean=mean,
            std=std,
            limits=limits,
        )

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    def inputs(self, question: str, pixels: Tensor, kind: str, rows: int = 1) -> dict[str, Tensor]:
        """The model's arguments for one question about frames.

        Args:
            question: the text that follows the frames in the user's turn.
            pixels: (T, 3, H, W) from 0 to 255; H and W are multiples of `factor`.
            kind: "video", or "image": each frame is a picture of its own.
            rows: 1: all frames in one conversation; T: the same question for each picture.
        """
        frames = normalised(pixels, self.mean, self.std)
        if kind == "image":
            frames = frames.repeat_interleave(self.temporal, 0)  # a picture fills a patch's frames alike
        elif missing := -len(frames) % self.temporal:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        patches, (times, height, width) = self._patches(frames)
        tokens = height * width // self.merge**2
        if kind == "image":
            grid, media = torch.tensor([[1, height, width]] * times), [tokens] * (times // rows)
        else:
            grid, media = torch.tensor([[times, height, width]]), [times * tokens]

        pad = f"<|{kind}_pad|>"
        content = [{"type": kind} for _ in media] + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        parts = text.split(pad)
        if len(parts) != len(media) + 1:
            raise PrismError(f"The chat template puts {len(parts) - 1} times {pad} for {len(media)} {kind}s.")
        text = parts[0] + "".join(pad * count + after for count, after in zip(media, parts[1:]))
        ids = torch.tensor([self.tokenizer(text)["input_ids"]] * rows)
        types = (ids == self.tokenizer.convert_tokens_to_ids(pad)) * _TYPES[kind]
        values, shape = (
            ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        )
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": types,
            values: patches,
            shape: grid,
        }

    def _patches(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Frames (T, 3, H, W) as (patches, values per patch), with a token's patches in succession, and the grid (T, H,
        W) in patches."""
        times, rows, columns = (
            len(frames) // self.temporal, frames.shape[2] // self.patch, frames.shape[3] // self.patch,
        )  # fmt: skip
        split = frames.reshape(
            times, self.temporal, 3, rows // self.merge, self.merge, self.patch,
            columns // self.merge, self.merge, self.patch,
        )  # fmt: skip
        ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return ordered.reshape(times * rows * columns, -1), (times, rows, columns)


# -- a reward head on Qwen2-VL


class Scorer(nn.Module):
    """Qwen2-VL with a head on the last hidden states at special tokens, as VideoAlign and HPSv3 trained it.

    Both call the language model without Qwen2-VL's three-axis positions, so that all three axes hold the token's index
    in the sequence. (This is a side effect of their `forward` under transformers 4.45, and their weights are trained
    with it.)

    Args:
        model: a Qwen2VLModel.
        head: a linear layer or an MLP, in float32.
        tokens: ids of the special tokens, each of which occurs once per row.
    """

    def __init__(self, model: Any, head: nn.Module, tokens: list[int]) -> None:
        super().__init__()
        self.model, self.head, self.tokens = model, head, tokens

    @torch.inference_mode()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The head's outputs at each special token: (rows, tokens, outputs) float32."""
        device, dtype = self.model.device, self.model.dtype
        placed = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        ids = placed["input_ids"]
        positions = torch.arange(ids.shape[1], device=device).expand(3, len(ids), -1)
        hidden = self.model(**placed, position_ids=positions, use_cache=False).last_hidden_state
        columns = torch.stack([(ids == token).int().argmax(1) for token in self.tokens], 1)  # (rows, tokens)
        return self.head(hidden.float()[torch.arange(len(ids), device=device)[:, None], columns])


def scorer(
    folder: Path, state: dict[str, Tensor], head: nn.Module, tokens: tuple[str, ...], dtype: torch.dtype, device: str,
    where: Path,
) -> tuple[Scorer, Reader]:  # fmt: skip
    """A scorer and its reader, from the base model's folder (configuration and tokenizer) and all weights.

    Args:
        folder: of the base model.
        state: under Qwen2-VL's names of any version of transformers; those of the head begin with "rm_head.".
        head: the untrained head, which is filled.
        tokens: special tokens, which are added to the tokenizer.
        where: the folder of the weights, for errors.
    """
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    config = weights.config(folder, ("qwen2_vl",))
    reader = Reader.open(folder, config)
    reader.tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    head_state = {name.removeprefix("rm_head."): value for name, value in state.items() if name.startswith("rm_head.")}
    body = {current(name): value for name, value in state.items() if not name.startswith(("rm_head.", "lm_head."))}
    embedding = body.get("language_model.embed_tokens.weight")
    if embedding is not None:  # fine-tuning resized it for the special tokens: longer, or without unused rows
        config.text_config.vocab_size = len(embedding)
        if len(embedding) < len(reader.tokenizer):
            raise PrismError(
                f"The weights in {files.shown(where)} have {len(embedding)} tokens, and the tokenizer in "
                f"{files.shown(folder)} with this teacher's {len(reader.tokenizer)}; name the right base with base=."
            )
    model = weights.fill(weights.empty(lambda: Qwen2VLModel(config)), body, dtype, device, where)
    weights.fill(head, head_state, torch.float32, device, where)
    return Scorer(model, head, reader.tokenizer.convert_tokens_to_ids(list(tokens))).eval(), reader


def current(name: str) -> str:
    """A parameter's name in transformers 5's Qwen2VLModel, from its name in any version's model for generation."""
    name = re.sub(r"^model\.(?=visual\.|language_model\.)", "", name)
    return re.sub(r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.", name)

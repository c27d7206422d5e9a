"""ImageReward: BLIP (ViT-L) and an MLP for people's preference between pictures, normalised as published.

Facts from THUDM/ImageReward, package image-reward 1.5 (Apache 2.0): the middle square of 224 pixels, at most 35 tokens
of the prompt, the MLP's layers, mean and deviation. ImageReward judges pictures; the choice and the mean of frames are
PRISM's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prism import files
from prism.errors import PrismError, quoted, whole
from prism.teachers import frames, qwen, weights

WEIGHTS, BASE = "THUDM/ImageReward", "google-bert/bert-base-uncased"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
_PATCH, _HEAD = 16, 64  # pixels of a patch's side, width of an attention head: BLIP's, base and large
_WORDS = 35


class ImageReward:
    """The mean of a video's frames' scores, "preference": about -2 to 2, 0 on average over its training pictures.

    Args:
        count: frames that are looked at, evenly spread from the first to the last.
    """

    name = "imagereward"
    dimensions = ("preference",)

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any, count: int = 8) -> None:
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.count = whole("frames of imagereward", count)

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, base: str | None = None, device: str | None = None,
        dtype: str | None = None, count: int = 8,
    ) -> ImageReward:  # fmt: skip
        """Load ImageReward.safetensors and med_config.json from a folder or a repository of the Hub.

        Args:
            base: folder or repository with BERT's tokenizer (bert-base-uncased); by default the folder itself where it
                has a tokenizer_config.json.
        """
        from transformers import AutoTokenizer
        from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        folder = weights.folder(source, revision)
        device, kind = weights.chosen(device, dtype)
        state = weights.tensors(folder, ("ImageReward.safetensors",))
        if state is None:
            raise PrismError(
                f"The folder {files.shown(folder)} has no ImageReward.safetensors; where {WEIGHTS}'s .pt is, "
                f"{weights.CONVERT}."
            )
        tokenizer_folder = folder if base is None and (folder / "tokenizer_config.json").is_file() else None
        foundation = tokenizer_folder or weights.base(base or BASE, ("*.json", "*.txt"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(foundation)
        except Exception as error:  # tokenizers raise many kinds
            raise PrismError(
                f"The tokenizer in {files.shown(foundation)} cannot be opened: {quoted(error, 160)}."
            ) from error
        med = files.read_json(folder / "med_config.json")
        try:
            positions = state["blip.visual_encoder.pos_embed"]
            width, side = positions.shape[2], round((positions.shape[1] - 1) ** 0.5) * _PATCH
            layers = 1 + max(int(match[1]) for name in state if (match := _BLOCK.match(name)))
            vision_config = BlipVisionConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // _HEAD, image_size=side, patch_size=_PATCH, layer_norm_eps=1e-6,
            )  # fmt: skip
            sizes = {name: med[name] for name in _SIZES}
            text_config = BlipTextConfig(
                encoder_hidden_size=width, is_decoder=True, bos_token_id=None, sep_token_id=None, **sizes
            )
            hidden_size = sizes["hidden_size"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PrismError(
                f"The folder {files.shown(folder)} holds no ImageReward's med_config.json and weights: "
                f"{quoted(error, 100)}."
            ) from error
        vision = weights.empty(lambda: BlipVisionModel(vision_config))
        text = weights.empty(lambda: BlipTextModel(text_config, add_pooling_layer=False))
        mlp = nn.Sequential(
            nn.Linear(hidden_size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip
        parts = of_blip(state)
        return cls(
            weights.fill(vision, parts["vision"], kind, device, folder),
            weights.fill(text, parts["text"], kind, device, folder),
            weights.fill(mlp, parts["mlp"], torch.float32, device, folder),
            tokenizer,
            count,
        )

    @torch.inference_mode()
    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """The preference for videos (T, H, W, 3) of uint8; `fps` is not needed."""
        frames.check(videos, prompts, self.name)
        side, device, dtype = self.vision.config.image_size, self.vision.device, self.vision.dtype
        rows = []
        for video, prompt in zip(videos, prompts):
            pixels = frames.normalised(frames.square(frames.some(video, self.count), side), *qwen.CLIP)
            words = self.tokenizer(prompt, truncation=True, max_length=_WORDS, return_tensors="pt")["input_ids"]
            image = self.vision(pixel_values=pixels.to(device, dtype)).last_hidden_state
            text = self.text(
                input_ids=words.to(device).expand(len(image), -1), encoder_hidden_states=image, is_decoder=False
            ).last_hidden_state[:, 0]
            rows.append({"preference": float((self.head(text.float()).mean() - MEAN) / DEVIATION)})
        return rows

    __call__ = score


_BLOCK = re.compile(r"blip\.visual_encoder\.blocks\.(\d+)\.")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings", "layer_norm_eps", "hidden_act")  # fmt: skip
_VISION = (  # in order: pattern in BLIP's ViT -> name in BlipVisionModel
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def of_blip(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ImageReward's state as those of BlipVisionModel ("vision"), BlipTextModel ("text") and the MLP ("mlp")."""
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "mlp": {}}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            new = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION:
                new = re.sub(pattern, replacement, new)
            parts["vision"][new] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            parts["text"][name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp.layers."):
            parts["mlp"][name.removeprefix("mlp.layers.")] = value
    return parts

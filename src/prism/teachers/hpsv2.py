"""HPSv2: CLIP ViT-H/14 fine-tuned on people's choices between pictures; a score is the cosine of picture and prompt.

Facts from tgxs002/HPSv2, package hpsv2 1.2.0 (Apache 2.0): the whole picture on a black square of 224 pixels, the
prompt in lower case, unit features without the logit scale. HPSv2 judges pictures; the choice and the mean of frames
are PRISM's.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prism import files
from prism.errors import PrismError, quoted, whole
from prism.teachers import frames, qwen, weights

WEIGHTS, BASE = "xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2_compressed.safetensors", "model.safetensors")


class HPSv2:
    """The mean of a video's frames' scores, "preference": the cosine, -1 to 1, about 0.2 to 0.35 as published.

    Args:
        count: frames that are looked at, evenly spread from the first to the last.
    """

    name = "hpsv2"
    dimensions = ("preference",)

    def __init__(self, model: Any, tokenizer: Any, count: int = 8) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, whole("frames of hpsv2", count)

    @classmethod
    def load(
        cls, source: str = WEIGHTS, revision: str | None = None, base: str | None = None, device: str | None = None,
        dtype: str | None = None, count: int = 8,
    ) -> HPSv2:  # fmt: skip
        """Load HPS_v2.1_compressed.safetensors (or HPS_v2_compressed.safetensors), with open_clip's names, or a
        CLIPModel of transformers, from a folder or a repository of the Hub.

        Args:
            base: folder or repository with the configuration and tokenizer of CLIP ViT-H/14; by default the folder
                itself where it has a config.json.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder = weights.folder(source, revision)
        device, kind = weights.chosen(device, dtype)
        state = weights.tensors(folder, FILES)
        if state is None:
            raise PrismError(
                f"The folder {files.shown(folder)} has none of {', '.join(FILES)}; where {WEIGHTS}'s .pt is, "
                f"{weights.CONVERT}."
            )
        foundation = folder if base is None and (folder / "config.json").is_file() else None
        foundation = foundation or weights.base(base or BASE, ("*.json", "*.txt"))
        try:
            config, tokenizer = CLIPConfig.from_pretrained(foundation), AutoTokenizer.from_pretrained(foundation)
        except Exception as error:  # tokenizers raise many kinds
            raise PrismError(
                f"The base model in {files.shown(foundation)} cannot be opened: {quoted(error, 160)}."
            ) from error
        if "visual.conv1.weight" in state:
            state = of_open_clip(state)
        model = weights.empty(lambda: CLIPModel(config))
        state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
        return cls(weights.fill(model, state, kind, device, folder), tokenizer, count)

    @torch.inference_mode()
    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None
    ) -> list[dict[str, float]]:
        """The preference for videos (T, H, W, 3) of uint8; `fps` is not needed."""
        frames.check(videos, prompts, self.name)
        side, device = self.model.config.vision_config.image_size, self.model.device
        rows = []
        for video, prompt in zip(videos, prompts):
            pixels = frames.normalised(frames.letterbox(frames.some(video, self.count), side), *qwen.CLIP)
            words = self.tokenizer(cleaned(prompt), truncation=True, max_length=77, return_tensors="pt").to(device)
            image = self.model.vision_model(pixel_values=pixels.to(device, self.model.dtype)).pooler_output
            text = self.model.text_model(input_ids=words["input_ids"]).pooler_output
            image = F.normalize(self.model.visual_projection(image).float(), dim=-1)
            text = F.normalize(self.model.text_projection(text).float(), dim=-1)
            rows.append({"preference": float((image @ text.T).mean())})
        return rows

    __call__ = score


def cleaned(prompt: str) -> str:
    """A prompt as open_clip's tokenizer cleans it: Unicode repaired (ftfy), HTML entities decoded, one space between
    words, lower case. Special tokens are broken up.
    """
    import ftfy

    text = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip().lower()
    return re.sub(r"<(?=\|?(?:start|end)oftext)", "< ", text)


def of_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an open_clip model under the names of transformers' CLIPModel."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        rest = name.removeprefix("visual.")
        if (block := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", rest)) is not None:
            stem = f"{tower}.encoder.layers.{block[1]}"
            if block[2].startswith("attn.in_proj_"):
                for part, each in zip("qkv", value.chunk(3)):
                    renamed[f"{stem}.self_attn.{part}_proj.{block[2].removeprefix('attn.in_proj_')}"] = each
                continue
            for old, new in _LAYER.items():
                if block[2].startswith(f"{old}."):
                    renamed[f"{stem}.{new}.{block[2].removeprefix(f'{old}.')}"] = value
        elif name in _WHOLE:
            new, transposed = _WHOLE[name]
            renamed[new] = value.T.contiguous() if transposed else value
    return renamed


_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}  # fmt: skip
_WHOLE = {  # name in open_clip -> name in CLIPModel, and whether it is transposed
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
    "visual.proj": ("visual_projection.weight", True),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "text_projection": ("text_projection.weight", True),
    "logit_scale": ("logit_scale", False),
}

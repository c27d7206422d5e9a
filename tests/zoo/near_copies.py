"""Tiny real diffusers pipelines that are near copies of others, most of one row with them; see `tests.zoo.images`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    FluxControlInpaintPipeline,
    StableAudio3AudioToAudioPipeline,
    StableAudio3InpaintPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tests.tiny import tokenizer
from tests.zoo import kandinsky2
from tests.zoo.images import GIVEN, Built, _flux
from tests.zoo.sounds import stable_audio_3
from tests.zoo.unets import CALL, NO_CHECKER, _mask, _one_text, _two_texts, _unet, _unet_xl
from tests.zoo.wan_to_kandinsky import IMAGE_WIDTH, _clip_processor, _image, _quiet
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIZED = ("height", "width")


def _without(call: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}


class _Positions:
    """Stands in for ChatGLM's tokenizer, which needs a file of pieces: it numbers the places of the tokens, too."""

    def __call__(self, texts: Any, **settings: Any) -> Any:
        ids = tokenizer(16)(texts, **settings)
        if "input_ids" in ids and isinstance(ids["input_ids"], torch.Tensor):
            ids["position_ids"] = torch.arange(ids["input_ids"].shape[1]).expand_as(ids["input_ids"])
        return ids


def _kolors(name: str) -> Any:
    """As `sdxl`, with ChatGLM's states for text."""
    sys.modules.setdefault("sentencepiece", pieces := ModuleType("sentencepiece"))
    pieces.SentencePieceProcessor = None  # type: ignore[attr-defined]  # of the tokenizer that `_Positions` replaces
    try:
        home = importlib.import_module("diffusers.pipelines.kolors.pipeline_" + name)
    finally:
        if sys.modules["sentencepiece"] is pieces:
            del sys.modules["sentencepiece"]
    kind = home.KolorsPipeline if name == "kolors" else home.KolorsImg2ImgPipeline
    torch.manual_seed(0)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=32,
        hidden_size=24,
        ffn_hidden_size=24,
        kv_channels=12,
        num_attention_heads=2,
        original_rope=True,
    )
    parts = _without(_two_texts(), "text_encoder_2", "tokenizer_2")
    parts |= {"text_encoder": ChatGLMModel(config), "tokenizer": _Positions()}
    for value in parts["text_encoder"].parameters():  # they begin as whatever memory holds
        torch.nn.init.normal_(value, std=0.3)
    return _quiet(kind(unet=_unet_xl(projection_class_embeddings_input_dim=72), **parts))


def depth2img() -> Built:
    """As `sd15_img2img`, + 1 channel of depth."""
    torch.manual_seed(1)
    pipe = StableDiffusionDepth2ImgPipeline(
        unet=_unet(in_channels=5), **_one_text(), depth_estimator=None, feature_extractor=None
    )
    call = {"image": _image(64, 96), "depth_map": torch.rand(1, 16, 24), "strength": 0.8}
    return _quiet(pipe), {**_without(CALL, *SIZED), **call}


def _vision() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=IMAGE_WIDTH,
            projection_dim=8,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


def image_variation() -> Built:
    """As `sd15`, with an image's embedding in place of a text's."""
    torch.manual_seed(0)
    parts = _without(_one_text(), "text_encoder", "tokenizer")
    pipe = StableDiffusionImageVariationPipeline(
        unet=_unet(), image_encoder=_vision(), **parts, **{**NO_CHECKER, "feature_extractor": _clip_processor()}
    )
    return _quiet(pipe), {**CALL, "image": _image(64, 96)}


def unclip_img2img() -> Built:
    """As `sd15`, with an image's embedding, and noise on it, beside the timestep."""
    torch.manual_seed(0)
    pipe = StableUnCLIPImg2ImgPipeline(
        feature_extractor=_clip_processor(),
        image_encoder=_vision(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=8),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        unet=_unet(class_embed_type="projection", projection_class_embeddings_input_dim=16),
        **_one_text(),
    )
    return _quiet(pipe), {**CALL, "image": _image(64, 96), "noise_level": 20}


def _sound(kind: type, **changes: Any) -> Built:
    pipe, call = stable_audio_3(local_add_cond_dim=9)
    return _quiet(kind(**pipe.components)), {**call, "audio": torch.rand(1, 2, 24) * 2 - 1, **changes}


BUILDERS: dict[str, Callable[[], Built]] = {
    **{name: build for name, build in kandinsky2.BUILDERS.items() if name not in kandinsky2.ROWS},
    "flux_control_inpaint": lambda: _flux(
        FluxControlInpaintPipeline, 32, control_image=_image(32, 48), mask_image=_mask(32, 48), **GIVEN
    ),
    "kolors": lambda: (_kolors("kolors"), {**CALL, "max_sequence_length": 16}),
    "kolors_img2img": lambda: (
        _kolors("kolors_img2img"),
        {**_without(CALL, *SIZED), "max_sequence_length": 16, "image": _image(64, 96), **GIVEN},
    ),
    "depth2img": depth2img,
    "image_variation": image_variation,
    "unclip_img2img": unclip_img2img,
    "stable_audio_3_inpaint": lambda: _sound(StableAudio3InpaintPipeline, mask_start_seconds=0.3, mask_end_seconds=1.0),
    "stable_audio_3_audio2audio": lambda: _sound(StableAudio3AudioToAudioPipeline, init_noise_level=0.9),
}

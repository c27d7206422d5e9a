"""More tiny real diffusers pipelines, offline and with random weights: EasyAnimate, Cosmos 1, 2, 2.5, Motif-Video.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one video, without batch axis; "tokens" are what a block puts out for one video, in raster order.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLMagvit,
    ClassifierFreeGuidance,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoTransformer3DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from tests.zoo.wan_to_kandinsky import _call, _image, _language, _quiet, _tokenizer, _wan_vae
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def _vision_language() -> Any:
    text = _language(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _chat_tokenizer() -> Any:
    names = _tokenizer()
    names.chat_template = (
        "{% for message in messages %}{{ message.content if message.content is string else message.content[0].text }} "
        "{% endfor %}"
    )
    return names


def easyanimate(kind: type = EasyAnimatePipeline, in_channels: int = 4) -> tuple[Any, dict[str, Any]]:
    """Latents (4, 3, 4, 6); tokens (18, 32)."""
    torch.manual_seed(0)
    pipe = kind(
        vae=AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        text_encoder=_vision_language(),
        tokenizer=_chat_tokenizer(),
        transformer=EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=TEXT_WIDTH,
            num_layers=3,
            mmdit_layers=3,
            sample_width=6,
            sample_height=4,
            patch_size=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.tokenizer_max_length = 16
    return _quiet(pipe), _call(guidance_scale=4.0, negative_prompt="still")


class _NoChecker(ModelMixin):  # type: ignore[misc]
    """Stands in for Cosmos' safety checker, which is a package of its own: lets everything pass."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def _without_torchvision() -> None:
    """Cosmos resizes its padding mask by torchvision, which PRISM does not need: the one function it calls."""
    if not hasattr(transformer_cosmos, "transforms"):
        resize = lambda mask, size, interpolation=None: torch.nn.functional.interpolate(mask, size)  # noqa: E731
        mode = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=mode
        )
    if not hasattr(pipeline_cosmos2_5_predict, "torchvision"):
        to_tensor = lambda image: torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() / 255  # noqa: E731
        functional = SimpleNamespace(to_tensor=to_tensor)
        pipeline_cosmos2_5_predict.torchvision = SimpleNamespace(transforms=SimpleNamespace(functional=functional))


def _cosmos_transformer(**changes: Any) -> CosmosTransformer3DModel:
    settings: dict[str, Any] = {"in_channels": 16, "text_embed_dim": TEXT_WIDTH, **changes}
    return CosmosTransformer3DModel(
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        mlp_ratio=2,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
        **settings,
    )


def cosmos1(kind: type = CosmosTextToWorldPipeline, in_channels: int = 16) -> tuple[Any, dict[str, Any]]:
    """Latents (16, 2, 4, 6), divided by sqrt(sigma^2 + sigma_data^2) for the network; tokens (12, 32)."""
    _without_torchvision()
    torch.manual_seed(0)
    pipe = kind(
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=_cosmos_transformer(in_channels=in_channels),
        vae=AutoencoderKLCosmos(
            latent_channels=16,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            patch_type="haar",
        ),
        scheduler=EDMEulerScheduler(prediction_type="epsilon", final_sigmas_type="sigma_min"),
        safety_checker=_NoChecker(),
    )
    return _quiet(pipe), _call(guidance_scale=3.0, max_sequence_length=16)


def cosmos2(kind: type = Cosmos2VideoToWorldPipeline, in_channels: int = 17) -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6), the first frame the image's; tokens (18, 32)."""
    _without_torchvision()
    torch.manual_seed(0)
    pipe = kind(
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=_cosmos_transformer(in_channels=in_channels),
        vae=_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=_NoChecker(),
    )
    return _quiet(pipe), {**_call(guidance_scale=3.0, max_sequence_length=16), "image": _image(32, 48)}


def cosmos25() -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6); tokens (18, 32)."""
    _without_torchvision()
    torch.manual_seed(0)
    pipe = Cosmos2_5_PredictBasePipeline(
        text_encoder=_vision_language(),
        tokenizer=_chat_tokenizer(),
        transformer=_cosmos_transformer(
            in_channels=17,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=TEXT_WIDTH * 4,
            encoder_hidden_states_channels=TEXT_WIDTH,
        ),
        vae=_wan_vae(latents_mean=[0.1] * 16, latents_std=[1.5] * 16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        safety_checker=_NoChecker(),
    )
    return _quiet(pipe), _call(guidance_scale=3.0, max_sequence_length=16)


def motif_video(kind: str = "MotifVideoPipeline", **others: Any) -> tuple[Any, dict[str, Any]]:
    """Latents (16, 3, 4, 6) + 16 channels of zeros + 1; tokens (18, 24)."""
    # Not at the top: its text encoder is newer than the lowest version of transformers.
    from transformers import T5Gemma2Encoder
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig

    torch.manual_seed(0)
    language = {**_language(), "head_dim": 8, "max_position_embeddings": 128, "dropout_rate": 0.0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    pipe = getattr(diffusers, kind)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=_wan_vae(),
        text_encoder=T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=language, vision_config=vision)),
        tokenizer=_tokenizer(),
        transformer=MotifVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=4,
            num_decoder_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            rope_axes_dim=(4, 4, 4),
            image_embed_dim=8,
        ),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        **others,
    )
    return _quiet(pipe), _call(max_sequence_length=16)


BUILDERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "easyanimate": easyanimate,
    "cosmos1": cosmos1,
    "cosmos2": cosmos2,
    "cosmos25": cosmos25,
    "motif_video": motif_video,
}

"""Tiny real Kandinsky 2.2 pipelines, with a MoVQ in place of a VAE; see `tests.zoo.unets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from tests.tiny import TEXT_WIDTH, tokenizer
from tests.zoo.unets import _mask
from tests.zoo.wan_to_kandinsky import _image, _quiet
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

Built = tuple[Any, dict[str, Any]]
CALL: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 4, "guidance_scale": 4.0}


def _parts(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        out_channels=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        **{"in_channels": 4, "addition_embed_type": "image", **changes},
    )
    movq = VQModel(
        block_out_channels=(32, 32),  # norms of 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        variance_type="learned_range",
        timestep_spacing="trailing",
    )
    return {"unet": unet, "movq": movq, "scheduler": scheduler}


def _told() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    names = ("image_embeds", "negative_image_embeds")
    return {name: torch.randn(1, TEXT_WIDTH, generator=generator) for name in names}


def kandinsky22() -> Built:
    """Latents (4, 8, 12); tokens (24, 32), there as (32, 4, 6)."""
    return _quiet(KandinskyV22Pipeline(**_parts())), {**CALL, **_told()}


def _prior() -> dict[str, Any]:
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=TEXT_WIDTH, num_layers=1)
    for value in prior.parameters():  # which else look at little of the text
        torch.nn.init.normal_(value, std=0.3)
    sizes = {"intermediate_size": 37, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": TEXT_WIDTH}
    text = CLIPTextConfig(
        **sizes,
        vocab_size=32,
        hidden_size=TEXT_WIDTH,
        max_position_embeddings=77,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    vision = CLIPVisionConfig(**sizes, hidden_size=16, image_size=16, patch_size=8)
    return {
        "prior_prior": prior,
        "prior_image_encoder": CLIPVisionModelWithProjection(vision),
        "prior_text_encoder": CLIPTextModelWithProjection(text),
        "prior_tokenizer": tokenizer(77),
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "prior_image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


def _combined(kind: type, in_channels: int = 4, **changes: Any) -> Built:
    pipe = kind(**_parts(in_channels=in_channels), **_prior())
    return _quiet(pipe), {**CALL, "prior_num_inference_steps": 2, **changes}


GIVEN: dict[str, Any] = {"image": _image(16, 24), "strength": 0.8}
MASKED: dict[str, Any] = {"image": _image(16, 24), "mask_image": _mask(16, 24)}

BUILDERS: dict[str, Callable[[], Built]] = {
    "kandinsky22": kandinsky22,
    "kandinsky22_img2img": lambda: (_quiet(KandinskyV22Img2ImgPipeline(**_parts())), {**CALL, **_told(), **GIVEN}),
    "kandinsky22_inpaint": lambda: (
        _quiet(KandinskyV22InpaintPipeline(**_parts(in_channels=9))),
        {**CALL, **_told(), **MASKED},
    ),
    "kandinsky22_combined": lambda: _combined(KandinskyV22CombinedPipeline),
    "kandinsky22_img2img_combined": lambda: _combined(KandinskyV22Img2ImgCombinedPipeline, **GIVEN),
    "kandinsky22_inpaint_combined": lambda: _combined(KandinskyV22InpaintCombinedPipeline, 9, **MASKED),
}
ROWS = ("kandinsky22", "kandinsky22_combined")  # the others are of one row with these

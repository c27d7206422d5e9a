"""Tiny real diffusers pipelines that make images with transformers, from texts and from images to edit.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one image, without batch axis; "tokens" are what a block puts out for one image, in raster order.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Cosmos2TextToImagePipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlImg2ImgPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    Kandinsky5T2IPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tests.tiny import TEXT_WIDTH, text_encoder, tokenizer
from tests.zoo import cosmos_and_more, wan_to_kandinsky
from tests.zoo.latte_to_qwen import IMAGE_CALL, _frame_vae, flux, qwen_image, sd3
from tests.zoo.unets import _mask
from tests.zoo.wan_to_kandinsky import _image, _language, _quiet, _tokenizer
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

Built = tuple[Any, dict[str, Any]]
GIVEN: dict[str, Any] = {"strength": 0.8}  # of pipelines that begin with an image


def _of(kind: type, built: Built, **changes: Any) -> Built:
    """Another pipeline of the same parts, for the image of `_image`."""
    pipe, call = built
    taken = inspect.signature(kind).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    return _quiet(kind(**parts)), {**call, "image": _image(32, 48), **changes}


def _flux(kind: type, in_channels: int = 16, **changes: Any) -> Built:
    return _of(kind, flux(in_channels), **changes)


def flux_control() -> Built:
    """As `flux`, + 16 channels of the control image."""
    pipe, call = _flux(FluxControlPipeline, 32)
    return pipe, {**{name: value for name, value in call.items() if name != "image"}, "control_image": call["image"]}


def _chroma(kind: type = ChromaPipeline) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own of its embedding's former place
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 4),
            approximator_hidden_dim=16,
            approximator_layers=1,
            approximator_num_channels=16,
        )
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    return _quiet(pipe)


def chroma() -> Built:
    """Latents packed two by two as (6, 16); tokens (6, 24)."""
    return _chroma(), {**IMAGE_CALL, "guidance_scale": 4.0}


def _pixart(kind: type) -> Built:
    """Latents (4, 4, 6); tokens (6, 24)."""
    torch.manual_seed(0)
    pipe = kind(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_frame_vae(),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            cross_attention_dim=24,
            sample_size=8,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.01),
    )
    call = {**IMAGE_CALL, "guidance_scale": 4.0, "clean_caption": False, "use_resolution_binning": False}
    return _quiet(pipe), call


def sana() -> Built:
    """Latents (4, 4, 8); tokens (32, 24)."""
    torch.manual_seed(0)
    pipe = SanaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**{**_language(), "head_dim": 8})),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 4,
            decoder_block_types=("ResBlock",) * 4,
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            encoder_qkv_multiscales=((),) * 4,
            decoder_qkv_multiscales=((),) * 4,
            encoder_layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    call = {"height": 32, "width": 64, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 4.0}
    call |= {"clean_caption": False, "use_resolution_binning": False, "complex_human_instruction": None}
    return _quiet(pipe), call


def lumina2() -> Built:
    """Latents (4, 4, 6); tokens (6, 24), behind those of the text; timesteps rise from noise to the image."""
    torch.manual_seed(0)
    pipe = Lumina2Pipeline(
        tokenizer=_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**{**_language(), "head_dim": 8})),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(256, 32, 32),
            cap_feat_dim=TEXT_WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _quiet(pipe), {**IMAGE_CALL, "guidance_scale": 4.0, "system_prompt": "draw"}


def aura_flow() -> Built:
    """Latents (4, 4, 6); tokens (6, 24), behind those of the text in single-stream blocks."""
    torch.manual_seed(0)
    pipe = AuraFlowPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=_frame_vae(),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=24,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    return _quiet(pipe), {**IMAGE_CALL, "guidance_scale": 4.0}


def _flux2(kind: type, text: Any, guidance_embeds: bool) -> Built:
    names = _tokenizer()
    names.chat_template = (
        "{% for message in messages if message.role == 'user' %}"
        "{{ message.content if message.content is string else message.content[0].text }}{% endfor %}"
    )
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=text,
        tokenizer=names,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH * 2,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
    )
    torch.nn.init.normal_(pipe.vae.bn.running_mean)
    torch.nn.init.uniform_(pipe.vae.bn.running_var, 0.5, 2.0)
    call = {"height": 8, "width": 12, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 4.0}
    return _quiet(pipe), {**call, "text_encoder_out_layers": (1, 2)}


def flux2() -> Built:
    """Latents packed two by two as (6, 16); tokens (6, 32), behind those of the text in single-stream blocks."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"head_dim": 4, "image_size": 16, "patch_size": 8, "model_type": "pixtral"}
    text = {**_language(), "head_dim": 8, "num_hidden_layers": 2, "model_type": "mistral"}
    config = Mistral3Config(text_config=text, vision_config=vision)
    return _flux2(Flux2Pipeline, Mistral3ForConditionalGeneration(config), True)


def flux2_klein() -> Built:
    """As `flux2`, guided by a second call."""
    torch.manual_seed(0)
    text = {**_language(), "head_dim": 8, "num_hidden_layers": 2}
    return _flux2(Flux2KleinPipeline, Qwen3ForCausalLM(Qwen3Config(**text)), False)


def kandinsky5_t2i() -> Built:
    """Latents (1, 4, 6, 4), channels last; tokens (6, 32)."""
    pipe = wan_to_kandinsky._kandinsky5(Kandinsky5T2IPipeline, vae=_frame_vae(), visual_cond=False)
    pipe.resolutions = [(48, 32)]
    call = {"height": 32, "width": 48, "num_inference_steps": 6, "max_sequence_length": 16, "guidance_scale": 4.0}
    return pipe, {**call, "negative_prompt": "still"}


def cosmos2_t2i() -> Built:
    """Latents (16, 1, 4, 6); tokens (6, 32)."""
    pipe, _ = cosmos_and_more.cosmos2(Cosmos2TextToImagePipeline, in_channels=16)
    return pipe, {**IMAGE_CALL, "guidance_scale": 3.0}


def _z_image(kind: type, **changes: Any) -> Built:
    """Latents (4, 4, 6), in the denoiser (4, 1, 4, 6); tokens (6, 24) before padding and those of the text."""
    torch.manual_seed(0)
    names = _tokenizer()
    names.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_frame_vae(shift_factor=0.12, scaling_factor=0.36),
        text_encoder=Qwen3Model(Qwen3Config(**{**_language(), "head_dim": 8, "num_hidden_layers": 2})),
        tokenizer=names,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=24,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    )
    return _quiet(pipe), {**IMAGE_CALL, "guidance_scale": 4.0, **changes}


class _Words:
    """Stands in for Qwen's processor, which needs torchvision: the text's tokens, without the image's."""

    def __init__(self, names: Any) -> None:
        self.names = names

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        return self.names(text, padding=padding, return_tensors=return_tensors)


def _qwen_edit(kind: type, home: Any) -> Built:
    """As `qwen_image`, with the tokens of an image behind those of the latents."""
    pipe, call = qwen_image()
    plain = home.calculate_dimensions
    if plain.__module__ == home.__name__:  # a million pixels, whatever the image: a thousand here
        home.calculate_dimensions = lambda area, ratio: plain(max(area // 1024, 1024), ratio)
    torch.manual_seed(0)
    pipe = kind(**pipe.components, processor=_Words(pipe.tokenizer))
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return _quiet(pipe), {**call, "image": _image(32, 32)}


def _qwen(kind: type, **changes: Any) -> Built:
    pipe, call = _of(kind, qwen_image(), **changes)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe, call


BUILDERS: dict[str, Callable[[], Built]] = {
    "sd3_img2img": lambda: _of(StableDiffusion3Img2ImgPipeline, sd3(), **GIVEN),
    "flux_img2img": lambda: _flux(FluxImg2ImgPipeline, **GIVEN),
    "flux_inpaint": lambda: _flux(FluxInpaintPipeline, mask_image=_mask(32, 48), **GIVEN),
    "flux_fill": lambda: _flux(FluxFillPipeline, 16 + 16 + 256, mask_image=_mask(32, 48)),
    "flux_kontext": lambda: _flux(FluxKontextPipeline, _auto_resize=False, max_area=32 * 48),
    "flux_control": flux_control,
    "flux_control_img2img": lambda: _flux(FluxControlImg2ImgPipeline, 32, control_image=_image(32, 48), **GIVEN),
    "flux_kontext_inpaint": lambda: _flux(
        FluxKontextInpaintPipeline, mask_image=_mask(32, 48), _auto_resize=False, max_area=32 * 48, strength=0.8
    ),
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "chroma": chroma,
    "chroma_img2img": lambda: _of(ChromaImg2ImgPipeline, chroma(), **GIVEN),
    "qwen_image_img2img": lambda: _qwen(QwenImageImg2ImgPipeline, **GIVEN),
    "qwen_image_inpaint": lambda: _qwen(QwenImageInpaintPipeline, mask_image=_mask(32, 48), **GIVEN),
    "qwen_image_edit": lambda: _qwen_edit(QwenImageEditPipeline, pipeline_qwenimage_edit),
    "qwen_image_edit_plus": lambda: _qwen_edit(QwenImageEditPlusPipeline, pipeline_qwenimage_edit_plus),
    "pixart_alpha": lambda: _pixart(PixArtAlphaPipeline),
    "pixart_sigma": lambda: _pixart(PixArtSigmaPipeline),
    "sana": sana,
    "lumina2": lumina2,
    "aura_flow": aura_flow,
    "kandinsky5_t2i": kandinsky5_t2i,
    "z_image": lambda: _z_image(ZImagePipeline),
    "z_image_img2img": lambda: _z_image(ZImageImg2ImgPipeline, image=_image(32, 48), **GIVEN),
    "z_image_inpaint": lambda: _z_image(
        ZImageInpaintPipeline, image=_image(32, 48), mask_image=_mask(32, 48), strength=0.8
    ),
    "cosmos2_t2i": cosmos2_t2i,
}

"""The table of families, a row each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prism.backbone.family import Family
from prism.errors import PrismError

DEPTH = "as deep as the paper's block 12 of 30: "
PROJECTED = "{}'s, projected to the video's width before the first block"

_WAN = Family(
    name="wan",
    models="Wan 2.1, Wan 2.2",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    blocks=("blocks",),
    text_embedder="condition_embedder.text_embedder",
    text_padding="zeros",  # no mask is passed: the padding is found as zero rows
    cfg="two_calls",
    images="single",
    vae_mean_std=True,
    tap_reason=DEPTH + "12 of 30 in 1.3B and 5B, 16 of 40 in 14B",
    text_reason=PROJECTED.format("T5"),
)

_SKYREELS_DF = replace(
    _WAN,
    name="skyreels-v2-df",
    models="SkyReels-V2 diffusion forcing",
    pipelines=("SkyReelsV2DiffusionForcingPipeline",),
    counts_calls=True,
    fixed={
        "ar_step": "frames would be denoised one after another, and a judge reads all frames at one noise level",
        "overlap_history": "a video of several windows is sampled window by window, each to its end; keep num_frames "
        "within base_num_frames",
        "addnoise_condition": "its noise comes from the global generator, so that no seed gives it again",
        "causal_block_size": "it is written into the denoiser's configuration and stays there; set num_frame_per_block "
        "in the configuration before loading",
    },
    tap_reason=DEPTH + "12 of 30 in 1.3B, 16 of 40 in 14B",
)

_LTX = Family(
    name="ltx-video",
    models="LTX-Video",
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    blocks=("transformer_blocks",),
    text_embedder="caption_projection",
    text_padding="mask",
    cfg="one_batch",
    layout="BLC",
    vae_mean_std=True,
    vae_factor="scaling_factor",
    tap_reason=DEPTH + "11 of 28 in 2B, 19 of 48 in 13B",
    text_reason=PROJECTED.format("T5"),
)

_EASYANIMATE = Family(
    name="easyanimate",
    text_limit=256,
    models="EasyAnimate 5.1",
    pipelines=("EasyAnimatePipeline",),
    negatives="list",
    blocks=("transformer_blocks",),
    text_embedder="text_proj",
    cfg="one_batch",
    vae_factor="scaling_factor",
    tap_reason=DEPTH + "19 of 48",
    text_reason=PROJECTED.format("Qwen"),
)

_MOTIF = Family(
    name="motif-video",
    models="Motif-Video",
    pipelines=("MotifVideoPipeline",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    without_last="num_decoder_layers",
    text_embedder="context_embedder",
    text_padding="mask",
    cfg="two_calls",
    guidance="guider",
    vae_mean_std=True,
    tap_reason=DEPTH + "the decoder's, which begin anew from the patches, are not counted",
    text_reason="T5Gemma's, projected to the video's width before the first block; an image's are left out",
)

FAMILIES: tuple[Family, ...] = (
    _WAN,
    replace(
        _WAN,
        name="skyreels-v2",
        models="SkyReels-V2",
        pipelines=("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
        tap_reason=DEPTH + "12 of 30 in 1.3B, 16 of 40 in 14B",
    ),
    _SKYREELS_DF,
    replace(
        _SKYREELS_DF,
        name="skyreels-v2-df-i2v",
        models="SkyReels-V2 diffusion forcing, image to video",
        pipelines=("SkyReelsV2DiffusionForcingImageToVideoPipeline",),
        alone=True,  # its pipeline halves the rows of the image's latents
    ),
    Family(
        name="cogvideox",
        models="CogVideoX, CogVideoX 1.5",
        pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
        blocks=("transformer_blocks",),
        text_embedder="patch_embed.text_proj",
        text_padding="unknown",  # the text encoder runs without a mask, and the backbone attends to the padding too
        cfg="one_batch",
        clock="ddpm",
        layout="BTCHW",
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "12 of 30 in 2B, 17 of 42 in 5B",
        text_reason=PROJECTED.format("T5"),
    ),
    Family(
        name="hunyuan-video",
        models="HunyuanVideo, SkyReels-V1",
        pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text_embedder="context_embedder.proj_in",  # what follows refines it with the timestep
        text_padding="mask",
        cfg="two_calls",
        guidance="true_cfg_scale",
        first_frame=("HunyuanVideoImageToVideoPipeline",),
        vae_drops={"latent_concat": 4},
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "24 of 60, the fourth that mixes text and video in one stream",
        text_reason="Llama's, projected to the video's width; the refiner that follows sees the timestep",
    ),
    Family(
        name="hunyuan-video-1.5",
        text_limit=1000,
        models="HunyuanVideo 1.5",
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        blocks=("transformer_blocks",),
        text_embedder="context_embedder.proj_in",
        text_padding="mask",
        cfg="two_calls",
        guidance="guider",
        images="single",
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "22 of 54",
        text_reason="Qwen's, projected to the video's width; the refiner that follows sees the timestep",
    ),
    Family(
        name="latte",
        text_limit=120,
        models="Latte",
        pipelines=("LattePipeline",),
        blocks=("temporal_transformer_blocks",),  # each follows the spatial block of its number
        beside=("transformer_blocks",),
        token_form="temporal",
        text_embedder="caption_projection",
        cfg="one_batch",
        clock="ddpm",
        vae_factor="scaling_factor",
        vae_frames=True,
        alone=True,
        tap_reason=DEPTH + "11 of 28, behind 11 spatial ones",
        text_reason=PROJECTED.format("T5"),
    ),
    Family(
        name="stable-video-diffusion",
        models="Stable Video Diffusion",
        pipelines=("StableVideoDiffusionPipeline",),
        blocks=("down_blocks", "mid_block", "up_blocks"),
        token_form="frames",
        prompts=False,
        cfg="one_batch",
        guidance="max_guidance_scale",
        clock="edm",
        layout="BTCHW",
        vae_factor="scaling_factor",
        vae_frames=True,
        tap=0.55,
        tap_reason="the middle of the U-Net, where its cells see the most",
        text_reason="it takes no text",
    ),
    _LTX,
    replace(
        _LTX,
        name="ltx-video-condition",
        models="LTX-Video 0.9.5 and later, with conditions",
        pipelines=("LTXConditionPipeline",),
        images="single",
        alone=True,  # in a batch all candidates' conditions are sampled with the first one's generator
        fixed={"denoise_strength": "the run would begin at a lower noise level than its latents have"},
    ),
    Family(
        name="mochi",
        models="Mochi 1",
        pipelines=("MochiPipeline",),
        blocks=("transformer_blocks",),  # its text stream is narrower than its video stream: no text tokens
        cfg="one_batch",
        clock="rising_flow",
        vae_mean_std=True,
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "19 of 48",
        text_reason="its text stream is narrower than its video stream",
    ),
    Family(
        name="allegro",
        models="Allegro",
        pipelines=("AllegroPipeline",),
        blocks=("transformer_blocks",),
        text_embedder="caption_projection",
        text_padding="mask",
        cfg="one_batch",
        clock="euler",
        vae_factor="scaling_factor",
        vae_gives="BTCHW",
        tap_reason=DEPTH + "13 of 32",
        text_reason=PROJECTED.format("T5"),
    ),
    _EASYANIMATE,
    replace(
        _EASYANIMATE,
        name="easyanimate-inpaint",
        models="EasyAnimate 5.1, image or video to video",
        pipelines=("EasyAnimateInpaintPipeline",),
        images="single",
        alone=True,  # noise on its reference takes a generator and no list of them
        fixed={"strength": "the reference's latents come from the global generator, so that no seed gives them again"},
    ),
    Family(
        name="cosmos-1",
        models="Cosmos-Predict1",
        pipelines=("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"),
        counts_calls=True,
        blocks=("transformer_blocks",),  # the text goes into attention as it is: no text tokens of this width
        cfg="two_calls",
        clock="edm",
        vae_mean_std=True,
        vae_factor="sigma_data",
        tap_reason=DEPTH + "11 of 28 in 7B, 14 of 36 in 14B",
        text_reason="attention takes T5's as they are, in another width than the video's",
    ),
    Family(
        name="cosmos-2",
        models="Cosmos-Predict2",
        pipelines=("Cosmos2VideoToWorldPipeline",),
        blocks=("transformer_blocks",),
        cfg="two_calls",
        timestep_of_one=1.0,
        vae_mean_std=True,
        vae_factor="sigma_data",
        tap_reason=DEPTH + "11 of 28 in 2B, 14 of 36 in 14B",
        text_reason="attention takes T5's as they are, in another width than the video's",
    ),
    Family(
        name="cosmos-2.5",
        models="Cosmos-Predict2.5",
        pipelines=("Cosmos2_5_PredictBasePipeline",),
        blocks=("transformer_blocks",),
        cfg="two_calls",
        images="single",
        alone=True,  # its pipeline takes an image or a video for one row alone
        timestep_of_one=1.0,
        vae_mean_std=True,
        tap_reason=DEPTH + "11 of 28 in 2B, 14 of 36 in 14B",
        text_reason="projected to another width than the video's",
    ),
    Family(
        name="kandinsky-5",
        models="Kandinsky 5",
        pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
        blocks=("visual_transformer_blocks",),
        widths="model_dim",
        texts_alone=True,
        text_embedder="text_embeddings",
        cfg="two_calls",
        layout="BTHWC",
        first_frame=("Kandinsky5I2VPipeline",),
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "13 of 32 in Lite, 24 of 60 in Pro",
        text_reason="Qwen's, projected to the video's width; the text blocks that follow see the timestep",
    ),
    Family(
        name="sana-video",
        models="SANA-Video",
        pipelines=("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        blocks=("transformer_blocks",),
        text_embedder="caption_norm",
        text_padding="mask",
        cfg="one_batch",
        images="single",
        vae_mean_std=True,
        tap_reason=DEPTH + "8 of 20",
        text_reason="Gemma's, projected to the video's width; the norm's output is what attention takes",
    ),
    _MOTIF,
    replace(
        _MOTIF,
        name="motif-video-i2v",
        models="Motif-Video, image to video",
        pipelines=("MotifVideoImage2VideoPipeline",),
        images="single",
        alone=True,  # its pipeline takes one image and does not repeat its latents
    ),
    Family(
        name="stable-diffusion-3",
        models="Stable Diffusion 3 (images)",
        pipelines=("StableDiffusion3Pipeline",),
        blocks=("transformer_blocks",),
        video_output=1,
        text_embedder="context_embedder",
        cfg="one_batch",
        layout="BCHW",
        vae_factor="scaling_factor",
        vae_frames=True,
        tap_reason=DEPTH + "10 of 24 in medium",
        text_reason="CLIP's and T5's, projected to the image's width before the first block",
    ),
    Family(
        name="flux",
        models="Flux.1 (images)",
        pipelines=("FluxPipeline",),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        video_output=1,
        text_embedder="context_embedder",
        cfg="two_calls",
        guidance="true_cfg_scale",
        timestep_of_one=1.0,
        layout="BLC2",
        vae_factor="scaling_factor",
        vae_frames=True,
        tap_reason=DEPTH + "23 of 57, the fourth that mixes text and image in one stream",
        text_reason="T5's, projected to the image's width before the first block",
    ),
    Family(
        name="qwen-image",
        texts_alone=True,
        models="Qwen-Image (images)",
        pipelines=("QwenImagePipeline",),
        blocks=("transformer_blocks",),
        video_output=1,
        text_embedder="txt_in",
        text_padding="mask",
        text_mask_argument="encoder_hidden_states_mask",
        cfg="two_calls",
        guidance="true_cfg_scale",
        timestep_of_one=1.0,
        layout="BLC2",
        vae_mean_std=True,
        tap_reason=DEPTH + "24 of 60",
        text_reason="Qwen's, projected to the image's width before the first block",
    ),
)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline: the one it carries, or that of its class."""
    own = getattr(pipe, "family", None)
    return own if isinstance(own, Family) else family_named(type(pipe).__name__)


def family_named(name: str) -> Family:
    """The row of a pipeline by the name of its class."""
    for family in FAMILIES:
        if name in family.pipelines:
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise PrismError(
        f"The pipeline {name} is not supported yet; use one of {known}, or give it a `family` of facts "
        "(see prism.backbone.Pipeline)."
    )


def is_denoiser(name: str) -> bool:
    """Whether a pipeline's component of this name is a denoiser: transformer, transformer_2, unet."""
    return name.split("_")[0] in ("transformer", "unet")

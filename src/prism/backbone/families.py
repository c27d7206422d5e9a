"""The table of families, a row each."""

from __future__ import annotations

from typing import Any

from prism.backbone.family import Family
from prism.errors import PrismError

FAMILIES: tuple[Family, ...] = (
    Family(
        name="wan",
        models="Wan 2.1, Wan 2.2",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        blocks=("blocks",),
        text_embedder="condition_embedder.text_embedder",
        text_padding="zeros",  # no mask is passed: the padding is found as zero rows
        cfg="two_calls",
        images="single",
        vae_mean_std=True,
    ),
    Family(
        name="skyreels-v2",
        models="SkyReels-V2",
        pipelines=("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
        blocks=("blocks",),
        text_embedder="condition_embedder.text_embedder",
        text_padding="zeros",
        cfg="two_calls",
        images="single",
        vae_mean_std=True,
    ),
    Family(
        name="skyreels-v2-df",
        models="SkyReels-V2 diffusion forcing",
        pipelines=("SkyReelsV2DiffusionForcingPipeline",),
        blocks=("blocks",),
        text_embedder="condition_embedder.text_embedder",
        text_padding="zeros",
        cfg="two_calls",
        vae_mean_std=True,
        counts_calls=True,
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
    ),
    Family(
        name="hunyuan-video",
        models="HunyuanVideo",
        pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text_embedder="context_embedder.proj_in",  # what follows refines it with the timestep
        text_padding="mask",
        cfg="two_calls",
        guidance="true_cfg_scale",
        first_frame=("HunyuanVideoImageToVideoPipeline",),
        vae_factor="scaling_factor",
    ),
    Family(
        name="hunyuan-video-1.5",
        models="HunyuanVideo 1.5",
        pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        blocks=("transformer_blocks",),
        text_embedder="context_embedder.proj_in",
        text_padding="mask",
        cfg="two_calls",
        guidance="guider",
        images="single",
        vae_factor="scaling_factor",
    ),
    Family(
        name="latte",
        models="Latte",
        pipelines=("LattePipeline",),
        blocks=("temporal_transformer_blocks",),  # each follows the spatial block of its number
        token_form="temporal",
        text_embedder="caption_projection",
        cfg="one_batch",
        clock="ddpm",
        vae_factor="scaling_factor",
        vae_frames=True,
        alone=True,
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
    ),
    Family(
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
    ),
    Family(
        name="easyanimate",
        models="EasyAnimate 5.1",
        pipelines=("EasyAnimatePipeline",),
        negatives="list",
        blocks=("transformer_blocks",),
        text_embedder="text_proj",
        cfg="one_batch",
        vae_factor="scaling_factor",
    ),
    Family(
        name="cosmos-1",
        models="Cosmos-Predict1",
        pipelines=("CosmosTextToWorldPipeline",),
        counts_calls=True,
        blocks=("transformer_blocks",),  # the text goes into attention as it is: no text tokens of this width
        cfg="two_calls",
        clock="edm",
        vae_mean_std=True,
        vae_factor="sigma_data",
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
    ),
    Family(
        name="cosmos-2.5",
        models="Cosmos-Predict2.5",
        pipelines=("Cosmos2_5_PredictBasePipeline",),
        blocks=("transformer_blocks",),
        cfg="two_calls",
        timestep_of_one=1.0,
        vae_mean_std=True,
    ),
    Family(
        name="kandinsky-5",
        models="Kandinsky 5 (plain attention)",
        pipelines=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
        blocks=("visual_transformer_blocks",),
        widths="model_dim",
        texts_alone=True,
        text_embedder="text_embeddings",
        cfg="two_calls",
        layout="BTHWC",
        first_frame=("Kandinsky5I2VPipeline",),
        vae_factor="scaling_factor",
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
    ),
    Family(
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

"""The table of families: one row of facts each. Here stand those of video transformers; `UNETS`, `IMAGES`,
`FURTHER_IMAGES`, `CONTROLLED` and `SOUNDS` follow."""

from __future__ import annotations

import math
from dataclasses import replace

from prism.backbone.control_families import CONTROLLED
from prism.backbone.family import BATCHED, DEPTH, PROJECTED, Family
from prism.backbone.further_image_families import FURTHER_IMAGES
from prism.backbone.image_families import IMAGES
from prism.backbone.sound_families import SOUNDS
from prism.backbone.soundtrack_families import SOUNDTRACKS
from prism.backbone.unet_families import UNETS

_WAN = Family(
    name="wan",
    models="Wan 2.1, Wan 2.2",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    blocks=("blocks",),
    text_embedder="condition_embedder.text_embedder",
    text_padding="zeros",  # no mask is passed, and padding is zero rows
    cfg="two_calls",
    image_form="single",
    restores_condition=True,  # in Wan 2.2 5B; the other models take the image in further channels
    vae_mean_std=True,
    tap_reason=DEPTH + "12 of 30 in 1.3B and 5B, 16 of 40 in 14B",
    text_reason=PROJECTED.format("T5"),
)

_SKYREELS_DF = replace(
    _WAN,
    name="skyreels-v2-df",
    models="SkyReels-V2 diffusion forcing",
    pipelines=("SkyReelsV2DiffusionForcingPipeline",),
    extra_frames="behind",
    counts_steps_by_calls=True,
    refused_arguments={
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
    negative_prompt_form="list",
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
    trailing_blocks_field="num_decoder_layers",
    text_embedder="context_embedder",
    text_padding="mask",
    cfg="two_calls",
    guidance="guider",
    vae_mean_std=True,
    tap_reason=DEPTH + "the decoder's, which begin anew from the patches, are not counted",
    text_reason="T5Gemma's, projected to the video's width before the first block; an image's are left out",
)

_ROWS: tuple[Family, ...] = (
    _WAN,
    replace(
        _WAN,
        name="chrono-edit",
        models="ChronoEdit",
        pipelines=("ChronoEditPipeline",),
        refused_arguments={
            "enable_temporal_reasoning": "the frames between would be dropped after some steps, and a judge reads one "
            "grid of frames"
        },
        tap_reason=DEPTH + "16 of 40",
    ),
    replace(
        _WAN,
        name="lucy-edit",
        models="Lucy Edit",
        pipelines=("LucyEditPipeline",),
        image_form="list",
    ),
    replace(
        _WAN,
        name="wan-vace",
        models="Wan VACE",
        pipelines=("WanVACEPipeline",),
        single_prompt=True,  # and one video
        tap_reason=DEPTH + "12 of 30 in 1.3B, 16 of 40 in 14B; a block's output is read before the control's is added",
    ),
    replace(
        _WAN,
        name="wan-animate",
        models="Wan 2.2 Animate",
        pipelines=("WanAnimatePipeline",),
        num_extra_frames=1,  # the reference image's, which is denoised with the video and not decoded
        denormalises_output=True,
        windows=lambda call: math.ceil(
            (len(call["pose_video"]) - call["prev_segment_conditioning_frames"])
            / (call["segment_frame_length"] - call["prev_segment_conditioning_frames"])
        ),
        tap_reason=DEPTH + "16 of 40",
    ),
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
        batch_size_one=True,  # its pipeline halves the rows of the image's latents
    ),
    Family(
        name="cogvideox",
        models="CogVideoX, CogVideoX 1.5, CogVideoX Fun",
        pipelines=(
            *("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
            "CogVideoXFunControlPipeline",
        ),
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
        text_embedder="context_embedder.proj_in",  # the refiner after it sees the timestep
        text_padding="mask",
        cfg="two_calls",
        guidance="true_cfg_scale",
        first_frame_pipelines=("HunyuanVideoImageToVideoPipeline",),
        dropped_frames_by_condition={"latent_concat": 4},
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
        image_form="single",
        vae_factor="scaling_factor",
        vae_batch_size_one=True,
        tap_reason=DEPTH + "22 of 54",
        text_reason="Qwen's, projected to the video's width; the refiner that follows sees the timestep",
    ),
    Family(
        name="latte",
        text_limit=120,
        models="Latte",
        pipelines=("LattePipeline",),
        blocks=("temporal_transformer_blocks",),  # each runs after the spatial block of its index
        parallel_blocks=("transformer_blocks",),
        token_form="temporal",
        text_embedder="caption_projection",
        cfg="one_batch",
        clock="ddpm",
        vae_factor="scaling_factor",
        vae_frame_by_frame=True,
        batch_size_one=True,
        tap_reason=DEPTH + "11 of 28, behind 11 spatial ones",
        text_reason=PROJECTED.format("T5"),
    ),
    _LTX,
    replace(
        _LTX,
        name="ltx-video-condition",
        models="LTX-Video 0.9.5 and later, with conditions",
        pipelines=("LTXConditionPipeline",),
        image_form="single",
        batch_size_one=True,  # in a batch all candidates' conditions are sampled with the first one's generator
        refused_arguments={"denoise_strength": "the run would begin at a lower noise level than its latents have"},
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
        decoded_layout="BTCHW",
        tap_reason=DEPTH + "13 of 32",
        text_reason=PROJECTED.format("T5"),
    ),
    _EASYANIMATE,
    replace(
        _EASYANIMATE,
        name="easyanimate-inpaint",
        models="EasyAnimate 5.1, image or video to video",
        pipelines=("EasyAnimateInpaintPipeline",),
        image_form="single",
        batch_size_one=True,  # noise on its reference takes a generator and no list of them
        refused_arguments={
            "strength": "the reference's latents come from the global generator, so that no seed gives them again"
        },
    ),
    Family(
        name="cosmos-1",
        models="Cosmos-Predict1",
        pipelines=("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"),
        counts_steps_by_calls=True,
        blocks=("transformer_blocks",),  # the text keeps its own width in attention: no text tokens
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
        pipelines=("Cosmos2VideoToWorldPipeline", "Cosmos2TextToImagePipeline"),
        blocks=("transformer_blocks",),
        cfg="two_calls",
        pure_noise_timestep=1.0,
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
        image_form="single",
        batch_size_one=True,  # its pipeline takes an image or a video for one row only
        pure_noise_timestep=1.0,
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
        encode_prompts_singly=True,
        text_embedder="text_embeddings",
        cfg="two_calls",
        layout="BTHWC",
        first_frame_pipelines=("Kandinsky5I2VPipeline",),
        after_loop="normalize_first_frame",
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
        image_form="single",
        vae_mean_std=True,
        tap_reason=DEPTH + "8 of 20",
        text_reason="Gemma's, projected to the video's width; the norm's output is what attention takes",
    ),
    Family(
        name="sana-wm",
        models="SANA-WM",
        pipelines=("SanaWMPipeline",),
        single_prompt=True,  # and one video
        single_output=True,
        blocks=("blocks",),
        batched_arguments=BATCHED | {"mask", "camera_conditions", "chunk_plucker"},
        widths="hidden_size",
        text_embedder="attention_y_norm",
        text_padding="mask",
        text_mask_argument="mask",
        cfg="one_batch",
        image_form="single",
        vae_mean_std=True,
        vae_factor="scaling_factor",
        tap_reason=DEPTH + "8 of 20",
        text_reason="Gemma's, projected to the video's width; the norm's output is what attention takes",
    ),
    _MOTIF,
    replace(
        _MOTIF,
        name="motif-video-i2v",
        models="Motif-Video, image to video",
        pipelines=("MotifVideoImage2VideoPipeline",),
        image_form="single",
        batch_size_one=True,  # its pipeline takes one image and does not repeat its latents
    ),
    Family(
        name="helios",
        models="Helios",
        pipelines=("HeliosPipeline",),
        blocks=("blocks",),
        tokens_before="rest",  # those of earlier windows
        text_embedder="condition_embedder.text_embedder",
        text_padding="zeros",
        cfg="two_calls",
        vae_mean_std=True,
        windows=lambda call: math.ceil(call["num_frames"] / (4 * (call["num_latent_frames_per_chunk"] - 1) + 1)),
        image_form="single",
        batch_size_one=True,  # it draws an image's noise with a generator and no list of them
        tap_reason=DEPTH + "16 of 40",
        text_reason=PROJECTED.format("T5"),
    ),
)

# By name; see `prism.backbone.register`.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (*_ROWS, *SOUNDTRACKS, *UNETS, *IMAGES, *FURTHER_IMAGES, *CONTROLLED, *SOUNDS)
}

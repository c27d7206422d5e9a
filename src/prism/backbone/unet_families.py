"""Rows of facts of U-Nets: Stable Video Diffusion, AnimateDiff, Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from dataclasses import replace

from prism.backbone.family import BATCHED, Family

MIDDLE = "the middle of the U-Net, where its cells see the most"

_STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    models="Stable Diffusion 1.5, 2.1 (images)",
    pipelines=(
        *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        "StableDiffusionDepth2ImgPipeline",
    ),
    blocks=("down_blocks", "mid_block", "up_blocks"),
    token_form="frames",
    text_limit=77,
    cfg="one_batch",
    clock="euler",
    layout="BCHW",
    vae_factor="scaling_factor",
    vae_frame_by_frame=True,
    tap=0.55,
    tap_reason=MIDDLE,
    text_reason="attention takes CLIP's as they are, in another width than the image's",
)

_KANDINSKY = replace(
    _STABLE_DIFFUSION,
    name="kandinsky-2.2",
    models="Kandinsky 2.2 (images)",
    pipelines=(*("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"),),
    takes_prompts=False,
    batch_size_one=True,  # a prior's embeddings have one row for each candidate
    learns_variance=True,
    vae_factor="",
    text_reason="it takes a prior's embedding of an image",
)

UNETS: tuple[Family, ...] = (
    Family(
        name="stable-video-diffusion",
        models="Stable Video Diffusion",
        pipelines=("StableVideoDiffusionPipeline",),
        blocks=("down_blocks", "mid_block", "up_blocks"),
        token_form="frames",
        takes_prompts=False,
        cfg="one_batch",
        guidance="max_guidance_scale",
        clock="edm",
        layout="BTCHW",
        vae_factor="scaling_factor",
        vae_frame_by_frame=True,
        tap=0.55,
        tap_reason=MIDDLE,
        text_reason="it takes no text",
    ),
    replace(
        _STABLE_DIFFUSION,
        name="animatediff",
        models="AnimateDiff",
        pipelines=("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "AnimateDiffSDXLPipeline"),
        layout="BCTHW",
        text_reason="attention takes CLIP's as they are, in another width than the video's",
    ),
    _STABLE_DIFFUSION,
    replace(
        _STABLE_DIFFUSION,
        name="stable-diffusion-image-variation",
        models="Stable Diffusion image variations (images)",
        pipelines=("StableDiffusionImageVariationPipeline",),
        takes_prompts=False,
        text_reason="it takes no text",
    ),
    replace(
        _STABLE_DIFFUSION,
        name="stable-unclip",
        models="Stable unCLIP, from an image (images)",
        pipelines=("StableUnCLIPImg2ImgPipeline",),
        batched_arguments=BATCHED | {"class_labels"},
    ),
    replace(
        _STABLE_DIFFUSION,
        name="latent-consistency",
        models="Latent consistency models (images)",
        pipelines=("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        guidance="",  # its guidance is an input of the network
        batched_arguments=BATCHED | {"timestep_cond"},
    ),
    replace(
        _STABLE_DIFFUSION,
        name="stable-diffusion-xl",
        models="Stable Diffusion XL (images)",
        pipelines=(
            *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        ),
    ),
    _KANDINSKY,
    replace(
        _KANDINSKY,
        name="kandinsky-2.2-combined",
        models="Kandinsky 2.2 with its prior (images)",
        pipelines=(
            *("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline"),
            "KandinskyV22InpaintCombinedPipeline",
        ),
        takes_prompts=True,
        seeds_conditions=True,
    ),
    replace(
        _STABLE_DIFFUSION,
        name="kolors",
        models="Kolors (images)",
        pipelines=("KolorsPipeline", "KolorsImg2ImgPipeline"),
        text_limit=None,
        text_reason="attention takes ChatGLM's as they are, in another width than the image's",
    ),
)

"""Rows of facts of further image pipelines with transformers: LongCat-Image, HunyuanImage, FIBO, Krea 2, Lumina."""

from __future__ import annotations

from prism.backbone.family import BATCHED, DEPTH, Family

_LONGCAT = Family(
    name="longcat-image",
    models="LongCat-Image (images)",
    pipelines=("LongCatImagePipeline",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    text_limit=512,
    video_output=1,
    text_embedder="context_embedder",
    cfg="two_calls",
    pure_noise_timestep=1.0,
    layout="BLC2",
    vae_factor="scaling_factor",
    vae_shift=True,
    vae_frame_by_frame=True,
    tap_reason=DEPTH + "of its blocks, in one stream with the text",
    text_reason="Qwen's, projected to the image's width before the first block",
)

FURTHER_IMAGES: tuple[Family, ...] = (
    _LONGCAT,
    Family(
        name="hunyuan-image",
        text_limit=1000,
        models="HunyuanImage 2.1 (images)",
        pipelines=("HunyuanImagePipeline",),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text_embedder="context_embedder.proj_in",
        text_padding="mask",
        cfg="two_calls",
        guidance="guider",
        layout="BCHW",
        patch=(1, 1, 1),
        vae_factor="scaling_factor",
        vae_frame_by_frame=True,
        tap_reason=DEPTH + "24 of 60, the fourth that mixes text and image in one stream",
        text_reason="Qwen's, projected to the image's width; the refiner that follows sees the timestep",
    ),
    Family(
        name="bria-fibo",
        models="Bria FIBO (images)",
        pipelines=("BriaFiboPipeline",),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        video_output=1,
        tokens_before="text",  # in single-stream blocks
        batched_arguments=BATCHED | {"text_encoder_layers", "joint_attention_kwargs"},
        encode_prompts_singly=True,  # padded to the longest of a batch
        text_embedder="context_embedder",
        cfg="one_batch",
        layout="BLC",
        vae_mean_std=True,
        refused_arguments={"do_patching": "its latents would be packed two by two, in another layout"},
        tap_reason=DEPTH + "of its blocks",
        text_reason="SmolLM's, projected to the image's width before the first block",
    ),
    Family(
        name="krea-2",
        models="Krea 2 (images)",
        pipelines=("Krea2Pipeline",),
        blocks=("transformer_blocks",),
        tokens_before="rest",  # the text's
        cfg="two_calls",
        guidance_off=0.0,
        pure_noise_timestep=1.0,
        layout="BLC2",
        patch=(1, 1, 1),
        vae_mean_std=True,
        tap_reason=DEPTH + "11 of 28, in one stream with the text",
        text_reason="several layers of Qwen's states, mixed before they are projected",
    ),
    Family(
        name="lumina",
        models="Lumina-Next (images)",
        pipelines=("LuminaPipeline",),
        blocks=("layers",),
        batched_arguments=BATCHED | {"encoder_mask"},
        widths="hidden_size",
        encode_prompts_singly=True,  # padded to the longest of a batch
        text_limit=256,
        cfg="one_batch",
        conditional_first=True,
        clock="rising_flow",
        pure_noise_timestep=1.0,
        layout="BCHW",
        vae_factor="scaling_factor",
        vae_frame_by_frame=True,
        refused_arguments={"scaling_watershed": "the places of its tokens would change on the way"},
        tap_reason=DEPTH + "13 of 32",
        text_reason="attention takes Gemma's as they are, in another width than the image's",
    ),
)

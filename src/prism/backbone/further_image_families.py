"""Rows of facts of further image pipelines with transformers: LongCat-Image, HunyuanImage, FIBO, Krea 2 and others."""

from __future__ import annotations

from dataclasses import replace

from prism.backbone.family import BATCHED, DEPTH, Family

_REWRITES = "a language model would write the prompt anew in each call, with noise that no seed gives again"

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
    refused_arguments={"enable_prompt_rewrite": _REWRITES},
    needed_values={"enable_prompt_rewrite": False},
    tap_reason=DEPTH + "of its blocks, in one stream with the text",
    text_reason="Qwen's, projected to the image's width before the first block",
)

_FIBO = Family(
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
)

FURTHER_IMAGES: tuple[Family, ...] = (
    _LONGCAT,
    replace(
        _LONGCAT,
        name="longcat-image-edit",
        models="LongCat-Image-Edit (images)",
        pipelines=("LongCatImageEditPipeline",),
        single_prompt=True,  # it encodes the first of a list
        image_form="single",
    ),
    _FIBO,
    replace(
        _FIBO,
        name="bria-fibo-edit",
        models="Bria FIBO Edit (images)",
        pipelines=("BriaFiboEditPipeline",),
        image_form="single",  # a list are several images for one prompt
    ),
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
    Family(
        name="nucleus-image",
        models="Nucleus-Image (images)",
        pipelines=("NucleusMoEImagePipeline",),
        blocks=("transformer_blocks",),
        encode_prompts_singly=True,  # padded to the longest of a batch
        cfg="two_calls",
        pure_noise_timestep=1.0,
        layout="BLC2",
        vae_mean_std=True,
        tap_reason=DEPTH + "10 of 24",
        text_reason="each block projects Qwen's by itself",
    ),
    Family(
        name="qwen-image-2.1",
        models="Qwen-Image 2.1 (images)",
        pipelines=("QwenImage21Pipeline",),
        blocks=("transformer_blocks",),
        tokens_before="rest",  # the text's
        batched_arguments=BATCHED | {"img_mask"},
        encode_prompts_singly=True,  # padded to the longest of a batch
        text_embedder="txt_in",
        cfg="two_calls",
        guidance="true_cfg_scale",
        negative_prompt_form="list",
        pure_noise_timestep=1.0,
        layout="BLC",
        vae_mean_std=True,
        refused_arguments={
            "image": "its tokens stand before those of the latents",
            "use_kv_cache": "what the first call keeps would answer for the later ones",
        },
        needed_values={"use_kv_cache": False},
        tap_reason=DEPTH + "13 of 32, in one stream with the text",
        text_reason="Qwen's, projected to the image's width before the first block",
    ),
    Family(
        name="bria-fibo-2",
        models="Bria FIBO 2 (images)",
        pipelines=("BriaFibo2Pipeline",),
        blocks=("layers",),
        tokens_before="rest",  # a gist of the text, as long as the text asks for
        tokens_behind=lambda arguments: sum(z.shape[2] * z.shape[3] // 4 for z in arguments["context_latents"] or ()),
        widths="dim",
        encode_prompts_singly=True,  # padded to the longest of a batch
        cfg="two_calls",
        image_form="single",  # a list are several images for one prompt
        pure_noise_timestep=1.0,
        layout="BCHW",
        vae_mean_std=True,
        vae_frame_by_frame=True,
        tap_reason=DEPTH + "18 of 44, in one stream with a gist of the text",
        text_reason="a gist of several layers of Qwen's states",
    ),
    Family(
        name="ernie-image",
        models="ERNIE-Image (images)",
        pipelines=("ErnieImagePipeline",),
        blocks=("layers",),
        text_argument="text_bth",
        batched_arguments=frozenset(["hidden_states", "timestep", "text_bth", "text_lens"]),
        token_form="LBD",
        tokens_behind="rest",  # the text's
        widths="hidden_size",
        encode_prompts_singly=True,  # padded to the longest of a batch
        text_embedder="text_proj",
        cfg="one_batch",
        layout="BCHW2",
        vae_mean_std=True,
        vae_frame_by_frame=True,
        refused_arguments={"use_pe": _REWRITES},
        needed_values={"use_pe": False},
        tap_reason=DEPTH + "10 of 24, in one stream with the text",
        text_reason="Mistral's, projected to the image's width before the first block",
    ),
)

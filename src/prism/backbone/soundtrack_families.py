"""Rows of facts of pipelines that denoise a sound beside the video, which a judge leaves out."""

from __future__ import annotations

from dataclasses import replace

from prism.backbone.family import BATCHED, DEPTH, Family

_OWN_NOISE = "every candidate's sound starts from the noise of its own seed"

_LTX2 = Family(
    name="ltx-2",
    models="LTX-2, LTX-2.3, LTX-2.5",
    pipelines=("LTX2Pipeline",),
    blocks=("transformer_blocks",),
    cfg="one_batch",
    layout="BLC",
    vae_mean_std=True,
    vae_factor="scaling_factor",
    batched_arguments=BATCHED
    | {"audio_hidden_states", "audio_encoder_hidden_states", "audio_encoder_attention_mask", "audio_coords"}
    | {"audio_timestep", "sigma"},
    further_timesteps=("audio_timestep", "sigma"),
    read_arguments={"isolate_modalities": True},
    further_guidance={"stg_scale": 0.0, "modality_scale": 1.0},
    outputs=2,
    soundtrack_rate="vocoder.output_sampling_rate",
    denormalises_output=True,
    refused_arguments={
        "audio_latents": _OWN_NOISE,
        "enable_prompt_enhancement": "the prompt would be written anew at each call; give what pipe.enhance_prompt "
        "makes of it",
    },
    tap_reason=DEPTH + "19 of 48, with attention to the sound switched off",
    text_reason="LTX-2.3 and later have no text embedding in the denoiser",
)

SOUNDTRACKS: tuple[Family, ...] = (
    _LTX2,
    replace(
        _LTX2,
        name="ltx-2-i2v",
        models="LTX-2, LTX-2.3, LTX-2.5, image to video",
        pipelines=("LTX2ImageToVideoPipeline",),
        image_form="single",
        batch_size_one=True,  # it compresses one image, and takes it for one row
    ),
    replace(
        _LTX2,
        name="ltx-2-condition",
        models="LTX-2, LTX-2.3, LTX-2.5, with conditions or reference videos",
        pipelines=("LTX2ConditionPipeline", "LTX2InContextPipeline"),
        batched_arguments=_LTX2.batched_arguments | {"audio_sigma", "video_self_attention_mask"},
        appends_conditions=True,
        further_timesteps=(*_LTX2.further_timesteps, "audio_sigma"),
    ),
    Family(
        name="kandinsky6",
        models="Kandinsky 6",
        pipelines=("Kandinsky6TI2VAPipeline",),
        blocks=("visual_transformer_blocks",),
        batched_arguments=BATCHED | {"audio_hidden_states"},
        read_arguments={"audio_hidden_states": None},
        outputs=2,
        soundtrack_rate="audio_vae.sample_rate",
        widths="model_dim",
        text_embedder="video_text_embeddings",
        text_padding="mask",
        cfg="two_calls",
        layout="BTHWC",
        vae_factor="scaling_factor",
        refused_arguments={
            "audio_latents": _OWN_NOISE,
            "expand_prompts": "the prompt would be written anew at each call; give what pipe.expand_prompts "
            "makes of it",
            "image": "it would stand in the loop's latents behind the video's frames, and in an encoded clip's not",
        },
        tap_reason=DEPTH + "24 of 60, without the sound",
        text_reason="Qwen's, projected to the video's width; the text blocks that follow see the timestep",
    ),
)

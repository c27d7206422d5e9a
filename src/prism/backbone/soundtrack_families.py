"""Rows of facts of pipelines that denoise a sound beside the video, which a judge leaves out."""

from __future__ import annotations

from dataclasses import replace

from prism.backbone.family import BATCHED, DEPTH, Family

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
        "audio_latents": "every candidate's sound starts from the noise of its own seed",
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
)

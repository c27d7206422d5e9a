"""Rows of facts of pipelines that make sounds; a sound's latents are a video of cells of 1 x 1, or a picture."""

from __future__ import annotations

from dataclasses import replace

from prism.backbone.family import BATCHED, DEPTH, Family
from prism.backbone.unet_families import MIDDLE

_GLOBAL = "its latents are drawn from torch's global generator, which no seed sets"

_STABLE_AUDIO = Family(
    name="stable-audio-3",
    models="Stable Audio 3 (sounds)",
    pipelines=("StableAudio3Pipeline", "StableAudio3InpaintPipeline", "StableAudio3AudioToAudioPipeline"),
    blocks=("transformer_blocks",),
    batched_arguments=BATCHED | {"global_hidden_states", "local_add_cond"},
    patch=(1, 1, 1),
    tokens_before="rest",  # memory
    widths="embed_dim",
    cfg="one_batch",
    layout="BCT",
    sampling_rate="vae.sampling_rate",
    tap_reason=DEPTH + "10 of 24",
    text_reason="attention takes T5Gemma's and the length's together",
)

SOUNDS: tuple[Family, ...] = (
    _STABLE_AUDIO,
    replace(
        _STABLE_AUDIO,
        name="stable-audio",
        models="Stable Audio Open (sounds)",
        pipelines=("StableAudioPipeline",),
        widths="",
        negative_prompt_form="list",
        clock="edm",
        refused_arguments={
            "initial_audio_waveforms": "one row of latents is drawn of it, which a generator per candidate cannot do"
        },
        text_reason="attention takes T5's and the length's together",
    ),
    Family(
        name="audioldm-2",
        models="AudioLDM 2 (sounds)",
        pipelines=("AudioLDM2Pipeline",),
        blocks=("down_blocks", "mid_block", "up_blocks"),
        batched_arguments=BATCHED | {"encoder_hidden_states_1", "encoder_attention_mask_1"},
        encode_prompts_singly=True,  # padded to the longest of a batch
        negative_prompt_form="list",
        token_form="frames",
        cfg="one_batch",
        clock="euler",
        layout="BCHW",  # a spectrogram: its rows are times
        sampling_rate="vocoder.sampling_rate",
        tap=0.55,
        tap_reason=MIDDLE,
        text_reason="attention takes GPT-2's and T5's as they are, in other widths than the sound's",
    ),
    Family(
        name="longcat-audio-dit",
        models="LongCat-AudioDiT (sounds)",
        pipelines=("LongCatAudioDiTPipeline",),
        blocks=("blocks",),
        batched_arguments=BATCHED | {"latent_cond"},
        patch=(1, 1, 1),
        widths="dit_dim",
        encode_prompts_singly=True,  # padded to the longest of a batch
        cfg="two_calls",
        clock="rising_flow",
        pure_noise_timestep=1.0,
        layout="BTC",
        sampling_rate="vae.sample_rate",
        tap_reason=DEPTH + "10 of 24",
        text_reason="its convolutions mix the text's rows before attention",
    ),
    Family(
        name="ace-step",
        models="ACE-Step 1.5 (music)",
        pipelines=("AceStepPipeline",),
        blocks=("layers",),
        batched_arguments=BATCHED | {"timestep_r", "context_latents"},
        further_timesteps=("timestep_r",),
        patch=(2, 1, 1),
        pads=True,
        widths="hidden_size",
        batch_size_one=True,  # it takes lyrics for one prompt, and packs texts by the longest
        cfg="one_batch",
        conditional_first=True,
        layout="BTC",
        sampling_rate="vae.sampling_rate",
        refused_arguments={
            **dict.fromkeys(("src_audio", "reference_audio"), _GLOBAL),
            **dict.fromkeys(("cfg_interval_start", "cfg_interval_end"), "some steps would have more rows than others"),
            "audio_cover_strength": "each step would have a further pass, with another text",
            "timesteps": "the pipeline would not say how many steps it makes",
        },
        tap_reason=DEPTH + "10 of 24",
        text_reason="attention takes the text's, the lyrics' and the timbre's together",
    ),
)

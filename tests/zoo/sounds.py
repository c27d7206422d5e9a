"""Tiny real diffusers pipelines that make sounds.

Each function returns `(pipe, call)`, where `call` lacks only the prompt, the generator and the output type. "Latents"
are those of one sound, without batch axis; "tokens" are what a block puts out for it, in the order of time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderSAME,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
    StableAudio3Pipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from tests.tiny import TEXT_WIDTH, WORDS, text_encoder, tokenizer
from tests.zoo.unets import BETAS
from tests.zoo.wan_to_kandinsky import _quiet
from transformers import (
    ClapConfig,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

Built = tuple[Any, dict[str, Any]]
WORD_LIST = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]


def _model(kind: type, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own of weight_norm
        model = kind(**config)
    for value in model.parameters():  # some begin at zero, and hide what comes before them
        if not value.any():
            value.data.normal_(0, 0.3)
    return model


def stable_audio_3(**changes: Any) -> Built:
    """Latents (8, 6); tokens (6, 24), behind 3 of memory; the scheduler draws noise at each step."""
    torch.manual_seed(0)
    pipe = StableAudio3Pipeline(
        vae=_model(
            AutoencoderSAME,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        ),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(12),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=16),
        transformer=StableAudio3DiTModel(
            io_channels=8,
            embed_dim=24,
            depth=3,
            num_heads=2,
            cond_token_dim=TEXT_WIDTH,
            global_cond_dim=TEXT_WIDTH,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            **{"local_add_cond_dim": 5, **changes},
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, stochastic_sampling=True),
    )
    pipe.transformer.timestep_features.max_freq = 10.0  # its 10,000 turns a timestep's rounding into 1e-4 of the tokens
    return _quiet(pipe), {"duration": 1.5, "num_inference_steps": 4}


def _oobleck() -> Any:
    """The VAE of Stable Audio and ACE-Step."""
    return _model(
        AutoencoderOobleck,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        channel_multiples=[2, 4],
        decoder_channels=3,
        decoder_input_channels=4,
        sampling_rate=4,
    )


def stable_audio() -> Built:
    """Latents (4, 8), of which what is asked for is cut out; tokens (8, 24), behind one for the length."""
    torch.manual_seed(0)
    pipe = StableAudioPipeline(
        vae=_oobleck(),
        text_encoder=text_encoder(),
        projection_model=StableAudioProjectionModel(TEXT_WIDTH, 8, 0, 32),
        tokenizer=tokenizer(12),
        transformer=StableAudioDiTModel(
            sample_size=8,
            in_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=12,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=80, sigma_data=1.0, prediction_type="v_prediction"
        ),
    )
    return _quiet(pipe), {"audio_end_in_s": 3.0, "num_inference_steps": 4, "guidance_scale": 4.0}


def _clap() -> ClapModel:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    text |= {"vocab_size": len(WORD_LIST), "max_position_embeddings": 16, "projection_dim": 8}
    audio = {"spec_size": 64, "window_size": 4, "num_mel_bins": 64, "depths": [1], "num_attention_heads": [2]}
    audio |= {"patch_embeds_hidden_size": 8, "hidden_size": 8, "projection_dim": 8, "num_hidden_layers": 1}
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8))


def audioldm_2() -> Built:
    """Latents (4, 8, 4), times by frequencies; tokens (8, 32), there as (32, 4, 2)."""
    torch.manual_seed(0)
    pipe = AudioLDM2Pipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=_clap(),
        text_encoder_2=text_encoder(),
        projection_model=AudioLDM2ProjectionModel(8, TEXT_WIDTH, 16),
        language_model=GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=8, n_positions=40, bos_token_id=0, eos_token_id=0)
        ),
        tokenizer=RobertaTokenizer({word: row for row, word in enumerate(WORD_LIST)}, [], model_max_length=12),
        tokenizer_2=T5Tokenizer([(word, 0.0) for word in ("<pad>", "</s>", "<unk>", *WORDS)], model_max_length=12),
        feature_extractor=None,
        unet=AudioLDM2UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=([None, 16, TEXT_WIDTH],) * 2,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing", steps_offset=1),
        vocoder=SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=8,
                sampling_rate=64,
                upsample_initial_channel=8,
                upsample_rates=[2, 2],
                upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1]],
                normalize_before=False,
                initializer_range=0.3,
            )
        ),
    )
    pipe.language_model.config.max_new_tokens = 1
    return _quiet(pipe), {"audio_length_in_s": 1.0, "num_inference_steps": 4, "guidance_scale": 4.0}


def longcat_audio() -> Built:
    """Latents (6, 4), times by channels; tokens (6, 24)."""
    torch.manual_seed(0)
    pipe = LongCatAudioDiTPipeline(
        vae=_model(
            LongCatAudioDiTVae,
            channels=4,
            c_mults=[1, 2],
            strides=[2, 2],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=4,
            sample_rate=16,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=4)
        ),
        tokenizer=tokenizer(12),
        transformer=_model(
            LongCatAudioDiTTransformer,
            dit_dim=24,
            dit_depth=3,
            dit_heads=2,
            dit_text_dim=TEXT_WIDTH,
            latent_dim=4,
            ff_mult=1.0,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )
    return _quiet(pipe), {"audio_duration_s": 1.5, "num_inference_steps": 4, "guidance_scale": 4.0}


def ace_step() -> Built:
    """Latents (9, 4), times by channels, in pairs and one alone; tokens (5, 24)."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "sliding_window": 2}
    pipe = AceStepPipeline(
        vae=_oobleck(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=_model(
            AceStepTransformer1DModel,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            encoder_hidden_size=16,
            **heads,
        ),
        condition_encoder=AceStepConditionEncoder(
            hidden_size=16,
            intermediate_size=24,
            text_hidden_dim=TEXT_WIDTH,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            **heads,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.condition_encoder.silence_latent.normal_()
    return _quiet(pipe), {"audio_duration": 4.5, "num_inference_steps": 4, "guidance_scale": 4.0}


BUILDERS: dict[str, Callable[[], Built]] = {
    "stable_audio_3": stable_audio_3,
    "stable_audio": stable_audio,
    "audioldm_2": audioldm_2,
    "longcat_audio": longcat_audio,
    "ace_step": ace_step,
}

"""Tiny random models of the teachers' real classes, with byte tokenizers, in folders like the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
# What Qwen2-VL's template makes of a user's turn with pictures or videos
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(special: tuple[str, ...] = SPECIAL, template: str | None = TEMPLATE) -> Any:
    """A token for each byte, and special tokens behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], eos_token=special[2], additional_special_tokens=list(special)
    )
    made.chat_template = template
    return made


def qwen(folder: Path, kind: str = "qwen2_vl", seed: int = 0, tokens: int | None = None) -> Any:
    """A Qwen2-VL or Qwen2.5-VL for generation with its tokenizer, saved in a folder; the model."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
    )

    made = tokenizer()
    ids = {
        name: made.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": tokens or len(made), "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": None, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id,
    }  # fmt: skip
    shared = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    named = {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
             "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"]}  # fmt: skip
    torch.manual_seed(seed)
    if kind == "qwen2_vl":
        vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **shared}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **named))
    else:
        vision = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [1],
                  "window_size": 56, "tokens_per_second": 2, **shared}  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named))
    for parameter in model.parameters():  # larger than transformers' first values, so that frames matter
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return model.eval()


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Qwen2-VL's state under the names of transformers 4.45, which the published weights have."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.clone().contiguous()
        for name, value in state.items()
    }


MODEL_CONFIG = {  # the entries of a published model_config.json that are read
    "data_config": {
        "max_frame_pixels": 200704, "num_frames": None, "fps": 2.0, "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special", "sample_type": "uniform",
    },
    "model_config": {
        "model_name_or_path": "base", "output_dim": 3, "use_special_tokens": True, "reward_token": "special",
    },
    "peft_lora_config": {"lora_enable": True, "lora_r": 2, "lora_alpha": 4, "use_rslora": False},
    "inference_config": {
        "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121,
    },
}  # fmt: skip


def videoreward(folder: Path, **changes: Any) -> Any:
    """A folder of VideoReward with its whole model, and its base's folder "base" beside; the model."""
    model = qwen(folder.parent / "base", tokens=len(tokenizer()) + 3)
    state = old_names(model.state_dict())
    state["rm_head.weight"] = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    config = json.loads(json.dumps(MODEL_CONFIG))
    config["model_config"]["model_name_or_path"] = str(folder.parent / "base")
    for name, value in changes.items():
        part, _, entry = name.partition("__")
        config[part][entry] = value
    (folder / "checkpoint-20").mkdir(parents=True)
    (folder / "checkpoint-3").mkdir()  # older, and empty
    (folder / "model_config.json").write_text(json.dumps(config))
    save_file(state, folder / "checkpoint-20" / "model.safetensors")
    return model


def hpsv3(folder: Path) -> Any:
    """A folder of HPSv3 with its base's files in it; the model."""
    model = qwen(folder, tokens=len(tokenizer()) + 1)
    state = old_names(model.state_dict())
    (folder / "model.safetensors").unlink()
    random = torch.Generator().manual_seed(2)
    for layer, (out, into) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        state[f"rm_head.{layer}.weight"] = torch.randn(out, into, generator=random) / into**0.5
        state[f"rm_head.{layer}.bias"] = torch.randn(out, generator=random)
    save_file(state, folder / "HPSv3.safetensors")
    return model


def clip(seed: int, frames: int = 10, height: int = 56, width: int = 84) -> np.ndarray:
    """A video of noise that moves, (T, H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (frames, height, width, 3), np.uint8)

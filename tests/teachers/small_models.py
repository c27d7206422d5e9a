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
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
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
    elif kind == "qwen3_vl":
        vision = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16,
                  "deepstack_visual_indexes": [0], **shared, "patch_size": 16}  # fmt: skip
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config={**text, "head_dim": 8}, vision_config=vision, **named)
        )
        stated = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_mean": [0.5] * 3,
                  "image_std": [0.5] * 3}  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
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


# -- pictures


def words(folder: Path, vocabulary: list[str], kind: str) -> Any:
    """A tokenizer of whole words, saved in a folder: CLIP's with its start and end, BERT's with [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first, last = ("<|startoftext|>", "<|endoftext|>") if kind == "clip" else ("[CLS]", "[SEP]")
    table = {word: index for index, word in enumerate(["[UNK]", *vocabulary, first, last])}
    raw = Tokenizer(models.WordLevel(table, "[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, table[first]), (last, table[last])]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token=last, eos_token=last)
    made.save_pretrained(folder)
    return made


def open_clip(folder: Path, vocabulary: list[str]) -> dict[str, torch.Tensor]:
    """A folder of HPSv2 with weights under open_clip's names and CLIP's files; the state."""
    from transformers import CLIPConfig

    size, wide, embed, side = len(vocabulary) + 3, 32, 24, 28
    tower = {"hidden_size": wide, "intermediate_size": 4 * wide, "num_hidden_layers": 2, "num_attention_heads": 2,
             "hidden_act": "gelu"}  # fmt: skip
    CLIPConfig(
        projection_dim=embed,
        text_config={**tower, "vocab_size": size, "max_position_embeddings": 77, "eos_token_id": size - 1,
                     "bos_token_id": size - 2, "pad_token_id": 1},
        vision_config={**tower, "image_size": side, "patch_size": 7},
    ).save_pretrained(folder)  # fmt: skip
    random = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / 5

    state = {
        "visual.class_embedding": draw(wide), "visual.conv1.weight": draw(wide, 3, 7, 7),
        "visual.positional_embedding": draw(17, wide), "visual.proj": draw(wide, embed),
        "token_embedding.weight": draw(size, wide), "positional_embedding": draw(77, wide),
        "text_projection": draw(wide, embed), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        state |= {f"{name}.weight": 1 + draw(wide), f"{name}.bias": draw(wide)}
    for stem in ("visual.transformer.resblocks", "transformer.resblocks"):
        for layer in range(2):
            block = f"{stem}.{layer}"
            for name in ("ln_1", "ln_2"):
                state |= {f"{block}.{name}.weight": 1 + draw(wide), f"{block}.{name}.bias": draw(wide)}
            state |= {
                f"{block}.attn.in_proj_weight": draw(3 * wide, wide),
                f"{block}.attn.in_proj_bias": draw(3 * wide),
            }
            for name, out, into in (
                ("attn.out_proj", wide, wide),
                ("mlp.c_fc", 4 * wide, wide),
                ("mlp.c_proj", wide, 4 * wide),
            ):
                state |= {f"{block}.{name}.weight": draw(out, into), f"{block}.{name}.bias": draw(out)}
    save_file(state, folder / "HPS_v2.1_compressed.safetensors")
    words(folder, vocabulary, "clip")
    return state


def imagereward(folder: Path, vocabulary: list[str]) -> dict[str, torch.Tensor]:
    """A folder of ImageReward with BERT's tokenizer; the state."""
    size, seen, wide = len(vocabulary) + 3, 64, 32
    config = {"vocab_size": size, "hidden_size": wide, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
              "encoder_width": 768, "add_cross_attention": True, "type_vocab_size": 2}  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(5)

    def linear(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.randn(out, into, generator=random) / into**0.5,
                f"{name}.bias": torch.randn(out, generator=random) / 5}  # fmt: skip

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + torch.randn(width, generator=random) / 5,
                f"{name}.bias": torch.randn(width, generator=random) / 5}  # fmt: skip

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{eye}.cls_token": torch.randn(1, 1, seen, generator=random),
        f"{eye}.pos_embed": torch.randn(1, 5, seen, generator=random),
        f"{eye}.patch_embed.proj.weight": torch.randn(seen, 3, 16, 16, generator=random) / 28,
        f"{eye}.patch_embed.proj.bias": torch.randn(seen, generator=random),
        **norm(f"{eye}.norm", seen),
        f"{text}.embeddings.word_embeddings.weight": torch.randn(size, wide, generator=random),
        f"{text}.embeddings.position_embeddings.weight": torch.randn(64, wide, generator=random),
        f"{text}.embeddings.position_ids": torch.arange(64)[None],
        **norm(f"{text}.embeddings.LayerNorm", wide),
        **linear("blip.vision_proj", 8, seen), **linear("blip.text_proj", 8, wide),
    }  # fmt: skip
    for layer in range(2):
        block = f"{eye}.blocks.{layer}"
        state |= norm(f"{block}.norm1", seen) | norm(f"{block}.norm2", seen)
        state |= linear(f"{block}.attn.qkv", 3 * seen, seen) | linear(f"{block}.attn.proj", seen, seen)
        state |= linear(f"{block}.mlp.fc1", 4 * seen, seen) | linear(f"{block}.mlp.fc2", seen, 4 * seen)
        block = f"{text}.encoder.layer.{layer}"
        for kind, into in (("attention", wide), ("crossattention", seen)):
            state |= linear(f"{block}.{kind}.self.query", wide, wide) | linear(f"{block}.{kind}.self.key", wide, into)
            state |= linear(f"{block}.{kind}.self.value", wide, into)
            state |= linear(f"{block}.{kind}.output.dense", wide, wide) | norm(f"{block}.{kind}.output.LayerNorm", wide)
        state |= linear(f"{block}.intermediate.dense", 48, wide) | linear(f"{block}.output.dense", wide, 48)
        state |= norm(f"{block}.output.LayerNorm", wide)
    for index, (out, into) in {0: (1024, wide), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        state |= linear(f"mlp.layers.{index}", out, into)
    save_file(state, folder / "ImageReward.safetensors")
    words(folder, vocabulary, "bert")
    return state


def idefics2(folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A folder of VideoScore; the model for generation with its body, the head's weight and bias."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    made = tokenizer(("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"))
    picture = Idefics2ImageProcessorPil(do_image_splitting=False, size={"shortest_edge": 28, "longest_edge": 56})
    processor = Idefics2Processor(picture, made, image_seq_len=3)
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(6)
    model = Idefics2ForConditionalGeneration(
        Idefics2Config(
            text_config=text,
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
            perceiver_config={"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                              "resampler_head_dim": 8, "num_key_value_heads": 1},
            image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    weight, bias = torch.randn(5, 32), torch.randn(5)
    model.config.save_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file({**state, "score.weight": weight, "score.bias": bias}, folder / "model.safetensors")
    processor.save_pretrained(folder)
    return model.eval(), weight, bias

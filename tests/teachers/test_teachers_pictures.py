"""Teachers on CLIP, BLIP and Idefics2: their scores against the published networks written out with torch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.teachers import small_models
from torch.nn import functional as F

from prism import teachers
from prism.errors import PrismError
from prism.teachers import frames, hpsv2, prompts, qwen, videoscore

WORDS = ["a", "red", "ball", "cat", "&"]


def attended(q, k, v, heads, mask=None):
    """Attention of (rows, n, width)."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    weights = split[0] @ split[1].transpose(-2, -1) / split[0].shape[-1] ** 0.5
    weights = weights if mask is None else weights + mask
    return (weights.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_hpsv2_is_open_clips_cosine(tmp_path):
    state = small_models.open_clip(tmp_path, WORDS)
    teacher = teachers.load(f"hpsv2={tmp_path},count=2")
    video = small_models.clip(0, frames=5, height=28, width=56)
    score = teacher.score([video], ["A  RED &amp; ball"])[0]["preference"]

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x, stem, mask=None):
        for layer in range(2):
            block = f"{stem}.{layer}"
            y = norm(x, f"{block}.ln_1")
            y = F.linear(y, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
            x = x + linear(attended(*y.chunk(3, -1), 2, mask), f"{block}.attn.out_proj")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
        return x

    boxed = torch.zeros(2, 3, 28, 28)  # half the height, in the middle
    for row, frame in enumerate((0, 4)):
        whole = torch.from_numpy(video[[frame]]).permute(0, 3, 1, 2) / 255
        boxed[row, :, 7:21] = F.interpolate(whole, (14, 28), mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in qwen.CLIP)
    x = F.conv2d((boxed - mean) / std, state["visual.conv1.weight"], stride=7).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(2, 1, -1), x], 1) + state["visual.positional_embedding"]
    x = tower(norm(x, "visual.ln_pre"), "visual.transformer.resblocks")
    seen = F.normalize(norm(x[:, 0], "visual.ln_post") @ state["visual.proj"], dim=-1)

    ids = torch.tensor([6, 1, 2, 5, 3, 7])  # start a red & ball end
    y = (state["token_embedding.weight"][ids] + state["positional_embedding"][:6])[None]
    y = tower(y, "transformer.resblocks", torch.full((6, 6), -torch.inf).triu(1))
    said = F.normalize(norm(y[0, ids.argmax()], "ln_final") @ state["text_projection"], dim=-1)
    assert score == pytest.approx(float((seen @ said).mean()), abs=1e-5)
    assert -1 <= score <= 1
    assert teacher.score([video], ["a cat"])[0]["preference"] != pytest.approx(score, abs=1e-3)


@torch.no_grad()
def test_imagereward_is_blips_with_its_mlp(tmp_path):
    state = small_models.imagereward(tmp_path, WORDS)
    teacher = teachers.load(f"imagereward={tmp_path},count=3")
    video = small_models.clip(1, frames=3, height=32, width=60)
    score = teacher.score([video], ["a red cat"])[0]["preference"]

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    mean, std = (torch.tensor(values)[:, None, None] for values in qwen.CLIP)
    pixels = (torch.from_numpy(video[:, :, 14:46].copy()).permute(0, 3, 1, 2) / 255 - mean) / std
    x = F.conv2d(pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([state[f"{eye}.cls_token"].expand(3, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{eye}.pos_embed"]
    for layer in range(2):
        block = f"{eye}.blocks.{layer}"
        parts = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attended(*parts, 1), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)

    ids = torch.tensor([6, 1, 2, 4, 7])
    y = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    y = norm(y + state[f"{text}.embeddings.position_embeddings.weight"][:5], f"{text}.embeddings.LayerNorm", 1e-12)
    y = y.expand(3, -1, -1)
    for layer in range(2):
        block = f"{text}.encoder.layer.{layer}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            own = f"{block}.{kind}.self"
            other = y if source is None else source
            z = attended(linear(y, f"{own}.query"), linear(other, f"{own}.key"), linear(other, f"{own}.value"), 2)
            y = norm(y + linear(z, f"{block}.{kind}.output.dense"), f"{block}.{kind}.output.LayerNorm", 1e-12)
        z = linear(F.gelu(linear(y, f"{block}.intermediate.dense")), f"{block}.output.dense")
        y = norm(y + z, f"{block}.output.LayerNorm", 1e-12)
    rewards = y[:, 0]
    for index in (0, 2, 4, 6, 7):
        rewards = linear(rewards, f"mlp.layers.{index}")
    expected = (rewards.mean() - 0.16717362830052426) / 1.0333394966054072
    assert score == pytest.approx(float(expected), abs=1e-4)


@torch.no_grad()
def test_videoscore_is_the_head_on_the_last_token(tmp_path):
    from transformers import AutoProcessor

    model, weight, bias = small_models.idefics2(tmp_path)
    teacher = teachers.load(f"videoscore={tmp_path},count=4")
    video = small_models.clip(2, frames=10)
    row = teacher.score([video], ["a cat"])[0]
    text = prompts.text("videoscore").replace("{text_prompt}", "a cat") + "<image> <image> <image> <image> "
    pictures = [Image.fromarray(video[position]) for position in (0, 2, 5, 7)]
    inputs = AutoProcessor.from_pretrained(tmp_path)(text=text, images=[pictures], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 12
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    np.testing.assert_allclose(list(row.values()), F.linear(hidden, weight, bias), atol=1e-4)
    assert tuple(row) == teacher.dimensions
    assert len(teacher.score([video], ["<image> <fake_token_around_image>"])) == 1  # not taken for a picture


def test_frames_of_videoscore_are_chosen_as_published():
    assert videoscore.chosen_frames(10, 16) == list(range(10))
    assert videoscore.chosen_frames(32, 16) == list(range(0, 32, 2))
    assert videoscore.chosen_frames(50, 16) == np.arange(0, 50, 50 / 16).astype(int).tolist()
    assert all(len(videoscore.chosen_frames(total, 16)) == 16 for total in range(16, 400))


def test_pictures_are_cut_as_published():
    bright = np.full((1, 40, 80, 3), 200, np.uint8)
    boxed = frames.letterbox(bright, 28)
    assert boxed.shape == (1, 3, 28, 28)
    assert boxed[0, 0, :, 5].round().tolist() == [0] * 7 + [200] * 14 + [0] * 7
    assert frames.letterbox(bright.swapaxes(1, 2), 28)[0, 0, 5].round().tolist() == [0] * 7 + [200] * 14 + [0] * 7
    assert frames.letterbox(np.full((1, 1, 400, 3), 9, np.uint8), 28).shape == (1, 3, 28, 28)
    ramp = np.tile(np.arange(80, dtype=np.uint8)[None, None, :, None], (1, 40, 1, 3))
    assert frames.square(ramp, 40)[0, 0, 0].tolist() == list(range(20, 60))


@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "videoscore", "hpsv3", "videoreward"])
def test_half_precision_is_near_and_alike_each_time(name, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    makers = {"hpsv2": small_models.open_clip, "imagereward": small_models.imagereward}
    if name in makers:
        makers[name](folder, WORDS)
    else:
        {"videoscore": small_models.idefics2, "hpsv3": small_models.hpsv3, "videoreward": small_models.videoreward}[
            name
        ](folder)
    videos, words = [small_models.clip(seed, frames=2) for seed in (0, 1)], ["a red cat", "a ball"]
    spec = f"{name}={folder}" + ("" if name == "videoreward" else ",count=1")
    exact = teachers.load(f"{spec},device=cpu").score(videos, words, fps=8)
    half = teachers.load(spec, device="cpu", dtype="bfloat16")
    rows = half.score(videos, words, fps=8)
    assert half(videos=videos[1:], prompts=words[1:], fps=8) == rows[1:]  # whatever is beside it
    for row, other in zip(rows, exact):
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=0.3, atol=0.3)
    assert rows != exact


def test_a_spec_names_its_teacher():
    for spec in ("hpsv3", "hpsv3,count=4", "hpsv3=a/b,count=4"):
        assert teachers.named(spec) == "hpsv3"
    assert [teachers.named(spec) for spec in ("hpsv4", "a.py:f", "")] == [None] * 3


@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "videoscore"])
def test_a_folder_without_its_weights_is_refused(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(PrismError, match=r"has n.*convert it once as docs/teachers\.md"):
        teachers.load(f"{name}={tmp_path}")


def test_weights_of_another_model_are_refused(tmp_path):
    small_models.imagereward(tmp_path, WORDS)
    (tmp_path / "med_config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(PrismError, match=r"holds no ImageReward's med_config\.json"):
        teachers.load(f"imagereward={tmp_path}")
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(PrismError, match=r"med_config\.json does not exist"):
        teachers.load(f"imagereward={tmp_path}")


def test_prompts_are_cleaned_as_by_open_clip():
    assert hpsv2.cleaned("  A   &amp;lt; caf\u00c3\u00a9\n<|endoftext|> ") == "a < café < |endoftext|>"

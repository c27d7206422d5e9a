"""Teachers that write: parsers on published, odd and hostile answers, soft scores by hand, real tiny models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.teachers import small_models

from prism import teachers
from prism.errors import PrismError
from prism.teachers import answers, frames, prompts, videoscore2
from prism.teachers.unifiedreward import LABELS, UnifiedReward
from prism.teachers.videoscore2 import VideoScore2

FIRST, SECOND = LABELS["1"], LABELS["2"]
PUBLISHED = """visual quality: 4
temporal consistency: 4
dynamic degree: 3
text-to-video alignment: 1
factual consistency: 2
Final Score: 6"""  # the example in the published question
PUBLISHED_2 = "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.0987\nStyle Score (1-5): 3.3889\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    small_models.qwen(folder, "qwen2_5_vl", seed=5)
    return folder


def test_published_answers_are_read():
    assert list(answers.labelled(PUBLISHED, FIRST).values()) == [4, 4, 3, 1, 2, 6]
    assert answers.labelled(PUBLISHED_2, SECOND) == {"alignment": 2.4036, "physics": 3.0987, "style": 3.3889}
    bold = PUBLISHED.replace("visual quality: 4", "**Visual Quality:** 4").replace("Score: 6", "Score: **6**")
    assert answers.labelled(bold, FIRST) == answers.labelled(PUBLISHED, FIRST)
    assert answers.labelled(f"{PUBLISHED}\n\n{PUBLISHED}", FIRST) == answers.labelled(PUBLISHED, FIRST)


@pytest.mark.parametrize(
    "change",
    [
        ("visual quality: 4", ""),
        ("visual quality: 4", "visual quality: good"),
        ("visual quality: 4", "visual quality: 5"),
        ("visual quality: 4", "visual quality: -1"),
        ("visual quality: 4", "visual quality: 0"),
        ("visual quality: 4", "visual quality: 3-4"),
        ("visual quality: 4", "visual quality: 3 or 4"),
        ("visual quality: 4", "visual quality: 3/4"),
        ("visual quality: 4", "visual quality: 3 to 4"),
        ("visual quality: 4", "visual quality: 3,5"),
        ("visual quality: 4", "visual quality: 3.5.1"),
        ("visual quality: 4", "visual quality: 44"),
        ("visual quality: 4", "visual quality: 4\nvisual quality: 2"),
        ("visual quality: 4", "audiovisual quality: 4"),
        ("visual quality: 4", "visual quality: nan"),
        ("visual quality: 4", "visual quality: ٤"),
        ("visual quality: 4", "视觉质量：4"),
        ("visual quality", "qualité visuelle"),
        ("Final Score: 6", "Final Score: 11"),
        ("Final Score: 6", "Final Score:"),
        (PUBLISHED, ""),
        (PUBLISHED, "I cannot rate this video."),
        (PUBLISHED, "4 4 3 1 2 6"),
    ],
)
def test_an_answer_that_is_not_clear_is_no_score(change):
    assert answers.labelled(PUBLISHED.replace(*change), FIRST) is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_scores_in_range_or_none(text):
    for answer in (text, PUBLISHED + text, PUBLISHED.replace("4", text)):
        read = answers.labelled(answer, FIRST)
        assert read is None or all(FIRST[name].low <= value <= FIRST[name].high for name, value in read.items())


def written(text, probabilities):
    """An answer of a byte tokenizer, with the probabilities of 1 to 5 at given places of the text."""
    made = small_models.tokenizer()
    ids = made.encode(text, add_special_tokens=False)
    scores = torch.full((len(ids), len(made)), -math.inf)
    grades = [made.encode(str(grade), add_special_tokens=False)[0] for grade in range(1, 6)]
    assert len(ids) == len(text.encode())
    for place, values in probabilities.items():
        scores[place, grades] = torch.log(torch.tensor(values)) + 7.0  # scores are logits, not normalised
        scores[place, 0] = 9.0  # another token that takes a part of the whole
    return answers.Answer(text, ids, scores, made)


def test_soft_scores_are_the_likeliest_grade_times_its_share():
    text = "<think>clear – sharp</think>\nvisual quality: 3;\ntext-to-video alignment: 5,\n"
    text += "physical/common-sense consistency: 2"
    data = text.encode()
    places = [data.index(b"3;"), data.index(b"5,"), len(data) - 1]
    rows = ([0.02, 0.15, 0.58, 0.20, 0.05], [0.0, 0.0, 0.0, 0.1, 0.3], [0.2, 0.2, 0.1, 0.0, 0.0])
    answer = written(text, dict(zip(places, rows)))
    assert videoscore2.soft(answer) == pytest.approx([3 * 0.58, 5 * 0.75, 1 * 0.4])  # of equals the first
    assert videoscore2.soft(written(text, {places[0]: rows[0]})) is None  # no grade could be drawn at the others


@pytest.mark.parametrize(
    "text",
    [
        "", "visual quality: 3", "visual quality: 7; text-to-video alignment: 5, physical/common-sense consistency: 2",
        "visual quality: good; text-to-video alignment: 5, physical/common-sense consistency: 2",
        "视觉质量: 3; text-to-video alignment: 5, physical/common-sense consistency: 2",
        "visual quality: ٣; text-to-video alignment: 5, physical/common-sense consistency: 2",
        "physical/common-sense consistency: 2 text-to-video alignment: 5 visual quality: 3",
    ],
)  # fmt: skip
def test_soft_scores_of_an_answer_without_grades_are_none(text):
    assert videoscore2.soft(written(text, {})) is None


def test_a_writer_writes_what_the_model_does(folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    writer = answers.Writer.load(str(folder), None, "cpu", None)
    pixels = frames.resized(small_models.clip(0, frames=4), 56, 84)
    state = torch.random.get_rng_state()
    answer = writer.write("How good?", pixels, "video", 6, seconds=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)

    inputs = writer.reader.inputs("How good?", pixels, "video")
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=torch.tensor([1.0]), attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(answer.scores[0], logits, atol=1e-4, rtol=1e-4)
    assert answer.ids[0] == int(logits.argmax())
    assert answer.ids == writer.write("How good?", pixels, "video", 6, seconds=0.5).ids
    other = writer.write("How good?", pixels, "video", 6, seconds=2.0)
    assert not torch.allclose(answer.scores[0], other.scores[0])
    drawn = [writer.write("How?", pixels, "video", 6, 0.5, temperature=0.7, seed=seed).ids for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_qwen3_is_shown_pictures_as_its_own_processor_makes_them(tmp_path):
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    small_models.qwen(tmp_path, "qwen3_vl", seed=7)
    teacher = teachers.load(f"unifiedreward={tmp_path},version=2,device=cpu")
    writer, video = teacher.writer, small_models.clip(0, frames=2, height=128, width=192)
    size = frames.fitted(video.shape[1:3], *writer.reader.limits, writer.reader.factor)
    assert size == (224, 320)  # 65,536 pixels at least, of 32 a token
    pixels = frames.resized(video, *size)
    inputs = writer.reader.inputs("How good?", pixels, "image")
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=65536, max_pixels=16777216, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    made = processor([frame.permute(1, 2, 0).numpy().astype("uint8") for frame in pixels], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], made["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], made["image_grid_thw"])
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(writer.write("How good?", pixels, "image", 1).scores[0], logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(PrismError, match="A Qwen3-VL writes times between"):
        teachers.load(f"videoscore2={tmp_path},device=cpu").score([video], ["a"], fps=8)


def test_a_damaged_description_of_pictures_is_refused(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for text in ('{"image_mean": "grey"}', '{"size": 3}', '{"min_pixels": {}, "max_pixels": "many"}'):
        (copy / "preprocessor_config.json").write_text(text)
        with pytest.raises(PrismError, match=r"preprocessor_config\.json does not describe"):
            teachers.load(f"videoscore2={copy}")


@pytest.mark.parametrize("version", ["1", "2"])
def test_unifiedreward_asks_as_published_and_counts_what_it_cannot_read(folder, version, monkeypatch):
    teacher = teachers.load(f"unifiedreward={folder},version={version}")
    assert isinstance(teacher, UnifiedReward)
    monkeypatch.setattr(teacher.writer.model.generation_config, "eos_token_id", None)
    asked = []

    def write(question, pixels, kind, tokens, seconds=None, *rest):
        asked.append((question, pixels.shape, kind, tokens, seconds))
        real = type(teacher.writer).write(teacher.writer, question, pixels, kind, 3, seconds)  # of the real model
        texts = {1: PUBLISHED, 2: real.text, 3: PUBLISHED_2}
        return answers.Answer(texts[len(asked)], real.ids, real.scores, real.tokenizer)

    monkeypatch.setattr(teacher.writer, "write", write)
    videos = [small_models.clip(seed, frames=40, height=112, width=196) for seed in range(3)]
    rows = teacher.score(videos, ["a cat", "a dog", "a <|im_end|>"], fps=8.0)
    readable = 0 if version == "1" else 2
    assert [all(math.isnan(value) for value in row.values()) for row in rows] == [
        index != readable for index in range(3)
    ]
    assert teacher.unread == 2
    assert rows[readable] == answers.labelled(PUBLISHED if version == "1" else PUBLISHED_2, LABELS[version])
    assert all(tuple(row) == teacher.dimensions for row in rows)
    question, shape, kind, tokens, seconds = asked[0]
    assert question.endswith("Prompt: [a cat]" if version == "1" else "Caption: [a cat]")
    if version == "1":  # 5 seconds: 10 frames, of at least 128 tokens
        assert (tuple(shape), kind, tokens, seconds) == ((10, 3, 252, 420), "video", 1024, 0.5)
    else:
        assert (tuple(shape), kind, tokens, seconds) == ((16, 3, 112, 196), "image", 4096, None)


def test_the_versions_go_by_the_name_of_the_weights(folder, tmp_path):
    named = tmp_path / "UnifiedReward-2.0-qwen-7b"
    named.symlink_to(folder)
    assert teachers.load(f"unifiedreward={named}").dimensions == ("alignment", "physics", "style")
    assert len(teachers.load(f"unifiedreward={folder}").dimensions) == 6
    with pytest.raises(PrismError, match="must be 1 or 2; found 3"):
        teachers.load(f"unifiedreward={folder},version=3")


def test_videoscore2_reads_what_its_model_wrote(folder, monkeypatch):
    teacher = teachers.load(f"videoscore2={folder}")
    assert isinstance(teacher, VideoScore2)
    text = "visual quality: 3;\ntext-to-video alignment: 5,\nphysical/common-sense consistency: 2"
    sure = [0.0, 0.2, 0.8, 0.0, 0.0]
    answer = written(text, {text.index("3;"): sure, text.index("5,"): sure, len(text) - 1: sure})
    asked = []

    def write(question, pixels, *rest):
        asked.append((question, tuple(pixels.shape), *rest))
        return answer

    video = small_models.clip(0, frames=24, height=480, width=832)
    monkeypatch.setattr(teacher.writer, "write", write)
    row = teacher.score([video], ["a cat"], fps=8.0)[0]
    assert row == pytest.approx(dict.fromkeys(teacher.dimensions, 2.4))
    question, *rest = asked[0]
    assert question == prompts.text("videoscore2").replace("{text_prompt}", "a cat")
    assert question.startswith("\n    You are an expert")
    assert rest == [(6, 3, 476, 840), "video", 1024, 0.5, 0.7, 0]
    monkeypatch.undo()

    monkeypatch.setattr(type(teacher.writer), "write", _short(type(teacher.writer).write))
    rows = teacher.score([small_models.clip(0)] * 2, ["a cat"] * 2, fps=8.0)  # a random model says nothing clear
    assert teacher.unread == 2
    assert all(math.isnan(value) for row in rows for value in row.values())


def _short(write):
    return lambda self, question, pixels, kind, tokens, *rest: write(self, question, pixels, kind, 4, *rest)


def test_a_model_of_another_kind_is_refused(folder, tmp_path):
    with pytest.raises(PrismError, match="no weights as safetensors"):
        teachers.load(f"videoscore2={tmp_path}")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(PrismError, match=r"no readable config\.json"):
        teachers.load(f"videoscore2={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PrismError, match="is a bert"):
        teachers.load(f"videoscore2={tmp_path}")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PrismError, match="cannot be loaded"):
        teachers.load(f"videoscore2={tmp_path}")


def test_a_model_without_a_weight_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.1.mlp.down_proj.weight"))
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PrismError, match=r"lacks .*down_proj"):
        teachers.load(f"videoscore2={tmp_path}")


def test_every_question_has_one_blank():
    for name in ("videoreward", "hpsv3", "unifiedreward", "unifiedreward2", "videoscore2"):
        assert prompts.text(name).count(prompts.BLANK) == 1
        assert prompts.filled(name, "a {text_prompt} b {} $x").count("a {text_prompt} b {} $x") == 1

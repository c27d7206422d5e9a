"""Values of other libraries are taken for what they are, and runs without a text encoder go by embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.sampling.conftest import Setting
from tests.works import works
from tests.zoo import VARIANTS

import prism
from prism.backbone import Backbone
from prism.errors import PrismError
from prism.judge import Judge

PLAIN: dict[str, Any] = {"schedule": [(3, 2), (5, 1)], "batch_size": 1}


def search(setting: Setting, prompt: Any = tiny.PROMPT, **arguments: Any) -> Any:
    options = {"n": 3, "seed": 4, **PLAIN, **setting.call, "output_type": "latent", **arguments}
    return prism.best_of_n(setting.pipe, setting.judge(2), prompt, **options)


@pytest.fixture(scope="module")
def usual(wan: Setting) -> Any:
    """What the plain arguments give."""
    return search(wan)


@works(
    "Inputs and outputs", "Whole numbers of NumPy and torch: seeds, n, steps, cuts", "exact", "They are whole numbers"
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"n": None, "seeds": np.arange(4, 7)},
        {"n": np.int64(3), "seeds": torch.tensor([4, 5, 6])},
        {"n": None, "seeds": (4, 5, 6)},
        {"n": None, "seeds": range(4, 7)},
        {"n": np.int32(3), "seed": np.uint8(4), "batch_size": np.int64(1), "top_k": torch.tensor(1)},
        {"n": torch.tensor(3), "seed": torch.tensor(4), "schedule": np.array([[3, 2], [5, 1]])},
        {"schedule": [[np.int64(3), torch.tensor(2)], (np.int16(5), 1)], "num_draws": np.int64(2)},
        {"num_inference_steps": np.int64(6), "height": np.int64(32), "num_videos_per_prompt": 1},
        {"keep_latents": np.bool_(True), "progress": np.bool_(False)},
    ],
)
def test_whole_numbers_of_other_libraries(wan: Setting, usual: Any, arguments: dict[str, Any]) -> None:
    expected, result = usual, search(wan, **arguments)
    assert (result.seed, result.seeds, result.scores) == (expected.seed, (4, 5, 6), expected.scores)
    assert all(type(seed) is int for seed in result.seeds)
    assert torch.equal(result.latents, expected.latents)


@works("Inputs and outputs", "Prompts in an array, tuple or any other sequence", "exact", "One result each")
def test_prompts_in_other_sequences(wan: Setting) -> None:
    prompts = [tiny.PROMPT, tiny.OTHER_PROMPT]
    few: dict[str, Any] = {"n": 2, "schedule": [(2, 1)], "num_inference_steps": 3}
    expected = search(wan, prompts, **few)
    series = type("Series", (), {"__iter__": lambda self: iter(prompts), "__len__": lambda self: 2})()
    for given in (np.array(prompts), tuple(prompts), np.array(prompts, dtype=object), series, iter(prompts)):
        assert [result.scores for result in search(wan, given, **few)] == [result.scores for result in expected]
    alone = search(wan, np.str_(tiny.PROMPT), **few)
    assert alone.scores == expected[0].scores
    judge, latents = wan.judge(2), expected[0].latents
    call = {**wan.call, "output_type": "latent"}
    plain = judge.score(latents, [tiny.PROMPT], 500.0, **call)
    for given in (np.array([tiny.PROMPT]), np.str_(tiny.PROMPT), (tiny.PROMPT,)):
        assert torch.equal(judge.score(latents, given, 500.0, **call), plain)
    for wrong in ({"a": 1}, b"a cat", 3, [3]):
        with pytest.raises(PrismError, match="must be a text or a list of texts"):
            judge.score(latents, wrong, 500.0, **call)


def test_a_seed_of_none_is_drawn_and_told(wan: Setting) -> None:
    one, other = (search(wan, seed=None) for _ in range(2))
    assert one.seeds != other.seeds
    first = one.seeds[0]
    assert one.seeds == (first, first + 1, first + 2)
    assert torch.equal(one.latents, search(wan, seed=first).latents)


@works("Inputs and outputs", "A search inside `torch.inference_mode()`", "exact", "The plain call's video")
def test_inside_inference_mode(wan: Setting, usual: Any) -> None:
    expected = usual
    with torch.inference_mode():
        result = search(wan)
        assert torch.is_inference_mode_enabled()
    assert not result.latents.is_inference()
    assert torch.equal(result.latents, expected.latents)

    def look(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            return {"latents": tensors["latents"] * 1}

    assert torch.equal(search(wan, callback_on_step_end=look).latents, expected.latents)


def test_a_pipe_may_be_a_backbone_and_a_swap_is_told(wan: Setting, usual: Any) -> None:
    judge = wan.judge(2)
    options: dict[str, Any] = {"n": 3, "seed": 4, **PLAIN, **wan.call, "output_type": "latent"}
    assert prism.best_of_n(judge.backbone, judge, tiny.PROMPT, **options).scores == usual.scores
    with pytest.raises(PrismError, match=r"pipe is a judge; the arguments are best_of_n\(pipe, judge, prompt\)"):
        prism.best_of_n(judge, wan.pipe, tiny.PROMPT, **options)
    with pytest.raises(PrismError, match="load it first"):
        prism.best_of_n("Wan-AI/Wan2.1", judge, tiny.PROMPT, **options)


# -- oracles


ORACLE: dict[str, Any] = {"strategy": "oracle", "schedule": None, "num_inference_steps": 2}


def means(video: np.ndarray) -> dict[str, float]:
    return {"VQ": float(video[:, :16].mean()), "MQ": -float(video[:, :, :16].mean())}


@works(
    "Inputs and outputs", "An oracle that answers by dimension", "works", "`select_by` names or weighs its dimensions"
)
def test_an_oracle_may_answer_by_dimension(wan: Setting) -> None:
    run = ORACLE
    for select_by in ("MQ", {"VQ": 1.0, "MQ": 3.0}):
        result = search(wan, oracle=lambda video, _: means(video), select_by=select_by, **run)
        columns = result.scores[0]["scores"]
        weights = {select_by: 1.0} if isinstance(select_by, str) else select_by
        totals = [sum(weight * columns[name][row] for name, weight in weights.items()) for row in range(3)]
        assert result.index == totals.index(max(totals))
        assert set(columns) == {"VQ", "MQ"}
    with pytest.warns(UserWarning, match="The oracle has no dimension overall; candidates are ranked by the mean"):
        search(wan, oracle=lambda video, _: means(video), **run)
    with pytest.raises(PrismError, match="The oracle has no dimension 'TA' to select by; it has VQ, MQ"):
        search(wan, oracle=lambda video, _: means(video), select_by="TA", **run)


@works("Inputs and outputs", "An oracle that takes a batch of videos", "works", "With `oracle.batched = True`")
def test_an_oracle_may_take_a_batch(wan: Setting) -> None:
    run: dict[str, Any] = {**ORACLE, "batch_size": 3}
    expected = search(wan, oracle=lambda video, _: means(video), select_by="VQ", **run)
    sizes = []

    def ask(videos: np.ndarray, prompts: list[str]) -> Any:
        assert videos.dtype == np.float32
        assert prompts == [tiny.PROMPT] * len(videos)
        sizes.append(len(videos))
        rows = [means(video) for video in videos]
        answers = {
            "dicts": rows,
            "columns": {name: [row[name] for row in rows] for name in rows[0]},
            "tensors": {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]},
            "numbers": np.array([row["VQ"] for row in rows]),
        }
        return answers[form]

    ask.batched = True  # type: ignore[attr-defined]
    for form in ("dicts", "columns", "tensors", "numbers"):
        result = search(wan, oracle=ask, select_by="VQ", **run)
        assert result.seed == expected.seed
        assert result.scores == expected.scores or form == "numbers"
    assert sizes == [3] * 4


ANSWERS: dict[str, Any] = {
    "a list": [1.0, 2.0],
    "nothing": None,
    "text": "good",
    "a number as text": "1",
    "several": torch.ones(2),
    "an empty dict": {},
    "a dict of lists": {"VQ": [1.0]},
    "a dict of text": {"VQ": "good"},
    "complex": 1j,
    "an object": object(),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_an_oracle_may_not_answer(wan: Setting, name: str) -> None:
    with pytest.raises(PrismError, match="The oracle must answer with a number, or a dict of numbers") as caught:
        search(wan, **ORACLE, oracle=lambda video, prompt: ANSWERS[name])
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("answer", [[1.0], 3.0, None, "abc", {"VQ": 1.0}])
def test_what_a_batched_oracle_may_not_answer(wan: Setting, answer: Any) -> None:
    def ask(videos: Any, prompts: Any) -> Any:
        return answer

    ask.batched = True  # type: ignore[attr-defined]
    with pytest.raises(PrismError, match=r"batched oracle must answer with 3 numbers|must answer with a number"):
        search(wan, **ORACLE, oracle=ask, batch_size=3)


@pytest.mark.parametrize("answer", [True, np.float32(0.5), np.bool_(True), torch.tensor([0.5]), 3, np.array(1.0)])
def test_what_an_oracle_may_answer_too(wan: Setting, answer: Any) -> None:
    with pytest.warns(UserWarning, match="All 3 candidates have the same score"):
        result = search(wan, **ORACLE, oracle=lambda video, prompt: answer)
    assert result.scores[0]["scores"]["oracle"] == [float(answer)] * 3


# -- embeddings in place of a prompt


def encoded(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The embeddings of a prompt, by the names that the pipeline's call takes them under."""
    kind = type(pipe).__name__
    guided = {"do_classifier_free_guidance": True}
    length = {"max_sequence_length": call["max_sequence_length"]} if "max_sequence_length" in call else {}
    pairs: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    if kind in ("LTXPipeline", "MochiPipeline", "AllegroPipeline"):
        pairs = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        values = pipe.encode_prompt(tiny.PROMPT, **guided, **length)
    elif kind == "HunyuanVideoPipeline":
        pairs = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        values = pipe.encode_prompt(tiny.PROMPT, **length)
    elif kind == "StableDiffusion3Pipeline":
        pairs = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        values = pipe.encode_prompt(tiny.PROMPT, None, None, **guided, **length)
    elif kind == "FluxPipeline":
        pairs = ("prompt_embeds", "pooled_prompt_embeds")
        values = pipe.encode_prompt(tiny.PROMPT, None, **length)
    elif kind == "QwenImagePipeline":
        pairs = ("prompt_embeds", "prompt_embeds_mask")
        values = pipe.encode_prompt(tiny.PROMPT, **length)
    elif kind == "SanaVideoPipeline":  # its plain call wants its default negative prompt out of the way, too
        pairs = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        values = pipe.encode_prompt(tiny.PROMPT, True, **length)
        return {**dict(zip(pairs, values)), "negative_prompt": None}
    elif kind in ("Kandinsky5T2VPipeline", "HunyuanVideo15Pipeline"):
        pairs = ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens")
        if kind == "HunyuanVideo15Pipeline":
            pairs = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            length = {"device": pipe.device, "dtype": torch.float32}
        both = [pipe.encode_prompt(text, **length) for text in (tiny.PROMPT, "")]
        return dict(zip(pairs, both[0])) | {f"negative_{name}": value for name, value in zip(pairs, both[1])}
    else:
        values = pipe.encode_prompt(tiny.PROMPT, None, True, **length)
    return {name: value for name, value in zip(pairs, values) if value is not None}


def of_two(name: str, value: Any) -> Any:
    """The same for two prompts."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.cat([value, value[1:] * 2]) if name.endswith("cu_seqlens") else torch.cat([value] * 2)


FAMILIES = {
    "wan21_t2v_unipc": (),
    "cogvideox_dpm": (),
    "hunyuan": ("text_encoder_2",),
    "ltx": (),
    "mochi": (),
    "sd3": ("text_encoder_2", "text_encoder_3"),
    "flux": ("text_encoder_2",),
    "qwen_image": (),
    "kandinsky5_t2v": ("text_encoder_2",),
    "hunyuan15": ("text_encoder_2",),
    "sana_video": (),
}


@works("Embeddings and encoders", "`prompt_embeds` with no text encoder in memory", "exact", "The stock call's video")
@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_embeddings_in_place_of_a_prompt(variant: str) -> None:
    """The winner is the stock call's with the same embeddings, and scores are those of the prompt."""
    pipe, call = VARIANTS[variant]()
    steps = 3 if variant == "mochi" else 2  # it makes none of one step
    call = {**call, "output_type": "latent", "num_inference_steps": steps}
    embeds = encoded(pipe, call)
    call.pop("prompt_template", None)
    plain_call = {name: value for name, value in call.items() if name != "negative_prompt"}
    judge = Judge.untrained(pipe, tap=1, dim=16)
    latents = torch.randn((2, *judge.backbone.condition([tiny.PROMPT], **call)[0].shape))
    texts = (
        {} if variant in ("hunyuan", "hunyuan15") else {"expected": judge.score(latents, tiny.PROMPT, 500.0, **call)}
    )
    for name in ("text_encoder", *FAMILIES[variant]):
        setattr(pipe, name, None)
    judge = Judge.untrained(pipe, tap=1, dim=16)
    if texts:
        scores = judge.score(latents, None, 500.0, **plain_call, **embeds)
        torch.testing.assert_close(scores, texts["expected"], rtol=1e-4, atol=1e-5)
    two = {name: of_two(name, value) for name, value in embeds.items()}
    torch.testing.assert_close(
        judge.score(latents, None, 500.0, **plain_call, **two),
        judge.score(latents, None, 500.0, **plain_call, **embeds),
        rtol=1e-4,
        atol=1e-5,
    )
    for run in ({"schedule": [(2, 1)]}, {"strategy": "draft", "draft_steps": steps - 1}, {"strategy": "full"}):
        options = {"n": 2, "seed": 3, "num_draws": 1, **run, **plain_call, **embeds}
        result = prism.best_of_n(pipe, judge, None, batch_size=1, **options)
        generator = torch.Generator("cpu").manual_seed(result.seed)
        stock = pipe(generator=generator, **plain_call, **embeds)[0]
        assert torch.equal(result.video, stock[0])
        together = prism.best_of_n(pipe, judge, None, batch_size=2, **options)
        scores = [torch.tensor(list(each.scores[0]["scores"].values())) for each in (result, together)]
        torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)
    several = prism.best_of_n(pipe, judge, None, **{**options, **two}, batch_size=1)
    assert [each.scores for each in several] == [result.scores] * 2
    with pytest.raises(PrismError, match="has no text_encoder; give prompt_embeds"):
        prism.best_of_n(pipe, judge, tiny.PROMPT, n=2, **plain_call)


def test_mistakes_with_embeddings_get_one_sentence(wan: Setting) -> None:
    embeds, negative = (value[:, :12] for value in wan.pipe.encode_prompt(tiny.PROMPT, None, True))
    for arguments, sentence in {
        "both": ({"prompt": tiny.PROMPT, "prompt_embeds": embeds}, "as text and as prompt_embeds; give one"),
        "rows": (
            {"prompt_embeds": torch.cat([embeds] * 2), "negative_prompt_embeds": torch.cat([negative] * 3)},
            "different numbers of prompts",
        ),
        "none": ({"prompt_embeds": embeds[:0]}, r"found the shape \(0, 12, 32\)"),
        "array": ({"prompt_embeds": embeds.detach().numpy()}, "must be a tensor"),
        "lists": ({"prompt_embeds": [1.0, 2.0]}, "must be a tensor"),
        "ints": ({"prompt_embeds": embeds.long()}, "must be a dense tensor of finite floating-point .*int64"),
        "NaN": ({"prompt_embeds": embeds * math.nan}, "found NaN or infinity"),
        "no tokens": ({"prompt_embeds": embeds[:, :0]}, r"found the shape \(1, 0, 32\)"),
        "meta": ({"prompt_embeds": embeds.to("meta")}, "found no numbers, on the device meta"),
        "sparse": ({"prompt_embeds": embeds.to_sparse()}, "found the layout"),
        "one of another width": (
            {"prompt_embeds": embeds[..., :31], "negative_prompt_embeds": negative},
            r"must be of one width; found the shapes \(1, 12, 32\) and \(1, 12, 31\)",
        ),
        "both of another width": (
            {"prompt_embeds": embeds[..., :31], "negative_prompt_embeds": negative[..., :31]},
            "WanPipeline takes a text's embeddings of width 32, and prompt_embeds has 31; give prompt_embeds as",
        ),
        "flat": (
            {"prompt_embeds": embeds[:, 0], "negative_prompt_embeds": negative[:, 0]},
            r"must be \(B, tokens, width\)|broke at step 1: IndexError",
        ),
    }.values():
        with pytest.raises(PrismError, match=sentence):
            search(wan, **{"prompt": None, **arguments})
    pipe = tiny.wan("unipc")
    pipe.text_encoder = None
    judge = Judge.untrained(pipe, dim=16)
    with pytest.raises(PrismError, match="to encode a negative prompt; give negative_prompt_embeds too"):
        prism.best_of_n(pipe, judge, None, prompt_embeds=embeds, **wan.call)
    assert prism.best_of_n(
        pipe, judge, None, n=2, prompt_embeds=embeds, **{**wan.call, "guidance_scale": 1.0}
    ).video.shape == (9, 32, 32, 3)


# -- pictures


@works("Inputs and outputs", "Conditioning images in RGBA, L or P mode, as bytes, or as a path", "works", "Made RGB")
def test_pictures_of_any_kind_are_rgb(tmp_path: Any) -> None:
    pipe, call = VARIANTS["svd"]()
    image = call.pop("image")
    grey = image.convert("L")
    image.save(tmp_path / "a.png")
    judge = Judge.untrained(pipe, dim=16)
    call = {**call, "output_type": "latent", "num_inference_steps": 3, "n": 2, "schedule": [(2, 1)], "batch_size": 1}
    expected = prism.best_of_n(pipe, judge, None, image=image, **call)
    for given in (image.convert("RGBA"), np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        result = prism.best_of_n(pipe, judge, None, image=given, **call)
        assert torch.equal(result.latents, expected.latents)
        assert result.scores == expected.scores
    expected = prism.best_of_n(pipe, judge, None, image=grey.convert("RGB"), **call)
    for given in (grey, np.asarray(grey), grey.convert("P")):
        assert torch.equal(prism.best_of_n(pipe, judge, None, image=given, **call).latents, expected.latents)
    (tmp_path / "b.png").write_bytes(b"no picture")
    for wrong, sentence in {
        "no.png": "No such file",
        str(tmp_path / "b.png"): "cannot be read",
        "https://example.org/a.png": "nothing is downloaded; give a local file",
        "x" * 300: "cannot be read",
        str(tmp_path): "cannot be read",
    }.items():
        with pytest.raises(PrismError, match=sentence) as caught:
            prism.best_of_n(pipe, judge, None, image=wrong, **call)
        assert len(str(caught.value)) <= 500


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"output_type": None}, "output_type must be a text"),
        pytest.param(
            {"output_type": "zz"},
            "WanPipeline makes no output_type 'zz': ValueError: zz does not exist",
            marks=pytest.mark.filterwarnings("ignore:the output_type zz is outdated:FutureWarning"),
        ),
        ({"seeds": {4, 5, 6}, "n": None}, "seeds must be a list of whole numbers"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function"),
        ({"attention_kwargs": 5}, "attention_kwargs must be a dictionary"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_work(wan: Setting, arguments: Any, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        search(wan, **arguments)


def test_a_seed_given_twice_is_warned_of(wan: Setting) -> None:
    with pytest.warns(UserWarning, match="The seed 4 is given more than once"):
        assert search(wan, n=None, seeds=[4, 5, 4]).seeds == (4, 5, 4)


def test_numbers_of_a_call_are_checked_by_the_backbone_too(wan: Setting) -> None:
    backbone = Backbone(wan.pipe)
    for changes in ({"height": 0}, {"num_frames": -1}, {"guidance_scale": math.nan}, {"num_inference_steps": 1e9}):
        with pytest.raises(PrismError, match=f"{next(iter(changes))} must be a"):
            backbone.condition([tiny.PROMPT], **{**wan.call, **changes})

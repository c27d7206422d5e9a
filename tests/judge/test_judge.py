"""The judge on real tiny pipelines: what it scores, what it saves, and what it refuses to load."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from prism.errors import PrismError
from prism.judge import Judge

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT]
WAN_SHAPE, COGVIDEOX_SHAPE = (16, 3, 4, 4), (3, 4, 4, 4)


@pytest.fixture(scope="module")
def wan():
    return tiny.wan()


@pytest.fixture(scope="module")
def judge(wan):
    return Judge.untrained(wan, tap=2)


@pytest.fixture
def saved(judge, tmp_path):
    judge.save_pretrained(tmp_path / "head", {"seed": 0, "prompt_keys": ["0123456789abcdef"]})
    return tmp_path / "head"


def latents(shape=WAN_SHAPE, batch=2):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(3))


def test_scores_are_the_head_on_the_blocks_output(wan, judge):
    """Oracle: the whole stock denoiser with a hook of our own, and the head by hand."""
    seen = {}
    hooks = [
        wan.transformer.blocks[1].register_forward_hook(lambda m, a, out: seen.update(visual=out)),
        wan.transformer.condition_embedder.text_embedder.register_forward_hook(lambda m, a, out: seen.update(text=out)),
    ]
    embeds, _ = wan.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=12)
    noisy = latents()
    with torch.no_grad():
        wan.transformer(hidden_states=noisy, timestep=torch.tensor([500.0, 500.0]), encoder_hidden_states=embeds)
    for hook in hooks:
        hook.remove()
    mask = embeds.ne(0).any(-1)
    assert 0 < mask.sum() < mask.numel()
    expected = judge.head(seen["visual"], seen["text"], mask)
    scores = judge.score(noisy, PROMPTS, 500, **tiny.CALL_WAN)
    assert scores.shape == (2, 4)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected.detach())


@pytest.mark.parametrize(
    ("make", "call", "shape"),
    [(tiny.wan, tiny.CALL_WAN, WAN_SHAPE), (tiny.cogvideox, tiny.CALL_COGVIDEOX, COGVIDEOX_SHAPE)],
)
def test_score_clean_is_the_mean_over_shared_noise(make, call, shape):
    judge = Judge.untrained(make())
    clean = latents(shape)
    mean, error = judge.score_clean(
        clean, PROMPTS, 700, num_draws=3, generator=torch.Generator().manual_seed(5), **call
    )
    generator = torch.Generator().manual_seed(5)
    draws = []
    for _ in range(3):
        noise = torch.randn(1, *shape, generator=generator)
        noisy = torch.cat([judge.backbone.add_noise(row[None], 700, noise) for row in clean])
        draws.append(judge.score(noisy, PROMPTS, 700, **call))
    torch.testing.assert_close(mean, torch.stack(draws).mean(0))
    torch.testing.assert_close(error, torch.stack(draws).std(0) / 3**0.5)
    same, _ = judge.score_clean(clean[[0, 0]], PROMPTS[0], 700, **call)
    torch.testing.assert_close(same[0], same[1])  # the same noise for every row
    assert judge.score_clean(clean, PROMPTS, 700, num_draws=1, **call)[1].isnan().all()


def test_scores_depend_on_prompt_and_level(judge):
    noisy = latents()[[0, 0]]
    scores = judge.score(noisy, PROMPTS, 500, **tiny.CALL_WAN)
    assert not torch.allclose(scores[0], scores[1])
    per_row = judge.score(noisy, PROMPTS[0], torch.tensor([500.0, 900.0]), **tiny.CALL_WAN)
    torch.testing.assert_close(per_row[0], scores[0])
    assert not torch.allclose(per_row[0], per_row[1])


def test_untrained_is_seeded_and_leaves_the_global_random_state(wan):
    state = torch.get_rng_state()
    one, same, other = (Judge.untrained(wan, seed=seed).head.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["query"], other["query"])


def test_the_backbone_is_no_part_of_the_saved_head(judge, saved):
    assert load_file(saved / "model.safetensors").keys() == judge.head.state_dict().keys()
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = (saved / "README.md").read_text()
    assert "WanTransformer3DModel" in card
    assert "from diffusers import WanPipeline\n\npipe = WanPipeline.from_pretrained(...)" in card


def test_saved_and_loaded_scores_alike(judge, saved):
    loaded = Judge.from_pretrained(saved, tiny.wan())  # the same weights, built anew
    assert (loaded.tap, loaded.dimensions, loaded.eta) == (2, ("VQ", "MQ", "TA", "overall"), 5.0)
    assert loaded.trained_on["seed"] == 0
    ours, theirs = (j.score(latents(), PROMPTS, 300, **tiny.CALL_WAN) for j in (judge, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("aggregation", ["mean", "linear"])
def test_ablations_save_and_load(wan, tmp_path, aggregation):
    judge = Judge.untrained(wan, dimensions=("overall",), aggregation=aggregation)
    judge.save_pretrained(tmp_path / "head")
    loaded = Judge.from_pretrained(tmp_path / "head", wan)
    assert torch.equal(*(j.score(latents(), PROMPTS, 300, **tiny.CALL_WAN) for j in (judge, loaded)))


def test_other_architectures_are_refused_by_name(saved):
    with pytest.raises(PrismError, match=r"WanTransformer3DModel.*CogVideoXTransformer3DModel"):
        Judge.from_pretrained(saved, tiny.cogvideox())
    with pytest.raises(PrismError, match=r"denoiser WanTransformer3DModel \(blocks 3\), .* \(blocks 4\)"):
        Judge.from_pretrained(saved, tiny.wan(num_layers=4))
    pipe = tiny.wan()
    pipe.vae.register_to_config(latents_mean=[0.5] * 16)
    with pytest.raises(PrismError, match=r"VAE AutoencoderKLWan \(latents mean \[.*\[0\.5, 0\.5"):
        Judge.from_pretrained(saved, pipe)


def test_other_weights_give_a_warning(saved):
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        Judge.from_pretrained(saved, tiny.wan(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Judge.from_pretrained(saved, tiny.wan(scheduler="unipc"))  # the scheduler is no part of the head's backbone


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def reseal(folder, **changes):
    """Edit config.json as someone who knows about the checksum would."""
    from prism import files

    config = json.loads((folder / "config.json").read_text()) | {
        "weights_sha256": files.sha256(folder / "model.safetensors")
    }
    files.write_json(folder / "config.json", config | changes)


def alter(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["query"] = tensors["query"] + 1e-3
    save_file(tensors, folder / "model.safetensors")


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["query"]
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


def not_a_number(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["query"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)


def without(folder, name):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "truncated": (lambda f: truncate(f / "model.safetensors"), "truncated or altered"),
    "altered": (alter, "was altered"),
    "pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Exploit())), "is a pickle"),
    "torch pickle": (lambda f: torch.save({"query": torch.ones(1)}, f / "model.safetensors"), "is a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config no JSON": (lambda f: truncate(f / "config.json"), "not valid JSON"),
    "another format": (lambda f: (f / "config.json").write_text("{}"), "does not describe a PRISM head"),
    "field missing": (lambda f: without(f, "tap"), "lacks the field 'tap'"),
    "wrong type": (lambda f: reseal(f, tap="two"), r"field 'tap' of .*must be a whole number.*found two"),
    "wrong tap": (lambda f: reseal(f, tap=9), "block from 1 to 3"),
    "wrong dim": (lambda f: reseal(f, dim=96), "where this head's is"),
    "missing tensor": (drop_tensor, "lacks the tensor query"),
    "NaN": (not_a_number, "NaN or infinity"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_heads_are_refused(wan, saved, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage, sentence = DAMAGES[name]
    damage(saved)
    with pytest.raises(PrismError, match=sentence):
        Judge.from_pretrained(saved, wan)
    assert not (tmp_path / "unpickled").exists()


def test_sources_that_do_not_exist(wan, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PrismError, match="nowhere does not exist"):
        Judge.from_pretrained(tmp_path / "nowhere", wan)
    with pytest.raises(PrismError, match="no head of this name came from the Hub"):
        Judge.from_pretrained("someone/prism-head-that-is-not", wan)
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="is a file"):
        Judge.from_pretrained(tmp_path / "file", wan)


def test_an_existing_folder_is_kept(judge, saved):
    before = (saved / "config.json").read_bytes()
    with pytest.raises(PrismError, match="exists already"):
        judge.save_pretrained(saved)
    assert (saved / "config.json").read_bytes() == before
    judge.save_pretrained(saved, overwrite=True)


def test_bad_arguments(wan, judge):
    with pytest.raises(PrismError, match="block from 1 to 3 of this backbone, found 4"):
        Judge.untrained(wan, tap=4)
    with pytest.raises(PrismError, match="3 prompts for 2 rows"):
        judge.score(latents(), [*PROMPTS, "a cat runs"], 500, **tiny.CALL_WAN)
    with pytest.raises(PrismError, match="num_draws"):
        judge.score_clean(latents(), PROMPTS, 500, num_draws=0, **tiny.CALL_WAN)
    broken = latents()
    broken[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(PrismError, match="Row 1 has no finite score; its latents hold NaN or infinity"):
        judge.score(broken, PROMPTS, 500, **tiny.CALL_WAN)
    with pytest.raises(PrismError, match=r"Row 0 has no finite score; its latents reach \d\.\d+e\+30, far above a"):
        judge.score(1e30 * latents(), PROMPTS, 500, **tiny.CALL_WAN)
    for shape, sentence in {
        (1, 8, 31): "takes a text's embeddings of width 32, and encoder_hidden_states has 31; give prompt_embeds as",
        (1, 32): r"must be \(B, tokens, width\); found the shape \(2, 32\), so give prompt_embeds with an axis",
    }.items():
        with pytest.raises(PrismError, match=sentence):
            judge.score(latents(), None, 500, prompt_embeds=torch.zeros(shape), **tiny.CALL_WAN)


def test_levels_and_latents_that_make_no_sense(wan, judge):
    cases = [
        (latents(), float("nan"), "t must be from 0"),
        (latents(), 1000.5, "t must be from 0"),
        (latents(), -1, "t must be from 0"),
        (latents(), "late", "t must be from 0"),
        (latents(), None, "t must be from 0"),
        (latents(), torch.tensor([1.0, 2.0, 3.0]), "one for each of the 2 rows"),
        (latents(), [[500.0, 500.0]], "one for each of the 2 rows"),
        (latents().int(), 500, "floating-point numbers"),
        (latents().tolist(), 500, "floating-point numbers"),
        (torch.tensor(1.0), 500, "floating-point numbers"),
        (latents((16, 3, 4)), 500, "The latents have the shape"),
        (latents((15, 3, 4, 4)), 500, "The latents have the shape"),
    ]
    for noisy, t, sentence in cases:
        with pytest.raises(PrismError, match=sentence):
            judge.score(noisy, PROMPTS, t, **tiny.CALL_WAN)
        if "shape" not in sentence:
            with pytest.raises(PrismError, match=sentence):
                judge.backbone.add_noise(noisy, t, latents())


SIZES = ["width", "dim", "num_dimensions", "num_queries", "num_heads", "mlp_layers"]


@pytest.mark.parametrize("value", [10**9, 10**30, 0, -1, 1.5, "16", None, True, [16], {}])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_compared_before_anything_is_allocated(wan, saved, name, value, monkeypatch):
    def xavier_normal_(weight):
        assert weight.is_meta
        return weight

    monkeypatch.setattr(torch.nn.init, "xavier_normal_", xavier_normal_)
    reseal(saved, **{name: value})
    with pytest.raises(PrismError, match=r"config\.json|model\.safetensors"):
        Judge.from_pretrained(saved, wan)


ODD_FIELDS = [
    *({"eta": value} for value in ("5", None, 1.0, 1e400, [5.0])),
    *(
        {"dimensions": value}
        for value in ([], ["VQ"] * 4, ["VQ", "MQ", "TA", 3], "VQMQ", None, ["VQ", "MQ", "TA", "a\nb"])
    ),
    *({"trained_on": value} for value in ("text", [1], 3, {"prompt_keys": "abc"}, {"prompt_keys": [1]})),
    *({"trained_on": value} for value in ({"config": []}, {"members": [1]}, {"config": {"t_low": "0"}}, {"seed": [0]})),
    *({"calibration": value} for value in ([], {"XX": {}}, {"VQ": 1}, {"VQ": {"temperature": 0, "eta": 5}})),
    *({"backbone": value} for value in ([], None, {}, {"denoiser": 1, "vae": "x"}, {"denoiser": "x"})),
    *({"aggregation": value} for value in ("sum", ["query"], None)),
    *({"schema": value} for value in (1.0, True, 3, None, [1])),
    *({"tap": value} for value in (0, -1, 10**9, [2], 2.0)),
    {"schema": 2},
    {"schema": 2, "members": []},
    {"schema": 2, "members": ["x"]},
    {"schema": 2, "members": {"0": {}}},
]


@pytest.mark.parametrize("changes", ODD_FIELDS, ids=str)
def test_a_field_that_makes_no_sense_is_named(wan, saved, changes, tmp_path):
    reseal_any(saved, **changes)
    for onto in (wan, str(tmp_path / "a pipeline that is not asked for")):
        with pytest.raises(PrismError, match=r"config\.json") as caught:
            Judge.from_pretrained(saved, onto)
        assert len(str(caught.value)) <= 500


def reseal_any(folder, **changes):
    """As `reseal`, NaN and infinity included."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.complex64, torch.bool])
def test_weights_of_another_kind_are_refused(wan, saved, dtype):
    tensors = load_file(saved / "model.safetensors")
    tensors["query"] = tensors["query"].to(dtype)
    save_file(tensors, saved / "model.safetensors")
    reseal(saved)
    with pytest.raises(PrismError, match=r"The tensor query in .* a head's are float16"):
        Judge.from_pretrained(saved, wan)


def test_weights_in_half_precision_load_as_float32(wan, judge, saved):
    tensors = {name: value.half() for name, value in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors")
    reseal(saved)
    state = torch.get_rng_state()
    loaded = Judge.from_pretrained(saved, wan)
    assert torch.equal(torch.get_rng_state(), state)
    assert {value.dtype for value in loaded.head.parameters()} == {torch.float32}
    assert all(value.requires_grad for value in loaded.head.parameters())
    scores = [each.score(latents(), PROMPTS, 300, **tiny.CALL_WAN) for each in (judge, loaded)]
    torch.testing.assert_close(*scores, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_what_is_no_file_is_not_opened(wan, saved, name, kind):
    path = saved / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    with pytest.raises(PrismError, match=rf"{name} cannot be read"):
        Judge.from_pretrained(saved, wan)


def test_what_cannot_be_read_again_is_not_saved(judge, tmp_path):
    for trained_on in ({"loss": float("nan")}, {"folder": tmp_path}, {"prompt_keys": "abc"}, {"config": 3}):
        with pytest.raises(PrismError, match="trained on"):
            judge.save_pretrained(tmp_path / "head", trained_on)
        assert not (tmp_path / "head").exists()
    judge.trained_on = {}


def test_judges_are_copied_and_pickled(wan, saved):
    """A deep copy has heads of its own on the same pipeline; a pickle brings its pipeline along."""
    judge = Judge.from_pretrained(saved, wan)
    judge.calibration = {"VQ": {"temperature": 2.0, "eta": 4.0, "tie_threshold": None}}
    expected = judge.score(latents(), PROMPTS, 300, **tiny.CALL_WAN)
    twin = copy.deepcopy(judge)
    assert twin.backbone is judge.backbone
    again = pickle.loads(pickle.dumps(judge))  # of ours, a line above
    assert again.backbone.pipe is not wan
    for other in (twin, again):
        assert torch.equal(other.score(latents(), PROMPTS, 300, **tiny.CALL_WAN), expected)
        assert other.config() == judge.config()
        assert other.head.query is not judge.head.query
        assert not other.is_untrained
    with torch.no_grad():
        twin.head.mlp[-1].weight.mul_(2)
    assert torch.equal(judge.score(latents(), PROMPTS, 300, **tiny.CALL_WAN), expected)
    fresh = Judge.untrained(wan, tap=2)
    for other in (copy.copy(fresh), copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        assert other.is_untrained


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dimensions": "VQ"}, "dimensions must be a list"),
        ({"dimensions": [1, 2]}, "dimensions must be a list"),
        ({"dimensions": None}, "dimensions must be a list"),
        ({"seed": None}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"dim": "x"}, "dim must be"),
        ({"heads": 4}, "A head has no option heads; it has"),
    ],
)
def test_what_a_fresh_head_cannot_be_made_of(wan, changes, sentence):
    with pytest.raises(PrismError, match=sentence):
        Judge.untrained(wan, **{"tap": 2, "dim": 16, **changes})


@pytest.mark.parametrize("judges", [5, "runs/head", None, [None], {"a": 1}])
def test_what_cannot_be_averaged(judges):
    with pytest.raises(PrismError, match="A list of judges is needed"):
        Judge.average(judges)


def test_judges_of_any_iterable_are_averaged(judge):
    assert len(Judge.average(each for each in [judge, judge]).members) == 2


@pytest.mark.parametrize("margins", [None, 5, "x", torch.tensor(1.0), torch.ones(3), torch.ones(4) * 1j, {}])
def test_margins_that_make_no_sense(judge, margins):
    with pytest.raises(PrismError, match="The margins must be"):
        judge.probabilities(margins)


def test_margins_of_other_libraries(judge):
    assert torch.equal(
        judge.probabilities([[0.0, 1.0, -1.0, 2.0]]), judge.probabilities(torch.tensor([[0.0, 1, -1, 2]]))
    )


@pytest.mark.parametrize("latents", [None, [[1.0]], torch.ones(0, 16, 3, 4, 4), torch.ones(1, 16, 3, 4, 4).to_sparse()])
def test_latents_that_hold_nothing_to_score(judge, latents):
    for ask in (judge.score, judge.score_clean, judge.attention):
        with pytest.raises(PrismError, match="The latents must be"):
            ask(latents, tiny.PROMPT, 500, **tiny.CALL_WAN)


def test_attention_to_nothing_is_refused(judge):
    with pytest.raises(PrismError, match="Row 0 has no finite attention"):
        judge.attention(torch.full((1, 16, 3, 4, 4), torch.nan), tiny.PROMPT, 500, **tiny.CALL_WAN)


def test_one_generator_draws_the_noise(judge):
    with pytest.raises(PrismError, match="generator must be one"):
        judge.score_clean(torch.zeros(1, 16, 3, 4, 4), tiny.PROMPT, 500, generator=5, **tiny.CALL_WAN)


def test_what_a_judge_was_trained_on_is_a_dict(judge, tmp_path):
    with pytest.raises(PrismError, match="trained_on must be a dict"):
        judge.save_pretrained(tmp_path / "head", trained_on="here")

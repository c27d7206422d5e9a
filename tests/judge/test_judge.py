"""The judge on real tiny pipelines: what it scores, what it saves, and what it refuses to load."""

from __future__ import annotations

import json
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from prism.errors import PrismError
from prism.judge import Judge, QueryHead

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


def test_the_backbone_is_frozen_and_no_part_of_the_saved_head(wan, judge, saved):
    assert not any(parameter.requires_grad for parameter in wan.transformer.parameters())
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


def test_the_folder_is_also_a_hub_mixin_model(judge, saved, tmp_path):
    head = QueryHead.from_pretrained(saved)
    assert torch.equal(head.query, judge.head.query)
    head.save_pretrained(tmp_path / "again")
    assert torch.equal(QueryHead.from_pretrained(tmp_path / "again").query, head.query)
    (saved / "model.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(PrismError, match="pickle"):
        QueryHead.from_pretrained(saved)


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
    "wrong type": (lambda f: reseal(f, tap="two"), "wrong type"),
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
    with pytest.raises(PrismError, match="Row 1 has no finite score"):
        judge.score(broken, PROMPTS, 500, **tiny.CALL_WAN)

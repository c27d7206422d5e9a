"""Averages of judges: the mean of their scores in one pass of the backbone, saved as one folder, read in the gate."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.zoo import VARIANTS

from prism import files
from prism.backbone import Backbone, Tokens
from prism.errors import PrismError
from prism.judge import Judge, pooling

PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT]


@pytest.fixture(scope="module")
def wan():
    return tiny.wan()


@pytest.fixture(scope="module")
def judges(wan):
    """Two taps, three seeds; the heads differ in size."""
    made = [
        Judge.untrained(wan, tap=tap, dim=dim, seed=seed) for tap, dim, seed in ((3, 16, 0), (1, 32, 1), (3, 16, 2))
    ]
    for seed, judge in enumerate(made):
        judge.trained_on = {"seed": seed, "source": "renoised", "steps": 5, "prompt_keys": [f"key-{seed}", "shared"]}
    return made


@pytest.fixture(scope="module")
def average(judges):
    return Judge.average(judges)


def latents(batch=2):
    return torch.randn(batch, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def test_scores_are_the_mean_of_the_members_in_one_pass(judges, average):
    blocks = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, _o, number=number: blocks.append(number))
        for number, block in enumerate(average.backbone.blocks, 1)
    ]
    found = average.score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    for hook in hooks:
        hook.remove()
    assert blocks == [1, 2, 3]
    expected = torch.stack([judge.score(latents(), PROMPTS, 500, **tiny.CALL_WAN) for judge in judges])
    torch.testing.assert_close(found, expected.mean(0))
    assert (average.taps, average.tap) == ((1, 3), 3)
    mean, error = average.score_clean(latents(), PROMPTS, 700, num_draws=2, **tiny.CALL_WAN)
    apart = [judge.score_clean(latents(), PROMPTS, 700, num_draws=2, **tiny.CALL_WAN)[0] for judge in judges]
    torch.testing.assert_close(mean, torch.stack(apart).mean(0))
    assert bool((error > 0).all())


def test_heads_after_one_block_read_its_tokens_once(judges, average, monkeypatch):
    rows, read = [], pooling.read

    def counted(queries, *rest):
        rows.append(len(queries))
        return read(queries, *rest)

    monkeypatch.setattr(pooling, "read", counted)
    linear = Judge.untrained(judges[0].backbone.pipe, tap=3, aggregation="linear")
    mixed = Judge.average([*judges, linear])
    found = mixed.score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    assert sorted(rows) == [8, 8 + 8 + 1]  # after block 1; after block 3
    apart = [judge.score(latents(), PROMPTS, 500, **tiny.CALL_WAN) for judge in (*judges, linear)]
    torch.testing.assert_close(found, torch.stack(apart).mean(0))


def test_a_low_tap_alone_runs_no_later_block(judges):
    ran = []
    hook = judges[1].backbone.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    Judge.average([judges[1], judges[1]]).score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    hook.remove()
    assert not ran


def test_an_average_among_judges_counts_as_one(judges):
    nested = Judge.average([Judge.average(judges[:2]), judges[2]])
    first, second, third = (judge.score(latents(), PROMPTS, 500, **tiny.CALL_WAN) for judge in judges)
    found = nested.score(latents(), PROMPTS, 500, **tiny.CALL_WAN)
    torch.testing.assert_close(found, ((first + second) / 2 + third) / 2)
    assert Judge.average(judges[:1]) is judges[0]


def test_attention_is_the_mean_over_heads_and_members(judges, average):
    maps = [judge.attention(latents(), PROMPTS, 500, **tiny.CALL_WAN) for judge in judges]
    assert maps[0].shape == (2, 3, 2, 2)
    torch.testing.assert_close(average.attention(latents(), PROMPTS, 500, **tiny.CALL_WAN), torch.stack(maps).mean(0))
    judge = judges[1]  # by hand: the head's own weights, and what the text gets
    conditioning = judge.backbone.condition(PROMPTS, **tiny.CALL_WAN)
    tokens = judge.backbone.tokens(latents(), conditioning, 500.0, 1)
    weights = judge.head.attention(tokens.visual, tokens.text, tokens.text_mask).mean(1)
    torch.testing.assert_close(maps[1].flatten(1), weights[:, :12])
    torch.testing.assert_close(maps[1].flatten(1).sum(1) + weights[:, 12:].sum(1), torch.ones(2))


def test_saved_as_one_folder_and_loaded(wan, average, tmp_path):
    average.save_pretrained(tmp_path / "head")
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = Judge.from_pretrained(tmp_path / "head", tiny.wan())
    assert torch.equal(*(judge.score(latents(), PROMPTS, 300, **tiny.CALL_WAN) for judge in (average, loaded)))
    assert loaded.config() == average.config()
    assert [member.tap for member in loaded.members] == [3, 1, 3]
    known = loaded.trained_on
    assert (known["seed"], known["source"], known["steps"]) == (None, "renoised", 5)
    assert known["prompt_keys"] == ["key-0", "key-1", "key-2", "shared"]
    assert [member["seed"] for member in known["members"]] == [0, 1, 2]
    card = (tmp_path / "head" / "README.md").read_text()
    assert "block 1 and 3" in card
    assert card.count("| head | after block") == 3
    assert "key-0" not in card
    with pytest.raises(PrismError, match=r"denoiser WanTransformer3DModel,.*CogVideoXTransformer3DModel"):
        Judge.from_pretrained(tmp_path / "head", tiny.cogvideox())
    with pytest.warns(UserWarning, match="other weights"):
        Judge.from_pretrained(tmp_path / "head", tiny.wan(seed=1))


def test_one_head_is_saved_as_before(judges, tmp_path):
    judges[0].save_pretrained(tmp_path / "head")
    config = files.read_json(tmp_path / "head" / "config.json")
    assert config["schema"] == 1
    assert config["tap"] == 3
    assert not {"members", "share", "calibration"} & config.keys()


def drop(folder):
    tensors = {n: v for n, v in load_file(folder / "model.safetensors").items() if not n.startswith("1.")}
    save_file(tensors, folder / "model.safetensors")


def add(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "7.query": torch.ones(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(("damage", "sentence"), [(drop, "lacks the tensor"), (add, "a member 7")])
def test_a_folder_whose_members_do_not_fit_is_refused(wan, average, tmp_path, damage, sentence):
    folder = tmp_path / "head"
    average.save_pretrained(folder)
    damage(folder)
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = files.sha256(folder / "model.safetensors")
    files.write_json(folder / "config.json", config)
    with pytest.raises(PrismError, match=sentence):
        Judge.from_pretrained(folder, wan)


def test_judges_that_do_not_fit_together_are_refused(wan, judges, average):
    with pytest.raises(PrismError, match="no judge to average"):
        Judge.average([])
    with pytest.raises(PrismError, match="different pipelines"):
        Judge.average([judges[0], Judge.untrained(tiny.wan(seed=1))])
    with pytest.raises(PrismError, match="VQ, MQ, TA, overall with eta 5 and VQ with eta 5"):
        Judge.average([judges[0], Judge.untrained(wan, dimensions=("VQ",))])
    other = Judge.untrained(wan)
    other.eta = 3.0
    with pytest.raises(PrismError, match="eta 3"):
        Judge.average([judges[0], other])
    with pytest.raises(PrismError, match="averages 3 heads"):
        _ = average.head


def test_heads_of_two_denoisers_are_refused():
    pipe, _ = VARIANTS["wan22_a14b_t2v"]()
    judges = [Judge.untrained(Backbone(pipe, reads), tap=1, dim=16) for reads in ("transformer", "transformer_2")]
    with pytest.raises(PrismError, match="different denoisers cannot be averaged, found 'transformer' and 'transf"):
        Judge.average(judges)


def test_tokens_after_a_block_that_was_not_tapped_are_refused(wan):
    backbone = Backbone(wan)
    conditioning = backbone.condition(PROMPTS, **tiny.CALL_WAN)
    one, two = (backbone.tokens(latents(), conditioning, 500.0, blocks) for blocks in (1, (1, 3)))
    assert torch.equal(one.after(1), two.after(1))
    assert torch.equal(two.after(3), two.visual)
    for tokens in (one, one[:1], Tokens.cat([one, one])):
        with pytest.raises(PrismError, match="are those after block 1, and not after 3; tap that one as well"):
            tokens.after(3)
    with pytest.raises(PrismError, match="after block 1, 3, and not after 2"):
        two.after(2)
    with pytest.raises(PrismError, match="not after 3"):  # a judge is not given another block's tokens
        Judge.untrained(wan, tap=3).score_tokens(one)


def test_one_head_twice_is_saved(wan, judges, tmp_path):
    """As when folds of one run are averaged with the run itself."""
    twice = Judge.average([judges[0], judges[0]])
    twice.save_pretrained(tmp_path / "head")
    loaded = Judge.from_pretrained(tmp_path / "head", wan)
    assert torch.equal(*(each.score(latents(), PROMPTS, 300, **tiny.CALL_WAN) for each in (twice, loaded)))


@pytest.mark.parametrize("share", [0, -0.5, 2, "0.5", None, float("nan"), [0.5]])
def test_a_share_that_makes_no_sense_is_refused(wan, average, tmp_path, share):
    average.save_pretrained(tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    config["members"][0]["share"] = share
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrismError, match=r"config\.json"):
        Judge.from_pretrained(tmp_path / "head", wan)

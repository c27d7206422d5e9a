"""Rewards in a trainer's process: verl-omni's function and Flow-Factory's class give the judge's own scores."""

from __future__ import annotations

import asyncio
import json
import sys
import types
import warnings
from types import SimpleNamespace

import pytest
import torch
from tests import tiny

import prism.rewards
from prism import Judge
from prism.errors import PrismError
from prism.rewards import loaded, verl_omni

CALL = {name: tiny.CALL_WAN[name] for name in ("num_frames", "height", "width", "max_sequence_length")}
PROMPTS = [tiny.PROMPT, tiny.OTHER_PROMPT]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Folders of a head and a pipeline, by the names of the configuration's keys."""
    folder, pipe = tmp_path_factory.mktemp("models"), tiny.wan()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Judge.untrained(pipe).save_pretrained(folder / "head")
    pipe.save_pretrained(folder / "pipe")
    (folder / "pipe" / "call.json").write_text(json.dumps({**CALL, "num_frames": 1}))
    return {"head": str(folder / "head"), "backbone": str(folder / "pipe")}


@pytest.fixture(scope="module")
def judge(names):
    return loaded.scorer_of(**names, call={"num_frames": 9}).judge


@pytest.fixture(scope="module")
def latents():
    return torch.randn(6, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def sample(latents, **extra):
    """The keywords of verl-omni for one sample."""
    return {
        **{"data_source": "x", "ground_truth": "", "solution_image": latents},
        "extra_info": {"num_turns": None, "prompt": tiny.PROMPT, **extra},
    }


def test_verl_omni_scores_all_samples_at_once(names, judge, latents):
    settings = {**names, "call": {"num_frames": 9}, "noise_level": 0.4, "noise_seed": 7, "weight": 1.0}

    async def all_at_once():
        calls = (verl_omni.compute_score(**sample(each), **settings, score_scale=0.1, score_bias=1) for each in latents)
        return await asyncio.gather(*calls)

    results = asyncio.run(all_at_once())
    expected = judge.score_clean(latents, tiny.PROMPT, 400, 1, torch.Generator().manual_seed(7), **CALL)[0]
    for result, scores in zip(results, expected):
        assert result["score"] == pytest.approx(0.1 * float(scores[3]) + 1, abs=1e-5)
        assert result["prism_TA"] == pytest.approx(float(scores[2]), abs=1e-5)


def test_verl_omni_takes_a_picture_as_a_video_of_one_frame_and_embeddings_of_the_rollout(names, judge):
    picture = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(1))
    embeddings = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    extra = {"latents_clean": picture, "prompt_embeds": embeddings, "pooled_prompt_embeds": torch.zeros(8)}
    keywords = sample(torch.zeros(3, 32, 32, dtype=torch.uint8), **extra)
    result = asyncio.run(verl_omni.compute_score(**keywords, **names, dimension="VQ", noise_seed=None))
    call = {**CALL, "num_frames": 1, "prompt_embeds": embeddings[None]}
    expected = judge.score_clean(picture[None, :, None], None, 500, 1, torch.Generator().manual_seed(0), **call)[0]
    assert result["score"] == float(expected[0, 0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"solution_image": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "output_type to latent or both"),
        ({"solution_image": torch.zeros(16, 3, 4, 8)}, r"shape \[1, 16, 3, 4, 8\], and this judge's pipeline makes"),
        ({"extra_info": {}}, "neither prompt_embeds nor a prompt"),
        ({"noise_level": 2}, "noise_level must be a number from 0 to 1"),
        ({"head": None}, "head must name a folder or an id"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"dimension": "beauty"}, "dimension must be one of VQ"),
        ({"device": "gpu"}, "The device gpu cannot be used"),
        ({"call": "{num_frames: 9}"}, "call must be arguments by name"),
        ({"call": {"num_frames": 0}}, "num_frames must be a whole number of at least 1; found 0"),
        ({"extra_info": None}, "extra_info must be a mapping; found None"),
        ({"score_scale": float("nan")}, "score_scale must be a finite number; found nan"),
        ({"noise_leve": 0.9}, "no key noise_leve; write noise_level"),
    ],
)
def test_verl_omni_is_told_what_is_wrong(names, latents, change, sentence):
    keywords = {**sample(latents[0]), **names, "call": {"num_frames": 9}, **change}
    with pytest.raises(PrismError, match=sentence):
        asyncio.run(verl_omni.compute_score(**keywords))


@pytest.fixture
def flow_factory(monkeypatch):
    """Stands in for Flow-Factory: its base class and its output, with their signatures."""

    class PointwiseRewardModel:
        def __init__(self, config, accelerator):
            self.config, self.accelerator, self.device, self.dtype = config, accelerator, config.device, config.dtype

    module = types.ModuleType("flow_factory.rewards")
    module.PointwiseRewardModel = PointwiseRewardModel
    module.RewardModelOutput = SimpleNamespace
    monkeypatch.setitem(sys.modules, "flow_factory", types.ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", module)
    yield module
    vars(sys.modules["prism.rewards.flow_factory"]).pop("FlowFactoryReward", None)


def entry(names, **keys):
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, **{**names, "num_frames": 9, **keys})


TIMESTEPS = torch.tensor([1000.0, 750.0, 500.0])


def test_flow_factory_scores_the_finished_state(names, judge, latents, flow_factory):
    model = prism.rewards.FlowFactoryReward(entry(names, levels=[699, 499], seed=5, draws=2), None)
    assert isinstance(model, flow_factory.PointwiseRewardModel)
    states, index = latents.unflatten(0, (2, 3)), torch.tensor([-1, 0, 1, 2])
    given = {
        "prompt": PROMPTS,
        "all_latents": list(states),
        "timesteps": [TIMESTEPS] * 2,
        "latent_index_map": [index] * 2,
    }
    assert set(model.required_fields) == set(given)
    expected = [
        judge.score_clean(states[:, 2], PROMPTS, t, 2, torch.Generator().manual_seed(5), **CALL)[0][:, 3]
        for t in (699, 499)
    ]
    rewards = model(**given).rewards
    assert (rewards.dtype, rewards.shape) == (torch.float32, (2,))
    torch.testing.assert_close(rewards, (expected[0] + expected[1]) / 2, rtol=0, atol=1e-5)


def test_flow_factory_scores_the_last_kept_state_as_it_is(names, judge, latents, flow_factory):
    model = prism.rewards.FlowFactoryReward(entry(names, dimension="MQ"), None)
    index = torch.tensor([0, -1, 1, -1])  # the noise, and the state after two of three steps
    states = latents[:4].unflatten(0, (2, 2))
    rewards = model(PROMPTS, list(states), [TIMESTEPS] * 2, [index] * 2).rewards
    expected = judge.score(states[:, 1], PROMPTS, 500.0, **CALL)[:, 1]
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)


def test_flow_factory_is_told_what_is_wrong(names, latents, flow_factory):
    with pytest.raises(PrismError, match="entry has no head"):
        prism.rewards.FlowFactoryReward(entry({"head": None, "backbone": "x"}), None)
    with pytest.raises(PrismError, match=r"levels must be a list of noise levels, .*; found the text '699'"):
        prism.rewards.FlowFactoryReward(entry(names, levels="699"), None)
    model = prism.rewards.FlowFactoryReward(entry(names), None)
    with pytest.raises(PrismError, match="kept 3 states, and latent_index_map names 2"):
        model(PROMPTS[:1], [latents[:3]], [TIMESTEPS], [torch.tensor([0, -1, -1, 1])])
    with pytest.raises(PrismError, match="one entry a sample; found 2, 1, 1, 1"):
        model(PROMPTS[:2], [latents[:1]], [TIMESTEPS], [torch.tensor([-1, -1, -1, 0])])
    with pytest.raises(PrismError, match="this judge's pipeline makes"):
        model(PROMPTS[:1], [latents[:1, :, :2]], [TIMESTEPS], [torch.tensor([-1, -1, -1, 0])])


def test_without_flow_factory_its_class_is_refused():
    with pytest.raises(PrismError, match="which is not installed here"):
        prism.rewards.FlowFactoryReward(None, None)

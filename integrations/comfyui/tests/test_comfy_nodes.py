"""The nodes, run on stand-ins: the winner is the sampler's own, costs are as counted, mistakes are sentences."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from integrations import comfyui
from integrations.comfyui import plans
from integrations.comfyui.tests import comfy_stand_in

from prism.errors import PrismError

LATENT = {"samples": torch.zeros(1, 16, 3, 4, 4)}
STEPS = 8


def run(world: Any, model: Any = None, **changes: Any) -> Any:
    """PRISM Early Best-of-N of four seeds; returns (latent, scores, strip)."""
    from integrations.comfyui import nodes

    positive, negative = world.conditionings
    call = {
        **{"model": model or world.model, "judge": nodes.LoadedJudge(str(world.folder)), "positive": positive},
        **{"negative": negative, "latent": LATENT, "seed": 11, "candidates": 4, "steps": STEPS, "cfg": 3.0},
        **{"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "plan": "3:2,5:1", "look": "now"},
        **{"rank_by": "overall", "seeds": ""},
    }
    return nodes.EarlyBestOfN.execute(**{**call, **changes}).args


def plain(world: Any, seed: int, model: Any = None, sampler_name: str = "euler", **others: Any) -> torch.Tensor:
    """What KSampler gives for a seed."""
    noise = comfy_stand_in.prepare_noise(LATENT["samples"], seed)
    call = (model or world.model, noise, STEPS, 3.0, sampler_name, "simple", *world.conditionings, LATENT["samples"])
    return comfy_stand_in.sample(*call, **{"force_full_denoise": True, **others}, seed=seed)


@pytest.mark.parametrize("sampler", comfy_stand_in.SAMPLERS)
@pytest.mark.parametrize("look", ["now", "ahead", "ahead-conditional"])
def test_the_winner_is_what_the_sampler_gives_for_its_seed(world: Any, sampler: str, look: str) -> None:
    latent, scores, _ = run(world, sampler_name=sampler, look=look)
    assert torch.equal(latent["samples"], plain(world, scores["seed"], sampler_name=sampler))
    assert [row["fate"] for row in scores["candidates"]] == [
        "finished",
        "dropped at step 5",
        *["dropped at step 3"] * 2,
    ]
    ranked = [row["scores"]["overall"] for row in scores["candidates"]]
    assert ranked[0] >= ranked[1]
    assert ranked[2] >= ranked[3]
    levels = {len(row["looks"]): {seen["t"] for seen in row["looks"]} for row in scores["candidates"]}
    assert levels[2] == ({750.0, 500.0} if look == "now" else {700.0})


@pytest.mark.parametrize(("look", "probes"), [("now", (4, 2)), ("ahead", (8, 4))])
def test_rows_are_counted(world: Any, look: str, probes: tuple[int, int]) -> None:
    """A step takes two rows; a probe two blocks of three. Looks ahead take the cut's step too, for all."""
    _, scores, _ = run(world, look=look)
    steps = {"now": 4 * 2 + 2 * 2 + 4, "ahead": 4 * 3 + 2 * 2 + 3}[look]
    assert scores["rows"] == pytest.approx(2 * steps + sum(probes) * 2 / 3)
    assert scores["rows_of_one"] == 2 * STEPS


def test_a_look_now_scores_the_latents_of_the_step(world: Any) -> None:
    """The first cut's scores are those of the judge in diffusers on the sampler's latents at that step."""
    from tests import tiny

    _, scores, _ = run(world, plan="4:1", cfg=1.0)
    row = scores["candidates"][0]
    noise = comfy_stand_in.prepare_noise(LATENT["samples"], row["seed"])
    call = (world.model, noise, STEPS, 1.0, "euler", "simple", *world.conditionings, LATENT["samples"])
    scale = world.model.get_model_object("latent_format")
    noisy = scale.process_in(comfy_stand_in.sample(*call, last_step=3, seed=row["seed"]))
    embeds = {"prompt_embeds": world.texts[:1], "negative_prompt_embeds": world.texts[1:]}
    wanted = world.judge.score(noisy, None, 625.0, **tiny.CALL_WAN, **embeds)[0]
    assert row["t"] == 625.0
    torch.testing.assert_close(torch.tensor(list(row["scores"].values())), wanted, rtol=1e-3, atol=1e-4)


def test_hooks_of_other_nodes_stay_and_the_users_model_gets_none(world: Any) -> None:
    model, seen = world.model.clone(), []

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append(1)
        out = extra["original_block"](args)
        return {**out, "img": 1.01 * out["img"]}

    model.set_model_patch_replace(patch, "dit", "double_block", 1)
    model.model_options["sampler_post_cfg_function"] = [lambda args: args["denoised"] + 0.1 * args["uncond_denoised"]]
    latent, scores, _ = run(world, model=model)
    assert seen
    assert torch.equal(latent["samples"], plain(world, scores["seed"], model))
    assert not torch.equal(latent["samples"], plain(world, scores["seed"]))
    assert model.wrappers == {}
    assert model.model_options["transformer_options"]["patches_replace"]["dit"] == {("double_block", 1): patch}


def test_a_first_part_ends_with_noise_left(world: Any) -> None:
    """As KSampler (Advanced) has it, for a model of two parts."""
    latent, scores, _ = run(world, plan="3:1", end_at_step=6, return_with_leftover_noise=True)
    expected = plain(world, scores["seed"], last_step=6, force_full_denoise=False)
    assert torch.equal(latent["samples"], expected)
    with pytest.raises(PrismError, match="The schedule cuts at step 7, and the run has steps 1 to 6"):
        run(world, plan="7:1", end_at_step=6)


def test_an_empty_latent_of_another_scale_is_resized_as_ksampler_does(world: Any) -> None:
    larger = {"samples": torch.zeros(1, 16, 3, 8, 8), "downscale_ratio_spacial": 4}
    latent, _, _ = run(world, latent=larger, plan="2:1", candidates=2, steps=2)
    assert latent.keys() == {"samples"}
    assert latent["samples"].shape == (1, 16, 3, 4, 4)


def test_one_candidate_is_sampled_without_a_look(world: Any) -> None:
    latent, scores, _ = run(world, seeds="23", plan="2:1")
    assert torch.equal(latent["samples"], plain(world, 23))
    assert "- | - | - | - | - | finished" in plans.report(scores)


def test_a_candidate_without_a_finite_score_goes_last(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from integrations.comfyui import judge, nodes

    _, sound, _ = run(world, plan="2:1")
    best, true_scores, calls = sound["seed"], judge.LoadedJudge.scores, []

    def scores(self: Any, tokens: Any) -> torch.Tensor:
        calls.append(1)
        return true_scores(self, tokens) * (torch.nan if len(calls) == best - 10 else 1.0)  # the best seed's

    monkeypatch.setattr(nodes.LoadedJudge, "scores", scores)
    _, scored, _ = run(world, plan="2:1")
    assert scored["candidates"][-1]["seed"] == best
    monkeypatch.setattr(nodes.LoadedJudge, "scores", lambda self, tokens: true_scores(self, tokens) * torch.nan)
    with pytest.raises(PrismError, match="No candidate has a finite score"):
        run(world, plan="2:1")
    with pytest.raises(PrismError, match="Sample 0 of the latent has no finite score"):
        nodes.ScoreLatent.execute(
            world.model, nodes.LoadedJudge(str(world.folder)), world.conditionings[0], LATENT, 0.0, 1, 0
        )


def skipping(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {"img": args["img"]}


def test_mistakes_are_sentences(world: Any) -> None:
    cached = world.model.clone()
    cached.model_options["transformer_options"]["easycache"] = object()
    for changes, said in (
        ({"seeds": "1, two"}, 'seeds holds two; write them as "3, 9, 12-15"'),
        ({"seeds": "3, 1-4"}, "seeds names 3 twice"),
        ({"seeds": "9-2"}, "seeds holds 9-2, which is no range"),
        ({"seeds": str(2**64)}, "numbers up to 2..64 - 1"),
        ({"plan": "5-1"}, 'The schedule "5-1" is not a list of STEP:KEEP'),
        ({"plan": "9:1"}, "The schedule cuts at step 9, and the run has steps 1 to 8"),
        ({"plan": "3:5"}, "keeps 5 candidates at step 3, and only 4 are left"),
        ({"plan": "no.json"}, "The plan no.json does not exist"),
        ({"rank_by": "beauty"}, "rank_by is beauty, and this judge scores VQ, MQ, TA, overall"),
        ({"latent": {"samples": torch.zeros(2, 16, 3, 4, 4)}}, "The latent holds 2 samples, and each candidate is one"),
        ({"model": cached}, "has a step cache"),
    ):
        with pytest.raises(PrismError, match=said):
            run(world, **changes)


def test_judges_are_found_by_name_and_read_anew_where_they_change(world: Any) -> None:
    from integrations.comfyui import nodes

    for name in ("judge", f" {world.folder} "):
        (judge,) = nodes.LoadJudge.execute(name).args
        assert judge.dimensions == world.judge.dimensions
    assert nodes.LoadJudge.fingerprint_inputs("judge") != nodes.LoadJudge.fingerprint_inputs("other")
    for name, said in (("", "has no judge; name a folder"), ("nowhere", "There is no judge nowhere in .*; copy the")):
        with pytest.raises(PrismError, match=said):
            nodes.LoadJudge.execute(name)


def test_reports_are_tables_and_plain_json(world: Any) -> None:
    from integrations.comfyui import nodes

    _, scores, strip = run(world)
    table, text, best = nodes.SeedReport.execute(scores).args
    assert best == scores["seed"] == json.loads(text)["candidates"][0]["seed"]
    assert table.splitlines()[0] == "rank | seed | VQ | MQ | TA | overall | t | what became of it"
    assert f"KSampler with seed {best} gives the same latent" in table
    assert strip.shape == (1, 4 * 112, 320, 3)
    assert 0 <= float(strip.min()) < float(strip.max()) <= 1


def test_the_extension_lists_four_nodes(comfy: Any) -> None:
    extension = asyncio.run(comfyui.comfy_entrypoint())
    schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    assert [schema.display_name for schema in schemas] == [
        *("PRISM Load Judge", "PRISM Early Best-of-N", "PRISM Score Latent", "PRISM Seed Report"),
    ]

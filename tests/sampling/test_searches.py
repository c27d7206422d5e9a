"""The searches whose candidates part, on real pipelines: rows by the plan and by hooks, and winners exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.machinery import seeded
from tests.sampling.conftest import Setting, made
from tests.zoo import VARIANTS

import prism
from prism import PrismError, cli, files
from prism.judge import Judge
from prism.report import wording
from prism.sampling import STRATEGIES
from prism.sampling.noise_search import Evolution, LatentBeams, ZeroOrder
from prism.sampling.particles import FKSteering, Prune
from prism.sampling.plan import Plan, Workload

N, TAP = 4, 2
PLANS: dict[str, Plan] = {
    "fk": FKSteering(lmbda=200, resample_frequency=1, resampling_t_start=2, resampling_t_end=4, num_draws=1),
    "fk that keeps one": FKSteering(lmbda=200, resample_frequency=2, resampling_t_start=1, resampling_t_end=3, keep=1),
    "fk adaptive": FKSteering(
        potential_type="diff", lmbda=50, adaptive_resampling=True, resampling="multinomial", keep=2
    ),
    "beam": LatentBeams(search_schedule=[2, 3, 4], num_draws=1),
    "beam that keeps one": LatentBeams(num_beams=3, num_candidates=2, keep=1, weight=0.4),
    "evolution": Evolution(evolution_schedule=[2, 4], population_size_schedule=[3, 2], elite_size=1, keep=2),
    "zero-order": ZeroOrder(neighbors=3, radius=0.5, judged_step=3),
    "zero-order later": ZeroOrder(iterations=1, neighbors=2, radius=0.5, edited_step=2, judged_step=4),
    "prune": Prune(search_schedule=[2, 4], beta=0.5, temperature=0.05),
    "prune of seeds": Prune(beta=None),
}


WORDS = {
    "fk": "particles resampled at steps 2, 3, 4",
    "fk that keeps one": "particles resampled at steps 1, 3",
    "fk adaptive": "particles resampled at steps 1, 2, 3, 4",
    "beam": "beams at steps 2, 3, 4",
    "beam that keeps one": "beams at steps 1, 2, 3",
    "evolution": "evolved at steps 2, 4",
    "zero-order": "noises near the best one at step 3",
    "zero-order later": "noises near the best one at step 4",
    "prune": "resampled and pruned at steps 2, 4",
    "prune of seeds": "resampled and pruned at steps 1, 2",
}


PARTS = {  # the steps after which candidates may part
    "fk": {2, 3, 4},
    "fk that keeps one": {1},
    "fk adaptive": {1, 2, 3},
    "beam": {2, 3},
    "beam that keeps one": {1, 2},
    "evolution": {2},
    "zero-order": {1},
    "zero-order later": {2},
    "prune": {1},
    "prune of seeds": set(),
}


def hooked(pipe: Any) -> tuple[list[float], list[Any]]:
    """A list that fills with the rows of the denoiser's blocks, in shares of a whole pass, and the hooks."""
    rows: list[float] = []
    blocks = list(
        pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks
    )

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(len(hidden) / len(blocks))

    return rows, [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]


RUNS = [  # scheduler, plan, batch size
    *(("wan-unipc", name, 1) for name in ("fk that keeps one", "beam", "zero-order", "prune")),
    *(("wan-euler", name, 3) for name in ("fk", "beam that keeps one", "evolution", "prune of seeds")),
    *(("cogvideox-dpm", "fk adaptive", 3), ("cogvideox-dpm", "zero-order later", 1)),
]


@pytest.mark.parametrize(("which", "name", "batch_size"), RUNS)
def test_rows_and_winners(which: str, name: str, batch_size: int) -> None:
    setting, plan = made(which), PLANS[name]
    judge = setting.judge(TAP)
    rows, handles = hooked(setting.pipe)
    result = prism.best_of_n(
        setting.pipe, judge, tiny.PROMPT, N, plan=plan, seed=4, batch_size=batch_size, **setting.call
    )
    for handle in handles:
        handle.remove()
    load = Workload.of(judge.backbone, setting.call, N, TAP)
    judged = [len(cut["candidates"]) for cut in result.scores]
    rows_of_plan = plan.rows_of(load, judged) if isinstance(plan, Prune) else plan.rows(load)
    if which == "cogvideox-dpm" and isinstance(plan, ZeroOrder):  # neighbours take over the pivot's step after the edit
        rows_of_plan -= 2 * plan.neighbors
    assert result.ledger.denoiser_rows == pytest.approx(rows_of_plan)
    assert result.ledger.denoiser_rows == pytest.approx(sum(rows))
    assert result.ledger.vae_decodes == 1
    assert (result.scores[-1]["step"], len(result.scores[-1]["kept"])) == plan.cuts(load)[-1]
    assert [cut["step"] for cut in result.scores] == [step for step, _ in plan.cuts(load)]
    (pick,) = result.top
    assert {edit.step for edit in pick.edits} <= PARTS[name]
    if name in ("beam", "evolution", "zero-order", "prune"):  # several of the last pool are of one seed
        pool = result.scores[-1]["candidates"]
        assert len(set(pool)) < len(pool)
    if name == "prune":  # variants of the first seed alone
        assert pick.index == 0
    call = {**setting.call, "output_type": "latent"}
    again = setting.pipe(tiny.PROMPT, **prism.sampling.edited(pick.seed, pick.edits), **call).frames
    assert batch_size > 1 or torch.equal(pick.latents, again)
    torch.testing.assert_close(pick.latents, again, atol=1e-4, rtol=1e-3)
    words = plan.how({**plan.settings(result.scores), "num_inference_steps": setting.call["num_inference_steps"]})
    assert words.replace("\u00a0", " ") == WORDS[name] + ", judged at t = 700"
    edits = "".join(f"({edit.step}, {edit.seed}, {edit.weight})" for edit in pick.edits)
    assert edits in result.reproduce.replace("), (", ")(")


def test_particles_part(wan: Setting) -> None:
    """A strong tilt leaves one lineage, whose particles differ; without a tilt every candidate stays as it is."""
    judge = wan.judge(TAP)
    strong = FKSteering(lmbda=1e4, resampling_t_start=2, resampling_t_end=2)
    result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, N, plan=strong, top_k=N, **wan.call)
    assert {pick.seed for pick in result.top} == {result.seed}
    assert sorted(len(pick.edits) for pick in result.top) == [0, 1, 1, 1]
    assert len({float(pick.latents.sum()) for pick in result.top}) == N
    weak = FKSteering(lmbda=0.0, resampling_t_start=2, resampling_t_end=2)
    result = prism.best_of_n(wan.pipe, judge, tiny.PROMPT, N, plan=weak, top_k=N, **wan.call)
    assert {(pick.seed, pick.edits) for pick in result.top} == {(seed, ()) for seed in result.seeds}


def test_given_frames_are_not_edited() -> None:
    pipe, call = VARIANTS["ltx_i2v"]()
    judge = Judge.untrained(pipe, tap=1, dim=16)
    plan = FKSteering(lmbda=1e4, resampling_t_start=2, resampling_t_end=2)
    call = {**call, "output_type": "latent"}
    result = prism.best_of_n(pipe, judge, "a cat runs", 3, plan=plan, top_k=3, batch_size=1, **call)
    plain, first, second = (pick.latents for pick in sorted(result.top, key=lambda pick: pick.edits))
    after: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after.append(tensors["latents"].clone())
        return {}

    pipe(prompt="a cat runs", generator=seeded(result.seed), callback_on_step_end=keep, **call)
    given = after[0] == after[2]
    assert 0 < int(given.sum()) < given.numel()
    assert torch.equal(first[given], plain[given])
    assert not torch.isclose(first[~given], second[~given]).all()
    early = FKSteering(resampling_t_start=1, resampling_t_end=1)
    with pytest.raises(PrismError, match=r"the frames of 'image' cannot be told from noise; .* step 2 or later"):
        prism.best_of_n(pipe, judge, "a cat runs", 3, plan=early, **call)


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (FKSteering, {"potential_type": "sum"}, "potential_type is one of max, add, diff; found sum"),
        (FKSteering, {"resampling": "residual"}, "resampling is one of systematic, multinomial"),
        (FKSteering, {"lmbda": float("nan")}, "lmbda must be"),
        (FKSteering, {"weight": 0.0}, "weight must be"),
        (FKSteering, {"weight": 1.5}, "weight must be"),
        (FKSteering, {"keep": 9}, r"keep is 9; it must be from 1 \(top_k\) to 4, the candidates"),
        (FKSteering, {"resample_frequency": 0}, "resample_frequency must be"),
        (FKSteering, {"adaptive_resampling": "yes"}, "adaptive_resampling"),
        (
            FKSteering,
            {"resampling_t_start": 4, "resampling_t_end": 2},
            "resampling_t_start is 4, and resampling_t_end before it, 2",
        ),
        (FKSteering, {"resampling_t_end": 6}, "has step 6, and the run has steps 1 to 6"),
        (LatentBeams, {"num_beams": 5}, r"num_beams is 5; it must be from 1 \(top_k\) to 4"),
        (LatentBeams, {"search_schedule": [3, 2]}, "search_schedule holds one step or more in rising order"),
        (LatentBeams, {"search_schedule": 3}, "search_schedule is a list of steps"),
        (LatentBeams, {"keep": 3}, r"keep is 3; it must be from 1 \(top_k\) to 2"),
        (Evolution, {"elite_size": 5}, "elite_size is 5; it must be from 1 to 4"),
        (Evolution, {"population_size_schedule": [4]}, "has 1 sizes for the 3 steps"),
        (Evolution, {"mutation_rate": 0}, "mutation_rate must be"),
        (ZeroOrder, {"judged_step": 1}, "judged_step is 1, and noise is edited after step 1"),
        (ZeroOrder, {"edited_step": 6}, "would be judged at step 7, and the run has 6"),
        (ZeroOrder, {"neighbors": 0}, "neighbors must be"),
        (Prune, {"temperature": 0.0}, "temperature must be"),
        (Prune, {"beta": 2.0}, "beta must be"),
        (Prune, {"search_schedule": [6]}, "has step 6, and the run has steps 1 to 6"),
    ],
)
def test_bad_settings_are_refused_before_any_row(
    wan: Setting, kind: type[Plan], settings: dict[str, Any], sentence: str
) -> None:
    rows, handles = hooked(wan.pipe)
    with pytest.raises(PrismError, match=sentence):
        prism.best_of_n(wan.pipe, wan.judge(TAP), tiny.PROMPT, N, plan=kind(**settings), **wan.call)
    for handle in handles:
        handle.remove()
    assert not rows


def test_pipelines_without_a_callback_are_refused() -> None:
    pipe, call = VARIANTS["hunyuan15"]()
    with pytest.raises(PrismError, match="takes no callback_on_step_end, through which candidates part"):
        prism.best_of_n(pipe, Judge.untrained(pipe, tap=1, dim=16), "a cat runs", 2, strategy="fk", **call)


def test_they_are_values_of_the_command_line(wan: Setting, tmp_path: Path) -> None:
    wan.pipe.save_pretrained(tmp_path / "backbone")
    files.write_json(tmp_path / "backbone" / "call.json", tiny.CALL_WAN)
    wan.judge(TAP).save_pretrained(tmp_path / "head")
    models = ["--backbone", str(tmp_path / "backbone"), "--head", str(tmp_path / "head")]
    command = ["sample", "--prompt", tiny.PROMPT, *models, "--strategy", "fk", "--n", "3", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    (row,) = metrics["best_of_n"]
    assert row["strategy"] == "fk"
    assert wording.how(row).startswith("particles resampled at steps 1, 2, 3, 4, judged at")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert wording.how(row) in page
    assert metrics["reproduce"].startswith("pipe(prompt, ")
    assert bool(metrics["edits"]) == ("edited(" in metrics["reproduce"]) == ("It parted from its seed after" in page)
    assert {"fk", "beam", "evolution", "zero-order", "prune"} <= set(STRATEGIES)

"""The claim that a judge on the generator's own states enables a generator that improves itself (a sentence in the
paper, without an experiment): a round of each recipe, judged by what never selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism import shapeworld
from prism.errors import PrismError
from prism.lab.bench import BASE, Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables, judged
from prism.report import wording
from prism.report.claim_plots import Bar, forest
from prism.report.improve_page import cost_sentence, retrained_sentence
from prism.rewards import Improvement, improve
from prism.rewards.measuring import JUDGE, OUTER, Outer
from prism.rewards.settings import CONTROLS, RECIPES, ImproveConfig

FIRST = "pairs"
"""The recipe that decides, chosen by the prototype before this was run; the others are reported beside it."""
ROUNDS, PROMPTS = 1, 800
CHOSEN: dict[str, dict[str, Any]] = {"pairs": {"steps": 400, "learning_rate": 1e-3, "t_high": 700.0}}
"""Settings of each recipe that are not its defaults, chosen on validation prompts (RESULTS.md, 2026-11-28)."""
NEW = 1600
"""ShapeWorld's training prompts from this one on are in no store that ships, and in none that heads here read."""


def run(bench: Bench) -> Finding:
    """Gains of each recipe over the untuned model and over the same steps on random picks, on unseen prompts."""
    from prism.loading import load_reward

    if bench.data is not None:
        raise PrismError("A model of your own is tuned by prism improve, which takes its prompts and rewards.")
    judge, tested = bench.judges(BASE)[0], shapeworld.prompts("test", bench.scale.test_prompts)
    start = max(NEW, bench.scale.train_prompts)
    tuning = shapeworld.prompts("train", start + PROMPTS)[start:]
    pixel = bench.pixels["pixel"]
    column = pixel.dimensions.index("overall")

    def by_frames(latents: Any, prompts: Sequence[str], call: Any, seeds: Sequence[int]) -> Sequence[float]:
        scores: list[float] = pixel.score(latents, list(prompts), 0.0)[:, column].double().tolist()
        return scores

    outer = Outer("the pixel judge", by_frames, frozenset(pixel.trained_on.get("prompt_keys") or ()))
    rewards = [load_reward("referee")]
    results: dict[str, Improvement] = {}
    kept: dict[str, int] = {}
    gains: list[dict[str, Any]] = []
    over: list[dict[str, Any]] = []
    stops: list[str] = []
    for recipe in RECIPES:
        out = bench.parts.folder / "improved" / recipe
        out.parent.mkdir(exist_ok=True)
        config = ImproveConfig(
            recipe=recipe, rounds=ROUNDS, seed=bench.seed, sample_batch_size=bench.sample_size, **CHOSEN.get(recipe, {})
        )
        first = recipe == FIRST  # the others take its videos of the untuned model, and no heads are trained on theirs
        result = improve(
            bench.backbone, judge, tuning, tested, bench.call, out, config, outer=outer, rewards=rewards,
            controls=CONTROLS if first else ("random",), retrain=bench.scale.train if first else None,
            head_seeds=bench.scale.seeds, reuse=None if first else out.parent / FIRST, resume=out.exists(),
        )  # fmt: skip
        results[recipe] = result
        for row in result.rounds:
            gains += [
                {"recipe": recipe, "picks": row["arm"], "round": row["round"], **each} for each in row["measures"]
            ]
        over += [{"recipe": recipe, **row} for row in result.against]
        kept[recipe] = result.kept or max(row["round"] for row in result.rounds)  # 0: stopped in the first round
        stops += [f"{recipe}: {result.stopped}"] if result.stopped else []
    decided, measure = results[FIRST], rewards[0].name

    def last(recipe: str, name: str) -> dict[str, Any]:
        rows = [row for row in gains if (row["recipe"], row["picks"], row["measure"]) == (recipe, "judge", name)]
        return next(row for row in rows if row["round"] == kept[recipe])

    final, inner, second = (last(FIRST, name) for name in (measure, JUDGE, OUTER))
    at = {"recipe": FIRST, "arm": "random", "measure": measure, "round": kept[FIRST]}
    beside = next(row for row in over if at.items() <= row.items())
    verdict = judged([final["gain_ci95"], beside["difference_ci95"]])
    number = (
        f"the referee's mean {_gain(final['gain'], final['gain_ci95'])} after round {final['round']}, over random "
        f"picks {_gain(beside['difference'], beside['difference_ci95'])}"
    )
    others = "; ".join(
        f"{recipe} {_gain(row['gain'], row['gain_ci95'])}"
        for recipe, row in ((recipe, last(recipe, measure)) for recipe in RECIPES if recipe != FIRST)
    )
    instead = ", ".join(
        f"Best-of-{row['n']} {_gain(row['gain'], row['gain_ci95'])}"
        for row in decided.best_of_n
        if row["measure"] == measure
    )
    chosen = ", ".join(f"{name} {value:g}" for name, value in CHOSEN[FIRST].items())
    text = (
        f"With {len(tuning)} prompts in {ROUNDS} round{'s' * (ROUNDS > 1)} ({chosen}, chosen on validation prompts): "
        f"{number}. The judge that chose gains "
        f"{wording.signed(inner['gain'])}, the pixel judge, which never chose, "
        f"{_gain(second['gain'], second['gain_ci95'])}. Other recipes by the referee: {others}. "
        f"{''.join(f'{each} ' for each in stops)}"
        f"With the untuned model {instead}, over a random pick of its videos, at N times the cost of "
        f"each video. {cost_sentence(decided.cost)} "
        f"{retrained_sentence(decided.retrained['comparison'])}"
    )
    tables = {"improve": gains, "improve-against-controls": over, "untuned-best-of-n": decided.best_of_n,
              "retrained": decided.retrained["comparison"]}  # fmt: skip
    return Finding(verdict, number, text, tables, len(tested), (bench.seed,))


def _gain(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} … {interval[1]:+.3f})")


def draw(tables: Tables) -> Sequence[Drawing]:
    """Gains of the referee's mean by recipe, picks and round."""
    measures = [row["measure"] for row in tables["improve"] if row["measure"] not in (JUDGE, OUTER)]
    bars = [
        Bar(f"{row['recipe']}, {row['picks']}, round {row['round']}", row["gain"], row["gain_ci95"], row["picks"])
        for row in tables["improve"]
        if row["measure"] == measures[0]
    ]
    figure = forest(bars, "gain of the referee’s mean over the untuned model", scale=1.0)
    return [Drawing("improve", "On test prompts, with the same seeds; 95 % intervals over prompts.", figure)]


IMPROVING = Experiment(
    "self-improvement",
    "A generator that improves itself",
    "Tuned on the judge's verdicts of its own videos, the generator makes better ones.",
    "A sentence in the conclusion, without an experiment",
    run,
    draw,
    kinds=lambda bench: [BASE],
    scales=("full",),
    trainings=lambda bench: 20,
)

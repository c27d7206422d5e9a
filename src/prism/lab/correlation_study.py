"""The correlation study: does a backbone that generates better also judge better, on its own and on nobody's videos?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prism.errors import PrismError, quoted
from prism.lab import correlation_shown
from prism.lab.backbone_set import Member
from prism.lab.correlation import Correlation, PerPrompt, Point, Published, correlate
from prism.lab.findings import Drawing, Finding, Tables, Verdict
from prism.lab.judged_sets import NOBODYS, OWN, JudgedSets, Videos
from prism.lab.judging_power import (
    HeadRecipe,
    HeadsOnBackbones,
    Measured,
    Subject,
    bonus_of_own,
    dimension_of,
    file_name,
    power,
    right_of,
)
from prism.preference import LatentStore
from prism.report.figures import ACCENT, MUTED, SERIES, new_figure
from prism.runs import Parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS = {OWN: "videos of all these backbones in equal parts", NOBODYS: "renders that no backbone made"}
EXACT = 15  # backbones of which the headline's p counts all orders: half a minute


def on_shapeworld(
    parts: Parts, members: Sequence[Member], videos: Videos | None = None, recipe: HeadRecipe | None = None
) -> Finding:
    """The whole study on ShapeWorld's backbones, piece by piece in the run's folder."""
    subjects = [of_member(member) for member in members]
    sets = JudgedSets(parts, subjects, videos or Videos())
    quality: dict[str, PerPrompt | Published] = dict(sets.quality())
    stores = {OWN: sets.own(), NOBODYS: sets.nobodys()}
    return study(parts, subjects, stores, quality, recipe, "the referee's score")


def of_member(member: Member) -> Subject:
    """A backbone of a set as one that heads are put on."""
    return Subject(member.name, member.load, member.parameters, member.compute, member.run)


def study(
    parts: Parts,
    subjects: Sequence[Subject],
    stores: Mapping[str, LatentStore],
    quality: Mapping[str, PerPrompt | Published],
    recipe: HeadRecipe | None = None,
    what: str = "generative quality",
) -> Finding:
    """The study of any backbones of one VAE.

    Args:
        parts: the run's folder; what is there is not made again.
        subjects: the backbones.
        stores: sets of judged videos by name, each with pairs to train and to test on.
        quality: of each backbone, measured or published; `what` it is, in words.

    Raises:
        PrismError: for a backbone without quality or of another VAE, or a store without pairs.
    """
    recipe = recipe or HeadRecipe()
    for subject in subjects:
        if subject.name not in quality:
            raise PrismError(
                f"The backbone {quoted(subject.name, 80)} has no generative quality; give its scores, or leave it out."
            )
    if not stores:
        raise PrismError("There are no videos to judge: name a store with labelled pairs (prism encode).")
    measured = HeadsOnBackbones(parts, stores, recipe=recipe).measured(subjects)
    return conclude(measured, subjects, quality, recipe, what)


def conclude(
    measured: Measured,
    subjects: Sequence[Subject],
    quality: Mapping[str, PerPrompt | Published],
    recipe: HeadRecipe,
    what: str,
) -> Finding:
    """Tables, figures and words of measurements."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("backbones", "coefficients", "leave-one-out", "levels", "own-videos")
    }
    found: dict[str, Correlation] = {}
    texts, tested = list[str](), 0
    for kind, by_name in measured.items():
        dimension = dimension_of(next(iter(by_name.values()))[0], recipe.dimension)
        right: dict[str, np.ndarray] = {}
        prompts: np.ndarray = np.array([])
        generators, levels = list[Any](), list[float]()
        for subject in subjects:
            right[subject.name], prompts, generators, levels = right_of(by_name[subject.name], dimension)

        tested = max(tested, len(set(prompts.tolist())))

        def points(level: int | None, right: Mapping[str, np.ndarray] = right, prompts: np.ndarray = prompts) -> Any:
            kept = slice(None) if level is None else slice(level, level + 1)
            return [
                Point(each.name, quality[each.name], power(right[each.name][:, kept], prompts), each.parameters,
                      each.compute, each.run) for each in subjects
            ]  # fmt: skip

        found[kind] = correlate(points(None), recipe.seed, most_exact=EXACT)
        tables["backbones"] += [{"judged": kind, **row} for row in found[kind].points]
        tables["coefficients"] += [{"judged": kind, **row} for row in found[kind].rows]
        tables["leave-one-out"] += [{"judged": kind, **row} for row in found[kind].left_out]
        for number, t in enumerate(levels):
            at = correlate(points(number), recipe.seed, most_exact=9)
            accuracies = {row["backbone"]: row["power"] for row in at.points}
            rows = [row for row in at.rows if not row["given"]]
            tables["levels"] += [{"judged": kind, "t": t, **row, **accuracies} for row in rows]
        bonus = bonus_of_own(right, prompts, generators)
        if bonus["bonus"] is not None:
            tables["own-videos"].append({"judged": kind, **bonus})
        texts.append(correlation_shown.paragraph(found[kind], WORDS.get(kind, kind)))
        texts.append(_own(bonus))
    kept = {f"correlation-{name}": rows for name, rows in tables.items() if rows}
    word, sentence = answer(found)
    text = " ".join(text for text in texts if text)
    return Finding(word, sentence, text, kept, tested, tuple(range(recipe.seed, recipe.seed + recipe.seeds)))


def answer(found: Mapping[str, Correlation]) -> tuple[Verdict, str]:
    """Verdict and main number over all sets of videos: it holds where it does on each, in part on some."""
    each = {kind: correlation_shown.verdict(one) for kind, one in found.items()}
    words = {one.word for one in each.values()}
    sentences = {one.sentence for one in each.values()}
    parts = [correlation_shown.on(WORDS.get(kind, kind), one.sentence) for kind, one in each.items()]
    sentence = next(iter(sentences)) if len(sentences) == 1 else " ".join(parts)
    if len(words) == 1:
        return next(iter(words)), sentence
    return ("holds in part" if words & {"holds", "holds in part"} else "cannot be told"), sentence


def _own(bonus: Mapping[str, Any]) -> str:
    if bonus["bonus_ci95"] is None:  # few prompts, or no backbone's own videos
        return ""
    points, low, high = (f"{100 * value:.1f}" for value in (bonus["bonus"], *bonus["bonus_ci95"]))
    what = "no more than" if bonus["bonus_ci95"][0] <= 0 <= bonus["bonus_ci95"][1] else "which is beyond"
    return (
        f"A backbone judges pairs of its own videos by {points} points ({low} to {high}) better than the others do, "
        f"{what} chance, with what it judges better everywhere taken off."
    )


def drawn(tables: Tables, what: str = "generative quality") -> list[Drawing]:
    """The figures of a finding's tables: quality and power, and leaving out, per set of videos; and by noise level."""
    drawings = []
    for kind in dict.fromkeys(row["judged"] for row in tables["correlation-backbones"]):
        label, slug = WORDS.get(kind, kind), file_name(kind)
        points, left_out = (
            [row for row in tables.get(f"correlation-{name}", ()) if row["judged"] == kind]
            for name in ("backbones", "leave-one-out")
        )
        figure, axes = new_figure(6.4, 4.6)
        correlation_shown.draw(points, axes, what, f"accuracy on {label}")
        caption = f"Accuracy on {label} against {what}, with 95 % intervals; lines join stages of one training."
        drawings.append(Drawing(f"correlation-{slug}", caption, figure))
        if left_out:
            whole = [row for row in tables["correlation-coefficients"] if row["judged"] == kind]
            of_all = next(row["value"] for row in whole if (row["coefficient"], row["given"]) == ("spearman", ""))
            figure, axes = new_figure(6.4, 1.4 + 0.22 * len(left_out))
            correlation_shown.draw_left_out(left_out, of_all, axes)
            caption = (
                f"Spearman’s coefficient on {label} without each backbone, and without each training; of all dashed."
            )
            drawings.append(Drawing(f"correlation-{slug}-without", caption, figure))
    if tables.get("correlation-levels"):
        figure, axes = new_figure(6.4, 4.0)
        draw_levels(tables["correlation-levels"], axes)
        caption = (
            "Spearman’s coefficient of quality and accuracy by the noise level that is judged, with 95 % intervals."
        )
        drawings.append(Drawing("correlation-levels", caption, figure))
    return drawings


def draw_levels(rows: Sequence[Mapping[str, Any]], axes: Axes, coefficient: str = "spearman") -> None:
    """A coefficient against the noise level at which the videos are judged, a line per set of videos."""
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for number, kind in enumerate(dict.fromkeys(row["judged"] for row in rows)):
        line = [row for row in rows if (row["judged"], row["coefficient"]) == (kind, coefficient)]
        line = sorted((row for row in line if row["value_ci95"] is not None), key=lambda row: row["t"])
        colour = ACCENT if number == 0 else SERIES[(number - 1) % len(SERIES)]
        t, value = ([row[name] for row in line] for name in ("t", "value"))
        below = [max(0.0, row["value"] - row["value_ci95"][0]) for row in line]
        above = [max(0.0, row["value_ci95"][1] - row["value"]) for row in line]
        axes.errorbar(t, value, [below, above], color=colour, fmt="o-", elinewidth=0.8, label=WORDS.get(kind, kind))
    axes.set_xlim(1005, -15)
    axes.set_xlabel("noise level t of the latent that is judged", color=MUTED)
    axes.set_ylabel(f"{coefficient.capitalize()}’s coefficient", color=MUTED)
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=9)

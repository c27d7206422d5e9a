"""The page and the terminal tables of `prism improve`: what each round gained, by which judge, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report import wording
from prism.report.figures import ACCENT, INK, MUTED, SERIES, as_svg, new_figure
from prism.report.page import Section
from prism.report.tables import Column, Table

ARMS = {"judge": "tuned", "random": "control, random picks", "worst": "control, worst picks"}
MEASURES = (
    "Means over the test prompts, which all models sampled with the same seeds. A gain is paired, over the untuned "
    "model, with its 95 % interval over prompts; in SD: over the spread of the untuned model's videos within a prompt. "
    "The judge chose what was tuned on, so that its own gain proves nothing; the outer judge and the rewards never "
    "did, but the outer judge decides on these same prompts when to stop."
)
TUNING = (
    "The last ten steps. winner and loser: the denoising error of the better and of the worse videos, with that of the "
    "untuned model under the same noise in brackets; where both rise, the model forgets. implicit_acc: share of pairs "
    "in which the tuned model's error fell more for the winner. kl_div: mean squared difference of the outputs to the "
    "untuned model's."
)
CURVES = "Every arm's errors less the untuned model's under the same noise: winners should fall, losers rise."
PICKS = (
    "reward_avg and reward_std_mean are the judge's scores of the candidates and their spread within a prompt; "
    "zero_std_ratio is the share of prompts with nothing to choose, which are left out."
)
RETRAINED = (
    "Heads of several seeds, trained alike on the reward’s labels of the first round’s candidates; decided pairs of "
    "the untuned model’s test videos. The judge that chose was trained on other pairs, and perhaps by other labels."
)


def sections(metrics: Mapping[str, Any]) -> list[Section]:
    """The parts of the page of a metrics document of `prism improve`."""
    rounds = metrics["rounds"]
    parts = [
        Section("What the rounds gained", verdict(metrics), [(gain_plot(rounds), MEASURES)], wide=True),
        Section("Every measure", tables=[(measures_table(rounds), MEASURES)]),
    ]
    if metrics["against"]:
        lead = "The tuned model less a control that took the same steps on other picks: paired, over prompts."
        parts.append(Section("Against the controls", lead, tables=[(against_table(metrics["against"]), "")]))
    if metrics["untuned_best_of_n"]:
        parts.append(
            Section(
                "Best-of-N without tuning",
                cost_sentence(metrics["cost"]),
                tables=[(best_of_table(metrics["untuned_best_of_n"]), "Gain of the judge's pick over a random one.")],
            )
        )
    curves = [(plot, "") for plot in (tuning_plot(metrics["tuning"], arm) for arm in _arms(rounds)) if plot]
    parts.append(Section("The tuning", tables=[(tuning_table(rounds), TUNING), (picks_table(rounds), PICKS)]))
    if curves:
        parts.append(Section("Errors while tuning", CURVES, curves))
    if metrics.get("retrained"):
        lead = retrained_sentence(metrics["retrained"]["comparison"])
        if not metrics["kept"]:
            lead = f"The tuned backbone is that of the last round, though it was rejected. {lead}"
        table = retrained_table(metrics["retrained"]["accuracy"])
        parts.append(Section("Does the tuned backbone judge better?", lead, tables=[(table, RETRAINED)]))
    return parts


def verdict(metrics: Mapping[str, Any]) -> str:
    """What came out, in sentences: of the round whose LoRA was kept, the rewards first, then the outer judge, then why
    it stopped. Where none was kept, that is said, and the numbers are of the last round."""
    mine = [row for row in metrics["rounds"] if row["arm"] == "judge"]
    kept = metrics["kept"]
    last = next((row for row in mine if row["round"] == kept), mine[-1])
    names = [*metrics["measured"]["rewards"], *(["outer"] if metrics["measured"]["outer"] else []), "judge"]
    by_name = {row["measure"]: row for row in last["measures"]}
    sentences = []
    if not kept:
        sentences.append(
            f"No round was kept, so that there is no lora/; these numbers are of round {last['round']}, which was "
            "rejected."
        )
    for name in names:
        row = by_name[name]
        if not row["prompts"]:
            sentences.append(f"On no test prompt have all videos a finite score of {name}.")
            continue
        interval = row["gain_ci95"]
        if interval is None:
            said = "too few prompts for an interval"
        else:
            told = "above zero" if interval[0] > 0 else "below zero" if interval[1] < 0 else "zero is within it"
            said = f"95 % interval {_signed(interval[0])} to {_signed(interval[1])}, {told}"
        word = {"judge": "The judge's own score", "outer": f"The outer judge ({metrics['measured']['outer']})"}
        sentences.append(
            f"{word.get(name, f'The mean of {name}')} changed by {_signed(row['gain'])} on {row['prompts']} test "
            f"prompts after round {last['round']} ({said})."
        )
    first = metrics["measured"]["rewards"][:1] or (["outer"] if metrics["measured"]["outer"] else [])
    for row in metrics["against"]:
        if row["arm"] == "random" and row["round"] == last["round"] and row["measure"] in first:
            sentences.append(
                f"Over the control on random picks it gained {_signed(row['difference'])} by {row['measure']} "
                f"({_interval(row['difference_ci95'])})."
            )
    if metrics["stopped"]:
        sentences.append(metrics["stopped"])
    elif not metrics["measured"]["outer"]:
        sentences.append("Without an outer judge (--outer) no rule could stop it.")
    return " ".join(sentences)


def measures_table(rounds: Sequence[Mapping[str, Any]], parts: bool = True) -> Table[Any]:
    """A line per arm, round and measure. parts: with the dimensions of rewards of several."""
    every = [{**row, **measure} for row in rounds for measure in row["measures"]]
    rows = [row for row in every if parts or "." not in row["measure"]]
    return Table(
        [
            Column("arm", lambda row: row["arm"].replace("judge", "tuned"), left=True),
            Column("round", lambda row: str(row["round"])),
            Column("measure", lambda row: row["measure"], left=True),
            Column("untuned", lambda row: _number(row["before"])),
            Column("tuned", lambda row: _number(row["mean"])),
            Column("gain", lambda row: _signed(row["gain"]), style="bold"),
            Column("95 % interval", lambda row: _interval(row["gain_ci95"]), style="dim"),
            Column("in SD", lambda row: _signed(row["gain_sd"])),
        ],
        rows,
        "Gains over the untuned model",
        MEASURES,
    )


def against_table(rows: Sequence[Mapping[str, Any]]) -> Table[Any]:
    """A line per control, round and measure."""
    return Table(
        [
            Column("less", lambda row: ARMS[row["arm"]], left=True),
            Column("round", lambda row: str(row["round"])),
            Column("measure", lambda row: row["measure"], left=True),
            Column("difference", lambda row: _signed(row["difference"]), style="bold"),
            Column("95 % interval", lambda row: _interval(row["difference_ci95"]), style="dim"),
        ],
        rows,
        "The tuned model less the controls",
    )


def best_of_table(rows: Sequence[Mapping[str, Any]]) -> Table[Any]:
    """A line per measure and N."""
    return Table(
        [
            Column("measure", lambda row: row["measure"], left=True),
            Column("N", lambda row: str(row["n"])),
            Column("gain", lambda row: _signed(row["gain"]), style="bold"),
            Column("95 % interval", lambda row: _interval(row["gain_ci95"]), style="dim"),
        ],
        rows,
        "Best-of-N by the untuned model",
    )


def tuning_table(rounds: Sequence[Mapping[str, Any]]) -> Table[Any]:
    """A line per arm and round: the last entry of its tuning."""

    def both(row: Mapping[str, Any], name: str) -> str:
        entry = row["tuning"]
        if name not in entry:
            return wording.MISSING
        return f"{_number(entry[name])} ({_number(entry['ref_' + name])})"

    def one(name: str) -> Any:
        return lambda row: _number(row["tuning"].get(name))

    return Table(
        [
            Column("arm", lambda row: ARMS[row["arm"]], left=True),
            Column("round", lambda row: str(row["round"])),
            Column("loss", one("loss")),
            Column("winner", lambda row: both(row, "winner_loss")),
            Column("loser", lambda row: both(row, "loser_loss")),
            Column("implicit_acc", one("implicit_acc")),
            Column("kl_div", one("kl_div")),
            Column("grad_norm", one("grad_norm")),
        ],
        rounds,
    )


def picks_table(rounds: Sequence[Mapping[str, Any]]) -> Table[Any]:
    """A line per arm and round: the judge's scores of the candidates."""
    names = ("prompts", "trained_prompt_num", "group_size", "reward_avg", "reward_std_mean", "zero_std_ratio")

    def cell(name: str) -> Any:
        return lambda row: _number(row[name])

    head = [
        Column[Any]("arm", lambda row: ARMS[row["arm"]], left=True),
        Column[Any]("round", lambda r: str(r["round"])),
    ]
    return Table([*head, *(Column(name, cell(name)) for name in names)], rounds)


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """What the tuning cost, in samples of the untuned model, and so what Best-of-N could have had for it."""
    samples = cost["samples_worth"]
    return (
        f"Sampling, judging and tuning took {wording.count(round(cost['total_rows']))} denoiser rows, as much as "
        f"{wording.count(round(samples))} samples of {cost['rows_per_sample']:g} rows. Best-of-2 costs one sample more "
        f"per video and Best-of-4 three, so that up to {wording.count(round(samples))} videos by Best-of-2, or "
        f"{wording.count(round(samples / 3))} by Best-of-4, cost less than the tuning."
    )


def retrained_sentence(comparison: Sequence[Mapping[str, Any]]) -> str:
    """Whether heads on the tuned backbone judge better than those on the original, at each noise level."""
    sentences = []
    for row in comparison:
        if row["dimension"] != wording.main_dimension(comparison):  # type: ignore[arg-type]
            continue
        interval = row["ci95"]
        if interval is None:
            told = "too few prompts for an interval"
        else:
            word = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "it cannot be told"
            told = f"95 % interval {wording.points_interval(interval)}: {word}"
        sentences.append(
            f"At t = {row['t']:g} heads on the tuned backbone order {100 * abs(row['difference']):.1f} points "
            f"{'fewer' if row['difference'] < 0 else 'more'} of {row['pairs']} decided test pairs rightly than heads "
            f"on the original ({told})."
        )
    return " ".join(sentences)


def retrained_table(rows: Sequence[Mapping[str, Any]]) -> Table[Any]:
    """A line per backbone, noise level and dimension: the mean over the seeds of the heads."""
    several = [row for row in rows if row["head_seed"] is None or "judge that chose" in row["judge"]]
    return Table(
        [
            Column("heads on", lambda row: row["judge"], left=True),
            Column("t", lambda row: f"{row['t']:g}"),
            Column("dimension", lambda row: row["dimension"], left=True),
            Column("accuracy", lambda row: wording.percent(row["without_ties"]), style="bold"),
            Column("95 % interval", lambda row: wording.percent_interval(row["without_ties_ci95"]), style="dim"),
        ],
        several or rows,
    )


def gain_plot(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Gains in within-prompt standard deviations by round: of the judge, the outer judge and each reward, by arm."""
    figure, axes = new_figure(9.6, 3.8)
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    names = list(dict.fromkeys(m["measure"] for row in rounds for m in row["measures"] if m["gain_sd"] is not None))
    names = [name for name in names if "." not in name and name not in ("motion", "diversity")]
    styles = {"judge": "-", "random": (0, (4, 2)), "worst": (0, (1, 2))}
    last, labels = max(row["round"] for row in rounds), list[tuple[float, int, str, str]]()
    for index, name in enumerate(names):
        colour = {"judge": MUTED, "outer": INK}.get(name, (ACCENT, *SERIES)[index % 5])
        for arm in _arms(rounds):
            of_arm = [(row["round"], m) for row in rounds if row["arm"] == arm for m in row["measures"]]
            chosen = [(number, m) for number, m in of_arm if m["measure"] == name and m["gain_sd"] is not None]
            x, y = [0, *(number for number, _ in chosen)], [0.0, *(m["gain_sd"] for _, m in chosen)]
            axes.plot(x, y, color=colour, linestyle=styles[arm], linewidth=2 if arm == "judge" else 1.2, marker="o")
            for number, m in chosen:
                if m["gain_ci95"] and m["gain"]:
                    scale = m["gain_sd"] / m["gain"]
                    shift = 0.012 * last * (index - len(names) / 2)
                    ends = [scale * end for end in m["gain_ci95"]]
                    axes.plot([number + shift] * 2, ends, color=colour, linewidth=1.2, alpha=0.6)
            word = name if arm == "judge" else f"{name}, {arm}"
            labels.append((y[-1], x[-1], word, colour))
    low, high = axes.get_ylim()
    at = low - high
    for height, right, word, colour in sorted(labels):
        at = max(height, at + 0.06 * (high - low))  # labels of near ends stand above each other
        end = (right + 0.03 * last, at)
        axes.annotate(word, (right, height), xytext=end, textcoords="data", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(last + 1), ["untuned", *(f"round {number}" for number in range(1, last + 1))])
    axes.set_xlim(-0.1, last + 0.35 * last)
    axes.set_ylabel("gain, within-prompt SD", color=MUTED)
    return as_svg(figure, "Gain over the untuned model by round")


def tuning_plot(history: Sequence[Mapping[str, Any]], arm: str) -> str:
    """Errors of winners and losers, less the untuned model's, by optimiser step; "" for fewer than two entries."""
    entries = [entry for entry in history if entry["arm"] == arm]
    if len(entries) < 2:
        return ""
    figure, axes = new_figure(4.9, 3.2)
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    rounds = sorted({entry["round"] for entry in entries})
    most = max(entry["step"] for entry in entries)
    x = [(entry["round"] - rounds[0]) * most + entry["step"] for entry in entries]
    for name, colour in {"winner_loss": ACCENT, "loser_loss": MUTED}.items():
        if name in entries[0]:
            y = [entry[name] - entry[f"ref_{name}"] for entry in entries]
            axes.plot(x, y, color=colour, linewidth=1.8)
            word = name.removesuffix("_loss")
            axes.annotate(word, (x[-1], y[-1]), xytext=(4, 0), textcoords="offset points", color=colour, fontsize=9)
    if "winner_loss" not in entries[0]:
        axes.plot(x, [entry["kl_div"] for entry in entries], color=ACCENT, linewidth=1.8)
    axes.set_xlabel(f"optimiser step, {ARMS[arm]}", color=MUTED)
    return as_svg(figure, f"Errors less the untuned model's while tuning, {ARMS[arm]}")


def _arms(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rounds))


def _number(value: float | None) -> str:
    if value is None:
        return wording.MISSING
    return str(value) if isinstance(value, int) else f"{value:.4g}".replace("-", "−")


def _signed(value: float | None) -> str:
    return wording.MISSING if value is None else f"{value:+.3g}".replace("-", "−")


def _interval(value: Sequence[float] | None) -> str:
    return wording.MISSING if value is None else f"{_signed(value[0])} … {_signed(value[1])}"


def _points(value: Sequence[float]) -> str:
    return f"{100 * value[0]:+.1f} to {100 * value[1]:+.1f}"

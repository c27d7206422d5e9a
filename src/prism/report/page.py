"""A run as one page to read: report.html, which needs no network, and the Markdown tables kept under docs/evidence."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from prism import files
from prism import video as media
from prism.report import figures as plots
from prism.report import tables, wording
from prism.report.evaluation_tables import evaluation_tables, swap_sentence
from prism.report.metrics import validate
from prism.report.rows import AccuracyRow, Agreement, BestOfNRow


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page: plots as SVG elements with their captions, then tables with theirs. `wide`: plots of full
    width. `wrap`: cells of tables are sentences, which take several lines.
    """

    title: str
    lead: str = ""
    plots: Sequence[tuple[str, str]] = ()
    tables: Sequence[tuple[tables.Table[Any], str]] = ()
    wide: bool = False
    wrap: bool = False


@dataclasses.dataclass(frozen=True)
class FilmRow:
    """A video of a page: `frames` (T, H, W, 3) uint8 or float in [0, 1]; `picked` marks the winner."""

    label: str
    frames: np.ndarray
    note: str = ""
    picked: bool = False


@dataclasses.dataclass(frozen=True)
class FilmStrip:
    """Videos of one prompt: `clips` play side by side, at `fps` frames per second; `rows` are film strips below each
    other, for example all candidates at a cut, or the finished winner and losers.
    """

    title: str
    rows: Sequence[FilmRow] = ()
    caption: str = ""
    clips: Sequence[FilmRow] = ()
    fps: float = 8.0


def write_report(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    figures: Sequence[FilmStrip] = (),
    title: str = "PRISM",
    notes: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    looks: Sequence[FilmStrip] = (),
    sections: Sequence[Section] = (),
    cards: Sequence[Mapping[str, str]] = (),
    previews: Sequence[FilmStrip] = (),
) -> None:
    """Write the page at `path` from a metrics document and film strips. `notes` say what the numbers show and do not
    show; `looks` are film strips of the query's attention; `sections` and `cards` (name, value, text) are a command's
    own, before all others; `previews` are the candidates' predicted videos at cuts.

    Plots, tables and headline numbers appear if `metrics` holds them. Raises `PrismError` if it breaks the schema.
    """
    validate(metrics)
    accuracy: list[AccuracyRow] = wording.pooled(metrics["accuracy"])
    picks: list[BestOfNRow] = wording.pooled(metrics["best_of_n"])
    first = list(wording.by_set(picks).values())[:1]
    near = list(wording.by_set(accuracy).values())[:1]
    page = _template().render(
        title=title,
        metrics=metrics,
        subtitle=_subtitle(metrics),
        headlines=[*cards, *headlines(metrics)],
        sections=sections,
        accuracy_plot=plots.accuracy_plot(near[0] if near else []),
        cost_plot=plots.cost_plot(first[0] if first else []),
        training_plot=plots.training_plot(metrics.get("history", [])),
        accuracy_groups=wording.by_level(accuracy),
        dimensions=wording.dimensions(accuracy),
        main_dimension=wording.main_dimension(accuracy),
        has_gaps=len({len(some) for some in _levels(near[0] if near else []).values()}) > 1,
        several_judges=len({wording.judge_name(row) for row in accuracy}) > 1,
        several_sets=len({row["set"] for row in accuracy}) > 1,
        has_curves=any(not wording.is_main(row) for row in picks),
        picks_by_set=wording.by_set(wording.in_order(picks)),
        seeds_apart=_seeds_apart(metrics),
        comparison=[] if metrics["command"] == "eval" else wording.comparison(metrics.get("judge_comparison", [])),
        evaluation=evaluation_tables(metrics),
        swaps=[swap_sentence(row) for row in metrics.get("swap", [])],
        attention=metrics.get("attention", []),
        agreement=metrics.get("agreement"),
        bars=metrics.get("bars", []),
        study=wording.by_question(metrics.get("study", [])),
        confirmed=[row for row in metrics.get("confirmed", []) if row["dimension"] == "overall"],
        looks=[_embedded(strip) for strip in looks],
        previews=[_embedded(strip) for strip in previews],
        measured=any(row["referee_gain"] is not None for row in picks),
        strips=[_embedded(strip) for strip in figures],
        beside=metrics.get("beside"),
        cuts=[] if looks else metrics.get("cuts", []),
        seeds=metrics.get("seeds", []),
        notes=[notes] if isinstance(notes, str) else notes,
        details=_details(metrics, config),
        w=wording,
    )
    Path(path).write_text(page, encoding="utf-8")


def film(frames: np.ndarray, count: int = 9, gap: int = 2) -> np.ndarray:
    """At most `count` frames, evenly spaced from first to last, side by side.

    `frames` is (T, H, W, 3), uint8 or float in [0, 1]; returns (H, W', 4) uint8, transparent between the frames.
    """
    array = np.asarray(frames)
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8)
    chosen = array[np.linspace(0, len(array) - 1, min(count, len(array))).round().astype(int)]
    number, height, width = chosen.shape[:3]
    strip = np.zeros((height, number * (width + gap) - gap, 4), dtype=np.uint8)
    for i, picture in enumerate(chosen):
        left = i * (width + gap)
        strip[:, left : left + width] = np.dstack([picture, np.full((height, width), 255, dtype=np.uint8)])
    return strip


def clip(video: np.ndarray, fps: float) -> bytes:
    """A video (T, H, W, 3) as the bytes of an mp4 for a page: at most 480 pixels wide or high."""
    height, width = np.shape(video)[1:3]
    step = -(-max(height, width) // SIDE)  # every step-th pixel is kept: quick, and good enough for a page
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        media.write_video(path, video[:, ::step, ::step], fps, crf=10 if step == 1 else 20)
        return path.read_bytes()


def png(picture: np.ndarray) -> bytes:
    """An (H, W, 3 or 4) uint8 picture as the bytes of a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


CLAIMED_LEVELS = {899, 699, 499}  # noise levels that the project makes claims about
SIDE = 480  # largest width and height of a page's clip, in pixels


def headlines(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few most important numbers, each with its name and its unit or reference."""
    cards = []
    shown: list[AccuracyRow] = wording.pooled(metrics["accuracy"])
    main = wording.main_dimension(shown)
    overall = [row for row in shown if row["dimension"] == main and row["without_ties"] is not None]
    if overall:
        row = min(overall, key=lambda row: abs(row["t"] - wording.LEVEL))
        interval = row["without_ties_ci95"]
        between = f", 95 % interval {wording.percent_interval(interval)}" if interval else ""
        others = [other for other in overall if (other["judge"], other["set"]) == (row["judge"], row["set"])]
        other_levels = [
            f"{other['t']:g}: {wording.percent(other['without_ties'])}"
            for other in others
            if other["t"] in CLAIMED_LEVELS - {row["t"]}
        ]
        text = f"of decided pairs ordered rightly at t\u00a0=\u00a0{row['t']:g}{between}"
        text += f"; at t\u00a0=\u00a0{', '.join(other_levels)}" if other_levels else ""
        pixel = [other for other in overall if (other["judge"], other["t"]) == ("pixel", row["t"])]
        if pixel and row["judge"] != "pixel":
            text += f"; a pixel judge at {row['t']:g}: {wording.percent(pixel[0]['without_ties'])}"
        cards.append({"name": "Judge accuracy", "value": wording.percent(row["without_ties"]), "text": text})
    every: list[BestOfNRow] = wording.pooled(metrics["best_of_n"])
    picks = [row for row in every if wording.is_main(row)]
    # One strategy, chosen before the run: choosing the best of several afterwards would favour luck.
    named = [row for strategy in wording.ours() for row in picks if row["strategy"] == strategy]
    if not named:
        return cards
    pick = named[0]
    if pick["referee_gain"] is not None:
        interval = pick["referee_gain_ci95"]
        between = f", 95\u00a0% interval {wording.signed_interval(interval)}" if interval else ""
        text = f"standard deviations over a random pick on average, by the {pick['strategy']} strategy{between}"
        cards.append({"name": "Gain", "value": wording.signed(pick["referee_gain"]), "text": text})
    if pick["denoiser_share_of_full"] is not None:
        value = wording.percent(pick["denoiser_share_of_full"], 0)
        text = f"of full Best-of-{pick['n']}’s denoiser work ({wording.how(pick)})"
        cards.append({"name": "Cost", "value": value, "text": text})
    decodes = pick["vae_decodes"] / pick["prompts"]
    text = f"VAE decode{'' if decodes == 1 else 's'} per prompt"
    cards.append({"name": "Decodes", "value": wording.count(decodes), "text": text})
    return cards


def _seeds_apart(metrics: Mapping[str, Any]) -> list[BestOfNRow]:
    """The rows of each head seed, if there are several: the main strategies on the first set of prompts."""
    rows: list[BestOfNRow] = wording.apart(metrics["best_of_n"])
    named = [row for row in rows if wording.is_main(row) and row["set"] == rows[0]["set"]]
    return sorted(named, key=lambda row: (row["strategy"], row["head_seed"]))


def _subtitle(metrics: Mapping[str, Any]) -> str:
    backbone = metrics["backbone"]
    name = backbone.get("name") or backbone.get("pipeline") or "backbone"
    date = metrics["environment"].get("date")
    return " · ".join(
        str(part) for part in (f"prism {metrics['command']}", name, f"seed {metrics['seed']}", date) if part
    )


def _inline(kind: str, data: bytes) -> str:
    """Bytes as an address within the page; kind: their media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _embedded(strip: FilmStrip) -> dict[str, Any]:
    """A strip for the template. Videos of one frame are pictures: they need no player, and no strip beside it."""
    rows = []
    still = bool(strip.clips) and all(len(row.frames) == 1 for row in strip.clips)
    for row in () if still else strip.rows:
        picture = film(row.frames)
        size = {"width": picture.shape[1], "height": picture.shape[0], "pixelated": np.shape(row.frames)[1] <= 96}
        rows.append(
            {
                "label": row.label,
                "note": row.note,
                "picked": row.picked,
                "uri": _inline("image/png", png(picture)),
                **size,
            }
        )
    clips = []
    for row in strip.clips:
        height, width = np.shape(row.frames)[1:3]
        size = {"width": width, "height": height, "pixelated": height <= 96}
        shown = {"poster": _inline("image/png", png(film(row.frames[:1])))}
        if not still:
            shown["uri"] = _inline("video/mp4", clip(row.frames, strip.fps))
        clips.append({"label": row.label, "note": row.note, "picked": row.picked, **shown, **size})
    return {"title": strip.title, "caption": strip.caption, "rows": rows, "clips": clips, "still": still}


def _levels(rows: Sequence[AccuracyRow]) -> dict[str, set[float]]:
    """Judge -> the noise levels it was measured at."""
    levels: dict[str, set[float]] = {}
    for row in rows:
        levels.setdefault(wording.judge_name(row), set()).add(row["t"])
    return levels


def _details(metrics: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """Configuration, backbone, ledger, timings and environment as flat tables of text."""
    named = {
        "Configuration": config,
        "Ledger": metrics.get("ledger"),
        "Backbone": metrics["backbone"],
        "Timings, seconds": metrics["timings"],
        "Environment": metrics["environment"],
    }
    return {name: _flat(table) for name, table in named.items() if table}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows.update(_flat(value, f"{name}."))
        elif isinstance(value, float):
            rows[name] = f"{value:.6g}"
        else:
            rows[name] = wording.MISSING if value is None else value if isinstance(value, str) else json.dumps(value)
    return rows


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(resources.files("prism.report").joinpath("page.html").read_text(encoding="utf-8"))


# -- the same as Markdown

METHOD = (
    "Intervals are 95 % bootstrap intervals over prompts; what another training of the judges would change is not in "
    "them. `per_prompt/` holds the values per prompt that each is recomputed from (`prism.lab.per_prompt.recomputed`). "
    "Accuracy is that of decided pairs, which are no ties. A gain is the referee's overall score of the pick over the "
    "mean of its prompt's candidates, which is what a random pick gets on average, in pooled within-prompt standard "
    "deviations. A denoiser row is one evaluation of one sample by the denoiser."
)


def write_evidence(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any], command: str) -> None:
    """Write README.md, with every table of the run, metrics.json and config.json into the new folder `folder`."""
    folder.mkdir(parents=True)
    files.write_json(folder / "metrics.json", metrics)
    files.write_json(folder / "config.json", config)
    (folder / "README.md").write_text(markdown(metrics, config, command), encoding="utf-8")


def markdown(metrics: Mapping[str, Any], config: Mapping[str, Any], command: str) -> str:
    """The tables of a run as Markdown, below its command, date, machine and time."""
    machine, timings = metrics["environment"], metrics["timings"]
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in timings.items() if name != "this process")
    rows: list[AccuracyRow] = metrics["accuracy"]
    picks: list[BestOfNRow] = metrics["best_of_n"]
    shared: Agreement | None = metrics.get("agreement")
    sections = [
        "# A full run of the demo",
        f"`{command}`, {machine['date']}, seed {metrics['seed']}, on {machine['processor']} with "
        f"{machine['threads']} threads"
        f"{' and ' + machine['accelerator'] if machine.get('accelerator') else ''}. Minutes: {minutes}. "
        "`config.json` holds every setting, `metrics.json` every number.",
        METHOD,
        "## Bars",
        tables.claims_table(metrics["bars"]).markdown(),
        "## Accuracy by noise level",
        tables.accuracy_table(wording.pooled(rows), whole=True).markdown(),
        "## Against the pixel judges",
        "Accuracy of PRISM minus the pixel judge's in percentage points, paired.",
        tables.comparison_table(metrics.get("judge_comparison", [])).markdown(),
    ]
    for name, some in wording.by_set(wording.pooled(picks)).items():
        sections += [
            f"## Best-of-{some[0]['n']} on {some[0]['prompts']} prompts of the split {name}",
            tables.best_of_n_table(wording.in_order(some), whole=True).markdown(),
        ]
    if shared:
        sections.append(
            f"Run by itself on {shared['prompts']} prompts, each strategy picked the same candidate in "
            f"{shared['same_pick']} of {shared['runs']} runs as in the run that all share; the largest difference of a "
            f"score was {shared['largest_difference']:.1e}. Rows and seconds come from these separate runs, "
            "scaled to all prompts."
        )
    if metrics.get("attention"):
        sections += ["## Where the query looks", tables.attention_table(metrics["attention"]).markdown()]
    if metrics.get("matched"):
        from prism.report import matched_page

        for name, matched in matched_page.by_schedule(metrics["matched"]).items():
            title = f"## {matched_page.SCHEDULES[name]} at matched cost"
            sections += [title, matched_page.markdown(matched, metrics["verdicts"][name])]
    if wording.apart(rows):
        sections += [
            "## By the seed of the head",
            tables.accuracy_table(wording.apart(rows), whole=True).markdown(),
            tables.best_of_n_table(wording.apart(picks), whole=True).markdown(),
        ]
    return "\n\n".join(sections) + "\n\n" + f"```json\n{json.dumps(config, indent=1)}\n```\n"

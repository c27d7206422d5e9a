"""Parts of the page as HTML: a run with its cuts, winner and ledger, and the list of runs."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prism.report import wording
from prism.report.page import film
from prism.serving.jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job, Jobs, Seen, SeenCut
from prism.serving.web import Shelf

STRIP_HEIGHT = 96  # pixels of a film strip's frames, at most
STRIP_FRAMES = 6
LEDGER = {  # of metrics.json, in the order of the page
    "denoiser_rows": "Denoiser rows",
    "denoiser_calls": "Denoiser calls",
    "head_calls": "Candidates judged",
    "vae_decodes": "VAE decodes",
    "text_encodings": "Texts encoded",
    "seconds": "Seconds",
}
NAMES = {"VQ": "Visual quality", "MQ": "Motion", "TA": "Text alignment", "overall": "Overall"}


def esc(text: Any) -> str:
    return html.escape(str(text), quote=True)


def named(dimension: str) -> str:
    """A dimension in words."""
    return NAMES.get(dimension, dimension)


def note(sentence: str, kind: str = "note") -> str:
    """A sentence to the user."""
    return f'<p class="pz-{kind}" role="status">{esc(sentence)}</p>' if sentence else ""


def strip(video: np.ndarray, shelf: Shelf, count: int = STRIP_FRAMES) -> tuple[str, bool]:
    """The address of a film strip of a video (T, H, W, 3) uint8, and True if its pixels are to be shown as squares."""
    from PIL import Image

    height, width = video.shape[1:3]
    chosen = np.asarray(video)[np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)]
    if height > STRIP_HEIGHT:
        size = (max(1, round(width * STRIP_HEIGHT / height)), STRIP_HEIGHT)
        chosen = np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in chosen])
    picture, stream = Image.fromarray(film(chosen, count)), io.BytesIO()
    picture.save(stream, "WEBP", quality=88, lossless=height <= STRIP_HEIGHT)
    return shelf.picture(stream.getvalue(), "webp"), height <= STRIP_HEIGHT


def head(job: Job | None, ahead: int = 0) -> str:
    """The run's title, its state, and how far it is."""
    if job is None:
        return (
            '<div class="pz-empty"><b>No run is shown.</b> Say what the video should show, and press Generate. '
            "The candidates appear at each cut, losers fade, the winner plays.</div>"
        )
    share = 1.0 if job.state == DONE else min(1.0, job.rows / job.expected) if job.expected else 0.0
    words = {
        WAITING: f"waiting, {ahead} before it" if ahead else "waiting",
        RUNNING: f"{job.rows:,.0f} of {job.expected:,.0f} denoiser rows" if job.expected else "starting",
        DONE: "done",
        FAILED: "failed",
        CANCELLED: "cancelled",
    }[job.state]
    button = '<button class="pz-button" data-act="cancel">Cancel</button>' if job.is_live else ""
    return (
        f'<div class="pz-head" data-run="{esc(job.name)}"><div class="pz-title">'
        f'<h2>{esc(job.wish.prompt or job.name)}</h2><span class="pz-state {job.state}">{esc(words)}</span>{button}'
        f'</div><div class="pz-bar" role="progressbar" aria-valuenow="{share * 100:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-label="Progress"><i style="width:{share * 100:.1f}%"></i></div>'
        f"{note(job.error, 'error')}</div>"
    )


def cuts(job: Job | None, shelf: Shelf) -> str:
    """The cuts of a run, the newest first: a strip per candidate with its score and win probability."""
    if job is None:
        return ""
    newest = job.cuts[-1] if job.cuts else None
    return "".join(_cut(cut, shelf, cut is newest and job.state == RUNNING) for cut in reversed(job.cuts))


def _cut(cut: SeenCut, shelf: Shelf, fresh: bool) -> str:
    low = min(seen.deciding for seen in cut.candidates)
    span = max(max(seen.deciding for seen in cut.candidates) - low, 1e-9)
    kept = sum(seen.kept for seen in cut.candidates)
    look = {"now": "judged as it stands", "ahead": "looks ahead", "ahead-conditional": "looks ahead"}.get(cut.look, "")
    facts = [f"t = {cut.t:.0f}", look, f"{kept} of {len(cut.candidates)} go on"]
    if cut.dropped:
        facts.append(f"{cut.dropped} dropped, with NaN or infinity")
    tiles = "".join(_tile(seen, (seen.deciding - low) / span, shelf) for seen in cut.candidates)
    return (
        f'<section class="pz-cut{" fresh" if fresh else ""}"><h3>Step {cut.step}</h3>'
        f'<span class="pz-soft">{esc(" · ".join(fact for fact in facts if fact))}</span>'
        f'<div class="pz-tiles">{tiles}</div></section>'
    )


def _tile(seen: Seen, place: float, shelf: Shelf) -> str:
    if seen.video is None:
        picture = '<div class="pz-noise" aria-hidden="true"></div>'
    else:
        address, squares = strip(seen.video, shelf)
        picture = (
            f'<img class="{"pz-squares" if squares else ""}" src="{address}" alt="The video that is predicted of seed '
            f'{seen.seed}, as a strip of frames">'
        )
    win = (
        ""
        if seen.win is None
        else f'<span title="Probability to be preferred to another one here">{seen.win:.0%}</span>'
    )
    others = ", ".join(f"{named(name)} {wording.signed(score)}" for name, score in seen.scores.items())
    return (
        f'<figure class="pz-tile {"kept" if seen.kept else "lost"}" title="{esc(others)}">{picture}<figcaption>'
        f"<b>Seed {seen.seed}</b><span>{wording.signed(seen.deciding)}</span>{win}</figcaption>"
        f'<div class="pz-meter"><i style="width:{4 + 96 * place:.0f}%"></i></div></figure>'
    )


def winner(job: Job | None, shelf: Shelf) -> str:
    """The winner's video, what is known of it, and what can be downloaded."""
    if job is None or job.state != DONE or job.metrics is None:
        return ""
    metrics, folder = job.metrics, job.folder
    file = folder / metrics["top"][0]["video"]
    if not file.is_file():
        return note("The run's folder is gone.", "error")
    seed = metrics["top"][0]["seed"]
    referee = metrics.get("referee")
    facts = [f"the best of {len(metrics['seeds'])}"] if len(metrics["seeds"]) > 1 else []
    facts += [f"referee {referee['overall']:.2f} of 1"] if referee else []
    what = {".mp4": "Video", ".png": "Picture"}.get(file.suffix, "Sound")
    shown = shelf.file(file, f"{folder.name}{file.suffix}")
    links = [
        f'<a class="pz-button" href="{shelf.archive(folder)}" download>Download all</a>',
        f'<a class="pz-button" href="{shown}" download="{esc(folder.name)}{file.suffix}">{what}</a>',
        f'<a class="pz-button" href="{shelf.file(folder / "report.html")}" target="_blank">Report</a>',
    ]
    played = (
        f'<img src="{shown}" alt="The winner">'
        if what == "Picture"
        else f'<video src="{shown}" autoplay loop muted controls playsinline></video>'
    )
    return (
        f'<section class="pz-winner">{played}<div>'
        f"<h3>Seed {seed} wins</h3><p class='pz-soft'>{esc(', '.join(facts))}</p>"
        f'<p class="pz-links">{"".join(links)}</p><p class="pz-soft pz-path">{esc(folder)}</p></div></section>'
    )


def ledger(job: Job | None) -> str:
    """What the run has cost."""
    if job is None or not (job.metrics or job.expected):
        return ""
    if job.metrics is None:
        rows = [("Denoiser rows", f"{job.rows:,.1f}"), ("of the plan's", f"{job.expected:,.1f}")]
    else:
        costs: Mapping[str, float] = job.metrics["ledger"]
        rows = [(words, _cost(costs[name])) for name, words in LEDGER.items() if name in costs]
        share = job.metrics["best_of_n"][0].get("denoiser_share_of_full")
        rows += [("of a full Best-of-N", f"{share:.0%}")] if share else []
        if (memory := costs.get("peak_memory_bytes")) is not None:
            rows.append(("Peak memory", f"{memory / 2**30:.2f} GiB"))
    body = "".join(f"<tr><th>{esc(words)}</th><td>{esc(value)}</td></tr>" for words, value in rows)
    return f'<section class="pz-ledger"><h3>Ledger</h3><table>{body}</table></section>'


def _cost(value: float) -> str:
    return f"{value:,.1f}" if float(value) % 1 else f"{value:,.0f}"


def runs(jobs: Jobs, selected: str | None) -> str:
    """The list of runs, the newest first."""
    entries = [_entry(job, job.name == selected) for job in jobs.all()[:200]]
    if not entries:
        return '<p class="pz-soft">There is no run yet.</p>'
    return f'<ul class="pz-runs">{"".join(entries)}</ul>'


def _entry(job: Job, chosen: bool) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(job.started)) if job.started else ""
    what = f"seed {job.metrics['top'][0]['seed']} of {len(job.metrics['seeds'])}" if job.metrics else job.state
    return (
        f'<li><button data-act="pick" data-run="{esc(job.name)}" aria-current="{str(chosen).lower()}">'
        f'<b>{esc(job.wish.prompt or job.name)}</b><span class="pz-soft">{esc(job.name[:4])} · {esc(what)}'
        f"{' · ' + esc(when) if when else ''}</span></button></li>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; the first column is left-aligned."""
    top = "".join(f"<th>{esc(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{esc(row[0])}</th>{''.join(f'<td>{esc(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    whole = f'<table class="pz-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="pz-scroll">{whole}</div>'

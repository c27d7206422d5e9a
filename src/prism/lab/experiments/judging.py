"""Two claims on where judging comes from: it follows generative quality, and it is gone without the trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prism.backbone import Backbone
from prism.errors import PrismError
from prism.lab import backbone_set, correlation_study, published_quality, refutation
from prism.lab.bench import Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables
from prism.lab.judged_sets import Videos
from prism.lab.judging_power import HeadRecipe, Subject

TRAINED_ALONG = ("transformer", "text_encoder")
"""The parts of the embedded model that were trained for it; a large model's text encoder was not."""


def _recipe(bench: Bench) -> HeadRecipe:
    depth = bench.tap / bench.backbone.num_blocks
    scale = bench.scale
    return HeadRecipe(scale.seeds, scale.train, scale.dim, depth, bench.levels, "", bench.seed, bench.batch_size)


def refute(bench: Bench) -> Finding:
    """The same head on random weights, on shuffled ones and on statistics, beside the trained backbone."""
    subject = Subject("trained", lambda: bench.backbone, bench.backbone.num_parameters)
    played = bench.played if bench.plays and bench.played.has_trajectories else None
    randomised = () if bench.data is not None else TRAINED_ALONG
    finding = refutation.refute(bench.parts, subject, bench.training, played, _recipe(bench), randomised, bench.tested)
    if bench.plays:
        return finding
    return replace(finding, text=f"{finding.text} Best-of-N by early states is left to --scale full.")


def correlate(bench: Bench) -> Finding:
    """Backbones of several sizes and stages, which are trained in the run's folder where they are missing; or those
    that are named, by published scores of their videos, on the store of the run."""
    if bench.others:
        subjects = [Subject(name, partial(_loaded, name)) for name in bench.others]
        quality = published_quality.read(bench.quality or Path("quality.csv"), bench.others)
        stores = {bench.training.folder.name: bench.training}
        return correlation_study.study(bench.parts, subjects, stores, quality.of, _recipe(bench), quality.what)
    if bench.data is not None:
        raise PrismError(
            "One backbone cannot correlate; name several of one VAE (--correlate FOLDER_OR_ID, several times) and the "
            "scores of their videos (--quality FILE)."
        )
    members = [*backbone_set.shipped(), *backbone_set.make(bench.parts.folder / "backbones")]
    videos = Videos(train=600, test=bench.scale.test_prompts, seed=bench.seed)
    return correlation_study.on_shapeworld(bench.parts, members, videos, _recipe(bench))


def _loaded(name: str) -> Backbone:
    from prism.loading import load_backbone

    backbone: Backbone = load_backbone(name)[0]
    return backbone


def draw_correlation(tables: Tables) -> Sequence[Drawing]:
    """Power against quality, leaving out, and the coefficient by noise level."""
    return correlation_study.drawn(tables, "the referee’s score of its videos")


REFUTATION = Experiment(
    "refutation",
    "The test that would refute it",
    "The signal comes from what the backbone learned: without trained weights it is gone.",
    "asked for by its reviewers",
    refute,
    refutation.drawn,
    trainings=lambda bench: 4,
)
CORRELATION = Experiment(
    "correlation",
    "Judging follows generating",
    "A backbone that generates better also judges better.",
    "Section 5; no coefficient is given",
    correlate,
    draw_correlation,
    scales=("full",),
    trainings=lambda bench: 2 * 15,
)

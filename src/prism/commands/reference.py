"""`prism reference`: scores of a store's clips, saved with a head so that other scores can be compared with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prism.commands.options import BatchSize, Labelled, Seed, levels_of, option
from prism.errors import DRAWS, SEEDS, PrismError, quoted, whole


@dataclass(frozen=True)
class Reference:
    """Score a store's clips as a head's reference: prism score then gives percentiles and win probabilities.

    Writes reference.json into the head's folder, and says so in its README.md; the head is pushed and loaded with it.
    """

    head: Annotated[Path, option("FOLDER")]
    """The trained head's folder."""
    split: Annotated[str, option("NAME")] = "test"
    """Split whose clips are taken, or all; the head must not have been trained on their prompts (but for train)."""
    levels: Annotated[str | None, option("T,T", "those the head is best at", name="t")] = None
    """Noise levels to judge at, 0 (clean) to 1000 (noise)."""
    draws: int = 4
    """Noise draws averaged over at each level."""
    most: int = 1000
    """Clips at most; of more, whole prompts are taken at random."""
    overwrite: bool = False
    """Replace the head's reference."""
    batch_size: BatchSize = 64
    seed: Seed = 0
    config: Annotated[Path | None, option("FILE", "")] = None
    """YAML or JSON file of options; flags override it."""
    models: Labelled = field(default_factory=Labelled)

    def main(self) -> None:
        """Score the clips, write the reference, and print a summary of it."""
        path, reference = run(self)
        facts, intervals = reference.facts, reference.intervals()
        print(f"{facts['clips']:,} clips of {facts['prompts']:,} prompts, {facts['num_draws']} draws: {path}")
        for index, t in enumerate(reference.levels):
            for column, name in enumerate(reference.dimensions):
                values = reference.scores[index, :, column]
                low, _, high = intervals[f"{t:g}"][name]
                share = facts["between_prompts"][f"{t:g}"][name]
                words = "" if share is None else f", {share:.0%} of the variance between prompts"
                print(
                    f"t = {t:g}, {name}: mean {values.mean():+.2f}, standard deviation {values.std():.2f}, 95 % of the "
                    f"clips from {low:+.2f} to {high:+.2f}{words}"
                )


def run(config: Reference) -> tuple[Path, Any]:
    """Measure and write the reference; returns its path and itself."""
    from prism.judge.reference import FILE, measure
    from prism.judge.saved import note_reference
    from prism.loading import check_alone, check_store, load_backbone, load_judge, open_store

    models = config.models
    check_alone("reference")
    whole("--draws", config.draws, 1, DRAWS)
    whole("--most", config.most, 2)
    whole("--batch-size", config.batch_size)
    whole("--seed", config.seed, 0, SEEDS)
    levels = None if config.levels is None else levels_of("--t", config.levels)
    folder = config.head / "head" if (config.head / "head").is_dir() else config.head  # of a run's folder
    if not (folder / "config.json").is_file():
        raise PrismError(
            f"The --head {quoted(str(config.head), 200)} is no head's folder; a reference is written into one."
        )
    if (folder / FILE).exists() and not config.overwrite:
        raise PrismError(f"The head {quoted(str(folder), 200)} has a reference already; replace it with --overwrite.")
    store = open_store(models.data)
    backbone, _, _ = load_backbone(models.backbone, models.device, models.dtype)
    check_store(models.data, store, backbone)
    judge = load_judge(str(folder), backbone, embedded=False)
    if levels is None:
        judge.reference = None  # `default_levels` would take the levels of the old reference
    command = f"prism reference --split {config.split} --draws {config.draws} --most {config.most} --seed {config.seed}"
    command += "" if config.levels is None else f" --t {config.levels}"
    reference = measure(
        *(judge, store, config.split, levels, config.draws, config.seed, config.most, config.batch_size, command)
    )
    return note_reference(folder, reference), reference

"""`prism data`: summarise a preference set, export a store's videos for people to compare, and import answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from prism.commands.options import Models, Resuming, Seed, option
from prism.errors import SEEDS, number, quoted, whole

SHOWN = 3  # examples of a list that are printed


@dataclass(frozen=True)
class Check:
    """Say what is in a preference set: pairs, ties, conflicts, leaks, missing files, agreement of annotators.

    Reads CSV, JSON, JSONL and Parquet in the formats of public sets and of one's own, told by their columns. Nothing is
    written.
    """

    file: Annotated[str, tyro.conf.Positional, option("FILE")]
    """File, folder, or id of a data set on the Hub, of which the tables alone are fetched."""
    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    root: Annotated[Path | None, option("FOLDER", "the file's own")] = None
    """Folder that paths in the file are relative to."""
    encoding: Annotated[str | None, option("NAME", "UTF-8, or by the byte order mark")] = None
    """Encoding of text files, such as cp1252."""
    rule: Annotated[str, option("NAME")] = "majority"
    """How annotators are joined: majority (more than half, else a tie) or paper (votes that conflict give no label)."""
    margin: float = 0.0
    """Largest difference of ratings, or of probabilities, that is a tie."""
    probe: bool = False
    """Open every clip and decode its first frame."""
    json: bool = False
    """Print everything as JSON."""

    def main(self) -> None:
        """Read the set and print its summary."""
        from prism.preference.check import summary
        from prism.preference.readers import read

        preference_set = read(self.file, self.form, root=self.root, encoding=self.encoding, media=False)
        facts = summary(preference_set, self.rule, self.margin, self.probe)
        print(json.dumps(facts, indent=2, ensure_ascii=False) if self.json else "\n".join(lines(facts)))


@dataclass(frozen=True)
class Export:
    """Write a store's videos as clips, and pairs of them as a table and Label Studio's tasks, for people to compare.

    Fill pairs.csv, or import tasks.json and labels.xml into Label Studio; `prism data import` reads the answers back.
    """

    store: Annotated[Path, tyro.conf.Positional, option("STORE")]
    """Store, such as prism collect makes."""
    output: Resuming
    dimensions: Annotated[str, option("NAME,NAME")] = "overall"
    """Questions that are asked per pair, such as VQ,MQ,TA."""
    split: Annotated[str | None, option("NAME", "all")] = None
    """Videos of this split alone: train, validation or test."""
    pairs_per_prompt: Annotated[int | None, option("INT", "all")] = None
    """Random pairs of each prompt's videos."""
    fps: float = 8.0
    """Frames per second of the clips."""
    url: Annotated[str, option("PREFIX")] = "/data/local-files/?d="
    """Prefix of the clips' paths in tasks.json; as given, for local files of Label Studio."""
    seed: Seed = 0
    """Seed of the order of pairs and sides."""
    models: Models = field(default_factory=Models)

    def main(self) -> None:
        """Export, and say what was written."""
        from prism.loading import load_backbone, open_store
        from prism.training.annotation import export

        number("--fps", self.fps, 0.1, 240)
        whole("--seed", self.seed, 0, SEEDS)
        if self.pairs_per_prompt is not None:
            whole("--pairs-per-prompt", self.pairs_per_prompt)
        store = open_store(self.store)
        backbone, _, _ = load_backbone(self.models.backbone, self.models.device, self.models.dtype)
        chosen = export(
            store,
            backbone,
            self.output.out,
            dimensions=[name.strip() for name in self.dimensions.split(",") if name.strip()],
            split=self.split,
            pairs_per_prompt=self.pairs_per_prompt,
            seed=self.seed,
            fps=self.fps,
            url=self.url,
            resume=self.output.resume,
        )
        print(f"{len(chosen):,} pairs to compare: {self.output.out / 'pairs.csv'}, {self.output.out / 'tasks.json'}")


@dataclass(frozen=True)
class Import:
    """Write people's answers about an export into its store, as the labels of its pairs."""

    store: Annotated[Path, tyro.conf.Positional, option("STORE")]
    """Store that was exported."""
    answers: Annotated[Path, tyro.conf.Positional, option("FILE")]
    """The filled pairs.csv, or Label Studio's export as JSON, JSON-MIN or CSV."""
    form: Annotated[str | None, option("NAME", "by the columns")] = None
    """Format to read, where several fit."""
    rule: Annotated[str, option("NAME")] = "majority"
    """How annotators are joined: majority (more than half, else a tie) or paper (votes that conflict give no label)."""
    soft: bool = False
    """Keep the shares of several annotators' votes as probabilities beside the labels."""
    overwrite: bool = False
    """Replace the labels that the store has in these dimensions."""

    def main(self) -> None:
        """Import, and say what the store has now."""
        from prism.training.annotation import read_back

        store = read_back(
            self.store, self.answers, form=self.form, rule=self.rule, soft=self.soft, overwrite=self.overwrite
        )
        print(f"{len(store.pairs):,} pairs labelled in {', '.join(store.dimensions)}: {store.folder}")


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `prism.preference.check.summary` in words, one per line."""
    videos, generators = f"{facts['videos']:,} clips", ", ".join(f"{quoted(k, 40)} {v:,}" for k, v in _most(facts))
    shown = [
        f"Format: {facts['form']}",
        f"{facts['pairs']:,} pairs of {videos} for {facts['prompts']:,} prompts; {facts['votes']:,} votes, "
        f"{facts['ratings']:,} ratings",
        f"Generators: {generators}",
        f"Splits: {', '.join(f'{quoted(name, 40)} {count:,}' for name, count in facts['splits'].items()) or 'none'}",
    ]
    width = max([9, *(min(len(name), 40) for name in facts["dimensions"])])
    shown.append(f"{'Dimension':<{width}}  {'A':>9}  {'B':>9}  {'tie':>9}  {'missing':>9}  agreement (alpha)")
    for name, counts in facts["dimensions"].items():
        cells = "  ".join(f"{counts[each]:>9,}" for each in ("A", "B", "tie", "missing"))
        shown.append(f"{quoted(name, 40):<{width}}  {cells}  {_agreement(name, facts['agreement'])}")
    shown.append(f"Duplicates: {facts['duplicates']:,}; pairs with conflicting votes: {facts['conflicts']:,}")
    shown += _list("Missing files", facts["missing"])
    if facts["archives"]:
        shown += _list("Archives, which may hold them: unpack these and check again", facts["archives"])
    if facts["unreadable"] is not None:
        shown += _list("Unreadable files", [f"{each['path']} ({each['error']})" for each in facts["unreadable"]])
    shown += _list("Prompts that several splits share", facts["shared_prompts"])
    shown += _list("Clips that several splits share", facts["shared_videos"])
    if facts["several_prompts"]:
        shown += _list("Clips in pairs of several prompts, which prism encode refuses", facts["several_prompts"])
    if facts["unknown_splits"]:
        from prism.preference.pairs import SPLITS

        split_names = ", ".join(SPLITS)
        shown += _list(f"Splits that prism encode refuses, as a store has {split_names}", facts["unknown_splits"])
    for why, places in facts["dropped"].items():
        shown += _list(f"Dropped rows, {why}", places)
    if not facts["pairs"]:
        rated = "no prompt has two rated clips" if facts["ratings"] else "no row is left"
        empty = not facts["dropped"] and not facts["ratings"]
        shown.append(f"There is no pair to learn from: {'the table has no rows' if empty else rated}.")
    return shown


def _most(facts: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted(facts["generators"].items(), key=lambda each: -each[1])[:30]


def _agreement(name: str, by_dimension: dict[str, Any]) -> str:
    if name not in by_dimension:
        return "follows from the others"
    agreement = by_dimension[name]
    if agreement is None:
        return "one vote each"
    if agreement["alpha"] is None:
        return "all votes alike"
    span = "" if agreement["low"] is None else f" [{agreement['low']:.2f}, {agreement['high']:.2f}]"
    return f"{agreement['alpha']:.2f}{span}"


def _list(title: str, items: Sequence[str]) -> list[str]:
    more = f", and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    examples = "; ".join(quoted(item, 80) for item in items[:SHOWN])
    return [f"{title}: {len(items):,}{f' ({examples}{more})' if items else ''}"]

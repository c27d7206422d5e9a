"""Labels of a store's videos by rewards: written unit by unit, then joined to ratings, score columns and pairs.

labels/REWARD/UNIT.parquet    video, and a column per dimension: the scores of a shard's videos, written when the
                              whole unit is scored; its metadata name the function and the shard
facts/UNIT.parquet            video, and what its decoded frames look like (`CLIP_FACTS`), for the bias probes
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.special import expit, logit
from torch import Tensor

from prism.backbone import Backbone, layout
from prism.backbone.noise import length
from prism.backbone.sounds import check_pictures
from prism.clips import CLIP_FACTS, frame_facts
from prism.errors import PrismError, number, quoted
from prism.preference import StoreWriter, images
from prism.preference.pairs import PAIR_COLUMNS, named, read_table
from prism.preference.readers import PreferenceSet, compared, pairs
from prism.preference.sets import RATINGS, VOTES, joined, kept_rows
from prism.preference.shards import INDEX, PAIRS, check_seal, noted, open_shard, read_rows, view
from prism.training.reward import Reward

ByDimension = Mapping[str, float] | float  # one value for all dimensions, or by dimension
FOLDER, FACTS = "labels", "facts"
BATCH = 8  # videos per call of a reward that takes batches
SURE = 1e-6, 1 - 1e-6  # probabilities beyond these count as these where several dimensions are joined


def check_names(rewards: Sequence[Reward]) -> None:
    """Refuse rewards with the same name, as labels are stored by name."""
    names = [reward.name for reward in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PrismError(f"Two rewards are named {twice[0]}; name them apart with --reward NAME=FILE.py:function.")


def check_fps(rewards: Sequence[Reward], fps: float | None) -> None:
    """Refuse rewards that need the frames per second if these are not given."""
    lacking = [reward.name for reward in rewards if reward.needs_fps and fps is None]
    if lacking:
        raise PrismError(f"The reward {lacking[0]} takes fps, the frames per second of the videos; give --fps.")


def check_prompts(rewards: Sequence[Reward], prompts: Sequence[str]) -> None:
    """Refuse prompts that a reward cannot judge, where it tells that beforehand."""
    for reward in rewards:
        try:
            if reward.check_prompts is not None:
                reward.check_prompts(prompts)
        except ValueError as error:
            raise PrismError(f"The reward {reward.name} refuses the prompts: {error}; change them.") from error


def check_margins(margins: ByDimension, rewards: Sequence[Reward]) -> None:
    """Refuse margins of dimensions that the rewards do not give, where all of them say which they give."""
    if all(reward.dimensions is not None for reward in rewards):
        _by_dimension(margins, _dimensions(rewards), "margin")


def check_scales(scales: ByDimension | None, rewards: Sequence[Reward]) -> None:
    """Refuse scales of 0 or of dimensions that the rewards do not give, where all of them say which they give."""
    if scales is not None and all(reward.dimensions is not None for reward in rewards):
        _by_dimension(scales, _dimensions(rewards), "soft", above=True)


def _dimensions(rewards: Sequence[Reward]) -> list[str]:
    return [name for reward in rewards for name in _named(rewards, reward, reward.dimensions or ())]


class Decoder:
    """Decode latents of a store, for rewards and for people; a packed latent's grid is computed once per shape."""

    def __init__(self, backbone: Backbone) -> None:
        check_pictures(backbone.pipe, backbone.family)
        self.backbone = backbone
        self._grids: dict[tuple[int, ...], Any] = {}

    @torch.no_grad()
    def frames(self, latents: Tensor, prompt: str, call: Mapping[str, Any], seed: int = 0) -> np.ndarray:
        """The frames (T, H, W, 3) uint8 of latents (1, ...) of a prompt, sampled with these pipeline arguments."""
        backbone, latents = self.backbone, latents.to(self.backbone.device)
        shape = tuple(latents.shape)
        if layout.is_packed(backbone.family.layout) and shape not in self._grids:
            condition = backbone.condition([prompt], [seed], **call)
            arguments = condition.call(latents, latents.new_zeros(1), length(backbone.pipe.scheduler))  # type: ignore[union-attr]
            self._grids[shape] = backbone.denoiser_call(arguments).grid()
        num_frames = call.get("num_frames", backbone.default("num_frames"))
        video = backbone.decode(latents, self._grids.get(shape), num_frames)[0]
        return (video * 255).round().to(torch.uint8).cpu().numpy()  # type: ignore[no-any-return]


class Labels:
    """The labels of a store that is being written, by some rewards side by side.

    Args:
        writer: of the store.
        rewards: with different names.
        backbone: its VAE decodes; None where no video is scored.
        call: the pipeline arguments that the videos were sampled with.
        fps: frames per second, for rewards that take them.
        margins: largest difference that is a tie: one for all dimensions, or by dimension (0 for others).
        scales: pairs also have the probabilities sigmoid(difference / scale): one for all dimensions, or by dimension
            (no probabilities for others); None: labels alone.
        reports: say on stderr what training and evaluation would lack.
    """

    def __init__(
        self, writer: StoreWriter, rewards: Sequence[Reward], backbone: Backbone | None = None,
        call: Mapping[str, Any] | None = None, fps: float | None = None, margins: ByDimension = 0.0,
        scales: ByDimension | None = None, reports: bool = True,
    ) -> None:  # fmt: skip
        check_names(rewards)
        self.writer, self.rewards, self.call, self.fps = writer, tuple(rewards), call or {}, fps
        self.margins, self.scales, self.reports = margins, scales, reports
        self._decoder = Decoder(backbone) if backbone is not None and rewards else None
        self._changed: set[str] = set()

    def drop(self) -> None:
        """Delete the scores by these rewards, so that all videos are scored again."""
        for reward in self.rewards:
            shutil.rmtree(self._folder(reward), ignore_errors=True)

    def missing(self, unit: str) -> list[Reward]:
        """The rewards that have not scored a unit yet."""
        return [reward for reward in self.rewards if not self._has(reward, unit)]

    def label(self, unit: str) -> None:
        """Score a unit's videos by the rewards that have not scored it yet; then refuse margins of other dimensions."""
        rewards = self.missing(unit)
        if not rewards:
            return
        if self._decoder is None:
            raise PrismError("Labels without a backbone decode no videos to be scored; give them one.")
        decode = self._decoder.frames
        path = self.writer.folder / "shards" / f"{unit}.safetensors"
        rows = read_rows(path.with_suffix(".parquet"), ()).to_pylist()
        check_seal(path, noted(path.with_suffix(".parquet"))["sha256"], f"{unit}.parquet")
        latents = view(open_shard(path), path, "latents")
        scores: dict[str, list[dict[str, float]]] = {reward.name: [] for reward in rewards}
        facts: list[dict[str, float | None]] = []
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            videos = [
                decode(latents[start + k : start + k + 1], row["prompt"], self._call(row), row["seed"] or 0)
                for k, row in enumerate(chunk)
            ]
            facts += [frame_facts(video, self.fps) for video in videos]
            prompts, names = [row["prompt"] for row in chunk], [row["video"] for row in chunk]
            for reward in rewards:
                scores[reward.name] += reward.score(videos, prompts, self.fps, names)
        ids = pa.array([row["video"] for row in rows], pa.string())
        seen = {name: pa.array([fact[name] for fact in facts], pa.float64()) for name in CLIP_FACTS}
        self.writer.write_beside(f"{FACTS}/{unit}.parquet", pa.table({"video": ids, **seen}), {"key": self.writer.key})
        for reward in rewards:
            by_video = scores[reward.name]
            columns = {
                name: pa.array([row[name] for row in by_video], pa.float64(), from_pandas=True)  # NaN as null
                for name in by_video[0]
            }
            table = pa.table({"video": ids, **columns})
            notes = {"key": self.writer.key, "source": reward.source, "version": reward.version}
            self.writer.write_beside(f"{FOLDER}/{reward.name}/{unit}.parquet", table, notes)
        check_margins(self.margins, self.rewards)
        check_scales(self.scales, self.rewards)

    def _call(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline arguments of a video, with its image."""
        name = row.get("image")
        return {**self.call, **({"image": str(images.path_of(self.writer.folder, name))} if name else {})}

    def finish(self) -> int:
        """Write ratings, score columns and pairs from all scores; return the number of videos.

        Ratings by others and people's labels stay; all other labels of pairs are replaced. With several rewards a
        dimension is named REWARD.DIMENSION. Splits without pairs and dimensions of ties alone are reported.
        """
        if not any(self._folder(reward).is_dir() for reward in self.rewards):
            return self.writer.finish()
        scored = {reward: self._joined(reward) for reward in self.rewards}
        columns: dict[str, dict[str, float]] = {}
        annotators: dict[str, str] = {}
        for reward, table in scored.items():
            names = table.column_names[1:]
            for name, dimension in zip(names, _named(self.rewards, reward, names)):
                annotators[dimension] = reward.name
                columns[dimension] = dict(zip(table["video"].to_pylist(), table[name].to_pylist()))
        ids = list(dict.fromkeys(video for by_video in columns.values() for video in by_video))
        scores = {name: pa.array([by.get(video) for video in ids], pa.float64()) for name, by in columns.items()}
        for name, by in columns.items():
            if unclear := sum(score is None for score in by.values()):
                print(f"prism: {unclear} of {len(by)} videos have no score in {name}: the answer was not clear.",
                      file=sys.stderr)  # fmt: skip
        count = self.writer.finish(pa.table({"video": pa.array(ids, pa.string()), **scores, **self._facts(ids)}))
        videos = read_rows(self.writer.folder / INDEX, ())
        prompts = dict(zip(videos["video"].to_pylist(), videos["prompt"].to_pylist()))
        rows = [
            (video, prompts[video], dimension, annotators[dimension], score, annotators[dimension], None)
            for dimension, by_video in columns.items()
            for video, score in by_video.items()
            if video in prompts and score is not None
        ]
        kinds = {each.name: each.type for each in RATINGS}
        by_column = zip(*rows) if rows else [()] * len(kinds)
        ratings = pa.table({name: pa.array(values, kinds[name]) for name, values in zip(kinds, by_column)})
        margins = _by_dimension(self.margins, list(columns), "margin")
        scales = {} if self.scales is None else _by_dimension(self.scales, list(columns), "soft", above=True)
        labelled = _pairs(videos, ratings, margins, scales)
        for sentence in (*_ties(labelled, columns, margins), *without_pairs(labelled)) if self.reports else ():
            print(f"prism: warning: {sentence}", file=sys.stderr)
        path = self.writer.folder / "votes.parquet"
        if path.is_file():  # people's answers, which `prism data import` writes
            labelled = self._beside_people(
                labelled, list(columns), set(read_table(path, ("dimension",))["dimension"].to_pylist())
            )
        self.writer.label(labelled, ratings=pa.concat_tables([self._others(), ratings]))
        return count

    def _facts(self, ids: Sequence[str]) -> dict[str, pa.Array]:
        """Columns of what the decoded videos look like, as far as it was noted."""
        paths = sorted((self.writer.folder / FACTS).glob("*.parquet"))
        tables = [read_table(path, ("video",), others=CLIP_FACTS).replace_schema_metadata() for path in paths]
        if not tables:
            return {}
        table = pa.concat_tables(tables)
        places = pc.index_in(pa.array(ids, pa.string()), value_set=table["video"].combine_chunks())
        return {name: table[name].cast(pa.float64()).take(places).combine_chunks() for name in CLIP_FACTS}

    def _beside_people(self, labelled: pa.Table, rated: Sequence[str], answered: Set[str]) -> pa.Table:
        """The pairs with the rewards' labels, and with people's labels in the dimensions that people answered."""
        both = [name for name in rated if name in answered]
        if both:
            raise PrismError(
                f"People labelled {quoted(both[0], 60)} in {named(self.writer.folder)}, and the reward gives a "
                "dimension of this name; let it give a dict with another name. Their labels stay as they are."
            )
        dimensions = [name for name in labelled.column_names if name not in (*PAIR_COLUMNS, *answered)]
        before = read_table(self.writer.folder / PAIRS, PAIR_COLUMNS)
        theirs = [name for name in before.column_names if name.split(":")[0] in answered]
        people, rewards = before.select([*PAIR_COLUMNS, *theirs]), labelled.select([*PAIR_COLUMNS, *dimensions])
        return joined(people, rewards, dimensions)

    def _folder(self, reward: Reward) -> Path:
        return self.writer.folder / FOLDER / reward.name

    def _has(self, reward: Reward, unit: str) -> bool:
        path = self._folder(reward) / f"{unit}.parquet"
        if not path.is_file():
            return False
        notes = noted(path)
        if notes.get("source") != reward.source:
            raise PrismError(
                f"The labels in {named(path)} are of another function, {quoted(notes.get('source'), 80)}; name this "
                "one apart (--reward NAME=...), or label the store anew with --label."
            )
        if notes.get("version") != reward.version and reward.name not in self._changed:
            self._changed.add(reward.name)
            warnings.warn(
                f"The file of the reward {reward.name} has changed since it scored some of these videos; their labels "
                "stay. To ask it anew about all of them, use --label.",
                stacklevel=4,
            )
        return True

    def _joined(self, reward: Reward) -> pa.Table:
        """The scores of all units, in the order of their names."""
        paths = sorted(self._folder(reward).glob("*.parquet"))
        tables = [read_table(path, ("video",)).replace_schema_metadata() for path in paths]
        names = {tuple(table.column_names): path for table, path in zip(tables, paths)}
        if len(names) > 1:
            (first, _), (other, path) = list(names.items())[:2]
            raise PrismError(
                f"The reward {reward.name} gave the dimensions {quoted(', '.join(other[1:]), 80)} in {named(path)} and "
                f"{quoted(', '.join(first[1:]), 80)} before; label the store anew with --label."
            )
        return pa.concat_tables(tables) if tables else pa.table({"video": pa.array([], pa.string())})

    def _others(self) -> pa.Table:
        """The ratings in the store that are not by these rewards."""
        names = {reward.name for reward in self.rewards}
        return kept_rows(self.writer.folder / "ratings.parquet", RATINGS, "annotator", names)


_NONE = VOTES.empty_table()


def _named(rewards: Sequence[Reward], reward: Reward, names: Sequence[str]) -> list[str]:
    """The dimensions of a store that a reward's become."""
    return [name if len(rewards) == 1 else f"{reward.name}.{name}" for name in names]


def _ties(
    labelled: pa.Table, scores: Mapping[str, Mapping[str, float | None]], margins: Mapping[str, float]
) -> Iterator[str]:
    """A sentence for each dimension in which all pairs are ties."""
    for name, by_video in scores.items():
        if name in labelled.column_names and set(labelled[name].drop_null().to_pylist()) == {0}:
            numbers = [score for score in by_video.values() if score is not None]
            low, high = min(numbers), max(numbers)
            why = (
                f"all scores are {low:g}" if low == high
                else f"no two scores of a prompt differ by more than {margins[name]:g}; they are {low:g} to {high:g}"
            )  # fmt: skip
            yield f"all pairs are ties in {quoted(name, 60)}, and nothing can be learned from it: {why}."


def without_pairs(labelled: pa.Table) -> Iterator[str]:
    """A sentence where splits that training or evaluation need have no pairs."""
    empty = [name for name in ("train", "validation", "test") if name not in set(labelled["split"].to_pylist())]
    if len(empty) == 3:
        yield "there are no pairs: a pair is two videos of one prompt and one image."
    elif empty:
        splits = f"split{'s' * (len(empty) > 1)} {' and '.join(empty)}"
        yield f"there are no pairs in the {splits}: give more prompts, other shares (--held-out), or a column split."


def _by_dimension(values: ByDimension, dimensions: Sequence[str], option: str, above: bool = False) -> dict[str, float]:
    """The value of each dimension for --margin or --soft, at least 0, or `above` it; 0 where none is named."""
    if not isinstance(values, Mapping):
        return dict.fromkeys(dimensions, number(option, values, 0, above=above))
    strange = [name for name in values if name not in dimensions]
    if strange and dimensions:
        raise PrismError(
            f"The {option} of {quoted(strange[0], 60)} is of no dimension; there are "
            f"{quoted(', '.join(dimensions), 160)}. Give another --{option}, with --resume where labels were made: "
            "they are kept."
        )
    return dict.fromkeys(dimensions, 0.0) | {
        name: number(f"The {option} of {name}", value, 0, above=above) for name, value in values.items()
    }


def _pairs(videos: pa.Table, ratings: pa.Table, margins: Mapping[str, float], scales: Mapping[str, float]) -> pa.Table:
    """All pairs of each prompt's videos (with the same image), with a column per dimension.

    Where there are several dimensions and none is "overall", this follows from them: its label by the paper's rule, its
    probabilities from the mean of theirs as log-odds.
    """
    clips = pa.table({name: videos[name] for name in ("video", "prompt", "split")})
    names = ratings["dimension"].to_pylist()
    votes = []
    for dimension, margin in margins.items():
        chosen = ratings.filter(pa.array([name == dimension for name in names], pa.bool_()))
        rated = PreferenceSet("", Path(), clips, _NONE, chosen, {}, ())
        votes.append(compared(rated, margin, scales.get(dimension, 0.0)))
    rated = PreferenceSet("", Path(), clips, pa.concat_tables(votes), RATINGS.empty_table(), {}, ())
    labelled = pairs(rated)
    softened = [labelled[f"{name}:p_a"].to_numpy() for name in margins if f"{name}:p_a" in labelled.column_names]
    if softened and "overall" not in margins and "overall" in labelled.column_names:
        p_a = expit(np.mean([logit(each.astype(np.float64).clip(*SURE)) for each in softened], 0))
        for name, values in (("p_a", p_a), ("p_b", 1 - p_a)):
            column = pa.array(values, pa.float32(), from_pandas=True)  # NaN, where a score is missing, as null
            labelled = labelled.append_column(f"overall:{name}", column)
    if videos["image"].null_count == len(videos):
        return labelled
    image_of = dict(zip(videos["video"].to_pylist(), videos["image"].to_pylist()))
    sides = zip(labelled["video_a"].to_pylist(), labelled["video_b"].to_pylist())
    return labelled.filter(pa.array([image_of[a] == image_of[b] for a, b in sides], pa.bool_()))

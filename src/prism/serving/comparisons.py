"""Pairs of clips for people to compare: of a store, of a table of pairs, or of a folder of clips with their prompts."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prism import files
from prism.clip_sources import MOVIES
from prism.errors import PrismError, quoted, whole
from prism.preference.sources import TABLES, open_source

PLAYED = (".mp4", ".webm", ".m4v")  # what browsers play; other clips are shown as an mp4


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt. Paths are relative to the root, with /."""

    path_a: str
    path_b: str
    prompt: str


@dataclass
class Comparisons:
    """Pairs, and where their clips are.

    root: folder that paths are relative to. left_out: pairs or clips that were left out, by reason. make: writes a clip
    that does not exist yet, by its path.
    """

    root: Path
    pairs: tuple[Pair, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    make: Callable[[str], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def clip(self, path: str) -> Path:
        """The file of a clip that a browser plays; it is made, or converted, the first time."""
        file = self.root / path
        with self._lock:
            if self.make is not None and not file.exists():
                self.make(path)
            return file if file.suffix.lower() in PLAYED else self._converted(file)

    def _converted(self, file: Path) -> Path:
        from prism.video import read_clip, write_video

        target = self.root / ".prism-shown" / f"{os.path.relpath(file, self.root).replace(os.sep, '-')}.mp4"
        if not target.exists():
            clip = read_clip(str(file))
            target.parent.mkdir(exist_ok=True)
            with files.new_file(target) as work:
                write_video(work, clip.frames, clip.fps or 8.0, crf=16)
        return target


def opened(source: str | os.PathLike[str], pairs_per_prompt: int | None = None, seed: int = 0) -> Comparisons:
    """The pairs of a table (path_A, path_B, prompt), of a folder with such a table (pairs.csv of prism data export), or
    of a folder of clips, each with its prompt in a text file of the same name: those of one prompt are compared.

    Args:
        source: the table or folder.
        pairs_per_prompt: random pairs of each prompt's clips, in a folder of clips; None: all.
        seed: of these, and of which clip of a pair is A.

    Raises:
        PrismError: if there is no pair.
    """
    path = Path(source)
    if path.is_file():
        return _of_table(path)
    if not path.is_dir():
        raise PrismError(f"There is no file or folder {quoted(str(path), 200)} with pairs to compare.")
    if (path / "pairs.csv").is_file():
        return _of_table(path / "pairs.csv")
    return _of_clips(path.absolute(), pairs_per_prompt, seed)


def _of_table(path: Path) -> Comparisons:
    if path.suffix.lower() not in TABLES:
        raise PrismError(
            f"The pairs {quoted(str(path), 200)} are no table ({', '.join(TABLES)}); name one with path_A, path_B and "
            "prompt, or a folder of clips."
        )
    root = path.parent.absolute()
    rows = open_source(path, root)
    if not rows.has("path_A", "path_B", "prompt"):
        raise PrismError(
            f"The table {quoted(str(path), 150)} has the columns {quoted(', '.join(rows.columns), 150)}; pairs need "
            "path_A, path_B and prompt."
        )
    pairs: dict[Pair, None] = {}
    left_out = {"their clips are missing": 0, "a cell is empty": 0}
    for row in rows:
        cells = [row.text(name) for name in ("path_A", "path_B", "prompt")]
        if None in cells or cells[0] == cells[1]:
            left_out["a cell is empty"] += 1
            continue
        sides = [_inside(root, str(cell), path) for cell in cells[:2]]
        if not all((root / side).exists() for side in sides):
            left_out["their clips are missing"] += 1
        else:
            pairs[Pair(sides[0], sides[1], str(cells[2]))] = None
    return _checked(Comparisons(root, tuple(pairs), {why: count for why, count in left_out.items() if count}), path)


def _inside(root: Path, name: str, path: Path) -> str:
    """A clip's path below the root, with /."""
    relative = os.path.relpath(os.path.join(root, name.strip()), root).replace(os.sep, "/")
    if relative.startswith("../"):
        raise PrismError(f"The table {quoted(str(path), 150)} names {quoted(name, 150)}, outside of its folder.")
    return relative


def _of_clips(root: Path, pairs_per_prompt: int | None, seed: int) -> Comparisons:
    groups: dict[str, list[str]] = {}
    bare = 0
    for file in sorted(each for each in root.rglob("*") if each.suffix.lower() in MOVIES and each.is_file()):
        relative = file.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        text_file = file.with_suffix(".txt")
        try:
            prompt = " ".join(text_file.read_text(encoding="utf-8-sig").split()) if text_file.is_file() else ""
        except UnicodeDecodeError:
            raise PrismError(f"The prompt in {quoted(str(text_file), 200)} is not UTF-8; save it as such.") from None
        if prompt:
            groups.setdefault(prompt, []).append(relative.as_posix())
        else:
            bare += 1
    chance, pairs = random.Random(seed), []
    for prompt, clips in groups.items():
        every = list(itertools.combinations(clips, 2))
        chosen = every if pairs_per_prompt is None else chance.sample(every, min(pairs_per_prompt, len(every)))
        pairs += [Pair(*(sides if chance.random() < 0.5 else sides[::-1]), prompt) for sides in chosen]
    left_out = {"clips have no prompt in a text file of the same name": bare} if bare else {}
    return _checked(Comparisons(root, tuple(pairs), left_out), root)


def of_store(
    store: object, backbone: object, out: Path, split: str | None = None, pairs_per_prompt: int | None = None,
    seed: int = 0, fps: float = 8.0, lock: threading.RLock | None = None,
) -> Comparisons:  # fmt: skip
    """The pairs of a store's videos, decoded when they are first shown into out/clips under names that tell nothing.

    Args:
        store: a `LatentStore` or its folder. backbone: whose VAE decodes. out: folder to write.
        split, pairs_per_prompt, seed: as of `prism.training.annotation.export`.
        lock: held while decoding, by all who use the backbone.

    The answers are read back with ``prism data import STORE ANSWERS``.
    """
    from prism.backbone.fingerprint import fits
    from prism.preference import LatentStore
    from prism.training.annotation import clip_name, drawn_pairs
    from prism.training.labels import Decoder
    from prism.video import write_video

    opened_store = LatentStore.of(store)  # type: ignore[arg-type]
    refusals, _ = fits(opened_store.meta.get("backbone") or {}, backbone, ("vae",))  # type: ignore[arg-type]
    if refusals:
        raise PrismError(
            f"The store {opened_store.folder} is of the {refusals[0][0]}, and the backbone has {refusals[0][1]}."
        )
    if pairs_per_prompt is not None:
        whole("--pairs-per-prompt", pairs_per_prompt)
    root, busy = out.absolute(), lock or threading.RLock()
    decoder, of_clip = Decoder(backbone), {}  # type: ignore[arg-type]

    def named(video: str, prompt: str) -> str:
        path = f"clips/{clip_name(video)}"
        of_clip[path] = (video, prompt)
        return path

    pairs = tuple(
        Pair(named(a, prompt), named(b, prompt), prompt)
        for prompt, a, b in drawn_pairs(opened_store, split, pairs_per_prompt, seed)
    )

    def make(path: str) -> None:
        video, prompt = of_clip[path]
        with busy:
            frames = decoder.frames(opened_store.latents([video]), prompt, opened_store.call_of(video))
        (root / "clips").mkdir(parents=True, exist_ok=True)
        with files.new_file(root / path) as work:
            write_video(work, frames, fps)

    return Comparisons(root, pairs, make=make)


def _checked(comparisons: Comparisons, path: Path) -> Comparisons:
    if comparisons.pairs:
        return comparisons
    why = "; ".join(f"{count:,} were left out, as {reason}" for reason, count in comparisons.left_out.items())
    raise PrismError(
        f"There is no pair to compare in {quoted(str(path), 200)}{f': {why}' if why else ''}; two clips of one prompt "
        "are needed."
    )

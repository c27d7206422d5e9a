"""The folder of a run of rounds: what is read from it is whole, or a sentence says what to delete.

Which files it holds is said in `prism.rewards.rounds`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism import files, runs
from prism.errors import PrismError
from prism.rewards.lora import FILE

OURS = "judge"  # the arm that takes the judge's picks


@contextlib.contextmanager
def made_anew(path: Path) -> Iterator[None]:
    """Say in an error of reading a run's piece, in the block, that the piece may be deleted, and that it is made
    anew then."""
    try:
        yield
    except PrismError as error:
        kind = "folder" if path.is_dir() else "file"
        raise PrismError(
            f"{error} Delete the {kind} {files.shown(path)}, and continue with --resume: it is made anew."
        ) from error


class RunFolder:
    """A run's folder `out`; until `claim` it is not held."""

    def __init__(self, out: Path) -> None:
        self.out, self.parts = out, runs.Parts(out)

    def claim(self, identity: Mapping[str, Any], resume: bool, changeable: Sequence[str]) -> None:
        """Begin the run, or continue it; see `prism.runs.claim`."""
        self.parts = runs.claim(self.out, identity, resume, changeable=changeable)

    def take_over(self, other: Path) -> None:
        """Copy the untuned model's videos from another run; `collect` refuses those of other settings."""
        for name in (f"{OURS}/round-1/candidates", "untuned/test"):
            if not (other / name / "store.json").is_file():
                raise PrismError(
                    f"The --reuse {files.shown(other)} holds no {name}; name the folder of another prism improve."
                )
            if not (self.out / name).exists():
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                with files.new_folder(self.out / name) as folder:
                    shutil.copytree(other / name, folder, dirs_exist_ok=True)

    def once(self, name: str, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` gives, an entry `key` among it, which is kept in `name`.json and made once.

        Raises:
            PrismError: for a file that is damaged.
        """
        path = self.out / f"{name}.json"
        if not path.is_file():
            return self.parts.once(name, make)
        with made_anew(path):
            value = files.read_json(path)
            if not isinstance(value, dict) or key not in value:
                raise PrismError(f"The file {files.shown(path)} holds no {key}, so it was altered.")
        return value

    def tuned(self, arm: str, number: int, tune: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The history of a round's tuning. `tune` writes the LoRA into a folder; it is called once, and again where
        the LoRA or its history was deleted. If other weights come of it then, what was made with the old ones goes.

        Raises:
            PrismError: for a LoRA or a history that is damaged.
        """
        name = f"{arm}/round-{number}"
        record, lora, digest = self.out / name / "tuning.json", self.out / name / "lora" / FILE, "lora_sha256"

        def make() -> dict[str, Any]:
            history = tune(lora.parent)
            return {"history": history, digest: files.sha256(lora)}

        before = files.sha256(lora) if lora.is_file() and not record.is_file() else ""
        if record.is_file() and not lora.is_file():
            before = self.once(f"{name}/tuning", "history", make).get(digest, "")
            record.unlink()
        again = not record.is_file()
        history: list[dict[str, Any]] = self.once(f"{name}/tuning", "history", make)["history"]
        if again and files.sha256(lora) != before:
            self._forget(arm, number)
        self.lora(arm, number)
        return history

    def lora(self, arm: str, number: int) -> Path:
        """The folder of the LoRA of a round.

        Raises:
            PrismError: where it is damaged, or not the one that was tuned.
        """
        folder = self.out / arm / f"round-{number}"
        path = folder / "lora" / FILE
        with made_anew(path):
            files.load_safetensors(path)
            saved = files.read_json(folder / "tuning.json").get("lora_sha256")
            if saved is not None and files.sha256(path) != saved:
                raise PrismError(f"The file {files.shown(path)} is not the LoRA that was tuned, so it was altered.")
        return path.parent

    def publish(self, kept: int) -> None:
        """Copy the LoRA of a round into lora/, where it was read as whole; 0: none is there."""
        target = self.out / "lora" / FILE
        if not kept:
            target.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                target.parent.rmdir()
            return
        source = self.lora(OURS, kept) / FILE
        target.parent.mkdir(exist_ok=True)
        with files.new_file(target) as path:
            shutil.copyfile(source, path)

    def _forget(self, arm: str, number: int) -> None:
        """Delete what was made with a round's earlier LoRA: its measures, the rounds after it, and heads."""
        every, stale = number, ["measures.json"]
        while (folder := self.out / arm / f"round-{every}").is_dir():
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            later = [folder / "candidates", *folder.glob("step-*")] if every > number else []
            for made in [folder / "test", *later]:
                if made.is_dir():
                    runs.discard(made)
            stale = ["measures.json", "scores.json", "picks.json", "tuning.json", f"lora/{FILE}"]
            every += 1
        for path in self.out.glob("retrained-*.json") if arm == OURS else ():
            path.unlink()

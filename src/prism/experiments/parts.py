"""Work that survives a kill: finished pieces lie in a folder, and a run of the same configuration goes on there."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prism import files
from prism.errors import PrismError

IDENTITY = "identity.json"


class Parts:
    """The pieces of one configuration's run, each a JSON file and whatever its maker leaves beside it.

    Args:
        folder: where they lie; made where it is missing.
        identity: what the pieces depend on, as JSON. Pieces of another identity are refused.
        restart: delete pieces of another identity instead, and start anew.

    Raises:
        PrismError: for a folder that holds something else, or pieces of another configuration (what differs is named).
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.folder, wanted = folder, dict(identity)
        known = folder / IDENTITY
        if folder.exists() and not known.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise PrismError(f"The folder {folder} holds no parts of a run; move it away, or choose another --out.")
        found = files.read_json(known) if known.is_file() else wanted
        different = sorted(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
        if different and restart:
            print(f"prism: deleting the parts in {folder}, which are those of another run", file=sys.stderr)
            shutil.rmtree(folder)
        elif different:
            raise PrismError(
                f"The parts in {folder} are those of another run, whose {different[0]} was "
                f"{found.get(different[0])!r} and is now {wanted.get(different[0])!r}; choose another --out, or start "
                "anew with --overwrite."
            )
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(known, wanted)

    def once(self, name: str, make: Callable[[], Mapping[str, Any] | None]) -> dict[str, Any]:
        """What `make` returns, from disk where it was made before; its wall time is added as "seconds".

        `make` may leave files in the folder: they must appear whole, and before it returns.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            made = dict(make() or {})
            files.write_json(path, {**made, "seconds": time.perf_counter() - started})
        return files.read_json(path)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()


class Clock:
    """A line now and then on how far a long loop is, for logs: at most one a `every` seconds, with the time left."""

    def __init__(self, what: str, total: int, every: float = 300.0) -> None:
        self.what, self.total, self.every = what, total, every
        self.start = self.last = time.monotonic()
        self.worked = 0

    def tick(self, done: int, worked: bool) -> None:
        """`done` of the total are done; `worked`: this one was not on disk already."""
        now = time.monotonic()
        self.worked += worked
        if now - self.last >= self.every and self.worked:
            self.last = now
            left = (now - self.start) / self.worked * (self.total - done) / 60
            print(f"prism: {self.what}: {done} of {self.total}, about {left:.0f} minutes left", file=sys.stderr)

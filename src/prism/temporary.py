"""Temporary names beside the files and folders that they are made for: `.NAME.prism-XXXXXXXX`.

Each is a folder on which its process holds a lock as long as it lives, so that what a dead one left can be told from
a live one's, and swept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_own: set[Path] = set()  # this process's folders
NAME, OLD = re.compile(r"\.(.+)\.prism-[0-9a-f]{8}(-old)?", re.DOTALL), "-old"


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def name_beside(target: Path, end: str = "") -> Path:
    name = target.absolute().name.encode()[:200].decode(errors="ignore")  # the longest name has 255 bytes
    return target.absolute().with_name(f".{name}.prism-{os.urandom(4).hex()}{end}")


def folder_beside(target: Path, shared: bool = False) -> tuple[Path, int | None]:
    """A new folder beside `target`, and the lock on it (None where the system has none); `shared`: as of `hold`."""
    while True:
        path = name_beside(target)
        try:
            path.mkdir()
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # taken for a dead one by another's sweep
                lock = hold(path, shared)
                _own.add(path)
                if lock is None or path.stat().st_ino == os.fstat(lock).st_ino:
                    return path, lock
                os.close(lock)
        except BaseException:
            remove(path)
            raise


def remove(folder: Path) -> None:
    """Delete a folder with all that is in it, also where a signal falls into that; what cannot be deleted stays."""
    _own.discard(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def scratch(target: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, deleted at the end, or after a kill by the next run for `target`.

    shared: for a moment, so that nobody need take it for another process's work (`is_made_elsewhere`).
    """
    temporary, lock = folder_beside(target, shared)
    try:
        yield temporary
    finally:
        remove(temporary)
        release(lock)


def hold(folder: Path, shared: bool = False) -> int | None:
    """Lock a folder while this process lives and keeps the descriptor; None where the file system has no locks.

    `shared`: with other processes that share it. Raises BlockingIOError where it is locked already.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def is_made_elsewhere(target: Path) -> bool:
    """Whether another process works on a folder that is going to take the name `target`."""
    name = name_beside(target).name.rpartition("-")[0]
    with contextlib.suppress(OSError):
        for path in target.absolute().parent.iterdir():
            if path.name.startswith(f"{name}-") and NAME.fullmatch(path.name) and path not in _own:
                try:
                    release(hold(path, shared=True))
                except BlockingIOError:
                    return True
                except OSError:  # gone
                    continue
    return False


def sweep(target: Path, deep: bool = False) -> None:
    """Remove what dead processes of ours left beside `target` on its behalf, and in it (`deep`: anywhere in it).

    A folder is removed where its name is one of `NAME` and no process holds its lock. Where a replacement was cut
    short between two renames, the old folder gets its name back.
    """
    name = name_beside(target).name.rpartition("-")[0]
    with contextlib.suppress(OSError):
        for path in target.absolute().parent.iterdir():
            if path.name.startswith(f"{name}-"):
                _sweep_one(path, target)
    for root, folders, _ in os.walk(target):
        for inner in [inner for inner in folders if NAME.fullmatch(inner)]:
            folders.remove(inner)
            _sweep_one(Path(root, inner), None)
        if not deep:
            break


def _sweep_one(path: Path, target: Path | None) -> None:
    if not NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return
    with contextlib.suppress(OSError):  # a live process's, or gone already
        lock = hold(path)
        if lock is None:
            return
        if path.name.endswith(OLD) and target is not None and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)

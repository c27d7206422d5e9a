"""Temporary folders next to the file or folder that they are made for: `.NAME.prism-XXXXXXXX`.

Each is locked by its process as long as the process lives. A temporary folder without a lock was left by a process that
died, and is removed by the next run (`sweep`).
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
    """Swap two names in one atomic step; False if the system or the file system does not support it."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(cwd, os.fsencode(one), cwd, os.fsencode(other), exchange) == 0


def name_beside(target: Path, end: str = "") -> Path:
    name = target.absolute().name.encode()[:200].decode(errors="ignore")  # the longest name has 255 bytes
    return target.absolute().with_name(f".{name}.prism-{os.urandom(4).hex()}{end}")


def folder_beside(target: Path, shared: bool = False) -> tuple[Path, int | None]:
    """A new folder next to `target`, and the lock on it (None if the system has no locks); `shared`: as in `hold`."""
    while True:
        path = name_beside(target)
        try:
            path.mkdir()
            # Another process may sweep the folder before it is locked here; then try again.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = hold(path, shared)
                _own.add(path)
                if lock is None or path.stat().st_ino == os.fstat(lock).st_ino:
                    return path, lock
                os.close(lock)
        except BaseException:
            remove(path)
            raise


def remove(folder: Path) -> None:
    """Delete a folder and its content, also if a signal interrupts it; what cannot be deleted stays."""
    _own.discard(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def scratch(target: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; it is deleted at the end, or after a kill by the next run.

    shared: with a shared lock, which `is_made_elsewhere` does not count as another process's work.
    """
    temporary, lock = folder_beside(target, shared)
    try:
        yield temporary
    finally:
        remove(temporary)
        release(lock)


def hold(folder: Path, shared: bool = False) -> int | None:
    """Lock a folder while this process lives and keeps the descriptor; None if the file system has no locks.

    `shared`: other processes may hold a shared lock too. Raises BlockingIOError if it is locked already.
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


def is_alone(lock: int | None) -> bool:
    """True if no other process shares a lock, which is exclusive from then on; also where there are no locks."""
    if lock is None:
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def release(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def is_made_elsewhere(target: Path) -> bool:
    """True if another process is working on a folder that will be renamed to `target`."""
    name = name_beside(target).name.rpartition("-")[0]
    with contextlib.suppress(OSError):
        for path in target.absolute().parent.iterdir():
            if path.name.startswith(f"{name}-") and NAME.fullmatch(path.name) and path not in _own:
                try:
                    release(hold(path, shared=True))
                except BlockingIOError:
                    return True
                except OSError:  # deleted meanwhile
                    continue
    return False


def sweep(target: Path, deep: bool = False) -> None:
    """Remove temporary folders that dead processes left for `target`: next to it, and in it (`deep`: at any depth).

    A folder is removed if its name matches `NAME` and no process holds its lock. If a replacement was interrupted
    between its two renames, the old folder gets its name back.
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
    with contextlib.suppress(OSError):  # locked by a live process, or deleted meanwhile
        lock = hold(path)
        if lock is None:
            return
        if path.name.endswith(OLD) and target is not None and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)

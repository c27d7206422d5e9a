"""Files and folders that are written completely or not at all, and checked when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism import temporary
from prism.errors import PrismError, quoted

if TYPE_CHECKING:
    from torch import Tensor


def check_new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse an output folder that holds something (unless `overwrite`) or cannot be made; return it as a path.

    Commands call this before the first expensive step, so that a typo in a path does not cost a finished run. An empty
    folder counts as new. Temporary folders that dead processes left next to it are removed.
    """
    target = check_place(path)
    if target.exists():
        if not overwrite and not is_empty(target):
            raise PrismError(
                f"The output folder {shown(target)} exists already; choose another --out, or replace it with "
                "--overwrite."
            )
        if target.resolve() == Path.cwd() or target.resolve() in Path.cwd().parents:
            raise PrismError(
                f"The output folder {shown(target)} holds the current directory and cannot be replaced; choose another "
                "--out."
            )
        if os.path.ismount(target):
            raise PrismError(
                f"The output folder {shown(target)} is a mount point and cannot be replaced; name a folder inside it "
                "with --out."
            )
    try:
        with temporary.scratch(target, shared=True):
            pass
    except OSError as error:
        raise _unmakeable(target, error) from error
    return target


def check_place(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that cannot be a folder or is a file; make its parent folder; return it as a path.

    Temporary folders that dead processes left next to it and in it are removed (`temporary.sweep`).
    """
    try:
        target = Path(path)
        if ".." in target.parts:  # the path may lead through the folder that will be replaced
            target = Path(os.path.realpath(target))
        os.fspath(target).encode()  # must be writable in reports and messages
    except (TypeError, ValueError, OSError) as error:
        raise PrismError(
            f"The output folder {quoted(path, 120)} is no path of plain text; name another --out."
        ) from error
    if not target.absolute().name:
        raise PrismError(f"The output folder {target} cannot be replaced; name a folder inside it with --out.")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise _unmakeable(target, error) from error
    if mode is not None and not stat.S_ISDIR(mode):
        raise PrismError(f"The output path {shown(target)} exists and is not a folder; choose another --out.")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RecursionError) as error:
        raise _unmakeable(target, error) from error
    temporary.sweep(target)
    return target


def _unmakeable(target: Path, error: OSError | ValueError | RecursionError) -> PrismError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return PrismError(
        f"The output folder {shown(target)} cannot be made in {shown(target.absolute().parent)}: {reason}."
    )


def shown(path: str | os.PathLike[str]) -> str:
    """A path for an error message; if it is longer than 120 characters, its middle is left out."""
    text = "".join(character if character.isprintable() else "?" for character in os.fspath(path))
    return text if len(text) <= 120 else f"{text[:70]}...{text[-45:]}"


def is_empty(folder: Path) -> bool:
    """True for a folder that is missing or holds nothing."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike[str], overwrite: bool = False, discard: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which is synced to disk and renamed to `path` if the block succeeds.

    On any exception (Ctrl-C included) the temporary folder is removed, and an existing folder at `path` stays.
    An existing folder that is not empty is refused unless `overwrite`, and then replaced only at the very end; on Linux
    in one atomic step, so that even a kill leaves either the old or the new folder.
    Files get the permissions that the user's umask gives. Raises `PrismError` on entry, before any work.

    discard: function that removes the replaced folder; None: it is deleted with its content.
    """
    target = check_new_folder(path, overwrite)
    work, lock = temporary.folder_beside(target)
    inode = work.stat().st_ino
    try:
        yield work
        open_to_readers(work)
        sync_tree(work)
        _publish(work, target, overwrite, discard)
        _sync(target.absolute().parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            if work.stat().st_ino == inode:
                temporary.remove(work)
            else:  # the names were exchanged: this is the old folder
                (discard or temporary.remove)(work)
        temporary.release(lock)


def publish(folder: Path, target: Path, discard: Callable[[Path], object] | None = None) -> None:
    """Replace `target` by a finished folder next to it; a kill leaves either the old or the new one."""
    open_to_readers(folder)
    sync_tree(folder)
    _publish(folder, target, True, discard)
    if folder.exists():  # the names were exchanged: this is the old folder
        (discard or temporary.remove)(folder)
    _sync(target.absolute().parent)


def _publish(work: Path, target: Path, overwrite: bool, discard: Callable[[Path], object] | None) -> None:
    if not overwrite or is_empty(target):
        with contextlib.suppress(OSError):
            if os.name == "nt":  # other systems replace an empty folder
                target.rmdir()
        try:
            os.replace(work, target)
        except OSError as error:
            if is_empty(target):
                raise
            raise appeared(work, target) from error
        return
    if temporary.exchange(work, target):
        return
    old = temporary.name_beside(target, temporary.OLD)
    os.replace(target, old)  # after a kill here nothing is at `target`: the next run puts the old one back (sweep)
    try:
        os.replace(work, target)
    except BaseException:
        os.replace(old, target)
        raise
    (discard or temporary.remove)(old)


def appeared(work: Path, target: Path) -> PrismError:
    """Keep the finished work next to `target`, and return the error that says where: `target` appeared meanwhile."""
    kept = target.with_name(
        f"{temporary.name_beside(target).name[1:].partition('.prism-')[0]}.kept-{os.urandom(2).hex()}"
    )
    work.rename(kept)
    return PrismError(
        f"The output folder {shown(target)} appeared while this run was working; what the run made is in {shown(kept)}."
    )


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path of the same name that replaces `path` if the block succeeds: no reader sees half a file.

    The file gets the permissions that the user's umask gives (safetensors writes files that only the owner can read).
    """
    target = Path(path)
    with temporary.scratch(target) as work:
        yield work / target.name
        open_to_readers(work)
        os.replace(work / target.name, target)


def open_to_readers(folder: Path) -> None:
    """Give every file below `folder` the permissions that a plain new file gets under the user's umask."""
    mode = 0o666 & ~_umask()
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if not path.is_symlink() and (present := stat.S_IMODE(path.stat().st_mode)) | mode != present:
                path.chmod(present | mode)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk, so that a later rename publishes complete files."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # Linux shows the umask in /proc; on other systems it can only be read by setting it, for all threads.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="ignore").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON under a temporary name, then rename: a reader never sees half a file.

    NaN and infinity are refused (`ValueError`): they are not JSON, and a metric that is not a number is a bug.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_file(path) as work:
        work.write_text(text, encoding="utf-8")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse, before it is opened, a path that is not a regular file: reading a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise PrismError(f"The file {path} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        raise PrismError(f"The file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise PrismError(f"The file {path} cannot be read: it is a {kind}.")
    if not os.access(path, os.R_OK):  # libraries would report a missing or damaged file
        raise PrismError(f"The file {path} cannot be read: permission denied.")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises `PrismError` if it is missing, unreadable or not JSON."""
    check_regular(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PrismError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else quoted(error, 120)
        raise PrismError(f"The file {path} is not valid JSON ({reason}); it may be truncated or altered.") from error


def ends(path: str | os.PathLike[str]) -> tuple[int, bytes]:
    """The size of a file, and its first and last 64 KiB: what tells a changed file without reading all of it."""
    check_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        first = stream.read(1 << 16)
        stream.seek(max(0, size - (1 << 16)))
        return size, first + stream.read(1 << 16)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises `PrismError` if it cannot be read."""
    check_regular(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise PrismError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load every tensor of a safetensors file on the CPU.

    Raises `PrismError` if the file is missing, truncated, a pickle, not safetensors, or holds NaN or infinity.
    Nothing is ever unpickled.
    """
    import torch
    from safetensors.torch import load_file

    check_regular(path)
    with safetensors_told(Path(path)):
        tensors = load_file(path)
    for name, tensor in tensors.items():
        numbers = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor  # float8
        if not bool(torch.isfinite(numbers).all()):
            raise PrismError(
                f"The tensor {quoted(name, 80)} in {path} holds NaN or infinity; the file is damaged or its training "
                "diverged."
            )
    return tensors


def safetensors_header(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype ("F32", "BF16", ...) and shape of every tensor of a safetensors file, which is not loaded.

    Raises `PrismError` as `load_safetensors` does, but does not check the numbers.
    """
    from safetensors import safe_open

    check_regular(path)
    header = {}
    with safetensors_told(Path(path)), safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no dict
            view = opened.get_slice(name)
            header[name] = (str(view.get_dtype()), tuple(view.get_shape()))
    return header


@contextlib.contextmanager
def safetensors_told(file: Path) -> Iterator[None]:
    """Turn errors of reading a safetensors file in the block into a PrismError."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        raise PrismError(f"The file {file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # SafetensorError, and other errors for a corrupt header
        if _looks_like_pickle(file):
            raise PrismError(
                f"The file {file} is a pickle, which is never loaded; convert it to safetensors first."
            ) from error
        raise PrismError(
            f"The file {file} is not a whole safetensors file ({quoted(error, 120)}); it is truncated or altered."
        ) from error


def _looks_like_pickle(path: Path) -> bool:
    """Zip archives (torch.save) start with PK, bare pickles of protocol 2 and later with 0x80 and the protocol."""
    with open(path, "rb") as stream:
        start = stream.read(4)
    return start.startswith(b"PK\x03\x04") or (len(start) > 1 and start[0] == 0x80 and start[1] <= 5)

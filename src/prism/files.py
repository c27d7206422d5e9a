"""Files and folders that appear whole, or not at all, and are checked when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism.checks import quoted
from prism.errors import PrismError

if TYPE_CHECKING:
    from torch import Tensor


def check_new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse an output folder that exists (unless `overwrite`) or whose parent cannot be written; return it as a path.

    Commands call this before the first expensive step, so that a run is not lost to a typo at its end.
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PrismError(f"The output path {target} exists and is not a folder; choose another --out.")
    if target.exists() and not overwrite:
        raise PrismError(
            f"The output folder {target} exists already; choose another --out, or replace it with --overwrite."
        )
    if target.exists() and (target.resolve() == Path.cwd() or target.resolve() in Path.cwd().parents):
        raise PrismError(
            f"The output folder {target} holds the current directory and cannot be replaced; choose another --out."
        )
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-"):
            pass
    except OSError as error:
        raise PrismError(
            f"The output folder {target} cannot be made in {parent}: {error.strerror or error}."
        ) from error
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its name, synced to disk, once the block ends well.

    On any exception (Ctrl-C included) the temporary folder is removed, and what stood at `path` before stays.
    An existing folder is refused unless `overwrite`, and then replaced only at the very end.
    Raises `PrismError` on entry, before any work.
    """
    target = check_new_folder(path, overwrite)
    parent = target.absolute().parent
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        sync_tree(temporary)
        _publish(temporary, target, overwrite)
        _sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    if overwrite and target.exists():
        old = Path(tempfile.mkdtemp(dir=temporary.parent, prefix=f".{target.name}-old-"))
        os.replace(target, old)
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.replace(temporary, target)
    except OSError as error:  # another process made a non-empty folder of this name meanwhile
        raise PrismError(
            f"The output folder {target} appeared while this run was working; choose another --out."
        ) from error


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk, so that a rename that follows publishes whole files."""
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
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON under a temporary name, then rename: a reader never sees half a file.

    NaN and infinity are refused (`ValueError`): they are not JSON, and a metric that is not a number is a bug.
    """
    target = Path(path)
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse, before it is opened, what is no regular file: a reader of a pipe or of a device may never come back."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise PrismError(f"The file {path} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        raise PrismError(f"The file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise PrismError(f"The file {path} cannot be read: it is a {kind}.")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises `PrismError` where it is missing, unreadable or not JSON."""
    check_regular(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PrismError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        reason = quoted(error, 120)
        raise PrismError(f"The file {path} is not valid JSON ({reason}); it may be truncated or altered.") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises `PrismError` where it cannot be read."""
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

    Raises `PrismError` where the file is missing, truncated, a pickle, no safetensors at all, or holds NaN or infinity.
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

    Raises `PrismError` as `load_safetensors` does, but for the numbers.
    """
    from safetensors import safe_open

    check_regular(path)
    found = {}
    with safetensors_told(Path(path)), safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no dict
            view = opened.get_slice(name)
            found[name] = (str(view.get_dtype()), tuple(view.get_shape()))
    return found


@contextlib.contextmanager
def safetensors_told(file: Path) -> Iterator[None]:
    """What is wrong with a safetensors file that is read in the block, said in a sentence."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        raise PrismError(f"The file {file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # SafetensorError, and others where a header says what no writer would
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

"""A run's folder: claimed by one process, refused to another configuration, resumed part by part, published.

Only this module does this. A folder is *vacant* if it is missing or empty, or holds only the configuration of a run
that died at its start: any run may begin there. A file that no run makes belongs to the user and is never deleted: a
folder that holds such a file is refused, and a file that appears while a run works stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism import files, temporary
from prism.errors import PrismError, first_difference, without

CONFIG, IDENTITY = "config.json", "identity.json"
# Names of the files that runs make, besides those that a run lists as `files` in its config.json and pieces of `Parts`.
_OURS = re.compile(
    r"(config|metrics|history|identity|manifest|call|quality|training|training-log|store|state|cache|calibration)\.json"
    r"|(evaluation|reference|plans?)\.json"
    r"|(videos|pairs|index|votes|ratings|(test|validation|unseen)-[\w-]+)\.parquet|seals\.json"
    r"|\d{6}-[0-9a-f]{12}\.(parquet|safetensors)|(shared-)?[0-9a-f]{64}\.safetensors"  # a store's shards, conditionings
    r"|report\.html|study\.md|README\.md|winner(-\d+)?\.(mp4|png|wav)|((vae|transformer)-)?(log\.jsonl|config\.json)"
    r"|(model|state|scores|(latents|trajectory|step)-\d+|\d{5}|diffusion_pytorch_model)\.safetensors"
    r"|[0-9a-f]{32}(\.npy|\.\d+\.partial)"  # decoded frames
    r"|events\.out\.tfevents\.[\w.-]+|hparams\.yml"  # of TensorBoard
)


# -- folders that a command makes in one go, without resuming


def check(out: str | os.PathLike[str], overwrite: bool, kind: str) -> Path:
    """Refuse, before any work, an output folder that a new run cannot replace; return it as a path.

    kind: the kind of run (`kind_of`); with `overwrite` only a folder of this kind may be replaced.
    """
    out = files.check_place(out)
    if temporary.is_made_elsewhere(out):
        raise _busy(out)
    if out.exists() and (out.stat().st_dev, out.stat().st_ino) not in _held:
        _hold(out).release()  # raises if another process works in it
    if overwrite and not is_vacant(out):
        check_replaceable(out, kind)
    return files.check_new_folder(out, overwrite or is_vacant(out))


@contextlib.contextmanager
def new(out: str | os.PathLike[str], overwrite: bool, kind: str) -> Iterator[Path]:
    """Yield a folder for a run's work, which is renamed to `out` if the block succeeds.

    Like `files.new_folder`, but replaces only a run of the same kind, and never a user's file.
    """
    out = check(out, overwrite, kind)
    with files.new_folder(out, overwrite or is_vacant(out), discard) as folder:
        yield folder
        note_files(folder)
        if not overwrite and not is_vacant(out):
            files.open_to_readers(folder)
            raise files.appeared(folder, out)


def publish(work: Path, out: Path) -> None:
    """Replace `out` by a finished run's folder next to it; a kill leaves either the old or the new one."""
    note_files(work)
    files.publish(work, out, discard)


def note_files(folder: Path) -> None:
    """List the files that a finished run made in its config.json, to tell them from a user's files."""
    config = _read(folder / CONFIG)
    if config is not None and "format" not in config:
        made = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files.write_json(folder / CONFIG, {**config, "files": made})


def kind_of(folder: Path) -> str | None:
    """The kind of run that made a folder: its command's name, or prism-head, store, ...; None if no run made it."""
    for name in ("metrics.json", CONFIG):
        config = _read(folder / name) or {}
        kind = config.get("command") or config.get("format")
        if isinstance(kind, str):
            return kind
    marks = {"store.json": "store", "quality.json": "quality", "training.json": "weaker", IDENTITY: "parts"}
    return next((kind for name, kind in marks.items() if _read(folder / name) is not None), None)


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace a folder that no run of this kind made, or that holds a user's file."""
    held = kind_of(folder)
    if held != kind:
        names = {None: "nothing that PRISM made", "store": "a latent store", "parts": "parts of a run"}
        names |= {"prism-head": "a head", "weaker": "a backbone", "quality": "measurements of a backbone"}
        raise PrismError(
            f"The folder {files.shown(folder)} holds {names.get(held, f'a run of {held}')}, so it is not replaced; "
            "choose another --out."
        )
    _refuse_foreign(folder)


def is_vacant(folder: Path, besides: Sequence[str] = ()) -> bool:
    """True for a folder in which a run may begin (see above); files in its folders `besides` do not count."""
    left = [path for path in _files(folder) if path.relative_to(folder).parts[0] not in besides]
    return not left or (
        all(path.parent == folder and path.name in (CONFIG, IDENTITY) for path in left) and kind_of(folder) is not None
    )


def foreign(folder: Path) -> Path | None:
    """The first file below a folder that no run made; None if there is none."""
    listed = _listed(folder)
    return next((path for path in _files(folder) if not _is_ours(path, folder, listed)), None)


def discard(folder: Path) -> None:
    """Delete the files that runs made in a folder, and the folder. A user's file stays, and a warning says where."""
    _clear(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()
    if folder.exists() and temporary.NAME.fullmatch(folder.name):  # a user's file appeared while it was replaced
        name = folder.with_name(f"{folder.name[1:].partition('.prism-')[0]}.kept-{os.urandom(2).hex()}")
        folder = folder.rename(name)
    if folder.exists():
        warnings.warn(f"The folder {folder} holds files that no run made; they were left there.", stacklevel=3)


def _clear(folder: Path) -> None:
    """Delete the files that runs made in a folder."""
    listed = _listed(folder)
    for path in list(_files(folder)):
        if _is_ours(path, folder, listed):
            path.unlink(missing_ok=True)
    for root, _, _ in os.walk(folder, topdown=False):
        if Path(root) != folder:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(root)


def _files(folder: Path) -> Iterator[Path]:
    """All files and links below a folder, links to folders included."""
    for root, folders, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
        yield from (path for path in (Path(root, name) for name in folders) if path.is_symlink())


def _listed(folder: Path) -> set[str]:
    """The files that a finished run listed (`note_files`); none for an unfinished run."""
    names = (_read(folder / CONFIG) or {}).get("files")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _is_ours(path: Path, folder: Path, listed: set[str]) -> bool:
    if path.is_symlink():
        return False
    if listed and path.parent.parent.name != "conditionings":  # a finished run lists its files; these come later
        return path.relative_to(folder).as_posix() in listed
    if path.stem == "state":  # in a checkpoint's folder, not in a user's copy of one
        return re.fullmatch(r"step-\d{8}|\.step-\d{8}\.prism-[0-9a-f]{8}", path.parent.name) is not None
    return bool(_OURS.fullmatch(path.name)) or (path.suffix == ".json" and "seconds" in (_read(path) or {}))


def _refuse_foreign(folder: Path) -> None:
    path = foreign(folder)
    if path is not None:
        raise PrismError(
            f"The folder {files.shown(folder)} holds {files.shown(path.relative_to(folder))}, which no run made; move "
            "it away, or choose another --out."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none."""
    try:
        content = files.read_json(path) if path.is_file() else None
    except PrismError:
        return None
    return content if isinstance(content, dict) else None


# -- folders in which a run works, and which it can continue after a kill


class Parts:
    """A run's folder and the finished pieces in it, held by this process until it ends or `release` is called.

    A piece is done if its file or folder exists: it is written completely or not at all, so that a kill loses only the
    piece that was being made. resumed: True if the folder held a run before. Without a lock the folder is not held, as
    in all but the first of several processes. made: True if the folder was not there before.
    """

    made = False

    def __init__(self, folder: str | os.PathLike[str], resumed: bool = False, lock: int | None = None) -> None:
        self.folder, self.resumed, self.lock = Path(folder), resumed, lock

    def has(self, name: str) -> bool:
        """True if a piece exists. name: its path in the folder, with suffix."""
        return (self.folder / name).exists()

    def once(self, name: str, make: Callable[[], Mapping[str, Any] | None]) -> dict[str, Any]:
        """Return the result of `make`, from `name`.json if it was made before; its wall time is added as "seconds".

        `make` may write files into the folder: they must be complete before it returns.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            made = dict(make() or {})
            files.write_json(path, {**made, "seconds": time.perf_counter() - started})
        return files.read_json(path)

    def piece(self, name: str, make: Callable[[Path], object], read: Callable[[Path], Any] = Path) -> Any:
        """Return the result of `read` on a piece's path; `make` writes the piece first if it is missing.

        name: the path of a file in the folder, or of a folder if it ends in "/". A piece for which `read` raises a
        `PrismError` is made again, with a warning.
        """
        path = self.folder / name
        if path.exists():
            try:
                return read(path)
            except PrismError as error:
                warnings.warn(f"{error} It is made anew.", stacklevel=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.new_folder(path, True) if name.endswith("/") else files.new_file(path) as work:
            make(work)
        return read(path)

    def release(self) -> None:
        """Release the folder to other processes."""
        lock, self.lock = self.lock, None
        if lock is not None:
            os.close(lock)

    __del__ = release

    def remove(self) -> None:
        """Delete the pieces and release the folder; a user's file among them stays."""
        discard(self.folder)
        self.release()


_held: weakref.WeakValueDictionary[tuple[int, int], Parts] = weakref.WeakValueDictionary()


def claim(
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    resume: bool = False,
    restart: bool = False,
    main: bool = True,
    name: str = CONFIG,
    changeable: Sequence[str] = (),
    besides: Sequence[str] = (),
    shared: bool = False,
) -> Parts:
    """Make a run's folder, or check that it holds this run, and hold it as long as the returned object lives.

    Args:
        folder: if missing or vacant, a run begins; else it must hold this run, and `resume` or `restart` must be set.
        identity: what the run depends on, as JSON; kept in the folder's file `name`, which identifies the run.
        resume: continue the run in the folder.
        restart: delete a run of another configuration, and begin; a run of this configuration is continued.
        main: False in all but the first of several processes; then nothing is checked, made or held.
        changeable: names in `identity` ("a.b": b of the object a) that may differ from those of the run in the folder,
            because its results do not depend on them; the file keeps the old values.
        besides: folders in it that may exist before a run begins.
        shared: hold it together with other processes that work in it; none of them may restart it.

    Raises:
        PrismError: for a folder that holds something else or cannot be made, a run of another configuration (the first
            difference is named), an existing run without `resume`, or a folder that another process works in.
    """
    folder = Path(folder)
    if not main:
        return Parts(folder)
    folder = files.check_place(folder)
    new = json.loads(json.dumps(dict(identity), allow_nan=False))
    was_there = folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        held = _enter(_hold(folder, shared), new, resume, restart and not shared, name, changeable, besides)
        held.made = not was_there
        return held
    except OSError as error:
        with contextlib.suppress(OSError):
            if not was_there:
                folder.rmdir()
        raise PrismError(
            f"The output folder {files.shown(folder)} cannot be written: {error.strerror or error}."
        ) from error


def _enter(
    held: Parts,
    new: dict[str, Any],
    resume: bool,
    restart: bool,
    name: str,
    changeable: Sequence[str],
    besides: Sequence[str],
) -> Parts:
    """Begin the run `new` in a held folder, or continue the run in it; arguments as in `claim`."""
    folder, path, command = held.folder, held.folder / name, new.get("command")
    held.resumed = False
    if is_vacant(folder, besides):
        if _read(path) != new:
            files.write_json(path, new)
        return held
    old = _read(path)
    if old is None or (name == CONFIG and old.get("command", command) != command):
        holds = "parts of a run" if name == IDENTITY else f"run of {new.get('command', 'this kind')}"
        raise PrismError(
            f"The folder {files.shown(folder)} exists already and holds no {holds}; move it away, or choose another "
            "--out."
        )
    temporary.sweep(folder, deep=True)
    old, now = (without(each, ("command", "files", "options", *changeable)) for each in (old, new))
    different = [key for key in {**now, **old} if old.get(key) != now.get(key)]
    if not different and (resume or restart):
        held.resumed = True
        return held
    if restart:
        _refuse_foreign(folder)
        print(f"prism: deleting the run in {folder}, which is of another configuration", file=sys.stderr)
        _clear(folder)
        files.write_json(path, new)
        return held
    if not resume:
        raise PrismError(
            f"The output folder {files.shown(folder)} exists already; choose another --out, or continue with --resume."
        )
    key = different[0]
    raise PrismError(
        f"The run in {files.shown(folder)} differs in {key}: {first_difference(old.get(key), now.get(key))}; "
        "continue it with its own settings, choose another --out, start again with --overwrite if it has one, or "
        "delete the folder."
    )


def _hold(folder: Path, shared: bool = False) -> Parts:
    """Hold a folder; if this process holds it already, return that object."""
    status = folder.stat()
    held = _held.get((status.st_dev, status.st_ino))
    if held is not None and held.lock is not None:
        return held
    try:
        held = Parts(folder, False, temporary.hold(folder, shared))
    except BlockingIOError:
        raise _busy(folder) from None
    _held[status.st_dev, status.st_ino] = held
    return held


def _busy(folder: Path) -> PrismError:
    return PrismError(f"Another process is working in {files.shown(folder)}; wait for it, or choose another --out.")


def abandon(folder: Path) -> None:
    """Delete a vacant folder; others stay."""
    if folder.is_dir() and not folder.is_symlink() and is_vacant(folder):
        temporary.sweep(folder)
        discard(folder)


def parts_of(out: str | os.PathLike[str]) -> Path:
    """The folder of a run's parts until its folder `out` is complete: `<out>.parts`."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}.parts")


class Clock:
    """Progress of a long loop for logs: at most one line per `every` seconds, with the time left."""

    def __init__(self, what: str, total: int, every: float = 300.0) -> None:
        self.what, self.total, self.every = what, total, every
        self.start = self.last = time.monotonic()
        self.worked = 0

    def tick(self, done: int, worked: bool, more: str = "") -> None:
        """Count a step: `done` of the total are done. worked: this one took work, as it was not on disk already.
        more: text after the count.
        """
        self.worked += worked
        if (now := time.monotonic()) - self.last >= self.every and self.worked:
            self.last = now
            left = (now - self.start) / self.worked * (self.total - done) / 60
            plural = "s" * (round(left) != 1)
            line = f"prism: {self.what}: {done} of {self.total}{more}, about {left:.0f} minute{plural} left"
            print(line, file=sys.stderr, flush=True)

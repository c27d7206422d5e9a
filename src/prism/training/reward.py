"""Reward functions that label videos: found by name, called within a time limit, their answers checked.

A reward is any callable. It is called in one of two ways, by the names of its arguments:

    one video:  reward(video, prompt=...)               -> a number, or a dict of numbers by dimension
    a batch:    reward(videos=[...], prompts=[...])     -> a list of those, or a dict of lists by dimension

A video is its decoded frames, a NumPy array (T, H, W, 3) of uint8. `prompt=` and `fps=` (frames per second, or None)
are passed if the callable has arguments of these names. Its attributes `name` and `dimensions` are used if it has them.
A class is called once without arguments, and the instance is the reward.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from prism.clips import CLIP_FACTS
from prism.errors import PrismError, instance, number, quoted, reason
from prism.preference.pairs import PAIR_COLUMNS
from prism.preference.shards import ROW_COLUMNS

TIMEOUT = 600.0  # seconds that one call may take
_RESERVED = {*PAIR_COLUMNS, *ROW_COLUMNS, *CLIP_FACTS, "shard"}  # columns of a store
_NAME = re.compile(r"[\w-]+")
_PACKAGE = Path(__file__).parents[1]


class Reward:
    """A callable that scores videos.

    Args:
        function: called as above.
        name: of the reward in a store: letters, digits, _ and -.
        timeout: seconds that a call may take; None: any time.
        source: the function, as FILE.py:function; a resumed labelling must have the same.
        version: a hash of the function's file.
        dimensions: of its scores, if they are known before it is called.
        needs_fps: True if the frames per second are required, though the function has a default for them.
        check_prompts: raises ValueError for prompts that the function cannot judge; asked before anything is sampled.
        unclear: True if NaN in all dimensions is a valid answer and means that a video has no score, as of teachers
            that write text.

    Raises:
        PrismError: for an object that cannot be called in one of the two ways.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, timeout: float | None = TIMEOUT, source: str = "",
        version: str = "", dimensions: Sequence[str] | None = None, unclear: bool = False, needs_fps: bool = False,
        check_prompts: Callable[[Sequence[str]], Any] | None = None,
    ) -> None:  # fmt: skip
        if not callable(function):
            raise PrismError(f"The reward {quoted(name, 80)} is {_shown(function)}; a function is needed.")
        instance("The name of a reward", name, str, "a text")
        if not _NAME.fullmatch(name):
            raise PrismError(
                f"The name of a reward is {quoted(name, 60)!r}; letters, digits, _ and - are allowed, as in "
                "--reward NAME=FILE.py:function."
            )
        self.name, self.timeout = name, timeout
        self.source, self.version = source or name, version
        self.function = function
        self.dimensions: tuple[str, ...] | None = None
        self._batched, self._takes = _form(function, name)
        fps = inspect.signature(function).parameters.get("fps") if "fps" in self._takes else None
        self.needs_fps = fps is not None and fps.default is inspect.Parameter.empty
        self._has_fps = fps is not None and not self.needs_fps
        self.needs_fps |= needs_fps
        self.unclear, self.check_prompts = unclear, check_prompts
        dimensions = dimensions or getattr(function, "dimensions", None)
        if isinstance(dimensions, list | tuple) and dimensions:
            self.dimensions = tuple(self._checked(each) for each in dimensions)
        self._worker: _Worker | None = None
        self.load: Callable[[], Reward] | None = None
        """A function that loads this reward in another process. It is pickled in place of the reward, as a function
        from a file cannot be pickled; None: the reward itself is pickled."""

    def __reduce__(self) -> Any:
        return (_unpacked, ({**vars(self), "_worker": None},)) if self.load is None else (self.load, ())

    def __repr__(self) -> str:
        return f"Reward({self.name})"

    def score(
        self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float | None = None,
        names: Sequence[str] = (),
    ) -> list[dict[str, float]]:  # fmt: skip
        """Scores of each video, by dimension; a single number is the dimension "overall". NaN only if `unclear`.

        Args:
            videos: (T, H, W, 3) uint8 each.
            prompts: one per video.
            fps: frames per second, if known.
            names: of the videos in errors; by default their positions.

        Raises:
            PrismError: naming function, prompt and video, where the function raises, takes too long, or answers with
                anything but finite numbers, always in the same dimensions.
        """
        names = names or [str(position) for position in range(len(videos))]
        extra = {"fps": fps} if "fps" in self._takes and not (fps is None and self._has_fps) else {}
        if self._batched:
            named: dict[str, Any] = {"videos": list(videos), "prompts": list(prompts), **extra}
            answers = self._rows(self._call(named, names, prompts), names, prompts)
        else:
            answers = []
            for video, prompt, name in zip(videos, prompts, names):
                named = {"prompt": prompt, **extra} if "prompt" in self._takes else extra
                answers.append(self._call(named, [name], [prompt], video))
        return [self._answer(answer, name, prompt) for answer, name, prompt in zip(answers, names, prompts)]

    def _call(self, named: Mapping[str, Any], names: Sequence[str], prompts: Sequence[str], *args: Any) -> Any:
        if self._worker is None:
            self._worker = _Worker(self.name)
        try:
            return self._worker.call(lambda: self.function(*args, **named), self.timeout)
        except TimeoutError:
            self._worker = None  # the thread is lost with the call
            raise self._wrong(f"did not answer within {self.timeout:g} seconds", names, prompts) from None
        except KeyboardInterrupt:
            raise
        except PrismError as error:
            fps = " (--fps)" if "frames per second" in str(error) else ""
            raise self._wrong(f"raised: {quoted(error, 200).rstrip('.')}{fps}", names, prompts) from error
        except BaseException as error:  # also SystemExit of a script's own
            raise self._wrong(f"raised {reason(error, 160)}", names, prompts, _line(error, self.function)) from error

    def _rows(self, answers: Any, names: Sequence[str], prompts: Sequence[str]) -> list[Any]:
        """One answer per video of a batch."""
        answers = _plain(answers)
        if isinstance(answers, Mapping):
            columns = {each: _plain(values) for each, values in answers.items()}
            if all(isinstance(values, list) and len(values) == len(names) for values in columns.values()):
                return [{each: values[row] for each, values in columns.items()} for row in range(len(names))]
        elif isinstance(answers, list | tuple) and len(answers) == len(names):
            return list(answers)
        actual = f"{len(answers)} of them" if isinstance(answers, list | tuple) else _shown(answers)
        raise self._wrong(f"must answer with a row for each of {len(names)} videos, and gave {actual}", names, prompts)

    def _answer(self, answer: Any, name: str, prompt: str) -> dict[str, float]:
        answer = _plain(answer)
        row = answer if isinstance(answer, Mapping) else {"overall": answer}
        if self.unclear and row and all(isinstance(value, float) and value != value for value in row.values()):
            return dict.fromkeys(self.dimensions or row, math.nan)
        scores: dict[str, float] = {}
        for dimension, value in row.items():
            try:
                scores[self._checked(dimension)] = number("the score", _plain(value))
            except PrismError as error:
                if "the score" not in str(error):
                    raise
                of = f" for {quoted(dimension, 40)}" if isinstance(answer, Mapping) else ""
                raise self._wrong(
                    f"gave {_shown(value)}{of} where a finite number is needed", [name], [prompt]
                ) from None
        if self.dimensions is None and scores:
            self.dimensions = tuple(scores)
        if not scores or set(scores) != set(self.dimensions or ()):
            expected = ", ".join(self.dimensions or ()) or "one at least"
            raise self._wrong(
                f"gave the dimensions {quoted(', '.join(scores) or 'none', 80)} where {quoted(expected, 80)} is needed",
                [name],
                [prompt],
            )
        return {dimension: scores[dimension] for dimension in self.dimensions or ()}

    def _checked(self, dimension: Any) -> str:
        """The name of a dimension, which becomes a column of the store."""
        if not isinstance(dimension, str) or not dimension.strip() or ":" in dimension or dimension in _RESERVED:
            raise PrismError(
                f"The reward {self.name} names a dimension {quoted(repr(dimension), 60)}; it must be a text without a "
                "colon, and no column of a store such as prompt or seed."
            )
        return dimension

    def _wrong(self, what: str, names: Sequence[str], prompts: Sequence[str], line: str = "") -> PrismError:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return PrismError(
            f"The reward {self.name}{line} {what}, for the video {quoted(names[0], 80)}{more} of the prompt "
            f'"{quoted(prompts[0], 80)}"; what was collected stays, and --resume goes on when the function is mended.'
        )


def _unpacked(attributes: dict[str, Any]) -> Reward:
    reward = Reward.__new__(Reward)
    vars(reward).update(attributes)
    return reward


def is_function(spec: str) -> bool:
    """True for a text that names a function, as FILE.py:function or module:function, and no weights of a teacher."""
    return re.search(r"(\.py|(^|=)[A-Za-z_][\w.]*):[A-Za-z_]\w*$", spec) is not None


def load_reward(spec: str, timeout: float | None = TIMEOUT) -> Reward:
    """The reward that a text names: `module:function` or `FILE.py:function`, either after `NAME=` to name the reward.

    The file runs as Python code: name only files that you trust.

    Raises:
        PrismError: where there is no such file, module or function, or importing it fails.
    """
    instance("A reward", spec, str, "a text such as FILE.py:function")
    name, equals, target = spec.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, target = "", spec
    where, colon, attribute = target.rpartition(":")
    if not colon or not where or not attribute.isidentifier():
        raise PrismError(
            f'The --reward "{quoted(spec, 120)}" names no function and no teacher; write FILE.py:function, '
            "module:function, or the name of a teacher (docs/teachers.md lists them)."
        )
    module = _from_file(where) if where.endswith(".py") else _imported(where)
    if not hasattr(module, attribute):
        public = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(attribute, public, 3) or public[:5]
        has = f"it has {quoted(', '.join(near), 120)}" if near else "it has none"
        raise PrismError(f"There is no function {quoted(attribute, 60)} in {quoted(where, 120)}; {has}.")
    function = getattr(module, attribute)
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            line = _line(error, function)
            raise PrismError(f"The reward {quoted(target, 120)}{line} could not be made: {reason(error)}.") from error
    chosen = name or getattr(function, "name", None) or attribute
    return Reward(function, str(chosen), timeout, target, _digest(module))


def _from_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise PrismError(f"The file {quoted(path, 160)} of the --reward does not exist; give a path to a Python file.")
    folder = str(file.absolute().parent)
    if folder not in sys.path:  # so that the file can import modules beside it
        sys.path.append(folder)
    name = f"prism_reward_{hashlib.sha256(str(file.absolute()).encode(errors='surrogatepass')).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # it is a .py file
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        line = _line(error, module)
        raise PrismError(f"The --reward file {quoted(path, 120)}{line} cannot be run: {reason(error)}.") from error
    return module


def _imported(name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m` has it
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PrismError(f"The --reward module {quoted(name, 120)} cannot be imported: {reason(error)}.") from error


def _line(error: BaseException, where: Any) -> str:
    """The last line of a user's code that an error came through, in words: where the function or module is, else the
    last that is not PRISM's."""
    plain = isinstance(where, ModuleType) or inspect.isroutine(where) or inspect.isclass(where)
    file = getattr(inspect.getmodule(where if plain else type(where)), "__file__", None) or ""
    if Path(file).is_relative_to(_PACKAGE):
        return ""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    in_file = [line for line in lines if file and os.path.abspath(line[0]) == os.path.abspath(file)]
    others = [line for line in lines if os.path.isfile(line[0]) and not Path(line[0]).is_relative_to(_PACKAGE)]
    if not (in_file or others):
        return ""
    path, row = (in_file or others)[-1]
    return f" ({quoted(os.path.relpath(path) if Path(path).is_relative_to(os.getcwd()) else path, 100)}, line {row})"


def _shown(value: Any) -> str:
    """A foreign value in words: a text in quotes, a list by its length, another with its type."""
    if isinstance(value, str):
        return f'the text "{quoted(value, 60)}"'
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__} of {len(value)} values"
    if value is None or isinstance(value, float):
        return str(value)
    return f"{quoted(value, 60)} of type {type(value).__name__}"


def _digest(module: ModuleType) -> str:
    try:
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:16]
    except (OSError, ValueError, AttributeError):
        return ""


def _form(function: Callable[..., Any], name: str) -> tuple[bool, set[str]]:
    """The form of a function: True if it takes batches, and the arguments "prompt" and "fps" that it takes by name."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return False, {"prompt"}
    parameters = signature.parameters
    everything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    batched = {"videos", "prompts"} <= set(parameters)
    takes = {each for each in ("prompt", "fps") if everything or each in parameters}
    try:
        if batched:
            signature.bind(videos=[], prompts=[], **({"fps": None} if "fps" in takes else {}))
        else:
            signature.bind(None, **dict.fromkeys(takes))
    except TypeError as error:
        raise PrismError(
            f"The reward {name} cannot be called as {name}(video, prompt=...) or {name}(videos=..., prompts=...): "
            f"{quoted(error, 120)}; name its arguments so."
        ) from None
    return batched, takes


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists and numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.item() if getattr(value, "size", None) == 1 and getattr(value, "ndim", 1) == 0 else value.tolist()
    return value


class _Worker:
    """A thread that makes all calls of a reward, so that a call that hangs can be abandoned. It is one thread, as a
    reward's models may be bound to the thread that made them.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def call(self, function: Callable[[], Any], timeout: float | None) -> Any:
        """Return or raise the function's result in the thread. Raises TimeoutError where it takes too long."""
        self._calls.put(function)
        try:
            fine, answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if not fine:
            raise answer
        return answer

    def _work(self) -> None:
        if self._device is not None:  # the current device is per thread
            torch.cuda.set_device(self._device)
        while True:
            function = self._calls.get()
            try:
                with torch.no_grad():
                    self._answers.put((True, function()))
            except BaseException as error:
                self._answers.put((False, error))

"""The `prism` command, made from the commands' dataclasses; a user's mistake becomes one sentence on stderr."""

from __future__ import annotations

import difflib
import errno
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from prism.errors import PrismError, quoted

COMMANDS = {
    "demo": "lab:Demo",
    "sample": "sample:Sample",
    "train": "train:Train",
    "eval": "evaluate:Evaluate",
    "study": "lab:Study",
    "doctor": "doctor:Doctor",
    "shapeworld train": "lab:Train",
    "shapeworld candidates": "lab:Candidates",
    "shapeworld quality": "lab:Quality",
    "shapeworld weaker": "lab:Weaker",
}
"""Command -> module and dataclass of its options, in `prism.commands`."""
HELP = """\
usage: prism COMMAND [OPTIONS]

Judge the samples of a video diffusion model from its own hidden states, and pick the best of N early.

{commands}

  prism COMMAND --help              Every option of a command.
  prism --version                   The version.
  prism --print-completion SHELL    Completion of commands and options for bash, zsh or tcsh.

Start with: prism demo. A backbone or head that is not named is the small one that ships with the package.
"""
NO_OPTIONS = ("command", "files", "call")  # that a config.json holds besides
SHELLS = ("bash", "zsh", "tcsh")


def run(words: Sequence[str]) -> int:
    """Run the command that the words name; its exit code."""
    first = words[0] if words else "--help"
    name = " ".join(words[: 1 + (first == "shapeworld")])
    if first in ("-h", "--help") or name in ("shapeworld", "shapeworld -h", "shapeworld --help"):
        shown = [each for each in COMMANDS if first != "shapeworld" or each.startswith(first)]
        lines = (f"  prism {each:<28}{str(_options_of(each).__doc__).splitlines()[0]}" for each in shown)
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if words and name != "shapeworld" else 2
    if first == "--version":
        from prism import __version__

        print(f"prism {__version__}")
        return 0
    if first == "--print-completion":
        return _print_completion(words[1:])
    if name not in COMMANDS:
        raise PrismError(f'There is no command "{quoted(name, 60)}"; {_nearest(name, COMMANDS)}.')
    options = _options_of(name)
    values = words[len(name.split()) :]
    return int(_parsed(name, options, _overlaid(name, options, values)).main() or 0)


def _options_of(name: str) -> Any:
    """The dataclass of a command."""
    module, _, kind = COMMANDS[name].partition(":")
    return getattr(import_module(f"prism.commands.{module}"), kind)


def _print_completion(words: Sequence[str]) -> int:
    import tyro

    if len(words) != 1 or words[0] not in SHELLS:
        raise PrismError(f"--print-completion needs the name of a shell: {', '.join(SHELLS)}.")

    def group(names: Iterable[str]) -> Any:
        return Union[  # noqa: UP007
            tuple(Annotated[_options_of(name), tyro.conf.subcommand(name.split()[-1])] for name in names)
        ]

    plain, nested = ([name for name in COMMANDS if (" " in name) is several] for several in (False, True))
    everything: Any = Union[group(plain), Annotated[group(nested), tyro.conf.subcommand("shapeworld")]]  # noqa: UP007
    tyro.cli(everything, prog="prism", args=["--tyro-print-completion", words[0]], config=_markers())
    return 0


def _markers() -> tuple[Any, ...]:
    from tyro import conf

    return (
        conf.FlagCreatePairsOff,
        conf.OmitArgPrefixes,
        conf.OmitSubcommandPrefixes,
        conf.DisallowNone,
        conf.HelptextFromCommentsOff,
    )


# -- a configuration file, under the flags


class Flag(NamedTuple):
    """An option on the command line."""

    text: str
    kind: Any
    default: Any

    @property
    def negative(self) -> str:
        return f"--no-{self.text[2:]}"


def _flags(options: Any) -> dict[str, Flag]:
    """The options of a dataclass and of those in it, by the attribute's name and by the flag's."""
    flags: dict[str, Flag] = {}
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if is_dataclass(kind):
            flags |= _flags(kind)
        elif not any("Positional" in str(mark) for mark in marks):
            names = [mark.name for mark in marks if hasattr(mark, "metavar") and mark.name]
            name = (names or [field.name])[0].replace("_", "-")
            flags[field.name] = flags[name.replace("-", "_")] = Flag(f"--{name}", kind, field.default)
    return flags


def _overlaid(name: str, options: Any, words: Sequence[str]) -> list[str]:
    """The words, and before them those of the file that --config names, of options that the words leave open."""
    flags = _flags(options)
    given = [word.partition("=")[0].replace("_", "-") for word in words]
    found: list[str] = []
    for key, value in _read(name, words, given).items():
        flag = flags.get(str(key).replace("-", "_"))
        if flag is None:
            near = _nearest(str(key), [known.text[2:] for known in flags.values()])
            raise PrismError(f'The --config holds "{quoted(key, 60)}", which is no option of prism {name}; {near}.')
        if value is None or flag.text in given or flag.negative in given:
            continue
        if flag.kind is bool and isinstance(value, bool):
            found += [flag.text if value else flag.negative]
        elif get_origin(flag.kind) is tuple and isinstance(value, list):
            found += [f"{flag.text}={item}" for item in value]
        else:
            found.append(f"{flag.text}={','.join(map(str, value)) if isinstance(value, list) else value}")
    usual = {flag.text if flag.default else flag.negative for flag in flags.values() if flag.kind is bool}
    return [word for word in [*found, *words] if word not in usual]  # tyro takes what changes something alone


def _read(name: str, words: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """The options in the file that --config names, in whatever groups; of a run's config.json those of its command."""
    if "--config" not in given:
        return {}
    place = given.index("--config")
    path = [*words[place].partition("=")[2:], *words[place + 1 :], ""][0 if "=" in words[place] else 1]
    if not path:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else quoted(error, 160)
        raise PrismError(f"The --config {quoted(path, 200)} cannot be read: {why}.") from None
    if not isinstance(content, dict):
        raise PrismError(f"The --config {quoted(path, 200)} must hold options by name; found {quoted(content, 60)}.")
    if content.get("command", name) != name:
        command = quoted(content["command"], 60)
        raise PrismError(f"The --config {quoted(path, 200)} is of prism {command}; name one of prism {name}.")
    content = content.get("options", content)
    return _flat({key: value for key, value in content.items() if key not in NO_OPTIONS})


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value) if isinstance(value, dict) else {key: value}
    return found


# -- parsing, and what is wrong in a sentence


def _parsed(name: str, options: Any, words: Sequence[str]) -> Any:
    """The options that the words give, as the command's dataclass."""
    import tyro
    from tyro import _errors  # the only way to learn what was wrong; tyro's version is bounded for it

    def refuse(event: Any) -> None:
        flags = {flag.text for flag in _flags(options).values()}
        raise PrismError(f"{_wrong(event, sorted(flags))}; prism {name} --help has every option.")

    with _errors.on_parse_error(refuse):
        return tyro.cli(options, args=list(words), prog=f"prism {name}", config=_markers())


def _wrong(event: Any, flags: Sequence[str]) -> str:
    """What an event of tyro's says, in half a sentence."""
    argument, message = getattr(event, "argument", None), str(getattr(event, "message", type(event).__name__))
    flag = _shown(argument) if argument is not None else "A value"
    unknown = [*getattr(event, "unrecognized_tokens", ()), *getattr(event, "tokens", ())]
    missing = [_shown(each.arg) for each in getattr(event, "missing_arguments", ())]
    number = re.fullmatch(
        r"(?:invalid literal for (int)\(\)|could not convert string to (float)).*?: (.*)", message, re.S
    )
    if unknown and unknown[0].startswith("-"):
        return f"There is no option {quoted(unknown[0], 60)}; {_nearest(unknown[0].partition('=')[0], flags)}"
    if unknown:
        return f'The word "{quoted(unknown[0], 60)}" belongs to no option'
    if missing:
        return f"{' and '.join(missing)} must be given"
    if number is not None:
        return f"{flag} must be a {'whole ' if number[1] else ''}number; found {quoted(number[3].strip(chr(39)), 80)}"
    if getattr(event, "choices", ()):
        return f"{flag} must be one of {', '.join(event.choices)}; found {quoted(event.value, 80)}"
    if hasattr(event, "offending_value"):
        return f"{flag} needs a value"
    return f"{flag} cannot be taken: {quoted(message, 160)}"


def _shown(argument: Any) -> str:
    """An option as --help shows it, or what stands for a word that is none."""
    name = str(argument.lowered.name_or_flags[0])
    return name if name.startswith("-") else str(argument.lowered.metavar)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"the nearest is {near[0]}" if near else f"there are {', '.join(known)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C, 143 for SIGTERM."""
    with _plain_warnings(), _noted_interrupts() as interrupts:
        try:
            code = run(sys.argv[1:] if arguments is None else list(arguments))
        except KeyboardInterrupt:
            code = 130
        except PrismError as error:
            code = 2
            if not interrupts:
                print(f"prism: {error}", file=sys.stderr)
        except Exception as error:
            code = 2
            told = _of_the_system(error)
            if told is None:
                raise
            print(f"prism: {told}.", file=sys.stderr)
            if "disk" not in told:
                return code
        except SystemExit as end:  # as tyro ends after --help
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code == 130 or (code and interrupts):
        ended = interrupts[0] if interrupts else signal.SIGINT
        print(f"prism: {'interrupted' if ended == signal.SIGINT else 'terminated'}", file=sys.stderr)
        return 128 + ended
    return code


def _of_the_system(error: Exception) -> str | None:
    """What the system refused, in a sentence; None for a bug of ours."""
    if _disk_is_full(error):
        return (
            "there is no space left on the disk; make room and run the same command again, with --resume where it has "
            "one: what was finished is kept"
        )
    if not isinstance(error, OSError) or (error.filename is None and error.errno is None):
        return None
    if error.filename is not None:
        return f"{quoted(str(error.filename))} cannot be used: {error.strerror}"
    return f"the system could not read or write: {quoted(error.strerror)}"


def _disk_is_full(error: Exception) -> bool:
    """Whether a file could not be written for want of space; safetensors says so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    from safetensors import SafetensorError

    return isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """The signals that came and end the command as Ctrl-C does: SIGINT, SIGTERM, SIGHUP, where nothing else is set.

    They are noted, as a library in whose middle one falls may pass it on as an error of another kind.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if number == signal.SIGINT or len(noted) == 1:  # a second SIGTERM does not disturb the cleaning up
            signal.default_int_handler(number, frame)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                handlers[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, usual in handlers.items():
            signal.signal(number, usual)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as sentences, without the line of code that gave them."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"prism: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual

"""The `prism` command, made from the commands' dataclasses; a user's mistake becomes one sentence on stderr."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro import _errors, conf  # _errors alone says what was wrong; tyro's version is bounded for it

from prism import __version__
from prism.commands.options import leaves
from prism.errors import PrismError, quoted

COMMANDS = {  # the dataclass of each command's options, which pkgutil imports
    "demo": "prism.commands.lab:Demo",
    "sample": "prism.commands.sample:Sample",
    "train": "prism.commands.train:Train",
    "eval": "prism.commands.evaluate:Evaluate",
    "study": "prism.commands.lab:Study",
    "reproduce": "prism.commands.reproduce:Reproduce",
    "data check": "prism.commands.data:Check",
    "data export": "prism.commands.data:Export",
    "data import": "prism.commands.data:Import",
    "encode": "prism.commands.encode:Encode",
    "collect": "prism.commands.collect:Collect",
    "score": "prism.commands.score:Score",
    "reference": "prism.commands.reference:Reference",
    "serve": "prism.commands.serve:Serve",
    "plan": "prism.commands.plan:Plan",
    "improve": "prism.commands.improve:Improve",
    "doctor": "prism.commands.doctor:Doctor",
    "page": "prism.commands.page:Page",
    "shapeworld train": "prism.commands.lab:Train",
    "shapeworld candidates": "prism.commands.lab:Candidates",
    "shapeworld quality": "prism.commands.lab:Quality",
    "shapeworld weaker": "prism.commands.lab:Weaker",
}
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))
HELP = """\
usage: prism COMMAND [OPTIONS]

Judge the samples of a video diffusion model from its own hidden states, and pick the best of N early.

{commands}

  prism COMMAND --help              Every option of a command.
  prism --version                   The version.
  prism --print-completion SHELL    Completion of commands and options for bash, zsh or tcsh.

Start with: prism demo. A backbone or head that is not named is the small one that ships with the package.
"""
_ARGUMENT = re.compile(
    r"^[a-z]\w*(?= )|(?<=training setting )\w+|(?<![\w/\\.=\"'-])[a-z]+(?:_[a-z]+)+(?![\w/\\=\"'-]|\.\w)"
)
_OTHER_NAMES = {"timesteps": "t", "num_draws": "draws", "margins": "margin"}  # arguments that flags call otherwise
DISK_IS_FULL = (
    "there is no space left on the disk; make room and run the same command again, with --resume where it has one: "
    "what was finished is kept."
)


def run(words: Sequence[str]) -> int:
    """Run the command that the words name; its exit code."""
    group = words[0] if words and words[0] in GROUPS else ""
    name = " ".join(words[: 2 if group else 1])
    if name in COMMANDS:
        options = resolve_name(COMMANDS[name])
        command = _parsed(name, options, [*_overlaid(name, options, words[len(name.split()) :])])
        try:
            return int(command.main() or 0)
        except PrismError as error:
            raise PrismError(_with_flags(str(error), _flags(options))) from error
    if name == "--version":
        print(f"prism {__version__}")
    elif name == "--print-completion":
        _print_completion(words[1:])
    elif name.removeprefix(group).strip() in ("", "-h", "--help"):
        shown = [each for each in COMMANDS if each.startswith(f"{group} " if group else "")]
        lines = (f"  prism {each:<28}{str(resolve_name(COMMANDS[each]).__doc__).splitlines()[0]}" for each in shown)
        print(HELP.format(commands="\n".join(lines)), end="")
    else:
        raise PrismError(f'There is no command "{quoted(name, 60)}"; {_nearest(name, COMMANDS)}.')
    return 2 if name in ("", *GROUPS) else 0


def _print_completion(words: Sequence[str]) -> None:
    if len(words) != 1 or words[0] not in ("bash", "zsh", "tcsh"):
        raise PrismError("--print-completion needs the name of a shell: bash, zsh, tcsh.")
    kinds = {name: Annotated[resolve_name(COMMANDS[name]), conf.subcommand(name.split()[-1])] for name in COMMANDS}
    for group in GROUPS:
        members = tuple(kinds.pop(name) for name in COMMANDS if name.startswith(f"{group} "))
        members += (Annotated[None, conf.subcommand("--help")],)  # tyro makes no group of one
        kinds[group] = Annotated[Union[members], conf.subcommand(group)]  # noqa: UP007
    _parsed("", Union[tuple(kinds.values())], ["--tyro-print-completion", words[0]])  # noqa: UP007


def _flags(options: Any) -> dict[str, tuple[str, Any]]:
    """Flag and type of each option of a dataclass and of those in it, by the attribute's name and by the flag's."""
    flags: dict[str, tuple[str, Any]] = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if is_dataclass(kind):
            flags |= _flags(kind)
        elif not any("Positional" in str(mark) for mark in marks):
            flag = next((mark.name for mark in marks if getattr(mark, "name", None)), name).replace("_", "-")
            flags[name] = flags[flag.replace("-", "_")] = (f"--{flag}", kind)
    return flags


def _with_flags(sentence: str, flags: dict[str, tuple[str, Any]]) -> str:
    """A sentence of the library with the command's flags in place of Python's arguments.

    These are its first word where it begins with a small letter, the name of a training setting, and words with an
    underscore, outside of quotes and paths.
    """

    def flag(match: re.Match[str]) -> str:
        name = match.group()
        return flags.get(name, flags.get(_OTHER_NAMES.get(name, ""), (name,)))[0]

    return _ARGUMENT.sub(flag, sentence)


def _overlaid(name: str, options: Any, words: Sequence[str]) -> Iterator[str]:
    """The words, and before them the options of --recipe and --config that the words do not set."""
    flags = _flags(options)
    mentioned = {word.partition("=")[0].replace("_", "-") for word in words}
    values: list[tuple[Any, Any]] = []
    if name == "train" and (recipe := _value(words, "recipe")):
        values += resolve_name("prism.commands.train:recipe_options")(recipe).items()
    for key, value in [*values, *_read(name, words)]:
        flag, kind = flags.get(str(key).replace("-", "_"), ("", None))
        if not flag:
            near = _nearest(str(key), [text[2:] for text in dict(flags.values())])
            raise PrismError(f'The --config holds "{quoted(key, 60)}", which is no option of prism {name}; {near}.')
        if flag == "--recipe" and name == "train":
            raise PrismError('The --config holds "recipe", which is run: name it on the command line.')
        if value is None or flag in mentioned:
            continue
        if kind is bool and isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif get_origin(kind) is tuple and isinstance(value, list):
            yield from (f"{flag}={item}" for item in value)
        else:
            yield f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"
    yield from words


def _read(name: str, words: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """The options in the --config file, with or without groups; of a run's config.json those of its command."""
    path = _value(words, "config")
    if not path:
        return ()
    file = f"The --config {quoted(path, 200)}"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PrismError(f"{file} cannot be read: {getattr(error, 'strerror', '') or quoted(error, 160)}.") from None
    options = content.get("options", content) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise PrismError(f"{file} must hold options by name; found {quoted(content, 60)}.")
    if content.get("command", name) != name:
        raise PrismError(f"{file} is of prism {quoted(content['command'], 60)}; name one of prism {name}.")
    return leaves({key: value for key, value in options.items() if key not in ("command", "files", "call")})


def _value(words: Sequence[str], name: str) -> str | None:
    """The value that the words give an option, which is needed before the others are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")
    value: str | None = getattr(parser.parse_known_args(list(words))[0], name)
    return value


def _parsed(name: str, kind: Any, words: Sequence[str]) -> Any:
    """Parse the words into the command's dataclass."""

    def refuse(event: Any) -> None:
        raise PrismError(f"{_wrong(event, dict(_flags(kind).values()))}; prism {name} --help has every option.")

    markers = [conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.DisallowNone, conf.HelptextFromCommentsOff]
    if {"-h", "--help", "--tyro-print-completion"} & set(words):  # that show one form of a switch, not --no- beside it
        markers.append(conf.FlagCreatePairsOff)
    with _errors.on_parse_error(refuse):
        return tyro.cli(kind, args=list(words), prog=f"prism {name}".strip(), config=markers)


def _wrong(event: Any, flags: Iterable[str]) -> str:
    """The mistake that tyro reports by an event, in half a sentence."""
    words = [*getattr(event, "unrecognized_tokens", ()), *getattr(event, "tokens", ())]
    if words and words[0].startswith("-"):
        return f"There is no option {quoted(words[0], 60)}; {_nearest(words[0].partition('=')[0], flags)}"
    if words:
        return f'The word "{quoted(words[0], 60)}" belongs to no option'
    if missing := getattr(event, "missing_arguments", ()):
        names = (each.arg.lowered.metavar if each.arg.is_positional() else each.arg.display_name() for each in missing)
        return f"{' and '.join(names)} must be given"
    flag, message = event.argument.display_name(), getattr(event, "message", "")
    for kind, error in {"whole number": "invalid literal for int() with base 10: ", "number": "to float: "}.items():
        if error in message:
            return f"{flag} must be a {kind}; found {quoted(message.partition(error)[2].strip(chr(39)), 80)}"
    return f"{flag} cannot be taken: {quoted(message, 160)}" if message else f"{flag} needs a value"


UNREAD = 128 + 13  # the exit code of programs that SIGPIPE ends


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(names), 1)
    return f"the nearest is {near[0]}" if near else f"there are {', '.join(names)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C, 143 for SIGTERM,
    141 where nobody reads its output any more."""
    with _as_a_process() as signals:
        try:
            code = run(sys.argv[1:] if arguments is None else list(arguments))
            code = UNREAD if _is_unread() else code
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:  # as tyro ends after --help
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_unread():
                return UNREAD
            code, sentence = 2, str(error) if isinstance(error, PrismError) else _refusal(error)
            if sentence == DISK_IS_FULL:
                signals.clear()
            if not signals:  # some libraries turn a KeyboardInterrupt into an error of another kind
                print(f"prism: {sentence}", file=sys.stderr)
    if code == 130 or (code and signals):
        code = 128 + (signals[0] if signals else signal.SIGINT)
        print(f"prism: {'interrupted' if code == 130 else 'terminated'}", file=sys.stderr)
    return code


def _is_unread() -> bool:
    """True where nobody reads the output any more, as before `| head`; what is left of it is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _refusal(error: Exception) -> str:
    """The sentence for a file or disk that the system refused; any other error is a bug of ours, and raised again."""
    full = type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error)
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return DISK_IS_FULL
    if isinstance(error, OSError) and error.filename is not None:
        return f"{quoted(str(error.filename))} cannot be used: {error.strerror}."
    if isinstance(error, OSError) and error.errno is not None:
        return f"the system could not read or write: {quoted(error.strerror)}."
    raise error


@contextmanager
def _as_a_process() -> Iterator[list[int]]:
    """Print warnings as sentences; end at SIGINT, SIGTERM or SIGHUP, unless ignored, and list the signals that came."""
    came: list[int] = []

    def end(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGINT or len(came) == 1:  # a second SIGTERM does not disturb the cleaning up
            signal.default_int_handler(number, frame)

    layout, handlers = warnings.formatwarning, {}
    warnings.formatwarning = lambda message, *_, **__: f"prism: warning: {message}\n"
    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))):  # not on Windows
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                handlers[number] = signal.signal(number, end)
    try:
        yield came
    finally:
        warnings.formatwarning = layout
        for number, handler in handlers.items():
            signal.signal(number, handler)

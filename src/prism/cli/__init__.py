"""The `prism` command: options in, one function call out; a user's mistake becomes one sentence on stderr."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from safetensors import SafetensorError

from prism.cli import demo, doctor, evaluate, sample, shapeworld, study, train
from prism.errors import PrismError, quoted

app = typer.Typer(
    name="prism",
    help="Judge the samples of a video diffusion model from its own hidden states, and pick the best of N early.",
    epilog="Start with: prism demo. A backbone or head that is not named is the small one that ships with the package.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("sample")(sample.sample)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("study")(study.study)
app.command("doctor")(doctor.doctor)
app.add_typer(shapeworld.app, name="shapeworld")


def _version(wanted: bool) -> None:
    if wanted:
        from prism import __version__

        print(f"prism {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C, 143 for SIGTERM."""
    with _plain_warnings(), _noted_interrupts() as interrupts:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="prism")
            code = 0
        except PrismError as error:
            code = 2
            if not interrupts:
                print(f"prism: {error}", file=sys.stderr)
        except Exception as error:
            code = 2
            if isinstance(error, OSError) and error.filename is not None and not _disk_is_full(error):
                print(f"prism: {quoted(str(error.filename))} cannot be used: {error.strerror}.", file=sys.stderr)
                return code
            if isinstance(error, OSError) and error.errno is not None and not _disk_is_full(error):
                print(f"prism: the system could not read or write: {quoted(error.strerror)}.", file=sys.stderr)
                return code
            if not _disk_is_full(error):
                raise
            print(
                "prism: there is no space left on the disk; make room and run the same command again, with --resume "
                "where it has one: what was finished is kept.",
                file=sys.stderr,
            )
        except SystemExit as end:  # how typer ends, whatever came of it
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code == 130 or (code and interrupts):
        ended = interrupts[0] if interrupts else signal.SIGINT
        print(f"prism: {'interrupted' if ended == signal.SIGINT else 'terminated'}", file=sys.stderr)
        return 128 + ended
    return code


def _disk_is_full(error: Exception) -> bool:
    """Whether a file could not be written for want of space; safetensors says so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
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

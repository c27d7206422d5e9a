"""Processes of one job, forked from an interpreter that has imported what they need, without a launcher.

A new interpreter takes seconds of imports before it does anything; a fork of a prepared one takes none. It is not
forked from the tests' own process, whose autograd may have run already and would not run in a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = [f"prism.commands.{name}" for name in ("collect", "encode", "evaluate", "score", "train")]
CONTEXT.set_forkserver_preload(["pytest", "hypothesis", "accelerate", "tests.tiny", "tests.stores", *COMMANDS])


@dataclass
class Ended:
    """How a process ended: its code, or minus the number of the signal that killed it, and what it wrote."""

    code: int
    out: str
    err: str


def run(work: Callable[..., Any], *arguments: Any, count: int = 2, timeout: float = 300) -> list[Ended]:
    """Call a module's function in some processes that find each other as those of `torchrun` do, by environment.

    The function's result is the process's code, as of `sys.exit`. Whoever is left after `timeout` seconds is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(count)]
        processes = []
        try:
            os.chdir(ROOT)  # where the interpreter finds what it imports
            for rank, place in enumerate(places):
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
                processes.append(CONTEXT.Process(target=_work, args=(work, arguments, environment, here, place)))
                processes[-1].start()
            os.chdir(here)
            for process in processes:
                process.join(timeout)
        finally:
            os.chdir(here)
            for process in processes:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, *(Path(f"{place}.{name}").read_text() for name in ("out", "err")))
            for process, place in zip(processes, places)
        ]


def _work(
    work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], folder: Path, place: Path
) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{place}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    os.chdir(folder)
    sys.exit(work(*arguments))

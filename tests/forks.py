"""Processes of one job, forked from an interpreter that has imported what they need, without a launcher.

A new interpreter takes seconds of imports before it does anything; a fork of a prepared one takes none. The prepared
one is a fork of the tests' process before its first test: later its autograd has run, and would not run in a fork.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = [f"prism.commands.{name}" for name in ("collect", "encode", "evaluate", "score", "train")]
PRELOAD = ["pytest", "hypothesis", "accelerate", "tests.tiny", "tests.stores", *COMMANDS]
CONTEXT.set_forkserver_preload(PRELOAD)


def prepare() -> None:
    """Fork the interpreter that `run` forks, where `multiprocessing` would start one that imports everything anew."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if sys.platform != "linux" or sys.version_info >= (3, 14) or server._forkserver_pid is not None:
        return
    for name in PRELOAD:
        importlib.import_module(name)
    resource_tracker.ensure_running()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # an address of the kernel's choice
    listener.listen()
    alive_r, alive_w = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads, which hold nothing at this point
        pid = os.fork()
    if pid:
        listener_address = listener.getsockname()
        listener.close()
        os.close(alive_r)
        server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = listener_address, alive_w, pid
        return
    try:
        needed = sorted({listener.fileno(), alive_r, resource_tracker.getfd()})
        for low, high in zip([2, *needed], [*needed, 65536]):  # not the pipes of the tests' process
            os.closerange(low + 1, high)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))  # pytest's are its own
        logging.getLogger().handlers.clear()  # pytest's
        forkserver.main(listener.detach(), alive_r, [])
    finally:
        os._exit(0)


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

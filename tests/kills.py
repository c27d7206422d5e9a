"""Processes that die at a chosen point: when they touch the file system under a folder for the k-th time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "open"}


def dies(work: Callable[[], object], folder: Path, point: int, number: int = signal.SIGKILL) -> bool:
    """Do `work` in a forked process that gets a signal at the `point`-th (from 1) event under `folder`; whether it came
    to that. A process that catches the signal's KeyboardInterrupt has died too.
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 77, -number), f"the process ended with {status}"
        return status != 0
    code = 99
    try:
        torch.set_num_threads(1)
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
                return
            if os.fspath(arguments[0]).startswith(os.fspath(folder)):
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), number)

        def end(*_: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, end)
        sys.addaudithook(hook)
        work()
        code = 0
    except KeyboardInterrupt:
        code = 77
    finally:
        os._exit(code)
    return True

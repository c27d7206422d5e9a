"""Prints what the matrix measured, a line a variant."""

from __future__ import annotations

from typing import Any

from tests.zoo import MEASURED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not MEASURED:
        return
    terminalreporter.section("the matrix, a line a variant")
    for name, found in MEASURED.items():
        values = (
            f"{key.replace('_', ' ')}{':' if key.startswith('let off') else ''} {_text(value)}"
            for key, value in found.items()
        )
        terminalreporter.write_line(f"{name:22} " + " · ".join(values))


def _text(value: Any) -> str:
    return f"{value:.0e}" if isinstance(value, float) else str(value)

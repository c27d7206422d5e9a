"""`prism shapeworld train` and `prism shapeworld candidates`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Make the embedded model and its data anew.", no_args_is_help=True)

"""What went wrong, as one line."""

from __future__ import annotations

from typing import NoReturn

import typer


def complain(command: str, error: Exception | str, code: int) -> NoReturn:
    """Say on standard error what went wrong, in one line, and end.

    Args:
        command: Which command fails.
        error: What went wrong.
        code: The exit code: 2 for a mistake in what was typed, 1 for everything else.
    """
    typer.echo(f"farpoint {command}: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)

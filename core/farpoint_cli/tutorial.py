"""`farpoint tutorial`."""

from __future__ import annotations

from typing import Annotated

import typer


def tutorial(
    serializer: Annotated[
        str | None,
        typer.Option(help="How tensors are written: msgpack or torch. By default FARPOINT_SERIALIZER, else msgpack."),
    ] = None,
) -> None:
    """Send, move, add and fetch tensors between two workers in this process, and show where everything is."""
    from farpoint.errors import FarpointError, PluginError
    from farpoint.tutorial import run

    try:
        run(serializer, typer.echo)
    except PluginError as error:
        # An unknown name is a mistake in what was typed: exit code 2, as for an unknown option.
        raise typer.BadParameter(str(error), param_hint="--serializer, or FARPOINT_SERIALIZER") from error
    except FarpointError as error:
        typer.echo(f"farpoint tutorial: {error}", err=True)
        raise typer.Exit(1) from error

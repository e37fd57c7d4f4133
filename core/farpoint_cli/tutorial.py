"""`farpoint tutorial`."""

from __future__ import annotations

from typing import Annotated

import typer

from farpoint_cli.complaint import complain
from farpoint_cli.options import Authority, Certificate, Key, Token, dialling


def tutorial(
    serializer: Annotated[
        str | None,
        typer.Option(help="How tensors are written: msgpack or torch. By default FARPOINT_SERIALIZER, else msgpack."),
    ] = None,
    workers: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="URL URL", help="Where two workers listen, to be used in place of two in this process."),
    ] = None,
    token: Token = None,
    ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
) -> None:
    """Send, move, add and fetch tensors between two workers, and show where everything is."""
    from farpoint.errors import FarpointError, PluginError
    from farpoint.tutorial import run

    tls = dialling("tutorial", ca, tls_cert, tls_key)
    try:
        run(serializer, typer.echo, workers or (), token=token, tls=tls)
    except PluginError as error:
        # An unknown name is a mistake in what was typed: exit code 2, as for an unknown option.
        raise typer.BadParameter(str(error), param_hint="--serializer, or FARPOINT_SERIALIZER") from error
    except FarpointError as error:
        complain("tutorial", error, 1)

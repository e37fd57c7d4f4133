"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from farpoint_cli.complaint import complain

if TYPE_CHECKING:
    import ssl

Token: TypeAlias = Annotated[
    str | None, typer.Option(help="What opens the doors of workers. Better given as FARPOINT_TOKEN: who lists processes sees options.")
]
Authority: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        readable=True,
        help="Certificates that those of workers must be signed by. By default those that the system trusts.",
    ),
]
Certificate: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        readable=True,
        help="A certificate of yours with the chain, PEM: for workers that ask for one (mutual TLS, over wss and tls).",
    ),
]
Key: TypeAlias = Annotated[
    Path | None,
    typer.Option("--tls-key", metavar="FILE", exists=True, dir_okay=False, readable=True, help="The key of that certificate."),
]


def dialling(command: str, ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return how workers are verified and what is shown to them; None for what the scheme of a URL implies.

    Args:
        command: Which command ends if a file is not what it must be.
        ca: File with the authorities that are trusted.
        certificate: File with the certificate to show.
        key: File with its key.
    """
    if (certificate is None) != (key is None):
        complain(command, "--tls-cert and --tls-key belong together: give both", 2)
    if ca is None and certificate is None:
        return None
    import ssl

    from farpoint.access import tls_context
    from farpoint.errors import InsecureListenerError

    shown = (certificate, key) if certificate is not None and key is not None else None
    try:
        return tls_context(ssl.Purpose.SERVER_AUTH, ca, shown)
    except InsecureListenerError as error:
        complain(command, error, 2)

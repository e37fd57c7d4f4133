"""`farpoint ping`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated

import typer

from farpoint_cli.complaint import complain
from farpoint_cli.options import Authority, Certificate, Key, Token, dialling


def ping(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the worker listens.")],
    token: Token = None,
    ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
    count: Annotated[int, typer.Option(min=1, help="How many questions to ask.")] = 10,
) -> None:
    """Ask a worker whether it is there, and how long a question takes to it and back. The exit code is 1 if it is not."""
    from farpoint import connect
    from farpoint.errors import FarpointError, PluginError

    tls = dialling("ping", ca, tls_cert, tls_key)
    try:
        with connect(url, token=token, tls=tls) as worker:
            typer.echo(f"{worker.id} at {url}: {tell(worker.peer.terms.versions)}")
            times = [1000 * worker.ping() for _ in range(count)]
    except PluginError as error:
        complain("ping", error, 2)
    except (FarpointError, OSError) as error:
        complain("ping", error, 1)
    typer.echo(f"{count} round trips: min {min(times):.3f} ms, median {statistics.median(times):.3f} ms")


def tell(versions: Mapping[str, str]) -> str:
    """Return what a worker has told of its versions."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions unknown"

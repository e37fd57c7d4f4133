"""`farpoint doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from farpoint_cli.options import Authority, Certificate, Key, Token, dialling
from farpoint_cli.ping import tell

if TYPE_CHECKING:
    import ssl

DEPENDENCIES: Final = ("attrs", "msgpack", "pluggy", "rich", "tqdm", "typer", "websockets")


def doctor(
    urls: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Where workers listen that shall be reached, too.")] = None,
    token: Token = None,
    ca: Authority = None,
    tls_cert: Certificate = None,
    tls_key: Key = None,
) -> None:
    """Check this installation: versions, and whether every plugin works. The exit code is 1 if something is broken."""
    typer.echo(f"python      {platform.python_version()}   {sys.executable}")
    broken = []
    for distribution in ("farpoint", "torch", *DEPENDENCIES):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            broken.append(f"{distribution} is not installed: pip install {distribution}")
        else:
            typer.echo(f"{distribution:<11} {version}")
    try:
        import farpoint
    except Exception as error:  # torch may be missing, or not fit this machine
        broken.append(f"farpoint cannot be imported: {type(error).__name__}: {error}")
    else:
        typer.echo(f"imported    {Path(farpoint.__file__).parent}")
        broken += _check_plugins()
        tls = dialling("doctor", ca, tls_cert, tls_key) if urls else None
        for url in urls or ():
            broken += _check_worker(url, token, tls)
    for problem in broken:
        typer.echo(f"broken      {problem}", err=True)
    if broken:
        raise typer.Exit(1)
    typer.echo("all is well")


def _check_plugins() -> list[str]:
    """Make what plugins provide, and return what went wrong. Stores are not made: they may write to disk."""
    from farpoint.errors import PluginError
    from farpoint.limits import DEFAULT_LIMITS
    from farpoint.operations import names
    from farpoint.plugins import plugins as manager

    broken = [str(problem) for problem in manager.problems()]
    for found in manager.provided():
        typer.echo(f"{found.kind:<11} {found.name:<14} {found.distribution}")
        try:
            if found.kind == "transport":
                manager.transport(f"{found.record.schemes[0]}://")
            elif found.kind == "serializer":
                manager.serializer(found.name, DEFAULT_LIMITS)
            elif found.kind == "operator":
                names()
        except PluginError as error:
            if str(error) not in broken:  # a name that two provide is on the list already
                broken.append(str(error))
    for variable, known in (
        ("FARPOINT_SERIALIZER", manager.serializer_names()),
        ("FARPOINT_STORE", manager.store_names()),
    ):
        chosen = os.environ.get(variable)
        if chosen and chosen not in known:
            broken.append(f"{variable}={chosen}: the names are {', '.join(known)}")
    return broken


def _check_worker(url: str, token: str | None, tls: ssl.SSLContext | None) -> list[str]:
    """Reach a worker, and return what went wrong. Another version of torch is wrong, too: results may differ."""
    from farpoint import connect
    from farpoint.about import VERSIONS
    from farpoint.errors import FarpointError

    try:
        with connect(url, token=token, tls=tls) as worker:
            theirs = worker.peer.terms.versions
            typer.echo(f"{'worker':<11} {worker.id:<14} {url}, {tell(theirs)}, {1000 * worker.ping():.2f} ms")
    except (FarpointError, OSError) as error:
        return [str(error)]
    return [
        f"{worker.id} at {url} has {name} {theirs.get(name, 'of an unknown version')}, and {ours} is here: install the same on both sides"
        for name, ours in VERSIONS.items()
        if theirs.get(name, "").partition("+")[0] != ours.partition("+")[0]
    ]

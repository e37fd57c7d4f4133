"""The command `farpoint`.

A top-level module: the package `farpoint` imports torch, which takes seconds, and `farpoint --help` needs none of it.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

app = typer.Typer(
    name="farpoint",
    help="Compute on PyTorch tensors that live elsewhere, through pointers that are tensors.",
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farpoint {importlib.metadata.version('farpoint')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compute on PyTorch tensors that live elsewhere, through pointers that are tensors."""


@app.command()
def tutorial(
    serializer: Annotated[
        str | None,
        typer.Option(help="How tensors are written: msgpack or torch. By default FARPOINT_SERIALIZER, else msgpack."),
    ] = None,
) -> None:
    """Send, move, add and fetch tensors between two workers in this process, and show where everything is."""
    from farpoint.errors import FarpointError
    from farpoint.tutorial import run

    try:
        run(serializer, typer.echo)
    except FarpointError as error:
        typer.echo(f"farpoint tutorial: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def plugins() -> None:
    """List installed plugins: kind, name, distribution; and those that could not be loaded, with the reason."""
    from farpoint.plugins.manager import GROUP, PluginManager

    rows: list[tuple[str, str, str]] = []
    broken: list[tuple[str, str, Exception]] = []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        # A manager for each: two plugins that clash are both listed, and each name is traced to who provides it.
        alone = PluginManager(discover=False)
        try:
            alone.register(entry.load(), entry.name)
            rows += [("transport", record.name, distribution) for record in alone.transports()]
            rows += [("serializer", name, distribution) for name in alone.serializer_names()]
            rows += [("store", name, distribution) for name in alone.store_names()]
            rows += [("operators", record.name, distribution) for record in alone.operators()]
        except Exception as error:  # whatever a stranger's module raises is what the user wants to read
            broken.append((entry.name, distribution, error))
    for kind, name, distribution in sorted(rows):
        typer.echo(f"{kind:<11} {name:<14} {distribution}")
    for name, distribution, reason in broken:
        typer.echo(f"{'broken':<11} {name:<14} {distribution}: {type(reason).__name__}: {reason}")
    if not rows and not broken:
        typer.echo("no plugins: is farpoint installed? (pip install -e . registers its own)")


def main() -> None:
    """Run the command line."""
    app()

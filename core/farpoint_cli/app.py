"""The commands, put together."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from farpoint_cli import certs, doctor, ping, plugins, tutorial, worker

app = typer.Typer(
    name="farpoint",
    help="Compute on PyTorch tensors that live elsewhere, through pointers that are tensors.",
    no_args_is_help=True,
    add_completion=False,
)
for module in (tutorial, worker, ping, certs, plugins, doctor):
    app.command()(getattr(module, module.__name__.rpartition(".")[2]))


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


def main() -> None:
    """Run the command line."""
    app()

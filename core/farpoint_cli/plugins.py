"""`farpoint plugins`."""

from __future__ import annotations

import typer


def plugins() -> None:
    """List installed plugins: kind, name, distribution; and what is broken, with the reason."""
    from farpoint.plugins import plugins as manager

    rows = sorted((found.kind, found.name, found.distribution) for found in manager.provided())
    for kind, name, distribution in rows:
        typer.echo(f"{kind:<11} {name:<14} {distribution}")
    for problem in manager.problems():
        typer.echo(f"{'broken':<11} {problem}")
    if not rows:
        typer.echo("no plugins: is farpoint installed? (pip install -e . registers its own)")

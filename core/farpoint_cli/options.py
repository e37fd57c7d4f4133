"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

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

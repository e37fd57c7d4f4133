"""A bar for transfers that take long enough to be watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHOWN_BYTES = 64 * 2**20
"""Bytes from which on a transfer has a bar."""

_shown = os.environ.get("FARPOINT_PROGRESS", "1") != "0"


def progress(shown: bool) -> None:
    """Show bars for large transfers over a network, or none. `FARPOINT_PROGRESS=0` shows none from the start."""
    global _shown  # noqa: PLW0603  # one switch for the process
    _shown = shown


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how far a transfer is, and yield what to call with the bytes that are done."""
    if not _shown or total < SHOWN_BYTES:
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    bar: Any = tqdm(total=total, desc=description, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
    try:
        yield lambda done: bar.update(done - bar.n)
    finally:
        bar.close()

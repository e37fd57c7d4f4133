"""The rows of all benchmarks as text."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Final

import torch

from benchmarks.race import Row

_HEADER: Final[tuple[str, ...]] = ("", "one time", "issuing", "ratio", "quartiles", "")
_GAP: Final = ("",) * len(_HEADER)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table, by combination."""
    yield _machine()
    for combination, found in itertools.groupby(sorted(rows, key=attrgetter("combination")), attrgetter("combination")):
        lines = [_HEADER]
        for _, group in itertools.groupby(found, attrgetter("group")):
            lines += [*(_cells(row) for row in group), _GAP]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER) - 1)]
        yield ""
        yield combination
        for line in lines[:-1]:
            first, *numbers = (cell.rjust(width) for cell, width in zip(line, widths, strict=False))
            yield "  ".join(("", first.strip().ljust(widths[0]), *numbers, line[-1])).rstrip()


def duration(seconds: float) -> str:
    """Return a duration for people, in µs or ms."""
    return f"{seconds * 1e6:.2f} µs" if abs(seconds) < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _cells(row: Row) -> tuple[str, ...]:
    issuing = "" if row.issuing is None else duration(row.issuing)
    if row.ratio is None:
        return row.work, duration(row.seconds), issuing, "", "", row.note
    low, middle, high = row.ratio
    spread = f"{_ratio(low)} - {_ratio(high)}"
    return row.work, duration(row.seconds), issuing, f"{_ratio(middle)} x", spread, row.note


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _machine() -> str:
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread of "
        f"{os.cpu_count()} cores, load {load}. Medians; a ratio compares two times of one round."
    )

"""How much memory this process takes, as Linux counts it and as Python does."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import attrs

_RESET_PEAK = "5"


@attrs.frozen
class Growth:
    """What a piece of work did to the memory of the process, in bytes.

    Attributes:
        kept: Resident memory after it, above that before it; None where Linux does not tell.
        peak: The most that was resident during it, above that before it; None likewise.
        heap_kept: Python objects after it, above those before it.
        heap_peak: The most during it, above those before it.
    """

    kept: int | None
    peak: int | None
    heap_kept: int
    heap_peak: int

    def __str__(self) -> str:
        resident = "not known here" if self.peak is None else f"peak +{size(self.peak)}, kept {size(self.kept or 0)}"
        return f"resident: {resident}; Python heap: peak +{size(self.heap_peak)}, kept {size(self.heap_kept)}"


class Peak:
    """The most memory that is resident in a process from now on, above what is now, as Linux counts it.

    Args:
        pid: The process: this one if not given, or another one of this user.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._before = _resident("VmRSS", pid)
        if self._before is not None:
            _clear_refs(pid).write_text(_RESET_PEAK, encoding="ascii")

    def growth(self) -> int | None:
        """Return it in bytes, None where Linux does not tell."""
        peak = _resident("VmHWM", self._pid)
        return None if peak is None or self._before is None else peak - self._before


def growth(work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> Growth:
    """Do a piece of work twice, once for each way to count.

    Args:
        work: Waits for its own end, and was done before: the first time keeps caches for good.
        settle: Ends what only the garbage collector could end, before anything is called kept.
    """
    _trim(settle)
    before = _resident("VmRSS")
    resident = Peak()
    work()
    peak = resident.growth()
    _trim(settle)
    after = _resident("VmRSS")
    tracemalloc.start()
    try:
        work()
        heap_peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        settle()
        heap_kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    if before is None or peak is None or after is None:
        return Growth(None, None, heap_kept, heap_peak)
    return Growth(after - before, peak, heap_kept, heap_peak)


def _trim(settle: Callable[[], object]) -> None:
    """Give back what is free, so that it does not hide what is taken next."""
    gc.collect()
    settle()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _clear_refs(pid: int | str) -> Path:
    return Path(f"/proc/{pid}/clear_refs")


def _resident(field: str, pid: int | str = "self") -> int | None:
    if not os.access(_clear_refs(pid), os.W_OK):
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def size(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**20:.1f} MiB" if abs(count) >= 2**20 else f"{count / 2**10:.1f} KiB"

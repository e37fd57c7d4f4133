"""The object store in memory: what a worker uses unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from farpoint.plugins import StorePlugin, hookimpl
from farpoint.store import ObjectStore


def _make(worker: str) -> ObjectStore:
    from farpoint_memory.store import MemoryStore

    return MemoryStore()


@hookimpl
def farpoint_stores() -> Iterator[StorePlugin]:
    """Register the store `memory`."""
    yield StorePlugin(name="memory", factory=_make)

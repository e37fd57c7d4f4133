"""Memory for the large messages of one link."""

from __future__ import annotations

import ctypes
import mmap
import weakref

from farpoint.errors import DecodeError

LAZY = 1024 * 1024
"""Size from which on memory is mapped, and gets a page when bytes arrive there.

A `bytearray`, which is faster below, is zeroed when it is made: a peer that declares a size and sends nothing costs as much.
Of a mapping it costs address space only.
"""

ROUND = 2 * 1024 * 1024
"""What the size of a mapping is a multiple of: a huge page."""


class Memory:
    """Hands memory out, and keeps the last that came back for the next message.

    The kernel needs longer to give a new page than a link needs to fill it: of large messages in a row, each in new
    memory, half the time goes into that. `trim` gives the memory back when there is a pause.
    """

    def __init__(self) -> None:
        self._spare: mmap.mmap | None = None

    def take(self, size: int) -> memoryview:
        """Return writable memory. It is not zeroed, and may be used as long as somebody has a view of it.

        Raises:
            DecodeError: This machine has not as much.
        """
        if size < LAZY:
            return memoryview(bytearray(size))
        spare, self._spare = self._spare, None
        if spare is None or not size <= len(spare) <= 4 * size:
            spare = _map(size)
        # Every view of the memory, also one that somebody else has sliced, keeps this array: it goes with the last of them.
        owner = (ctypes.c_ubyte * size).from_buffer(spare)
        weakref.finalize(owner, self._take_back, spare).atexit = False
        return memoryview(owner).cast("B")

    def trim(self) -> None:
        """Keep nothing."""
        self._spare = None

    def _take_back(self, memory: mmap.mmap) -> None:
        self._spare = memory


def _map(size: int) -> mmap.mmap:
    try:
        # Anonymous and private: no page exists before something is written there, and a forked child has its own.
        made = mmap.mmap(-1, -(-size // ROUND) * ROUND, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise DecodeError(f"a message of {size} bytes, more than this machine has memory for") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            made.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them; small pages do as well
    return made

"""Operations in processes of their own, for workers that serve people they do not trust.

::

    worker ── control ── zygote             imports torch once, forks, runs no operation
      │                    └─ fork ─┐
      └── pipe, one a session ── executor   runs the operations of one session, with a memory limit

Objects stay with the worker. A storage that is not small is in a memory file, which both sides map: an operation in place is
seen by the worker, and a view that an operation returns is one of the worker's own storage. A small one travels by value, and
comes back if it was written to. An executor sees no storages but those of the operation that it runs.

The worker trusts the zygote and not the executor: an answer is JSON and sealed memory files, and is checked before a tensor is
made of it (`memory.py`). An executor that crashes, lies or is late is ended, and the next operation gets a fresh one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farpoint.isolation.executor import Isolation
    from farpoint.worker import Worker


def isolation_of(worker: Worker) -> Isolation:
    """Return what runs the operations of a worker's sessions apart from it.

    Raises:
        ValueError: This system has not what that takes.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError("isolate=True needs memory files and process descriptors, which Linux has")
    from farpoint.isolation.executor import Isolation  # what it imports is not everywhere

    return Isolation(worker)

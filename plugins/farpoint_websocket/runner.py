"""The thread that runs the event loop: one in each process, for all links and listeners."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from farpoint.errors import TransportError
from farpoint.limits import Limits

T = TypeVar("T")


class Guest(Protocol):
    """What lives on the loop until it is closed: a link, a listener."""

    limits: Limits

    def descriptor(self) -> int:
        """Return the file descriptor of its socket, -1 if that is closed."""

    def close(self) -> None:
        """Begin to end in good order."""

    def join(self, seconds: float) -> None:
        """Wait for the end, but no longer than so many seconds."""


class Runner:
    """An event loop on a thread of its own.

    So links work in a plain script as in a notebook, where a loop is running already, and from any thread.

    Attributes:
        guests: Who lives on the loop.
    """

    def __init__(self) -> None:
        self.guests: set[Guest] = set()
        self._pid = os.getpid()
        # Not the loop of the policy: that one is chosen for the program around us.
        self._loop = asyncio.SelectorEventLoop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="farpoint-websocket", daemon=True)
        self._thread.start()

    def call(self, url: str, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and return or raise what it does.

        Raises:
            TransportError: The process is about to end.
        """
        if self._loop.is_closed():
            coroutine.close()
            raise TransportError(url, "the interpreter shuts down")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt of this thread; without effect on a coroutine that has ended.
            future.cancel()
            raise

    def soon(self, function: Callable[..., object], *args: object) -> None:
        """Call a function on the loop, from any thread. After the end of the loop nothing happens."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task, from the loop, and keep it: the loop itself does not."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def foreign(self) -> bool:
        """Return whether this is a forked child of the process that the loop belongs to."""
        return os.getpid() != self._pid

    def check(self, url: str) -> None:
        """Refuse to work in a forked child.

        Raises:
            TransportError: This is one.
        """
        if self.foreign():
            raise TransportError(
                url,
                "this link was made before the process was forked, and is the parent's: both would write into one "
                "connection. Connect in the child",
            )

    def desert(self) -> None:
        """Let go of what a forked child has inherited: open sockets would outlive the parent in it.

        Their descriptors are pointed elsewhere, not closed: the objects that own them are still there, and close
        them by number.
        """
        nowhere = os.open(os.devnull, os.O_RDWR)
        for guest in self.guests:
            descriptor = guest.descriptor()
            if descriptor >= 0:
                os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)

    def stop(self) -> None:
        """End everything, in good order where that is quick."""
        guests = list(self.guests)
        for guest in guests:
            guest.close()
        deadline = time.monotonic() + max([guest.limits.close_seconds for guest in guests], default=0.0)
        for guest in guests:
            guest.join(max(0.0, deadline - time.monotonic()))
        self.soon(self._loop.stop)
        self._thread.join(1.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        # Connections that were aborted just now are closed by callbacks, and those of TLS by callbacks of these.
        for _ in range(3):
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


_lock = threading.Lock()
_current: list[Runner] = []
_deserted: list[Runner] = []


def runner() -> Runner:
    """Return the runner of this process."""
    with _lock:
        if not _current:
            _current.append(Runner())
        return _current[0]


def leave() -> None:
    """End everything in this process. Called at its exit."""
    for present in _current:
        present.stop()


def _forked() -> None:
    """Begin anew in a forked child."""
    global _lock  # noqa: PLW0603  # the parent may have held it
    _lock = threading.Lock()
    for inherited in _current:
        inherited.desert()
        # Kept: collecting the tasks of a loop that will never run again is reported as a mistake.
        _deserted.append(inherited)
    _current.clear()


os.register_at_fork(after_in_child=_forked)

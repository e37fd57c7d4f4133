"""Worker processes that tests use one after another: to start one takes seconds, most of them for torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farpoint.errors import FarpointError
from farpoint.testing.transport import eventually

if TYPE_CHECKING:
    from farpoint.cluster import LocalCluster
    from farpoint.remote import RemoteWorker

_DIGITS = "0123456789"


class Pool:
    """Lends workers of a cluster: it is called with a name, as `farpoint_workers` is.

    A worker is called like what is asked for, but for the number at the end: whoever asks for `bob17` gets `bob`, and `bob.2` if
    another one has that. Each loan is a session of its own.

    Args:
        cluster: Whose workers. More are started as they are needed.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._lent: dict[str, RemoteWorker] = {}
        self._used: set[str] = set()

    def __call__(self, name: str) -> RemoteWorker:
        """Return the handle of a worker that nobody has. Whoever closes it gives it back."""
        stem = name.rstrip(_DIGITS)
        number = 1
        chosen = stem
        while chosen in self._lent and self._lent[chosen].peer.channel.lost is None:
            number += 1
            chosen = f"{stem}.{number}"
        if chosen not in self._cluster:
            self._cluster.add(chosen)
        elif self._cluster.processes[chosen].poll() is not None:
            self._cluster.restart(chosen)
        self._lent[chosen] = self._cluster[chosen]
        self._used.add(chosen)
        return self._lent[chosen]

    def end(self, handle: RemoteWorker) -> None:
        """End a worker itself. Where another one is asked for, it gets a new life."""
        handle.close()
        process = self._cluster.processes[handle.id]
        process.kill()
        process.wait()
        self._used.discard(handle.id)

    def check(self) -> None:
        """Take back what was lent, and check that nothing is left of it: no worker is lost, and each of them is empty.

        One that is not gets a new life, so that the next test is judged by what it does itself.

        Raises:
            AssertionError: Something is left.
        """
        left: list[str] = []
        used, self._used = self._used, set()
        for handle in self._lent.values():
            handle.close()
        self._lent.clear()
        for name in sorted(used):
            code = self._cluster.processes[name].poll()
            if code is not None:
                left.append(f"{name} has ended with code {code}")
                continue
            try:
                with self._cluster[name] as handle:
                    if not _becomes_empty(handle):
                        left.append(f"{name} stores {handle._objects}")
                        self._cluster.restart(name)
            except FarpointError as error:
                left.append(str(error))
                self._cluster.restart(name)
        assert not left, f"this test has left something behind: {'; '.join(left)}"


def _becomes_empty(worker: RemoteWorker) -> bool:
    """Return whether a worker stores nothing, or does so soon: it may just have learnt that a session is over."""
    try:
        eventually(lambda: not len(worker))
    except AssertionError:
        return False
    return True

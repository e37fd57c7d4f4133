"""What the user holds of a worker, and the worker that this process itself is."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from farpoint.errors import WorkerNotFoundError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.route import forget_routes, route_of
from farpoint.worker import Worker

if TYPE_CHECKING:
    from farpoint.hook import TorchHook
    from farpoint.peer import Peer
    from farpoint.pointer import PointerTensor

_handles: dict[str, RemoteWorker] = {}
_me: Worker | None = None


def preferred_serializers(first: str | None = None) -> list[str]:
    """Return the serializers to offer, best first: the one asked for, or `FARPOINT_SERIALIZER`, or msgpack."""
    chosen = first or os.environ.get("FARPOINT_SERIALIZER") or "msgpack"
    plugins.serializer(chosen, DEFAULT_LIMITS)  # a wrong name is an error here, not at the peer
    return [chosen]


def me() -> Worker:
    """Return the worker of this process, made when it is first needed."""
    global _me  # noqa: PLW0603  # one process is one party
    if _me is None:
        _me = Worker("me", "", preferred_serializers())
        atexit.register(_report)
    return _me


def _report() -> None:
    for handle in list(_handles.values()):
        handle.flush()
    unseen = [error for error, looked_at in me().failures.values() if not looked_at]
    for error in unseen:
        sys.stderr.write(f"farpoint: an error that nobody looked at: {error}\n")


def resolve(worker: RemoteWorker | str) -> RemoteWorker:
    """Return the handle of a worker.

    Raises:
        WorkerNotFoundError: It is not known, or was closed.
    """
    if isinstance(worker, RemoteWorker):
        return worker
    if worker not in _handles:
        raise WorkerNotFoundError(str(worker), _handles)
    return _handles[worker]


def handle_of(name: str) -> RemoteWorker:
    """Return the handle of a worker by name."""
    return resolve(name)


class Objects(Mapping[int, Any]):
    """What a worker stores, as it was when it was asked for."""

    def __init__(self, objects: dict[int, Any]) -> None:
        self._objects = objects

    def __getitem__(self, object_id: int) -> Any:
        return self._objects[object_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)

    def __repr__(self) -> str:
        return repr(self._objects)


class RemoteWorker:
    """A worker as a client sees it.

    Attributes:
        id: Its name.
        url: Where it listens.
    """

    def __init__(self, name: str, url: str) -> None:
        self.id = name
        self.url = url
        self.peer: Peer = me().peer(name, url)
        _handles[name] = self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} at {self.url}>"

    def __bool__(self) -> bool:
        return True  # also when it stores nothing

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def _objects(self) -> Objects:
        raise NotImplementedError

    def flush(self) -> None:
        """Send what is waiting, without waiting for it."""
        if self.peer.channel.lost is None:
            self.peer.flush()

    def synchronize(self) -> None:
        """Wait until everything issued so far, by whatever way, has taken effect.

        Raises:
            FarpointError: The first error that nobody has looked at yet.
        """
        settle_all()
        for uid, (error, looked_at) in list(me().failures.items()):
            if not looked_at and getattr(error, "worker", self.id) == self.id:
                me().failures[uid] = (error, True)
                raise error

    def search(self, *tags: str) -> list[PointerTensor]:
        """Return pointers to the objects that carry all of these tags."""
        from farpoint.handover import search

        return search(self, tags)

    def clear_objects(self) -> RemoteWorker:
        """Drop every object of the worker, whoever holds it, and return the worker."""
        self.peer.request([int(Kind.CLEAR)])
        return self

    def close(self) -> None:
        """End the session. Pointers to the worker are lost."""
        if _handles.get(self.id) is self:
            del _handles[self.id]
        forget_routes(self.peer)
        self.peer.close()
        if me().peers.get(self.id) is self.peer:
            del me().peers[self.id]


def settle_all() -> None:
    """Wait until everything issued by this process has taken effect."""
    for handle in list(_handles.values()):
        if handle.peer.channel.lost is None:
            route_of(handle.peer).synchronize()


class VirtualWorker(RemoteWorker):
    """A worker inside this process, behind a real link and a real serializer.

    Args:
        hook: What `TorchHook(torch)` returned; a worker needs none.
        id: Its name. A worker that has it already is replaced, with a warning.
        serializer: Name of the serializer; `FARPOINT_SERIALIZER` or msgpack if not given.
        store: Name of the object store; `FARPOINT_STORE` or memory if not given.
        transport: Name or URL scheme of the transport; `FARPOINT_TRANSPORT` or virtual if not given.
    """

    def __init__(
        self,
        hook: TorchHook | None = None,
        id: str = "worker",  # the name that users of this field know
        *,
        serializer: str | None = None,
        store: str | None = None,
        transport: str | None = None,
    ) -> None:
        existing = _handles.get(id)
        if existing is not None:
            warnings.warn(
                f"worker {id!r} exists and is replaced; pointers to the old one are lost", UserWarning, stacklevel=2
            )
            existing.close()
        offered = preferred_serializers(serializer)
        transport = transport or os.environ.get("FARPOINT_TRANSPORT") or "virtual"
        schemes = {record.name: record.schemes[0] for record in plugins.transports()}
        url = plugins.transport(f"{schemes.get(transport, transport)}://").local_url(id)
        self._worker = Worker(id, url, offered, store or os.environ.get("FARPOINT_STORE") or "memory")
        me().serializers = offered
        super().__init__(id, self._worker.url)

    @property
    def _objects(self) -> Objects:
        settle_all()
        settle_all()  # releases that the first round set free have now arrived too
        return Objects(dict(self._worker.store.items()))

    def close(self) -> None:
        """End the worker."""
        super().close()
        self._worker.close()

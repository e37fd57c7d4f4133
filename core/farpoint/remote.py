"""What the user holds of a worker, and the worker that this process itself is."""

from __future__ import annotations

import atexit
import copy
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from farpoint.channel import disown_channels
from farpoint.errors import FarpointError, UnseenErrorWarning, WorkerLostError, WorkerNotFoundError
from farpoint.generator import check_seed
from farpoint.limits import DEFAULT_LIMITS
from farpoint.listing import fetch_listing
from farpoint.names import check_worker_id
from farpoint.plugins import plugins
from farpoint.protocol.messages import Kind
from farpoint.provenance import caller, locate, spell
from farpoint.route import forget_all_routes, forget_routes, route_of
from farpoint.worker import Worker

if TYPE_CHECKING:
    from farpoint.hook import TorchHook
    from farpoint.peer import Peer
    from farpoint.pointer import PointerTensor

_handles: dict[str, RemoteWorker] = {}
_me: Worker | None = None
_inherited: list[Any] = []
_SHOWN = 10
_PATIENCE = 5.0


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
    return _me


@atexit.register
def _report() -> None:
    if _me is not None:  # in a forked child there may be nothing of its own
        for handle in list(_handles.values()):
            handle.flush()
        _warn_unseen(None)


def _warn_unseen(worker: str | None) -> None:
    """Warn of the errors of a worker, or of all, that nobody looked at.

    All are in one warning: where warnings are errors, a second one would not come.
    """
    failures = me().failures
    unseen = {
        uid: error
        for uid, (error, looked_at) in list(failures.items())
        if not looked_at and worker in (None, error.origin)
    }
    if not unseen:
        return
    failures.update({uid: (error, True) for uid, error in unseen.items()})
    listed = ["  " + str(error).partition("\n")[0] for error in list(unseen.values())[:_SHOWN]]
    if len(unseen) > _SHOWN:
        listed.append(f"  and {len(unseen) - _SHOWN} more")
    number = "an error" if len(unseen) == 1 else f"{len(unseen)} errors"
    text = f"nobody looked at {number}; get() a result, or worker.synchronize(), raises what went wrong:"
    file, line = locate(caller())
    warnings.warn_explicit("\n".join([text, *listed]), UnseenErrorWarning, file or "<exit>", line)


def _leave_parent() -> None:
    """Begin anew in a child that was just forked: sessions, and what is waiting in them, are the parent's.

    Nothing of the parent's is closed, and what it is made of is kept, so that no finalizer of it runs here either.
    """
    global _me  # noqa: PLW0603  # one process is one party
    disown_channels()
    _inherited.append((_me, dict(_handles), plugins.forget_transports()))
    _me = None
    _handles.clear()
    forget_all_routes()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)


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


def handles() -> list[RemoteWorker]:
    """Return the handles of all workers that are connected."""
    return list(_handles.values())


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

    Args:
        name: Its name.
        url: Where it listens.
        serializers: What the session offers, best first; `FARPOINT_SERIALIZER` or msgpack if not given.

    Attributes:
        id: Its name.
        url: Where it listens.
    """

    def __init__(self, name: str, url: str, *, serializers: list[str] | None = None) -> None:
        self.id = check_worker_id(name)
        self.url = url
        self.peer: Peer = me().peer(name, url, serializers)
        _handles[name] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} at {self.url}>"

    def __bool__(self) -> bool:
        return True  # also when it stores nothing

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def _objects(self) -> Objects:
        """What the worker stores, by id, without values: see `farpoint.listing`.

        Raises:
            PermissionDeniedError: The worker's policy refuses.
        """
        _settle_twice()
        return Objects(dict(fetch_listing(self.peer)))

    def flush(self) -> None:
        """Send what is waiting, without waiting for it."""
        if self.peer.channel.lost is None:
            self.peer.flush()

    def synchronize(self) -> None:
        """Wait until everything issued so far, by whatever way, has taken effect.

        Raises:
            FarpointError: The first error of this worker that nobody has looked at yet.
            WorkerLostError: The session is over.
        """
        if self.peer.channel.lost is not None:
            raise self.peer.channel.ended()
        settle_all()
        if self.peer.channel.lost is not None:
            raise self.peer.channel.ended()
        for uid, (error, looked_at) in list(me().failures.items()):
            if not looked_at and error.origin == self.id:
                me().failures[uid] = (error, True)
                raise copy.copy(error)

    def ping(self) -> float:
        """Return the seconds that a question takes to the worker and back.

        Raises:
            WorkerLostError: The session is over.
        """
        began = time.perf_counter()
        self.peer.request([int(Kind.DESCRIBE), []])
        return time.perf_counter() - began

    def search(self, *query: str) -> list[PointerTensor]:
        """Return pointers to the objects that carry all of these tags, and all of these words in their description.

        A text that begins with `#` is a tag. See `farpoint.catalogue.search`.
        """
        from farpoint.catalogue import search

        return search(self.peer, query)

    def clear_objects(self) -> Self:
        """Drop every object of the worker, whoever holds it, and return the worker.

        Raises:
            PermissionDeniedError: The worker's policy refuses.
        """
        settle_all()  # whatever was issued before, by whatever way, comes first
        self.peer.request([int(Kind.CLEAR)])
        return self

    def manual_seed(self, seed: int) -> Self:
        """Begin the random numbers of the worker anew, and return the worker.

        What follows in the program draws on a CPU bit for bit what local torch draws after `torch.manual_seed(seed)`. A worker has
        one generator, which all of its clients draw from and may seed; one that isolates its sessions has one for each of them,
        and this is about that of this session. Nothing waits: a worker whose policy refuses says so as for any operation.

        Args:
            seed: An int from -2**63 to 2**64 - 1, as torch takes it.

        Raises:
            ValueError: It is none.
            WorkerLostError: The session is over.
        """
        message = [int(Kind.SEED), check_seed(seed)]
        route_of(self.peer).order()
        self.peer.tell(message, caller())
        return self

    def close(self) -> None:
        """End the session. Pointers to the worker are lost. The second call does nothing.

        Warns:
            UnseenErrorWarning: Operations have failed there, and nobody looked at their results.
        """
        self._end("closed")

    def _end(self, how: str) -> None:
        channel = self.peer.channel
        if channel.inherited:
            return  # it is the parent's
        if channel.lost is None:
            # What was issued takes effect, and what went wrong is heard of; who was given a pointer to this worker reaches it
            # first. But nobody waits for long, nor for a worker that is away.
            deadline = time.monotonic() + _PATIENCE
            peers = [handle.peer for handle in list(_handles.values()) if handle.peer.channel.lane is not None]
            for peer in peers if self.peer in peers else [self.peer]:
                try:
                    peer.wait(peer.ask([int(Kind.SYNC), [], []]), max(0.0, deadline - time.monotonic()))
                except FarpointError:
                    pass  # the end is what was asked for
            where = spell(caller()) or "an unknown place"
            channel.lost = channel.lost or ConnectionError(f"it was {how} at {where}")
        if _handles.get(self.id) is self:
            del _handles[self.id]
        forget_routes(self.peer)
        self.peer.close()
        if me().peers.get(self.id) is self.peer:
            del me().peers[self.id]
        _warn_unseen(self.id)


def settle_all() -> None:
    """Wait until everything issued by this process has taken effect, on every worker that is not lost."""
    for handle in list(_handles.values()):
        if handle.peer.channel.lost is None:
            try:
                handle.peer.request([int(Kind.SYNC), [], []])
            except WorkerLostError:
                if handle.peer.channel.lost is None:
                    raise  # somebody further down a chain


def manual_seed(seed: int) -> torch.Generator:
    """Seed torch here as `torch.manual_seed` does, and every worker that is connected, and return torch's generator.

    All get the same seed. That is every worker that this process has a handle of and that is not lost, in the order in which the
    handles were made: not one that is connected later, nor one that only other workers reach.

    Args:
        seed: An int from -2**63 to 2**64 - 1.

    Raises:
        ValueError: It is none; then nothing was seeded.
    """
    generator = torch.manual_seed(check_seed(seed))
    for handle in handles():
        if handle.peer.channel.lost is None:
            handle.manual_seed(seed)
    return generator


def _settle_twice() -> None:
    settle_all()
    settle_all()  # releases that the first round set free have now arrived too


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
        check_worker_id(id)
        offered = preferred_serializers(serializer)
        existing = _handles.get(id)
        if existing is not None:
            warnings.warn(
                f"worker {id!r} exists and is replaced; pointers to the old one are lost", UserWarning, stacklevel=2
            )
            existing._end("replaced")
        transport = transport or os.environ.get("FARPOINT_TRANSPORT") or "virtual"
        url = plugins.local_url(transport, id)
        self._worker = Worker(id, url, offered, store or os.environ.get("FARPOINT_STORE") or "memory")
        super().__init__(id, self._worker.url, serializers=offered)

    @property
    def _objects(self) -> Objects:
        """What the worker stores, by id: the tensors themselves, for it is in this process."""
        _settle_twice()
        return Objects(dict(self._worker.store.items()))

    def _end(self, how: str) -> None:
        if self.peer.channel.inherited:
            return
        try:
            super()._end(how)
        finally:
            self._worker.close()

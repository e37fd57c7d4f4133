"""What a plan's function issues in one call: held back, and put into a form in which two calls that do the same are equal.

Objects are named by *places*: the first id that a command names has place 0, the next new one place 1. So a stream of commands
says which template runs on what, and nothing about ids; two calls that do the same give equal streams. Ids, numbers and small tensors
are kept beside it, in order.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from farpoint.errors import PlanError
from farpoint.protocol.messages import Kind
from farpoint.provenance import Origin, Place, caller, spell

if TYPE_CHECKING:
    from farpoint.peer import Peer
    from farpoint.pointer import PointerTensor
    from farpoint.references import Reference
    from farpoint.route import Route
    from farpoint.spec import TensorSpec
    from farpoint.template import Template
    from farpoint.worker import Worker

Command = tuple["Template", tuple[int, ...], tuple[int, ...]]
"""A template, the places of its operands, and those of its results; -1 is no place."""

_REFUSED = {
    Kind.FETCH: ("reads a value", "get() after the call what the function returns"),
    Kind.READ: ("reads a value", "get() after the call what the function returns"),
    Kind.PUT: ("sends a tensor", "send it before the call, and pass the pointer"),
    Kind.LINK: ("sends a pointer", "send it before the call, and pass the pointer"),
    Kind.MOVE: ("moves data", "move it before or after the call"),
    Kind.ASK: ("needs a shape that depends on data", "do that before or after the call"),
    Kind.SYNC: ("waits, for itself or because it reaches one worker by two ways", "do one of them outside"),
}
_OTHERWISE = ("asks or tells a worker something", "do that before or after the call")

runs: set[Run] = set()
"""The calls that are under way, of all threads: as long as there are none, nobody looks further."""


class _Thread(threading.local):
    """The call that this thread is in."""

    run: Run | None = None


_thread = _Thread()


class Stream:
    """What one call issues to one worker.

    Attributes:
        peer: The worker.
        commands: The commands, without ids and values.
        ids: The id in each place.
        places: The place of each id.
        values: The numbers and small tensors, in order.
        origins: The line of each command.
        openly: The commands as `Peer.run` takes them.
        results: The places that were made here.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._references = peer.references
        self.commands: list[Command] = []
        self.ids: list[int] = []
        self.places: dict[int, int] = {}
        self.values: list[Any] = []
        self.origins: list[Place] = []
        self.openly: list[tuple[Template, list[Any], list[int], Origin, int]] = []
        self.results: set[int] = set()

    def take(self, template: Template, values: list[Any], results: list[int], origin: Origin, nbytes: int) -> None:
        """Take a command. What it names is held until the stream is sent, whoever gives it up."""
        named = [-1] * len(values)
        for hole in template.tensors:
            value = values[hole]
            if type(value) is int:
                place = self.places.get(value)
                named[hole] = self._find(value) if place is None else place
        if -1 in named:
            self.values += [value for value, place in zip(values, named, strict=True) if place < 0]
        made = [self._make(result) if result else -1 for result in results]
        self.commands.append((template, tuple(named), tuple(made)))
        self.origins.append(origin)  # type: ignore[arg-type]  # of a line of the user's, always
        self.openly.append((template, values, results, origin, nbytes))

    def send(self) -> None:
        """Send the commands one by one, as if they had not been held back."""
        openly, self.openly = self.openly, []
        try:
            for command in openly:
                self.peer.run(*command)
        finally:
            self.peer.references.dropped.extend(self.ids)
            self.ids = []

    def forget(self) -> None:
        """Hold nothing any more."""
        self.peer.references.dropped.extend(self.ids)
        self.ids, self.values, self.openly = [], [], []

    def _find(self, object_id: int) -> int:
        place = self.places[object_id] = len(self.ids)
        self.ids.append(object_id)
        self._references.pin(object_id)
        return place

    def _make(self, object_id: int) -> int:
        place = self.places[object_id] = len(self.ids)
        self.ids.append(object_id)
        self.results.add(place)
        self._references.pin_new(object_id)
        return place


class Run:
    """One call of a function that is, or becomes, a plan.

    Args:
        owner: The worker that issues what the function does.
        name: What errors call the function.
        watched: Whether the pointers that are used and made are noted.

    Attributes:
        streams: What was issued, by worker.
        held: Whether it is held back.
        used: The pointer to each object that was there before, by worker and id, if watched.
        versions: The versions of these before.
        made: References that were made, if watched.
        specs: The way to what was made, and its metadata, if watched.
    """

    def __init__(self, owner: Worker, name: str, *, watched: bool) -> None:
        self.owner = owner
        self.name = name
        self.watched = watched
        self.streams: dict[Peer, Stream] = {}
        self.held = True
        self.used: dict[tuple[Peer, int], PointerTensor] = {}
        self.made: dict[tuple[Peer, int], weakref.ref[Reference]] = {}
        self.versions: dict[tuple[Peer, int], int] = {}
        self.specs: dict[tuple[Peer, int], tuple[Route, TensorSpec]] = {}

    def __enter__(self) -> Self:
        runs.add(self)
        _thread.run = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        _thread.run = None
        runs.discard(self)

    def give_up(self) -> None:
        """Send what was held back, and hold nothing back any more."""
        before, _thread.run = _thread.run, None
        try:
            self.held = False
            for stream in self.streams.values():
                stream.send()
        finally:
            _thread.run = before


def current() -> Run | None:
    """Return the call that this thread is in."""
    return _thread.run


def hold(peer: Peer, template: Template, values: list[Any], results: list[int], origin: Origin, nbytes: int) -> bool:
    """Hold a command back, if it is one of a plan. The arguments are those of `Peer.run`."""
    run = _thread.run
    if run is None or not run.held or peer.owner is not run.owner or peer.channel.lost is not None:
        return False
    stream = run.streams.get(peer)
    if stream is None:
        stream = run.streams[peer] = Stream(peer)
    if len(stream.commands) >= peer.limits.plan_commands:
        fix = "let it do less, or raise Limits(plan_commands=...) on both sides"
        raise PlanError(run.name, f"issues more than {peer.limits.plan_commands} commands to {peer.name}", spell(origin), fix)
    stream.take(template, values, results, origin, nbytes)
    return True


def check(peer: Peer, message: list[Any]) -> None:
    """Refuse what cannot be a part of a plan, if this thread is in one.

    Raises:
        PlanError: It is.
    """
    run = _thread.run
    if run is None or not run.held or peer.owner is not run.owner:
        return
    # What was issued before the call, by another way, may still have to arrive.
    if message[0] == Kind.SYNC and peer not in run.streams:
        return
    reason, fix = _REFUSED.get(message[0], _OTHERWISE)
    raise PlanError(run.name, reason, spell(caller()), fix)


def used(tensors: Sequence[Any]) -> None:
    """Note the operands of a command."""
    run = _thread.run
    if run is None or not run.watched or not run.held:
        return
    for tensor in tensors:
        reference = getattr(tensor, "_reference", None)
        if reference is not None:
            name = (reference.peer, reference.id)
            if name not in run.used and name not in run.made:
                run.used[name] = tensor
                run.versions[name] = tensor._version


def made(pointer: PointerTensor) -> None:
    """Note a pointer that was made."""
    run = _thread.run
    if run is None or not run.watched or not run.held:
        return
    reference = pointer._reference
    if reference is not None:
        run.made[reference.peer, reference.id] = weakref.ref(reference)
        run.specs[reference.peer, reference.id] = (pointer._route, pointer._spec)


@contextmanager
def openly() -> Iterator[None]:
    """Let what follows in this call be sent at once: something happens that no other call of it will do."""
    run = _thread.run
    if run is not None and run.held and runs:
        run.give_up()
    yield


class PlanNumbers:
    """The numbers of the plans that a worker keeps for us.

    Attributes:
        dropped: Numbers of plans that are needed no more, and of which the worker has not been told.
    """

    def __init__(self) -> None:
        self.dropped: deque[int] = deque()
        self._free: list[int] = []
        self._next = 0

    def new(self, most: int) -> Registration | None:
        """Return the number of a new plan, None if there are as many as the worker takes."""
        if self._free:
            return Registration(self, self._free.pop())
        if self._next >= most:
            return None
        self._next += 1
        return Registration(self, self._next - 1)

    def take_dropped(self) -> Iterator[int]:
        """Yield the numbers to be forgotten, for commands to tell. The channel's lock is held."""
        while self.dropped:
            number = self.dropped.popleft()
            self._free.append(number)
            yield number


class Registration:
    """A plan that a worker keeps, for as long as somebody keeps this."""

    def __init__(self, numbers: PlanNumbers, number: int) -> None:
        self.number = number
        self._numbers = numbers

    def __del__(self) -> None:
        # No I/O in a finalizer.
        self._numbers.dropped.append(self.number)

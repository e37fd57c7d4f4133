"""For tests below the calls of users: parties that say what they are told to, links that deliver late, and what must hold after."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.errors import FarpointError, TransportError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.plugins import TransportPlugin, hookimpl, plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session
from farpoint.serializer import Frame
from farpoint.stored import StoredPointer
from farpoint.transport import Accept, Link, Listener, Receiver, Transport
from farpoint.worker import Worker

SPEC = [[2], [1], 0, "float32", False, False]
"""The metadata of two floats."""

_ODD: list[Any] = [
    *(None, True, False, 0, -1, 1.5, float("nan"), 2**31, 2**40 + 1, 2**62, 2**63, 2**64 - 1, -(2**63)),
    *("", "x", "\x00", "../..", "é", "x" * 5000, b"", b"x", [], [[]], [0], [-1], [True], [1.5], ["a"], ["x", "x"], [None]),
    *({}, {"a": 1}, {"a": {"b": []}}, [[[[[[]]]]]], list(range(2000)), [1, 1], ["c", 1], ["x", "ff"], "tensor", ["tensor"]),
]
_numbers = itertools.count()


def odd_values() -> list[Any]:
    """Return values of every kind that travels, most of them out of place wherever they are put."""
    return [*_ODD, torch.ones(2), [torch.ones(1)], {"t": torch.zeros(0)}]


def error_of(failure: dict[str, Any]) -> str:
    """Return the class of what was raised."""
    return str(failure["evidence"].get("error", failure["kind"]))


def traceback_of(failure: dict[str, Any]) -> str:
    """Return the traceback over there, if it came along."""
    return str(failure["evidence"].get("remote_traceback", ""))


class RawClient:
    """A client without manners: it sends whatever it is told to.

    Args:
        url: The worker.
        serializer: Name of the serializer.
        poses_as: A worker whose name, place and life it gives for its own.
        greeting: Fields of the greeting that differ from those of an honest client.

    Attributes:
        answers: What has come, by the number of the command: `[kind, content]`.
        welcome: What the worker said first.
        over: Whether the link is closed.
    """

    def __init__(
        self, url: str, serializer: str = "msgpack", /, poses_as: RawWorker | None = None, **greeting: Any
    ) -> None:
        self.answers: dict[int, list[Any]] = {}
        self.welcome: dict[str, Any] = {}
        self.over = False
        self.acknowledges = True
        self.session: Session | None = None
        self.serializer = plugins.serializer(serializer, Limits(array_items=2**20, header_bytes=2**24))
        self.holder = secrets.randbits(62) + 1
        self.incarnation = secrets.token_bytes(16)
        hello = {
            "farpoint": 1,
            "client": "mallory",
            "url": "",
            "session": self.holder,
            "incarnation": self.incarnation.hex(),
            "serializers": [serializer],
            **greeting,
        }
        if poses_as is not None:
            self.incarnation = poses_as.incarnation
            hello |= {"client": poses_as.name, "url": poses_as.url, "incarnation": self.incarnation.hex()}
        self.link = plugins.transport(url).connect(url, self)
        self.link.write([json.dumps(hello).encode()])

    def received(self, frames: Sequence[Frame]) -> None:
        if not self.welcome:
            self.welcome = json.loads(bytes(frames[0]))
            if "incarnation" in self.welcome:
                self.session = Session(self.incarnation, bytes.fromhex(self.welcome["incarnation"]))
            return
        assert self.session is not None
        packet: Any = self.serializer.decode(frames)
        for _, (kind, about, content) in self.session.receive(packet):
            if kind == Kind.FAILURE and "step" in content:
                self.answers.setdefault(about, [kind, content])  # of a plan each step may fail
                continue
            assert about not in self.answers or about == 0, f"message {about} was answered twice"
            self.answers[about] = [kind, content]

    def lost(self, cause: Exception | None) -> None:
        self.over = True

    def say(self, *messages: Any) -> list[int]:
        """Send a packet and return the numbers of its messages."""
        assert self.session is not None
        numbers = [self.session.submit(message) for message in messages]
        packet = self.session.pack()
        if packet is not None:
            if not self.acknowledges:
                packet[2] = 0
            self.write(self.serializer.encode(packet))
        return numbers

    def write(self, frames: Sequence[Frame]) -> None:
        """Send a packet as it is."""
        with contextlib.suppress(TransportError):
            self.link.write(frames)

    def ask(self, message: Any) -> Any:
        """Send a message and return what it is answered, None if it is not."""
        return self.answers.get(self.say(message)[0], [None, None])[1]

    def error(self, message: Any) -> tuple[str, str]:
        """Send a message that fails and return class and text of the error."""
        (number,) = self.say(message)
        kind, failure = self.answers.get(number, [0, None])
        assert kind == Kind.FAILURE, f"{message!r:.200} did not fail: {failure}"
        return error_of(failure), failure["text"]

    def close(self) -> None:
        self.link.close()


class RawWorker:
    """A worker without manners: it answers what it is told to.

    Args:
        name: What it calls itself.
        answer: Returns the messages that answer a command.
        welcome: Fields of the welcome that differ from those of an honest worker, or the whole as bytes.
        hangs_up: Whether it closes the link instead of saying welcome.
    """

    def __init__(
        self,
        name: str,
        answer: Callable[[int, list[Any]], list[Any]] = lambda number, message: [],
        welcome: dict[str, Any] | bytes | None = None,
        *,
        hangs_up: bool = False,
    ) -> None:
        self.hangs_up = hangs_up
        self.name = name
        self.url = f"virtual://{name}"
        self.answer = answer
        self.over = 0
        self._welcome = welcome if welcome is not None else {}
        self.incarnation = secrets.token_bytes(16)
        self._listener = plugins.transport(self.url).listen(self.url, self._accept)

    def _accept(self, link: Link) -> Receiver:
        return _RawGuest(self, link)

    def close(self) -> None:
        self._listener.close()


class _RawGuest:
    def __init__(self, worker: RawWorker, link: Link) -> None:
        self._worker = worker
        self._link = link
        self._session: Session | None = None
        self._serializer = plugins.serializer("msgpack", DEFAULT_LIMITS)

    def received(self, frames: Sequence[Frame]) -> None:
        worker = self._worker
        if self._session is None:
            hello = json.loads(bytes(frames[0]))
            self._session = Session(worker.incarnation, bytes.fromhex(hello["incarnation"]))
            if worker.hangs_up:
                self._link.close()
                return
            if isinstance(worker._welcome, bytes):
                self._link.write([worker._welcome])
                return
            welcome = {"worker": worker.name, "incarnation": worker.incarnation.hex(), "serializer": "msgpack"}
            self._link.write([json.dumps({**welcome, **worker._welcome}).encode()])
            return
        packet: Any = self._serializer.decode(frames)
        for number, message in self._session.receive(packet):
            for answer in worker.answer(number, message):
                if isinstance(answer, bytes):
                    self._link.write([answer])
                    return
                self._session.submit(answer)
        reply = self._session.pack()
        if reply is not None:
            with contextlib.suppress(TransportError):
                self._link.write(self._serializer.encode(reply))

    def lost(self, cause: Exception | None) -> None:
        self._worker.over += 1


def stocked(client: RawClient, first: int = 1, second: int = 2) -> RawClient:
    """Let a client define addition in slot 0 and put two tensors of ones, and return it."""
    client.say(
        [int(Kind.DEFINE), 0, "aten::add.Tensor", [["t"], ["t"]], {}],
        [int(Kind.PUT), first, torch.ones(2), False, [], ""],
        [int(Kind.PUT), second, torch.ones(2), False, [], ""],
    )
    return client


def new_worker(name: str = "bob", limits: Limits = DEFAULT_LIMITS) -> Worker:
    """Return a worker of a name of its own that nobody has reached yet."""
    name = f"{name}-{next(_numbers)}.raw"
    return Worker(name, f"virtual://{name}", ["msgpack"], limits=limits)


def check_books(worker: Worker) -> None:
    """Assert that a worker's store and its list of holders say the same."""
    held: dict[int, int] = {}
    for ids in worker.holders._held.values():
        for object_id in ids:
            held[object_id] = held.get(object_id, 0) + 1
    there = set(worker.store) | set(worker.poisoned)
    assert set(held) == there, f"held and not there: {set(held) - there}; there and not held: {there - set(held)}"
    assert {i: n for i, n in held.items() if n > 1} == worker.holders._shared
    assert not set(worker.store) & set(worker.poisoned)
    assert set(worker.holders._held) - {0} == set(worker.guests), "somebody is listed who is not here"
    for guest in worker.guests.values():
        assert guest.held is worker.holders._held[guest.holder]
    for value in worker.store.values():
        assert isinstance(value, torch.Tensor | StoredPointer)


def check_idle(worker: Worker) -> None:
    """Assert that nothing is under way at a worker."""
    movers = worker.movers
    assert not movers._leaving and not movers._staged and not movers._expected and not movers._ends
    assert not [reply for peer in worker.peers.values() for reply in peer.answers.pending.values()]


class LateLink(Link):
    """One end of a link whose messages wait until the transport's own thread delivers them."""

    def __init__(self, transport: LateTransport, url: str) -> None:
        self.transport = transport
        self.url = url
        self.queue: deque[list[bytes] | None] = deque()
        self.receiver: Receiver
        self.other: LateLink
        self.closed = False

    def write(self, frames: Sequence[Frame]) -> None:
        if self.closed:
            raise TransportError(self.url, "the link is closed")
        self.transport.put(self, [bytes(frame) for frame in frames])

    def close(self) -> None:
        if not self.closed:
            self.closed = self.other.closed = True
            self.transport.put(self, None)
            self.transport.put(self.other, None)


class LateTransport(Transport):
    """Delivers on a thread of its own: in order on each link, in any order across links, and never while somebody writes.

    That thread delivers everything: if carrying a message out ever waited for another message, both would wait for ever.
    """

    schemes: ClassVar[tuple[str, ...]] = ("late",)

    def __init__(self, seed: int = 0) -> None:
        self.held_back: Callable[[str], bool] = lambda _: False
        self.errors: list[BaseException] = []
        self._random = random.Random(seed)
        self._accepts: dict[str, Accept] = {}
        self._links: list[LateLink] = []
        self._wake = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def local_url(self, name: str) -> str:
        return f"late://{name}"

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        if url not in self._accepts:
            raise TransportError(url, "nobody listens there")
        near, far = LateLink(self, url), LateLink(self, url)
        near.other, far.other = far, near
        # What one end writes, the receiver at the other end gets.
        far.receiver = receiver
        near.receiver = self._accepts[url](far)
        with self._wake:
            self._links += [near, far]
        return near

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        self._accepts[url] = accept
        return LateListener(self, url)

    def put(self, link: LateLink, message: list[bytes] | None) -> None:
        with self._wake:
            link.queue.append(message)
            self._wake.notify()

    def stop(self) -> None:
        """Deliver nothing any more."""
        with self._wake:
            self._over = True
            self._wake.notify()
        self._thread.join(10)

    def wake(self) -> None:
        """Look again at what was held back."""
        with self._wake:
            self._wake.notify()

    def _deliver(self) -> None:
        while True:
            with self._wake:
                ready: list[LateLink] = []
                while not self._over:
                    ready = [link for link in self._links if link.queue and not self.held_back(link.url)]
                    if ready:
                        break
                    self._wake.wait()
                if self._over:
                    return
                link = self._random.choice(ready)
                message = link.queue.popleft()
                if message is None:
                    link.queue.clear()
                    self._links.remove(link)
            try:
                if message is None:
                    link.receiver.lost(None)
                else:
                    link.receiver.received(message)
            except BaseException as error:  # noqa: BLE001  # a receiver raises nothing: whoever made this transport looks
                self.errors.append(error)


class LateListener(Listener):
    """A place where links arrive."""

    def __init__(self, transport: LateTransport, url: str) -> None:
        self.url = url
        self._transport = transport

    def close(self) -> None:
        self._transport._accepts.pop(self.url, None)


@contextlib.contextmanager
def late_links(seed: int = 0) -> Iterator[LateTransport]:
    """Register a `LateTransport` under the scheme `late`, and assert afterwards that no receiver has raised."""
    transport = LateTransport(seed)

    class Plugin:
        @hookimpl
        def farpoint_transports(self) -> list[TransportPlugin]:
            return [TransportPlugin("late", ("late",), lambda: transport)]

    plugin = Plugin()
    plugins.register(plugin)
    try:
        yield transport
    finally:
        plugins.unregister(plugin)
        transport.stop()
    assert transport.errors == []


def kind_error(name: str) -> bool:
    """Return whether a class of that name is an error of ours."""
    from farpoint import errors

    found = vars(errors).get(name)
    return isinstance(found, type) and issubclass(found, FarpointError)

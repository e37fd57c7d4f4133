"""Genuine traffic with faults in it: recorded, distorted, and sent to real workers beside an honest client.

Each seed is one session of a client that does everything a client can do, with a few of its messages changed. Whatever
becomes of it, every failure is of a class of ours or torch's own about the operands, the books of the workers agree, and
the honest client has what it had. Nothing that is sent is ever run: the texts and bytes among what is put in are code.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import sys
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch

import farpoint
from farpoint import RemoteWorker, executor
from farpoint.limits import Limits
from farpoint.listing import fetch_listing
from farpoint.plugins import hookimpl, plugins
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import FAILURE
from farpoint.stored import StoredPointer
from farpoint.worker import Worker
from wire import RawClient, check_books, check_idle, error_of, kind_error, odd_values, traceback_of

numbers = itertools.count()
SEEDS = 250
HONEST = 2**62
_TORCH = torch.__file__.rpartition("/")[0]

_ran: list[str] = []
_watching = False


class Canary:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return _sing, ()


def _sing() -> None:
    _ran.append("unpickled")


CODE: list[Any] = [
    "__import__('os').system('true')",
    "os.system",
    "builtins.eval",
    "aten::from_file.default",
    "c__builtin__\neval\n(S'_ran'\ntR.",
    "{{7*7}} ${7*7} %s %n {0.__class__}",
    "../../../etc/passwd",
    "file:///etc/passwd",
    pickle.dumps(Canary()),
    pickle.dumps(Canary(), 0),
    {"__class__": "Canary", "__reduce__": ["os.system", ["true"]]},
    ["$t", ["float32", [1]]],
]


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and (event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")):
        _ran.append(event)


sys.addaudithook(_audit)


@attrs.frozen
class Traffic:
    """What a client has said, to which of the workers, in order; and its session with each."""

    messages: list[tuple[int, list[Any]]]
    sessions: list[int]

    def clients(self, workers: list[Worker], serializer: str) -> list[RawClient]:
        """Return clients that are to say it again: a move names the session that shall hold what moves."""
        return [RawClient(w.url, serializer, session=s) for w, s in zip(workers, self.sessions, strict=True)]


class _NoClearing:
    """Clearing is a right over the objects of others by design, so in these tests nobody has it."""

    @hookimpl
    def farpoint_authorize(self, action: str) -> str | None:
        return "not here" if action == "clear" else None


def work(bob: RemoteWorker, alice: RemoteWorker) -> None:
    """Do everything that a client does."""
    send = farpoint.send
    fetch_listing(bob.peer)
    x = send(torch.arange(6.0).reshape(2, 3), bob)
    w: Any = send(torch.ones(3, 2).requires_grad_(), bob)
    y: Any = (x @ w).relu() + 1.5
    y.sum().backward()
    y[0].mul_(2)
    torch.cat([x, x * 2j.real]).t()
    x.nonzero()
    bob.manual_seed(3)
    bob.peer.request([int(Kind.DESCRIBE), [x.id_at_location]])
    bob.peer.request([int(Kind.READ), x.id_at_location, 0, 4])
    torch.unique(x, return_inverse=True)
    doubled = farpoint.plan(lambda a: a * 2)
    for _ in range(3):
        doubled(x)
    p: Any = send(x, alice)
    q: Any = p + p * 2
    q.add_(torch.tensor(1.0))
    q.nonzero()
    p.get(keep=True)
    q.get().get()
    farpoint.move(send(torch.ones(4), bob), alice)
    moved: Any = p.remote_get()
    back: Any = moved.remote_send(bob)
    back.tag("#tag").describe("what it is")
    alice.search("#tag")
    bad = torch.linalg.inv(send(torch.zeros(2, 2), bob))
    with pytest.raises(farpoint.RemoteExecutionError, match="singular"):
        (bad + 1).get()


@pytest.fixture(scope="module")
def _no_clearing() -> Iterator[None]:
    policy = _NoClearing()
    plugins.register(policy)
    yield
    plugins.unregister(policy)


@pytest.fixture(scope="module", params=["msgpack", "torch"])
def stage(_no_clearing: None, request: pytest.FixtureRequest) -> Iterator[tuple[str, Traffic, list[Worker]]]:
    """Return a serializer, traffic that was recorded with it, and the two workers that it was meant for."""
    n = next(numbers)
    limits = Limits(message_bytes=2**24, bytes=2**24)
    workers = [
        Worker(f"{name}-{n}", f"virtual://{name}-{n}", [request.param], limits=limits) for name in ("bob", "alice")
    ]
    said: list[tuple[int, list[Any]]] = []
    execute = Worker.execute

    def recorded(self: Worker, guest: Any, number: int, message: list[Any]) -> None:
        if guest.name == "me" and self in workers:
            said.append((workers.index(self), copy.deepcopy(message)))
        execute(self, guest, number, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "execute", recorded)
        patch.setattr(farpoint.me(), "serializers", [request.param])
        handles = [RemoteWorker(worker.id, worker.url) for worker in workers]
        work(*handles)
        sessions = [handle.peer.session_id for handle in handles]
        for handle in handles:
            handle.close()
    assert {message[0] for _, message in said} >= set(Kind) - {
        Kind.CLEAR,
        Kind.TRANSFER,
        Kind.CHUNK,
        Kind.WHOLE,
        Kind.ANSWER,
        Kind.FAILURE,
    }
    for worker in workers:
        for peer in list(worker.peers.values()):
            peer.close()
        worker.peers.clear()
        assert not worker.store
    said.append((0, [int(Kind.CLEAR)]))
    for place in (0, 1):
        for name, fields in (("Commit", [5]), ("Prepared", [6]), ("Abort", [7, 8, 9]), ("Inquire", [5, ["x", "f" * 32]])):
            said.append((place, [int(Kind.TRANSFER), name, fields, None]))
        push = [5, 5, 1, 77, 78, False, None, None]
        said.append((place, [int(Kind.TRANSFER), "Push", push, [torch.ones(2), False, [], "", ""]]))
    yield request.param, Traffic(said, sessions), workers
    for worker in workers:
        worker.close()


def distort(message: Any, chance: random.Random, ids: list[int], donor: Any) -> Any:
    """Return a message with one fault in it."""
    if not isinstance(message, list | dict) or not message or chance.random() < 0.15:
        choice = chance.randrange(5)
        if choice == 0 and type(message) is int:
            # No size between this and what is refused: it would be allocated.
            return chance.choice([0, 1, -1, message + 1, -message, 2**41, 2**63 - 1, -(2**63), 2**64 - 1])
        if choice == 1:
            return chance.choice(ids)
        if choice == 2:
            return copy.deepcopy(chance.choice(CODE))
        if choice == 3:
            while isinstance(donor, list) and donor and chance.random() < 0.7:
                donor = chance.choice(donor)
            return copy.deepcopy(donor)
        value = copy.deepcopy(chance.choice(odd_values()))
        return value if not isinstance(value, int) or abs(value) < 2**20 or abs(value) > 2**40 else 3
    if isinstance(message, dict):
        key = chance.choice(list(message))
        return {**message, key: distort(message[key], chance, ids, donor)}
    position = chance.randrange(len(message))
    changed = list(message)
    choice = chance.randrange(8)
    if choice == 0:
        del changed[position]
    elif choice == 1:
        changed.insert(position, copy.deepcopy(changed[chance.randrange(len(changed))]))
    elif choice == 2:
        changed = [changed] * chance.randrange(1, 4)
    else:
        changed[position] = distort(changed[position], chance, ids, donor)
    return changed


def script(traffic: Traffic, chance: random.Random, ids: list[int]) -> list[tuple[int, Any]]:
    """Return the traffic with some faults in it."""
    messages: list[tuple[int, Any]] = list(traffic.messages)
    for _ in range(chance.choice([1, 2, 4, 8])):
        position = chance.randrange(len(messages))
        place, message = messages[position]
        choice = chance.randrange(10)
        if choice == 0:
            del messages[position]
        elif choice == 1:
            messages.insert(chance.randrange(len(messages)), (place, message))
        elif choice == 2:
            messages[position] = (1 - place, message)
        else:
            donor = chance.choice(traffic.messages)[1]
            messages[position] = (place, distort(message, chance, ids, donor))
    return messages


def own(message: Any, honest: set[int]) -> bool:
    """Return whether a message claims an object that nobody has told its sender of: knowing its id is the right to it."""
    kind = message[0] if isinstance(message, list) and message and type(message[0]) is int else None
    return kind not in (Kind.CLAIM, Kind.LINK) or not any(item in honest for item in message if type(item) is int)


def check_failure(message: Any, failure: Any) -> None:
    FAILURE.check_map(failure)
    assert kind_error(failure["kind"]), failure
    if kind_error(error_of(failure)):
        return
    # Torch's own, raised by an operation about its operands: now, or when what is asked for now was computed.
    frames = [line.split('"')[1] for line in traceback_of(failure).splitlines() if line.startswith('  File "')]
    called = frames[-1:] == [executor.__file__] and "operation.call(" in traceback_of(failure)
    assert called or (frames and frames[-1].startswith(_TORCH)), (message, traceback_of(failure))


def honest_client(workers: list[Worker], serializer: str) -> list[RawClient]:
    clients = [RawClient(worker.url, serializer, client="honest") for worker in workers]
    for n, client in enumerate(clients):
        client.say([int(Kind.PUT), HONEST + n, torch.full((3,), 7.0), False, ["#honest"], "mine"])
    spec = [[3], [1], 0, "float32", False, False]
    bob = workers[0]
    clients[1].say([int(Kind.LINK), HONEST + 2, bob.id, bob.url, HONEST, spec, [], "", ""])
    return clients


@pytest.fixture
def watched() -> Iterator[None]:
    global _watching  # noqa: PLW0603  # an audit hook cannot be taken out again
    _ran.clear()
    _watching = True
    yield
    _watching = False
    assert _ran == []


def test_distorted_traffic(stage: tuple[str, Traffic, list[Worker]], watched: None) -> None:
    serializer, traffic, workers = stage
    honest = honest_client(workers, serializer)
    objects = {HONEST, HONEST + 1, HONEST + 2}
    ids = [*objects, honest[0].holder, *(i for _, m in traffic.messages if m[0] == Kind.RUN for i in m[3])]
    outcomes = {"answers": 0, "failures": 0, "closed": 0, "executed": 0}
    for seed in range(SEEDS):
        chance = random.Random(seed)
        clients = traffic.clients(workers, serializer)
        sent: list[dict[int, Any]] = [{}, {}]
        for place, message in script(traffic, chance, ids):
            if not clients[place].over and own(message, objects):
                (number,) = clients[place].say(message)
                sent[place][number] = message
                outcomes["executed"] += 1
        for worker in workers:
            check_books(worker)
            assert len(worker.guests) <= 6 and len(worker.peers) <= 4
        for place, client in enumerate(clients):
            for number, (kind, content) in client.answers.items():
                if kind == Kind.FAILURE:
                    check_failure(sent[place].get(number), content)
                outcomes["failures" if kind == Kind.FAILURE else "answers"] += 1
            outcomes["closed"] += client.over
            client.close()
        for worker in workers:
            check_books(worker)
            assert not worker.poisoned
            left = {i for i, value in worker.store.items() if i not in objects and not isinstance(value, StoredPointer)}
            assert not left, f"seed {seed} left something behind"
        for n, client in enumerate(honest):
            answer = client.ask([int(Kind.FETCH), HONEST + n])
            assert answer[1].tolist() == [7, 7, 7] and answer[3:] == [["#honest"], "mine"], f"seed {seed}"
            # An honest client forgets what it was told, as this one remembers everything.
            client.answers.clear()
        assert honest[1].ask([int(Kind.DESCRIBE), [HONEST + 2]]) == [[[3], [1], 0, "float32", False, False]]
    for worker in workers:
        check_idle(worker)
        assert set(worker.store) <= objects
    assert outcomes["answers"] and outcomes["failures"] and outcomes["executed"] > 20 * SEEDS, outcomes
    for client in honest:
        client.close()


def test_traffic_without_faults_is_answered(stage: tuple[str, Traffic, list[Worker]]) -> None:
    serializer, traffic, workers = stage
    clients = traffic.clients(workers, serializer)
    failed = []
    for place, message in traffic.messages:
        (number,) = clients[place].say(message)
        kind, content = clients[place].answers.get(number, [None, None])
        if kind == Kind.FAILURE:
            failed.append((Kind(message[0]).name, error_of(content)))
    assert set(failed) <= {
        # Alice chooses new ids on bob each time.
        ("CLAIM", "ObjectNotFoundError"),
        ("FETCH", "ObjectNotFoundError"),
        ("RUN", "_LinAlgError"),
        ("FETCH", "_LinAlgError"),
        ("CLEAR", "PermissionDeniedError"),
        ("TRANSFER", "WorkerNotFoundError"),
    }, failed
    for client in clients:
        client.close()


def test_code_in_every_field(stage: tuple[str, Traffic, list[Worker]], watched: None) -> None:
    serializer, traffic, workers = stage
    seen: set[tuple[int, ...]] = set()
    for place, message in traffic.messages:
        shape = (message[0], *(len(item) if isinstance(item, list) else -1 for item in message))
        if shape in seen:
            continue
        seen.add(shape)
        client = RawClient(workers[place].url, serializer)
        client.say(*(m for p, m in traffic.messages if p == place and m[0] in (Kind.PUT, Kind.DEFINE)))
        for position in range(len(message)):
            for code in CODE:
                if client.over:
                    client = RawClient(workers[place].url, serializer)
                for value in (code, [code], {"a": code}):
                    (number,) = client.say([*message[:position], value, *message[position + 1 :]])
                    if number in client.answers and client.answers[number][0] == Kind.FAILURE:
                        check_failure(message, client.answers[number][1])
        client.close()
    for worker in workers:
        check_books(worker)
        check_idle(worker)


def test_the_canary_sings() -> None:
    global _watching  # noqa: PLW0603  # as above
    _watching = True
    pickle.loads(pickle.dumps(Canary()))
    _watching = False
    assert _ran == ["pickle.find_class", "unpickled"]
    _ran.clear()

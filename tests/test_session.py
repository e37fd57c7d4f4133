"""Numbers, acknowledgements, resumption and lives: a session over links that are cut, late, and repeat themselves."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from farpoint.errors import ProtocolError, StaleIncarnationError
from farpoint.limits import Limits
from farpoint.protocol.session import Session

LIMIT = 6
LIMITS = Limits(commands_in_flight=LIMIT)


def life(n: int) -> bytes:
    return n.to_bytes(16, "big")


def pair() -> tuple[Session, Session]:
    return Session(life(1), life(2), LIMITS), Session(life(2), life(1), LIMITS)


class Wires(RuleBasedStateMachine):
    """A client asks, a worker executes and answers. Links come and go; what an old one still carries may arrive at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = 0
        self.asked = 0
        self.executed: list[int] = []
        self.all_executed: list[int] = []
        self.lines: dict[tuple[int, bool], deque[Any]] = {}
        self.link = 0
        self.begin()

    def begin(self) -> None:
        """Two new lives, after the worker has died: whatever was not answered is of unknown outcome, and not asked again."""
        client_life, worker_life = life(2 * self.lives + 1), life(2 * self.lives + 2)
        self.lives += 1
        self.client = Session(client_life, worker_life, LIMITS)
        self.worker = Session(worker_life, client_life, LIMITS)
        self.executed = []
        self.issued: list[int] = []
        self.answered: list[int] = []
        self.new_link()

    def new_link(self) -> None:
        self.link += 1
        self.lines[self.link, True] = deque()
        self.lines[self.link, False] = deque()

    def take(self, line: tuple[int, bool], packet: Any) -> None:
        link, to_worker = line
        session = self.worker if to_worker else self.client
        try:
            messages = session.receive(packet)
        except ProtocolError as error:
            assert link != self.link, f"the present link brought what cannot be: {error}"
            assert isinstance(error, StaleIncarnationError) == (packet[0] != session.local)
            return
        for number, (_, command) in messages:
            if to_worker:
                self.executed.append(command)
                self.all_executed.append(command)
                assert self.worker.submit(["answer", command]) == number
            else:
                self.answered.append(command)

    @rule()
    def ask(self) -> None:
        if not self.client.full:
            self.asked += 1
            self.client.submit(["command", self.asked])
            self.issued.append(self.asked)

    @rule(of_client=st.booleans())
    def flush(self, of_client: bool) -> None:
        packet = (self.client if of_client else self.worker).pack()
        if packet is not None:
            self.lines[self.link, of_client].append(packet)

    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        lines = [line for line, packets in self.lines.items() if packets]
        if lines:
            line = data.draw(st.sampled_from(lines))
            self.take(line, self.lines[line][0])
            # An old link may say everything twice.
            if not again or line[0] == self.link:
                self.lines[line].popleft()

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        lines = [line for line, packets in self.lines.items() if packets and line[0] != self.link]
        if lines:
            self.lines[data.draw(st.sampled_from(lines))].popleft()

    @rule()
    def reconnect(self) -> None:
        client_has, worker_has = self.client.taken, self.worker.taken
        self.new_link()
        self.lines[self.link, True].extend(self.client.resume(worker_has))
        self.lines[self.link, False].extend(self.worker.resume(client_has))

    @precondition(lambda self: self.lives < 4)
    @rule()
    def restart(self) -> None:
        self.begin()

    @invariant()
    def each_once_and_in_order(self) -> None:
        assert self.executed == self.issued[: len(self.executed)]
        assert self.answered == self.executed[: len(self.answered)]
        assert len(set(self.all_executed)) == len(self.all_executed)

    @invariant()
    def memory_is_bounded(self) -> None:
        for session in (self.client, self.worker):
            assert session.submitted - session.acknowledged <= LIMIT
            kept = sum(len(messages) for *_, messages in session._packed) + session.waiting
            # A packet that is acknowledged in part is kept until all of it is.
            assert kept <= 2 * LIMIT

    def teardown(self) -> None:
        self.reconnect()
        for _ in range(4):
            for line in ((self.link, True), (self.link, False)):
                self.flush(line[1])
                while self.lines[line]:
                    self.take(line, self.lines[line].popleft())
        assert self.answered == self.executed == self.issued
        assert not self.client._packed and not self.worker._packed, "what is acknowledged is kept no longer"


TestWires = Wires.TestCase
TestWires.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_query_that_is_sent_again_is_answered_again_and_not_executed_again() -> None:
    client, worker = pair()
    client.submit(["query"])
    (number, _), = worker.receive(client.pack())
    worker.submit(["answer", number])
    assert worker.pack() is not None  # lost with the link
    for _ in range(3):
        (again,) = client.resume(0)
        assert worker.receive(again) == []
        (answer,) = worker.resume(client.taken)
        assert answer[3] == [["answer", 1]]
    assert client.receive(answer) == [(1, ["answer", 1])]
    assert worker.resume(client.taken) == []


def test_a_peer_that_has_forgotten_what_it_took_is_noticed() -> None:
    client, worker = pair()
    client.submit(["one"])
    worker.receive(client.pack())
    client.receive(worker.pack())
    with pytest.raises(ProtocolError, match="message 1 was acknowledged, and now only 0"):
        client.resume(0)


def test_who_is_full_must_wait() -> None:
    client, worker = pair()
    for _ in range(LIMIT):
        assert not client.full
        client.submit(["command"])
    assert client.full
    worker.receive(client.pack())
    assert client.full
    client.receive(worker.pack())
    assert not client.full


def test_a_link_that_keeps_breaking_does_not_let_answers_add_up() -> None:
    client, worker = pair()
    for _ in range(5):
        while not client.full:
            client.submit(["command"])
        packet = client.pack()
        if packet is not None:
            for _, message in worker.receive(packet):
                worker.submit(["answer", message])
        worker.pack()  # lost with the link, which comes back and tells the client how far the worker is
        client.resume(worker.taken)
        assert worker.submitted - worker.acknowledged <= LIMIT
    for answer in worker.resume(client.taken):
        client.receive(answer)
    packet = worker.pack()
    assert packet is not None and packet[3] == [], "the answers went before what makes room"
    client.receive(packet)
    assert not client.full and client.taken == LIMIT


def test_what_is_owed_is_told_with_the_next_packet() -> None:
    client, worker = pair()
    client.submit(["one"])
    client.submit(["two"])
    worker.receive(client.pack())
    assert worker.owed == 2
    assert worker.pack() == [client.local, 1, 2, []]
    assert worker.owed == 0 and worker.pack() is None, "an acknowledgement is not acknowledged"


@pytest.mark.parametrize(
    "packet",
    [
        None,
        5,
        [],
        [life(2), 1, 0],
        [life(2), 1, 0, [], []],
        [life(2), "1", 0, []],
        [life(2), True, 0, [["x"]]],
        [life(2), 1, None, []],
        [life(2), 1, 0, {"a": 1}],
        [life(2), 1, 0, None],
        [life(2), 0, 0, [["x"]]],
        [life(2), -5, 0, [["x"]]],
        [life(2), 2, 0, [["x"]]],
        [life(2), 2**70, 0, [["x"]]],
        [life(2), 1, 1, [["x"]]],
        [life(2), 1, -1, [["x"]]],
        [life(2), 1, 2**70, []],
        [life(3), 1, 0, [["x"]]],
        ["", 1, 0, [["x"]]],
        [None, 1, 0, []],
    ],
)
def test_what_is_no_packet_is_refused_and_changes_nothing(packet: Any) -> None:
    _, worker = pair()
    worker.submit(["waiting"])
    before = copy.deepcopy(vars(worker))
    with pytest.raises(ProtocolError):
        worker.receive(packet)
    assert vars(worker) == before


def test_a_packet_holds_no_more_than_it_may() -> None:
    client, worker = Session(b"c" * 16, b"w" * 16), Session(b"w" * 16, b"c" * 16)
    for number in range(1, 8):
        client.submit([number])
    packets = [client.pack(3) for _ in range(3)]
    assert client.pack(3) is None and client.waiting == 0
    assert [packet[1] for packet in packets if packet] == [1, 4, 7]
    assert [message for packet in packets for message in worker.receive(packet)] == [(n, [n]) for n in range(1, 8)]

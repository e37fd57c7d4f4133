"""A plugin for worker processes that stops them exactly at a step of a move, and shows what they hold.

A worker that has it listens at a unix socket in the folder `FARPOINT_SABOTEUR`, and does what a `Station` in the test asks.
Where it is told to stop, it stands still with all its locks, until the test says `go` or kills somebody.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from farpoint.bulk import Bulk, Stream
from farpoint.movers import Movers
from farpoint.peer import Peer
from farpoint.worker import Worker

PLUGIN = "import saboteur\nsaboteur.act()\n"
SECONDS = 60.0
"""Longer than anything takes that goes well."""


class Saboteur:
    """The plugin's side: what is to stop this worker, and whom to tell."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._point: list[Any] = []
        self._left = 0
        self._test: Any = None
        self._gone = threading.Event()
        self.taken = 0
        path = Path(os.environ["FARPOINT_SABOTEUR"], worker.id)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            threading.Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer(self, line_to_test: socket.socket) -> None:
        for line in line_to_test.makefile():
            asked = json.loads(line)
            if asked == "state":
                answer: Any = {**state(self._worker), "taken": self.taken}
            elif asked == "go":
                self._gone.set()
                continue
            else:
                *self._point, self._left = asked
                self._test, self._gone = line_to_test, threading.Event()
                answer = "armed"
            say(line_to_test, answer)

    def reach(self, *point: str, before: Callable[[], None] = lambda: None) -> None:
        """Stand still here, if that is where the test wants it."""
        if [*point] != self._point:
            return
        self._left -= 1
        if self._left == 0:
            self._point = []
            before()
            say(self._test, "reached")
            self._gone.wait()


def say(line: socket.socket, what: Any) -> None:
    """Write a line of JSON."""
    line.sendall(json.dumps(what).encode() + b"\n")


def state(worker: Worker) -> dict[str, int]:
    """Return how much a worker holds of everything: of a move, of its clients, of links."""
    movers = worker.movers
    channels = [guest.channel for guest in worker.guests.values()] + [peer.channel for peer in worker.peers.values()]
    bulks = [channel.bulk for channel in channels if channel.bulk is not None]
    gc.collect()
    return {
        "objects": len(worker.store),
        "poisoned": len(worker.poisoned),
        "held": sum(len(ids) for ids in worker.holders._held.values()),
        "guests": len(worker.guests),
        "staged": len(movers._staged),
        "leaving": len(movers._leaving),
        "expected": len(movers._expected),
        "ends": len(movers._ends),
        "awaiting": len(movers._awaiting),
        "moves": sum(guest.moves for guest in worker.guests.values()),
        "pending": sum(len(peer.answers.pending) for peer in worker.peers.values()),
        "incoming": sum(len(bulk._arrivals) for bulk in bulks),
        "outgoing": sum(len(bulk._waiting) + len(bulk._loaded) for bulk in bulks),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
    }


IDLE = dict.fromkeys(("staged", "leaving", "expected", "ends", "awaiting", "moves", "pending", "incoming", "outgoing"), 0)
"""What a worker holds of moves when none is under way."""
EMPTY = {**IDLE, "objects": 0, "poisoned": 0, "held": 0}
"""What it holds when nobody holds anything."""


def act() -> None:
    """Let every worker that is made in this process be told what to do."""
    saboteurs: dict[Worker, Saboteur] = {}
    initialise, move, receive, send = Movers.__init__, Movers.move, Movers.receive, Movers._send
    take, load, part = Bulk.take_chunk, Stream.load, Peer.parted

    def begin(movers: Movers, worker: Worker) -> None:
        initialise(movers, worker)
        saboteurs[worker] = Saboteur(worker)

    def moves(movers: Movers, *command: Any) -> None:
        saboteurs[movers._worker].reach("takes", "Move")
        move(movers, *command)
        saboteurs[movers._worker].reach("took", "Move")

    def takes(movers: Movers, guest: Any, number: int, message: list[Any]) -> None:
        saboteurs[movers._worker].reach("takes", message[1])
        saboteurs[movers._worker].taken += 1
        receive(movers, guest, number, message)
        saboteurs[movers._worker].reach("took", message[1])

    def sends(movers: Movers, peer: Peer, message: Any, object_id: int | None) -> None:
        name = type(message).__name__
        saboteurs[movers._worker].reach("sends", name)
        send(movers, peer, message, object_id)

        def see_it_off() -> None:
            channel = peer.channel
            while channel.bulk is None or channel.bulk.waiting or channel.session.acknowledged < channel.session.submitted:
                peer.flush()
                time.sleep(0.001)

        saboteurs[movers._worker].reach("sent", name, before=see_it_off)

    def takes_chunk(bulk: Bulk, message: list[Any]) -> None:
        take(bulk, message)
        for saboteur in saboteurs.values():
            saboteur.reach("takes", "chunk")

    def sends_chunk(stream: Stream, session: Any) -> int:
        for saboteur in saboteurs.values():
            saboteur.reach("sends", "chunk")
        return load(stream, session)

    def loses(peer: Peer, *how: Any) -> None:
        saboteurs[peer.owner].reach("loses", peer.name)
        part(peer, *how)

    for owner, method, instead in (
        *((Movers, "__init__", begin), (Movers, "move", moves), (Movers, "receive", takes), (Movers, "_send", sends)),
        *((Bulk, "take_chunk", takes_chunk), (Stream, "load", sends_chunk), (Peer, "parted", loses)),
    ):
        setattr(owner, method, instead)


class Station:
    """The test's side: a line to the saboteur in one worker.

    Args:
        folder: Where its socket is.
        name: The worker.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(folder / name))
        self._answers = self._socket.makefile()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._answers.close()
        self._socket.close()

    def _ask(self, what: Any) -> Any:
        say(self._socket, what)
        return json.loads(self._answers.readline())

    def stop(self, *point: str, times: int = 1) -> None:
        """Let the worker stand still when it comes to a point, the first time or later."""
        assert self._ask([*point, times]) == "armed"

    def wait(self) -> None:
        """Wait until it stands still."""
        assert json.loads(self._answers.readline()) == "reached"

    def go(self) -> None:
        """Let it go on, if it is alive."""
        try:
            say(self._socket, "go")
        except BrokenPipeError:
            pass

    def state(self) -> dict[str, int]:
        """Return what it holds."""
        found: dict[str, int] = self._ask("state")
        return found

    def becomes(self, **wanted: int) -> None:
        """Wait until it holds so much."""
        ends = time.monotonic() + SECONDS
        while (found := {name: value for name, value in self.state().items() if name in wanted}) != wanted:
            assert time.monotonic() < ends, {name: (value, wanted[name]) for name, value in found.items() if value != wanted[name]}
            time.sleep(0.02)

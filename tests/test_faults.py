"""Processes that are killed and stopped: what a move, a call and a session come to when somebody dies at a given step.

`FARPOINT_FAULTS=all` tries every step with every victim; without it there are some of each.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch

from farpoint import TransportError, WorkerLostError
from saboteur import EMPTY, IDLE, SECONDS
from stage import LIMITS, SIZES, Stage, begin, data, performance, works

ALL = os.environ.get("FARPOINT_FAULTS") == "all"

SOURCE = [("bob", *point.split()) for point in (
    "takes Move", "sends Push", "sends chunk", "sent Push", "takes Prepared", "sends Commit", "sent Commit", "takes Activated",
    "sends Released", "sent Released",
)]
DESTINATION = [("alice", *point.split()) for point in (
    "takes chunk", "takes Push", "sends Prepared", "sent Prepared", "takes Commit", "sends Activated", "sent Activated",
    "takes Released", "took Released",
)]
UNSENT = [("bob", "takes", "Move"), ("bob", "sends", "Push"), ("bob", "sends", "chunk")]
"""Where nobody but the source has all of it."""
IN_FLIGHT = [("alice", "takes", "chunk"), ("alice", "takes", "Push")]
"""Where the destination is about to have it, and may learn before that the source is dead."""
OVER = [("bob", "sends", "Released"), ("bob", "sent", "Released"), ("alice", "sent", "Activated"),
        ("alice", "takes", "Released"), ("alice", "took", "Released")]
"""Where the source has heard that the destination has it, or the destination does not die before it is heard."""
OPEN = [("bob", "sent", "Commit"), ("bob", "takes", "Activated")]
"""Where the destination may have made it live, and said so, in the moment before it dies; and the source hears of one or the other first."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with performance(tmp_path_factory.mktemp("saboteur"), LIMITS) as made:
        yield made


def interrupt(stage: Stage, p: Any, point: tuple[str, ...], victim: str, *, restarts: bool) -> Future[Any]:
    """Begin a move from bob to alice, and let somebody die when it has come to a point."""
    with stage.station(point[0]) as station:
        station.stop(*point[1:], times=3 if point[2] == "chunk" else 1)
        moving = begin(p.move, stage.cluster.alice)
        station.wait()
        stage.kill(victim)
        if restarts:
            stage.revive(victim)
        station.go()
    return moving


def bob_learns_of_the_other_life(stage: Stage) -> None:
    """Move something to alice. Where bob has not heard yet that she has died, one move says so, and no second one."""
    p = data("small").send(stage.cluster.bob)
    try:
        p.move(stage.cluster.alice)
    except TransportError as error:
        assert "is where it was: alice has died" in str(error)
        assert torch.equal(p.get(), data("small"))


def cases(first: int) -> list[Any]:
    """Return every point with a small and a large tensor, or, unless all are wanted, each ninth of them."""
    every = [(point, size) for point in SOURCE + DESTINATION for size in SIZES if size == "large" or "chunk" not in point]
    return [pytest.param(*case, id=f"{'-'.join(case[0])}-{case[1]}") for case in (every if ALL else every[first::9])]


@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize(("point", "size"), cases(0))
def test_the_source_is_killed(stage: Stage, point: tuple[str, str, str], size: str, restarts: bool) -> None:
    x = data(size)
    p = x.send(stage.cluster.bob)
    moving = interrupt(stage, p, point, "bob", restarts=restarts)
    error = moving.exception(SECONDS)
    if point in UNSENT or error is not None:
        assert point in UNSENT + IN_FLIGHT
        assert isinstance(error, WorkerLostError) and "bob" in str(error)
        stage.becomes("alice", **EMPTY)
        with pytest.raises(WorkerLostError, match="bob"):
            p.get()
    else:
        stage.becomes("alice", **IDLE, objects=1)
        assert torch.equal(moving.result().get(), x)
    del p, moving, error
    if not restarts:
        stage.revive("bob")
    works(stage)


@pytest.mark.parametrize("restarts", [False, True], ids=["", "restarts"])
@pytest.mark.parametrize(("point", "size"), cases(3))
def test_the_destination_is_killed(stage: Stage, point: tuple[str, str, str], size: str, restarts: bool) -> None:
    x = data(size)
    p = x.send(stage.cluster.bob)
    moving = interrupt(stage, p, point, "alice", restarts=restarts)
    error = moving.exception(SECONDS)
    if point in OVER or (point in OPEN and error is None):
        assert error is None
        with pytest.raises(WorkerLostError, match="alice"):
            moving.result().get()
        if point in OPEN and restarts:
            bob_learns_of_the_other_life(stage)
    else:
        assert isinstance(error, TransportError) and "is where it was" in str(error) and "alice" in str(error)
        stage.becomes("bob", **IDLE, objects=1)
        assert torch.equal(p.get(), x)
    del p, moving, error
    if not restarts:
        stage.cluster.bob.ping()
        stage.becomes("bob", **EMPTY)
        stage.revive("alice")
    works(stage)


@pytest.mark.parametrize(("point", "size"), cases(6))
def test_the_client_is_killed(stage: Stage, point: tuple[str, str, str], size: str) -> None:
    works(stage)
    with stage.station(point[0]) as station:
        station.stop(*point[1:], times=3 if point[2] == "chunk" else 1)
        pid = stage.client(size, "move")
        station.wait()
        os.kill(pid, signal.SIGKILL)
        station.go()
    stage.becomes("bob", **EMPTY)
    stage.becomes("alice", **EMPTY)
    works(stage)


def test_a_worker_is_back_before_others_know_that_it_was_gone(stage: Stage) -> None:
    works(stage)
    with stage.station("alice") as alice:
        alice.stop("loses", "bob")
        stage.kill("bob")
        alice.wait()
        stage.revive("bob")
        taken = alice.state()["taken"]
        p = data("small").send(stage.cluster.bob)
        moving = begin(p.move, stage.cluster.alice)
        alice.becomes(taken=taken + 1)
        alice.go()
        assert torch.equal(moving.result(SECONDS).get(), data("small"))
    works(stage)


def test_a_client_is_killed_with_what_it_holds(stage: Stage) -> None:
    works(stage)
    with stage.station("bob") as bob, stage.station("alice") as alice:
        guests = bob.state()["guests"], alice.state()["guests"]
        pid = stage.client("large", "hold")
        stage.client_is_done()
        bob.becomes(objects=2)
        alice.becomes(objects=1)
        os.kill(pid, signal.SIGKILL)
        bob.becomes(**EMPTY, guests=guests[0])
        alice.becomes(**EMPTY, guests=guests[1])


@pytest.mark.parametrize(("what", "point"), [("send", ("takes", "chunk")), ("get", ("sends", "chunk"))])
def test_a_client_is_killed_in_the_middle_of_a_tensor(stage: Stage, what: str, point: tuple[str, str]) -> None:
    works(stage)
    with stage.station("bob") as bob:
        bob.stop(*point, times=3)
        pid = stage.client("large", what)
        bob.wait()
        os.kill(pid, signal.SIGKILL)
        bob.go()
        bob.becomes(**EMPTY)


def test_the_middle_of_a_chain_is_killed(stage: Stage) -> None:
    x = data("small")
    p = x.send(stage.cluster.bob)
    pp = p.send(stage.cluster.alice)
    stage.cluster.alice.synchronize()
    stage.kill("alice")
    for call in 2 * (pp.get, pp.neg, partial(pp.move, stage.cluster.bob), pp.remote_get):
        with pytest.raises(WorkerLostError, match="alice"):
            call()
    assert torch.equal(p.get(), x), "what is behind it is there"
    del pp, call
    stage.becomes("bob", **EMPTY)
    stage.revive("alice")
    works(stage)


def test_the_data_end_of_a_chain_is_killed(stage: Stage) -> None:
    pp = data("small").send(stage.cluster.bob).send(stage.cluster.alice)
    stage.cluster.alice.synchronize()
    stage.kill("bob")
    for call in 2 * (pp.get, lambda p=pp: p.neg().get(), partial(pp.move, stage.cluster.alice), pp.remote_get):
        with pytest.raises(WorkerLostError, match="bob"):
            call()
    del pp, call
    stage.cluster.alice.ping()
    stage.becomes("alice", **EMPTY)
    stage.revive("bob")
    works(stage)

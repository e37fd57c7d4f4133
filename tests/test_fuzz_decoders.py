"""Every harness of `fuzz` over its seeds and some thousand mutations, without atheris; and what atheris has found."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
import torch

from farpoint.access import Admission
from farpoint.bulk import Bulk
from farpoint.capability import PREFIX, mint, narrow
from farpoint.errors import CapabilityError, MalformedMessageError
from farpoint.protocol.messages import Kind
from farpoint.worker import Worker
from fuzz.mutation import mutations
from fuzz.target import LIMITS, join, split
from fuzz.targets import TARGETS

MUTATIONS = 3_000
MEMORY = 16 * 2**20


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_peer_of_ours_sends_is_taken(name: str) -> None:
    seeds = TARGETS[name].seeds()
    assert seeds and all(TARGETS[name].run(seed) for seed in seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_raise_nothing_else_and_take_no_memory(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    taken = 0
    tracemalloc.start()
    try:
        for data in mutations(seeds, target.words, MUTATIONS, random.Random(name)):
            try:
                taken += target.run(data)
            except Exception as error:
                raise AssertionError(f"the harness {name} fails on {data!r}") from error
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < taken < MUTATIONS, "mutations must reach what lies behind the first check, and be refused there"
    assert peak < MEMORY


def test_frames_of_an_input() -> None:
    frames = [b"header", b"", b"tensor", b"x" * 300]
    assert split(join(frames)) == frames
    assert split(b"") == [b""]
    assert split(b"\x01\xff\xffab") == [b"", b"ab"], "a size that lies takes what there is"


def test_every_kind_of_message_is_among_the_seeds() -> None:
    from fuzz.messages import ANSWERS, COMMANDS

    assert {message[0] for message in COMMANDS} == {kind for kind in Kind if kind < Kind.CHUNK}
    assert set(ANSWERS) >= {Kind.ASK, Kind.FETCH, Kind.SEARCH, Kind.LIST, Kind.READ, Kind.LOCATE}


def test_a_whole_message_without_a_path_is_malformed() -> None:
    bulk = Bulk(LIMITS)
    bulk.take_chunk([int(Kind.CHUNK), 1, 0, 0, 1, torch.zeros(1, dtype=torch.uint8)])
    with pytest.raises(MalformedMessageError, match="path"):
        bulk.take_whole([int(Kind.WHOLE), 1, "uint8", [1], 0, [], [int(Kind.PUT), 6, None, False, [], ""]])


def test_a_capability_for_a_session_that_is_no_number_opens_no_door() -> None:
    bob = Worker("bob", "", ["msgpack"])
    admission = bob.doorman.admission(Admission(tokens=("t" * 32,)))
    invitation = mint(bob.doorman._secret, "bob", operation="dial", expiry=int(time.time()) + 60)
    assert admission.admits(invitation)
    for session in ("x", "", "-1", "1e3", "٣x"):
        assert not admission.admits(narrow(invitation, session=session))
        with pytest.raises(CapabilityError, match="session"):
            bob.doorman.introduced(narrow(invitation, session=session), "0" * 32)
    bob.close()


@pytest.mark.parametrize("clock", ["9" * 400, "1e999", "-Infinity", "NaN", "true", "[]", '"5"'])
def test_a_clock_that_is_none_is_not_believed(clock: str) -> None:
    welcome = TARGETS["welcome"]
    text = f'-{{"worker": "bob", "incarnation": "{"0" * 32}", "serializer": "msgpack", "capability": "{PREFIX}Ym9i.eA", "clock": {clock}}}'
    assert welcome.run(text.encode())

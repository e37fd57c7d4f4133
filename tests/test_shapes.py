"""The shape of every message: what does not fit is named, and has changed nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farpoint.errors import FarpointError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.macro import pack
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import ANSWERS, CHUNK, COMMANDS, FAILURE, WHOLE, brief, check_run
from farpoint.worker import Worker
from wire import (
    SPEC,
    RawClient,
    check_books,
    error_of,
    new_worker,
    odd_values,
    stocked,
)


def samples() -> dict[int, list[Any]]:
    """Return one good message of each kind, for a client that holds the tensors 1 and 2 and has defined slot 0 as add."""
    return {
        Kind.DEFINE: [Kind.DEFINE, 1, "aten::neg.default", [["t"]], {}],
        Kind.RUN: [Kind.RUN, 0, [1, 2], [10]],
        Kind.ASK: [Kind.ASK, 0, [1, 2], [11]],
        Kind.PUT: [Kind.PUT, 12, torch.ones(2), False, ["#tag"], "what it is"],
        Kind.LINK: [Kind.LINK, 13, "nobody", "virtual://nobody", 5, SPEC, [], "", ""],
        Kind.CLAIM: [Kind.CLAIM, 1, ""],
        Kind.RELEASE: [Kind.RELEASE, [2]],
        Kind.FETCH: [Kind.FETCH, 1],
        Kind.MOVE: [Kind.MOVE, 1, 0, "nobody", "virtual://nobody", 14, 15, False, ""],
        Kind.SEARCH: [Kind.SEARCH, ["#nothing"]],
        Kind.TAG: [Kind.TAG, 1, ["#a"], "b"],
        Kind.CLEAR: [Kind.CLEAR],
        Kind.SYNC: [Kind.SYNC, [], []],
        Kind.DESCRIBE: [Kind.DESCRIBE, [1]],
        Kind.TRANSFER: [Kind.TRANSFER, "Commit", [7], None],
        Kind.LIST: [Kind.LIST, 0],
        Kind.SEED: [Kind.SEED, 2**64 - 1],
        Kind.PLAN: [Kind.PLAN, 1, [[0, [0, 1], [2]], [0, [-1, 2], [-1]]]],
        Kind.RUNPLAN: [Kind.RUNPLAN, 0, pack([1, 2, 16]), [], pack([2])],
        Kind.READ: [Kind.READ, 1, 0, 4],
        Kind.LOCATE: [Kind.LOCATE, 1],
    }


def plain(message: list[Any]) -> list[Any]:
    """Return a message without enumerations, which do not travel."""
    return [int(message[0]), *message[1:]]


@pytest.fixture
def bob() -> Iterator[Worker]:
    worker = new_worker(limits=Limits(bad_requests=10**9))
    yield worker
    check_books(worker)
    worker.close()


@pytest.fixture(params=["msgpack", "torch"])
def mallory(request: pytest.FixtureRequest, bob: Worker) -> RawClient:
    mallory = stocked(RawClient(bob.url, request.param))
    mallory.say([int(Kind.PLAN), 0, [[0, [0, 1], [2]]]])
    return mallory


class TestShapes:
    def test_every_command_has_one(self, bob: Worker) -> None:
        in_either_direction = {Kind.CHUNK, Kind.WHOLE}
        assert set(COMMANDS) == set(bob._commands) == {kind for kind in Kind if kind < Kind.ANSWER} - in_either_direction
        unanswered = {Kind.DEFINE, Kind.RUN, Kind.PUT, Kind.RELEASE, Kind.TAG, Kind.TRANSFER, Kind.SEED, Kind.PLAN, Kind.RUNPLAN}
        assert set(ANSWERS) | {Kind.FETCH} == set(COMMANDS) - unanswered

    def test_every_field_is_documented(self) -> None:
        text = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
        for shape in [*COMMANDS.values(), CHUNK, WHOLE, FAILURE]:
            (row,) = (line for line in text.splitlines() if line.startswith(f"| {shape.name} |"))
            for field in shape.fields:
                assert f"`{field}`" in row, f"docs/protocol.md does not list the field {field} of {shape.name}"

    @pytest.mark.parametrize("kind", [kind for kind in Kind if kind in COMMANDS], ids=lambda kind: kind.name)
    def test_what_does_not_fit_is_named(self, bob: Worker, mallory: RawClient, kind: Kind) -> None:
        good = plain(samples()[kind])
        shape = COMMANDS[kind]
        books = dict(bob.store), {h: set(ids) for h, ids in bob.holders._held.items()}, dict(bob.poisoned)
        tried = 0
        for position, (name, field) in enumerate(shape.fields.items(), 1):
            for value in odd_values():
                if field.holds(value):
                    continue
                results = [0] if kind in (Kind.RUN, Kind.ASK) and name != "results" else good[3:4]
                message = [*good[:position], value, *good[position + 1 :]]
                if kind in (Kind.RUN, Kind.ASK) and name != "results":
                    message[3] = results  # or the failure would be noted on the result
                error, text = mallory.error(message)
                assert error == "MalformedMessageError", text
                assert text.startswith(f"{kind.name}: {name} must be {field.wants}, and {brief(value)} was sent"[:500])
                assert len(text) <= DEFAULT_LIMITS.error_chars
                tried += 1
        assert tried >= 20 * len(shape.fields)
        for wrong in ([*good, 0], good[:-1], [good[0], *good] if len(good) > 1 else [*good, None]):
            if len(wrong) == len(good):
                continue
            error, text = mallory.error(wrong)
            assert error == "MalformedMessageError"
            assert text.startswith(f"{kind.name}: the number of its fields must be {len(shape.fields)}") or not wrong
        assert books == (dict(bob.store), {h: set(ids) for h, ids in bob.holders._held.items()}, dict(bob.poisoned))

    @pytest.mark.parametrize("kind", [kind for kind in Kind if kind in COMMANDS], ids=lambda kind: kind.name)
    def test_what_fits_is_done(self, mallory: RawClient, kind: Kind) -> None:
        expected = {
            Kind.LINK: "NobodyListensError",
            Kind.MOVE: "NobodyListensError",
            Kind.TRANSFER: "WorkerNotFoundError",
        }
        (number,) = mallory.say(plain(samples()[kind]))
        answered, content = mallory.answers.get(number, [None, None])
        if kind in expected:
            assert error_of(content) == expected[kind]
        elif kind in ANSWERS or kind == Kind.FETCH:
            assert answered == Kind.ANSWER
        else:
            assert answered is None

    @pytest.mark.parametrize(
        ("message", "limit"),
        [
            ([Kind.PUT, 5, None, False, ["#a"] * 17, ""], "tags"),
            ([Kind.PUT, 5, None, False, ["#" * 65], ""], "name_chars"),
            ([Kind.PUT, 5, None, False, [], "x" * 1025], "description_chars"),
            ([Kind.TAG, 1, [f"#{i}" for i in range(17)], ""], "tags"),
            ([Kind.LINK, 5, "x" * 65, "", 5, SPEC, [], "", ""], "name_chars"),
            ([Kind.LINK, 5, "x", "y" * 1025, 5, SPEC, [], "", ""], "url_chars"),
            ([Kind.SYNC, ["a"] * 9, []], "hops"),
            ([Kind.MOVE, 1, 9, "x", "virtual://x", 5, 6, False, ""], "hops"),
            ([Kind.DESCRIBE, [1] * 1025], "results"),
            ([Kind.RUN, 0, [1, 2], [0] * 1025], "results"),
            ([Kind.ASK, 0, [1, 2], list(range(10, 1036))], "results"),
            ([Kind.SEARCH, ["x"] * 17], "tags"),
            ([Kind.PLAN, 1, [[0, [0, 1], list(range(1025))]]], "results"),
        ],
        ids=lambda value: value if isinstance(value, str) else Kind(value[0]).name,
    )
    def test_what_is_too_long_names_the_limit(self, bob: Worker, mallory: RawClient, message: Any, limit: str) -> None:
        message = [torch.ones(2) if field is None else field for field in plain(message)]
        store = set(bob.store)
        error, text = mallory.error(message)
        assert error == "LimitError" and f"Limits({limit}=...)" in text
        assert set(bob.store) == store

    def test_one_pass_over_a_run_says_what_the_table_says(self) -> None:
        chance = random.Random(5)
        good = plain(samples()[Kind.RUN])
        outcomes = set()
        for _ in range(20_000):
            message: list[Any] = [good[0], 0, [1, 2, 2.5, [0.0, 1.0]][: chance.randrange(5)], [10, 0, 11, 0]]
            if chance.random() < 0.8:
                position = chance.choice([1, 3])
                value = chance.choice(odd_values())
                if isinstance(message[position], list) and chance.random() < 0.7:
                    message[position] = [*message[position], value]
                    chance.shuffle(message[position])
                else:
                    message[position] = value
            if chance.random() < 0.05:
                message = message[: chance.randrange(6)] + [0] * chance.randrange(3)
            said = []
            for check in (COMMANDS[Kind.RUN].check, check_run):
                try:
                    check(message)
                except FarpointError as error:
                    said.append(str(error))
                else:
                    said.append("")
            assert said[0] == said[1], message
            outcomes.add(bool(said[0]))
        assert outcomes == {True, False}

    def test_brief_is_brief(self) -> None:
        for value in [*odd_values(), 2**100_000, "x" * 10**6, [0] * 10**6, object()]:
            assert len(brief(value)) <= 120



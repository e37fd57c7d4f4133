"""The list of holders against a plain dictionary of sets."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from farpoint.protocol.references import Holders

HOLDERS = st.integers(1, 4)
OBJECTS = st.integers(1, 5)


class Books(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = Holders()
        self.model: dict[int, set[int]] = {}

    def holders_of(self, object_id: int) -> set[int]:
        return {holder for holder, held in self.model.items() if object_id in held}

    @rule(holder=HOLDERS, object_id=OBJECTS)
    def create(self, holder: int, object_id: int) -> None:
        # Its one condition: nobody else holds it. Whoever claimed it before it existed may be its maker.
        if self.holders_of(object_id) <= {holder}:
            self.real.create(holder, object_id)
            self.model.setdefault(holder, set()).add(object_id)

    @rule(holder=HOLDERS, object_id=OBJECTS)
    def claim(self, holder: int, object_id: int) -> None:
        self.real.claim(holder, object_id)
        self.model.setdefault(holder, set()).add(object_id)

    @rule(holder=HOLDERS, object_id=OBJECTS)
    def release(self, holder: int, object_id: int) -> None:
        was_held = object_id in self.model.get(holder, ())
        self.model.get(holder, set()).discard(object_id)
        assert self.real.release(holder, object_id) == (was_held and not self.holders_of(object_id))

    @rule(holder=HOLDERS)
    def leave(self, holder: int) -> None:
        held = self.model.pop(holder, set())
        gone = self.real.leave(holder)
        assert len(gone) == len(set(gone))
        assert set(gone) == {object_id for object_id in held if not self.holders_of(object_id)}

    @rule(object_ids=st.lists(OBJECTS, max_size=4))
    def forget(self, object_ids: list[int]) -> None:
        self.real.forget(iter(object_ids))
        for held in self.model.values():
            held -= set(object_ids)

    @invariant()
    def they_agree(self) -> None:
        for holder in range(1, 5):
            for object_id in range(1, 6):
                assert self.real.sole(holder, object_id) == (self.holders_of(object_id) == {holder})
        assert {h: held for h, held in self.real._held.items() if held} == {h: held for h, held in self.model.items() if held}

    @invariant()
    def nothing_is_kept_of_who_is_gone(self) -> None:
        assert set(self.real._held) <= set(self.model), "a release by a stranger, or a question, made an entry"
        shared = {i: len(self.holders_of(i)) for i in range(1, 6)}
        assert self.real._shared == {i: n for i, n in shared.items() if n > 1}


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_set_of_a_holder_is_live() -> None:
    holders = Holders()
    held = holders.held(7)
    holders.create(7, 1)
    holders.claim(8, 1)
    assert held == {1}
    assert not holders.release(7, 1)
    assert held == set()
    assert holders.leave(8) == [1]

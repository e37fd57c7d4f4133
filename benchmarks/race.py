"""Ways to do one piece of work, timed in turn in one process, so that a noisy machine disturbs them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import attrs
from pytest_benchmark.fixture import BenchmarkFixture

from farpoint.channel import BATCH
from pytest_farpoint import Combination

FEW = BATCH * 3 // 4
"""Commands that do not fill a packet: while they are issued, nothing is sent, and a virtual worker does nothing."""


@attrs.define(eq=False)
class Lane:
    """One way to do the work.

    Attributes:
        name: How the table calls it.
        run: Does the work as often as it is told.
        wait: Returns when all of it has taken effect; None if it has when `run` returns.
        many: How often the work is done before each wait.
        few: How often it can be done before anything is sent, to time its issuing alone; 0 leaves that out.
        totals: Seconds for doing it once, the wait included, by round.
        issuing: Seconds for issuing it once, by round.
    """

    name: str
    run: Callable[[int], object]
    wait: Callable[[], object] | None = None
    many: int = 1000
    few: int = 0
    totals: list[float] = attrs.field(factory=list, init=False)
    issuing: list[float] = attrs.field(factory=list, init=False)

    def time_all(self) -> None:
        """Time the work with the worker's share of it."""
        start = perf_counter()
        self.run(self.many)
        if self.wait is not None:
            self.wait()
        self.totals.append((perf_counter() - start) / self.many)

    def time_issuing(self) -> None:
        """Time what the issuer does, and let the worker do the rest afterwards."""
        if not self.few or self.wait is None:
            return
        self.wait()  # also sends the references that earlier rounds gave up
        start = perf_counter()
        self.run(self.few)
        self.issuing.append((perf_counter() - start) / self.few)
        self.wait()

    @property
    def seconds(self) -> float:
        """The median of what doing it once takes."""
        return statistics.median(self.totals)


@attrs.frozen
class Row:
    """One line of the table.

    Attributes:
        combination: Transport, serializer and store.
        group: The benchmark that it comes from.
        work: What is done.
        seconds: Median of one time.
        issuing: Median of issuing it once, None if it was not timed by itself.
        ratio: First quartile, median and third quartile of the ratio to the reference in the same round; None for the
            reference itself, and for what was computed instead of timed.
        note: What else there is to say.
    """

    combination: str
    group: str
    work: str
    seconds: float
    issuing: float | None = None
    ratio: tuple[float, float, float] | None = None
    note: str = ""


class Race:
    """Times lanes in turn, and writes a row about each.

    Args:
        benchmark: The fixture of pytest-benchmark. It keeps the last lane's time as its own, and the rows beside it.
        combination: Transport, serializer and store.
        group: The benchmark that the rows come from.
        rows: Where they go.
    """

    def __init__(self, benchmark: BenchmarkFixture, combination: Combination, group: str, rows: list[Row]) -> None:
        self._benchmark = benchmark
        self._combination = str(combination)
        self._group = group
        self._rows = rows

    def run(self, reference: Lane, *lanes: Lane, rounds: int) -> None:
        """Time the lanes in turn, once in each round, after a round that does not count.

        Args:
            reference: What the others are compared with.
            lanes: The others.
            rounds: How often. With `--benchmark-disable` there is one round, which counts.
        """
        everybody = (reference, *lanes)

        def others() -> None:
            for lane in everybody:
                lane.time_issuing()
            for lane in everybody[:-1]:
                lane.time_all()

        self._benchmark.pedantic(  # type: ignore[no-untyped-call]  # pytest-benchmark has no annotations
            everybody[-1].time_all, setup=others, rounds=rounds, warmup_rounds=1
        )
        for lane in everybody:
            if len(lane.totals) > 1:
                del lane.totals[0], lane.issuing[:1]

    def report(self, lane: Lane, reference: Lane | None = None, note: str = "") -> None:
        """Write the row of a lane that was timed."""
        issuing = statistics.median(lane.issuing) if lane.issuing else None
        ratio = None if reference is None else quartiles(_ratios(lane.totals, reference.totals))
        self.add(lane.name, lane.seconds, issuing, ratio, note)

    def add(
        self,
        work: str,
        seconds: float,
        issuing: float | None = None,
        ratio: tuple[float, float, float] | None = None,
        note: str = "",
    ) -> None:
        """Write a row."""
        row = Row(self._combination, self._group, work, seconds, issuing, ratio, note)
        self._rows.append(row)
        kept: list[Any] = self._benchmark.extra_info.setdefault("rows", [])
        kept.append(attrs.asdict(row))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _ratios(times: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, reference, strict=True)]

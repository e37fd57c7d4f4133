"""The benchmarks still run, and time what they say they time. How long it takes decides nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import race, steps
from benchmarks.memory import growth
from benchmarks.race import Lane, Row, quartiles
from benchmarks.table import table
from farpoint import VirtualWorker

ROOT = Path(__file__).parents[1]


class Clock:
    """Stands still but for what lanes do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(race, "perf_counter", lambda: self.now)

    def work(self, times: int) -> None:
        self.now += times * 2.0

    def wait(self) -> None:
        self.now += 30.0


def test_they_run() -> None:
    some = "add or one_mebibyte or layers or four_floats"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-k", some]
    chosen = ["--farpoint-transport=virtual", "--farpoint-serializer=msgpack", "--farpoint-store=memory"]
    run = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout + run.stderr
    lines = [line.strip() for line in run.stdout.splitlines()]
    assert "virtual-msgpack-memory" in lines
    for row in ("p + p", "500 x = x + 1 of 1 MiB, each", "execute: check, fill, call", "send + get of 4 floats"):
        assert any(line.startswith(f"{row}  ") and " x " in line.removeprefix(row) for line in lines), run.stdout


def test_those_of_the_network_run() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_network.py", "--benchmark-disable", "-k", "tcp"]
    environment = {**os.environ, "FARPOINT_BENCHMARK_MEBIBYTES": "2"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout + run.stderr
    rows = [line.strip() for line in run.stdout.splitlines()]
    assert "tcp-msgpack-memory" in rows
    for row in ("bob.ping()", "x.send(bob)", "p.move(alice)", "p.get()", "the same over a chain of two"):
        assert any(line.startswith(f"{row}  ") and " x " in line.removeprefix(row) for line in rows), run.stdout


def test_the_price_of_an_operation_includes_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lane = Lane("p + p", clock.work, clock.wait, many=10, few=5)
    lane.time_all()
    assert lane.totals == [5.0]


def test_issuing_excludes_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lane = Lane("p + p", clock.work, clock.wait, many=10, few=5)
    lane.time_issuing()
    assert lane.issuing == [2.0]
    assert clock.now == 70.0  # waited before, so that nothing old is sent meanwhile, and after


def test_work_that_is_done_at_once_has_no_issuing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lane = Lane("x + x", clock.work, many=10, few=5)
    lane.time_issuing()
    lane.time_all()
    assert (lane.issuing, lane.totals) == ([], [2.0])


def test_ratios() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_memory_tells_what_is_kept_from_what_passes() -> None:
    size, kept = 32 * 2**20, []
    passing = growth(lambda: bytes(size))
    assert passing.heap_peak >= size > 2 * passing.heap_kept
    keeping = growth(lambda: kept.append(b"x" * size))
    assert keeping.heap_kept >= size
    settled = growth(lambda: kept.append(b"x" * size), kept.clear)
    assert settled.heap_peak >= size > 2 * settled.heap_kept


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory is counted by Linux, in a writable /proc"
)
def test_resident_memory_is_that_of_the_work() -> None:
    size, kept = 32 * 2**20, [b"x" * (128 * 2**20)]
    kept.clear()  # an earlier peak
    passing = growth(lambda: len(b"x" * size))
    keeping = growth(lambda: kept.append(b"x" * size))
    settled = growth(lambda: kept.append(b"x" * size), kept.clear)
    for found in (passing, keeping, settled):
        assert found.peak is not None and size // 2 < found.peak < 2 * size
    assert passing.kept is not None and passing.kept < size // 2
    assert keeping.kept is not None and keeping.kept > size // 2
    assert settled.kept is not None and settled.kept < size // 2


def test_the_table_is_sorted_by_combination() -> None:
    rows = [Row("b", "one", "x", 1e-6), Row("a", "one", "y", 2e-3, 4e-6, (1.5, 2.0, 20.0), "z"), Row("b", "two", "w", 0.0)]
    _, *lines = (line.split() for line in table(rows))
    header = ["one", "time", "issuing", "ratio", "quartiles"]
    assert lines == [
        [], ["a"], header, "y 2.00 ms 4.00 µs 2.00 x 1.50 - 20.0 z".split(),
        [], ["b"], header, "x 1.00 µs".split(), [], "w 0.00 µs".split(),
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", steps.OPTIMIZERS)
@pytest.mark.parametrize("model", steps.MODELS)
def test_a_training_step_waits_only_to_read_a_loss(model: str, optimizer: str) -> None:
    with VirtualWorker(id="bob") as bob:
        found, read = (steps.measure(model, optimizer, bob, read=each) for each in (False, True))
        assert found.waits == 0 and read.waits == 1
        assert read.commands == found.commands + 2, "it is detached and fetched"
        assert found.messages <= 1 + found.commands / 64 and len(bob) == 0

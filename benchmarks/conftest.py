"""What the benchmarks share: one thread, workers of the combination at hand, and the table at the end."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which nothing above has done

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import farpoint
from benchmarks.race import Race, Row
from benchmarks.table import table
from farpoint import VirtualWorker
from farpoint.plugins import plugins
from pytest_farpoint import Combination

torch.set_num_threads(1)
farpoint.TorchHook(torch)

ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    """Leave the reporting to the table below: `--benchmark-verbose` brings that of pytest-benchmark back."""
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("farpoint benchmarks")
        if config.option.benchmark_disable:
            terminalreporter.write_line("One round, which is the first: these times only show that the benchmarks run.")
        for line in table(rows):
            terminalreporter.write_line(line)


@pytest.fixture
def race(benchmark: BenchmarkFixture, farpoint_combination: Combination, request: pytest.FixtureRequest) -> Race:
    """Return what times lanes and writes rows."""
    group: str = request.node.originalname
    return Race(benchmark, farpoint_combination, group, request.config.stash[ROWS])


@pytest.fixture
def workers(farpoint_combination: Combination) -> Iterator[list[VirtualWorker]]:
    """Return three workers."""
    scheme = next(r.schemes[0] for r in plugins.transports() if r.name == farpoint_combination.transport)
    made = [
        VirtualWorker(
            id=name, transport=scheme, serializer=farpoint_combination.serializer, store=farpoint_combination.store
        )
        for name in ("bob", "alice", "charlie")
    ]
    yield made
    for worker in made:
        worker.close()


@pytest.fixture
def bob(workers: list[VirtualWorker]) -> VirtualWorker:
    """Return one of the workers."""
    return workers[0]

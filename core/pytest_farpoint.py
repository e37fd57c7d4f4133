"""The pytest plugin of farpoint: fixtures made of what is registered.

A test that takes `farpoint_combination` runs once for each combination of transport, serializer and store.
The options, or the variables, only narrow that down::

    pytest --farpoint-transport virtual --farpoint-serializer msgpack,torch
    FARPOINT_STORE=memory pytest

A test that takes `farpoint_workers` makes workers of that combination: in this process if the transport stays within it, else
each in a process of its own. Whoever has workers of another kind overrides this fixture, and the laws of
`farpoint.testing.laws` run on them.

A top-level module, because pytest imports it at each start: the package `farpoint` would bring torch along.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from farpoint import RemoteWorker
    from farpoint.testing.pool import Pool

# Their asserts explain themselves like those of a test file.
pytest.register_assert_rewrite("farpoint.testing")

KINDS = ("transport", "serializer", "store")


@attrs.frozen
class Combination:
    """The plugins that one run of a test uses.

    Attributes:
        transport: Name of a transport.
        serializer: Name of a serializer.
        store: Name of a store.
    """

    transport: str
    serializer: str
    store: str

    def __str__(self) -> str:
        return f"{self.transport}-{self.serializer}-{self.store}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that narrow the matrix down."""
    group = parser.getgroup("farpoint")
    for kind in KINDS:
        group.addoption(
            f"--farpoint-{kind}",
            metavar="NAMES",
            help=f"use only these {kind}s, separated by commas (default: FARPOINT_{kind.upper()}, else all)",
        )
    group.addoption(
        "--farpoint-examples",
        metavar="N",
        type=int,
        help="let state machines try N chance histories (default: FARPOINT_EXAMPLES, else the same few each time)",
    )


def pytest_report_header() -> str:
    """Say which farpoint is tested."""
    try:
        return f"farpoint: {importlib.metadata.version('farpoint')}"
    except importlib.metadata.PackageNotFoundError:
        return "farpoint: not installed, only importable"


@pytest.fixture(scope="session")
def farpoint_combination(request: pytest.FixtureRequest) -> Combination:
    """Return the transport, the serializer and the store to test with."""
    combination: Combination = request.param
    return combination


@pytest.fixture(scope="session")
def _farpoint_pool(farpoint_combination: Combination) -> Iterator[Pool | None]:
    """Return worker processes of this combination, None if its transport stays within this process."""
    from farpoint.plugins import plugins

    schemes = {record.name: record.schemes[0] for record in plugins.transports()}
    if plugins.transport(f"{schemes[farpoint_combination.transport]}://").within_process:
        yield None
        return
    from farpoint.cluster import LocalCluster
    from farpoint.testing.pool import Pool

    if farpoint_combination.transport == "tls":
        pytest.importorskip("cryptography", reason="certificates for tls are made with cryptography: pip install 'farpoint[certs]'")
    with LocalCluster("bob", "alice", "charlie", **attrs.asdict(farpoint_combination)) as cluster:
        yield Pool(cluster)


@pytest.fixture
def farpoint_workers(farpoint_combination: Combination, _farpoint_pool: Pool | None) -> Iterator[Callable[[str], RemoteWorker]]:
    """Return a function that makes a worker of this name and returns its handle; whoever calls it closes the worker.

    One in a process of its own is called a little differently, see `farpoint.testing.pool`, and must be empty in the end.
    """
    from farpoint import VirtualWorker

    if _farpoint_pool is not None:
        yield _farpoint_pool
        _farpoint_pool.check()
        return

    def make(name: str) -> RemoteWorker:
        return VirtualWorker(
            id=name,
            transport=farpoint_combination.transport,
            serializer=farpoint_combination.serializer,
            store=farpoint_combination.store,
        )

    yield make


@pytest.fixture(scope="session")
def farpoint_examples(request: pytest.FixtureRequest) -> int | None:
    """Return how many chance histories a state machine shall try, or None for the same few each time."""
    asked: int | None = request.config.getoption("--farpoint-examples")
    if asked is None and os.environ.get("FARPOINT_EXAMPLES"):
        asked = int(os.environ["FARPOINT_EXAMPLES"])
    return asked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes `farpoint_combination` once for each combination."""
    if "farpoint_combination" not in metafunc.fixturenames:
        return
    from farpoint.plugins import plugins

    registered = {
        "transport": [record.name for record in plugins.transports()],
        "serializer": plugins.serializer_names(),
        "store": plugins.store_names(),
    }
    chosen = [_choose(metafunc.config, kind, registered[kind]) for kind in KINDS]
    made = [Combination(*names) for names in itertools.product(*chosen)]
    if made:
        metafunc.parametrize("farpoint_combination", made, ids=str, indirect=True, scope="session")
        return
    missing = ", ".join(kind for kind in KINDS if not registered[kind])
    skipped = pytest.param(None, marks=pytest.mark.skip(reason=f"no {missing} is registered"), id="none")
    metafunc.parametrize("farpoint_combination", [skipped], indirect=True, scope="session")


def _choose(config: pytest.Config, kind: str, registered: Sequence[str]) -> list[str]:
    """Return the names to use; one that is asked for and not there is an error, never a silent skip."""
    wanted: str | None = config.getoption(f"--farpoint-{kind}")
    if wanted is None:
        wanted = os.environ.get(f"FARPOINT_{kind.upper()}")
    names = [name.strip() for name in (wanted or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in registered]
    if unknown:
        exists = ", ".join(registered) or "none"
        raise pytest.UsageError(f"no {kind} {', '.join(unknown)} is registered (registered: {exists})")
    return names or list(registered)

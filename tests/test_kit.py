"""The contract kit works for strangers, as docs/contracts.md tells them to use it, and it finds their mistakes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from farpoint import VirtualWorker
from farpoint.plugins import StorePlugin, hookimpl, plugins
from farpoint.testing import laws
from farpoint.testing.laws.network import Network
from farpoint_memory.store import MemoryStore

DOCUMENT = Path(__file__).parent.parent / "docs" / "contracts.md"
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```\n<!-- end -->", DOCUMENT.read_text(), re.DOTALL))


_OPTIONS = """
def test_options_arrive(farpoint_combination, farpoint_examples):
    assert str(farpoint_combination) == "carrier pigeon-checked-shelf" and farpoint_examples == 3
"""


@pytest.fixture
def stranger(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs pytest in the folder of a stranger, whose distribution is installed there."""
    announced = tmp_path / "farpoint_stranger-1.0.dist-info"
    announced.mkdir()
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: farpoint-stranger\nVersion: 1.0\n")
    (entry_points,) = re.findall(r"```toml\n\[project\.entry-points\.farpoint\]\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (announced / "entry_points.txt").write_text("[farpoint]\n" + entry_points.replace('"', ""))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "test_options.py").write_text(_OPTIONS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FARPOINT_", "PYTEST_"))}
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    return run


def test_a_stranger_is_held_to_the_laws(stranger: Callable[..., str]) -> None:
    """The document's plugins keep their contracts and a small part of the laws, also with workers of their own."""
    laws = "TestL5 or (TestL6 and test_row and ab-) or (TestL9 and first_of_all)"
    chosen = f"TestPigeon or TestShelf or (TestChecked and not test_any) or {laws} or options"
    only = ["--farpoint-transport=carrier pigeon", "--farpoint-serializer=checked", "--farpoint-store=shelf"]
    printed = stranger("-W", "error", *only, "--farpoint-examples=3", "-k", chosen)
    outcomes = [line for line in printed.splitlines() if "::" in line]
    assert all(" PASSED " in line for line in outcomes), printed
    combination = "carrier pigeon-checked-shelf"
    for name, least in {
        "test_contracts.py::TestPigeon::": 15,
        "test_contracts.py::TestChecked::": 100,
        "test_contracts.py::TestShelf::": 20,
        f"test_contracts.py::TestL5OperationsFollowTheChain::test_one_object_a_worker[{combination}-": 7,
        f"test_contracts.py::TestL6TheDataEnd::test_row[{combination}-ab-": 9,
        "test_contracts.py::TestL9ErrorsHappenWhereYouMadeThem::test_an_error_of_the_worker": 3,
        f"test_options.py::test_options_arrive[{combination}]": 1,
        "test_workers.py::TestL5OperationsFollowTheChain::test_one_object_a_worker[cbab]": 1,
    }.items():
        assert sum(line.startswith(name) for line in outcomes) >= least, (name, printed)


def test_every_law_is_exported_in_order() -> None:
    modules = [importlib.import_module(f"{laws.__name__}.{module.name}") for module in pkgutil.iter_modules(laws.__path__)]
    found = {name: value for module in modules for name, value in vars(module).items() if name.startswith("Test")}
    assert set(laws.__all__) == set(found) and all(getattr(laws, name) is found[name] for name in laws.__all__)
    numbered = [int(number) for name in laws.__all__ for number in re.findall(r"^TestL(\d+)", name)]
    assert numbered == sorted(numbered) and set(numbered) == set(range(1, 15))


def test_asserts_of_the_kit_explain_themselves() -> None:
    loader = getattr(laws.__spec__, "loader", None)
    assert type(loader).__name__ == "AssertionRewritingHook"


def test_a_law_cannot_be_overridden() -> None:
    with pytest.raises(AssertionError, match="overrides test_every_kind_of_operation"):
        type("TestLenient", (laws.TestL5OperationsFollowTheChain,), {"test_every_kind_of_operation": lambda self: None})


class _Forgetful(MemoryStore):
    """Returns copies, which a change in place does not reach."""

    def get(self, object_id: int, default: Any = None) -> Any:
        found = super().get(object_id, default)
        return found.clone() if isinstance(found, torch.Tensor) else found


class _Hoarder(MemoryStore):
    """Deletes nothing."""

    def pop(self, object_id: int, *default: Any) -> Any:
        return self.get(object_id, *default)


class _Plugin:
    """Stores that break the laws."""

    @hookimpl
    def farpoint_stores(self) -> Iterator[StorePlugin]:
        yield StorePlugin(name="forgetful", factory=lambda _: _Forgetful())
        yield StorePlugin(name="hoarder", factory=lambda _: _Hoarder())


numbers = count()


@pytest.fixture
def broken() -> Iterator[Callable[[str], Network]]:
    """Return a function that makes a network with a store that breaks the laws."""
    plugin = _Plugin()
    plugins.register(plugin)
    networks: list[Network] = []

    def make(store: str) -> Network:
        networks.append(Network(lambda name: VirtualWorker(id=name, store=store)))
        return networks[-1]

    yield make
    for network in networks:
        network.close()
    plugins.unregister(plugin)


def test_a_store_without_aliasing_is_found(broken: Callable[[str], Network]) -> None:
    with pytest.raises(AssertionError):
        laws.TestL12TorchIsTorch().test_views_alias(broken("forgetful"), "row", "b")


def test_a_store_that_keeps_what_is_released_is_found(
    broken: Callable[[str], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farpoint.testing.laws.network.PATIENCE", 0)
    with pytest.raises(AssertionError):
        laws.TestL3References().test_leaving_a_scope_gives_up(broken("hoarder"))

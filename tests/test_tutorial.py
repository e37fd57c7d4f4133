"""The tutorial shows the values that it promises, with each serializer."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from farpoint import InvalidNameError, local_cluster
from farpoint.tutorial import run


def steps(lines: list[str]) -> dict[str, list[str]]:
    """Return what was shown below each line of code, the last time it was run."""
    found: dict[str, list[str]] = {}
    below: list[str] = []
    for line in "\n".join(lines).splitlines():
        if line.startswith(">>> "):
            below = found[line.removeprefix(">>> ")] = []
        else:
            below.append(line)
    return found


@pytest.mark.parametrize("serializer", ["msgpack", "torch"])
def test_values(serializer: str) -> None:
    lines: list[str] = []
    run(serializer, lines.append)
    shown = steps(lines)
    assert shown["x = x_ptr.get(); x"][0] == "tensor([1, 2, 3, 4])"
    assert shown["y.get().get()"][0] == "tensor([ 2,  4,  6,  8, 10])"
    assert shown["p2p2x.get().get()"][0] == "tensor([1, 2, 3, 4, 5])"


@pytest.mark.parametrize("serializer", ["msgpack", "torch"])
def test_stores(serializer: str) -> None:
    lines: list[str] = []
    run(serializer, lines.append)
    shown = steps(lines)
    sent = "\n".join(shown["x = torch.tensor([1, 2, 3, 4]); x_ptr = x.send(bob)"])
    assert "tensor([1, 2, 3, 4])" in sent
    assert "alice: nothing" in sent
    fetched = "\n".join(shown["p2p2x.get().get()"])
    assert "bob:   nothing" in fetched
    assert "alice: nothing" in fetched
    moved = "\n".join(shown["x = x.move(alice); x"])
    assert "bob:   nothing" in moved
    assert "tensor([1, 2, 3, 4, 5])" in moved


def plain(lines: list[str]) -> list[str]:
    """Return lines with the ids, which are chance, numbered in the order they appear in."""
    known: dict[str, str] = {}
    return [re.sub(r"\d{9,}", lambda found: known.setdefault(found[0], f"<{len(known)}>"), line) for line in lines]


@pytest.mark.parametrize("serializer", ["msgpack", "torch"])
@pytest.mark.parametrize("transport", ["tcp", "websocket"])
def test_processes_show_the_same(transport: str, serializer: str) -> None:
    here: list[str] = []
    run(serializer, here.append)
    there: list[str] = []
    with local_cluster("bob", "alice", transport=transport, serializer=serializer) as cluster:
        run(serializer, there.append, list(cluster.urls.values()), token=cluster.token)
    shown = re.compile(r"me:\d+")
    assert [shown.sub("me", line) for line in plain(there)] == [shown.sub("me", line) for line in plain(here)]


def test_two_workers_are_two() -> None:
    with local_cluster("bob") as cluster, pytest.raises(InvalidNameError, match="bob listens there"):
        run(None, print, [cluster.urls["bob"]] * 2, token=cluster.token)


def test_the_pytest_plugin_does_not_import_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, pytest_farpoint; sys.exit('torch' in sys.modules)"],
        check=True,
        capture_output=True,
    )

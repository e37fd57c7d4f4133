"""The tutorial shows the values that it promises, with each serializer."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_the_pytest_plugin_does_not_import_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, pytest_farpoint; sys.exit('torch' in sys.modules)"],
        check=True,
        capture_output=True,
    )

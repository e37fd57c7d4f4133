"""The tutorials compute what is computed here without workers, between workers in this process and between processes."""

from __future__ import annotations

import copy
import gc
import runpy
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import farpoint
from farpoint import VirtualWorker
from farpoint.peer import Peer
from farpoint.protocol.messages import Kind

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"
NAMES = ["bob", "alice", "carol", "secure_worker"]
TUTORIALS = ["digits", "federated_learning", "split_learning", "trusted_aggregator"]

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="docs/tutorials is in the repository only")


@pytest.fixture(scope="module", params=["virtual", "processes"])
def workers(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "processes":
        with farpoint.local_cluster(*NAMES) as cluster:
            yield SimpleNamespace(**cluster)
    else:
        with ExitStack() as stack:
            yield SimpleNamespace(**{name: stack.enter_context(VirtualWorker(id=name)) for name in NAMES})


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the workers from which values were fetched, as it grows."""
    found: list[str] = []
    ask = Peer.ask

    def asked(peer: Peer, message: list[Any], *args: Any, **kwargs: Any) -> Any:
        if message[0] == Kind.FETCH and peer.owner.id == "me":
            found.append(peer.name)
        return ask(peer, message, *args, **kwargs)

    monkeypatch.setattr(Peer, "ask", asked)
    return found


def tutorial(name: str) -> Any:
    return SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py")))


def nothing_is_left(workers: Any) -> bool:
    gc.collect()
    return [len(getattr(workers, name)) for name in NAMES] == [0, 0, 0, 0]


def same_parameters(one: nn.Module, other: nn.Module) -> bool:
    return all(type(a) is nn.Parameter and torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def step(optimizer: torch.optim.Optimizer, loss: Any) -> float:
    """Train as a tutorial does, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_federated_learning(workers: Any) -> None:
    told = tutorial("federated_learning")
    model, losses = told.main(workers.bob, workers.alice)

    here, expected = told.new_model(), []
    optimizer = torch.optim.Adam(here.parameters(), lr=0.1)
    for _ in range(told.ROUNDS):
        for x, y in told.measured():
            expected.append([step(optimizer, functional.mse_loss(here(x), y)) for _ in range(told.STEPS)][-1])
    assert losses == expected and losses[-1] < 1e-3 * losses[0]
    assert same_parameters(model, here)
    assert nothing_is_left(workers)


def averaged(told: Any, parties: int) -> tuple[nn.Module, list[float]]:
    """Return what the tutorial about the trusted aggregator should."""
    model, losses = told.new_model(), []
    for _ in range(told.ROUNDS):
        copies = [copy.deepcopy(model) for _ in range(parties)]
        scores = [told.train(module, x, y) for module, (x, y) in zip(copies, told.measured(parties), strict=True)]
        with torch.no_grad():
            for parameter, *others in zip(*(module.parameters() for module in (model, *copies)), strict=True):
                parameter.copy_(sum(others[1:], others[0]) / parties)
        losses.append(float(sum(scores[1:], scores[0]) / parties))
    return model, losses


@pytest.mark.parametrize("parties", [2, 3])
def test_trusted_aggregator(workers: Any, parties: int, fetched: list[str]) -> None:
    told = tutorial("trusted_aggregator")
    if parties == 2:
        model, losses = told.main(workers.bob, workers.alice, workers.secure_worker)
    else:
        model, losses = told.many([workers.bob, workers.alice, workers.carol], workers.secure_worker)
    # Each round the averages of four parameters and of the loss have come here, and nothing else of anybody.
    assert fetched == ["secure_worker"] * 5 * told.ROUNDS

    here, expected = averaged(told, parties)
    assert losses == expected and losses[-1] < losses[0]
    assert same_parameters(model, here)
    assert nothing_is_left(workers)


def test_split_learning(workers: Any, fetched: list[str]) -> None:
    told = tutorial("split_learning")
    parts, losses = told.main(workers.alice, workers.bob, workers.carol)
    # Of alice and bob, whose data and activations these are, their own layers alone were fetched.
    assert fetched == ["carol"] * 4 + ["alice"] * 2 + ["bob"] * 2 + ["carol"] * 2

    x, labels = told.known()
    here = nn.Sequential(*told.new_layers())
    optimizer = torch.optim.Adam(here.parameters(), lr=0.02)
    expected = [step(optimizer, functional.cross_entropy(here(x), labels)) for _ in range(told.STEPS)]
    assert losses == expected[19::20]
    assert same_parameters(parts, here) and (here(x).argmax(dim=1) == labels).all()
    assert nothing_is_left(workers)


def test_digits(workers: Any) -> None:
    told = tutorial("digits")
    model, losses, score = told.main(workers.bob, workers.alice)

    owned, (exam, answers) = told.images()
    here = told.new_model()
    optimizer = torch.optim.Adam(here.parameters(), lr=0.01)
    expected = []
    for _ in range(told.EPOCHS):
        for x, y in owned:
            for inputs, labels in zip(x.split(told.BATCH), y.split(told.BATCH), strict=True):
                expected.append(step(optimizer, functional.cross_entropy(here(inputs), labels)))
    assert losses == pytest.approx(expected, rel=1e-3)  # how a convolution is summed up depends on the number of threads
    right = (here.eval()(exam).argmax(dim=1) == answers).float().mean().item() * 100
    assert score == pytest.approx(right, abs=0.5) and score > 85
    assert torch.equal(model[1].num_batches_tracked, here[1].num_batches_tracked)
    assert nothing_is_left(workers)


@pytest.mark.parametrize("name", TUTORIALS)
def test_scripts_run(workers: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cluster(*names: str) -> Any:
        return nullcontext(SimpleNamespace(**{name: getattr(workers, name) for name in names}))

    monkeypatch.setattr(farpoint, "local_cluster", cluster)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert 3 <= len(capsys.readouterr().out.splitlines()) <= 20


def test_all_are_tested_and_listed() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == TUTORIALS
    page = (ROOT / "docs" / "training.md").read_text()
    assert all(f"tutorials/{name}.py" in page for name in TUTORIALS)

"""Models as people write them, with nothing of ours in them, learn through pointers what they learn here, and no step waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import farpoint
from farpoint import VirtualWorker
from farpoint.answers import Reply
from farpoint.peer import SYNC, Peer

farpoint.TorchHook(torch)
F: Any = nn.functional
STEPS = 6


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.other_norm = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.norm(self.first(x)), inplace=True)
        out = self.other_norm(self.second(out))
        out += self.around(x)
        return torch.relu(out)


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        blocks = [Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 1)]
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Transformer(nn.Module):
    """A sequence in, a class out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = self.words(x)
        mask = (words[0] @ words[0].t()).detach().new_full((5, 5), float("-inf")).triu(1)
        out: torch.Tensor = self.out(self.transformer(words, words, tgt_mask=mask).mean(1))
        return out


class Graph(nn.Module):
    """Two layers that add up what comes over the edges, by `index_add` and by `scatter_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nodes, (start, end) = data[0], data[1].unbind(0)
        hidden = self.first(nodes)
        hidden = F.elu(torch.zeros_like(hidden).index_add(0, end, hidden[start]))
        hidden = self.second(hidden)
        degree = torch.zeros_like(hidden).scatter_add(0, end[:, None].expand(-1, 3), torch.ones_like(hidden[start])).clamp(min=1)
        return torch.zeros_like(hidden).scatter_add(0, end[:, None].expand(-1, 3), hidden[start]) / degree


class Recurrent(nn.Module):
    """Words in, a class out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(11, 6), nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.lstm(self.words(x))[0][:, -1])
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(3)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "MLP": (mlp, torch.randn(12, 4, generator=chance())),
    "ResNet": (ResNet, torch.randn(12, 1, 8, 8, generator=chance())),
    "Transformer": (Transformer, torch.randint(0, 11, (12, 5), generator=chance())),
    "LSTM": (Recurrent, torch.randint(0, 11, (12, 5), generator=chance())),
    "graph": (Graph, (torch.randn(12, 4, generator=chance()), torch.randint(0, 12, (2, 40), generator=chance()))),
}


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="bob") as made:
        yield made


def curve(model: nn.Module, x: Any, y: torch.Tensor, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None) -> list[Any]:
    """Train, and return the losses."""
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        after()
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_curve(bob: VirtualWorker, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x = MODELS[name]
    torch.manual_seed(1)
    here: Any = make()
    there = copy.deepcopy(here)
    y = torch.randint(0, 3, (12,), generator=chance())
    expected = curve(here, x, y, torch.optim.Adam(here.parameters(), lr=0.01))
    optimizer = torch.optim.Adam(there.parameters(), lr=0.01)
    there.send(bob)
    inputs = tuple(part.send(bob) for part in x) if isinstance(x, tuple) else x.send(bob)
    waits: list[int] = [0]
    wait = Peer.wait

    def counted(self: Peer, reply: Reply, *args: Any) -> Any:
        waits[-1] += reply.asked[0] != SYNC  # that one is asked every 2,048 commands, and waited for after as many more
        return wait(self, reply, *args)

    monkeypatch.setattr(Peer, "wait", counted)
    losses = curve(there, inputs, y.send(bob), optimizer, lambda: waits.append(0))  # type: ignore[attr-defined]  # the hook's
    # Only the first step may ask what an operation returns whose shape nobody knows here.
    assert not any(waits[1:]), f"steps waited: {waits}"
    # Workers do not execute oneDNN's LSTM, whose sums are done in another order.
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if name == "LSTM" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close([loss.get() for loss in losses], expected, **near)
    there.get()
    for key, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[key], value, **near)
    del losses, inputs, optimizer, there
    assert len(bob) == 0

"""What a training step sends: `python -m benchmarks.steps` prints messages, commands and waits for each of three models.

Nothing is timed, and the numbers do not depend on the machine.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import attrs
import torch
from torch import nn

import farpoint
from farpoint import RemoteWorker, VirtualWorker
from farpoint.answers import Reply
from farpoint.channel import Channel
from farpoint.peer import Peer
from farpoint.protocol.messages import Kind
from farpoint.protocol.session import Session

STEPS: Final = 10
_UNASKED: Final = frozenset({Kind.DEFINE, Kind.RELEASE, Kind.SYNC})
"""What no line of a step issues: templates are told once, releases ride along, and a SYNC every 2,048 commands bounds the queue."""


@attrs.frozen
class Step:
    """What one step sends, on average.

    Attributes:
        messages: Packets from the client to the worker.
        commands: Operations and transfers in them.
        waits: How often the client stops until the worker has answered.
    """

    messages: float
    commands: float
    waits: float


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def cnn() -> nn.Module:
    """Two convolutions with batch norm."""
    first = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8, 4))


class Encoder(nn.Module):
    """A Transformer encoder layer with dropout, and a class for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.layer(x).mean(1))
        return out


MODELS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "MLP": (mlp, (8, 16)),
    "CNN": (cnn, (8, 1, 8, 8)),
    "Transformer encoder layer": (Encoder, (8, 6, 16)),
}
OPTIMIZERS: Final[dict[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "Adam": torch.optim.Adam,
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count what all peers of this process send and wait for."""
    counts: Counter[str] = Counter()
    submit, pack, wait = Channel.submit, Session.pack, Peer.wait

    def submitted(self: Channel, message: list[Any]) -> int:
        counts["commands"] += message[0] not in _UNASKED and message[0] < Kind.ANSWER
        return submit(self, message)

    def packed(self: Session, *args: Any) -> Any:
        packet = pack(self, *args)
        counts["messages"] += packet is not None and self.remote != farpoint.me().incarnation  # not what a virtual worker says back
        return packet

    def waited(self: Peer, reply: Reply, *args: Any) -> Any:
        counts["waits"] += reply.asked[0] not in _UNASKED
        return wait(self, reply, *args)

    with patch.object(Channel, "submit", submitted), patch.object(Session, "pack", packed), patch.object(Peer, "wait", waited):
        yield counts


def measure(model: str, optimizer: str, worker: RemoteWorker, read: bool = False) -> Step:
    """Train a model on a worker, and return what a step sends once its operations are known.

    Args:
        model: Which one.
        optimizer: By which one.
        worker: Where.
        read: Whether each step reads its loss.
    """
    make, shape = MODELS[model]
    trained: Any = make()
    farpoint.modules.send(trained, worker)
    steps = OPTIMIZERS[optimizer](trained.parameters())
    x, y = (farpoint.send(each, worker) for each in (torch.randn(shape), torch.randint(0, 4, shape[:1])))

    def step() -> None:
        steps.zero_grad()
        loss = nn.functional.cross_entropy(trained(x), y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        steps.step()
        if read:
            farpoint.get(loss.detach())
        worker.flush()

    for _ in range(2):
        step()
    with counted() as counts:
        for _ in range(STEPS):
            step()
    return Step(counts["messages"] / STEPS, counts["commands"] / STEPS, counts["waits"] / STEPS)


def main() -> None:
    """Print the table."""
    write = sys.stdout.write
    write(f"{'':34}{'messages':>10}{'commands':>10}{'waits':>10}{'waits, loss read':>18}\n")
    with VirtualWorker(id="bob") as bob:
        for model in MODELS:
            for optimizer in OPTIMIZERS:
                found, read = (measure(model, optimizer, bob, read=each) for each in (False, True))
                numbers = f"{found.messages:>10.1f}{found.commands:>10.1f}{found.waits:>10.1f}{read.waits:>18.1f}"
                write(f"{f'{model}, {optimizer}':34}{numbers}\n")


if __name__ == "__main__":
    main()

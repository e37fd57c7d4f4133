"""What passes whom: moves go from worker to worker, and metadata needs no message. Seen through a transport of glass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

import farpoint
from farpoint import PluginError, PointerTensor, VirtualWorker
from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.plugins import TransportPlugin, hookimpl, plugins
from farpoint.serializer import Frame
from farpoint.transport import Accept, Link, Listener, Receiver, Transport

farpoint.TorchHook(torch)
BIG = 2**18


class Traffic:
    """Bytes and messages by the two names at the ends of a link."""

    def __init__(self) -> None:
        self.bytes: Counter[frozenset[str]] = Counter()
        self.messages = 0

    def between(self, *names: str) -> int:
        return self.bytes[frozenset(names)]


class GlassLink(Link):
    """Counts what is written and what is read at the end that dialled."""

    def __init__(self, traffic: Traffic, url: str, receiver: Receiver) -> None:
        self.traffic = traffic
        self.receiver = receiver
        self.ends = frozenset({url})
        self.inner = plugins.transport("virtual://").connect(url.replace("glass", "virtual"), self)

    def write(self, frames: Sequence[Frame]) -> None:
        if len(self.ends) == 1:
            (url,) = self.ends
            self.ends = frozenset({url.removeprefix("glass://"), json.loads(bytes(frames[0]))["client"]})
        self._count(frames)
        self.inner.write(frames)

    def received(self, frames: Sequence[Frame]) -> None:
        self._count(frames)
        self.receiver.received(frames)

    def lost(self, cause: Exception | None) -> None:
        self.receiver.lost(cause)

    def close(self) -> None:
        self.inner.close()

    def _count(self, frames: Sequence[Frame]) -> None:
        self.traffic.messages += 1
        self.traffic.bytes[self.ends] += sum(memoryview(frame).nbytes for frame in frames)


class Place(Listener):
    """A listener of the transport within the process, under a URL of this one."""

    def __init__(self, inner: Listener) -> None:
        self.inner = inner
        self.url = inner.url.replace("virtual", "glass")

    def close(self) -> None:
        self.inner.close()


class Glass(Transport):
    """Like the transport within the process, with `?port=0` in the URLs that it names."""

    schemes: ClassVar[tuple[str, ...]] = ("glass",)

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def local_url(self, name: str) -> str:
        return f"glass://{name}?port=0"

    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        return GlassLink(self.traffic, url, receiver)

    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        return Place(plugins.transport("virtual://").listen(url.replace("glass", "virtual").removesuffix("?port=0"), accept))


class Network:
    """Three workers whose traffic is seen."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.bob, self.alice, self.charlie = (
            VirtualWorker(id=name, transport="looking glass") for name in ("glassy-bob", "glassy-alice", "glassy-charlie")
        )

    def carried(self, call: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        """Return what a call returns, and between whom more than a tenth of the tensor passed."""
        names = ["me", self.bob.id, self.alice.id, self.charlie.id]
        pairs = [(one, other) for one in names for other in names if one < other]
        before = [self.traffic.between(*pair) for pair in pairs]
        result = call()
        for worker in (self.bob, self.alice, self.charlie):
            worker.synchronize()
        sizes = [self.traffic.between(*pair) - size for pair, size in zip(pairs, before, strict=True)]
        short = {"me": "me", self.bob.id: "bob", self.alice.id: "alice", self.charlie.id: "charlie"}
        return result, {
            "-".join(sorted(short[name] for name in pair)): round(size / (4 * BIG))
            for pair, size in zip(pairs, sizes, strict=True)
            if size > BIG * 4 / 10
        }


@pytest.fixture
def network() -> Iterator[Network]:
    traffic = Traffic()

    class Plugin:
        @hookimpl
        def farpoint_transports(self) -> Iterator[TransportPlugin]:
            yield TransportPlugin(name="looking glass", schemes=("glass",), factory=lambda: Glass(traffic))

    plugin = Plugin()
    plugins.register(plugin)
    network = Network(traffic)
    yield network
    for worker in (network.bob, network.alice, network.charlie):
        worker.close()
    plugins.unregister(plugin)


def test_the_url_of_a_worker_is_that_of_its_listener(network: Network) -> None:
    assert network.bob.url == "glass://glassy-bob"


def test_a_transport_is_chosen_by_name_scheme_or_variable(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARPOINT_TRANSPORT", "looking glass")
    for transport, url in ((None, "glass://dora"), ("glass", "glass://dora"), ("virtual", "virtual://dora")):
        dora = VirtualWorker(id="dora", transport=transport)
        assert dora.url == url
        dora.close()
    with pytest.raises(PluginError, match="mirror"):
        VirtualWorker(id="dora", transport="mirror")


def test_data_moves_directly(network: Network) -> None:
    x: Any = torch.ones(BIG)
    p, seen = network.carried(lambda: x.send(network.bob))
    assert seen == {"bob-me": 1}
    p, seen = network.carried(lambda: p.move(network.alice))
    assert seen == {"alice-bob": 1}
    p, seen = network.carried(lambda: p.move(network.alice))
    assert seen == {}
    p, seen = network.carried(lambda: p.remote_send(network.charlie))
    assert seen == {"alice-charlie": 1}
    p, seen = network.carried(lambda: p.move(network.bob))
    assert seen == {"bob-charlie": 1}
    p, seen = network.carried(lambda: p.move(network.bob))
    assert seen == {}
    p, seen = network.carried(lambda: p.remote_get())
    assert seen == {"alice-bob": 1}
    p, seen = network.carried(lambda: p.send(network.bob))
    assert seen == {}
    p, seen = network.carried(lambda: p.get())
    assert seen == {} and isinstance(p, PointerTensor)
    y, seen = network.carried(lambda: p.get())
    assert seen == {"alice-me": 1} and torch.equal(y, torch.ones(BIG))


def test_operations_carry_no_data(network: Network) -> None:
    x: Any = torch.ones(BIG)
    p = x.send(network.bob).send(network.alice)
    _, seen = network.carried(lambda: [(p + p).mul_(2)[::2].clone().sum() for _ in range(20)])
    assert seen == {}


def test_metadata_needs_no_message(network: Network) -> None:
    x: Any = torch.ones(2, 3)
    p = x.send(network.bob).send(network.alice)
    pointers = [p, p.t(), p + 1]
    network.alice.synchronize()
    before = network.traffic.messages
    for q in pointers:
        facts = q.shape, q.size(), q.dtype, q.ndim, q.dim(), q.numel(), q.stride(), q.is_leaf, q.requires_grad, q.layout
        assert len(facts) == 10 and len(q) and q.is_contiguous() in {True, False} and repr(q) and q.location is network.alice
        assert q.grad is None and q.grad_fn is None and q.device.type == "cpu" and q.is_floating_point()
    assert network.traffic.messages == before

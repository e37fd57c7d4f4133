"""Where the microseconds of `p + p` go: each layer by itself, all of them in turn in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.race import FEW, Lane, Race
from benchmarks.test_compute import chain, double
from farpoint import VirtualWorker
from farpoint.executor import execute
from farpoint.operations import lookup
from farpoint.pointer import PointerTensor
from farpoint.serializer import Frame, Serializer, Wire
from farpoint.template import Template

_make = torch.Tensor._make_wrapper_subclass


class Bare(torch.Tensor):
    """As little as a tensor that executes in `__torch_dispatch__` can do."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks cls and func
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0]


class Floor(torch.Tensor):
    """What torch itself takes for a subclass that looks at calls above autograd, and returns something new below it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own annotation lacks cls and func
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return shell(Floor)


def shell(kind: type) -> Any:
    return _make(kind, (4,), (1,), 0, dtype=torch.float32, requires_grad=False)


class Recorder:
    """Stands before a serializer, and keeps what passes."""

    def __init__(self, serializer: Serializer) -> None:
        self._serializer = serializer
        self.packets: list[tuple[Wire, list[Frame]]] = []

    def encode(self, tree: Wire) -> list[Frame]:
        frames = self._serializer.encode(tree)
        self.packets.append((tree, frames))
        return frames

    def decode(self, frames: Sequence[Frame]) -> Wire:
        return self._serializer.decode(frames)


def packet_of(bob: VirtualWorker, work: Callable[[int], None]) -> tuple[Serializer, Wire, list[Frame]]:
    """Return the serializer, and the packet that `FEW` operations are sent in, releases included."""
    channel = bob.peer.channel
    serializer = channel.serializer
    recorder: Any = Recorder(serializer)
    work(FEW)
    bob.synchronize()
    channel.serializer = recorder
    try:
        work(FEW)
        bob.synchronize()
    finally:
        channel.serializer = serializer
    tree, frames = max(recorder.packets, key=lambda packet: len(packet[1][0]))
    return serializer, tree, frames


def repeat(work: Callable[[], object]) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times):
            work()

    return run


def repeat_packet(work: Callable[[], object]) -> Callable[[int], None]:
    def run(times: int) -> None:
        for _ in range(times // FEW):
            work()

    return run


def test_layers(race: Race, bob: VirtualWorker) -> None:
    x = torch.ones(4)
    p = chain(x, bob)
    serializer, tree, frames = packet_of(bob, double(p))
    template = Template(lookup("aten::add.Tensor"), [["t"], ["t"]], {})
    assert isinstance(p, PointerTensor)
    route, reference, spec = p._route, p._reference, p._spec
    assert reference is not None
    packets = 10 * FEW

    local = Lane("x + x in torch", double(x))
    bare = Lane("__torch_dispatch__ that returns its operand", double(shell(Bare)))
    made = Lane("_make_wrapper_subclass", repeat(lambda: shell(Floor)))
    floor = Lane("both, below a __torch_function__: torch's floor", double(shell(Floor)))
    wrap = Lane("PointerTensor.wrap", repeat(lambda: PointerTensor.wrap(route, reference, spec)))
    encode = Lane("encode a command and its release", repeat_packet(lambda: serializer.encode(tree)), many=packets)
    decode = Lane("decode them", repeat_packet(lambda: serializer.decode(frames)), many=packets)
    called = Lane("call the overload", repeat(lambda: template.operation.overload(x, x)))
    generator = torch.Generator()
    run = Lane("execute: check, fill, call", repeat(lambda: execute(template, [x, x], generator)))
    synchronize = Lane("synchronize, nothing waiting", repeat(bob.synchronize), many=20)
    whole = Lane("p + p, all of it", double(p), bob.synchronize, few=FEW)
    race.run(local, bare, made, floor, wrap, encode, decode, called, run, synchronize, whole, rounds=20)

    issuing = statistics.median(whole.issuing)
    client = issuing - floor.seconds
    worker = whole.seconds - issuing - encode.seconds - decode.seconds - run.seconds
    race.report(local)
    for lane in (bare, made, floor, wrap):
        race.report(lane, local)
    race.add("the rest of issuing", client, note="issuing all of it, less torch's floor")
    for lane in (encode, decode, called, run):
        race.report(lane, local)
    race.add("the rest of sending and serving", worker, note="all of it, less issuing, encode, decode and execute")
    race.report(whole, local)
    race.report(synchronize)

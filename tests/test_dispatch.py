"""How a call becomes a command: what is sent, what is kept, and for how long."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farpoint
from farpoint import VirtualWorker, inference
from farpoint.errors import FarpointError, OperationNotAllowedError, ResizedOutputError, ValueNotHereError
from farpoint.protocol.messages import Kind


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    worker = VirtualWorker(id="dispatch")
    yield worker
    worker.close()


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_pointer_ends_with_its_last_name(bob: VirtualWorker, uncollected: None) -> None:
    """Operands are not kept in a cycle that only the garbage collector would break."""
    p = farpoint.send(torch.ones(3), bob)
    functions: list[Callable[[Any], Any]] = [
        lambda q: q + q,
        lambda q: torch.cat([q, q]),
        lambda q: torch.clamp(q, min=q),
        lambda q: q.add_(1),
        lambda q: q.masked_select(q > 0),
        lambda q: q.split(1),
    ]
    for function in functions:
        q: Any = p + 1
        gone = weakref.ref(q._reference)
        result: Any = function(q)
        del q, result
        assert gone() is None


def test_a_refused_call_keeps_nothing(bob: VirtualWorker) -> None:
    p = farpoint.send(torch.ones(3), bob)
    for attempt in (lambda q: q + torch.ones(3), lambda q: q @ torch.ones(()), lambda q: q.view(7), bool):
        q: Any = p + 1
        with pytest.raises(Exception, match=r"."):
            attempt(q)
        del q
    gc.collect()
    assert len(bob._objects) == 1


def test_tensors_by_name_stay_in_their_places(bob: VirtualWorker) -> None:
    """Holes in named arguments are filled after those in positional ones, here as on the worker."""
    x = torch.rand(3, 2)
    tolerance = torch.tensor(0.1)
    p: Any = farpoint.send(x, bob)
    q: Any = farpoint.send(tolerance, bob)
    inverse: Any = torch.linalg.pinv(p, rtol=q)
    assert torch.allclose(inverse.get(), torch.linalg.pinv(x, rtol=tolerance))
    y = torch.arange(6.0).view(2, 3)
    a: Any = farpoint.send(y, bob)
    clamped: Any = torch.clamp(a, max=a + 1, min=a - 1)
    assert torch.equal(clamped.get(), y)


def test_torch_that_wants_to_read_elements_is_answered_by_us(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.arange(6.0), bob)
    one: Any = farpoint.send(torch.tensor(1), bob)
    attempts: list[Callable[[], Any]] = [
        lambda: p[one : one + 1],
        lambda: torch.unflatten(p, 0, (one, -1)),
        lambda: torch.arange(one),
        lambda: torch.full((2,), p[0]),
    ]
    for attempt in attempts:
        with pytest.raises(ValueNotHereError, match=r"p\.get\(keep=True\)"):
            attempt()


def test_a_template_is_told_once_whatever_the_shapes(bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[Any]] = []
    submit = bob.peer.channel.submit

    def watch(message: list[Any]) -> int:
        told.append(message)
        return submit(message)

    monkeypatch.setattr(bob.peer.channel, "submit", watch)
    for size in range(1, 40):
        p: Any = farpoint.send(torch.ones(size), bob)
        (p * 3 + p).get()
    assert sum(message[0] == Kind.DEFINE for message in told) <= 2
    assert sum(message[0] == Kind.RUN for message in told) == 78


def test_signatures_are_bounded(bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_signatures", {})
    monkeypatch.setattr(inference, "MAX_SIGNATURES", 4)
    for size in range(1, 10):
        p: Any = farpoint.send(torch.ones(size), bob)
        assert torch.equal((p + p).get(), torch.full((size,), 2.0))
    assert len(inference._signatures) == 4


def test_a_dry_run_allocates_only_little(bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker would return may be larger than the memory of this machine."""
    ran: list[bool] = []
    run = inference._run_on_zeros

    def watch(*args: Any) -> Any:
        ran.append(torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None)
        return run(*args)

    monkeypatch.setattr(inference, "_run_on_zeros", watch)
    p: Any = farpoint.send(torch.ones(1), bob)
    q = p.expand(2**39)
    assert q.shape == (2**39,)
    ran.clear()
    copy = q.contiguous()
    assert copy.shape == (2**39,)
    assert not any(ran), "real memory was asked for"
    with pytest.raises(FarpointError):
        copy.get()


@pytest.mark.parametrize(
    ("overload", "arguments", "inferred"),
    [
        (torch.ops.aten.sum.default, [], True),
        (torch.ops.aten.any.default, [], True),
        (torch.ops.aten.sum.dim_IntList, [[5]], False),  # refused, and the kernels are asked in what words
    ],
)
def test_inference_does_not_compute_on_what_is_merely_expanded(
    overload: Any, arguments: list[Any], inferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes twelve bytes, and as long as if it took four terabytes."""
    computed: list[int] = []
    run = inference._run_on_zeros

    def watch(*args: Any) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return run(*args)
        computed.append(sum(math.prod(spec.shape) for spec in args[3]))
        return [], None

    monkeypatch.setattr(inference, "_run_on_zeros", watch)
    layout = inference.layout_of(overload)
    for n, runs in ((2, True), (2**38, False)):
        x = torch.ones(3).expand(n, 3)
        monkeypatch.setattr(inference, "_signatures", {})
        signature = inference.signature_of((), layout, [x, *arguments], {}, [x])
        assert (signature.outputs is not None) is inferred
        assert computed == ([3 * n] if runs else []), "real memory was read"
        computed.clear()


def test_arguments_that_every_worker_refuses_are_refused_here(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.ones(1), bob)
    with pytest.raises(OperationNotAllowedError, match="size"):
        p.expand(2**42)
    bob.synchronize()


def test_an_output_is_resized(bob: VirtualWorker) -> None:
    attempts: list[Callable[[Any, Any, Any], Any]] = [
        lambda p, matrix, out: torch.add(p, p, out=out),
        lambda p, matrix, out: torch.cat([p, p, p], out=out),
        lambda p, matrix, out: torch.mm(matrix, matrix, out=out),
        lambda p, matrix, out: torch.cat([matrix[:0], matrix[:0]], out=out),
        lambda p, matrix, out: torch.max(matrix, 0, out=(out, out.long()[:0])),
    ]
    p, matrix = torch.rand(2), torch.rand(2, 2)
    for out in (torch.empty(0), torch.ones(3, 3)):
        for attempt in attempts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about outputs that are not empty
                far: Any = farpoint.send(out, bob)
                view: Any = far.view(-1)[1:2]
                found = attempt(farpoint.send(p, bob), farpoint.send(matrix, bob), far)
                near = out.clone()
                beside = near.view(-1)[1:2]
                attempt(p, matrix, near)
            assert (found is far or found[0] is far) and far.shape == near.shape and far.stride() == near.stride()
            assert torch.equal(far.get(), near) and torch.equal(view.get(), beside)


def test_an_output_keeps_its_strides(bob: VirtualWorker) -> None:
    """Torch would give it those of the operands, as it resizes it on its way."""
    turned: Any = farpoint.send(torch.ones(2, 3), bob).t()
    out: Any = farpoint.send(torch.empty(0), bob)
    with pytest.raises(ResizedOutputError, match="leave out= away"):
        torch.add(turned, turned, out=out)
    assert out.shape == (0,) and out.get().numel() == 0


def test_dtypes_that_kernels_refuse_are_refused_here(bob: VirtualWorker) -> None:
    p, whole = farpoint.send(torch.ones(2, 2), bob), farpoint.send(torch.ones(2, 2, dtype=torch.int64), bob)
    functions: list[Callable[[Any, Any], Any]] = [
        lambda a, b: a @ b,
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: torch.addmm(a, a, b),
        lambda a, b: a.index_select(0, a[0]),
    ]
    for function in functions:
        with pytest.raises(RuntimeError) as there:
            function(p, whole)
        with pytest.raises(RuntimeError) as here:
            function(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
        assert str(there.value) == str(here.value) and type(there.value) is type(here.value)


def test_a_worker_that_is_gone_keeps_nobodys_pointers(bob: VirtualWorker) -> None:
    gone = VirtualWorker(id="dispatch-gone")
    p: Any = farpoint.send(torch.ones(2), bob)
    gone.close()
    with pytest.raises(FarpointError):
        p.move(gone)
    del p
    gc.collect()
    assert len(bob._objects) == 0


def test_a_moved_result_keeps_its_past(bob: VirtualWorker) -> None:
    other = VirtualWorker(id="dispatch-other")
    p: Any = farpoint.send(torch.ones(2, requires_grad=True), bob)
    (p * 2).move(other).sum().backward()
    assert p.grad.get().tolist() == [2, 2]
    assert p.get().grad is None
    other.close()


def test_elements_are_not_walked_here(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.ones(2), bob)
    attempts: list[Callable[[], Any]] = [lambda: p.apply_(abs), lambda: p.map_(p, max), lambda: p.map2_(p, p, max)]
    for attempt in attempts:
        with pytest.raises(ValueNotHereError):
            attempt()

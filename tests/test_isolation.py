"""Sessions whose operations run in processes of their own: torch is torch there, and whatever happens there stays there."""

from __future__ import annotations

import array
import fcntl
import gc
import itertools
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farpoint
from farpoint import RemoteWorker
from farpoint.errors import (
    DecodeError,
    ExecutorCrashedError,
    OperationTimeoutError,
    QuotaError,
    RemoteExecutionError,
)
from farpoint.isolation import memory
from farpoint.isolation.executor import IsolatedExecutor
from farpoint.isolation.memory import SMALL, write_file
from farpoint.isolation.pipe import Pipe
from farpoint.isolation.processes import Process, zygote
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.protocol.messages import Kind
from farpoint.testing.transport import eventually
from farpoint.worker import Worker
from strangers import environment
from wire import RawClient, check_books, error_of, stocked

farpoint.TorchHook(torch)
names = itertools.count()
LARGE = SMALL // 4 + 7
"""Floats of a storage that is in a memory file."""


class Place(RemoteWorker):
    """An isolated worker of this process."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        name = f"isolated-{next(names)}"
        self.worker = Worker(name, f"virtual://{name}", ["msgpack"], limits=limits, isolate=True)
        super().__init__(name, self.worker.url)

    @property
    def executor(self) -> IsolatedExecutor:
        """What runs this client's operations."""
        executor = self.worker.guests[self.peer.session_id].executor
        assert isinstance(executor, IsolatedExecutor)
        return executor

    def close(self) -> None:
        super().close()
        check_books(self.worker)
        self.worker.close()


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    """Keep one zygote for all tests: each would wait for torch to be imported."""
    zygote.enter()
    yield
    zygote.leave()


@pytest.fixture
def make() -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def place(**limits: Any) -> Place:
        made.append(Place(Limits(**limits)))
        return made[-1]

    yield place
    for one in made:
        one.close()


@pytest.fixture
def bob(make: Callable[..., Place]) -> Place:
    return make()


def tensor(x: torch.Tensor) -> Any:
    """Return a tensor as something that has `send`."""
    return x


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def process_of(executor: IsolatedExecutor) -> Process:
    process = executor._process
    assert process is not None
    return process


def busy(process: Process) -> bool:
    """Return whether a thread waits for an executor."""
    if process.busy.acquire(blocking=False):
        process.busy.release()
        return False
    return True


class Halted:
    """An executor that is in the middle of an operation, for as long as the test wants.

    Args:
        executor: Which.
        call: Issues the operation, on a thread of its own.
    """

    def __init__(self, executor: IsolatedExecutor, call: Callable[[], Any]) -> None:
        self.process = process_of(executor)
        os.kill(self.process.pid, signal.SIGSTOP)
        self.thread = threading.Thread(target=call, daemon=True)
        self.thread.start()
        eventually(lambda: busy(self.process))

    def go_on(self, *signals: signal.Signals) -> None:
        for number in (*signals, signal.SIGCONT):
            os.kill(self.process.pid, number)
        self.thread.join(30)
        assert not self.thread.is_alive()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


A: Any = torch.arange(1.0, 13.0).reshape(3, 4)
BIG: Any = torch.arange(float(4 * LARGE)).reshape(4, LARGE)


def _parts(x: Any) -> list[Any]:
    x[1:, 2] += 5
    x.t()[0].mul_(3)
    return [x, x.t(), x[::2, 1:], x.expand(2, *x.shape)]


def _moved(x: Any) -> list[Any]:
    y = x.clone()
    view = y[1:]
    y.t_()
    view.unsqueeze_(0)
    view.neg_()
    return [y, view]


def _outs(x: Any) -> list[Any]:
    values, places = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.int64)
    torch.sort(x, 1, descending=True, out=(values, places))
    rows = torch.zeros_like(x)
    torch.add(x[0], 1, out=rows[1])
    return [values, places, rows]


def _statistics(x: Any) -> list[Any]:
    mean, var = torch.zeros_like(x[0]), torch.ones_like(x[0])
    return [torch.native_batch_norm(x, None, None, mean, var, True, 0.5, 1e-5)[0], mean, var]


CALLS: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: [x + x, 2 - x * 3.5, x**2 / (x + 1), x // 2, x % 3, -x, x > 2],
    "nonfinite numbers": lambda x: [x * float("inf"), x + float("nan"), x.clamp(max=float("inf"))],
    "matmul": lambda x: [x @ x.t(), torch.addmm(x @ x.t(), x, x.t(), alpha=2), torch.einsum("ij,kj->", x, x)],
    "reductions": lambda x: [x.sum(), x.mean(0), x.var(1), x.argmax(), x.max(1), x.cumsum(0)],
    "views": lambda x: [x[1], x[:, ::2], x.t(), x[1:].view(-1, 1, x.shape[1]), x.unfold(1, 2, 1), x.diagonal(), x[3:, 4:]],
    "in place": _parts,
    "in place, geometry": _moved,
    "out": _outs,
    "several results": lambda x: [*x.topk(2), *x.split(2), *torch.var_mean(x), *torch.aminmax(x)],
    "lists": lambda x: [torch.cat([x, x]), torch.stack([x[0]] * 300), *torch._foreach_add([x, x[0]], 1)],
    "lists, in place": lambda x: (torch._foreach_mul_([x, x], 2), [x])[1],
    "statistics": _statistics,
    "indices": lambda x: [x[[2, 0]], x[x > 3], x.index_add(0, (x[:, 0] * 0).long(), x), torch.nonzero(x > 2)],
    "dtypes": lambda x: [x.to(t) + 1 for t in (torch.int8, torch.bool, torch.bfloat16, torch.float16, torch.complex64, torch.uint8)],
    "bits of views": lambda x: [(x * 1j).conj(), (x * 1j).conj().imag, (x * (1 + 2j)).conj() @ (x.t() * 1j), torch.complex(x, x).mH],
    "complex numbers": lambda x: [x * (2 - 1j), torch.full_like(x, 1 + 2j, dtype=torch.complex128)],
    "nothing": lambda x: [x[:0] + 1, x[:0].sum(), torch.cat([x[:0], x]), x[:0].matmul(x.t()), x.new_zeros(0, 3)],
    "identity": lambda x: [x.contiguous(), x.to(x.dtype), x.detach()],
    "factories": lambda x: [torch.zeros_like(x), x.new_full((2, 2), 7), torch.ones_like(x, dtype=torch.float8_e5m2)],
    "expanded": lambda x: [x[0].expand(1000, -1).sum(0), x[:1, :1].expand(5, 5) + 1],
    "networks": lambda x: [torch.softmax(x, 1), torch.layer_norm(x, x.shape[1:]), torch.nn.functional.gelu(x)],
}


class TestTorchIsTorch:
    @pytest.mark.parametrize("part", [slice(0, 4), slice(0, LARGE), slice(1, 6)], ids=["small", "large", "part of a large one"])
    @pytest.mark.parametrize("call", CALLS)
    def test_results_are_those_of_torch(self, bob: Place, call: str, part: slice) -> None:
        whole: Any = A.clone() if part.stop == 4 else BIG / LARGE
        there = whole.send(bob)
        for found, wanted in zip(_flat(CALLS[call](there[:, part])), _flat(CALLS[call](whole[:, part])), strict=True):
            assert found.dtype is wanted.dtype and found.stride() == wanted.stride()
            # Memory may begin at another multiple of its size, and kernels then add in another order.
            torch.testing.assert_close(found.get(keep=True), wanted, equal_nan=True)
        torch.testing.assert_close(there.get(), whole)
        assert alive(process_of(bob.executor).pid)

    def test_they_are_not_computed_here(self, bob: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("farpoint.executor.execute", None)
        monkeypatch.setattr("farpoint.executor.InProcess.execute", None)
        p = A.send(bob)
        assert torch.equal((p + p).get(), A + A)

    @pytest.mark.parametrize("n", [4, LARGE])
    def test_views_share_the_storage_of_the_worker(self, bob: Place, n: int) -> None:
        p = tensor(torch.zeros(4, n)).send(bob)
        view = p[1:].t()[::2]
        view += 1
        p[3].fill_(7)
        x: Any = torch.zeros(4, n)
        x[1:].t()[::2].add_(1)
        x[3].fill_(7)
        assert torch.equal(p.get(keep=True), x) and torch.equal(view.get(keep=True), x[1:].t()[::2])
        stored = [value.untyped_storage()._cdata for value in bob.worker.store.values()]
        assert len(set(stored)) == 1 and len(stored) >= 2
        assert (memory.file_of(next(iter(bob.worker.store.values())).untyped_storage()) is not None) == (n == LARGE)

    def test_a_store_with_storages_of_its_own(self, bob: Place) -> None:
        p = tensor(torch.zeros(4, LARGE)).send(bob)
        bob.synchronize()
        own = torch.zeros(4, LARGE)
        bob.worker.store[p.id_at_location] = own
        view = p[1]
        view.add_(1)
        (p[2:] * 1).get()
        assert own[1].eq(1).all() and own[[0, 2, 3]].eq(0).all() and torch.equal(view.get(), own[1])

    @pytest.mark.parametrize("room", [True, False])
    def test_without_room_for_files_nothing_else_changes(self, bob: Place, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
        monkeypatch.setattr("farpoint.isolation.executor.room", lambda: room)
        monkeypatch.setattr(memory, "room", lambda: room)
        before = len(memory._files)
        p = tensor(torch.ones(4, LARGE)).send(bob)
        q = p + p
        q[1].mul_(5)
        (q + p).get()
        assert torch.equal(q.get(keep=True)[:2, 0], torch.tensor([2.0, 10.0]))
        assert (len(memory._files) > before) == room

    def test_many_files_in_one_operation(self, bob: Place) -> None:
        p = tensor(torch.ones(LARGE)).send(bob)
        many = [p + i for i in range(300)]
        assert torch.equal(tensor(torch.stack(many)[:, 0]).get(), torch.arange(1.0, 301.0))
        assert len(torch._foreach_add(many, 1)) == 300

    def test_errors_have_torchs_class_and_words(self, bob: Place) -> None:
        inside = farpoint.VirtualWorker(id=f"inside-{next(names)}")
        calls: list[Callable[[Any], Any]] = [
            lambda p: torch.linalg.cholesky(-p @ p.t()),
            lambda p: torch.inverse(p[:3, :3] * 0),
            lambda p: p.index_select(0, (p[0] * 0).long() + 9),
            lambda p: torch.bincount((p[0] * 0).long() - 1),
        ]
        for call in calls:
            found = []
            for worker in (bob, inside):
                with pytest.raises(RemoteExecutionError) as caught:
                    call(A.send(worker)).get()
                error = caught.value
                assert error.origin == error.worker == worker.id
                assert "operation.call" in error.remote_traceback
                found.append((error.error, error.text, error.operation, error.line))
            assert found[0] == found[1]
        assert torch.equal(A.send(bob).add(1).get(), A + 1)
        inside.close()

    def test_tracebacks_stay_where_they_are_not_exposed(self, bob: Place) -> None:
        bob.worker.expose_tracebacks = False
        with pytest.raises(RemoteExecutionError) as caught:
            tensor(torch.zeros(2, 2)).send(bob).inverse().get()
        assert not caught.value.remote_traceback

    def test_operands_are_checked(self, bob: Place) -> None:
        client = stocked(RawClient(bob.worker.url))
        client.say([int(Kind.DEFINE), 1, "aten::embedding_dense_backward.default", [["t"], ["t"], ["c", 2], ["c", -1], ["c", False]], {}])
        client.say([int(Kind.PUT), 5, torch.tensor([9, 9]), False, [], ""], [int(Kind.PUT), 6, torch.ones(2, 3), False, [], ""])
        assert client.error([int(Kind.RUN), 1, [6, 5], [7]])[0] == "ProtocolError"
        client.say([int(Kind.DEFINE), 2, "aten::add.Tensor", [["t"], ["s"]], {}])
        assert "beyond 64 bits" in client.error([int(Kind.RUN), 2, [1, 2**63], [8]])[1]
        client.close()

    def test_chance_is_the_sessions_own(self, bob: Place) -> None:
        here = torch.get_rng_state()

        def draw(*first: list[Any]) -> list[Any]:
            client = stocked(RawClient(bob.worker.url))
            client.say(*first, [int(Kind.DEFINE), 1, "aten::rand_like.default", [["t"]], {}])
            client.say([int(Kind.RUN), 1, [1], [7]], [int(Kind.RUN), 1, [1], [8]])
            drawn = [client.ask([int(Kind.FETCH), number])[1].tolist() for number in (7, 8)]
            client.close()
            return drawn

        seed = [int(Kind.SEED), 3]
        first, second, third, fourth = draw(seed), draw(seed), draw(), draw()
        assert first == second and first[0] != first[1]
        assert len({str(drawn) for drawn in (first, third, fourth)}) == 3
        assert torch.equal(torch.get_rng_state(), here)


def _flat(values: Any) -> list[Any]:
    return [values] if isinstance(values, torch.Tensor) else [leaf for value in values for leaf in _flat(value)]


class TestCrashes:
    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
    @pytest.mark.parametrize("n", [4, LARGE])
    def test_a_crash_costs_one_operation_of_one_session(self, bob: Place, number: signal.Signals, n: int) -> None:
        p = tensor(torch.ones(n)).send(bob)
        other = stocked(RawClient(bob.worker.url))
        q = p + p
        bob.synchronize()
        results: list[Any] = []

        def call() -> None:
            results.append(q * 3)
            bob.flush()

        halted = Halted(bob.executor, call)
        other.say([int(Kind.RUN), 0, [1, 2], [3]])
        assert other.ask([int(Kind.FETCH), 3])[1].tolist() == [2.0, 2.0]
        halted.go_on(number)
        with pytest.raises(ExecutorCrashedError) as caught:
            results[0].get()
        error = caught.value
        assert (error.worker, error.operation, error.cause) == (bob.id, "aten::mul.Tensor", f"it was ended by {number.name}")
        assert torch.equal((q * 3).get(), torch.full((n,), 6.0)) and torch.equal(p.get(), torch.ones(n))
        assert process_of(bob.executor).pid != halted.process.pid and not alive(halted.process.pid)
        other.say([int(Kind.RUN), 0, [3, 3], [4]])
        assert other.ask([int(Kind.FETCH), 4])[1].tolist() == [4.0, 4.0]
        other.close()

    def test_one_that_has_died_between_operations(self, bob: Place) -> None:
        p = A.send(bob)
        (p + p).get()
        gone = process_of(bob.executor)
        os.kill(gone.pid, signal.SIGKILL)
        eventually(lambda: not alive(gone.pid))
        with pytest.raises(ExecutorCrashedError):
            (p + p).get()
        assert torch.equal((p + p).get(), A + A)

    def test_what_an_operation_needs_too_much_memory_for(self, make: Callable[..., Place]) -> None:
        bob = make(executor_bytes=2**26)
        p = A.send(bob)
        q = p.sum().expand(2**27)
        with pytest.raises(QuotaError) as caught:
            (q + 1).get()
        assert (caught.value.limit, caught.value.allowed) == ("executor_bytes", 2**26) and "aten::add.Tensor" in caught.value.found
        big = tensor(torch.ones(2**24)).send(bob)
        assert big.sum().get() == 2**24, "operands do not count"
        assert (big[: 2**23] + 1).sum().get() == 2**24, "32 of 64 MiB"
        assert torch.equal((p + p).get(), A + A)

    def test_results_are_charged(self, make: Callable[..., Place]) -> None:
        bob = make(bytes=2**20)
        p = A.send(bob)
        kept = [p.sum().expand(100_000) + 1 for _ in range(2)]
        with pytest.raises(QuotaError) as caught:
            (kept[0] + kept[1]).get()
        assert caught.value.limit == "bytes" and "800" in caught.value.found
        kept.clear()
        assert torch.equal((p + p).get(), A + A)

    def test_the_zygote_dies(self, bob: Place) -> None:
        p = A.send(bob)
        (p + p).get()
        before, gone = process_of(bob.executor).pid, zygote._process
        assert gone is not None
        gone.kill()
        eventually(lambda: not alive(before))
        with pytest.raises(ExecutorCrashedError):
            (p + p).get()
        assert torch.equal((p + p).get(), A + A)
        assert zygote._process is not gone


class TestDeadlines:
    @pytest.fixture
    def runaway(self, make: Callable[..., Place]) -> Callable[[float], tuple[Place, RawClient, Callable[[], int]]]:
        """Return a function that makes a worker with this deadline, and a call that would take an hour."""

        def prepare(seconds: float) -> tuple[Place, RawClient, Callable[[], int]]:
            bob = make(operation_seconds=seconds)
            client = stocked(RawClient(bob.worker.url))
            client.say(
                [int(Kind.DEFINE), 1, "aten::expand.default", [["t"], ["l", ["c", 2**39], ["c", 2]]], {}],
                [int(Kind.DEFINE), 2, "aten::prod.default", [["t"]], {}],
                [int(Kind.RUN), 1, [1], [3]],
            )
            return bob, client, lambda: client.say([int(Kind.RUN), 2, [3], [4]])[0]

        return prepare

    def test_it_ends_a_runaway(self, runaway: Any) -> None:
        bob, client, call = runaway(1.0)
        process = process_of(bob.worker.guests[client.holder].executor)
        failure = client.answers[call()][1]
        assert failure["kind"] == "OperationTimeoutError"
        assert failure["evidence"] == {"worker": bob.id, "operation": "aten::prod.default", "seconds": 1.0}
        assert not alive(process.pid)
        client.say([int(Kind.RUN), 0, [1, 2], [5]])
        assert client.ask([int(Kind.FETCH), 5])[1].tolist() == [2.0, 2.0]
        client.close()

    def test_nobody_waits_for_a_runaway(self, runaway: Any) -> None:
        bob, client, call = runaway(3600.0)
        process = process_of(bob.worker.guests[client.holder].executor)
        sent: list[int] = []
        thread = threading.Thread(target=lambda: sent.append(call()), daemon=True)
        thread.start()
        eventually(lambda: busy(process))
        other = stocked(RawClient(bob.worker.url), 101, 102)
        other.say([int(Kind.RUN), 0, [101, 102], [103]])
        assert other.ask([int(Kind.FETCH), 103])[1].tolist() == [2.0, 2.0]
        assert other.ask([int(Kind.SYNC), [], []]) is True
        p = A.send(bob)
        assert torch.equal((p + p).get(), A + A)
        assert busy(process) and not sent
        os.kill(process.pid, signal.SIGKILL)
        thread.join(30)
        assert client.answers[sent[0]][1]["kind"] == "ExecutorCrashedError"
        client.close()
        other.close()

    def test_one_that_does_not_even_listen(self, make: Callable[..., Place]) -> None:
        bob = make(operation_seconds=1.0)
        p, q = A.send(bob), BIG.send(bob)
        (p + p).get()
        stopped = process_of(bob.executor)
        own = torch.zeros(1 << 20)  # more than a socket holds
        bob.worker.store[q.id_at_location] = own
        os.kill(stopped.pid, signal.SIGSTOP)
        with pytest.raises(OperationTimeoutError):
            q.add(1).get()
        assert not alive(stopped.pid)
        assert torch.equal((p + p).get(), A + A)


class TestMeanwhile:
    """The worker's lock is free while an executor works: what was checked before is checked again."""

    def test_an_id_is_taken(self, bob: Place) -> None:
        one, other = stocked(RawClient(bob.worker.url), 1, 2), stocked(RawClient(bob.worker.url), 101, 102)
        one.say([int(Kind.RUN), 0, [1, 2], [3]])
        sent: list[int] = []
        executor: Any = bob.worker.guests[one.holder].executor
        halted = Halted(executor, lambda: sent.extend(one.say([int(Kind.RUN), 0, [1, 3], [50]])))
        other.say([int(Kind.PUT), 50, torch.full((2,), 9.0), False, [], ""])
        halted.go_on()
        assert error_of(one.answers[sent[0]][1]) == "MalformedMessageError"
        assert other.ask([int(Kind.FETCH), 50])[1].tolist() == [9.0, 9.0]
        assert error_of(one.ask([int(Kind.FETCH), 50])) == "ObjectNotFoundError"
        one.close()
        other.close()

    @pytest.mark.parametrize("n", [2, LARGE])
    def test_operands_are_cleared(self, bob: Place, n: int) -> None:
        one, other = RawClient(bob.worker.url), RawClient(bob.worker.url)
        one.say([int(Kind.DEFINE), 0, "aten::add_.Tensor", [["t"], ["t"]], {}], [int(Kind.PUT), 1, torch.ones(n), False, [], ""])
        one.say([int(Kind.RUN), 0, [1, 1], [2]])
        executor: Any = bob.worker.guests[one.holder].executor
        halted = Halted(executor, lambda: one.say([int(Kind.RUN), 0, [1, 2], [3]]))
        assert other.ask([int(Kind.CLEAR)]) is True and not bob.worker.store
        halted.go_on()
        assert one.ask([int(Kind.FETCH), 3])[1].tolist() == [4.0] * n
        assert error_of(one.ask([int(Kind.FETCH), 1])) == "ObjectNotFoundError"
        one.close()
        other.close()

    def test_the_session_ends(self, bob: Place) -> None:
        client = stocked(RawClient(bob.worker.url))
        client.say([int(Kind.RUN), 0, [1, 2], [3]])
        guest = bob.worker.guests[client.holder]
        executor: Any = guest.executor
        halted = Halted(executor, lambda: client.say([int(Kind.RUN), 0, [1, 2], [4]]))
        bob.worker.guest_lost(guest)
        halted.thread.join(30)
        assert not halted.thread.is_alive() and not alive(halted.process.pid)
        assert not bob.worker.store and not bob.worker.poisoned
        check_books(bob.worker)
        client.close()

    def test_the_worker_is_closed(self) -> None:
        bob = Worker(f"isolated-{next(names)}", "virtual://closed", ["msgpack"], isolate=True)
        client = stocked(RawClient(bob.url))
        client.say([int(Kind.RUN), 0, [1, 2], [3]])
        executor: Any = bob.guests[client.holder].executor
        halted = Halted(executor, lambda: client.say([int(Kind.RUN), 0, [1, 2], [4]], [int(Kind.RUN), 0, [1, 2], [5]]))
        bob.close()
        halted.thread.join(30)
        assert not halted.thread.is_alive() and not alive(halted.process.pid)
        assert executor._process is None and not bob.guests


GOOD: Any = [["done", [8], [[2, "float32", [2], [1], 0, False, False]], [], []], b"\0\0\x80?" * 2]
"""What an executor answers that was asked for the sum of two tensors of two ones: but for the sum."""


def _answer(**changes: Any) -> list[Any]:
    """Return the good answer with another description of its result."""
    described = dict(zip(("storage", "dtype", "shape", "strides", "offset", "conj", "neg"), GOOD[0][2][0], strict=True))
    return ["done", [8], [list({**described, **changes}.values())], [], []]


def _drawn(missing: int) -> tuple[Any, bytes]:
    """Return the good answer of an operation that draws, but for some bytes of its generator's state, which is nonsense."""
    return ["done", [8], [[1, "float32", [2], [1], 0, False, False]], [], []], GOOD[1] + b"\xff" * (5056 - missing)


_LIES: dict[str, tuple[Any, bytes]] = {
    "a size beyond the storage": (_answer(shape=[3]), b"x" * 8),
    "a stride beyond the storage": (_answer(strides=[2]), b"x" * 8),
    "an offset beyond the storage": (_answer(offset=1), b"x" * 8),
    "a huge offset": (_answer(offset=2**62 - 1), b"x" * 8),
    "a huge offset of nothing": (_answer(shape=[0], offset=2**62), b"x" * 8),
    "an offset beyond 64 bits": (_answer(offset=2**64), b"x" * 8),
    "a negative size": (_answer(shape=[-1]), b"x" * 8),
    "a negative stride": (_answer(strides=[-1], offset=1), b"x" * 8),
    "a negative offset": (_answer(offset=-1), b"x" * 8),
    "a stride for nothing": (_answer(strides=[1, 1]), b"x" * 8),
    "sizes that overflow": (_answer(shape=[2**40, 2**40, 0], strides=[0, 0, 0]), b"x" * 8),
    "huge sizes": (_answer(shape=[2**40, 2**40], strides=[0, 0]), b"x" * 8),
    "too many sizes": (_answer(shape=[1] * 65, strides=[0] * 65), b"x" * 8),
    "a dtype that is none": (_answer(dtype="object"), b"x" * 8),
    "a dtype by another name": (_answer(dtype="Tensor"), b"x" * 8),
    "a dtype of another type": (_answer(dtype=["float32"]), b"x" * 8),
    "a larger dtype": (_answer(dtype="float64"), b"x" * 8),
    "a real tensor conjugated": (_answer(conj=True), b"x" * 8),
    "a flag that is none": (_answer(neg=1), b"x" * 8),
    "a size that is true": (_answer(shape=[True], strides=[1]), b"x" * 8),
    "a size that is a fraction": (_answer(shape=[1.0]), b"x" * 8),
    "a storage that is not there": (_answer(storage=3), b"x" * 8),
    "a storage before the first": (_answer(storage=-1), b"x" * 8),
    "too little data": (["done", [9], [], [], []], b"x" * 8),
    "data of a negative size": (["done", [-8], [], [], []], b"x" * 8),
    "data of a size that is true": (["done", [True], [], [], []], b"x" * 8),
    "a file that was not sent": (["done", [None], [], [], []], b""),
    "a change of what was not lent": (["done", [], [], [2], []], b"x" * 8),
    "a change twice": (["done", [], [], [0, 0], []], b"x" * 16),
    "a change that is true": (["done", [], [], [True], []], b"x" * 8),
    "an operand of another size": (["done", [], [], [], [[0, [0, "float32", [3], [1], 0, False, False]]]], b""),
    "an operand elsewhere": (["done", [], [], [], [[0, [1, "float32", [2], [1], 0, False, False]]]], b""),
    "an operand of another dtype": (["done", [], [], [], [[0, [0, "int32", [2], [1], 0, False, False]]]], b""),
    "an operand that is none": (["done", [], [], [], [[5, [0, "float32", [2], [1], 0, False, False]]]], b""),
    "a move that is none": (["done", [], [], [], [0]], b""),
    "far too many results": (["done", [], [None] * 100_000, [], []], b""),
    "no lists": (["done", {}, "", 0, None], b""),
    "another verb": (["pwned"], b""),
    "no list": ({"done": []}, b""),
    "nothing": (None, b""),
    "a failure that is none": (["failed", {}], b""),
    "a failure without evidence": (["failed", {"uid": 1, "kind": "RemoteExecutionError"}], b""),
    "a failure of the worker": (["failed", {"uid": 1, "kind": "WorkerLostError", "evidence": {"worker": "x", "cause": "y"}}], b""),
    "a failure of another kind": (["failed", {"uid": 1, "kind": "SystemExit", "text": "x", "evidence": {}}], b""),
}

Deed = Callable[[socket.socket], None]


def _say(answer: Any, data: bytes = b"", files: tuple[int, ...] = ()) -> Deed:
    def deed(link: socket.socket) -> None:
        Pipe(link).send(answer, files, [data])

    return deed


def _packets(*packets: bytes) -> Deed:
    def deed(link: socket.socket) -> None:
        for packet in packets:
            link.send(packet)

    return deed


def _lengths(header: int, data: int, files: int) -> bytes:
    return struct.pack("<QQI", header, data, files)


def _files(*descriptors: Callable[[], int], sizes: int = 1, size: int = LARGE) -> Deed:
    """Return a deed that answers with files for storages."""

    def deed(link: socket.socket) -> None:
        opened = [descriptor() for descriptor in descriptors]
        wire = [2, "float32", [size], [1], 0, False, False]
        text = json.dumps(["done", [None] * sizes, [wire], [], []]).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened))
        link.sendmsg([_lengths(len(text), 0, len(opened)) + text], [rights] if opened else [])
        for descriptor in opened:
            os.close(descriptor)

    return deed


def _honest_file() -> int:
    return write_file(memoryview(bytes(4 * LARGE)))


def _loose_file() -> int:
    descriptor = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4 * LARGE)
    return descriptor


def _read_only_file() -> int:
    descriptor = _loose_file()
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE)
    return descriptor


_good_text = json.dumps(GOOD[0]).encode()

DEEDS: dict[str, Deed] = {
    **{name: _say(*lie) for name, lie in _LIES.items()},
    "silence, and the end": lambda link: None,
    "a short packet": _packets(b"no message"),
    "no JSON": _packets(_lengths(4, 0, 0) + b"\xff{[("),
    "deep JSON": _packets(_lengths(50_000, 0, 0) + b"[" * 50_000),
    "a huge number": _packets(_lengths(50_000, 0, 0) + b"1" * 50_000),
    "a header beyond its message": _packets(_lengths(2**40, 0, 0)),
    "a message that overflows": _packets(_lengths(2**63, 2**63, 0) + b"[]"),
    "more than it says": _packets(_lengths(len(_good_text), 8, 0) + _good_text + GOOD[1] + b"x"),
    "less than it says, and the end": _packets(_lengths(2, 10**6, 0) + b"[]"),
    "descriptors that do not come": _packets(_lengths(2, 0, 7) + b"[]"),
    "a packet that is too long": _packets(_lengths(90_000, 0, 0) + b"1" * 90_000),
    "a file less than it says": _files(_honest_file, sizes=2),
    "files that nobody announced": lambda link: _many_files(link),
    "a file that may shrink": _files(_loose_file),
    "a file that cannot be mapped": _files(_read_only_file),
    "a device": _files(lambda: os.open("/dev/zero", os.O_RDWR)),
    "a pipe": _files(lambda: _one_of(os.pipe())),
    "a file on disk": _files(lambda: os.open(__file__, os.O_RDONLY)),
    "a shorter file": _files(_honest_file, size=LARGE + 1),
}


def _one_of(descriptors: tuple[int, int]) -> int:
    os.close(descriptors[1])
    return descriptors[0]


def _many_files(link: socket.socket) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor] * 100))
    link.sendmsg([_lengths(len(_good_text), 8, 0) + _good_text + GOOD[1]], [rights])
    os.close(descriptor)


class TestExecutorsThatLie:
    @pytest.fixture
    def client(self, bob: Place) -> Iterator[RawClient]:
        client = stocked(RawClient(bob.worker.url))
        yield client
        client.close()

    def pose(self, monkeypatch: pytest.MonkeyPatch, deed: Deed) -> list[threading.Thread]:
        """Let the next executor be one that answers its first request like this, and closes."""
        threads: list[threading.Thread] = []

        def fork(allowed: int) -> Process:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

            def serve() -> None:
                with there:
                    try:
                        Pipe(there).receive()
                        deed(there)
                    except OSError:
                        pass  # the worker has seen enough

            threads.append(threading.Thread(target=serve, daemon=True))
            threads[-1].start()
            return Process(0, 0, Pipe(here))

        monkeypatch.setattr(zygote, "fork", fork)
        return threads

    def test_the_lies_are_lies_of_a_good_answer(self, bob: Place, client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pose(monkeypatch, _say(*GOOD))
        client.say([int(Kind.RUN), 0, [1, 2], [3]])
        assert client.ask([int(Kind.FETCH), 3])[1].tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("lie", [lie for lie, (answer, data) in _LIES.items() if data == b"x" * 8 and answer[2:3] != [[]]])
    def test_torch_does_not_see_a_tensor_that_is_none(self, lie: str) -> None:
        growing = [torch.zeros(8, dtype=torch.uint8).untyped_storage() for _ in range(3)]
        with pytest.raises(DecodeError):
            memory.build(_LIES[lie][0][2][0], growing)
        assert torch.equal(memory.build(GOOD[0][2][0], growing), torch.zeros(2))

    def test_a_good_file(self, bob: Place, client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pose(monkeypatch, _files(_honest_file))
        client.say([int(Kind.RUN), 0, [1, 2], [3]])
        assert client.ask([int(Kind.FETCH), 3])[1].tolist() == [0.0] * LARGE

    @pytest.mark.parametrize("deed", DEEDS)
    def test_they_cost_their_session_one_operation(
        self, bob: Place, client: RawClient, monkeypatch: pytest.MonkeyPatch, deed: str
    ) -> None:
        before = open_files()
        threads = self.pose(monkeypatch, DEEDS[deed])
        (number,) = client.say([int(Kind.RUN), 0, [1, 2], [3]])
        failure = client.answers[number][1]
        assert failure["kind"] == "ExecutorCrashedError" and failure["evidence"]["operation"] == "aten::add.Tensor"
        assert failure["evidence"]["cause"].startswith("it answered what no executor answers: ") != deed.endswith("and the end")
        threads[0].join(30)
        executor: Any = bob.worker.guests[client.holder].executor
        assert executor._process is None and set(bob.worker.poisoned) == {3}
        monkeypatch.undo()
        assert client.ask([int(Kind.FETCH), 1])[1].tolist() == [1.0, 1.0]
        assert open_files() == before
        client.say([int(Kind.RUN), 0, [1, 2], [4]])
        assert client.ask([int(Kind.FETCH), 4])[1].tolist() == [2.0, 2.0]

    @pytest.mark.parametrize(("missing", "kind"), [(0, None), (1, "ExecutorCrashedError"), (5056, "ExecutorCrashedError")])
    def test_the_state_of_a_generator(
        self, bob: Place, client: RawClient, monkeypatch: pytest.MonkeyPatch, missing: int, kind: str | None
    ) -> None:
        self.pose(monkeypatch, _say(*_drawn(missing)))
        client.say([int(Kind.DEFINE), 1, "aten::rand_like.default", [["t"]], {}])
        (number,) = client.say([int(Kind.RUN), 1, [1], [3]])
        assert client.answers.get(number, [0, {"kind": None}])[1]["kind"] == kind
        monkeypatch.undo()
        (number,) = client.say([int(Kind.RUN), 1, [1], [4]])
        if kind is not None:  # what was kept is that from before
            assert client.ask([int(Kind.FETCH), 4])[1].numel() == 2
        else:  # whoever has made its own state up gets what torch makes of it
            assert client.answers[number][1]["kind"] in ("RemoteExecutionError", "ExecutorCrashedError")

    def test_words_of_a_failure_are_not_its_own(self, bob: Place, client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
        evidence = {"worker": "root", "operation": "rm", "error": "Error", "text": "t" * 9999, "line": "x.py:1", "remote_traceback": "x"}
        failure = {"uid": 5, "kind": "RemoteExecutionError", "worker": "root", "operation": "rm", "text": "t" * 9999, "evidence": evidence}
        self.pose(monkeypatch, _say(["failed", {**failure, "orphan": True}]))
        bob.worker.expose_tracebacks = False
        (number,) = client.say([int(Kind.RUN), 0, [1, 2], [3]])
        found = client.answers[number][1]
        assert (found["worker"], found["operation"], len(found["text"])) == (bob.id, "aten::add.Tensor", 500) and found["uid"] != 5
        ours = {"worker": bob.id, "operation": "aten::add.Tensor", "line": "", "remote_traceback": ""}
        assert found["evidence"] == {**ours, "error": "Error", "text": "t" * 500}

    def test_a_file_beyond_the_quota(self, make: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
        client = stocked(RawClient(make(bytes=2**16).worker.url))

        def sparse() -> int:
            descriptor = os.memfd_create("sparse", os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, 2**40)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return descriptor

        for room in (True, False):
            monkeypatch.setattr("farpoint.isolation.executor.room", lambda room=room: room)
            self.pose(monkeypatch, _files(sparse))
            assert client.error([int(Kind.RUN), 0, [1, 2], [3 + room]])[0] == "QuotaError"
        client.close()


class TestConfinement:
    @pytest.fixture
    def pid(self, bob: Place) -> int:
        (A.send(bob) + 1).get()
        return process_of(bob.executor).pid

    def test_an_executor_has_its_socket_and_nothing_else(self, pid: int) -> None:
        open_files = {int(link.name): str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        assert [open_files.pop(number) for number in (0, 1, 2)] == ["/dev/null"] * 3
        assert [place.partition(":")[0] for place in open_files.values()] == ["socket"]

    def test_it_has_limits(self, pid: int) -> None:
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        used = int(Path(f"/proc/{pid}/status").read_text().partition("VmData:")[2].split()[0]) * 1024
        most = resource.prlimit(pid, resource.RLIMIT_DATA)[1]
        assert most <= used + DEFAULT_LIMITS.executor_bytes
        assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()

    def test_it_is_in_another_session_than_the_worker(self, pid: int) -> None:
        assert os.getsid(pid) != os.getsid(0)


class TestLeftovers:
    def test_close_leaves_no_process_and_no_descriptor(self) -> None:
        def once() -> None:
            bob = Place()
            p = tensor(torch.ones(LARGE)).send(bob)
            q = [p + i for i in range(20)]
            tensor(torch.stack(q)).get()
            client = stocked(RawClient(bob.worker.url))
            client.say([int(Kind.RUN), 0, [1, 2], [3]])
            pids.append([guest.executor._process.pid for guest in bob.worker.guests.values()])  # type: ignore[attr-defined]
            client.close()
            assert not alive(pids[-1][1]), "it ends with its session"
            bob.close()

        pids: list[list[int]] = []
        once()
        before = open_files()
        once()
        assert open_files() == before
        assert not [pid for some in pids for pid in some if alive(pid)]

    def test_the_last_worker_ends_the_zygote(self) -> None:
        script = """
            import os, torch, farpoint
            from farpoint.isolation.processes import zygote
            from farpoint.worker import Worker
            def children():
                return open(f"/proc/self/task/{os.getpid()}/children").read().split()
            before = len(os.listdir("/proc/self/fd"))
            one, two = (Worker(name, f"virtual://{name}", ["msgpack"], isolate=True) for name in ("one", "two"))
            assert len(children()) == 1
            process = zygote.fork(2**30)
            one.close()
            one.close()
            assert len(children()) == 1 and process.end() == "it was ended by SIGKILL"
            two.close()
            assert not children() and len(os.listdir("/proc/self/fd")) == before
            try:
                Worker("three", "nowhere://three", ["msgpack"], isolate=True)
            except farpoint.FarpointError:
                assert not children()
            three = Worker("three", "virtual://three", ["msgpack"], isolate=True)
            three.close()  # before it is ready
            assert not children()
        """
        run(script)

    def test_nothing_outlives_a_worker_that_is_killed(self) -> None:
        script = """
            import os, signal, torch, farpoint
            from farpoint.isolation.processes import zygote
            from farpoint.worker import Worker
            bob = Worker("bob", "virtual://bob", ["msgpack"], isolate=True)
            executor = zygote.fork(2**30)
            os.kill(executor.pid, signal.SIGSTOP)
            if not os.fork():
                signal.pause()  # holds what the worker held
            print(zygote._process.pid, executor.pid, flush=True)
            input()
        """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(Path.cwd()), start_new_session=True,
        ) as worker:  # fmt: skip
            assert worker.stdout is not None
            watched = [os.pidfd_open(int(pid)) for pid in worker.stdout.readline().split()]
            copy = int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()[-1])
            worker.kill()
            try:
                for descriptor in watched:
                    assert select.select([descriptor], [], [], 30)[0], "it lives"
            finally:
                os.kill(copy, signal.SIGKILL)
                for descriptor in watched:
                    os.close(descriptor)

    def test_a_forked_child_leaves_the_parents_executors_alone(self, bob: Place) -> None:
        p = A.send(bob)
        (p + p).get()
        child = os.fork()
        if not child:
            mine = zygote._process is None and zygote._control is None
            os._exit(0 if mine else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal((p + p).get(), A + A)


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment(Path.cwd()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

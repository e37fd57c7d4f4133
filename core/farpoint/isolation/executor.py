"""The worker's side of isolated operations: what it lends to an executor, and what it believes of the answers."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs
import torch

from farpoint.errors import DecodeError, ExecutorCrashedError, OperationTimeoutError, QuotaError
from farpoint.failures import read_failure
from farpoint.generator import new_generator
from farpoint.isolation.memory import (
    build,
    content,
    describe,
    file_of,
    grow,
    keep_file,
    map_file,
    new_storage,
    private,
    room,
    share,
)
from farpoint.isolation.pipe import close_all
from farpoint.isolation.processes import Process, zygote
from farpoint.resizing import outgrown
from farpoint.stored import Poisoned

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.template import Template
    from farpoint.worker import Worker

_HEADER_BYTES: Final = 16 * 2**20
_MANY: Final = 4_096

_RAISED: Final = frozenset(
    {"RemoteExecutionError", "ProtocolError", "LimitError", "EncodeError", "OperationNotAllowedError", "PluginError"}
)
"""What an operation may end with. Nothing else is an executor's to say."""


@attrs.define
class _Loan:
    """What one operation is given, and gives back.

    Attributes:
        storages: The storages of its operands, each once.
        sizes: For each the bytes of it that travel by value; None if it is in a file.
        results: What it returned.
        changed: Storages that it has written to, and what they hold now: of those that travel by value.
        moved: Operands that have another geometry, and which.
        state: That of the random generator, after an operation that has drawn from it.
    """

    storages: list[torch.UntypedStorage] = attrs.field(factory=list)
    sizes: list[int | None] = attrs.field(factory=list)
    results: list[torch.Tensor | None] = attrs.field(factory=list)
    changed: list[tuple[torch.UntypedStorage, memoryview]] = attrs.field(factory=list)
    moved: list[tuple[torch.Tensor, torch.Tensor]] = attrs.field(factory=list)
    state: bytes = b""


class IsolatedExecutor:
    """Runs the operations of one session in a process of its own, forked when the first one comes.

    The state of its random generator is kept here, as bytes that nothing here looks into, and goes to the process and back with
    each operation that draws. So the process may end at any time, and one that lies about it spoils the numbers of its own session.

    Args:
        worker: Whose objects they are about.
        guest: Who asks for them.
    """

    def __init__(self, worker: Worker, guest: Guest) -> None:
        self._worker = worker
        self._guest = guest
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._closed = False
        self._state = _bytes_of(new_generator())

    def execute(self, template: Template, values: list[Any]) -> Any:
        """Return what the operation returns: a tensor, or a list of what it consists of.

        The worker's lock is given up while the executor works. Whatever was checked before must be checked again.

        Args:
            template: The operation, checked when it was defined.
            values: What fills its holes: tensors, and numbers that are not checked yet.

        Raises:
            Poisoned: It failed, for a reason that torch or a check has given.
            ExecutorCrashedError: The executor has died, or does not speak like one.
            OperationTimeoutError: It took too long.
            QuotaError: It needed too much memory.
        """
        loan = _Loan()
        described = values.copy()
        known: dict[int, int] = {}
        for hole in template.tensors:
            storage = values[hole].untyped_storage()
            index = known.setdefault(storage._cdata, len(loan.storages))
            if index == len(loan.storages):
                loan.storages.append(storage)
                loan.sizes.append(storage.nbytes() if file_of(storage) is None else None)
            described[hole] = describe(values[hole], index)
        request = [template.wire, described, loan.sizes]
        with _released(self._worker.lock):
            self._exchange(template, request, values, loan)
        if self._guest.left:
            self._crashed(template, "the session is over")
        if any(storage in outgrown for storage in loan.storages):
            self._crashed(template, "another session has resized one of its operands meanwhile")
        for storage, data in loan.changed:
            content(storage)[:] = data
        for operand, now in loan.moved:
            operand.set_(operand.untyped_storage(), now.storage_offset(), now.shape, now.stride())
        self._state = loan.state or self._state
        return loan.results[0] if len(loan.results) == 1 else loan.results

    def seed(self, seed: int) -> None:
        """Let the next random numbers of this session be those that follow a seed. Other sessions have generators of their own."""
        self._state = _bytes_of(torch.Generator().manual_seed(seed))

    def close(self) -> None:
        """End the executor, also under a thread that waits for it."""
        self._closed = True
        self.rest()

    def rest(self) -> None:
        """End the process, also under a thread that waits for it; the next operation starts another one."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def _exchange(self, template: Template, request: list[Any], values: list[Any], loan: _Loan) -> None:
        """Let the executor do it, and read what it says into the loan. One that does not end well is ended."""
        limits = self._worker.limits
        files = [file_of(storage) for storage, size in zip(loan.storages, loan.sizes, strict=True) if size is None]
        lent = [content(storage) for storage, size in zip(loan.storages, loan.sizes, strict=True) if size]
        if template.operation.random:
            lent.append(memoryview(self._state))
        process = self._start(template)
        try:
            with process.busy:
                deadline = time.monotonic() + limits.operation_seconds
                process.pipe.send(request, [file for file in files if file is not None], lent, deadline)
                most = _HEADER_BYTES + _MANY * 2**15 + sum(map(len, lent))
                answer, descriptors, data = process.pipe.receive(most, deadline)
            try:
                self._read(template, answer, descriptors, data, values, loan)
            finally:
                close_all(descriptors)
        except BaseException as error:
            if isinstance(error, Poisoned | QuotaError):
                if isinstance(error, QuotaError):
                    self._drop(process)  # it may have kept what it could not return
                raise
            how = self._drop(process)
            if isinstance(error, TimeoutError):
                raise OperationTimeoutError(self._worker.id, template.operation.name, limits.operation_seconds) from error
            if isinstance(error, EOFError | OSError):
                self._crashed(template, how)
            if isinstance(error, Exception):
                reason = error.reason if isinstance(error, DecodeError) else str(error)
                self._crashed(template, f"it answered what no executor answers: {reason[:200]}")
            raise

    def _start(self, template: Template) -> Process:
        with self._lock:
            process = self._process
        if process is not None:
            return process
        try:
            process = zygote.fork(self._worker.limits.executor_bytes)
        except OSError as error:
            self._crashed(template, f"none could be started: {error}")
        with self._lock:
            if not self._closed:
                self._process = process
                return process
        process.end()
        self._crashed(template, "the session is over")

    def _drop(self, process: Process) -> str:
        with self._lock:
            if self._process is process:
                self._process = None
        return process.end()

    def _crashed(self, template: Template, cause: str) -> NoReturn:
        raise ExecutorCrashedError(self._worker.id, template.operation.name, cause)

    def _read(
        self, template: Template, answer: Any, descriptors: list[int], data: memoryview, values: list[Any], loan: _Loan
    ) -> None:
        match answer:
            case ["done", list() as fresh, list() as results, list() as changed, list() as moved]:
                pass
            case ["failed", dict() as failure]:
                raise Poisoned(self._read_failure(template, failure))
            case ["exhausted"]:
                allowed = self._worker.limits.executor_bytes
                needs = f"{template.operation.name}, which needs more memory than that"
                raise QuotaError(self._worker.id, "executor_bytes", allowed, needs)
            case _:
                raise DecodeError("its form is not known")
        if max(len(fresh), len(results), len(changed), len(moved)) > _MANY:
            raise DecodeError("it is about too many tensors")
        storages = loan.storages.copy()
        queue, begin = descriptors.copy(), 0

        def take(size: Any) -> memoryview:
            nonlocal begin
            if type(size) is not int or not 0 <= size <= len(data) - begin:
                raise DecodeError("it has less bytes than it says")
            begin += size
            return data[begin - size : begin]

        for size in fresh:
            if size is not None:
                storages.append(private(bytearray(take(size))))
            elif queue:
                storages.append(self._adopt(queue, descriptors))
            else:
                raise DecodeError("it has less descriptors than it says")
        loan.results = [None if wire is None else build(wire, storages) for wire in results]
        lendable = {index: size for index, size in enumerate(loan.sizes) if size is not None}
        for index in changed:
            if type(index) is not int or index not in lendable:
                raise DecodeError("it has written to what it was not lent by value")
            loan.changed.append((storages[index], take(lendable.pop(index))))
        holes = set(template.tensors)
        for change in moved:
            if type(change) is not list or len(change) != 2 or type(change[0]) is not int or change[0] not in holes:
                raise DecodeError("it has moved what is no operand")
            operand, now = values[change[0]], build(change[1], storages)
            same = now.untyped_storage()._cdata == operand.untyped_storage()._cdata
            if not same or (now.dtype, now.is_conj(), now.is_neg()) != (operand.dtype, operand.is_conj(), operand.is_neg()):
                raise DecodeError("it has made another tensor of an operand")
            loan.moved.append((operand, now))
        if template.operation.random:
            loan.state = bytes(take(len(self._state)))

    def _adopt(self, queue: list[int], descriptors: list[int]) -> torch.UntypedStorage:
        """Return the storage of the next file, which stays shared if there is room for that."""
        descriptor = queue.pop(0)
        storage = map_file(descriptor)
        limits = self._worker.limits
        if storage.nbytes() > limits.bytes:
            raise QuotaError(self._worker.id, "bytes", limits.bytes, f"{storage.nbytes()} bytes")
        if not room():
            return new_storage(storage.nbytes()).copy_(storage)
        descriptors.remove(descriptor)
        keep_file(storage, descriptor)
        return storage

    def _read_failure(self, template: Template, content: dict[str, Any]) -> dict[str, Any]:
        """Return what went wrong as a failure of this worker: of the executor's words only class, text and traceback count."""
        failure = read_failure({**content, "uid": secrets.randbits(62) + 1}, self._worker.id)
        evidence = failure["evidence"]
        if failure["kind"] not in _RAISED or evidence is None:
            raise DecodeError("it failed in a way that no operation fails in")
        name, worker = template.operation.name, self._worker
        if failure["kind"] == "RemoteExecutionError":
            shown = evidence["remote_traceback"] if worker.expose_tracebacks else ""
            evidence = {**evidence, "worker": worker.id, "operation": name, "line": "", "remote_traceback": shown}
        fixed = {"worker": worker.id, "operation": name, "orphan": False}
        return {**failure, **fixed, "evidence": evidence}


class Isolation:
    """What an isolated worker has beside one that is not.

    Args:
        worker: Who.
    """

    share = staticmethod(share)
    grow = staticmethod(grow)

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._open = False

    def start(self) -> None:
        """Let the process start that executors are forked from, so that the first operation finds it ready."""
        self._open = True
        zygote.enter()

    def executor(self, guest: Guest) -> IsolatedExecutor:
        """Return the executor of a new session."""
        return IsolatedExecutor(self._worker, guest)

    def close(self) -> None:
        """End every executor. The second call does nothing."""
        if self._open:
            self._open = False
            for guest in list(self._worker.guests.values()):
                guest.executor.close()
            zygote.leave()


def _bytes_of(generator: torch.Generator) -> bytes:
    return bytes(content(generator.get_state().untyped_storage()))


@contextmanager
def _released(lock: Any) -> Iterator[None]:
    """Give a lock up, however often this thread holds it, as threading.Condition does."""
    state = lock._release_save()
    try:
        yield
    finally:
        lock._acquire_restore(state)

"""Every error that farpoint raises. `docs/errors.md` says of each when, and what to do.

The message of each is built from its attributes, which are the arguments of its class, and says what was asked, what exists and
what to type next::

    FarpointError
    ├── PointerError (RuntimeError)         a pointer cannot be used like that
    │   ├── PointerSpentError                 its reference was given up: by get, move, free
    │   ├── NotColocatedError                 the operands of one operation live in different places
    │   ├── ResizedOutputError (ValueError)   out= would have to be laid out in another way
    │   ├── ValueNotHereError                 bool(p), p.item(), numpy.asarray(p): the value is elsewhere
    │   └── ForkedPointerError                the pointer was made before this process was forked
    ├── PlanError (RuntimeError)            a function cannot be a plan, or is not the one that was recorded
    ├── ObjectNotFoundError (LookupError)   a worker has no such object, or you hold no reference to it
    ├── WorkerNotFoundError (LookupError)   nobody of that name is known
    ├── WorkerLostError (ConnectionError)   the worker, or the way to it, is gone
    │   └── WorkerRestartedError              it is back, and has forgotten
    ├── RemoteExecutionError (RuntimeError) an operation failed on its worker
    ├── ExecutorCrashedError (RuntimeError) it ended the process that ran it
    ├── OperationTimeoutError (TimeoutError)  it took longer than its worker allows
    ├── PermissionDeniedError (PermissionError)
    │   ├── OperationNotAllowedError          the operation is outside the worker's table
    │   └── GetNotPermittedError              the worker's policy keeps the value
    ├── CapabilityError (PermissionError)   a capability is forged, late, used already, or for something else
    ├── InvalidNameError (ValueError)       a worker id, a tag or a search that is none
    ├── InsecureListenerError (ValueError)  a worker would let strangers in, or speak in the clear where they listen
    ├── EncodeError (ValueError)            a value that cannot travel
    ├── DecodeError (ValueError)            bytes that are not what a peer of ours writes
    │   └── LimitError                        ... or more of them than is allowed
    ├── QuotaError (RuntimeError)           a worker keeps as much for you as it is willing to
    ├── ProtocolError (RuntimeError)        the peer broke the protocol
    │   ├── MalformedMessageError             a message is not what its kind declares
    │   ├── RefusedError                      a worker does not begin a session with us, and says why
    │   └── StaleIncarnationError             it speaks to an earlier life of this process
    ├── TransportError (ConnectionError)    a link could not be made, or broke
    │   ├── NobodyListensError                nobody listens where it was to lead
    │   ├── NotAdmittedError                  the token is missing or wrong
    │   └── UnreachableError                  a worker does not reach another one
    ├── SynchronizationTimeoutError (TimeoutError)  nothing arrived for too long
    └── PluginError (RuntimeError)          a plugin is missing, broken or clashes with another

    UnseenErrorWarning (UserWarning)        errors that nobody looked at before their worker was closed

None of them derives from `TypeError`: torch turns a `TypeError` raised below an arithmetic dunder into
`NotImplemented`, and `p == 1` would quietly be `False`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class FarpointError(Exception):
    """Base of all errors of farpoint.

    They survive pickling and copying, which lose the arguments of other exceptions that take more than one.

    Attributes:
        origin: Name of the worker that raised it; empty if this process did.
        line: File and line that issued what failed there, where known.
    """

    origin: str = ""
    line: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[FarpointError], args: tuple[Any, ...], attributes: dict[str, Any]) -> FarpointError:
    """Return an error as it was, without building its message again."""
    error = kind.__new__(kind)
    BaseException.__init__(error, *args)
    error.__dict__.update(attributes)
    return error


class PointerError(FarpointError, RuntimeError):
    """A pointer cannot be used in the way that was tried."""


class PointerSpentError(PointerError):
    """The pointer has given its reference up.

    Attributes:
        pointer: How the pointer printed while it was alive.
        how: The call that spent it (`get`, `move`, `free` ...).
        where: File and line of that call.
    """

    def __init__(self, pointer: str, how: str, where: str) -> None:
        self.pointer = pointer
        self.how = how
        self.where = where
        keep = " Use get(keep=True) to copy the value and keep the pointer." if how == "get" else ""
        super().__init__(
            f"this pointer is spent: {pointer} was given up by {how}() at {where}. "
            f"Use what {how}() returned, or send the tensor again.{keep}"
        )


class NotColocatedError(PointerError):
    """The operands of one operation live in different places.

    Attributes:
        operation: What was called.
        first: Where the first operand is.
        second: Where the operand is that does not match.
        fix: The call that would bring them together.
    """

    def __init__(self, operation: str, first: str, second: str, fix: str) -> None:
        self.operation = operation
        self.first = first
        self.second = second
        self.fix = fix
        super().__init__(
            f"{operation}: one operand is {first}, another is {second}. "
            f"Operands of one operation must be reached by the same way on the same worker: {fix}."
        )


class ResizedOutputError(PointerError, ValueError):
    """The pointer given as `out=` would have to be laid out in another way than it is, which torch does on the way.

    Attributes:
        call: The operator.
        given: The shape of `out=`.
        wanted: The shape of the result.
    """

    def __init__(self, call: str, given: str, wanted: str) -> None:
        self.call = call
        self.given = given
        self.wanted = wanted
        super().__init__(
            f"{call}: out= has the shape {given}, and torch would give it the shape {wanted}, with strides of the operands. "
            f"Pass torch.empty({wanted}).send(worker), or leave out= away and use what is returned"
        )


class ValueNotHereError(PointerError):
    """Something asked for the value of a pointer without `get`.

    Attributes:
        request: What was asked.
        worker: Where the value is.
    """

    def __init__(self, request: str, worker: str) -> None:
        self.request = request
        self.worker = worker
        super().__init__(
            f"{request} needs the value of a pointer, and the value is on {worker}. "
            "Bring it here first, with p.get(), or p.get(keep=True) to leave it there as well; "
            "farpoint.allow_scalars() lets code of others read single numbers."
        )


class ForkedPointerError(PointerError):
    """A pointer was used in a process that was forked after the pointer was made.

    Attributes:
        pointer: How the pointer prints.
    """

    def __init__(self, pointer: str) -> None:
        self.pointer = pointer
        super().__init__(
            f"{pointer} belongs to the process that made it, and this is a forked child: both would speak over one "
            "session. Connect in the child, or load data with num_workers=0."
        )


class PlanError(FarpointError, RuntimeError):
    """A function cannot be carried out as a plan, or does something else than what was recorded.

    Attributes:
        plan: Name of the function.
        reason: What it does.
        where: File and line that does it, where known.
        fix: What to do about it.
    """

    def __init__(self, plan: str, reason: str, where: str, fix: str) -> None:
        self.plan = plan
        self.reason = reason
        self.where = where
        self.fix = fix
        at = f" at {where}" if where else ""
        super().__init__(f"the plan {plan} {reason}{at}: {fix}.")


class ObjectNotFoundError(FarpointError, LookupError):
    """A worker has no such object, or the asker holds no reference to it.

    Attributes:
        object_id: The id that was asked for.
        worker: Who was asked.
        reason: Why it is not there, where that is known.
    """

    def __init__(self, object_id: int, worker: str, reason: str = "") -> None:
        self.object_id = object_id
        self.worker = worker
        self.reason = reason
        super().__init__(
            f"{worker} has no object {object_id} that you hold a reference to{': ' + reason if reason else ''}. "
            f"It may have been freed, or cleared by clear_objects(). {worker}.search('#tag') finds what is there."
        )


class WorkerNotFoundError(FarpointError, LookupError):
    """Nobody of that name is known here.

    Attributes:
        name: The name that was asked for.
        known: The names that exist.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(sorted(known))
        exists = ", ".join(self.known) or "none"
        super().__init__(
            f"no worker {name!r} is known here (known: {exists}). "
            f"Make one with farpoint.VirtualWorker(id={name!r}), or reach one with farpoint.RemoteWorker({name!r}, url)."
        )


class WorkerLostError(FarpointError, ConnectionError):
    """The worker, or the way to it, is gone.

    Attributes:
        worker: Who is gone.
        cause: What was noticed.
        route: The workers on the way to the data, for a pointer that leads over several.
    """

    def __init__(self, worker: str, cause: str, route: Sequence[str] = ()) -> None:
        self.worker = worker
        self.cause = cause
        self.route = tuple(route)
        if len(self.route) > 1 and worker in self.route[:-1]:
            way = f", on the way {' -> '.join(('me', *self.route))}"
            fix = "p.bypass() goes past it, if this process knows how; else connect again, and send the data again."
        else:
            way, fix = "", "Pointers to it are lost: connect again, and send the data again."
        super().__init__(f"{worker} cannot be reached any more{way}: {cause}. {fix}")


class WorkerRestartedError(WorkerLostError):
    """The worker answers again, and it is another life of it, without our objects."""


class RemoteExecutionError(FarpointError, RuntimeError):
    """An operation failed on the worker that ran it.

    Attributes:
        worker: Who ran it.
        operation: The operator, like `aten::inverse`.
        error: Class name of the error over there.
        text: Its text.
        line: File and line that issued the operation, where known.
        remote_traceback: The traceback over there, if the worker's policy exposes it.
    """

    def __init__(
        self, worker: str, operation: str, error: str, text: str, line: str = "", remote_traceback: str = ""
    ) -> None:
        self.worker = worker
        self.operation = operation
        self.error = error
        self.text = text
        self.line = line
        self.remote_traceback = remote_traceback
        issued = f"{line}: " if line else ""
        behind = f"\n\nThe traceback on {worker}:\n{remote_traceback}" if remote_traceback else ""
        super().__init__(
            f"{issued}{operation} failed on {worker}: {error}: {text}\n"
            "Its results, and whatever was computed from them, carry this error: "
            f"correct that call, and compute them again.{behind}"
        )


class ExecutorCrashedError(FarpointError, RuntimeError):
    """An operation ended the process that a worker had run it in. Objects are still there, and the next operation gets a new process.

    Attributes:
        worker: Who ran it.
        operation: The operator, like `aten::mm.default`.
        cause: How the process ended.
    """

    def __init__(self, worker: str, operation: str, cause: str) -> None:
        self.worker = worker
        self.operation = operation
        self.cause = cause
        super().__init__(
            f"{operation} was not finished: the process that {worker} runs your operations in is gone: {cause}. Your objects are "
            "still there, but what it should have written in place may be half written. Try again; "
            "if it happens again, get() the operands and compute here, and report it."
        )


class OperationTimeoutError(FarpointError, TimeoutError):
    """An operation took longer than its worker allows, and was ended. Objects are still there.

    Attributes:
        worker: Who ran it.
        operation: The operator, like `aten::mm.default`.
        seconds: How long it was given.
    """

    def __init__(self, worker: str, operation: str, seconds: float) -> None:
        self.worker = worker
        self.operation = operation
        self.seconds = seconds
        super().__init__(
            f"{operation} was ended on {worker} after {seconds:g} s. Your objects are still there, but what it should have written "
            f"in place may be half written. Compute in smaller steps, or let whoever runs {worker} raise Limits(operation_seconds=...)"
        )


class PermissionDeniedError(FarpointError, PermissionError):
    """A worker refused. Nothing has happened there.

    Attributes:
        worker: Who refused.
        action: What was asked.
        reason: Why not.
    """

    advice = "Ask whoever runs {worker} to permit it."

    def __init__(self, worker: str, action: str, reason: str) -> None:
        self.worker = worker
        self.action = action
        self.reason = reason
        super().__init__(
            f"{worker} does not permit {action}: {reason}. Nothing has happened there. {self.advice.format(worker=worker)}"
        )


class OperationNotAllowedError(PermissionDeniedError):
    """The operation is outside the table of what a worker executes."""

    advice = "Write it with operations of the table, or get() the operands and compute here."


class GetNotPermittedError(PermissionDeniedError):
    """The worker's policy keeps the value where it is."""

    advice = "Ask whoever runs {worker} to permit it, or get() a result that may leave."


class CapabilityError(FarpointError, PermissionError):
    """What was shown to a worker does not allow what was asked.

    Attributes:
        worker: Who refuses.
        reason: What is wrong with it.
    """

    def __init__(self, worker: str, reason: str) -> None:
        self.worker = worker
        self.reason = reason
        super().__init__(f"{worker} does not accept the capability: {reason}. Repeat the call, p.send(...) or p.move(...): a new one is made for it.")


class InvalidNameError(FarpointError, ValueError):
    """A worker id, a tag, a description or a search is not what it must be.

    Attributes:
        kind: `worker id`, `tag`, `tags`, `description` or `search`.
        name: What was given.
        reason: What is wrong with it, and what would be right.
    """

    def __init__(self, kind: str, name: str, reason: str) -> None:
        self.kind = kind
        self.name = name
        self.reason = reason
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        super().__init__(f"{shown!r} cannot be a {kind}: use {reason}.")


class InsecureListenerError(FarpointError, ValueError):
    """A worker would let strangers in, or speak in the clear where they can listen, or its files for TLS are not what they must be.

    It does not start, and who should dial with such files does not dial.

    Attributes:
        place: Where it was to listen, or the file that is wrong.
        reason: What is wrong with that.
        fix: What to type.
    """

    def __init__(self, place: str, reason: str, fix: str) -> None:
        self.place = place
        self.reason = reason
        self.fix = fix
        super().__init__(f"{place}: {reason}. What to do: {fix}.")


class EncodeError(FarpointError, ValueError):
    """A value cannot travel.

    Attributes:
        reason: Why not.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}. Convert it first: plain data and dense CPU tensors travel.")


class DecodeError(FarpointError, ValueError):
    """Bytes are not what a peer of ours writes.

    Attributes:
        reason: What was found.
    """

    advice = "The other side is not farpoint, or another version of it: compare `farpoint --version` on both sides."

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}. {self.advice}")


class LimitError(DecodeError):
    """What arrived exceeds a limit.

    Attributes:
        limit: Name of the limit, an attribute of `farpoint.limits.Limits`.
        allowed: Its value.
        found: What arrived.
    """

    def __init__(self, limit: str, allowed: int, found: int | str) -> None:
        self.limit = limit
        self.allowed = allowed
        self.found = found
        self.advice = f"Send less at once, or let the receiver raise it with Limits({limit}=...)."
        super().__init__(f"{found} exceeds the limit {limit}={allowed}")


class QuotaError(FarpointError, RuntimeError):
    """A worker keeps as much for this client as it is willing to. Nothing that it keeps is lost.

    Attributes:
        worker: Who refused.
        limit: Name of the limit, an attribute of `farpoint.limits.Limits`.
        allowed: Its value.
        found: What it would have come to.
    """

    def __init__(self, worker: str, limit: str, allowed: int, found: str) -> None:
        self.worker = worker
        self.limit = limit
        self.allowed = allowed
        self.found = found
        super().__init__(
            f"{worker} refuses {found}: its limit is {limit}={allowed} for each client. Nothing was lost. Give up what is no "
            f"longer needed (del p, p.free() or p.get()) and try again, or let whoever runs {worker} raise Limits({limit}=...)"
        )


class ProtocolError(FarpointError, RuntimeError):
    """The peer broke the protocol.

    Attributes:
        reason: What it said, and what it should have.
    """

    advice = "Compare `farpoint --version` on both sides; if they agree, this is a bug: please report it."

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}. {self.advice}")


class MalformedMessageError(ProtocolError):
    """A message is not what its kind declares. A link that carries too many of them is closed.

    Attributes:
        kind: The message, like `PUT`.
        field: What of it is wrong.
        wanted: What belongs there.
        found: What was there.
    """

    def __init__(self, kind: str, field: str, wanted: str, found: str) -> None:
        self.kind = kind
        self.field = field
        self.wanted = wanted
        self.found = found
        super().__init__(f"{kind}: {field} must be {wanted}, and {found} was sent")


class RefusedError(ProtocolError):
    """A worker does not begin a session with us: it has too many, or shares no serializer or version of the protocol with us.

    Attributes:
        worker: Who refuses: its name, or its URL if that is not known.
        reason: What it says.
    """

    advice = "Ask whoever runs it if that is not your mistake; `farpoint --version` on both sides shows whether it is one of versions."

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(f"{worker} refused us: {reason}")
        self.worker = worker
        self.reason = reason


class StaleIncarnationError(ProtocolError):
    """A message is meant for an earlier life of this process, and was dropped."""

    advice = "Connect again, and send the data again."


class TransportError(FarpointError, ConnectionError):
    """A link could not be made, or broke.

    Attributes:
        url: Where the link leads.
        cause: What went wrong.
        fix: What to do about it.
    """

    def __init__(self, url: str, cause: str, fix: str = "repeat the call once the other side can be reached") -> None:
        self.url = url
        self.cause = cause
        self.fix = fix
        super().__init__(f"{url}: {cause}; {fix}.")


class NobodyListensError(TransportError):
    """Nobody listens where a link was to lead: the worker is not running, or runs elsewhere."""


class NotAdmittedError(TransportError):
    """Somebody listens, and does not let us in: the token is missing, wrong, or no good any more."""


class UnreachableError(TransportError):
    """A worker cannot reach another one to which it was handed a pointer, or should move data.

    Attributes:
        url: The address that was tried.
        cause: What went wrong.
        fix: What to do about it.
        by: Who tried.
        worker: Who should have been there.
    """

    def __init__(self, url: str, cause: str, fix: str, by: str, worker: str) -> None:
        super().__init__(url, cause, fix)
        self.by = by
        self.worker = worker
        self.args = (f"{by} cannot reach {worker} at {url}: {cause}; {fix}.",)


class SynchronizationTimeoutError(FarpointError, TimeoutError):
    """Nothing arrived from a worker for too long.

    Attributes:
        worker: Who is silent.
        seconds: How long was waited without progress.
        cause: Why, as far as it is known.
    """

    def __init__(self, worker: str, seconds: float, cause: str = "") -> None:
        self.worker = worker
        self.seconds = seconds
        self.cause = cause
        why = f" ({cause})" if cause else ""
        super().__init__(
            f"{worker} made no progress for {seconds:g} s{why}. Nothing was given up: the same call may be repeated."
        )


class PluginError(FarpointError, RuntimeError):
    """A plugin is missing, broken, or clashes with another.

    Attributes:
        kind: `transport`, `serializer`, `store` ... or `plugin`.
        name: The name that was asked for.
        reason: What is wrong.
        available: The names that exist.
        fix: What to type.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        reason: str,
        available: Sequence[str] = (),
        fix: str = "`farpoint plugins` lists what is installed, and what is broken",
    ) -> None:
        self.kind = kind
        self.name = name
        self.reason = reason
        self.available = tuple(available)
        self.fix = fix
        exists = f" Available: {', '.join(self.available)}." if self.available else ""
        super().__init__(f"{kind} {name!r}: {reason}.{exists} What to do: {fix}.")


class UnseenErrorWarning(UserWarning):
    """Operations have failed on a worker, and nobody looked at their results before it was closed.

    Raised as a warning by `worker.close()`, or when the process ends; each error is reported once.
    """

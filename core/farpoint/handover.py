"""Sending, fetching and moving: the calls by which tensors and pointers change hands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from farpoint import gate
from farpoint.catalogue import note_of, write_note
from farpoint.channel import BATCH, LARGE
from farpoint.crossing import cross, is_recorded
from farpoint.errors import FarpointError, MalformedMessageError, PointerError, WorkerLostError
from farpoint.names import check_note
from farpoint.pointer import Beyond, PointerTensor, spend
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import brief
from farpoint.provenance import caller
from farpoint.relay import relay as pass_on
from farpoint.remote import RemoteWorker, me, resolve
from farpoint.route import SPENT, route_of
from farpoint.spec import spec_of
from farpoint.tensors import dense
from farpoint.worker import Worker

if TYPE_CHECKING:
    from farpoint.answers import Reply
    from farpoint.references import Reference


def send(tensor: torch.Tensor, worker: RemoteWorker | str, *, requires_grad: bool | None = None) -> PointerTensor:
    """Send a copy of a tensor, or of a pointer, to a worker, and return a pointer to it.

    Args:
        tensor: Values, dtype, `requires_grad`, `.grad` and tags are copied. The tensor stays usable, and later
            changes to it are not seen by the worker. Of a pointer the reference is copied; it stays valid.
        worker: Who gets it, as a handle or by name.
        requires_grad: Whether the pointer requires a gradient. If not given it is a fresh leaf that does as the tensor. With True it
            stays in the tensor's graph, if that has one: gradients come back.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
        EncodeError: The tensor is of a kind that cannot travel.
    """
    target = resolve(worker)
    if requires_grad and is_recorded(tensor):
        return cross(tensor, lambda value: _send(value, target, False), lambda grad: get(grad, keep=True))  # type: ignore[no-any-return]
    return _send(tensor, target, tensor.requires_grad if requires_grad is None else requires_grad)


def _send(tensor: torch.Tensor, target: RemoteWorker, wants_grad: bool) -> PointerTensor:
    peer = target.peer
    note = note_of(tensor)
    about = [sorted(note.tags), note.description]
    if isinstance(tensor, PointerTensor):
        reference = _reachable(tensor)
        # A pointer leaves only when what it points at is known to exist.
        tensor._route.synchronize()
        through = reference.peer
        object_id = peer.references.new_id()
        capability = through.terms.give(object=reference.id, operation="hold", audience=peer.incarnation.hex())
        peer.ask(
            [int(Kind.LINK), object_id, through.name, through.terms.advertised, reference.id, tensor._spec.to_wire(), *about, capability],
            keep=reference,
        )
        if peer.channel.session.waiting >= BATCH:
            peer.flush()
        route, spec = route_of(peer, *tensor._route.workers), tensor._spec
    else:
        plain = dense(tensor)
        if plain.data_ptr() == tensor.data_ptr() and plain.numel() * plain.itemsize < LARGE:
            plain = plain.clone()
        route, spec = route_of(peer), spec_of(plain)
        route.order()
        object_id = peer.references.new_id()
        nbytes = plain.numel() * plain.itemsize
        if nbytes >= LARGE and not peer.channel.inline:
            peer.upload([int(Kind.PUT), object_id, None, bool(wants_grad), *about], 2, plain, caller())
        else:
            peer.tell([int(Kind.PUT), object_id, plain, bool(wants_grad), *about], caller(), nbytes)
            if nbytes >= LARGE:
                peer.flush()
    pointer = PointerTensor.wrap(route, peer.references.refer(object_id), spec, bool(wants_grad))
    if isinstance(tensor, PointerTensor):
        pointer._beyond = Beyond(through.name, through.url, reference.id, tensor._beyond)
    write_note(pointer, note)
    grad = gradient_of(tensor)
    if grad is not None:
        pointer.grad = send(grad, target)
    return pointer


def place(tensor: torch.Tensor, workers: Sequence[str]) -> torch.Tensor:
    """Return a copy of a tensor at the end of a chain, in the graph of the tensor.

    Args:
        tensor: It, local.
        workers: Those of the chain, the data's worker last.
    """
    for worker in reversed(workers):
        tensor = send(tensor, worker, requires_grad=tensor.requires_grad)
    return tensor


def _reachable(pointer: PointerTensor) -> Reference:
    """Return the reference of a pointer that is neither spent nor lost: a new worker may have the name of the old one."""
    reference = gate.check_live(pointer)
    if reference.peer.channel.lost is not None:
        raise reference.peer.channel.ended()
    return reference


def get(pointer: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
    """Bring what a pointer points at here: the tensor, or the pointer that is there.

    Args:
        pointer: It is spent afterwards. A tensor that is here is returned as it is.
        keep: Copy instead, and leave the pointer valid.

    Returns:
        It stays in the pointer's graph: gradients go back to the worker. Only of a leaf that is spent it is a leaf itself.

    Raises:
        PointerSpentError: It was spent before.
        GetNotPermittedError: The worker's policy keeps the value.
        FarpointError: The first error of what led to it.
    """
    if not isinstance(pointer, PointerTensor):
        return pointer
    gate.check_live(pointer)
    if is_recorded(pointer) and (keep or not pointer.is_leaf):
        worker = pointer._route.workers[0]
        return cross(pointer, lambda value: _get(value, keep, False), lambda grad: place(grad, [worker]))  # type: ignore[no-any-return]
    return _get(pointer, keep, bool(pointer.requires_grad and pointer.is_leaf))


def fetch(pointer: PointerTensor) -> torch.Tensor:
    """Return what a pointer points at, as `get` does, with the gradient, as a leaf; the pointer stays valid."""
    return _get(pointer, True, bool(pointer.requires_grad))


def ask(pointer: PointerTensor) -> Reply:
    """Ask for what a pointer points at, for `receive`, and do not wait for it."""
    reference = gate.check_live(pointer)
    pointer._route.order()
    reply = reference.peer.ask([int(Kind.FETCH), reference.id], keep=reference)
    reference.peer.flush()
    return reply


def _get(pointer: PointerTensor, keep: bool, wants_grad: bool) -> torch.Tensor:
    result = receive(pointer, ask(pointer), keep, wants_grad)
    if not keep:
        peer = pointer._route.peer
        spend(pointer, "get")
        peer.flush()
    return result


def receive(pointer: PointerTensor, reply: Reply, keep: bool, wants_grad: bool) -> torch.Tensor:
    """Wait for what `ask` has asked for, and return it; the pointer stays valid.

    Args:
        pointer: What was asked about.
        reply: What `ask` has returned.
        keep: Whether its gradient, which comes along, stays valid too.
        wants_grad: Whether the result is a leaf that requires a gradient.
    """
    peer, workers = gate.check_live(pointer).peer, pointer._route.workers
    answer = peer.download(reply, pointer.nbytes)
    peer.answers.raise_orphan()
    grad = gradient_of(pointer) if wants_grad or not pointer.requires_grad else None
    result: torch.Tensor
    if answer[0] == "pointer":
        _, name, url, target, _, tags, description, capability = answer
        note = check_note(tags, description)
        through = me().introduce(name, url, capability)
        route = route_of(through, *workers[2:])
        # The reference to the pointer over there pins its target until we are listed as a holder ourselves. If we are not, nothing
        # has changed.
        claimed = through.references.refer(target, claimed=True)
        through.request([int(Kind.CLAIM), target, capability])
        result = PointerTensor.wrap(route, claimed, pointer._spec, wants_grad)
        result._beyond = pointer._beyond and pointer._beyond.further
        route.order()
    else:
        _, value, _, tags, description = answer
        note = check_note(tags, description)
        # The shape may be another one than this pointer knows, after `t_()` through another pointer to the object.
        if value.dtype != pointer._spec.dtype:
            wanted = f"a tensor of {pointer._spec.dtype}"
            raise peer.broke(MalformedMessageError("ANSWER to FETCH", "it", wanted, f"one of {value.dtype}"))
        result = _restride(value, pointer._spec).requires_grad_(wants_grad)
        if grad is not None:
            fetched = get(grad, keep=keep)
            if fetched.shape != result.shape:
                raise peer.broke(MalformedMessageError("ANSWER to FETCH", "the gradient", brief(result), brief(fetched)))
            result.grad = fetched
    write_note(result, note)
    return result


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient that goes with a tensor: not one that `p.grad.get()` has brought home already."""
    grad = tensor.grad if tensor.is_leaf else None
    return None if isinstance(grad, PointerTensor) and grad._route is SPENT else grad


def _restride(value: torch.Tensor, spec: Any) -> torch.Tensor:
    # A dense but permuted layout (a transpose, channels_last) comes back as it was; a view with gaps comes back compact.
    if value.shape != spec.shape or value.stride() == spec.stride or value.numel() < 2:
        return value
    order = sorted(range(value.ndim), key=lambda d: (-spec.stride[d], d))
    expected = 1
    for dim in reversed(order):
        if spec.shape[dim] != 1 and spec.stride[dim] != expected:
            return value
        expected *= spec.shape[dim]
    return value.new_empty(0).new_empty_strided(spec.shape, spec.stride).copy_(value)


def move(pointer: torch.Tensor, worker: RemoteWorker | Worker | str, *, relay: bool = False) -> torch.Tensor:
    """Move the data at the end of a chain to a worker, straight from where it is.

    The call returns when the worker has it. The pointer is spent, unless the data was there already.

    Args:
        pointer: What shall move.
        worker: Where to.
        relay: Whether the data comes by way of this process, a few chunks at a time, for two workers that do not reach each
            other. This takes a pointer straight to the data, and the right to `get` it.

    Raises:
        PointerError: `relay` is given, and the pointer is a chain.
        WorkerNotFoundError: Nobody of that name is known.
        FarpointError: It could not be moved; then it is where it was, and the pointer is valid.
    """
    if worker == "me" or isinstance(worker, Worker):
        return _bring_home(pointer)
    target = resolve(worker)
    if not isinstance(pointer, PointerTensor):
        return send(pointer, target)
    reference = _reachable(pointer)
    route, workers = pointer._route, pointer._route.workers
    if workers[-1] == target.id:
        return pointer
    if is_recorded(pointer) and not pointer.is_leaf:
        return _cross(pointer, lambda value: move(value, target, relay=relay))
    if len(workers) > 1 and workers[-2] == target.id:
        return _shorten(pointer, "move")
    route.order()
    if len(workers) > 1:
        if relay:
            raise PointerError("relay=True moves what a pointer points at directly, and this is a chain; p.get() one hop first")
        message = [len(workers) - 1, target.id, target.peer.terms.advertised, 0, 0, False, target.peer.terms.give(operation="dial")]
        return _replace(pointer, message, (*workers[:-1], target.id), "move")
    new_id = target.peer.references.new_id()
    arrived = target.peer.references.refer(new_id)
    if relay:
        pass_on(reference, target.peer, new_id, bool(pointer.requires_grad and pointer.is_leaf), note_of(pointer))
        return _moved(pointer, target, arrived, relay=True)
    request = [int(Kind.MOVE), reference.id, 0, target.id, target.peer.terms.advertised, new_id, target.peer.session_id, False]
    request.append(target.peer.terms.give(object=new_id, operation="move", audience=reference.peer.incarnation.hex()))
    target.peer.flush()
    try:
        reference.peer.request(request)
    except WorkerLostError:
        # Whether it had left before its worker died, only the destination knows.
        if not _arrived(arrived):
            raise
    return _moved(pointer, target, arrived, relay=False)


def _moved(pointer: PointerTensor, target: RemoteWorker, arrived: Reference, *, relay: bool) -> PointerTensor:
    moved = PointerTensor.wrap(route_of(target.peer), arrived, pointer._spec, pointer.requires_grad and pointer.is_leaf)
    write_note(moved, note_of(pointer))
    grad = gradient_of(pointer)
    if grad is not None:
        moved.grad = move(grad, target, relay=relay)
    spend(pointer, "move")
    return moved


def _arrived(arrived: Reference) -> bool:
    try:
        arrived.peer.request([int(Kind.LOCATE), arrived.id])
    except FarpointError:
        return False
    return True


def remote_get(pointer: PointerTensor) -> torch.Tensor:
    """Make a chain one hop shorter at its data end: the worker before it takes the data.

    On a pointer of one hop this is `get`.
    """
    gate.check_live(pointer)
    if len(pointer._route.workers) == 1:
        return get(pointer)
    if is_recorded(pointer) and not pointer.is_leaf:
        return _cross(pointer, remote_get)
    return _shorten(pointer, "remote_get")


def _cross(pointer: PointerTensor, call: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Move the data of a pointer within its graph. Its gradients are moved to where it was."""
    before = pointer._route.workers

    def back(grad: Any) -> torch.Tensor:
        copy = grad.clone()  # for others may have the same gradient
        now = grad._route.workers
        if len(before) > len(now):
            return remote_send(copy, before[-1])
        return remote_get(copy) if len(before) < len(now) else move(copy, before[-1])

    return cross(pointer, call, back)  # type: ignore[no-any-return]


def remote_send(pointer: PointerTensor, worker: RemoteWorker | str) -> PointerTensor:
    """Make a chain one hop longer at its data end: the data goes on, and a pointer to it stays.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
    """
    target = resolve(worker)
    gate.check_live(pointer)
    if is_recorded(pointer) and not pointer.is_leaf:
        return _cross(pointer, lambda value: remote_send(value, target))  # type: ignore[return-value]  # a pointer stays one
    workers = pointer._route.workers
    message = [len(workers) - 1, target.id, target.peer.terms.advertised, 0, 0, True, target.peer.terms.give(operation="dial")]
    return _replace(pointer, message, (*workers, target.id), "remote_send")


def bypass(pointer: PointerTensor) -> PointerTensor:
    """Leave the first worker of a chain out, and every one after it that is lost: take the way straight to the next.

    What a lost worker held elsewhere is kept there while its lease runs, and then in quarantine (`kept_seconds`). This process
    knows where that is if it has sent the pointer there itself; of what was computed by way of a chain it does not.

    Args:
        pointer: A chain. It is spent afterwards.

    Raises:
        PointerError: It is no chain, or one whose further way is not known.
        ObjectNotFoundError: The next worker does not have the object any more.
        WorkerLostError: No worker of the chain can be reached.
    """
    gate.check_live(pointer)
    workers, beyond = pointer._route.workers[1:], pointer._beyond
    if not workers:
        raise PointerError("p.bypass() leaves the first worker of a chain out, and this pointer leads straight to its data")
    if beyond is None:
        raise PointerError(f"it is not known here where on {workers[0]} this chain goes on: {workers[0]} was asked for it by another worker")
    while True:
        try:
            peer = me().introduce(beyond.worker, beyond.url)
            claimed = peer.references.refer(beyond.target, claimed=True)
            peer.request([int(Kind.CLAIM), beyond.target, ""])
            break
        except ConnectionError:  # of ours: the worker, or the way to it, is gone
            if beyond.further is None:
                raise
            workers, beyond = workers[1:], beyond.further
    route = route_of(peer, *workers[1:])
    found = PointerTensor.wrap(route, claimed, pointer._spec, bool(pointer.requires_grad and pointer.is_leaf))
    found._beyond = beyond.further
    write_note(found, note_of(pointer))
    spend(pointer, "bypass")
    return found


def _shorten(pointer: PointerTensor, how: str) -> PointerTensor:
    workers = pointer._route.workers
    message = [len(workers) - 1, workers[-2], "", 0, 0, False, ""]
    return _replace(pointer, message, workers[:-1], how)


def _replace(pointer: PointerTensor, message: list[Any], workers: tuple[str, ...], how: str) -> PointerTensor:
    """Change the chain beyond its first hop: the object there keeps its id."""
    reference = gate.check_live(pointer)
    pointer._route.order()
    reference.peer.request([int(Kind.MOVE), reference.id, *message])
    route = route_of(reference.peer, *workers[1:])
    changed = PointerTensor.wrap(route, reference, pointer._spec, pointer.requires_grad and pointer.is_leaf)
    write_note(changed, note_of(pointer))
    route.order()
    spend(pointer, how)
    return changed


def _bring_home(pointer: torch.Tensor) -> torch.Tensor:
    while isinstance(pointer, PointerTensor):
        pointer = get(pointer)
    return pointer

"""Sending, fetching and moving: the calls by which tensors and pointers change hands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch

from farpoint import gate
from farpoint.channel import LARGE
from farpoint.errors import MalformedMessageError, PointerError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.pointer import PointerTensor, spend
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import NAME, brief
from farpoint.provenance import caller
from farpoint.remote import RemoteWorker, me, resolve
from farpoint.route import route_of
from farpoint.spec import spec_from_wire, spec_of
from farpoint.store import NO_ANNOTATION, Annotation
from farpoint.tensors import dense
from farpoint.worker import Worker

_NOTES = "_farpoint_annotation"


def note_of(tensor: torch.Tensor) -> Annotation:
    """Return the tags and the description of a tensor or pointer."""
    note: Annotation = tensor.__dict__.get(_NOTES, NO_ANNOTATION)
    return note


def annotate(
    tensor: Any, tags: Iterable[str] | None = None, description: str | None = None
) -> Any:
    """Write tags or a description on a tensor, which travel with it, or on the object of a pointer.

    Raises:
        ValueError: A tag is none that travels, or there are too many, or the description is too long.
    """
    note = note_of(tensor)
    if tags is not None:
        chosen = frozenset(tags)
        for tag in chosen:
            if not NAME.holds(tag) or not tag.startswith("#") or len(tag) > DEFAULT_LIMITS.name_chars:
                raise ValueError(
                    f"{tag!r} is no tag: a tag begins with #, has at most {DEFAULT_LIMITS.name_chars} characters, and they are "
                    "of A-Z a-z 0-9 _ . : # -"
                )
        if len(chosen) > DEFAULT_LIMITS.tags:
            raise ValueError(f"these are {len(chosen)} tags: an object has at most {DEFAULT_LIMITS.tags}")
        note = attrs.evolve(note, tags=chosen)
    if description is not None:
        if len(description) > DEFAULT_LIMITS.description_chars:
            raise ValueError(
                f"a description has at most {DEFAULT_LIMITS.description_chars} characters, and this one {len(description)}"
            )
        note = attrs.evolve(note, description=description)
    tensor.__dict__[_NOTES] = note
    if isinstance(tensor, PointerTensor):
        reference = gate.check_live(tensor)
        reference.peer.tell([int(Kind.TAG), reference.id, sorted(note.tags), note.description])
    return tensor


def send(tensor: torch.Tensor, worker: RemoteWorker | str, *, requires_grad: bool | None = None) -> PointerTensor:
    """Send a copy of a tensor, or of a pointer, to a worker, and return a pointer to it.

    Args:
        tensor: Values, dtype, `requires_grad`, `.grad` and tags are copied. The tensor stays usable, and later
            changes to it are not seen by the worker. Of a pointer the reference is copied; it stays valid.
        worker: Who gets it, as a handle or by name.
        requires_grad: Whether the pointer requires a gradient; as the tensor does, if not given.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
        EncodeError: The tensor is of a kind that cannot travel.
    """
    target = resolve(worker)
    peer = target.peer
    wants_grad = tensor.requires_grad if requires_grad is None else requires_grad
    note = note_of(tensor)
    about = [sorted(note.tags), note.description]
    if isinstance(tensor, PointerTensor):
        reference = gate.check_live(tensor)
        # A pointer leaves only when what it points at is known to exist.
        tensor._route.synchronize()
        through = reference.peer
        object_id = peer.new_id()
        peer.ask(
            [int(Kind.LINK), object_id, through.name, through.url, reference.id, tensor._spec.to_wire(), *about],
            keep=reference,
        )
        route, spec = route_of(peer, *tensor._route.workers), tensor._spec
    else:
        plain = dense(tensor)
        if plain.data_ptr() == tensor.data_ptr() and plain.numel() * plain.itemsize < LARGE:
            plain = plain.clone()
        route, spec = route_of(peer), spec_of(plain)
        route.order()
        object_id = peer.new_id()
        peer.tell([int(Kind.PUT), object_id, plain, bool(wants_grad), *about], caller())
        if plain.numel() * plain.itemsize >= LARGE:
            peer.flush()
    pointer = PointerTensor.wrap(route, peer.refer(object_id), spec, bool(wants_grad))
    pointer.__dict__[_NOTES] = note
    if tensor.is_leaf and tensor.grad is not None:
        pointer.grad = send(tensor.grad, target)
    return pointer


def get(pointer: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
    """Bring what a pointer points at here: the tensor, or the pointer that is there.

    Args:
        pointer: It is spent afterwards. A tensor that is here is returned as it is.
        keep: Copy instead, and leave the pointer valid.

    Raises:
        PointerSpentError: It was spent before.
        GetNotPermittedError: The worker's policy keeps the value.
        FarpointError: The first error of what led to it.
    """
    if not isinstance(pointer, PointerTensor):
        return pointer
    reference = gate.check_live(pointer)
    peer, workers = reference.peer, pointer._route.workers
    pointer._route.order()
    answer = peer.request([int(Kind.FETCH), reference.id])
    peer.raise_orphan()
    wants_grad = bool(pointer.requires_grad and pointer.is_leaf)
    grad = pointer.grad if pointer.is_leaf else None
    result: torch.Tensor
    if answer[0] == "pointer":
        _, name, url, target, _, tags, description = answer
        through = me().peer(name, url)
        route = route_of(through, *workers[2:])
        # The reference to the pointer over there pins its target until we are listed as a holder ourselves.
        claimed = through.refer(target, claimed=True)
        through.ask([int(Kind.CLAIM), target], keep=reference)
        result = PointerTensor.wrap(route, claimed, pointer._spec, wants_grad)
        route.order()
    else:
        _, value, _, tags, description = answer
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
    result.__dict__[_NOTES] = Annotation(frozenset(tags), description)
    if not keep:
        del reference
        spend(pointer, "get")
        peer.flush()
    return result


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


def move(pointer: torch.Tensor, worker: RemoteWorker | Worker | str) -> torch.Tensor:
    """Move the data at the end of a chain to a worker, straight from where it is.

    The call returns when the worker has it. The pointer is spent, unless the data was there already.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
        FarpointError: It could not be moved; then it is where it was, and the pointer is valid.
    """
    if worker == "me" or isinstance(worker, Worker):
        return _bring_home(pointer)
    target = resolve(worker)
    if not isinstance(pointer, PointerTensor):
        return send(pointer, target)
    reference = gate.check_live(pointer)
    route, workers = pointer._route, pointer._route.workers
    if workers[-1] == target.id:
        return pointer
    if len(workers) > 1 and workers[-2] == target.id:
        return _shorten(pointer, "move")
    route.order()
    if len(workers) > 1:
        message = [len(workers) - 1, target.id, target.url, 0, 0, False]
        return _replace(pointer, message, (*workers[:-1], target.id), "move")
    new_id = target.peer.new_id()
    arrived = target.peer.refer(new_id)
    request = [int(Kind.MOVE), reference.id, 0, target.id, target.url, new_id, target.peer.session_id, False]
    target.peer.flush()
    reference.peer.request(request)
    moved = PointerTensor.wrap(route_of(target.peer), arrived, pointer._spec, pointer.requires_grad)
    moved.__dict__[_NOTES] = note_of(pointer)
    if pointer.is_leaf and pointer.grad is not None:
        moved.grad = move(pointer.grad, target)
    del reference
    spend(pointer, "move")
    return moved


def remote_get(pointer: PointerTensor) -> torch.Tensor:
    """Make a chain one hop shorter at its data end: the worker before it takes the data.

    On a pointer of one hop this is `get`.
    """
    gate.check_live(pointer)
    return get(pointer) if len(pointer._route.workers) == 1 else _shorten(pointer, "remote_get")


def remote_send(pointer: PointerTensor, worker: RemoteWorker | str) -> PointerTensor:
    """Make a chain one hop longer at its data end: the data goes on, and a pointer to it stays.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
    """
    target = resolve(worker)
    gate.check_live(pointer)
    workers = pointer._route.workers
    message = [len(workers) - 1, target.id, target.url, 0, 0, True]
    return _replace(pointer, message, (*workers, target.id), "remote_send")


def _shorten(pointer: PointerTensor, how: str) -> PointerTensor:
    workers = pointer._route.workers
    message = [len(workers) - 1, workers[-2], "", 0, 0, False]
    return _replace(pointer, message, workers[:-1], how)


def _replace(pointer: PointerTensor, message: list[Any], workers: tuple[str, ...], how: str) -> PointerTensor:
    """Change the chain beyond its first hop: the object there keeps its id."""
    reference = gate.check_live(pointer)
    pointer._route.order()
    reference.peer.request([int(Kind.MOVE), reference.id, *message])
    route = route_of(reference.peer, *workers[1:])
    changed = PointerTensor.wrap(route, reference, pointer._spec, pointer.requires_grad)
    changed.__dict__[_NOTES] = note_of(pointer)
    route.order()
    spend(pointer, how)
    return changed


def _bring_home(pointer: torch.Tensor) -> torch.Tensor:
    while isinstance(pointer, PointerTensor):
        pointer = get(pointer)
    return pointer


def search(worker: RemoteWorker, tags: Iterable[str]) -> list[PointerTensor]:
    """Return pointers to the objects of a worker that carry all of these tags."""
    peer = worker.peer
    found = []
    for object_id in peer.request([int(Kind.SEARCH), list(tags)]):
        reference = peer.refer(object_id, claimed=True)
        try:
            peer.request([int(Kind.CLAIM), object_id])
            (wire,) = peer.request([int(Kind.DESCRIBE), [object_id]])
        except (LookupError, PointerError):
            continue  # it was freed meanwhile
        found.append(PointerTensor.wrap(route_of(peer), reference, spec_from_wire(wire)))
    return found

"""What is written on objects, and finding them by it: tags, descriptions, `search`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from farpoint import gate
from farpoint.errors import FarpointError, ProtocolError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.names import check_description, check_note, check_query, check_tags, check_worker_id
from farpoint.pointer import PointerTensor
from farpoint.protocol.messages import Kind
from farpoint.provenance import caller
from farpoint.route import route_of
from farpoint.spec import spec_from_wire
from farpoint.store import NO_ANNOTATION, Annotation

if TYPE_CHECKING:
    from farpoint.answers import Reply
    from farpoint.peer import Peer
    from farpoint.references import Reference

_NOTE = "_farpoint_annotation"


def note_of(tensor: torch.Tensor) -> Annotation:
    """Return the tags and the description of a tensor or pointer."""
    written = tensor.__dict__.get(_NOTE)
    if written is None:
        return NO_ANNOTATION
    tags, description = written
    return Annotation(frozenset(tags), description)


def write_note(tensor: torch.Tensor, note: Annotation) -> None:
    """Write on a tensor or pointer of this process, and tell nobody.

    It is plain data, and nothing if there is nothing to write: `torch.load` takes what `torch.save` has made of the tensor.
    """
    if note.tags or note.description:
        tensor.__dict__[_NOTE] = [sorted(note.tags), note.description]
    else:
        tensor.__dict__.pop(_NOTE, None)


def annotate(tensor: Any, tags: Iterable[str] | None = None, description: str | None = None) -> Any:
    """Write tags or a description on a tensor, which travel with it, or on the object of a pointer.

    Args:
        tensor: A tensor that is here, or a pointer.
        tags: In place of its present tags; they stay if not given.
        description: In place of its present description; that stays if not given.

    Raises:
        InvalidNameError: A tag does not begin with `#`, or something is too long or too much.
        PointerSpentError: The pointer was spent before.
    """
    note = note_of(tensor)
    if tags is not None:
        note = attrs.evolve(note, tags=check_tags(tags))
    if description is not None:
        note = attrs.evolve(note, description=check_description(description))
    if isinstance(tensor, PointerTensor):
        reference = gate.check_live(tensor)
        # Only what is given is written: another pointer to the object may have written the rest.
        written = [None if tags is None else sorted(note.tags), None if description is None else note.description]
        reference.peer.tell([int(Kind.TAG), reference.id, *written], caller())
    write_note(tensor, note)
    return tensor


def search(peer: Peer, query: Iterable[str]) -> list[PointerTensor]:
    """Return pointers to the objects of a worker that carry all of these tags, and all of these words in their description.

    Each owns a reference of its own, so what it points at stays. What is freed meanwhile, or points at something that is lost, is
    left out.

    Args:
        peer: The session with the worker. It answers with at most `Limits.results` objects.
        query: Tags, which begin with `#`, and words, of which case and punctuation do not matter.

    Raises:
        InvalidNameError: A tag is none, or there is nothing to look for.
        PermissionDeniedError: The worker's policy refuses.
    """
    asked = list(query)
    check_query(asked)
    route_of(peer).order()
    claims: list[tuple[Reference, Reply]] = []
    for object_id in _read_ids(peer.request([int(Kind.SEARCH), asked])):
        # The reference comes first: from now on no release of another pointer to the object is sent.
        reference = peer.references.refer(object_id, claimed=True)
        claims.append((reference, peer.ask([int(Kind.LOCATE), object_id])))
    found = []
    for reference, reply in claims:
        try:
            answer = peer.wait(reply)
        except FarpointError:
            if peer.channel.lost is not None:
                raise
        else:
            found.append(_pointer(reference, answer))
    return found


def _read_ids(answer: Any) -> list[int]:
    if not isinstance(answer, list) or not all(type(item) is int for item in answer):
        raise ProtocolError(f"SEARCH was answered with {str(answer)[:100]}")
    return answer


def _pointer(reference: Reference, answer: Any) -> PointerTensor:
    """Return the pointer for what a worker says of an object and of the way to its data."""
    try:
        wire, workers, requires_grad, tags, description = answer
    except (TypeError, ValueError):
        raise ProtocolError(f"LOCATE was answered with {str(answer)[:100]}") from None
    if not isinstance(workers, list) or not 0 < len(workers) <= DEFAULT_LIMITS.hops:
        raise ProtocolError(f"LOCATE was answered with the way {str(workers)[:100]}")
    spec, note = spec_from_wire(wire), check_note(tags, description)
    route = route_of(reference.peer, *(check_worker_id(name) for name in workers[1:]))
    wants_grad = bool(requires_grad) and (spec.dtype.is_floating_point or spec.dtype.is_complex)
    pointer = PointerTensor.wrap(route, reference, spec, wants_grad)
    write_note(pointer, note)
    return pointer

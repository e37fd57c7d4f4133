"""What a worker tells of its store: every object as plain data, and no values.

An entry is `[id, kind, metadata, requires_grad, tags, description, worker, target id]`. The kind is `tensor`, and then the last two
are empty, or `pointer`; then they say what it points at, and the metadata of the data end may not be known (null).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from farpoint.errors import ProtocolError
from farpoint.names import check_note, check_worker_id
from farpoint.protocol.messages import Kind
from farpoint.spec import TensorSpec, spec_from_wire, spec_of
from farpoint.store import Annotation, ObjectStore
from farpoint.tensors import DTYPE_NAMES

if TYPE_CHECKING:
    from farpoint.peer import Peer

PAGE: Final = 128
"""Entries in one answer: with the longest tags and descriptions they still fit a control frame."""


@attrs.frozen
class ListedTensor:
    """A tensor of another worker: everything but its values.

    Attributes:
        spec: Its metadata, None if it is of a kind that does not travel.
        note: What is written on it.
    """

    spec: TensorSpec | None
    note: Annotation

    def __repr__(self) -> str:
        parts = ["..."]
        if self.spec is not None:
            parts += [f"size={self.spec.shape}", f"dtype={self.spec.dtype}"]
        if self.note.requires_grad:
            parts.append("requires_grad=True")
        if self.note.tags:
            parts.append(f"tags={sorted(self.note.tags)}")
        return f"tensor({', '.join(parts)})"


@attrs.frozen
class ListedPointer:
    """A pointer that another worker stores.

    Attributes:
        owner: Who stores it.
        id: Under which id.
        worker: Where it points.
        target: At which object there.
        spec: Metadata of the tensor at the end of the chain, where known.
        note: What is written on it.
    """

    owner: str
    id: int
    worker: str
    target: int
    spec: TensorSpec | None
    note: Annotation

    def __repr__(self) -> str:
        return f"(Wrapper)>[PointerTensor | {self.owner}:{self.id} -> {self.worker}:{self.target}]"


def list_store(store: ObjectStore, after: Any, hidden: Collection[int] = ()) -> list[list[Any]]:
    """Return the entries of the objects whose ids come next.

    Args:
        store: What to list.
        after: The last id of the page before, 0 for the first page.
        hidden: Ids that are left out.

    Raises:
        ProtocolError: That is no id.
    """
    if type(after) is not int:
        raise ProtocolError("LIST goes on after an object id, or 0")
    entries = []
    for object_id in heapq.nsmallest(PAGE, (known for known in store if known > after and known not in hidden)):
        value, note = store[object_id], store.annotation(object_id)
        about = [note.requires_grad, sorted(note.tags), note.description]
        if isinstance(value, torch.Tensor):
            entries.append([object_id, "tensor", _metadata(value), *about, "", 0])
        else:
            spec = value.spec.to_wire() if value.spec is not None else None
            entries.append([object_id, "pointer", spec, *about, value.reference.peer.name, value.reference.id])
    return entries


def fetch_listing(peer: Peer) -> dict[int, ListedTensor | ListedPointer]:
    """Ask a worker what it stores.

    Raises:
        PermissionDeniedError: Its policy refuses.
        ProtocolError: What it answers is no list of objects.
    """
    found: dict[int, ListedTensor | ListedPointer] = {}
    last = 0
    while True:
        page = peer.request([int(Kind.LIST), last])
        if not isinstance(page, list):
            raise ProtocolError(f"{peer.name} answered LIST with no list")
        for entry in page:
            object_id, listed = _read_entry(entry, peer.name)
            if object_id <= last:
                raise ProtocolError(f"{peer.name} listed its objects out of order")
            last = object_id
            found[object_id] = listed
        if len(page) < PAGE:
            return found


def _metadata(tensor: torch.Tensor) -> list[Any] | None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.dtype not in DTYPE_NAMES:
        return None
    return spec_of(tensor).to_wire()


def _read_entry(entry: Any, owner: str) -> tuple[int, ListedTensor | ListedPointer]:
    try:
        object_id, kind, metadata, requires_grad, tags, description, worker, target = entry
    except (TypeError, ValueError):
        raise ProtocolError(f"{owner} listed an object as {str(entry)[:100]}") from None
    if type(object_id) is not int or type(target) is not int or kind not in ("tensor", "pointer"):
        raise ProtocolError(f"{owner} listed an object as {str(entry)[:100]}")
    spec = None if metadata is None else spec_from_wire(metadata)
    note = check_note(tags, description, requires_grad)
    if kind == "tensor":
        return object_id, ListedTensor(spec, note)
    return object_id, ListedPointer(owner, object_id, check_worker_id(worker), target, spec, note)

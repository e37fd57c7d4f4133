"""What a worker is asked about its objects and itself beside operations: find them, list them, read a piece, write on them, clear, seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from farpoint.errors import MalformedMessageError
from farpoint.listing import list_store
from farpoint.names import check_description, check_query, check_tags, words_of
from farpoint.protocol.messages import Kind
from farpoint.tensors import dense

if TYPE_CHECKING:
    from farpoint.guest import Guest
    from farpoint.worker import Worker


class Queries:
    """The commands of one worker that no other worker has to hear of. They are called as `farpoint.commands.Commands` are.

    Args:
        worker: Whose.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def table(self) -> dict[int, Callable[[Guest, int, list[Any]], object]]:
        """Return what carries each kind of message out."""
        return {
            int(Kind.SEARCH): self._search,
            int(Kind.TAG): self._tag,
            int(Kind.LIST): self._list,
            int(Kind.CLEAR): self._clear,
            int(Kind.READ): self._read,
            int(Kind.SEED): self._seed,
        }

    def _search(self, guest: Guest, number: int, message: list[Any]) -> None:
        tags, words = check_query(message[1])
        self._worker.authorize(guest, "search")
        hidden = self._worker.quarantine.objects()
        notes = ((i, self._worker.store.annotation(i)) for i in self._worker.store if i not in hidden)
        found = [i for i, note in notes if tags <= note.tags and (not words or words <= words_of(note.description))]
        guest.answer(number, found[: self._worker.limits.results])

    def _tag(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, tags, description = message
        self._worker.find(guest, object_id)
        note = self._worker.store.annotation(object_id)
        if tags is not None:
            note = attrs.evolve(note, tags=check_tags(tags))
        if description is not None:
            note = attrs.evolve(note, description=check_description(description))
        self._worker.authorize(guest, "tag", object_id)
        self._worker.store.annotate(object_id, note)

    def _list(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._worker.authorize(guest, "list")
        guest.answer(number, list_store(self._worker.store, message[1], self._worker.quarantine.objects()))

    def _clear(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._worker.authorize(guest, "clear")
        every = list(self._worker.store)
        self._worker.free(every)
        self._worker.holders.forget(every)
        guest.answer(number, True)

    def _read(self, guest: Guest, number: int, message: list[Any]) -> None:
        _, object_id, offset, length = message
        value = self._worker.find(guest, object_id)
        self._worker.authorize(guest, "get", object_id)
        if not isinstance(value, torch.Tensor):
            raise MalformedMessageError("READ", "id", "that of a tensor", "that of a pointer")
        total = value.numel() * value.itemsize
        if offset + length > total:
            raise MalformedMessageError("READ", "offset and length", f"within {total} bytes", f"{offset} and {length}")
        if guest.reading is None or guest.reading[0] is not value:
            plain = dense(value)
            guest.quota.check(0 if plain.data_ptr() == value.data_ptr() else total, 0)
            guest.reading = (value, plain.view(-1).view(torch.uint8))
        piece = guest.reading[1][offset : offset + length].clone()
        if offset + length == total:
            guest.reading = None
        guest.quota.check_answer(guest.channel.session, length)
        guest.answer(number, piece)

    def _seed(self, guest: Guest, number: int, message: list[Any]) -> None:
        self._worker.authorize(guest, "seed")
        guest.executor.seed(message[1])

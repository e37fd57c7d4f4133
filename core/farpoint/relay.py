"""Moving data between two workers that do not reach each other: chunk by chunk, by way of this process."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from farpoint.bulk import CHUNK_BYTES, Relayed
from farpoint.errors import FarpointError, MalformedMessageError
from farpoint.progress import progress_bar
from farpoint.protocol.messages import Kind
from farpoint.protocol.shapes import brief
from farpoint.spec import spec_from_wire
from farpoint.store import Annotation

if TYPE_CHECKING:
    from farpoint.peer import Peer
    from farpoint.references import Reference

_PATIENCE = 1.0
AHEAD = 4
"""Chunks that are asked for before the first of them is there, and that may be on their way to the destination."""


def relay(source: Reference, destination: Peer, object_id: int, wants_grad: bool, note: Annotation) -> None:
    """Copy an object from one worker to another, and return when it is there. No more than a few chunks of it are here at a time.

    Args:
        source: A reference to the object.
        destination: Who gets it.
        object_id: Its new id there.
        wants_grad: Whether it requires a gradient.
        note: What is written on it.

    Raises:
        GetNotPermittedError: The source's policy lets no values out, and this process would see them.
        FarpointError: It could not be copied; then it is where it was.
    """
    [wire] = source.peer.request([int(Kind.DESCRIBE), [source.id]])
    spec = spec_from_wire(wire, interned=False)
    message = [int(Kind.PUT), object_id, None, wants_grad, sorted(note.tags), note.description]
    relayed = Relayed(destination.channel, message, 2, spec.dtype, list(spec.shape))
    total = relayed.total
    offsets = deque(range(0, total, CHUNK_BYTES))
    asked: deque[Any] = deque()
    arrived: deque[Any] = deque()
    with progress_bar(f"{source.peer.name} to {destination.name}", total) as bar:
        try:
            while offsets or asked:
                while offsets and len(asked) < AHEAD:
                    offset = offsets.popleft()
                    size = min(CHUNK_BYTES, total - offset)
                    asked.append((source.peer.ask([int(Kind.READ), source.id, offset, size]), size))
                reply, size = asked.popleft()
                chunk = source.peer.wait(reply)
                if chunk.numel() != size:
                    raise source.peer.broke(MalformedMessageError("ANSWER to READ", "it", f"{size} bytes", brief(chunk)))
                relayed.push(chunk)
                destination.flush()
                bar(relayed.sent)
                arrived.append(destination.ask([int(Kind.DESCRIBE), []]))
                if len(arrived) > AHEAD:
                    destination.wait(arrived.popleft())
            relayed.finish()
            destination.request([int(Kind.DESCRIBE), [object_id]])
        except BaseException:
            relayed.give_up()
            for reply, _ in asked:  # what else went wrong is the same, and nobody need hear of it again
                try:
                    source.peer.wait(reply, _PATIENCE)
                except FarpointError:
                    pass
            raise

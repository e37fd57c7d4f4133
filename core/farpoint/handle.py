"""What one does with a pointer besides computing: ask where it leads, take it elsewhere, fetch, give it up, write on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from farpoint import gate

if TYPE_CHECKING:
    import torch

    from farpoint.pointer import PointerTensor


class Handle:
    """The methods of a pointer that tensors do not have. They are those of `farpoint.handover` and others, which know pointers."""

    @property
    def id_at_location(self: Any) -> int:
        """The id of the object that it points at, on `location`."""
        return gate.check_live(self).id

    @property
    def location(self: Any) -> Any:
        """The worker that it points at."""
        from farpoint.remote import handle_of

        return handle_of(self._route.workers[0])

    def send(self: Any, worker: Any, *others: Any, **options: Any) -> Any:
        """Send this pointer to a worker, or to several: see `farpoint.send`."""
        from farpoint.multi import send

        with gate.underway(self):
            return send(self, worker, *others, **options)

    def get(self: Any, keep: bool = False) -> torch.Tensor:
        """Bring what it points at here: see `farpoint.handover.get`."""
        from farpoint.handover import get

        with gate.underway(self):
            return get(self, keep=keep)

    def move(self: Any, worker: Any, **options: Any) -> torch.Tensor:
        """Move the data at the end of the chain: see `farpoint.handover.move`."""
        from farpoint.handover import move

        with gate.underway(self):
            return move(self, worker, **options)

    def remote_get(self: Any) -> torch.Tensor:
        """Make the chain one hop shorter at its data end."""
        from farpoint.handover import remote_get

        with gate.underway(self):
            return remote_get(self)

    def remote_send(self: Any, worker: Any) -> PointerTensor:
        """Make the chain one hop longer at its data end."""
        from farpoint.handover import remote_send

        with gate.underway(self):
            return remote_send(self, worker)

    def bypass(self: Any) -> PointerTensor:
        """Leave the first worker of the chain out: see `farpoint.handover.bypass`."""
        from farpoint.handover import bypass

        return bypass(self)

    def free(self: Any) -> None:
        """Give the reference up now."""
        from farpoint.pointer import spend

        gate.check_live(self)
        spend(self, "free")

    def tag(self, *tags: str) -> Self:
        """Write tags on the remote object, in place of its present ones."""
        from farpoint.catalogue import annotate

        annotate(self, tags=tags)
        return self

    def describe(self, description: str) -> Self:
        """Write a description on the remote object."""
        from farpoint.catalogue import annotate

        annotate(self, description=description)
        return self

"""What a worker keeps beside tensors: pointers, and the errors of what could not be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from farpoint.references import Reference
    from farpoint.spec import TensorSpec


@attrs.frozen(eq=False)
class StoredPointer:
    """A pointer as a worker keeps it: one reference to an object of another worker.

    Attributes:
        owner: Name of the worker that keeps it.
        id: Under which id.
        reference: The reference that it is.
        spec: Metadata of the tensor at the end of the chain, where known.
    """

    owner: str
    id: int
    reference: Reference
    spec: TensorSpec | None

    def __repr__(self) -> str:
        target = f"{self.reference.peer.name}:{self.reference.id}"
        return f"(Wrapper)>[PointerTensor | {self.owner}:{self.id} -> {target}]"


class Poisoned(Exception):
    """An operand carries the error of an earlier operation: raised and caught within a worker."""

    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(failure["text"])
        self.failure = failure

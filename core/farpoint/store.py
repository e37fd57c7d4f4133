"""What an object store is: where a worker keeps its objects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import attrs
import torch


@attrs.frozen
class Annotation:
    """What somebody wrote on an object.

    Attributes:
        tags: Words to find it by, each beginning with `#`.
        description: Free text.
        requires_grad: Whether pointers to it, made by those who find it, require a gradient.
    """

    tags: frozenset[str] = frozenset()
    description: str = ""
    requires_grad: bool = False


NO_ANNOTATION = Annotation()


class ObjectStore(MutableMapping[int, Any]):
    """Objects by id: tensors, and pointers to objects of other workers.

    A store guarantees:

    * **Aliasing.** What is read under an id is the tensor that was stored, or one that shares its storage: an
      in-place operation on one view is seen through every other, whichever order they were stored and read in.
    * Ids are integers from 1 to 2**63 - 1. Reading or deleting one that is not there raises `KeyError`.
    * `set` under an id that exists replaces the object and keeps its annotation; deleting an object deletes its annotation.
    * A failed write leaves the store as it was.
    * Calls may come from several threads.

    `MutableMapping` gives the rest (`get`, `pop`, `keys`, `items`, `in` ...).
    """

    @abstractmethod
    def annotate(self, object_id: int, annotation: Annotation) -> None:
        """Write on an object, in place of what was written before.

        Raises:
            KeyError: There is no such object.
        """

    @abstractmethod
    def annotation(self, object_id: int) -> Annotation:
        """Return what was written on an object, `NO_ANNOTATION` if nothing was."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that the tensors keep alive: each storage once, however many views are stored."""

    def bytes_of(self, object_ids: Iterable[int]) -> int:
        """Return the bytes of memory that some of the objects keep alive: each storage once. Ids that are not there are free."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for value in map(self.get, object_ids)
            if isinstance(value, torch.Tensor)
            for storage in (value.untyped_storage(),)
        }
        return sum(storages.values())

    @abstractmethod
    def close(self) -> None:
        """Give up what the store uses. The second call does nothing."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """Iterate over the ids, oldest first."""

"""A dictionary with byte accounting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from farpoint.store import NO_ANNOTATION, Annotation, ObjectStore


class MemoryStore(ObjectStore):
    """Keeps the very objects it is given, so that aliasing is torch's own."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._annotations: dict[int, Annotation] = {}
        # The dictionary's own methods, without a Python frame in between: they run for each operand.
        self.__getitem__ = self._objects.__getitem__  # type: ignore[method-assign]
        self.get = self._objects.get  # type: ignore[method-assign,assignment]

    def __getitem__(self, object_id: int) -> Any:
        return self._objects[object_id]

    def __setitem__(self, object_id: int, value: Any) -> None:
        self._objects[object_id] = value

    def __delitem__(self, object_id: int) -> None:
        del self._objects[object_id]
        self._annotations.pop(object_id, None)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._objects

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._objects))

    def __len__(self) -> int:
        return len(self._objects)

    def annotate(self, object_id: int, annotation: Annotation) -> None:
        if object_id not in self._objects:
            raise KeyError(object_id)
        self._annotations[object_id] = annotation

    def annotation(self, object_id: int) -> Annotation:
        return self._annotations.get(object_id, NO_ANNOTATION)

    @property
    def nbytes(self) -> int:
        storages = {
            storage.data_ptr(): storage.nbytes()
            for value in list(self._objects.values())
            if isinstance(value, torch.Tensor)
            for storage in (value.untyped_storage(),)
        }
        return sum(storages.values())

    def close(self) -> None:
        self._objects.clear()
        self._annotations.clear()

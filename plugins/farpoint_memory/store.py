"""A dictionary with byte accounting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from farpoint.store import NO_ANNOTATION, Annotation, ObjectStore


class MemoryStore(dict[int, Any], ObjectStore):
    """Keeps the very objects it is given, so that aliasing is torch's own.

    It is a dictionary: reading and writing run for each operand of each operation, without a Python frame in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self._annotations: dict[int, Annotation] = {}

    def __delitem__(self, object_id: int) -> None:
        super().__delitem__(object_id)
        self._annotations.pop(object_id, None)

    def pop(self, object_id: int, *default: Any) -> Any:
        value = super().pop(object_id, *default)
        self._annotations.pop(object_id, None)
        return value

    def popitem(self) -> tuple[int, Any]:
        object_id, value = super().popitem()
        self._annotations.pop(object_id, None)
        return object_id, value

    def clear(self) -> None:
        super().clear()
        self._annotations.clear()

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.keys()))

    def annotate(self, object_id: int, annotation: Annotation) -> None:
        if object_id not in self:
            raise KeyError(object_id)
        self._annotations[object_id] = annotation

    def annotation(self, object_id: int) -> Annotation:
        return self._annotations.get(object_id, NO_ANNOTATION)

    @property
    def nbytes(self) -> int:
        return self.bytes_of(list(self.keys()))

    def close(self) -> None:
        self.clear()

"""What registration hooks return: small frozen records with a `name`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from farpoint.limits import Limits
    from farpoint.serializer import Serializer
    from farpoint.store import ObjectStore
    from farpoint.transport import Transport


@attrs.frozen
class TransportPlugin:
    """A transport.

    Attributes:
        name: What users pick it by.
        schemes: The URL schemes that it serves, without `://`.
        factory: Returns the transport; called once in a process, when one of the schemes is first used.
    """

    name: str
    schemes: tuple[str, ...]
    factory: Callable[[], Transport]


@attrs.frozen
class SerializerPlugin:
    """A serializer.

    Attributes:
        name: What users pick it by, and what the two sides of a session agree on.
        factory: Returns a serializer that enforces these limits when it decodes; called once a link end.
    """

    name: str
    factory: Callable[[Limits], Serializer]


@attrs.frozen
class StorePlugin:
    """An object store.

    Attributes:
        name: What users pick it by.
        factory: Returns an empty store for the worker of this name, or what a durable store kept of it.
    """

    name: str
    factory: Callable[[str], ObjectStore]


@attrs.frozen
class OperatorPlugin:
    """Operators that workers may execute besides those of torch.

    Attributes:
        name: The namespace, as in `torch.ops.<name>`.
        operators: Overloads, like `mylib::scale.default`.
    """

    name: str
    operators: tuple[str, ...]

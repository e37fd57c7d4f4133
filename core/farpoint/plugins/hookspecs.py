"""Every hook of farpoint, with when it is called and one complete example.

A plugin is a module (or any object) with functions marked by `farpoint.plugins.hookimpl`. A distribution announces its module
under the entry point group `farpoint`::

    [project.entry-points.farpoint]
    carrier-pigeon = "farpoint_pigeon"

Hooks grow by arguments at the end; a plugin names only those that it uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pluggy

from farpoint.plugins.records import OperatorPlugin, SerializerPlugin, StorePlugin, TransportPlugin

hookspec = pluggy.HookspecMarker("farpoint")
hookimpl = pluggy.HookimplMarker("farpoint")

ACTIONS: Final = {
    "put": "store a tensor: by send, or by a move that arrives",
    "link": "store a pointer to an object of another worker",
    "get": "read the value of an object, or the pointer that is there",
    "move": "let the data at the end of a chain go to another worker, asked of every worker of the chain",
    "search": "look for objects by tags and words",
    "list": "list every object, without values",
    "tag": "write tags or a description on an object",
    "clear": "drop every object",
    "seed": "begin the worker's random numbers anew, from a seed that the asking worker knows",
    "dial": "dial a worker that a client has introduced, and that this one has no session with",
}
"""What `farpoint_authorize` is asked about besides operators, which are asked about by their names.

Nothing else is asked about. To hold a reference, to give one up, to wait and to read the metadata of an object that one holds
neither changes an object nor reveals a value.
"""


@hookspec
def farpoint_transports() -> Iterable[TransportPlugin]:  # type: ignore[empty-body]
    """Register transports. Called once, when a transport is first asked for.

    Example::

        from farpoint.plugins import TransportPlugin, hookimpl

        def make():
            from farpoint_pigeon.transport import PigeonTransport  # third-party imports belong in here

            return PigeonTransport()

        @hookimpl
        def farpoint_transports():
            yield TransportPlugin(name="pigeon", schemes=("pigeon",), factory=make)
    """


@hookspec
def farpoint_serializers() -> Iterable[SerializerPlugin]:  # type: ignore[empty-body]
    """Register serializers. Called once, when a serializer is first asked for.

    Example::

        from farpoint.plugins import SerializerPlugin, hookimpl

        def make(limits):
            from farpoint_cbor.serializer import CborSerializer

            return CborSerializer(limits)

        @hookimpl
        def farpoint_serializers():
            yield SerializerPlugin(name="cbor", factory=make)
    """


@hookspec
def farpoint_stores() -> Iterable[StorePlugin]:  # type: ignore[empty-body]
    """Register object stores. Called once, when a store is first asked for.

    Example::

        from farpoint.plugins import StorePlugin, hookimpl

        def make(worker):
            from farpoint_shelf.store import ShelfStore

            return ShelfStore(f"/var/lib/farpoint/{worker}")

        @hookimpl
        def farpoint_stores():
            yield StorePlugin(name="shelf", factory=make)
    """


@hookspec
def farpoint_operators() -> Iterable[OperatorPlugin]:  # type: ignore[empty-body]
    """Register operators that workers may execute. Called once, when the table of operations is first used.

    Example::

        from farpoint.plugins import OperatorPlugin, hookimpl

        @hookimpl
        def farpoint_operators():
            import mylib  # registers torch.ops.mylib

            yield OperatorPlugin(name="mylib", operators=("mylib::scale.default",))
    """


@hookspec
def farpoint_authorize(action: str, subject: str, object: int | str, worker: str, identity: str) -> bool | str | None:
    """Answer whether somebody may do something. Called on the worker, before anything has happened.

    Every policy is asked, and the action is permitted unless one of them refuses: the answer must not depend on which of two
    distributions is asked first. A policy that raises refuses. Without any policy everything is permitted.

    Args:
        action: One of `ACTIONS`, or the name of an operator like `aten::add.Tensor`, which is what contains `::`.
        subject: Name that the asking worker gave itself when it connected. It is worth as much as the transport's authentication.
        object: Id of the object it is about: the first operand of an operator, the new id of `put` and `link`, 0 if there is none.
            Of `dial` it is the URL, as the client has written it.
        worker: Name of the worker that is asked; a process may have several.
        identity: Name in the certificate of the asking worker, which was verified; empty if its link has shown none.

    Returns:
        False or a text with the reason to refuse, True or None to permit.

    Example::

        from farpoint.plugins import hookimpl

        @hookimpl
        def farpoint_authorize(action, object, identity):
            if action in ("get", "move") and identity != "secure_worker":
                return "values leave this worker for secure_worker only"
            if action == "dial" and not object.startswith(("tls://10.0.0.", "wss://10.0.0.")):
                return "this worker dials within its own network only"
    """

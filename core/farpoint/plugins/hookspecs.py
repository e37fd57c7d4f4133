"""Every hook of farpoint, with when it is called and one complete example.

A plugin is a module (or any object) with functions marked by `farpoint.plugins.hookimpl`. A distribution announces its module
under the entry point group `farpoint`::

    [project.entry-points.farpoint]
    carrier-pigeon = "farpoint_pigeon"

Hooks grow by arguments at the end; a plugin names only those that it uses.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from farpoint.plugins.records import OperatorPlugin, SerializerPlugin, StorePlugin, TransportPlugin

hookspec = pluggy.HookspecMarker("farpoint")
hookimpl = pluggy.HookimplMarker("farpoint")


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


@hookspec(firstresult=True)
def farpoint_authorize(action: str, subject: str, object: int) -> bool | str | None:
    """Answer whether somebody may do something. Called on the worker before an action takes effect.

    Args:
        action: `get`, `move`, `search`, `clear`, or the name of an operator such as `aten::add.Tensor`.
        subject: Name of the worker that asks.
        object: Id of the object it is about, 0 if it is about none.

    Returns:
        True to permit, False or a text with the reason to refuse, None to leave it to the next plugin. The first answer that is
        not None counts; if there is none, the action is permitted.

    Example::

        from farpoint.plugins import hookimpl

        @hookimpl
        def farpoint_authorize(action, subject):
            if action == "get" and subject != "secure_worker":
                return "values leave this worker through secure_worker only"
    """

"""The surface for plugin authors: hooks, records, and the façade that asks them."""

from farpoint.plugins.hookspecs import hookimpl
from farpoint.plugins.manager import PluginManager, plugins
from farpoint.plugins.records import OperatorPlugin, SerializerPlugin, StorePlugin, TransportPlugin

__all__ = [
    "OperatorPlugin",
    "PluginManager",
    "SerializerPlugin",
    "StorePlugin",
    "TransportPlugin",
    "hookimpl",
    "plugins",
]

"""The typed façade over pluggy: one method a question; nobody else touches the relay."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import attrs
import pluggy

from farpoint.errors import PluginError
from farpoint.plugins import hookspecs
from farpoint.plugins.records import OperatorPlugin, SerializerPlugin, StorePlugin, TransportPlugin

if TYPE_CHECKING:
    from farpoint.limits import Limits
    from farpoint.serializer import Serializer
    from farpoint.store import ObjectStore
    from farpoint.transport import Transport

GROUP = "farpoint"

RecordT = TypeVar("RecordT", TransportPlugin, SerializerPlugin, StorePlugin, OperatorPlugin)


@attrs.frozen
class BrokenPlugin:
    """An entry point that could not be loaded. It disturbs nobody until it is asked for."""

    name: str
    distribution: str
    error: Exception


class PluginManager:
    """Finds plugins and answers from them.

    Args:
        discover: Whether to load what installed distributions announce under the entry point group `farpoint`.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self._discover = discover
        self._loaded = not discover
        self._distributions: dict[str, str] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._transports: dict[str, Transport] = {}
        self._authorizers = False
        self.broken: list[BrokenPlugin] = []

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin by hand, as a script or a test does.

        Raises:
            PluginError: It implements a hook that does not exist, or one with arguments that it does not have.
        """
        try:
            registered = self._pluggy.register(plugin, name)
            self._pluggy.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.is_registered(plugin):
                self._pluggy.unregister(plugin)
            raise PluginError("plugin", name or str(plugin), str(error)) from error
        self._distributions.setdefault(registered or "", "registered by hand")
        self._forget()

    def unregister(self, plugin: object) -> None:
        """Take a plugin out again."""
        self._pluggy.unregister(plugin)
        self._forget()

    def transport(self, url: str) -> Transport:
        """Return the transport for a URL, the same one for each call.

        Raises:
            PluginError: Nobody serves its scheme.
        """
        scheme = urlsplit(url).scheme
        if scheme in self._transports:
            return self._transports[scheme]
        records = self._registry("transport")
        for record in records.values():
            if scheme in record.schemes:
                made: Transport = self._make("transport", record.name, record.factory)
                for served in record.schemes:
                    self._transports[served] = made
                return made
        schemes = sorted(f"{scheme}://" for record in records.values() for scheme in record.schemes)
        raise PluginError("transport", url, f"no installed plugin serves URLs of scheme {scheme!r}{self._excuses()}", schemes)

    def serializer(self, name: str, limits: Limits) -> Serializer:
        """Return a new serializer by name.

        Raises:
            PluginError: There is none of that name, or it cannot be made.
        """
        record = self._find("serializer", name)
        made: Serializer = self._make("serializer", name, record.factory, limits)
        return made

    def store(self, name: str, worker: str) -> ObjectStore:
        """Return the object store of a worker, by the name of its kind.

        Raises:
            PluginError: There is none of that name, or it cannot be made.
        """
        record = self._find("store", name)
        made: ObjectStore = self._make("store", name, record.factory, worker)
        return made

    def serializer_names(self) -> list[str]:
        """Return the names of all serializers, in the order they were registered in."""
        return list(self._registry("serializer"))

    def store_names(self) -> list[str]:
        """Return the names of all stores."""
        return list(self._registry("store"))

    def transports(self) -> list[TransportPlugin]:
        """Return the records of all transports."""
        return list(self._registry("transport").values())

    def operators(self) -> list[OperatorPlugin]:
        """Return the records of all operator namespaces besides torch's own."""
        return list(self._registry("operator").values())

    @property
    def has_policy(self) -> bool:
        """Whether any plugin answers `farpoint_authorize`."""
        self._load()
        return self._authorizers

    def authorize(self, action: str, subject: str, object_id: int) -> str | None:
        """Return why an action is refused, or None if it is permitted."""
        self._load()
        if not self._authorizers:
            return None
        answer = self._pluggy.hook.farpoint_authorize(action=action, subject=subject, object=object_id)
        if answer is None or answer is True:
            return None
        return answer if isinstance(answer, str) else "the policy of this worker refuses it"

    def distribution(self, plugin: str) -> str:
        """Return which distribution provides a plugin, with its version."""
        self._load()
        return self._distributions.get(plugin, "unknown")

    def _forget(self) -> None:
        self._records.clear()
        self._transports.clear()
        self._authorizers = bool(self._pluggy.hook.farpoint_authorize.get_hookimpls())

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
            distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
            try:
                self._pluggy.register(entry.load(), entry.name)
                self._pluggy.check_pending()
            except Exception as error:  # one broken stranger never breaks the others
                plugin = self._pluggy.get_plugin(entry.name)
                if plugin is not None:
                    self._pluggy.unregister(plugin)
                self.broken.append(BrokenPlugin(entry.name, distribution, error))
            else:
                self._distributions[entry.name] = distribution
        self._forget()

    def _registry(self, kind: str) -> dict[str, Any]:
        self._load()
        if kind not in self._records:
            relay = getattr(self._pluggy.hook, f"farpoint_{kind}s")
            found: dict[str, Any] = {}
            owners: dict[str, str] = {}
            # pluggy calls the last registered first; keep the order of registration.
            for implementation in relay.get_hookimpls():
                records: Iterable[Any] = implementation.function()
                for record in records:
                    if record.name in found:
                        one, other = owners[record.name], self._distributions.get(implementation.plugin_name, "unknown")
                        raise PluginError(kind, record.name, f"two plugins provide this name: {one} and {other}; uninstall one")
                    found[record.name] = record
                    owners[record.name] = self._distributions.get(implementation.plugin_name, "unknown")
            self._records[kind] = found
        return self._records[kind]

    def _find(self, kind: str, name: str) -> Any:
        records = self._registry(kind)
        if name not in records:
            raise PluginError(kind, name, f"no installed plugin provides it{self._excuses()}", list(records))
        return records[name]

    def _excuses(self) -> str:
        if not self.broken:
            return ""
        listed = "; ".join(f"{b.name} of {b.distribution} failed to load: {b.error!r}" for b in self.broken)
        return f" ({listed})"

    def _make(self, kind: str, name: str, factory: Any, *args: Any) -> Any:
        try:
            return factory(*args)
        except ImportError as error:
            raise PluginError(kind, name, f"it needs {error.name or error}, which is not installed: pip install {error.name}") from error
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(kind, name, f"it could not be made: {error!r}") from error


plugins = PluginManager()
"""The plugins of this process."""

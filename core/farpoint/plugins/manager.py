"""The typed façade over pluggy: one method a question; nobody else touches the relay."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
import re
from typing import TYPE_CHECKING, Any, Final
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

GROUP: Final = "farpoint"
_RECORDS: Final[dict[str, type[Any]]] = {
    "transport": TransportPlugin,
    "serializer": SerializerPlugin,
    "store": StorePlugin,
    "operator": OperatorPlugin,
}
_HOOKS: Final = [name for name in vars(hookspecs) if name.startswith("farpoint_")]
_log = logging.getLogger(__name__)


@attrs.frozen
class BrokenPlugin:
    """A plugin that could not be loaded, or whose hook failed. It disturbs nobody until it is asked for."""

    name: str
    distribution: str
    error: BaseException

    def __str__(self) -> str:
        return f"{self.name} of {self.distribution}: {type(self.error).__name__}: {self.error}"


@attrs.frozen
class Provided:
    """One name that a plugin provides.

    Attributes:
        kind: `transport`, `serializer`, `store`, `operator` or `policy`.
        name: The name.
        plugin: Name of the plugin.
        distribution: Where the plugin is from.
        record: What it registered, None for a policy.
    """

    kind: str
    name: str
    plugin: str
    distribution: str
    record: Any = None

    @property
    def source(self) -> str:
        """The plugin with its distribution."""
        return f"{self.plugin} of {self.distribution}"


class PluginManager:
    """Finds plugins and answers from them.

    Args:
        discover: Whether to load what installed distributions announce under the entry point group `farpoint`.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self._loaded = not discover
        self._distributions: dict[str, str] = {}
        self._unloadable: list[BrokenPlugin] = []
        self._failing: dict[str, list[BrokenPlugin]] = {}
        self._claimed: dict[str, dict[str, list[Provided]]] = {}
        self._transports: dict[tuple[str, str], Transport] = {}  # by plugin and name: those in use outlive other registrations
        self._authorizers = False

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin by hand, as a script or a test does.

        Raises:
            PluginError: It implements a hook that does not exist, or one with arguments that it does not have.
        """
        self._load()
        self._register(plugin, name, "registered by hand")
        self._forget()

    def unregister(self, plugin: object) -> None:
        """Take a plugin out again."""
        name = self._pluggy.get_name(plugin)
        self._pluggy.unregister(plugin)
        self._transports = {key: made for key, made in self._transports.items() if key[0] != name}
        self._forget()

    def transport(self, url: str) -> Transport:
        """Return the transport for a URL, the same one for each call.

        Raises:
            PluginError: Nobody serves its scheme, or more than one plugin does, or it cannot be made.
        """
        found = self._find("transport", f"{urlsplit(url).scheme}://")
        key = (found.plugin, found.name)
        if key not in self._transports:
            self._transports[key] = self._make("transport", found.name, found.record.factory)
        return self._transports[key]

    def local_url(self, transport: str, name: str) -> str:
        """Return a URL on this machine to listen at.

        Args:
            transport: Name of a transport, or one of its URL schemes.
            name: Who will listen.

        Raises:
            PluginError: There is no such transport, or it cannot be made.
        """
        schemes = {record.name: record.schemes[0] for record in self.transports()}
        return self.transport(f"{schemes.get(transport, transport)}://").local_url(name)

    def serializer(self, name: str, limits: Limits) -> Serializer:
        """Return a new serializer by name.

        Raises:
            PluginError: There is none of that name, or it cannot be made.
        """
        made: Serializer = self._make("serializer", name, self._find("serializer", name).record.factory, limits)
        return made

    def store(self, name: str, worker: str) -> ObjectStore:
        """Return the object store of a worker, by the name of its kind.

        Raises:
            PluginError: There is none of that name, or it cannot be made.
        """
        made: ObjectStore = self._make("store", name, self._find("store", name).record.factory, worker)
        return made

    def serializer_names(self) -> list[str]:
        """Return the names of all serializers, in the order they were registered in."""
        return [provided.name for provided in self._uncontested("serializer")]

    def store_names(self) -> list[str]:
        """Return the names of all stores."""
        return [provided.name for provided in self._uncontested("store")]

    def transports(self) -> list[TransportPlugin]:
        """Return the records of all transports."""
        return [provided.record for provided in self._uncontested("transport")]

    def operators(self) -> list[OperatorPlugin]:
        """Return the records of all operator namespaces besides torch's own."""
        return [provided.record for provided in self._uncontested("operator")]

    def provided(self) -> list[Provided]:
        """Return everything that plugins provide, also what several of them claim."""
        found = [
            provided
            for kind in _RECORDS
            for claim, claimants in self._registry(kind).items()
            for provided in claimants
            if claim == provided.name
        ]
        for implementation in self._pluggy.hook.farpoint_authorize.get_hookimpls():
            name = implementation.plugin_name
            found.append(Provided("policy", name, name, self.distribution(name)))
        return found

    def problems(self) -> list[PluginError]:
        """Return what is wrong with the installed plugins: names that more than one claims, and plugins that are broken."""
        contested = [
            self._clash(kind, claim, claimants)
            for kind in _RECORDS
            for claim, claimants in self._registry(kind).items()
            if len(claimants) > 1
        ]
        broken = [
            PluginError("plugin", b.name, f"it is broken: {b}", fix=f"mend it, or uninstall {b.distribution}")
            for b in self.broken
        ]
        return contested + broken

    @property
    def broken(self) -> list[BrokenPlugin]:
        """The plugins that could not be loaded, and those of the hooks asked so far that failed."""
        self._load()
        return self._unloadable + [broken for failing in self._failing.values() for broken in failing]

    @property
    def has_policy(self) -> bool:
        """Whether any plugin answers `farpoint_authorize`."""
        self._load()
        return self._authorizers

    def authorize(self, action: str, subject: str, about: int | str, worker: str, identity: str = "") -> str | None:
        """Return why an action is refused, or None if it is permitted."""
        if not self.has_policy:
            return None
        try:
            answers = self._pluggy.hook.farpoint_authorize(
                action=action, subject=subject, object=about, worker=worker, identity=identity
            )
        except Exception:
            # What a policy knows is not for the one it refuses: the reason stays in the log of this process.
            _log.exception("a policy failed when asked whether %s may %s on %s; this is a refusal", subject, action, worker)
            return "its policy failed, which is a refusal"
        for answer in answers:
            if answer is not True:
                return answer if answer and isinstance(answer, str) else "its policy refuses it"
        return None

    def distribution(self, plugin: str) -> str:
        """Return which distribution provides a plugin, with its version."""
        self._load()
        return self._distributions.get(plugin, "unknown")

    def forget_transports(self) -> Any:
        """Make transports anew when they are next asked for, and return those of before: in a forked child they are the parent's."""
        inherited, self._transports = self._transports, {}
        return inherited

    def _forget(self) -> None:
        self._claimed.clear()
        self._failing.clear()
        self._authorizers = bool(self._pluggy.hook.farpoint_authorize.get_hookimpls())

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
            distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
            try:
                self._register(entry.load(), entry.name, distribution)
            except (Exception, SystemExit) as error:  # one broken stranger never breaks the others
                self._unloadable.append(BrokenPlugin(entry.name, distribution, error))
        self._forget()

    def _register(self, plugin: object, name: str | None, distribution: str) -> None:
        label = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        for hook in dir(plugin):
            marked = self._pluggy.parse_hookimpl_opts(plugin, hook)
            if marked is not None and (marked.get("specname") or hook) not in _HOOKS:
                close = difflib.get_close_matches(hook, _HOOKS, 1)
                fix = f"did you mean {close[0]}?" if close else "docs/plugins.md describes every hook"
                raise PluginError("plugin", label, f"it implements the hook {hook}, which does not exist", _HOOKS, fix)
            if marked is None and hook in _HOOKS and callable(getattr(plugin, hook)):
                raise PluginError("plugin", label, f"{hook} would never be called", fix=f"mark {hook} with @hookimpl")
        try:
            registered = self._pluggy.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.is_registered(plugin) and isinstance(error, pluggy.PluginValidationError):
                self._pluggy.unregister(plugin)
            raise PluginError("plugin", label, " ".join(str(error).split())) from error
        self._distributions[registered or label] = distribution

    def _registry(self, kind: str) -> dict[str, list[Provided]]:
        """Return who claims what: names, and for transports the schemes as well."""
        self._load()
        if kind in self._claimed:
            return self._claimed[kind]
        claimed: dict[str, list[Provided]] = {}
        failing: list[BrokenPlugin] = []
        # pluggy calls the last registered first; keep the order of registration.
        for implementation in getattr(self._pluggy.hook, f"farpoint_{kind}s").get_hookimpls():
            plugin = implementation.plugin_name
            distribution = self.distribution(plugin)
            try:
                records = [_check_record(kind, record) for record in implementation.function()]
            except Exception as error:  # one broken stranger never breaks the others
                failing.append(BrokenPlugin(plugin, distribution, error))
                continue
            for record in records:
                provided = Provided(kind, record.name, plugin, distribution, record)
                schemes = [f"{scheme}://" for scheme in getattr(record, "schemes", ())]
                for claim in (record.name, *schemes):
                    claimed.setdefault(claim, []).append(provided)
        self._failing[kind] = failing
        self._claimed[kind] = claimed
        return claimed

    def _uncontested(self, kind: str) -> list[Provided]:
        registry = self._registry(kind)
        return [found[0] for claim, found in registry.items() if len(found) == 1 and claim == found[0].name]

    def _find(self, kind: str, claim: str) -> Provided:
        registry = self._registry(kind)
        claimants = registry.get(claim, [])
        if len(claimants) == 1:
            return claimants[0]
        if claimants:
            raise self._clash(kind, claim, claimants)
        reason = "no installed plugin provides it"
        if self.broken:
            reason += f" (broken: {'; '.join(map(str, self.broken))})"
        available = [known for known in registry if known.endswith("://") == claim.endswith("://")]
        close = difflib.get_close_matches(claim, available, 1)
        fixes = [f"type {close[0]!r} if that is meant"] if close else []
        name = claim.removesuffix("://")
        if re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
            # By custom only: docs/plugins.md.
            fixes.append(f"pip install farpoint-{name}, if such a plugin exists")
        raise PluginError(kind, claim, reason, available, "; or ".join(fixes) or "use one that is available")

    def _clash(self, kind: str, claim: str, claimants: list[Provided]) -> PluginError:
        sources = " and ".join(provided.source for provided in claimants)
        return PluginError(kind, claim, f"more than one plugin provides it: {sources}", fix="uninstall all but one")

    def _make(self, kind: str, name: str, factory: Any, *args: Any) -> Any:
        try:
            return factory(*args)
        except PluginError:
            raise
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if not module or importlib.util.find_spec(module) is not None:
                raise PluginError(kind, name, f"it could not be made: {error!r}") from error
            raise PluginError(
                kind, name, f"it needs {module}, which is not installed", fix=f"pip install {module}"
            ) from error
        except Exception as error:
            raise PluginError(kind, name, f"it could not be made: {error!r}") from error


def _check_record(kind: str, record: Any) -> Any:
    expected = _RECORDS[kind]
    if not isinstance(record, expected):
        raise PluginError(kind, str(record)[:100], f"farpoint_{kind}s must give a {expected.__name__}, not a {type(record).__name__}")
    if not isinstance(record.name, str) or not record.name:
        raise PluginError(kind, str(record.name)[:100], "the name of a record is a text that is not empty")
    if isinstance(record, TransportPlugin) and not isinstance(record.schemes, tuple):
        raise PluginError(kind, record.name, f"schemes must be a tuple of texts, not {record.schemes!r}")
    return record


plugins = PluginManager()
"""The plugins of this process."""

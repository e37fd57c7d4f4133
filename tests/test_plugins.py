"""Finding plugins: what strangers install works, and what they get wrong is reported by name, when it is asked for."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farpoint.errors import PluginError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import (
    OperatorPlugin,
    PluginManager,
    SerializerPlugin,
    StorePlugin,
    TransportPlugin,
    hookimpl,
    hookspecs,
    plugins,
)
from strangers import SERIALIZER, environment, install

DOCS = Path(__file__).parent.parent / "docs" / "plugins.md"
BUILT_IN = {
    ("transport", "virtual"),
    ("serializer", "msgpack"),
    ("serializer", "torch"),
    ("store", "memory"),
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that this process imports from; what it imported is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def problems(manager: PluginManager) -> list[str]:
    return [str(problem) for problem in manager.problems()]


class TestDiscovery:
    def test_a_stranger_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        """Installed, found, and used for a whole computation; broken neighbours disturb nobody."""
        install(tmp_path, "farpoint-morse", "strange_morse", SERIALIZER.format(name="morse"))
        install(tmp_path, "farpoint-ruin", "strange_ruin", "import a_module_that_nobody_has")
        script = """
            import sys, torch, farpoint
            farpoint.TorchHook(torch)
            bob = farpoint.VirtualWorker(id="bob", serializer="morse")
            assert "strange_morse" in sys.modules
            assert torch.equal((torch.ones(2).send(bob) * 3).get(), torch.full((2,), 3.0))
            try:
                farpoint.VirtualWorker(id="carol", serializer="ruin")
            except farpoint.PluginError as error:
                print(error)
        """
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stderr == ""
        assert "strange_ruin of farpoint-ruin 1.0: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in run.stdout
        assert "Available: msgpack, morse, torch" in run.stdout

    def test_what_is_in_this_repository(self) -> None:
        manager = PluginManager()
        assert {(found.kind, found.name) for found in manager.provided()} >= BUILT_IN
        assert problems(manager) == [] and manager.distribution("virtual").startswith("farpoint ")

    def test_a_broken_import_is_silent_until_asked_for(self, site: Path, capfd: pytest.CaptureFixture[str]) -> None:
        install(site, "farpoint-ruin", "strange_ruin", "raise ValueError('broken on purpose')")
        manager = PluginManager()
        assert set(manager.serializer_names()) == {"msgpack", "torch"}
        manager.serializer("msgpack", DEFAULT_LIMITS)
        assert capfd.readouterr() == ("", "")
        [broken] = manager.broken
        assert (broken.name, broken.distribution) == ("strange_ruin", "farpoint-ruin 1.0")
        with pytest.raises(PluginError, match=r"strange_ruin of farpoint-ruin 1\.0: ValueError: broken on purpose"):
            manager.serializer("morse", DEFAULT_LIMITS)
        [problem] = problems(manager)
        assert problem.startswith("plugin 'strange_ruin': it is broken: strange_ruin of farpoint-ruin 1.0: ValueError: broken")
        assert problem.endswith("What to do: mend it, or uninstall farpoint-ruin 1.0.")

    @pytest.mark.parametrize("source", ["import sys; sys.exit(3)", "def (", "import farpoint_morse_missing"])
    def test_whatever_an_import_does(self, site: Path, source: str) -> None:
        install(site, "farpoint-ruin", "strange_ruin", source)
        manager = PluginManager()
        assert {(found.kind, found.name) for found in manager.provided()} >= BUILT_IN
        assert [broken.name for broken in manager.broken] == ["strange_ruin"]

    @pytest.mark.parametrize(
        ("source", "complaint"),
        [
            (
                "from farpoint.plugins import hookimpl\n@hookimpl\ndef farpoint_serialisers(): return []",
                r"hook farpoint_serialisers, which does not exist\. Available: .*did you mean farpoint_serializers\?",
            ),
            (
                "from farpoint.plugins import hookimpl\n@hookimpl\ndef something(): return []",
                r"hook something, which does not exist\. .*docs/plugins.md",
            ),
            ("def farpoint_stores(): return []", "farpoint_stores would never be called.*mark farpoint_stores with @hookimpl"),
            (
                "from farpoint.plugins import hookimpl\n@hookimpl\ndef farpoint_authorize(action, subjekt): return True",
                "subjekt.*can not be found in the hookspec",
            ),
        ],
    )
    def test_hooks_that_are_none(self, site: Path, source: str, complaint: str) -> None:
        install(site, "farpoint-ruin", "strange_ruin", source)
        manager = PluginManager()
        assert not manager.has_policy
        [problem] = problems(manager)
        assert re.search(complaint, problem) and "farpoint-ruin 1.0" in problem

    @pytest.mark.parametrize(
        ("body", "complaint"),
        [
            ("return ['morse']", "must give a SerializerPlugin, not a str"),
            ("return None", "not iterable"),
            ("return [StorePlugin(name='morse', factory=print)]", "must give a SerializerPlugin, not a StorePlugin"),
            ("return [SerializerPlugin(name='', factory=print)]", "a text that is not empty"),
            ("raise ValueError('broken on purpose')", "broken on purpose"),
        ],
    )
    def test_records_that_are_none(self, site: Path, body: str, complaint: str) -> None:
        head = "from farpoint.plugins import SerializerPlugin, StorePlugin, hookimpl\n@hookimpl\ndef farpoint_serializers():\n"
        install(site, "farpoint-ruin", "strange_ruin", f"{head}    {body}\n")
        manager = PluginManager()
        assert set(manager.serializer_names()) == {"msgpack", "torch"}
        with pytest.raises(PluginError, match=f"strange_ruin of farpoint-ruin 1.0: .*{complaint}"):
            manager.serializer("morse", DEFAULT_LIMITS)
        [problem] = problems(manager)
        assert complaint in problem

    def test_schemes_that_are_none(self) -> None:
        class Plugin:
            @hookimpl
            def farpoint_transports(self) -> Any:
                yield TransportPlugin("pigeon", "pigeon", print)  # type: ignore[arg-type]

        manager = PluginManager(discover=False)
        manager.register(Plugin(), "pigeon")
        with pytest.raises(PluginError, match="schemes must be a tuple"):
            manager.transport("pigeon://x")


class TestClashes:
    def test_two_distributions_with_one_name(self, site: Path) -> None:
        install(site, "farpoint-a", "strange_a", SERIALIZER.format(name="morse"))
        install(site, "farpoint-b", "strange_b", SERIALIZER.format(name="morse"), version="2.0")
        manager = PluginManager()
        assert set(manager.serializer_names()) == {"msgpack", "torch"}
        manager.serializer("torch", DEFAULT_LIMITS)
        expected = "more than one plugin provides it: strange_a of farpoint-a 1.0 and strange_b of farpoint-b 2.0"
        with pytest.raises(PluginError, match=expected) as caught:
            manager.serializer("morse", DEFAULT_LIMITS)
        assert caught.value.fix == "uninstall all but one" and problems(manager) == [str(caught.value)]
        assert [found.distribution for found in manager.provided() if found.name == "morse"] == ["farpoint-a 1.0", "farpoint-b 2.0"]

    def test_a_stranger_never_takes_a_name_over(self, site: Path) -> None:
        install(site, "farpoint-thief", "strange_thief", SERIALIZER.format(name="msgpack"))
        with pytest.raises(PluginError, match=r"msgpack of farpoint .* and strange_thief of farpoint-thief 1\.0"):
            PluginManager().serializer("msgpack", DEFAULT_LIMITS)

    def test_a_scheme_belongs_to_one_transport(self) -> None:
        class Plugin:
            def __init__(self, name: str, *schemes: str) -> None:
                self.record = TransportPlugin(name, schemes, lambda: name)  # type: ignore[arg-type,return-value]

            @hookimpl
            def farpoint_transports(self) -> Any:
                yield self.record

        manager = PluginManager(discover=False)
        manager.register(Plugin("one", "ws", "wss"), "one")
        manager.register(Plugin("two", "wss"), "two")
        assert manager.transport("ws://x") == "one"  # type: ignore[comparison-overlap]
        with pytest.raises(PluginError, match=r"transport 'wss://': more than one plugin provides it: one of .* and two of"):
            manager.transport("wss://x")
        assert len(manager.problems()) == 1


class TestAsking:
    def test_a_missing_name_lists_what_exists_and_what_to_install(self) -> None:
        with pytest.raises(PluginError) as caught:
            plugins.serializer("cbor", DEFAULT_LIMITS)
        error = caught.value
        assert (error.kind, error.name) == ("serializer", "cbor") and {"msgpack", "torch"} <= set(error.available)
        assert "Available: msgpack, torch" in str(error)
        assert "What to do: pip install farpoint-cbor, if such a plugin exists." in str(error)
        with pytest.raises(PluginError, match=r"Available: memory\. What to do: type 'memory' if that is meant"):
            plugins.store("memroy", "bob")
        with pytest.raises(PluginError, match=r"'pigeon://': no installed.* Available: .*virtual://"):
            plugins.transport("pigeon://x")

    def test_a_missing_module_is_named_with_what_to_type(self) -> None:
        def needs(module: str) -> Any:
            def make(_: Any) -> Any:
                __import__(module)

            return make

        class Plugin:
            @hookimpl
            def farpoint_serializers(self) -> Any:
                yield SerializerPlugin("cbor", needs("cbor_that_nobody_has.decoder"))
                yield SerializerPlugin("ours", needs("farpoint.no_such_module"))
                yield SerializerPlugin("sick", lambda _: 1 / 0)  # type: ignore[arg-type,return-value]

        manager = PluginManager(discover=False)
        manager.register(Plugin())
        with pytest.raises(PluginError, match="it needs cbor_that_nobody_has, which is not installed") as caught:
            manager.serializer("cbor", DEFAULT_LIMITS)
        assert caught.value.fix == "pip install cbor_that_nobody_has"
        with pytest.raises(PluginError, match="could not be made: ModuleNotFoundError") as caught:
            manager.serializer("ours", DEFAULT_LIMITS)
        assert "pip install" not in str(caught.value)
        with pytest.raises(PluginError, match="could not be made: ZeroDivisionError"):
            manager.serializer("sick", DEFAULT_LIMITS)

    def test_a_transport_is_made_once_and_outlives_registrations(self) -> None:
        made = plugins.transport("virtual://x")

        class Plugin:
            pass

        plugin = Plugin()
        plugins.register(plugin)
        assert plugins.transport("virtual://y") is made
        plugins.unregister(plugin)
        assert plugins.transport("virtual://z") is made


class TestByHand:
    def test_register_and_unregister(self) -> None:
        class Plugin:
            @hookimpl
            def farpoint_stores(self) -> Any:
                yield StorePlugin("shelf", lambda worker: f"of {worker}")  # type: ignore[arg-type,return-value]

            @hookimpl
            def farpoint_operators(self) -> Any:
                yield OperatorPlugin("mylib", ("mylib::scale.default",))

        manager, plugin = PluginManager(discover=False), Plugin()
        manager.register(plugin, "shelves")
        assert manager.store("shelf", "bob") == "of bob"  # type: ignore[comparison-overlap]
        assert [record.name for record in manager.operators()] == ["mylib"]
        assert manager.distribution("shelves") == "registered by hand"
        with pytest.raises(PluginError, match="already registered"):
            manager.register(plugin, "shelves")
        assert manager.store_names() == ["shelf"], "the first registration stands"
        manager.unregister(plugin)
        assert manager.store_names() == []

    def test_mistakes_are_errors_at_once_and_leave_nothing(self) -> None:
        class Misspelt:
            @hookimpl
            def farpoint_transprots(self) -> Any:
                return []

        class Argued:
            @hookimpl
            def farpoint_stores(self, nonsense: int) -> Any:
                return []

        manager = PluginManager(discover=False)
        with pytest.raises(PluginError, match="did you mean farpoint_transports") as caught:
            manager.register(Misspelt())
        assert caught.value.name == "Misspelt"
        argued = Argued()
        for _ in range(2):
            with pytest.raises(PluginError, match=r"nonsense.*can not be found in the hookspec"):
                manager.register(argued, "argued")
        assert manager.provided() == [] and problems(manager) == []


HOOKS = [name for name in vars(hookspecs) if name.startswith("farpoint_")]


class TestDocumentation:
    @pytest.fixture
    def page(self) -> str:
        return DOCS.read_text()

    def test_every_hook_has_a_section_that_says_when_it_is_called(self, page: str) -> None:
        sections = re.findall(r"^### `(farpoint_\w+)\((.*)\)`$", page, re.MULTILINE)
        expected = [(name, ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)) for name in HOOKS]
        assert sorted(sections) == sorted(expected)
        for name in HOOKS:
            text = page.partition(f"### `{name}(")[2].partition("\n### ")[0]
            assert "Called " in text and "```python" in text

    def test_the_examples_of_the_page_and_of_the_docstrings_are_plugins(self, page: str) -> None:
        examples = [text for text in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "@hookimpl" in text]
        for name in HOOKS:
            indented = (getattr(hookspecs, name).__doc__ or "").split("Example::\n")[1]
            examples.append("\n".join(line[8:] for line in indented.splitlines()))
        assert len(examples) >= 2 * len(HOOKS)
        implemented = set()
        for number, example in enumerate(examples):
            namespace: dict[str, Any] = {}
            exec(compile(example, f"example {number}", "exec"), namespace)  # noqa: S102 (it is our own text)
            plugin = type("Example", (), {name: staticmethod(v) for name, v in namespace.items() if name.startswith("farpoint_")})
            manager = PluginManager(discover=False)
            manager.register(plugin, "example")
            implemented |= {name for name in vars(plugin) if name.startswith("farpoint_")}
        assert implemented == set(HOOKS)

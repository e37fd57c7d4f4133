"""The command `farpoint`: quick help, clear mistakes, honest exit codes."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import farpoint
from farpoint import LocalCluster, PluginError, about
from farpoint.limits import Limits
from farpoint.plugins import plugins
from farpoint.serializer import Serializer
from farpoint_cli import app, ping
from farpoint_cli.doctor import DEPENDENCIES
from strangers import SERIALIZER, environment, install

COMMANDS = ("tutorial", "worker", "ping", "certs", "plugins", "doctor")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts as one line, without colours and frames of a terminal that is not there."""
    for name in ("FARPOINT_SERIALIZER", "FARPOINT_STORE", "FARPOINT_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "400")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def spawn(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which finds what is installed in a folder."""
    return subprocess.run(
        [sys.executable, "-c", "import farpoint_cli; farpoint_cli.main()", *words],
        env=environment(root, TERM="dumb", COLUMNS="400", **variables),
        capture_output=True,
        text=True,
        check=False,
    )


class TestHelp:
    @pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS), ["--version"], ["tutorail"]])
    def test_it_does_not_import_torch(self, words: list[str]) -> None:
        script = (
            "import sys, farpoint_cli\n"
            f"try:\n    farpoint_cli.app({words!r})\n"
            "except SystemExit:\n    sys.exit('torch' in sys.modules or 'farpoint' in sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    def test_it_lists_every_command(self) -> None:
        result = invoke("--help")
        assert result.exit_code == 0
        assert all(re.search(rf"\b{command}\b", result.output) for command in COMMANDS)

    def test_version(self) -> None:
        result = invoke("--version")
        assert (result.exit_code, result.output) == (0, f"farpoint {importlib.metadata.version('farpoint')}\n")


class TestTutorial:
    @pytest.mark.parametrize("words", [[], ["--serializer", "torch"], ["--serializer", "msgpack"]])
    def test_it_runs(self, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        chosen = []
        original = plugins.serializer

        def make(name: str, limits: Limits) -> Serializer:
            chosen.append(name)
            return original(name, limits)

        monkeypatch.setattr(plugins, "serializer", make)
        result = invoke("tutorial", *words)
        assert result.exit_code == 0 and "tensor([ 2,  4,  6,  8, 10])" in result.output
        assert chosen[-1] == (words[-1] if words else "msgpack")

    def test_an_error_is_a_line_and_no_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise farpoint.WorkerLostError("bob", "broken on purpose")

        monkeypatch.setattr("farpoint.tutorial.run", fail)
        result = invoke("tutorial")
        assert result.exit_code == 1 and result.output.startswith("farpoint tutorial: bob cannot be reached")
        assert result.output.count("\n") == 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["tutorail"], "No such command 'tutorail'"),
            (["tutorial", "--serialiser", "torch"], "No such option.*--serialiser"),
            (["tutorial", "--serializer", "morse"], r"serializer 'morse': no installed plugin provides it\. Available: msgpack, torch"),
            (["tutorial", "--serializer", "msgpck"], "type 'msgpack' if that is meant"),
            (["plugins", "msgpack"], "unexpected extra argument"),
            (["doctor", "--fast"], "No such option.*--fast"),
            (["ping"], "Missing argument 'URL'"),
            (["ping", "tls://127.0.0.1:1", "--ca", "nowhere.pem"], "'nowhere.pem' does not exist"),
            (["ping", "tcp://127.0.0.1:1", "--count", "0"], "--count"),
            (["tutorial", "--workers", "tcp://127.0.0.1:1"], "requires 2 arguments"),
        ],
    )
    def test_unknown_names(self, words: list[str], complaint: str) -> None:
        result = invoke(*words)
        assert result.exit_code == 2
        assert re.search(complaint, result.output), result.output
        assert "Traceback" not in result.output

    def test_an_unknown_name_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FARPOINT_SERIALIZER", "morse")
        result = invoke("tutorial")
        assert result.exit_code == 2 and "FARPOINT_SERIALIZER: serializer 'morse'" in result.output


class TestPlugins:
    def test_it_lists_kind_name_and_distribution(self) -> None:
        result = invoke("plugins")
        own = f"farpoint {importlib.metadata.version('farpoint')}"
        rows = [re.split(r"\s{2,}", line) for line in result.output.splitlines()]
        assert result.exit_code == 0 and rows == sorted(rows)
        for kind, name in (("serializer", "msgpack"), ("serializer", "torch"), ("store", "memory"), ("transport", "virtual")):
            assert [kind, name, own] in rows

    def test_it_shows_what_is_broken(self, tmp_path: Path) -> None:
        install(tmp_path, "farpoint-ruin", "strange_ruin", "raise ValueError('broken on purpose')")
        install(tmp_path, "farpoint-void", "strange_void", SERIALIZER.format(name=""))
        install(tmp_path, "farpoint-a", "strange_a", SERIALIZER.format(name="morse"))
        install(tmp_path, "farpoint-b", "strange_b", SERIALIZER.format(name="morse"))
        install(
            tmp_path,
            "farpoint-strict",
            "strange_policy",
            "from farpoint.plugins import hookimpl\n@hookimpl\ndef farpoint_authorize(action): return True",
        )
        done = spawn(tmp_path, "plugins")
        assert (done.returncode, done.stderr) == (0, "")
        for expected in (
            r"^serializer +morse +farpoint-a 1\.0$",
            r"^serializer +morse +farpoint-b 1\.0$",
            r"^policy +strange_policy +farpoint-strict 1\.0$",
            r"^broken +plugin 'strange_ruin': .*ValueError: broken on purpose.*uninstall farpoint-ruin 1\.0",
            r"^broken +plugin 'strange_void': .*not empty",
            r"^broken +serializer 'morse': more than one plugin provides it: strange_a of farpoint-a 1\.0 and strange_b of",
        ):
            assert re.search(expected, done.stdout, re.MULTILINE), (expected, done.stdout)
        sick = spawn(tmp_path, "doctor")
        assert sick.returncode == 1 and "all is well" not in sick.stdout
        assert sick.stderr.count("broken on purpose") == 1 and sick.stderr.count("more than one plugin") == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with farpoint.local_cluster("bob", "alice") as made:
        for worker in made.values():
            worker.close()  # or the commands, in this process, would find us connected
        yield made


class TestWorkers:
    def test_ping(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FARPOINT_TOKEN", cluster.token)
        url = cluster.urls["bob"]
        result = invoke("ping", url, "--count", "3")
        about = f"bob at {url}: farpoint {farpoint.__version__}, torch {torch.__version__}"
        assert result.exit_code == 0 and result.output.splitlines()[0] == about
        [(least, median)] = re.findall(r"^3 round trips: min ([\d.]+) ms, median ([\d.]+) ms$", result.output, re.MULTILINE)
        assert 0 < float(least) <= float(median)

    def test_ping_that_is_not_answered(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FARPOINT_TOKEN", raising=False)
        for words, code, complaint in (
            ([cluster.urls["bob"]], 1, "does not let us in"),
            ([cluster.urls["bob"], "--token", "a wrong one"], 1, "does not let us in"),
            (["tcp://127.0.0.1:1"], 1, "Connection refused"),
            (["morse://bob"], 2, "no installed plugin"),
        ):
            result = invoke("ping", *words)
            assert result.exit_code == code and complaint in result.output and result.output.count("\n") == 1, result.output
            assert result.output.startswith("farpoint ping: ")

    def test_doctor(self, cluster: LocalCluster) -> None:
        result = invoke("doctor", *cluster.urls.values(), "--token", cluster.token)
        assert result.exit_code == 0 and result.output.endswith("all is well\n"), result.output
        for name, url in cluster.urls.items():
            assert re.search(rf"^worker +{name} +{url}, farpoint .*, torch .*, [\d.]+ ms$", result.output, re.MULTILINE)

    def test_doctor_and_a_worker_with_another_torch(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(about.VERSIONS, "torch", "1.13.0+cpu")
        result = invoke("doctor", cluster.urls["bob"], "--token", cluster.token)
        theirs = f"bob at {cluster.urls['bob']} has torch {torch.__version__}, and 1.13.0+cpu is here"
        assert result.exit_code == 1 and theirs in result.output and "has farpoint" not in result.output

    def test_doctor_and_another_build_of_the_same_torch(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(about.VERSIONS, "torch", torch.__version__.partition("+")[0] + "+cu999")
        assert invoke("doctor", cluster.urls["bob"], "--token", cluster.token).exit_code == 0

    def test_doctor_and_nobody(self) -> None:
        result = invoke("doctor", "tcp://127.0.0.1:1")
        assert result.exit_code == 1 and "Connection refused" in result.output and "all is well" not in result.output

    def test_tutorial(self, cluster: LocalCluster) -> None:
        result = invoke("tutorial", "--workers", *cluster.urls.values(), "--token", cluster.token)
        assert result.exit_code == 0 and "tensor([ 2,  4,  6,  8, 10])" in result.output
        refused = invoke("tutorial", "--workers", *cluster.urls.values())
        assert refused.exit_code == 1 and refused.output.startswith("farpoint tutorial: tcp://127.0.0.1:")

    def test_versions_that_one_would_not_print(self) -> None:
        welcome = {"farpoint": "1.0\x1b[2J", "torch": 2.13}
        assert about.read_versions(welcome) == {} and ping.tell({}) == "versions unknown"
        assert about.read_versions({"torch": "2.13.0+cpu"}) == {"torch": "2.13.0+cpu"}


class TestDoctor:
    def test_a_healthy_installation(self) -> None:
        result = invoke("doctor")
        assert result.exit_code == 0 and result.output.endswith("all is well\n"), result.output
        for line in (
            rf"^farpoint +{re.escape(importlib.metadata.version('farpoint'))}$",
            rf"^torch +{re.escape(importlib.metadata.version('torch'))}$",
            rf"^python +{re.escape('.'.join(map(str, sys.version_info[:3])))} +{re.escape(sys.executable)}$",
            rf"^imported +{re.escape(str(Path(farpoint.__file__).parent))}$",
            r"^serializer +msgpack +farpoint ",
        ):
            assert re.search(line, result.output, re.MULTILINE), (line, result.output)

    def test_it_names_every_dependency(self) -> None:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
        required = {re.split(r"[^\w-]", text)[0] for text in project["project"]["dependencies"]}
        assert {"torch", *DEPENDENCIES} == required

    def test_a_plugin_that_cannot_be_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise PluginError("serializer", "torch", "it needs cbor2, which is not installed", fix="pip install cbor2")

        monkeypatch.setattr(plugins, "serializer", fail)
        result = invoke("doctor")
        assert result.exit_code == 1 and "pip install cbor2" in result.output and "all is well" not in result.output

    def test_names_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FARPOINT_STORE", "shelf")
        result = invoke("doctor")
        assert result.exit_code == 1 and "FARPOINT_STORE=shelf: the names are memory" in result.output

    def test_a_dependency_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("farpoint_cli.doctor.DEPENDENCIES", ("a-distribution-that-nobody-has",))
        result = invoke("doctor")
        assert result.exit_code == 1 and "pip install a-distribution-that-nobody-has" in result.output

    def test_a_torch_that_cannot_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
        done = spawn(tmp_path, "doctor")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "farpoint cannot be imported: ImportError: libtorch.so: cannot open shared object file" in done.stderr
        assert torch.__file__ != str(tmp_path / "torch.py")

"""What README.md tells a newcomer to type is what is checked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from farpoint.protocol.messages import Kind

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"

TUTORIAL = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]' && .venv/bin/farpoint tutorial"
TEST = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[dev]' && .venv/bin/python -m pytest"

pytestmark = pytest.mark.skipif(
    not (README.exists() and CI.exists()), reason="README.md and .ci/run are in the repository only"
)


def test_there_are_exactly_two_commands() -> None:
    blocks = re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert [block.strip() for block in blocks] == [TUTORIAL, TEST]


def test_each_command_stands_between_its_markers() -> None:
    marked = re.findall(r"^<!-- (\w+) -->\n```sh\n(.*)\n```\n<!-- end -->$", README.read_text(), re.MULTILINE)
    assert marked == [("tutorial", TUTORIAL), ("test", TEST)]


def test_ci_runs_the_marked_command() -> None:
    script = CI.read_text()
    [extraction] = re.findall(r"^command=\$\((.*)\)$", script, re.MULTILINE)
    assert 'bash -euo pipefail -c "$command"' in script
    done = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TEST


def test_every_installation_passes_the_constraints() -> None:
    installations = [line for line in CI.read_text().splitlines() if "pip" in line and " install " in line]
    assert installations
    assert all("-c constraints.txt" in line for line in installations)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(example, str(README), "exec"), {"__name__": "example"})  # noqa: S102 (it is our own text)
    assert capsys.readouterr().out.endswith("tensor([2, 4, 6, 8])\n")


@pytest.mark.parametrize("name", ["workers.md", "training.md", "operations.md"])
def test_the_examples_in_the_docs_run(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    namespace = {"__name__": "example"}
    for example in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(example, name, "exec"), namespace)  # noqa: S102 (it is our own text)


def test_the_protocol_page_lists_every_message() -> None:
    rows = re.findall(r"^\| ([A-Z]+) \| (\d+) \|", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE)
    assert {name: int(number) for name, number in rows} == {kind.name: kind.value for kind in Kind}


def test_links_between_pages_lead_somewhere() -> None:
    for page in [README, *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)

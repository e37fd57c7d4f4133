"""Distributions of strangers, made on disk as pip would leave them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

SERIALIZER = """
from farpoint.plugins import SerializerPlugin, hookimpl

def make(limits):
    from farpoint_msgpack.serializer import MsgpackSerializer
    return MsgpackSerializer(limits)

@hookimpl
def farpoint_serializers():
    yield SerializerPlugin(name="{name}", factory=make)
"""


def install(root: Path, distribution: str, module: str, source: str, version: str = "1.0") -> None:
    """Write a distribution with one module, which is announced in the entry point group `farpoint`.

    Args:
        root: A folder for `sys.path`.
        distribution: Its name.
        module: Name of the module, and of the entry point.
        source: The module.
        version: Its version.
    """
    (root / f"{module}.py").write_text(textwrap.dedent(source))
    info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[farpoint]\n{module} = {module}\n")


def environment(root: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process that finds what is installed in a folder."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FARPOINT_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **variables}

"""Which farpoint this is, and with which torch: what a worker tells in its welcome."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch

__version__ = "0.1.0"

VERSIONS: Final = {"farpoint": __version__, "torch": str(torch.__version__)}
_VERSION: Final = re.compile(r"[\w.+!-]{1,64}", re.ASCII)


def read_versions(welcome: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions in a welcome: those that are there, and that one may print."""
    found = {name: welcome.get(name) for name in VERSIONS}
    return {name: text for name, text in found.items() if isinstance(text, str) and _VERSION.fullmatch(text)}

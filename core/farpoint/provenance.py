"""Which line of the user's an operation came from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import CodeType
from typing import Final

import torch

# Whole directories, not names: a user's own folder may be called farpoint too.
_PACKAGES: Final = tuple(str(Path(package).parent) + os.sep for package in (torch.__file__, __file__))
# By file, not by code object: the hash of one covers all of its constants, and is computed anew each time.
_ours: dict[str, bool] = {}

Place = tuple[CodeType | None, int]
"""Code and the offset of an instruction in it. What line that is, is found out when somebody asks."""
NOWHERE: Final[Place] = (None, 0)
Origin = tuple[CodeType | int | tuple[Place, ...] | None, int]
"""Where a command came from: a place, or a session and the number of the command in it, if it was passed on; of a plan, a place
for each of its steps.

Thousands are kept. Tuples of such values the garbage collector lets go at its first look; with objects in them, each few
thousand commands would cost a full collection."""


def caller(depth: int = 1) -> Place:
    """Return the place of the nearest caller that is neither torch nor farpoint.

    Args:
        depth: How many frames, this function's own included, need not be looked at.
    """
    frame = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        ours = _ours.get(name)
        if ours is None:
            ours = _ours[name] = name.startswith(_PACKAGES)
        if not ours:
            return code, frame.f_lasti
        frame = frame.f_back  # type: ignore[assignment]
    return NOWHERE


def raised_at(error: BaseException) -> Place:
    """Return the innermost place in the traceback of an error that is neither torch nor farpoint."""
    found, trace = NOWHERE, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_PACKAGES):
            found = (code, trace.tb_lasti)
        trace = trace.tb_next
    return found


def locate(origin: Origin) -> tuple[str, int]:
    """Return file and line of a place; no file if it is none."""
    code, offset = origin
    if not isinstance(code, CodeType):
        return "", 0
    line = next((line for start, end, line in code.co_lines() if start <= offset < end and line), code.co_firstlineno)
    return code.co_filename, line


def spell(origin: Origin) -> str:
    """Return a place as `file:line`, or nothing if it is none."""
    file, line = locate(origin)
    return f"{file}:{line}" if file else ""

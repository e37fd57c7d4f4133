"""Runs entries of the databases, here and through pointers, and says how they fared."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opinfo.comparing import DifferenceError, RoundingError, compare
from opinfo.exceptions import LISTED, ROUNDED
from opinfo.places import Place, copies, seed

DTYPES: Final = (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)
LOOKED_AT: Final = 64
"""Samples of an entry that are considered: some entries have hundreds, from which a few are taken."""


class _Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing, as a subclass that does nothing: torch asks for either in the same words."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Outcome(enum.Enum):
    """How an entry fared in a column."""

    PASSED = "passed"
    LISTED = "listed exception"
    FAILED = "failed"
    WRONG = "silently wrong"
    ABSENT = "not run by local torch"


@attrs.frozen
class Result:
    """How an entry fared, and the first line about it if that was not well."""

    entry: str
    outcome: Outcome
    text: str = ""


@attrs.frozen
class Trial:
    """One call, made here and through pointers.

    Attributes:
        structure: Its arguments.
        call: Makes it of a copy of them, and returns everything that shall be the same.
    """

    structure: Any
    call: Callable[[Any], Any]


def spread(items: Iterator[Any], count: int) -> list[Any]:
    """Return some items, evenly spread."""
    known = list(itertools.islice(items, LOOKED_AT))
    count = min(count, len(known))
    return [known[i * (len(known) - 1) // max(count - 1, 1)] for i in range(count)]


def run(column: str, entry: str, trials: Iterator[Trial], place: Place) -> Result:
    """Run an entry.

    Args:
        column: The column.
        entry: Name of the entry.
        trials: Calls of it.
        place: Where the pointers lead.
    """
    ran = 0
    listed = LISTED.get((column, entry))
    raised = ""
    for trial in trials:
        local = copies(trial.structure, torch.clone)
        try:
            seed()
            expected = trial.call(local)
        except Exception:  # noqa: S112  # not for us, then
            continue
        ran += 1
        try:
            remote = copies(trial.structure, place.send)
            seed()
            found = trial.call(remote)
            base = entry.partition(".")[0]
            try:
                compare(base, expected, found, place)
            except RoundingError:
                if entry in ROUNDED:
                    continue
                # Below subclasses torch takes other routes by itself: what it returns there is what counts, to the bit.
                seed()
                with _Below():  # type: ignore[no-untyped-call]
                    other = trial.call(copies(trial.structure, torch.clone))
                compare(base, other, found, place)
        except DifferenceError as error:
            return Result(entry, Outcome.WRONG, str(error))
        except Exception as error:
            place.settle()
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            if listed is None:
                return Result(entry, Outcome.FAILED, text)
            if type(error) is not listed.error:
                return Result(entry, Outcome.FAILED, f"{listed.error.__name__} was expected, not {text}")
            raised = text
    if not ran:
        return Result(entry, Outcome.ABSENT)
    if listed is None:
        return Result(entry, Outcome.PASSED)
    if not raised:
        return Result(entry, Outcome.FAILED, f"it passed, and is listed to raise {listed.error.__name__}")
    return Result(entry, Outcome.LISTED, raised)


def gradients(outputs: Any, inputs: Any, send: Callable[[torch.Tensor], Any]) -> Any:
    """Return the gradients of the inputs, for output gradients that are drawn with a seed."""
    outs = [out for out in pytree.tree_leaves(outputs) if isinstance(out, torch.Tensor) and out.requires_grad]
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(out.shape, dtype=out.dtype, generator=generator) for out in outs]
    return torch.autograd.grad(outs, leaves, [send(one) for one in seeds], allow_unused=True)

"""The columns of the table: what is run of each database, and over how many workers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import attrs
import torch

import farpoint
from opinfo.exceptions import LISTED
from opinfo.modules import EVALUATION, TRAINING, modules
from opinfo.optimizers import optimizers
from opinfo.optimizers import trials as optimizer_trials
from opinfo.places import Place, seed
from opinfo.running import DTYPES, LOOKED_AT, Result, Trial, gradients, run, spread


@attrs.frozen
class Column:
    """One column.

    Attributes:
        name: What the command line calls it.
        hops: How many workers a pointer leads over.
        entries: Returns the entries of the database by name.
        trials: Yields calls of an entry.
    """

    name: str
    hops: int
    entries: Callable[[], dict[str, Any]]
    trials: Callable[[Any, int, Place], Iterator[Trial]]

    def run(self, chosen: Callable[[int, str], bool], samples: int) -> Iterator[Result]:
        """Yield the result of each entry that was chosen, by its place in the database and its name."""
        with Place(self.hops) as place:
            for number, (name, info) in enumerate(self.entries().items()):
                if chosen(number, name):
                    # A listed exception may be one sample's: all are looked at, so that the list stays true.
                    count = LOOKED_AT if (self.name, name) in LISTED else samples
                    seed()
                    yield run(self.name, name, self.trials(info, count, place), place)


def matches(patterns: list[str]) -> Callable[[int, str], bool]:
    """Return what chooses the entries of such names, all if there are none."""
    return lambda _, name: not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _operations() -> dict[str, Any]:
    from torch.testing._internal import common_methods_invocations as database

    # Some entries draw with a seed of their own and put the generator back, long before a worker gets to see the command.
    vars(database)["wrapper_set_seed"] = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name: info for info in database.op_db}


def _samples(info: Any, count: int, requires_grad: bool) -> Iterator[Any]:
    supported = info.supported_backward_dtypes("cpu") if requires_grad else info.supported_dtypes("cpu")
    dtypes = [dtype for dtype in DTYPES if dtype in supported]
    # Complex ones besides, for what they do with the conj bit.
    for dtype in {dtypes[0]: None, dtypes[-1]: None} if dtypes and dtypes[-1].is_complex else dtypes[:1]:
        try:
            yield from spread(info.sample_inputs("cpu", dtype, requires_grad=requires_grad), count)
        except Exception:  # noqa: S112  # some want a library that is not there, or a device
            continue


def _forward(info: Any, count: int, place: Place) -> Iterator[Trial]:
    for sample in _samples(info, count, requires_grad=False):

        def call(structure: Any) -> Any:
            first, args, kwargs = structure
            result = info.op(first, *args, **kwargs)
            return result, first  # which it may have written to

        yield Trial((sample.input, sample.args, sample.kwargs), call)


def _backward(info: Any, count: int, place: Place) -> Iterator[Trial]:
    if not info.supports_autograd:
        return
    for sample in _samples(info, count, requires_grad=True):

        def call(structure: Any, finish: Callable[[Any], Any] = sample.output_process_fn_grad) -> Any:
            first, args, kwargs = structure
            result = finish(info.op(first, *args, **kwargs))
            return result, gradients(result, structure, partial(_beside, structure, place))

        yield Trial((sample.input, sample.args, sample.kwargs), call)


def _beside(structure: Any, place: Place, tensor: torch.Tensor) -> Any:
    from torch.utils import _pytree as pytree

    there = any(isinstance(leaf, farpoint.PointerTensor) for leaf in pytree.tree_leaves(structure))
    return place.send(tensor) if there else tensor


COLUMNS: Final[dict[str, Column]] = {
    column.name: column
    for column in (
        Column("forward", 1, _operations, _forward),
        Column("backward", 1, _operations, _backward),
        Column("chain", 2, _operations, _forward),
        Column("train", 1, modules, TRAINING),
        Column("eval", 1, modules, EVALUATION),
        Column("optimizers", 1, optimizers, optimizer_trials),
    )
}

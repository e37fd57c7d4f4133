"""Modules whose parameters and buffers are pointers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import farpoint
from opinfo.places import Place, copies, seed
from opinfo.running import DTYPES, Trial, gradients, spread


def modules() -> dict[str, Any]:
    """Return the entries of torch's database of modules, by name."""
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db}


def trials(info: Any, count: int, place: Place, *, training: bool) -> Iterator[Trial]:
    """Yield calls of a module, forward and backward, with what they do to its buffers."""
    dtypes = [dtype for dtype in DTYPES if dtype in info.supported_dtypes("cpu")]
    inputs = info.module_inputs_func(info, "cpu", dtypes[0], True, training)
    for given in spread(iter(inputs), count):
        if given.forward_input is None:
            continue
        made = given.constructor_input
        seed()
        module = info.module_cls(*made.args, **{"dtype": dtypes[0], **made.kwargs} if _takes_dtype(info) else made.kwargs)
        module.train(training)

        def call(structure: Any, module: nn.Module = module) -> Any:
            args, kwargs = structure
            there = any(isinstance(leaf, farpoint.PointerTensor) for leaf in pytree.tree_leaves(structure))
            twin = _copy(module, place.send if there else torch.clone)
            result = twin(*args, **kwargs)
            leaves = [structure, list(twin.parameters())]
            after = gradients(result, leaves, place.send if there else torch.clone)
            return result, after, dict(twin.named_buffers())

        yield Trial((given.forward_input.args, given.forward_input.kwargs), call)


def _takes_dtype(info: Any) -> bool:
    from inspect import signature

    return "dtype" in signature(info.module_cls).parameters


def _copy(module: nn.Module, send: Callable[[torch.Tensor], Any]) -> nn.Module:
    """Return a copy of a module with its parameters and buffers copied by `send`, shared ones shared."""
    twin = copy.deepcopy(module)
    known: dict[int, Any] = {}

    def moved(tensor: torch.Tensor) -> Any:
        if id(tensor) not in known:
            known[id(tensor)] = copies(tensor, send)
            if isinstance(tensor, nn.Parameter):
                known[id(tensor)] = nn.Parameter(known[id(tensor)].detach(), tensor.requires_grad)
        return known[id(tensor)]

    for part in twin.modules():
        for place in (part._parameters, part._buffers):
            place.update({name: moved(tensor) for name, tensor in place.items() if tensor is not None})
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    return twin


TRAINING = partial(trials, training=True)
EVALUATION = partial(trials, training=False)

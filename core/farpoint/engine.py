"""Runs of the autograd engine that begin at pointers: what they call of the user's meets the gate, as everything else does.

Torch takes `backward` and `grad` of a subclass through `__torch_function__`, and below that it would leave `__torch_function__` out,
also in all that the engine calls on its way: hooks, custom functions and what is recomputed. There a local tensor could meet a
pointer, and torch's C++ could read a pointer's shell. So the engine is run from above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.autograd import _make_grads, _tensor_or_tensors_to_tuple
from torch.autograd.graph import _engine_run_backward

CALLS: Final[dict[Any, Callable[..., Any]]] = {}
"""Functions of torch that run the engine, and what is done instead, with the arguments that `__torch_function__` gets."""


def _of_tensor(
    tensor: Any, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


def _backward(tensors: Any, *, grad_tensors: Any, retain_graph: bool | None, create_graph: bool, inputs: Any) -> None:
    _run(tensors, grad_tensors, retain_graph, create_graph, inputs or (), allow_unreachable=True, accumulate_grad=True)


def _grad(
    outputs: Any,
    inputs: Any,
    *,
    grad_outputs: Any,
    retain_graph: bool | None,
    create_graph: bool,
    allow_unused: bool,
    is_grads_batched: bool,
    materialize_grads: bool,
    **others: Any,
) -> Any:
    if is_grads_batched or materialize_grads:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.autograd.grad(
                outputs,
                inputs,
                grad_outputs,
                retain_graph,
                create_graph,
                allow_unused=allow_unused,
                is_grads_batched=is_grads_batched,
                materialize_grads=materialize_grads,
                **others,
            )
    return _run(outputs, grad_outputs, retain_graph, create_graph, inputs, allow_unused, accumulate_grad=False)


def _run(outputs: Any, gradients: Any, retain_graph: bool | None, create_graph: bool, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    given = _make_grads(outputs, _tensor_or_tensors_to_tuple(gradients, len(outputs)), is_grads_batched=False)
    kept = create_graph if retain_graph is None else retain_graph
    return _engine_run_backward(outputs, given, kept, create_graph, inputs, *args, **kwargs)


CALLS.update({torch.Tensor.backward: _of_tensor, torch.autograd.backward: _backward, torch.autograd.grad: _grad})

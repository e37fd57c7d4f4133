"""Recurrent layers on pointers: `nn.LSTM`, `nn.GRU` and `nn.RNN` make their first state here, and are to work as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from farpoint import gate

if TYPE_CHECKING:
    from farpoint.pointer import PointerTensor

CALLS: Final[frozenset[Any]] = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
"""What these layers call."""

_lock = threading.Lock()
_depth = 0
_before = True


def call(pointers: type[PointerTensor], func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Call one of `CALLS`, with a state of zeros that is here replaced by one where the input is.

    Zeros say nothing but their shape, which is that of the layer. A local state of other values is the user's, and is refused as
    any other local tensor is.

    Args:
        pointers: The class of pointers.
        func: What is called.
        args: Its positional arguments: the input, the state, the weights and more.
        kwargs: Its arguments by name.
    """
    if len(args) > 2 and type(args[0]) is pointers:
        args = [args[0], _placed(pointers, args[0], args[1]), *args[2:]]
    gate.check(pointers, func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass(), _without_onednn():
        return func(*args, **kwargs or {})


def _placed(pointers: type[PointerTensor], source: PointerTensor, state: Any) -> Any:
    if isinstance(state, list | tuple):
        return [_placed(pointers, source, part) for part in state]
    if not isinstance(state, torch.Tensor) or type(state) is pointers or state.requires_grad or bool(state.any()):
        return state
    return source.new_zeros(state.shape, dtype=state.dtype)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Let torch take its own formulas: oneDNN's fused layer keeps a workspace of bytes, which no worker takes from a peer.

    The switch is one for the process. On another thread a local layer may meanwhile take torch's own formulas as well.
    """
    global _depth, _before  # noqa: PLW0603  # as the switch is
    with _lock:
        if not _depth:
            _before = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                torch._C._set_mkldnn_enabled(_before)

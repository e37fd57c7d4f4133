"""Tensors that begin on a worker: `with farpoint.on(bob): torch.randn(3)`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from farpoint.errors import PointerError, QuotaError
from farpoint.forecast import count_elements
from farpoint.handover import send
from farpoint.operations import of
from farpoint.pointer import PointerTensor, dispatch
from farpoint.remote import RemoteWorker, resolve
from farpoint.route import Route, route_of
from farpoint.worker import Worker

_THERE: Final[frozenset[Any]] = frozenset({
    *(torch.arange, torch.empty, torch.empty_permuted, torch.empty_strided, torch.eye, torch.full, torch.linspace),
    *(torch.normal, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.zeros),
    *(torch.bartlett_window, torch.blackman_window, torch.hamming_window, torch.hann_window, torch.kaiser_window),
    *(torch.fft.fftfreq, torch.fft.rfftfreq, torch.logspace, torch.tril_indices, torch.triu_indices),
})
"""What runs on the worker."""

_HERE: Final[frozenset[Any]] = frozenset({torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.tensor})
"""What is made here and sent, for the values are here."""

_READERS: Final = ("torch.optim.", "torch.utils.data.")
"""Modules of torch that read a number of what they make: step counters, seeds and permutations stay here."""


class on(TorchFunctionMode):  # noqa: N801  # read as a statement: with farpoint.on(bob)
    """Let new tensors begin on a worker, as `torch.device` as a context lets them begin on a device.

    `torch.zeros`, `ones`, `full`, `empty`, `eye`, `arange`, `linspace`, `rand`, `randn`, `randint`, `randperm`, `normal` and
    the windows return pointers, and run on the worker, with the worker's random generator. `torch.tensor`, `as_tensor` and `asarray`
    are made here and sent. Modules that are built inside have their parameters there.

    It holds for the calls of this thread, nests, and may be entered again. What follows a tensor is where that tensor is:
    `zeros_like` and `x.new_zeros` of a local tensor are local. So is what is made with `out=` or for another device than the CPU,
    and what the optimizers and data loaders of torch make for themselves. Inside, `farpoint.on(farpoint.me())` is what it is outside.

    Args:
        worker: Where, as a handle or by name. It is a worker and not a chain: `send` what it makes on.

    Raises:
        WorkerNotFoundError: Nobody of that name is known.
        PointerError: It is no worker.

    Example::

        with farpoint.on(bob):
            x = torch.randn(32, 10)
            model = torch.nn.Linear(10, 2)
        model(x).get()
    """

    def __init__(self, worker: RemoteWorker | Worker | str) -> None:
        super().__init__()
        if not isinstance(worker, RemoteWorker | Worker | str):
            raise PointerError(f"farpoint.on takes a worker or its name, and this is a {type(worker).__name__}")
        self._worker = None if worker == "me" or isinstance(worker, Worker) else resolve(worker)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _THERE and func not in _HERE or _is_elsewhere(func, args, kwargs):
            return func(*args, **kwargs)
        # Not for modes further out: the innermost worker is meant.
        with torch._C.DisableTorchFunction():
            module = str(sys._getframe(1).f_globals.get("__name__"))
            if self._worker is None or module.startswith(_READERS):
                return func(*args, **kwargs)
            if func in _HERE:
                made = func(*args, **kwargs)
                return made if isinstance(made, PointerTensor) else send(made, self._worker)
            if kwargs.get("generator") is not None:
                name = self._worker.id
                raise PointerError(f"{name} draws from a random generator of its own, not from one that is here: {name}.manual_seed(seed)")
            with Issue(route_of(self._worker.peer)):
                return func(*args, **kwargs)


def _is_elsewhere(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if kwargs.get("out") is not None or (device is not None and torch.device(device).type != "cpu"):
        return True
    return func is torch.normal and any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))


class Issue(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Issues what factories are, below autograd: `torch.randn(3, requires_grad=True)` is `aten::randn` and then a mark.

    Args:
        route: Where.
    """

    def __init__(self, route: Route) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._route = route

    def __torch_dispatch__(
        self, func: OpOverload[Any, Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if types:
            return func(*args, **kwargs or {})  # it is about pointers, and runs where they lead
        allowed, elements = self._route.peer.limits.bytes, count_elements(of(func).name, args)
        if elements > allowed:  # the worker would say so; but before it torch may try to make it here, to see what is wrong with it
            raise QuotaError(self._route.workers[0], "bytes", allowed, f"a tensor of {elements} elements")
        return dispatch(func, args, kwargs or {}, self._route)

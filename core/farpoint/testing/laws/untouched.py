"""L14: farpoint leaves torch alone."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from farpoint.testing.laws.network import Law

_SCRIPT = """
import json, sys, torch

MODULES = (("torch", torch), ("Tensor", torch.Tensor), ("Module", torch.nn.Module), ("Parameter", torch.nn.Parameter),
           ("Function", torch.autograd.Function), ("functional", torch.nn.functional), ("ops", torch.ops), ("C", torch._C))


def names():
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in MODULES}


def changed(before, after):
    return sorted(f"{name}.{key}" for name in before for key in before[name] if after[name].get(key) != before[name][key])


def added(before, after):
    return sorted(f"{name}.{key}" for name in before for key in set(after[name]) - set(before[name]))


def results():
    torch.manual_seed(1)
    x = torch.randn(5, 5, requires_grad=True)
    y = (x @ x.t()).softmax(1)[1:, ::2].clone().add_(1)
    y.sum().backward()
    return [type(y).__name__, repr(y), y.tolist(), x.grad.tolist(), y.__format__(""), str(y.device), hash(x) == id(x)]


# What torch itself loads late is not farpoint's doing.
import torch._subclasses.fake_tensor, torch.utils._python_dispatch, torch.utils._mode_utils, torch._functorch.apis
start, computed = names(), results()
start = names()
import farpoint
imported = names()
farpoint.TorchHook(torch)
hooked = names()
farpoint.TorchHook(torch)
again = names()
print(json.dumps({
    "import adds": added(start, imported), "import changes": changed(start, imported),
    "hook adds": added(imported, hooked), "hook changes": changed(imported, hooked),
    "again": added(hooked, again) + changed(hooked, again),
    "same results": results() == computed,
    "modes": torch.utils._python_dispatch._get_current_dispatch_mode() is None,
    "default": str(torch.get_default_dtype()),
}))
"""

_TAKEN = """
import torch
torch.Tensor.send = lambda self: "mine"
import farpoint
try:
    farpoint.TorchHook(torch)
except farpoint.FarpointError as error:
    print(torch.ones(1).send(), error)
"""


def _run(script: str) -> str:
    # A process of its own: here torch has been hooked, and pytest has its own plans with it.
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout  # noqa: S603  # our own text


@functools.cache
def _seen() -> Any:
    return json.loads(_run(_SCRIPT))


class TestL14FarpointLeavesTorchAlone(Law):
    """L14: importing farpoint patches nothing; `TorchHook(torch)` only adds methods."""

    def test_importing_changes_nothing(self) -> None:
        seen = _seen()
        assert seen["import adds"] == [] and seen["import changes"] == []

    def test_the_hook_only_adds_methods(self) -> None:
        seen = _seen()
        assert seen["hook adds"] == [
            *(f"Module.{name}" for name in ("copy", "get", "move", "send")),
            *(f"Tensor.{name}" for name in ("describe", "get", "move", "send", "tag")),
        ]
        assert seen["hook changes"] == [] and seen["again"] == []

    def test_local_tensors_are_as_they_were(self) -> None:
        seen = _seen()
        assert seen["same results"] and seen["modes"] and seen["default"] == "torch.float32"

    def test_a_method_that_exists_is_not_replaced(self) -> None:
        said = _run(_TAKEN)
        assert said.startswith("mine") and "Tensor.send" in said

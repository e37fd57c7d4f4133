"""L14: farpoint leaves torch alone."""

from __future__ import annotations

import json
import subprocess
import sys

_SCRIPT = """
import json, torch
def names():
    return {n: sorted(dir(m)) for n, m in (("torch", torch), ("Tensor", torch.Tensor), ("Module", torch.nn.Module))}
def slots():
    return [id(vars(torch.Tensor).get(n)) for n in ("__add__", "__repr__", "__torch_function__", "__getattribute__")]
before, kept = names(), slots()
import torch._subclasses.fake_tensor, torch.utils._python_dispatch, torch.utils._mode_utils
plain = names()
import farpoint
imported = names()
farpoint.TorchHook(torch)
hooked = names()
a = torch.ones(2)
print(json.dumps({
    "import": [n for k in plain for n in set(plain[k]) ^ set(imported[k])],
    "hook": sorted(n for k in hooked for n in set(hooked[k]) - set(imported[k])),
    "removed": [n for k in hooked for n in set(imported[k]) - set(hooked[k])],
    "same": kept == slots(),
    "type": type(a + a).__name__,
}))
"""


class TestL14FarpointLeavesTorchAlone:
    def test_names(self) -> None:
        run = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
        seen = json.loads(run.stdout)
        assert seen["import"] == [] and seen["removed"] == []
        assert seen["hook"] == ["describe", "get", "move", "send", "tag"]
        assert seen["same"] and seen["type"] == "Tensor"

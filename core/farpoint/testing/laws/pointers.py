"""L2: a pointer is a tensor."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from farpoint import PointerTensor
from farpoint.tensors import DTYPES
from farpoint.testing.laws.network import Law, Network, home, look, numbers, raised
from farpoint.testing.trees import LAYOUTS, sample

# Without annotations of their own, or without good ones.
F: Any = torch.nn.functional
T: Any = torch

TOGETHER: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda p, q: torch.cat([p, q]),
    "tuple": lambda p, q: torch.stack((p, q), dim=1),
    "list by name": lambda p, q: torch.cat(tensors=[p, q], dim=0),
    "by name": lambda p, q: torch.where(condition=p > 2, input=p, other=q),
    "many": lambda p, q: torch.cat([p, q] * 500),
    "index": lambda p, q: p[q.long() - 2],
    "tuple of indices": lambda p, q: torch.outer(p, q)[q.long() - 2, p.long() - 1],
    "slices": lambda p, q: torch.outer(p, q)[1:4:2, None, ..., -1],
    "mask": lambda p, q: p[q > 3],
    "einsum": lambda p, q: torch.einsum("i,j->ij", p, q),
    "meshgrid": lambda p, q: torch.meshgrid([p, q], indexing="ij"),
    "broadcast": lambda p, q: T.broadcast_tensors(p[None], q[:, None]),
    "out": lambda p, q: torch.add(p, 1, out=torch.zeros_like(q)),
    "multi_dot": lambda p, q: torch.linalg.multi_dot([p[None], q[:, None], p[None]]),
    "foreach": lambda p, q: torch._foreach_add([p, q], [q, p]),
    "sum of a list": lambda p, q: sum([p, q]),
    "rows": lambda p, q: list(torch.stack([p, q])),
    "reversed": lambda p, q: list(reversed(p)),
    "unpacked": lambda p, q: functools.reduce(lambda a, b: a * b, [*p, *q]),
    "abs and pow": lambda p, q: abs(p) ** q - 2**p + q // 2 - 7 % p,
    "collate": lambda p, q: torch.utils.data.default_collate([(p, q), (q, p)]),
    "dataset": lambda p, q: torch.utils.data.TensorDataset(p, q)[1:3],
    "linear": lambda p, q: F.linear(p, torch.stack([q, q]), q[:2]),
    "cross entropy": lambda p, q: F.cross_entropy(p[None], q[:1].long()),
    "numpy numbers": lambda p, q: p * np.float32(2) + np.float64(2) * q + np.int64(3),
    "vmap": lambda p, q: torch.vmap(lambda a, b: a * b)(p, q),
    "as_tensor": lambda p, q: torch.as_tensor(p) + torch.asarray(q),
    "factories": lambda p, q: p.new_zeros(3) + torch.ones_like(q)[:3] + torch.full_like(p, 4.0)[:3],
}
"""Calls whose tensors are all pointers: they run there, and give what torch gives here."""

MIXED: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda p, x: torch.cat([p, x]),
    "list, local first": lambda p, x: torch.cat([x, p]),
    "tuple": lambda p, x: torch.stack((x, p)),
    "where, mask local": lambda p, x: torch.where(x > 2, p, p),
    "where, branch local": lambda p, x: torch.where(p > 2, p, x),
    "out local": lambda p, x: torch.add(p, p, out=x),
    "out there": lambda p, x: torch.add(x, x, out=p),
    "in place": lambda p, x: x.add_(p),
    "augmented": lambda p, x: x.__iadd__(p),
    "copy_": lambda p, x: x.copy_(p),
    "copy_ there": lambda p, x: p.copy_(x),
    "index": lambda p, x: x[p.long() - 1],
    "float index": lambda p, x: x[p],
    "mask": lambda p, x: x[p > 2],
    "tuple of indices": lambda p, x: x[None][0, p.long() - 1],
    "slice": lambda p, x: x[: p[0].long()],
    "0-dim index": lambda p, x: x[p[0].long()],
    "index there": lambda p, x: p[x.long() - 1],
    "mask there": lambda p, x: p[x > 2],
    "write": lambda p, x: x.__setitem__(0, p[0]),
    "write a slice": lambda p, x: x.__setitem__(slice(None), p),
    "write at a pointer": lambda p, x: x.__setitem__(p, 1),
    "write at an index": lambda p, x: x.__setitem__(p.long() - 1, 1),
    "write at a mask": lambda p, x: x.__setitem__(p > 2, 1),
    "write a mask there": lambda p, x: p.__setitem__(x > 2, 1),
    "write values there": lambda p, x: p.__setitem__(p > 2, x[2:]),
    "list to tensor": lambda p, x: torch.tensor([p[0], p[1]]),
    "rows to tensor": lambda p, x: torch.tensor([p, p]),
    "rows as tensor": lambda p, x: torch.as_tensor([p, x]),
    "new_tensor": lambda p, x: x.new_tensor([p[0]]),
    "legacy constructor": lambda p, x: torch.Tensor([p[0], 1.0]),
    "np.add": lambda p, x: np.add(x, p),
    "np.add, array first": lambda p, x: np.add(x.numpy(), p),
    "np.stack": lambda p, x: np.stack([x.numpy(), p]),
    "array + p": lambda p, x: x.numpy() + p,
    "p + array": lambda p, x: p + x.numpy(),
    "np.sum": lambda p, x: np.sum(p),
    "np.linalg": lambda p, x: np.linalg.norm(p),
    "fill_": lambda p, x: x.fill_(p[0]),
    "fill": lambda p, x: torch.full((2,), p[0]),
    "full_like": lambda p, x: torch.full_like(x, p[0]),
    "arange": lambda p, x: torch.arange(p[0]),
    "alpha": lambda p, x: x.add(1, alpha=p[0]),
    "dim": lambda p, x: x.sum(dim=p[0].long()),
    "size": lambda p, x: x.repeat(p[0].long()),
    "clamp": lambda p, x: x.clamp(min=p[0]),
    "masked_fill": lambda p, x: x.masked_fill(p > 2, 0.0),
    "gather": lambda p, x: x.gather(0, p.long() - 1),
    "scatter": lambda p, x: x.scatter(0, p.long() - 1, 1.0),
    "put_": lambda p, x: x.put_(torch.tensor([0]), p[:1]),
    "map_": lambda p, x: x.map_(p, lambda a, b: a + b),
    "einsum": lambda p, x: torch.einsum("i,i->i", x, p),
    "foreach": lambda p, x: torch._foreach_add([x, p], [p, x]),
    "linear": lambda p, x: F.linear(p, torch.ones(2, 5)),
    "linear, bias there": lambda p, x: F.linear(x, torch.ones(2, 5), p[:2]),
    "module": lambda p, x: torch.nn.Linear(5, 2)(p),
    "embedding": lambda p, x: F.embedding(p.long(), torch.ones(9, 2)),
    "loss": lambda p, x: torch.nn.CrossEntropyLoss()(p[None], torch.tensor([1])),
    "padding": lambda p, x: torch.nn.utils.rnn.pad_sequence([p, x]),
    "vector of parameters": lambda p, x: torch.nn.utils.parameters_to_vector([p, x]),
    "to": lambda p, x: x.to(p),
    "type_as": lambda p, x: x.type_as(p),
    "expand_as": lambda p, x: x[:1].expand_as(p),
    "set_": lambda p, x: x.set_(p),
    "set_ there": lambda p, x: p.set_(x),
    "data there": lambda p, x: setattr(p, "data", x),
    "grad there": lambda p, x: setattr(p, "grad", x),
    "repeat_interleave": lambda p, x: torch.repeat_interleave(x, p.long()),
    "bucketize": lambda p, x: torch.bucketize(p, x),
    "isin": lambda p, x: torch.isin(x, p),
    "sparse": lambda p, x: torch.sparse_coo_tensor(p[None].long(), x),
    "normal": lambda p, x: torch.normal(p, x),
    "max": lambda p, x: max(x, p),
    "sorted": lambda p, x: sorted([x[0], p[0]]),
    "math": lambda p, x: math.sqrt(p[1]) + x,
    "range": lambda p, x: [x for _ in range(p[0].long())],
}
"""Calls that mix a pointer with what is here: they run there or raise, and leave what is here alone."""

SHELLS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda p: torch.save({"p": p}, io.BytesIO()),
    "memoryview": memoryview,
    "bytes": bytes,
    "storage": lambda p: p.storage(),
    "untyped storage": lambda p: p.untyped_storage(),
    "data_ptr": lambda p: p.data_ptr(),
    "share_memory_": lambda p: p.share_memory_(),
    "pin_memory": lambda p: p.pin_memory(),
    "map_": lambda p: p.map_(p, lambda a, b: a + b),
    "map2_": lambda p: p.map2_(p, p, lambda a, b, c: a),
    "to_dlpack": torch._C._to_dlpack,
    "from_dlpack": T.from_dlpack,
    "np.from_dlpack": np.from_dlpack,
    "np.asarray": np.asarray,
    "to_sparse": lambda p: p.to_sparse(),
    "quantize": lambda p: torch.quantize_per_tensor(p, 0.1, 0, torch.qint8),
    "nested": lambda p: torch.nested.nested_tensor([p, p]),
    "print": lambda p: T._tensor_str._str(p),
    "mkldnn": lambda p: p.to_mkldnn(),
}
"""Ways to the memory that a pointer does not have."""


class TestL2PointerIsTensor(Law):
    """L2: a pointer is a tensor that answers what it knows locally, and never computes on its own shell."""

    @pytest.mark.filterwarnings("ignore:ComplexHalf support")
    def test_metadata_is_local(self, network: Network) -> None:
        """It is answered when the worker is gone, so nobody is asked."""
        tensors = [sample(dtype, (2, 3)) for dtype in DTYPES]
        tensors += [layout(sample("float32", (2, 3, 4))) for layout in LAYOUTS.values()]
        tensors += [torch.zeros(()), torch.zeros(0, 3), numbers().requires_grad_()]
        pointers = [(x, chain, network.send(x, chain)) for x in tensors for chain in ("b", "ab")]
        assert all(p.location is network[chain[0]][0] for _, chain, p in pointers)
        network.close()
        for x, chain, p in pointers:
            assert isinstance(p, torch.Tensor) and torch.is_tensor(p) and type(p) is PointerTensor
            assert p.shape == x.shape and p.size() == x.size() and p.dtype is x.dtype and p.layout is x.layout
            assert p.ndim == p.dim() == x.ndim and p.numel() == x.numel() == torch.numel(p)
            assert p.element_size() == x.element_size() and p.nbytes == x.nbytes
            assert len(p.stride()) == x.ndim and p.requires_grad is x.requires_grad and p.is_leaf and p.grad_fn is None
            assert p.is_floating_point() is x.is_floating_point() and p.is_complex() is x.is_complex()
            if x.ndim:
                assert len(p) == len(x) and p.size(0) == x.shape[0]
            assert f"shape={tuple(x.shape)}" in repr(p) and network[chain[0]][0].id in str(p)

    def test_metadata_of_results_is_local(self, network: Network) -> None:
        x = sample("float32", (2, 3, 4))
        p = network.send(x, "b")
        results = [(f(x), f(p)) for f in (
            lambda t: t.transpose(0, 2), lambda t: t[:, 1:, ::2], lambda t: t.sum(1), lambda t: t > 1,
            lambda t: t.expand(5, 2, 3, 4), lambda t: t.view(6, 4), lambda t: t.to(torch.bfloat16), lambda t: torch.fft.rfft(t),
            lambda t: t.unfold(2, 2, 1), lambda t: torch.complex(t, t).conj(), lambda t: t.permute(2, 0, 1).contiguous(),
        )]
        network.close()
        for here, there in results:
            assert type(there) is PointerTensor
            for fact in ("shape", "dtype", "ndim", "layout", "requires_grad", "is_leaf", "nbytes"):
                assert getattr(there, fact) == getattr(here, fact)
            assert there.stride() == here.stride() and there.storage_offset() == here.storage_offset()
            assert there.is_contiguous() == here.is_contiguous() and there.is_conj() == here.is_conj()

    def test_pointers_are_keys_and_members(self, network: Network) -> None:
        p, q = network.send(numbers(), "b"), network.send(numbers(), "b")
        assert {p: 1, q: 2}[p] == 1 and hash(p) != hash(q)
        assert any(each is q for each in [p, q])

    @pytest.mark.parametrize("chain", ["b", "ab"])
    @pytest.mark.parametrize("call", TOGETHER)
    def test_calls_run_there(self, network: Network, call: str, chain: str) -> None:
        x = numbers()
        p, q = network.send(x, chain), network.send(x + 1, chain)
        here = pytree.tree_leaves(TOGETHER[call](x.clone(), x + 1))
        there = pytree.tree_leaves(TOGETHER[call](p, q))
        assert len(there) == len(here)
        for one, other in zip(there, here, strict=True):
            assert type(one) is PointerTensor and one.shape == other.shape and one.dtype is other.dtype
            assert torch.equal(home(one), other)

    @pytest.mark.filterwarnings("ignore")  # what torch or numpy says to odd calls
    @pytest.mark.parametrize("call", MIXED)
    def test_calls_with_what_is_here_run_there_or_raise(self, network: Network, call: str) -> None:
        x = numbers()
        p = network.send(x, "b")
        before = network.sizes()
        try:
            there = pytree.tree_leaves(MIXED[call](p, x))
        except Exception:  # which error it is, other laws say
            there = None
        assert torch.equal(x, numbers())
        if there is None:
            assert network.sizes() == before
            assert torch.equal(p.get(), numbers())
            return
        here = pytree.tree_leaves(MIXED[call](numbers(), numbers()))
        for one, other in zip(there, here, strict=True):
            assert type(one) is PointerTensor
            assert torch.equal(one.get(), other)

    @pytest.mark.filterwarnings("ignore")  # likewise
    @pytest.mark.parametrize("way", SHELLS)
    def test_there_is_no_memory_to_reach(self, network: Network, way: str) -> None:
        p = network.send(numbers(), "b")
        raised(lambda: SHELLS[way](p))
        assert network.sizes() == [1, 0, 0]
        assert torch.equal(p.get(), numbers())

    @pytest.mark.parametrize("chain", ["b", "ab", "cab"])
    def test_a_deep_copy_is_another_tensor_there(self, network: Network, chain: str) -> None:
        p = network.send(numbers(), chain)
        q, [r, s] = copy.deepcopy(p), copy.deepcopy([p, p])
        assert type(q) is PointerTensor and r is s and q is not p
        q.zero_()
        assert torch.equal(home(r), numbers()) and torch.equal(home(p), numbers())

    def test_what_becomes_of_a_pointer_is_a_pointer(self, network: Network) -> None:
        p = network.send(numbers(), "b")
        ways: list[Callable[[Any], Any]] = [
            lambda p: p.data, lambda p: p.detach(), torch.as_tensor, torch.asarray, torch.Tensor, torch.nn.Parameter,
            lambda p: p.as_subclass(torch.Tensor), lambda p: p.cpu(), lambda p: p.to("cpu"), lambda p: p.requires_grad_(),
        ]
        for way in ways:
            q = way(p)
            assert isinstance(q, PointerTensor)
            assert torch.equal(look(q), numbers())

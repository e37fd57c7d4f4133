"""Trees of everything that may travel, and of what may not: what the contracts are checked with."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from farpoint.tensors import DTYPES

PLAIN = {
    "none": None,
    "true": True,
    "false": False,
    "integers": [0, 1, -1, 23, 24, 127, 128, 255, 256, 65535, 65536, -32, -33, -128, -129, -32768, -32769],
    "wide integers": [2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)],
    "floats": [0.0, -0.0, 1.5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")],
    "texts": ["", "plain", "h\u00e9llo", "\u65e5\u672c", "\U0001f600", "nul \0 inside", "x" * 300],
    "bytes": [b"", b"\0", bytes(range(256)), b"y" * 70_000],
    "empty list": [],
    "empty map": {},
    "nested empties": [[], {}, [[]], {"a": {}}],
    "list": [1, "two", 3.0, None, [True, [b"five"]]],
    "map": {"a": 1, "b": [2, {"c": None}], "": "the empty key", "\u00fc": 4},
    "tuple": (1, (2, (3, ())), [4, (5,)]),
    "long list": list(range(5_000)),
    "the same text twice": ["again", "again", {"again": "again"}],
    "message": [
        b"16 bytes of life",
        12345,
        77,
        [[2, 5, [123456789012, 123456789013], [], [123456789014]]] * 128,
    ],
}

SHAPES = [(), (0,), (0, 3), (5,), (1,), (2, 3, 4), (1, 1, 1)]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 2),
    "sliced": lambda t: t[:, 1:, ::2],
    "inner": lambda t: t[1],
    "column": lambda t: t[:, :1, :1],
    "element": lambda t: t[1, 2, 3],
    "expanded": lambda t: t[:1, :1].expand(3, 5, 4),
    "detached": lambda t: t.detach(),
    "channels last": lambda t: t[None].contiguous(memory_format=torch.channels_last),
}

REFUSED: dict[str, Callable[[], object]] = {
    "object": object,
    "class": lambda: int,
    "function": lambda: len,
    "set": lambda: {1},
    "complex number": lambda: 1j,
    "dtype": lambda: torch.float32,
    "too large": lambda: 2**64,
    "too small": lambda: -(2**63) - 1,
    "lone surrogate": lambda: "\ud800",
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "subclass": lambda: torch.ones(2).as_subclass(_Subclass),
    "endless list": lambda: _endless(),
}


class _Subclass(torch.Tensor):
    """A tensor that is more than a tensor."""


def sample(dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of this dtype and shape whose bytes all differ from their neighbours."""
    torch_dtype = DTYPES[dtype]
    numel = torch.Size(shape).numel()
    codes = torch.arange(max(numel, 1) * torch_dtype.itemsize) % (2 if torch_dtype is torch.bool else 113)
    return codes.to(torch.uint8).view(torch_dtype)[:numel].view(tuple(shape))


def nested(depth: int, leaf: object = 1) -> Any:
    """Return a leaf inside so many lists."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def trees() -> st.SearchStrategy[Any]:
    """Return a strategy for trees of everything that may travel."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    tensors = st.builds(sample, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4))
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=True, allow_infinity=True)
        | text
        | st.binary(max_size=40)
        | tensors
    )

    def extend(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(children, max_size=6)
        return lists | lists.map(tuple) | st.dictionaries(text, children, max_size=6)

    return st.recursive(leaves, extend, max_leaves=30)


def assert_same(found: Any, sent: Any) -> None:
    """Assert that a decoded tree is the one that was encoded, in types and bits."""
    if isinstance(sent, torch.Tensor):
        assert type(found) is torch.Tensor
        assert (found.dtype, found.shape, found.device.type) == (sent.dtype, sent.shape, "cpu")
        assert found.is_contiguous() and not found.requires_grad and found.is_leaf
        assert torch.equal(_bits(found), _bits(sent))
    elif isinstance(sent, list | tuple):
        assert type(found) is list and len(found) == len(sent)
        for one, other in zip(found, sent, strict=True):
            assert_same(one, other)
    elif isinstance(sent, dict):
        assert type(found) is dict and list(found) == list(sent)
        for key in sent:
            assert_same(found[key], sent[key])
    elif isinstance(sent, float):
        assert type(found) is float and (
            struct.pack("d", found) == struct.pack("d", sent) or math.isnan(sent) and math.isnan(found)
        )
    else:
        assert type(found) is type(sent) and found == sent


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless

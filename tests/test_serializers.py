"""The serializers in this repository keep the contract that strangers' serializers keep."""

from __future__ import annotations

import importlib
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch

from farpoint.errors import DecodeError, EncodeError, LimitError
from farpoint.limits import DEFAULT_LIMITS
from farpoint.plugins import plugins
from farpoint.serializer import Serializer
from farpoint.testing.serializer import SerializerContract
from farpoint.testing.trees import assert_same


def make(name: str, module: str) -> Serializer:
    """Return a serializer by its name; its module is registered by hand where farpoint is not installed."""
    if name not in plugins.serializer_names():
        plugins.register(importlib.import_module(module), module)
    return plugins.serializer(name, DEFAULT_LIMITS)


class TestMsgpack(SerializerContract):
    """Headers in msgpack."""

    @pytest.fixture
    def serializer(self) -> Serializer:
        return make("msgpack", "farpoint_msgpack")

    @pytest.mark.parametrize(
        "header",
        [
            b"\xd4\x01a",  # fixext 1, 2, 4, 8, 16
            b"\xd5\x01ab",
            b"\xd6\x01abcd",
            b"\xd7\x01abcdefgh",
            b"\xd8\x01" + b"a" * 16,
            b"\xc7\0\x01",  # ext 8, 16, 32
            b"\xc7\1\x01a",
            b"\xc8\0\1\x01a",
            b"\xc9\0\0\0\1\x01a",
            b"\xd6\xff\0\0\0\0",  # timestamps
            b"\xd7\xff" + bytes(8),
            b"\xc7\x0c\xff" + bytes(12),
            b"\xc1",  # never used
            b"\xa1\xff",  # not UTF-8
            b"\xa3\xed\xa0\x80",  # a lone surrogate
            b"\x81\x01\x01",  # keys that are no strings
            b"\x81\xc4\1a\x01",
            b"\x81\x90\x01",
            b"\x81\xc0\x01",
            b"\x82\xa1a\1\xa1a\2",  # a key twice
            b"\1\1",  # two messages
            b"\x81\xa2$t\x01",  # placeholders of something else
            b"\x81\xa2$t\x90",
            b"\x81\xa2$t\x92\xa4bool\x01",
            b"\x81\xa2$t\x92\x01\x90",
            b"\x81\xa2$t\x92\xa4Bool\x90",
            b"\x81\xa2$t\x93\xa4bool\x90\x90",
            b"\x81\xa2$t\x92\xa4bool\x91\xc3",
            b"\x81\xa2$t\x92\xa4bool\x91\xff",
            b"\x82\xa2$t\x92\xa4bool\x90\xa1a\1",
            b"\x82\xa1a\1\xa2$t\x92\xa4bool\x90",
        ],
    )
    def test_other_headers_are_refused(self, serializer: Serializer, header: bytes) -> None:
        for frames in ([header], [header, b"\1"], [b"\x91" + header, b"\1"]):
            with pytest.raises(DecodeError):
                serializer.decode(frames)

    def test_extensions_are_refused_at_any_depth(self, serializer: Serializer) -> None:
        """Unpackers that unpack extensions within extensions crash at 200 levels."""
        header = b"\1"
        for _ in range(300):
            header = msgpack.packb(msgpack.ExtType(1, header))
            with pytest.raises(DecodeError):
                serializer.decode([header])

    @pytest.mark.parametrize("opening", [b"\xdc\x20\0", b"\xdd\0\0\x20\0", b"\xdc\xff\xff", b"\x91"])
    @pytest.mark.parametrize("levels", [17, 150, 1_000, 100_000])
    def test_lists_announced_buy_no_memory(self, serializer: Serializer, opening: bytes, levels: int) -> None:
        """Nested lists of 8192 items that never come would make 64 KiB of each 3 bytes."""
        tracemalloc.start()
        try:
            with pytest.raises(DecodeError):
                serializer.decode([opening * levels + b"\xc0"])
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        "wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: [torch.ones(1), [x], "text"]]
    )
    def test_depth_is_bounded_whatever_stands_beside(
        self, serializer: Serializer, wrap: Callable[[Any], Any]
    ) -> None:
        tree: Any = wrap(1)
        while True:
            try:
                assert_same(serializer.decode(serializer.encode(tree)), tree)
            except LimitError as error:
                assert error.limit == "depth"
                break
            tree = wrap(tree)

    @pytest.mark.parametrize("tree", [{"$t": 1}, [{"a": {"$t": 1, "b": 2}}], [torch.ones(1), ({"$t": 1},)]])
    def test_the_key_of_tensors_is_reserved(self, serializer: Serializer, tree: Any) -> None:
        with pytest.raises(EncodeError, match="reserved"):
            serializer.encode(tree)

    def test_what_looks_like_the_reserved_key_travels(self, serializer: Serializer) -> None:
        tree: Any = ["$t", b"\x81\xa2$t", 0xA22474, {"a": "$t", "$tt": 1}, [torch.ones(1)]]
        assert_same(serializer.decode(serializer.encode(tree)), tree)

    def test_contiguous_tensors_are_not_copied(self, serializer: Serializer) -> None:
        tensor = torch.zeros(1_000)
        frames = serializer.encode(tensor)
        tensor.fill_(1)
        assert_same(serializer.decode(frames), tensor)

    def test_a_frame_keeps_its_tensor_alive(self, serializer: Serializer) -> None:
        frames = serializer.encode([torch.full((100_000,), 7)])
        others = [torch.zeros(100_000) for _ in range(20)]
        assert_same(serializer.decode(frames), [torch.full((100_000,), 7)])
        del others


class TestTorchSave(SerializerContract):
    """Files of `torch.save`."""

    @pytest.fixture
    def serializer(self) -> Serializer:
        return make("torch", "farpoint_torchsave")

    def test_an_endless_list_is_named_as_such(self, serializer: Serializer) -> None:
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(EncodeError, match="holds itself"):
            serializer.encode(endless)


@pytest.mark.parametrize(
    ("name", "module"), [("msgpack", "farpoint_msgpack"), ("torch", "farpoint_torchsave")]
)
def test_threads_may_share_a_serializer(name: str, module: str) -> None:
    serializer = make(name, module)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        tree: Any = [number, ["text" * number, torch.full((number,), number)] * 5, {"a": torch.ones(number)}]
        try:
            for _ in range(100):
                assert_same(serializer.decode(serializer.encode(tree)), tree)
        except BaseException as error:  # noqa: BLE001 - a thread tells nobody of its own accord
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_contract_cannot_be_overridden() -> None:
    with pytest.raises(AssertionError, match="test_plain_data_returns"):
        type("Lax", (SerializerContract,), {"test_plain_data_returns": None})

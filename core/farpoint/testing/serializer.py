"""The contract of serializers: subclass it, give one fixture, run pytest."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farpoint.errors import DecodeError, EncodeError, LimitError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.serializer import Frame, Serializer
from farpoint.tensors import DTYPES
from farpoint.testing.contract import Contract
from farpoint.testing.trees import LAYOUTS, PLAIN, REFUSED, SHAPES, assert_same, nested, sample, trees


class _Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


class SerializerContract(Contract):
    """Every guarantee of `farpoint.serializer.Serializer`, one test for each.

    Give a fixture `serializer` that returns a new serializer with the default limits::

        from farpoint.plugins import plugins
        from farpoint.limits import DEFAULT_LIMITS
        from farpoint.testing.serializer import SerializerContract

        class TestCbor(SerializerContract):
            @pytest.fixture
            def serializer(self):
                return plugins.serializer("cbor", DEFAULT_LIMITS)

    Override `with_limits` if your serializer is made in another way than `type(serializer)(limits)`. The
    tests themselves cannot be overridden.
    """

    @pytest.fixture
    def serializer(self) -> Serializer:
        """Return the serializer to test."""
        raise NotImplementedError("give a fixture `serializer` that returns the serializer to test")

    def with_limits(self, serializer: Serializer, limits: Limits) -> Serializer:
        """Return a serializer of the same kind with other limits."""
        return type(serializer)(limits)

    # Round trip.

    @pytest.mark.parametrize("tree", PLAIN.values(), ids=PLAIN.keys())
    def test_plain_data_returns(self, serializer: Serializer, tree: Any) -> None:
        """Plain data comes back with value and type; a tuple as a list."""
        assert_same(serializer.decode(serializer.encode(tree)), tree)

    def test_nesting_returns_up_to_the_limit(self, serializer: Serializer) -> None:
        """An item inside as many lists and maps as `Limits.depth` says comes back."""
        assert_same(
            serializer.decode(serializer.encode(nested(DEFAULT_LIMITS.depth))), nested(DEFAULT_LIMITS.depth)
        )
        tree = nested(DEFAULT_LIMITS.depth, torch.ones(2))
        assert_same(serializer.decode(serializer.encode(tree)), tree)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_tree_returns(self, serializer: Serializer, data: st.DataObject) -> None:
        """Whatever Hypothesis makes of the kinds that may travel comes back."""
        tree = data.draw(trees())
        assert_same(serializer.decode(serializer.encode(tree)), tree)

    @pytest.mark.filterwarnings("ignore:ComplexHalf support")
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_dtype_and_shape_returns(
        self, serializer: Serializer, dtype: str, shape: tuple[int, ...]
    ) -> None:
        """A tensor of every dtype comes back, also 0-dimensional and empty."""
        tensor = sample(dtype, shape)
        assert_same(
            serializer.decode(serializer.encode(["before", tensor, "after"])), ["before", tensor, "after"]
        )

    @pytest.mark.filterwarnings("ignore:ComplexHalf support")
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_layout_returns(self, serializer: Serializer, dtype: str, layout: str) -> None:
        """A view of any layout comes back with its values, contiguous."""
        tensor = LAYOUTS[layout](sample(dtype, (2, 3, 4)))
        assert_same(serializer.decode(serializer.encode(tensor)), tensor)

    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    def test_conj_and_neg_views_return_as_values(self, serializer: Serializer, dtype: str) -> None:
        """A conjugated or negated view comes back with the values that it shows, and without the bits."""
        tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=DTYPES[dtype])
        conjugated, negated, both = tensor.conj(), tensor.conj().imag, torch._neg_view(tensor.conj())
        plain = torch._neg_view(torch.ones(3))
        assert (
            plain.is_neg() and conjugated.is_conj() and negated.is_neg() and both.is_conj() and both.is_neg()
        )
        decoded: Any = serializer.decode(serializer.encode([conjugated, negated, both, plain]))
        for found, sent in zip(decoded, (conjugated, negated, both, plain), strict=True):
            assert not found.is_conj() and not found.is_neg()
            assert torch.equal(found, sent.clone())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
    def test_gradients_are_not_part_of_a_value(self, serializer: Serializer, dtype: str) -> None:
        """Leaves, results and parameters that require grad come back as plain tensors."""
        leaf = torch.ones(3, dtype=DTYPES[dtype], requires_grad=True)
        tree: Any = [leaf, leaf * 2, leaf.flip(0), torch.nn.Parameter(leaf.detach() * 3)]
        assert_same(serializer.decode(serializer.encode(tree)), [value.detach() for value in tree])

    def test_many_tensors_return_in_their_places(self, serializer: Serializer) -> None:
        """Hundreds of tensors in one message keep their places."""
        tree: Any = {
            "list": [torch.full((n % 5,), n) for n in range(300)],
            "last": [torch.tensor(1), {"x": torch.ones(2)}],
        }
        assert_same(serializer.decode(serializer.encode(tree)), tree)

    def test_one_tensor_twice_returns_twice(self, serializer: Serializer) -> None:
        """A tensor that occurs twice, or beside a view of it, comes back as tensors of their own memory."""
        tensor = torch.arange(6)
        decoded: Any = serializer.decode(
            serializer.encode([tensor, tensor, tensor[2:4], tensor.view(torch.int32)])
        )
        assert_same(decoded, [tensor, tensor, tensor[2:4], tensor.view(torch.int32)])
        decoded[0].zero_()
        assert_same(decoded[1:], [tensor, tensor[2:4], tensor.view(torch.int32)])

    def test_one_list_twice_returns_twice(self, serializer: Serializer) -> None:
        """A list that occurs twice comes back as two lists."""
        inner: Any = [1]
        decoded: Any = serializer.decode(serializer.encode([inner, inner, {"a": inner}]))
        assert decoded == [[1], [1], {"a": [1]}]
        decoded[0].append(2)
        assert decoded[1:] == [[1], {"a": [1]}]

    # What travels, and whose memory it is.

    @pytest.mark.parametrize(
        "view", [lambda t: t[7], lambda t: t[7:8], lambda t: t[:0], lambda t: t[:: 2**17]]
    )
    def test_only_a_views_own_bytes_travel(
        self, serializer: Serializer, view: Callable[..., torch.Tensor]
    ) -> None:
        """The rest of a view's storage stays at home."""
        frames = serializer.encode([view(torch.ones(2**18))])
        assert sum(memoryview(frame).nbytes for frame in frames) < 4_096

    def test_tensors_are_not_inflated(self, serializer: Serializer) -> None:
        """A large tensor costs hardly more bytes than it has."""
        frames = serializer.encode(torch.ones(2**18))
        assert sum(memoryview(frame).nbytes for frame in frames) < 2**20 + 4_096

    def test_encoding_changes_nothing(self, serializer: Serializer) -> None:
        """What was encoded is as it was."""
        tensor, inner = torch.ones(3, requires_grad=True), [1, (2,)]
        tree: Any = {"tensor": tensor, "list": inner}
        serializer.encode(tree)
        assert tree == {"tensor": tensor, "list": inner} and inner == [1, (2,)]
        assert tree["tensor"] is tensor and tensor.requires_grad and tensor.is_leaf and tensor.grad is None

    def test_decoded_tensors_are_writable(self, serializer: Serializer) -> None:
        """Decoded tensors may be changed in place, and the message decoded again."""
        frames = [
            bytes(frame) for frame in serializer.encode([torch.ones(3), torch.zeros(0), torch.tensor(2.0)])
        ]
        decoded: Any = serializer.decode(frames)
        for tensor in decoded:
            tensor.add_(1)
        assert_same(decoded, [torch.full((3,), 2.0), torch.zeros(0), torch.tensor(3.0)])
        assert_same(serializer.decode(frames), [torch.ones(3), torch.zeros(0), torch.tensor(2.0)])

    @pytest.mark.parametrize("size", [1, 1_000, 500_000])
    def test_decoded_tensors_own_their_memory(self, serializer: Serializer, size: int) -> None:
        """Neither do later changes of the frames show in a decoded tensor, nor the other way round."""
        sent = torch.ones(size)
        frames = [bytearray(frame) for frame in serializer.encode([sent])]
        before = [bytes(frame) for frame in frames]
        decoded: Any = serializer.decode(frames)
        decoded[0].fill_(5)
        assert [bytes(frame) for frame in frames] == before
        for frame in frames:
            frame[:] = bytes(len(frame))
        assert bool((decoded[0] == 5).all()) and bool((sent == 1).all())

    def test_decoded_tensors_do_not_alias_the_original(self, serializer: Serializer) -> None:
        """Frames handed over as they are do not tie the decoded tensor to the one that was encoded."""
        sent = torch.ones(4)
        decoded: Any = serializer.decode(serializer.encode(sent))
        decoded.zero_()
        assert torch.equal(sent, torch.ones(4))

    @pytest.mark.parametrize(
        "kind",
        [
            bytes,
            bytearray,
            memoryview,
            lambda frame: memoryview(bytearray(frame)),
            lambda frame: memoryview(b"x" + frame + b"y")[1:-1],
        ],
        ids=["bytes", "bytearray", "memoryview", "writable memoryview", "unaligned memoryview"],
    )
    def test_frames_may_be_of_any_kind(self, serializer: Serializer, kind: Callable[[bytes], Frame]) -> None:
        """Frames are decoded from bytes, bytearray and memoryview, wherever they lie in memory."""
        tree: Any = ["text", torch.arange(9.0), {"a": torch.ones(2, 2, dtype=torch.complex128)}, b"bytes"]
        assert_same(serializer.decode([kind(bytes(frame)) for frame in serializer.encode(tree)]), tree)

    # What cannot travel.

    @pytest.mark.parametrize("place", [lambda x: x, lambda x: [1, x], lambda x: {"a": [torch.ones(1), x]}])
    @pytest.mark.parametrize("refused", REFUSED)
    def test_the_rest_is_refused(
        self, serializer: Serializer, refused: str, place: Callable[[object], Any]
    ) -> None:
        """What is not plain data or a dense tensor is refused with `EncodeError`."""
        with pytest.raises(EncodeError):
            serializer.encode(place(REFUSED[refused]()))

    @pytest.mark.filterwarnings(
        "ignore"
    )  # torch is about to give up quantized and nested tensors, and says so
    def test_quantized_and_nested_tensors_are_refused(self, serializer: Serializer) -> None:
        """Tensors whose bytes are not all of them are refused."""
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
        for tensor in (quantized, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])):
            with pytest.raises(EncodeError):
                serializer.encode([tensor])

    def test_keys_that_are_no_strings_never_arrive(self, serializer: Serializer) -> None:
        """A map with another key is refused, by one side or the other."""
        for key in (1, None, b"bytes", (1,)):
            with pytest.raises((EncodeError, DecodeError)):
                serializer.decode(serializer.encode({key: 1}))  # type: ignore[dict-item]

    def test_a_serializer_outlives_a_refusal(self, serializer: Serializer) -> None:
        """After an error the serializer works as before, and nothing of the refused message is left over."""
        broken: Any = [torch.ones(3), "left over", object()]
        with pytest.raises(EncodeError):
            serializer.encode(broken)
        with pytest.raises(DecodeError):
            serializer.decode([b"garbage"])
        assert_same(serializer.decode(serializer.encode([torch.ones(2)])), [torch.ones(2)])

    # Hostile bytes.

    def test_no_frames_are_refused(self, serializer: Serializer) -> None:
        """A message without frames, or with empty ones, is none."""
        for frames in ([], [b""], [b"", b""]):
            with pytest.raises(DecodeError):
                serializer.decode(frames)

    @pytest.mark.parametrize(
        "garbage", [b"\0" * 100, b"\xff" * 100, b"PK\3\4" + b"\0" * 96, b"garbage " * 500]
    )
    def test_garbage_is_refused(self, serializer: Serializer, garbage: bytes) -> None:
        """Bytes that nobody encoded are refused."""
        with pytest.raises(DecodeError):
            serializer.decode([garbage])
        with pytest.raises(DecodeError):
            serializer.decode([garbage, garbage])

    def test_every_truncation_is_refused(self, serializer: Serializer) -> None:
        """A message that lost bytes at the end of any frame is refused."""
        frames = small_message(serializer)
        for place, frame in enumerate(frames):
            for length in range(len(frame)):
                with pytest.raises(DecodeError):
                    serializer.decode([*frames[:place], frame[:length], *frames[place + 1 :]])

    def test_bytes_too_many_are_refused(self, serializer: Serializer) -> None:
        """A message that gained bytes at the end of any frame is refused."""
        frames = small_message(serializer)
        for place, frame in enumerate(frames):
            with pytest.raises(DecodeError):
                serializer.decode([*frames[:place], frame + b"\0", *frames[place + 1 :]])

    @pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
    def test_flipped_bits_are_harmless(self, serializer: Serializer, mask: int) -> None:
        """A changed byte at any place makes another message or a `DecodeError`, and nothing else."""
        frames = small_message(serializer)
        for place, frame in enumerate(frames):
            for position in range(len(frame)):
                changed = bytearray(frame)
                changed[position] ^= mask
                decode_or_refuse(serializer, [*frames[:place], changed, *frames[place + 1 :]])

    def test_missing_and_surplus_frames_are_refused(self, serializer: Serializer) -> None:
        """A message has exactly the frames that were encoded."""
        frames = small_message(serializer)
        for place in range(len(frames)):
            with pytest.raises(DecodeError):
                serializer.decode(frames[:place] + frames[place + 1 :])
            with pytest.raises(DecodeError):
                serializer.decode([*frames[: place + 1], *frames[place:]])
        for surplus in (b"", b"\0", frames[-1]):
            with pytest.raises(DecodeError):
                serializer.decode([*frames, surplus])

    def test_reordered_frames_are_refused(self, serializer: Serializer) -> None:
        """Frames of different sizes are refused in any other order."""
        frames = small_message(serializer)
        for reordered in (frames[::-1], frames[:1] + frames[:0:-1]):
            if reordered != frames:
                with pytest.raises(DecodeError):
                    serializer.decode(reordered)

    def test_no_payload_is_executed(self, serializer: Serializer, tmp_path: Path) -> None:
        """A pickle that would run code does not, in the place of a frame, before one or behind one."""
        path = tmp_path / "canary"
        saved = tmp_path / "canary.pt"
        torch.save(_Canary(path), saved)
        canaries = [pickle.dumps(_Canary(path), protocol) for protocol in range(6)] + [saved.read_bytes()]
        for canary in canaries[:-1]:
            pickle.loads(canary)
            path.rmdir()  # it is alive
        frames = small_message(serializer)
        for canary in canaries:
            decode_or_refuse(serializer, [canary])
            for place, frame in enumerate(frames):
                for changed in (canary, canary + frame, frame + canary):
                    decode_or_refuse(serializer, [*frames[:place], changed, *frames[place + 1 :]])
        assert not path.exists()

    @pytest.mark.parametrize("mapping", [b"\0", b"\x02", b"\xff"], ids=["0", "2", "255"])
    def test_bool_tensors_hold_bools(self, serializer: Serializer, mapping: bytes) -> None:
        """No bytes make a bool tensor whose elements are other than 0 and 1."""
        frames = [bytes(frame) for frame in serializer.encode(torch.tensor([True] * 24))]
        changed = [frame.replace(b"\1" * 24, mapping * 24) for frame in frames]
        assert changed != frames
        try:
            decoded: Any = serializer.decode(changed)
        except DecodeError:
            return
        assert bool((decoded.view(torch.uint8) <= 1).all())

    # Limits.

    @pytest.mark.parametrize(
        ("limits", "tree", "within"),
        [
            (Limits(message_bytes=64), lambda: torch.ones(17), lambda: torch.ones(16)),
            (Limits(message_bytes=64), lambda: [torch.ones(8)] * 3, lambda: [torch.ones(8)] * 2),
            (Limits(tensor_dims=3), lambda: torch.ones(1, 1, 1, 1), lambda: torch.ones(1, 1, 1)),
            (Limits(tensors=2), lambda: [torch.ones(1)] * 3, lambda: [torch.ones(1)] * 2),
            (Limits(header_bytes=100), lambda: ["x" * 100], lambda: ["x" * 10]),
            (Limits(depth=3), lambda: nested(4), lambda: nested(3)),
            (Limits(depth=3), lambda: nested(4, torch.ones(1)), lambda: nested(3, torch.ones(1))),
            (Limits(depth=3), lambda: {"a": {"b": {"c": {"d": 1}}}}, lambda: {"a": {"b": {"c": 1}}}),
            (Limits(depth=3), lambda: nested(900), lambda: nested(1)),
            (Limits(array_items=20), lambda: [list(range(21))], lambda: [list(range(20))]),
            (Limits(map_items=2), lambda: {"a": 1, "b": 2, "c": 3}, lambda: {"a": 1, "b": 2}),
            (Limits(text_chars=50), lambda: ["x" * 51], lambda: ["x" * 50]),
            (Limits(text_chars=50), lambda: {"x" * 51: 1}, lambda: {"x" * 50: 1}),
        ],
        ids=lambda value: "" if callable(value) else _differing(value),
    )
    def test_limits_are_enforced(
        self, serializer: Serializer, limits: Limits, tree: Callable[[], Any], within: Callable[[], Any]
    ) -> None:
        """What exceeds a limit of the receiver raises `LimitError`; what reaches it does not."""
        try:
            frames = serializer.encode(tree())
        except EncodeError:
            pytest.skip("this serializer does not even encode that")
        with pytest.raises(LimitError):
            self.with_limits(serializer, limits).decode(frames)
        assert_same(self.with_limits(serializer, limits).decode(serializer.encode(within())), within())

    def test_limits_are_enforced_before_anything_is_allocated(self, serializer: Serializer) -> None:
        """Of a message that is too large nothing is copied."""
        frames = [bytes(frame) for frame in serializer.encode([torch.ones(2**20), "x" * 2**20])]
        for limits in (Limits(message_bytes=2**20), Limits(header_bytes=2**10)):
            strict = self.with_limits(serializer, limits)
            tracemalloc.start()
            try:
                with pytest.raises(LimitError):
                    strict.decode(frames)
                assert tracemalloc.get_traced_memory()[1] < 2**18
            finally:
                tracemalloc.stop()


def small_message(serializer: Serializer) -> list[bytes]:
    """Return the frames of a message with something of each kind."""
    tree: Any = [
        1,
        {"a": "text", "b": None},
        2.5,
        b"bytes",
        torch.arange(3.0),
        [True, 2**40, torch.tensor([True])],
    ]
    return [bytes(frame) for frame in serializer.encode(tree)]


def decode_or_refuse(serializer: Serializer, frames: Sequence[Frame]) -> None:
    """Decode, and let nothing but `DecodeError` pass for a refusal."""
    try:
        serializer.decode(frames)
    except DecodeError:
        pass


def _differing(limits: object) -> str:
    """Return the names of the limits that are not the default, as an id of a test."""
    names = (field.name for field in attrs.fields(Limits))
    return ",".join(name for name in names if getattr(limits, name, 0) != getattr(DEFAULT_LIMITS, name))

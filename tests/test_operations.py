"""The operation gate: what is in the table, what is said about it, and which arguments pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from farpoint.errors import OperationNotAllowedError, PluginError, ProtocolError
from farpoint.limits import Limits
from farpoint.operations import (
    RESIZING,
    UNINITIALISED,
    Hole,
    Operation,
    check_arguments,
    check_operands,
    check_scalar,
    lookup,
    names,
    of,
)
from farpoint.operations import arguments as arguments_module
from farpoint.operations import operands as operands_module
from farpoint.operations import parameters as parameters_module
from farpoint.plugins import OperatorPlugin, hookimpl, plugins

T = Hole.TENSOR
S = Hole.SCALAR

# Written a second time on purpose: the tool's own rules are not asked whether the tool's own output is right.
FORBIDDEN = (
    r"from_file",
    r"save|load",
    r"^_?set_(?!train)",
    r"^set\.",
    r"storage",
    r"^_reshape_alias",
    r"^_?resize(?!_\.default$|_as_\.default$)",
    r"^_local_scalar_dense|^item\.|^equal\.|^is_nonzero|^allclose",
    r"sparse|_coo|_csr|_csc|_bsr|_bsc|coalesce|to_dense",
    r"nested|mkldnn|cudnn|miopen|xnnpack|vulkan",
    r"^quantize|^dequantize|^quantized|affine_quantized|qscheme|^q_",
    r"record_stream|pin_memory",
    r"^_print|^_assert(?!_async\.msg$)|^_functional_assert|^sym_",
    r"^data\.|^set_data|^_version|^requires_grad|^retain_grad|^_backward",
    r"make_dual|unpack_dual|_fw_primal",
    r"batch_dim|^_wrap_|^_unwrap_|^_test_|^_to_functional",
    r"^align_|names|^rename",
    r"^_efficientzerotensor",
    r"^empty.*out$",
)


USED = [
    *(
        "add.Tensor",
        "add_.Tensor",
        "mm.default",
        "addmm.default",
        "convolution.default",
        "convolution_backward.default",
    ),
    *(
        "native_batch_norm.default",
        "native_batch_norm_backward.default",
        "native_layer_norm.default",
        "index.Tensor",
    ),
    *(
        "index_put_.default",
        "slice.Tensor",
        "copy_.default",
        "_to_copy.default",
        "detach.default",
        "clone.default",
    ),
    *(
        "zeros.default",
        "ones.default",
        "full.default",
        "arange.start_step",
        "randn.default",
        "normal_.default",
    ),
    *(
        "uniform_.default",
        "_foreach_add_.Scalar",
        "_fused_adam_.default",
        "nll_loss_forward.default",
        "view.default",
    ),
    *("embedding.default", "max_pool2d_with_indices.default", "native_dropout.default", "_softmax.default"),
    *(
        "as_strided.default",
        "empty.memory_format",
        "_scaled_dot_product_flash_attention_for_cpu.default",
        "alias.default",
    ),
    *(
        "linalg_qr.default",
        "sum.dim_IntList",
        "mean.dim",
        "lt.Scalar",
        "eq.Tensor",
        "where.self",
        "masked_fill_.Scalar",
    ),
    *(
        "_linalg_check_errors.default",
        "_is_all_true.default",
        "gelu_backward.default",
        "embedding_renorm_.default",
    ),
]


def call(name: str, *args: object, limits: Limits | None = None, **kwargs: object) -> None:
    check_arguments(lookup(f"aten::{name}"), args, kwargs, limits or Limits())


def refused(text: str, name: str, *args: object, limits: Limits | None = None, **kwargs: object) -> None:
    with pytest.raises(ProtocolError, match=re.escape(text)):
        call(name, *args, limits=limits, **kwargs)


def operators() -> Iterator[tuple[str, torch._ops.OpOverload[Any, Any]]]:
    """Yield every overload of aten that torch can run, spelled as the table spells it."""
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::"):
            continue
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None)
        overload = getattr(packet, schema.overload_name or "default", None)
        if isinstance(overload, torch._ops.OpOverload):
            yield f"{schema.name}.{schema.overload_name or 'default'}", overload


class TestTable:
    def test_everything_outside_is_refused(self) -> None:
        table = names()
        outside = [(name, overload) for name, overload in operators() if name not in table]
        assert len(outside) > 1000
        for name, overload in outside:
            with pytest.raises(OperationNotAllowedError, match="not in the table"):
                lookup(name)
            with pytest.raises(OperationNotAllowedError, match="not in the table"):
                of(overload)

    @pytest.mark.parametrize(
        "name",
        [
            "aten::relu",
            "relu",
            "aten::relu.",
            "aten::relu.default ",
            "aten::__class__.default",
            "os::system.default",
            "",
            "#",
        ],
    )
    def test_names_are_taken_literally(self, name: str) -> None:
        with pytest.raises(OperationNotAllowedError):
            lookup(name)

    def test_of_refuses_what_is_no_overload(self) -> None:
        with pytest.raises(OperationNotAllowedError):
            of(torch.ops.aten.add)  # type: ignore[arg-type]

    def test_everything_inside_resolves(self) -> None:
        table = names()
        assert len(table) > 1000
        for name in table:
            operation = lookup(name)
            assert operation.name == name
            assert lookup(name) is operation
            assert of(operation.overload) is operation

    @pytest.mark.parametrize("pattern", FORBIDDEN)
    def test_no_entry_of_a_forbidden_family(self, pattern: str) -> None:
        assert [name for name in names() if re.search(pattern, name.removeprefix("aten::"))] == []

    def test_no_entry_takes_or_returns_what_no_peer_may_hold(self) -> None:
        for name in names():
            schema = lookup(name).overload._schema
            for argument in schema.arguments:
                spelled = str(argument.real_type)
                assert not re.search(r"Storage|Stream|Future|Dict|Any|__torch__|RRef|^Generator", spelled), (
                    name
                )
            for value in schema.returns:
                assert "Tensor" in str(value.type), name

    def test_file_is_sorted_and_without_doubles(self) -> None:
        from pathlib import Path

        text = Path(arguments_module.__file__).with_name("aten.txt").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert lines == sorted(set(lines))
        assert all(re.fullmatch(r"(aten|torch_nn)::\w+\.\w+", line) for line in lines)
        # What torch registers in Python, for a function of its own.
        assert [line for line in lines if not line.startswith("aten::")] == [
            "torch_nn::_linear_cross_entropy_batch_chunked.default",
            "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction.default",
        ]

    def test_what_is_known_is_not_described_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from farpoint.operations import table

        overload = torch.ops.aten.add.Tensor
        known = of(overload)
        monkeypatch.setattr(table, "_describe", None)
        assert of(overload) is known and lookup(known.name) is known

    def test_names_that_torch_lacks_are_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from farpoint.operations import table

        monkeypatch.setattr(
            torch._C, "_dispatch_get_all_op_names", lambda: ["aten::add.Tensor", "aten::relu"]
        )
        table._aten_names.cache_clear()
        try:
            assert names() == {"aten::add.Tensor", "aten::relu.default"}
        finally:
            table._aten_names.cache_clear()

    def test_what_users_need_is_inside(self) -> None:
        assert names() >= {f"aten::{name}" for name in USED}


class TestResizing:
    def test_every_operation_that_resizes_is_marked(self) -> None:
        assert {name for name in names() if "resize" in name} == RESIZING

    def test_sizes(self) -> None:
        resize = lookup("aten::resize_.default")
        check_arguments(resize, [T, [2**40, 2**20]], {"memory_format": torch.channels_last})
        for size in ([2**40 + 1], [2**40, 2**40], ["1"], [1.0], [None], [T], [S], None, 2, [1] * 65):
            with pytest.raises(ProtocolError):
                check_arguments(resize, [T, size], {})
        for args in ([2.0, [1]], [S, [1]], [[T], [1]]):
            with pytest.raises(ProtocolError):
                check_arguments(resize, args, {})


class TestUninitialised:
    def test_names_are_in_the_table(self) -> None:
        assert names() >= UNINITIALISED

    def test_every_empty_factory_is_marked(self) -> None:
        assert {name for name in names() if re.match(r"aten::(new_)?empty", name)} == UNINITIALISED


class TestOperation:
    @pytest.mark.parametrize(
        ("name", "positions", "by_name"),
        [
            ("add.Tensor", set(), {"alpha"}),
            ("add.Scalar", {1, 2}, set()),
            ("mul.Tensor", set(), set()),
            ("arange.default", set(), set()),
            ("arange.start", set(), set()),
            ("arange.start_step", set(), set()),
            ("arange.start_out", set(), set()),
            ("native_batch_norm.default", {6, 7}, set()),
            ("pow.Tensor_Scalar", {1}, set()),
            ("pow.Tensor_Tensor", set(), set()),
            ("pow.Scalar", {0}, set()),
            ("clamp.default", {1, 2}, set()),
            ("full.default", {1}, set()),
            ("_fused_adam_.default", set(), {"lr", "beta1", "beta2", "weight_decay", "eps"}),
            ("native_dropout.default", {1}, set()),
            ("linspace.default", {0, 1}, set()),
            ("eye.default", set(), set()),
        ],
    )
    def test_scalars(self, name: str, positions: set[int], by_name: set[str]) -> None:
        operation = lookup(f"aten::{name}")
        assert operation.scalar_positions == positions
        assert operation.scalar_names == by_name

    def test_written(self) -> None:
        assert lookup("aten::add_.Tensor").written == {0}
        assert lookup("aten::add.out").written_names == {"out"}
        assert lookup("aten::add.Tensor").written == frozenset()
        assert lookup("aten::_foreach_add_.Scalar").written == {0}
        assert lookup("aten::native_batch_norm.default").written == {3, 4} or not _marks_statistics()
        assert lookup("aten::sort.values").written_names == {"values", "indices"}

    def test_data_dependent(self) -> None:
        for name in (
            "masked_select.default",
            "nonzero.default",
            "bincount.default",
            "_unique2.default",
            "unique_dim.default",
            "unique_consecutive.default",
            "repeat_interleave.Tensor",
            "index.Tensor",
            "histogram.bin_ct",
            "_pack_padded_sequence.default",
        ):
            assert lookup(f"aten::{name}").data_dependent, name
        for name in ("add.Tensor", "sort.default", "topk.default", "index_select.default", "mm.default"):
            assert not lookup(f"aten::{name}").data_dependent, name

    def test_random_and_metadata(self) -> None:
        assert lookup("aten::normal_.default").random
        assert lookup("aten::native_dropout.default").random
        assert not lookup("aten::add_.Tensor").random
        for name in ("t_.default", "unsqueeze_.default", "squeeze_.dim", "transpose_.default", "resize_.default", "resize_as_.default"):
            assert lookup(f"aten::{name}").metadata_writing, name
        assert not lookup("aten::add_.Tensor").metadata_writing


def _marks_statistics() -> bool:
    return any(a.alias_info is not None for a in torch.ops.aten.native_batch_norm.default._schema.arguments)


class TestPlugins:
    def test_operators_of_a_plugin_are_found_while_it_is_there(self) -> None:
        class Plugin:
            @hookimpl
            def farpoint_operators(self) -> Iterator[OperatorPlugin]:
                yield OperatorPlugin(name="farpointtest", operators=("farpointtest::twice.default",))

        library = torch.library.Library("farpointtest", "DEF")  # type: ignore[no-untyped-call]
        library.define("twice(Tensor x, float by=2.0) -> Tensor")  # type: ignore[no-untyped-call]
        plugin = Plugin()
        with pytest.raises(OperationNotAllowedError):
            lookup("farpointtest::twice.default")
        plugins.register(plugin)
        try:
            assert "farpointtest::twice.default" in names()
            operation = lookup("farpointtest::twice.default")
            assert operation.scalar_positions == {1}
            assert of(operation.overload) is operation
        finally:
            plugins.unregister(plugin)
        assert "farpointtest::twice.default" not in names()

    @pytest.mark.parametrize(
        "record",
        [
            OperatorPlugin(name="aten", operators=("aten::from_file.default",)),
            OperatorPlugin(name="mine", operators=("aten::from_file.default",)),
            OperatorPlugin(name="mine", operators=("mine::scale",)),
        ],
    )
    def test_a_plugin_names_only_its_own(self, record: OperatorPlugin) -> None:
        class Plugin:
            @hookimpl
            def farpoint_operators(self) -> Iterator[OperatorPlugin]:
                yield record

        plugin = Plugin()
        plugins.register(plugin)
        try:
            with pytest.raises(PluginError, match="namespace of the plugin's own"):
                lookup("aten::from_file.default")
        finally:
            plugins.unregister(plugin)


class TestShape:
    def test_good_calls_pass(self) -> None:
        call("add.Tensor", T, T, alpha=S)
        call("add.Tensor", T, 2)
        call("add.Tensor", T, S)
        call("add.Tensor", self=T, other=T)
        call("sum.dim_IntList", T, [0, 1], True, dtype=torch.float64)
        call("sum.dim_IntList", T, None)
        call("sum.dim_IntList", T, 1)
        call("clamp.default", T, None, 1.5)
        call("cat.default", [T, T], 1)
        call("index.Tensor", T, [None, T])
        call("zeros.default", [2, 3], dtype=torch.float32, device=torch.device("cpu"), pin_memory=False)
        call("slice.Tensor", T, 0, 0, 2**63 - 1)
        call("max_pool2d_with_indices.default", T, [2, 2], [])
        call(
            "_to_copy.default",
            T,
            dtype=torch.bfloat16,
            layout=torch.strided,
            memory_format=torch.preserve_format,
        )
        call("gelu.default", T, approximate="tanh")
        call("fill_.Scalar", T, True)

    def test_too_many_arguments(self) -> None:
        refused("takes 1 positional arguments, and 2 were sent", "relu.default", T, T)

    def test_keyword_only_argument_sent_by_position(self) -> None:
        refused("takes 2 positional arguments, and 3 were sent", "add.Tensor", T, T, 1)

    def test_unknown_name(self) -> None:
        refused("has no argument 'beta'", "add.Tensor", T, T, beta=1)

    def test_argument_twice(self) -> None:
        refused("'self' twice", "relu.default", T, self=T)

    def test_missing_argument(self) -> None:
        refused("needs its argument 'other'", "add.Tensor", T)
        refused("needs its argument 'out'", "add.out", T, T)

    def test_none_where_something_is_wanted(self) -> None:
        refused("wants Tensor for its argument 'other', and None was sent", "add.Tensor", T, None)

    @pytest.mark.parametrize(
        "value",
        ["x", [T], None, torch.float32, object(), b"", len, torch.Generator(), torch.zeros(1)],
        ids=str,
    )
    def test_no_tensor(self, value: object) -> None:
        refused("wants Tensor", "relu.default", value)

    def test_what_is_written_must_be_a_tensor(self) -> None:
        refused("wants Tensor", "add_.Tensor", 1, T)
        refused("wants Tensor", "add_.Tensor", S, T)
        refused("wants Tensor", "add.out", T, T, out=1.0)

    def test_no_number_in_a_list_of_tensors(self) -> None:
        refused("wants List[Tensor]", "cat.default", [T, 1])
        refused("wants List[Tensor]", "cat.default", [None])
        refused("wants List[Tensor]", "cat.default", T)

    def test_lists_nest_as_the_schema_says(self) -> None:
        refused("for its argument 'size', and a list of 1 was sent", "zeros.default", [[2]])
        refused("for its argument 'dim0', and a list of 1 was sent", "transpose.int", T, [0], 1)
        refused("wants List[int]", "zeros.default", 3)

    def test_fixed_sizes(self) -> None:
        call("avg_pool2d.default", T, 2)
        call("avg_pool2d.default", T, [2, 2])
        refused("wants List[int] of 2", "avg_pool2d.default", T, [2, 2, 2])
        mask = [True, False, True]
        call("native_layer_norm_backward.default", T, T, [3], T, T, None, None, mask)
        refused("wants List[int] of 4", "reflection_pad2d.default", T, [])
        refused("wants List[int] of 4", "reflection_pad2d.default", T, [1])
        refused("of 3", "native_layer_norm_backward.default", T, T, [3], T, T, None, None, mask[:2])


class TestKinds:
    def test_bool_is_no_int(self) -> None:
        refused("the bool 'True' was sent", "transpose.int", T, True, 0)
        refused("the bool 'True' was sent", "zeros.default", [True])

    def test_int_is_no_bool(self) -> None:
        refused("the int '1' was sent", "sum.dim_IntList", T, [0], 1)

    def test_bool_is_no_float(self) -> None:
        refused("the bool 'True' was sent", "native_dropout.default", T, True, True)
        call("native_dropout.default", T, S, True)
        call("native_dropout.default", T, 1, True)

    def test_float_is_no_int(self) -> None:
        refused("the float '1.0' was sent", "transpose.int", T, 1.0, 0)

    def test_scalar_takes_any_number_but_no_text(self) -> None:
        for value in (True, 1, 1.0, 1j, S):
            call("add.Scalar", T, value)
        refused("the str 'one' was sent", "add.Scalar", T, "one")
        refused("a tensor was sent", "add.Scalar", T, T)

    def test_run_time_number_only_where_it_decides_no_shape(self) -> None:
        call("arange.default", 5)
        refused("a number was sent", "arange.default", S)
        refused("a number was sent", "transpose.int", T, S, 0)
        refused("a number was sent", "zeros.default", [S])
        refused("a number was sent", "histogram.bin_ct", T, 5, range=[S, S])

    def test_text(self) -> None:
        call("gelu.default", T, approximate="x" * 64)
        refused("at most 64 characters", "gelu.default", T, approximate="x" * 65)
        refused("the int '1' was sent", "gelu.default", T, approximate=1)

    def test_dtype(self) -> None:
        refused("a dtype that does not travel", "_to_copy.default", T, dtype=torch.qint8)
        refused("the int '6' was sent", "_to_copy.default", T, dtype=6)
        refused("the str 'float32' was sent", "_to_copy.default", T, dtype="float32")

    def test_layout(self) -> None:
        refused("strided tensors only", "zeros.default", [1], layout=torch.sparse_coo)
        refused("the int '0' was sent", "zeros.default", [1], layout=0)

    def test_memory_format(self) -> None:
        call("clone.default", T, memory_format=torch.channels_last)
        refused("the int '1' was sent", "clone.default", T, memory_format=1)

    def test_device(self) -> None:
        refused("computes on cpu only", "zeros.default", [1], device=torch.device("cuda", 0))
        refused("computes on cpu only", "zeros.default", [1], device=torch.device("meta"))
        refused("the str 'cpu' was sent", "zeros.default", [1], device="cpu")

    def test_pinned_memory(self) -> None:
        refused("pins no memory", "zeros.default", [1], pin_memory=True)

    def test_generator(self) -> None:
        call("normal_.default", T, generator=None)
        refused("which no peer may send", "normal_.default", T, generator=torch.Generator())
        refused("which no peer may send", "normal_.default", T, generator=T)

    def test_huge_integers_are_refused_without_being_printed(self) -> None:
        huge = 10**10_000
        refused("beyond 64 bits", "add.Scalar", T, huge)
        refused("beyond 64 bits", "add.Tensor", T, 2**63)
        refused("a huge int", "transpose.int", T, huge, 0)
        refused("a huge int", "gelu.default", T, approximate=huge)


class TestBounds:
    def test_dims(self) -> None:
        call("transpose.int", T, 64, -64)
        refused("at most 64", "transpose.int", T, 65, 0)
        refused("at most 64", "transpose.int", T, -65, 0)
        call("permute.default", T, [0] * 64)
        refused("at most 64 items", "permute.default", T, [0] * 65)

    def test_sizes(self) -> None:
        call("zeros.default", [2**40])
        refused("at most 1099511627776", "zeros.default", [2**40 + 1])
        refused("at most 1099511627776", "expand.default", T, [-(2**40) - 1])
        refused("at most 64 items", "zeros.default", [1] * 65)

    def test_product_of_sizes(self) -> None:
        call("expand.default", T, [2**40, 2**22])
        refused("overflows 62 bits", "expand.default", T, [2**40, 2**23])
        refused("overflows 62 bits", "zeros.default", [0, 2**40, 2**40])

    def test_strides(self) -> None:
        call("as_strided.default", T, [2], [2**40], 0)
        refused("at most 1099511627776", "as_strided.default", T, [2], [2**40 + 1], 0)
        refused("at most 1099511627776", "as_strided.default", T, [2], [1], 2**40 + 1)

    def test_windows(self) -> None:
        call("avg_pool2d.default", T, [2**20, 1])
        for position in range(4):
            args: list[object] = [[1, 1], [1, 1], [0, 0], [1, 1]]
            args[position] = [2**31, 1]
            refused("at most", "max_pool2d_with_indices.default", T, *args)

    def test_windows_go_forward(self) -> None:
        for position in (0, 1, 3):
            args: list[object] = [[1, 1], [1, 1], [0, 0], [1, 1]]
            args[position] = [1, 0]
            refused("at least 1", "max_pool2d_with_indices.default", T, *args)
        refused("at least 1", "fractional_max_pool2d.default", T, [-1, 1], [2, 2], T)
        call("as_strided.default", T, [2], [0], 0)
        call("constant_pad_nd.default", T, [-1, 0])

    def test_other_bounds(self) -> None:
        refused("at most 64", "empty_permuted.default", [1], [65])
        refused("at most 1099511627776", "embedding_dense_backward.default", T, T, 2**40 + 1, -1, False)
        refused("at most 1099511627776", "bincount.default", T, None, 2**40 + 1)
        refused("at most 400", "round.decimals", T, decimals=401)

    def test_enumerations(self) -> None:
        call("mse_loss.default", T, T, 2)
        refused("at most 3", "mse_loss.default", T, T, 4)

    def test_lists_of_tensors(self) -> None:
        call("cat.default", [T] * 5, limits=Limits(tensor_list=5))
        refused("at most 5 items", "cat.default", [T] * 6, limits=Limits(tensor_list=5))

    def test_numbers_of_results(self) -> None:
        call("split_with_sizes.default", T, [1] * 5, limits=Limits(results=5))
        refused("at most 5 items", "split_with_sizes.default", T, [1] * 6, limits=Limits(results=5))

    def test_bins(self) -> None:
        call("_histogramdd_from_bin_cts.default", T, [1000, 1000])
        refused("more than 16777216 bins", "_histogramdd_from_bin_cts.default", T, [5000, 5000])

    def test_chunks(self) -> None:
        call("mvlgamma.default", T, 10_000)
        refused("at most 10000", "mvlgamma_.default", T, 2**31)
        refused("at most 1048576", "polygamma_.default", T, 2**31)
        refused("at most 64", "unfold.default", T, 65, 1, 1)
        refused("at most 10000", "mvlgamma.default", T, 2**31)
        refused("at most 1048576", "polygamma.default", 2**31, T)

    def test_ranges(self) -> None:
        refused("has more than", "range.step", 0, 2**41)
        call("arange.start_step", 0, 10, 2)
        refused("has more than", "arange.default", 2**41)
        refused("has more than", "arange.start_step", 0, 1, 1e-300)
        refused("a step that is not zero", "arange.start_step", 0, 1, 0)
        refused("finite real numbers", "arange.default", float("inf"))
        refused("finite real numbers", "arange.default", float("nan"))
        refused("finite real numbers", "arange.default", 1j)


class TestScalars:
    @pytest.mark.parametrize("value", [True, 1, -(2**63), 2**63 - 1, 0.5, float("nan"), float("inf"), 1j])
    def test_plain_numbers_pass(self, value: object) -> None:
        check_scalar(lookup("aten::add.Scalar"), value)

    @pytest.mark.parametrize(
        "value", [2**63, -(2**63) - 1, "1", None, [1], torch.tensor(1), T, 10**10_000], ids=type
    )
    def test_others_do_not(self, value: object) -> None:
        with pytest.raises(ProtocolError):
            check_scalar(lookup("aten::add.Scalar"), value)

    def test_subclasses_of_numbers_do_not(self) -> None:
        class Number(int):
            pass

        with pytest.raises(ProtocolError):
            check_scalar(lookup("aten::add.Scalar"), Number(1))

    def test_degrees(self) -> None:
        operation = lookup("aten::special_laguerre_polynomial_l.n_scalar")
        check_scalar(operation, 10_000)
        with pytest.raises(ProtocolError, match="degree"):
            check_scalar(operation, 2**40)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# An operation, arguments that torch itself would send, and replacements of one of them that it would never send.
BAG = (
    ones(2, 3),
    ints(0, 1, 1),
    ints(0, 2),
    ints(0, 0, 1),
    ints(2, 1),
    ints(0, 0),
    4,
    False,
    0,
    False,
    ones(3),
)
MAX_BAG = (*BAG[:5], torch.zeros(2, 3, dtype=torch.int64), 4, False, 2, False, None)
CTC = (ones(4, 1, 6), ints(1, 2)[None], [4], [2], 0)
CTC_BACK = (ones(1), *CTC[:4], ones(1), ones(1, 4, 5), 0)
ADAM = ([ones(2, 3)], [ones(2, 3)], [ones(2, 3)], [ones(2, 3)], [ones(2, 3)], [ones()])
SGD = ([ones(2)], [ones(2)], [ones(2)])
Q, K = ones(1, 2, 3, 4), ones(1, 2, 5, 4)
NORM = (ones(2, 3, 4), ones(3), ones(3), ones(3), ones(3), False, 0.1, 1e-5)
NORM_BACK = (ones(2, 3), ones(2, 3), ones(3), None, None, ones(3), ones(3), True, 1e-5, [True] * 3)

RULES: list[tuple[str, tuple[Any, ...], dict[int, list[Any]]]] = [
    ("_adaptive_avg_pool2d_backward.default", (ones(2, 3, 3), ones(2, 6, 6)), {0: [ones(3, 3, 3)], 1: [ones(2, 6, 0)]}),
    ("_adaptive_avg_pool3d_backward.default", (ones(2, 1, 3, 3), ones(2, 2, 6, 6)), {0: [ones(2, 3, 3)]}),
    *(
        (f"{pool}_backward.default", (ones(1, 2, 2), ones(1, 4, 4), *window, ints(0, 1, 2, 15).view(1, 2, 2)), {-1: bad})
        for bad in ([ints(0, 1, 2, 16).view(1, 2, 2), ints(0, 1, 2, -1).view(1, 2, 2), ints(0), ones(1, 2, 2)],)
        for pool, window in (
            ("adaptive_max_pool2d", ()),
            ("fractional_max_pool2d", ([2, 2], [2, 2])),
            ("max_pool2d_with_indices", ([2, 2], [2, 2], [0, 0], [1, 1], False)),
        )
    ),
    ("adaptive_max_pool3d_backward.default", (ones(1, 1, 1, 2), ones(1, 2, 2, 2), ints(0, 7).view(1, 1, 1, 2)),
     {2: [ints(0, 8).view(1, 1, 1, 2)]}),
    *(
        (f"{kind}_pad{n}d_backward.default", (ones(*[1] * (n + 1)), ones(*[1] * (n + 1)), [0] * 2 * n), {1: [ones(2, *[1] * n), ones()]})
        for kind in ("reflection", "replication")
        for n in (1, 2, 3)
    ),
    *((f"{kind}_backward_data.default", (ones(2, 3), ones(2, 3), 1, torch.float32), {1: [ones(2, 2), ones(6)]})
      for kind in ("_softmax", "_log_softmax")),
    ("grid_sampler_2d_backward.default", (ones(1, 1, 2, 2), ones(1, 1, 4, 4), ones(1, 2, 2, 2), 0, 0, False, [True] * 2),
     {0: [ones(1, 1, 0, 2), ones(1, 2, 2, 2)], 2: [ones(1, 2, 2)]}),
    ("grid_sampler_3d_backward.default", (ones(1, 1, 1, 2, 2), ones(1, 1, 4, 4, 4), ones(1, 1, 2, 2, 3), 0, 0, False, [True] * 2),
     {0: [ones(1, 1, 0, 2, 2)]}),
    ("max_pool3d_with_indices_backward.default",
     (ones(1, 1, 1, 2), ones(1, 2, 2, 2), [2], [2], [0], [1], False, ints(0, 7).view(1, 1, 1, 2)),
     {7: [ints(0, 8).view(1, 1, 1, 2)]}),
    ("_cdist_backward.default", (ones(2, 3), ones(2, 4), ones(3, 4), 2.0, ones(2, 3)),
     {0: [ones(2, 0)], 1: [ones(2, 3), ones(4)], 2: [ones(3, 0)], 4: [ones(2, 2)]}),
    ("_cdist_backward.default", (ones(5, 2, 3), ones(5, 2, 4), ones(1, 3, 4), 2.0, ones(5, 2, 3)), {1: [ones(4, 2, 4)], 2: [ones(2, 3, 4)]}),
    ("_pdist_forward.default", (ones(3, 4), 2.0), {0: [ones(3), ones(5, 3, 1, 0)]}),
    ("_pdist_backward.default", (ones(3), ones(3, 4), 2.0, ones(3)), {0: [ones(0), ones(2)], 1: [ones(4, 4), ones(0, 5)], 3: [ones(2)]}),
    ("_ctc_loss.default", CTC, {0: [ones(4, 6)], 1: [ints(1, 6)[None], ints(1)[None], ints(-1, 2)[None]], 2: [[5], [-1], [4, 4]], 3: [[3], [-1]], 4: [6, -1]}),
    ("_ctc_loss.default", (CTC[0], ints(1, 2), [4], [2], 0), {1: [ints(1), ints(1, 2, 3)]}),
    ("_ctc_loss_backward.default", CTC_BACK, {0: [ones(0)], 5: [ones(0)], 6: [ones(1, 4, 4), ones(1, 3, 5), ones(4, 5)], 7: [6]}),
    ("_embedding_bag.default", (ones(4, 3), ints(0, 3), ints(0, 1), False, 2), {0: [ones(4)], 1: [ints(0, 4), ints(0, -1), ints(0, 3)[None]], 2: [ints(), ints(0, 3), ints(-1)]}),
    ("_embedding_bag_backward.default", BAG, {0: [ones(3), ones(1, 3)], 1: [ints(0, 1, 4), ints(0, 1)], 2: [ints(2, 0), ints(0, 4), ints(0, 0, 0, 0), ints(0)[None]], 3: [ints(0, 0, 2), ints(0)], 4: [ints(1)], 10: [ones(2)]}),
    ("_embedding_bag_backward.default", MAX_BAG, {5: [torch.full((2, 3), 4), ints(0)]}),
    ("_embedding_bag_per_sample_weights_backward.default", (ones(2, 3), ones(4, 3), ints(0, 3), ints(0, 1), ints(0, 1), 0), {2: [ints(0, 4)], 4: [ints(0, 2), ints(0)]}),
    ("embedding_dense_backward.default", (ones(2, 3), ints(0, 1), 4, -1, False), {0: [ones(3, 3), ones()], 1: [ints(0, 4), ints(0, -1)]}),
    ("_fft_c2r.default", (ones(3, 3, dtype=torch.complex64), [1], 0, 4), {0: [ones(3, 3), ones(3, 0, dtype=torch.complex64)], 1: [[-1], [2], []], 3: [8, 0]}),
    ("_fft_c2c.default", (ones(3, 3, dtype=torch.complex64), [0, 1], 0, True), {0: [ones(3, 3)], 1: [[0, 0]]}),
    ("_fft_r2c.out", (ones(3), [0], 0, False, ones(3, dtype=torch.complex64)), {4: [ones(3)]}),
    ("_fused_adam_.default", ADAM, {1: [[], [ones(3)], [ones(2, 3, dtype=torch.float64)], [ones(1).expand(2, 3)]], 2: [[]], 4: [[ones(1)]], 5: [[], [ones(0)]]}),
    ("_fused_sgd_.default", SGD, {1: [[ones(3)]], 2: [[ones(1)]]}),
    ("native_batch_norm.default", NORM, {0: [ones(2)], 1: [ones(2)], 2: [ones(0)], 3: [ones(4), None], 4: [ones(2), None]}),
    ("native_batch_norm_backward.default", NORM_BACK, {0: [ones(2, 2)], 5: [ones(2), ones(0)], 6: [ones(2)], 7: [False]}),
    ("_native_batch_norm_legit.no_stats", (ones(2, 3), None, None, True, 0.1, 1e-5), {3: [False]}),
    ("native_layer_norm_backward.default", (ones(2, 3), ones(2, 3), [3], ones(2, 1), ones(2, 1), ones(3), ones(3), [True] * 3), {0: [ones(3)], 3: [ones(1)], 4: [ones(3)], 5: [ones(2)]}),
    ("multi_margin_loss_backward.default", (ones(), ones(2, 3), ints(0, 1), 1, 1.0, ones(3), 1), {0: [ones(0), ones(2)], 1: [ones(1, 2, 3)], 5: [ones(2)]}),
    ("multilabel_margin_loss_backward.default", (ones(), ones(2, 3), torch.zeros(2, 3).long(), 1, ones(2, 3)), {2: [torch.full((2, 3), 3), ints(0)], 4: [ones(2)]}),
    ("nll_loss_backward.default", (ones(2), ones(2, 3), ints(0, 1), None, 0, -100, ones()), {0: [ones(0), ones()], 1: [ones(0), ones(1, 2, 3)], 2: [ints(0)]}),
    ("_scaled_dot_product_flash_attention_for_cpu.default", (Q, K, K), {0: [ones(1, 2, 0, 4), ones(1, 3, 3, 4), ones(2, 3, 4), ints(1).expand(1, 2, 3, 4)], 1: [ones(1, 2, 5, 3)], 2: [ones(1, 2, 4, 4)]}),
    ("_scaled_dot_product_flash_attention_for_cpu_backward.default", (Q, Q, K, K, Q, ones(1, 2, 3), 0.0, False), {0: [K], 4: [K], 5: [ones(1, 2, 5)]}),
    ("_weight_norm_interface.default", (ones(2, 3), ones(2, 1), 0), {0: [ones(), ones(0)], 1: [ones(0)], 2: [1, 5]}),
    ("_weight_norm_interface_backward.default", (ones(2, 3), ones(2, 3), ones(2, 1), ones(2, 1), 0), {0: [ones(3)], 2: [ones(1)], 3: [ones(3)]}),
    ("lu_unpack.default", (torch.eye(3), int32(1, 2, 3)), {0: [ones(3)], 1: [int32(), int32(1, 2), int32(0, 2, 3), int32(1, 2, 4)]}),
    ("linalg_lu_solve.default", (torch.eye(3), int32(1, 2, 3), ones(3, 2)), {1: [int32(), int32(1, 2, 2**31 - 1)]}),
    ("linalg_ldl_solve.default", (torch.eye(3), int32(1, -2, -2), ones(3, 2)), {0: [ones(3)], 1: [int32(1, 2), int32(0, 1, 2), int32(1, 2, -3), int32(-1, 2, 3), int32(1, 2, 9)]}),
    ("special_laguerre_polynomial_l.default", (ones(2), ones(2)), {1: [torch.full((2,), 1e12)]}),
    ("special_hermite_polynomial_h.x_scalar", (1.0, ones(2)), {1: [torch.full((2,), 1e12)]}),
    ("_fft_c2c.default", (ones(3, 3, dtype=torch.complex64), [1], 0, True), {0: [ones(3, 0, dtype=torch.complex64)]}),
    ("_embedding_bag_backward.default", BAG, {0: [ones(2, 3, 1)]}),
    ("_weight_norm_interface.default", (ones(2, 3, 4), ones(2), 0), {0: [ones(2, 0, 4)]}),
    ("_weight_norm_interface.default", (ones(2, 3, 2), ones(2), 2), {0: [ones(2, 2)]}),
    ("nll_loss_backward.default", (ones(), ones(3), ints(0), None, 1, -100, ones()), {1: [ones(0)]}),
    ("linalg_eig.default", (torch.eye(2),), {0: [torch.eye(2) * float("inf")]}),
    ("linalg_eigvals.out", (torch.eye(2), ones(2, dtype=torch.complex64)), {0: [torch.eye(2) * float("nan")]}),
    ("lcm.default", (ints(4, 6), ints(2)), {0: [ints(-(2**63))], 1: [ints(-(2**63))]}),
    ("split.Tensor", (ones(1024), 1), {0: [ones(1025)]}),
    ("unbind.int", (ones(2, 1025),), {0: [ones(1025, 2)]}),
    ("segment_reduce.default", (ones(6), "sum", ints(2, 4), None, None, 0, False),
     {0: [ones()], 2: [ints(2, 5), ints(-1, 7), ints(7), ones(2), None, ints(2, 4).view(1, 2)], 3: [ints(0)], 4: [ints(0, 6)], 5: [1, -1]}),
    ("segment_reduce.default", (ones(2, 6), "sum", None, None, ints(0, 2, 6, 0, 3, 3).view(2, 3), 1, False),
     {4: [ints(0, 2, 7, 0, 3, 3).view(2, 3), ints(0, 2, 1, 0, 3, 3).view(2, 3), ints(-1, 2, 6, 0, 3, 3).view(2, 3), ints(0, 2, 6), ints().view(2, 0)]}),
    ("_segment_reduce_backward.default", (ones(2, 3), ones(2, 3), ones(6, 3), "sum", ints(2, 4), None, 0),
     {0: [ones(1, 3), ones(2, 3, dtype=torch.float64)], 1: [ones(2), ones(2, 2)], 4: [ints(2, 5), ints(1, 2, 3)]}),
]  # fmt: skip


class TestOperands:
    @pytest.mark.parametrize(("name", "good", "bad"), RULES, ids=[case[0] for case in RULES])
    def test_rule(self, name: str, good: tuple[object, ...], bad: dict[int, list[object]]) -> None:
        operation = lookup(f"aten::{name}")
        check_operands(operation, [], good)
        by_name = dict(zip((a.name for a in operation.overload._schema.arguments), good, strict=False))
        check_operands(operation, [], (), by_name)
        for position, values in bad.items():
            for value in values:
                args = list(good)
                args[position] = value
                with pytest.raises(ProtocolError, match=re.escape(operation.name)):
                    check_operands(operation, [], args)

    def test_every_rule_is_of_an_operation_in_the_table(self) -> None:
        overloads = {name.removeprefix("aten::") for name in names()}
        table = overloads | {name.partition(".")[0] for name in overloads}
        assert set(operands_module._RULES) <= table

    def test_every_rule_is_tested(self) -> None:
        tested = {name.partition(".")[0] for name, _, _ in RULES} | {"div.Tensor_mode"}
        rules = {base: rule for base, rule in operands_module._RULES.items() if base not in tested}
        # What is left shares all of its rules with one that is tested.
        seen = {rule for base, rule in operands_module._RULES.items() if base in tested}
        assert [base for base, rule in rules.items() if rule not in seen] == []

    def test_tensors_stand_for_arguments(self) -> None:
        operation = lookup("aten::lu_unpack.default")
        check_operands(operation, [torch.eye(3), int32(1, 2, 3)])
        with pytest.raises(ProtocolError, match="pivots"):
            check_operands(operation, [torch.eye(3), int32()])

    def test_pivots_are_free_where_they_are_not_unpacked(self) -> None:
        check_operands(lookup("aten::lu_unpack.default"), [], (torch.eye(3), int32(), True, False))

    def test_switches_need_their_state(self) -> None:
        adam = lookup("aten::_fused_adam_.default")
        check_operands(adam, [], (*ADAM[:4], [], ADAM[5]), {"amsgrad": False, "found_inf": ones(1)})
        for switch in ({"amsgrad": True}, {"found_inf": ones(0)}, {"grad_scale": ones(2)}):
            with pytest.raises(ProtocolError):
                check_operands(adam, [], (*ADAM[:4], [], ADAM[5]), switch)
        sgd = lookup("aten::_fused_sgd_.default")
        check_operands(sgd, [], (*SGD[:2], []), {"momentum": 0.0})
        with pytest.raises(ProtocolError):
            check_operands(sgd, [], (*SGD[:2], []), {"momentum": 0.9})

    def test_division_of_the_smallest_integer(self) -> None:
        operation = lookup("aten::div.Tensor_mode")
        least = ints(-(2**63), 1)
        check_operands(operation, [], (least, ints(2)), {"rounding_mode": "trunc"})
        check_operands(operation, [], (least, ints(-1)), {"rounding_mode": "floor"})
        check_operands(operation, [], (least, -1.0), {"rounding_mode": "trunc"})
        check_operands(operation, [], (int32(-(2**31)), ints(-1)), {"rounding_mode": "trunc"})
        for divisor in (ints(-1), -1):
            with pytest.raises(ProtocolError, match="cannot divide"):
                check_operands(operation, [], (least, divisor), {"rounding_mode": "trunc"})

    def test_attention_mask(self) -> None:
        operation = lookup("aten::_scaled_dot_product_flash_attention_for_cpu.default")
        check_operands(operation, [], (Q, K, K), {"attn_mask": ones(3, 5)})
        for mask in (ones(3, 4), ones(2, 3, 5), ones(3, 2, 3, 5)):
            with pytest.raises(ProtocolError, match="mask"):
                check_operands(operation, [], (Q, K, K), {"attn_mask": mask})

    def test_number_of_results_is_limited(self) -> None:
        operation = lookup("aten::split.Tensor")
        check_operands(operation, [], (ones(6), 2), limits=Limits(results=3))
        check_operands(operation, [], (ones(1, 6), 2, 0), limits=Limits(results=2))
        with pytest.raises(ProtocolError, match="would return 3 tensors"):
            check_operands(operation, [], (ones(6), 2), limits=Limits(results=2))

    def test_weight_norm_along_the_middle(self) -> None:
        operation = lookup("aten::_weight_norm_interface.default")
        with pytest.raises(ProtocolError, match="first or the last"):
            check_operands(operation, [], (ones(2, 3, 4), ones(3), 1))

    def test_a_rule_that_fails_refuses(self) -> None:
        with pytest.raises(ProtocolError, match="do not fit"):
            check_operands(lookup("aten::_ctc_loss.default"), [], (*CTC[:2], 4, [2], 0))

    def test_others_are_not_looked_at(self) -> None:
        check_operands(lookup("aten::add.Tensor"), [])


def test_every_parameter_of_the_table_has_a_rule() -> None:
    """A type that no rule knows would pass None only, which is meant for generators."""
    unknown = set()
    for name in names():
        operation: Operation = lookup(name)
        for _, parameter in parameters_module.signature(operation).by_name.values():
            assert "[" not in parameter.leaf
            if parameter.leaf not in arguments_module._LEAVES:
                unknown.add(parameter.leaf)
    assert unknown == {"Generator"}


def test_random_trees_raise_nothing_but_protocol_errors() -> None:
    """Feed every operation with every kind of value in every position."""
    values: list[object] = [T, S, None, True, 0, -1, 2**62, 10**400, 0.5, float("nan"), 1j, "", "x" * 100]
    values += [torch.float32, torch.strided, torch.preserve_format, torch.device("cpu"), torch.device("meta")]
    values += [[], [T], [None], [S], [0], [True], [[0]], [[[]]], [0.5], ["x"], (1, 2), [2**62] * 70]
    for name in names():
        operation = lookup(name)
        arity = len(operation.overload._schema.arguments)
        for value in values:
            for args, kwargs in (
                ([value] * arity, {}),
                ([T] * (arity - 1) + [value], {}),
                ([T], {"dtype": value}),
            ):
                try:
                    check_arguments(operation, args, kwargs, Limits())
                except ProtocolError as error:
                    assert len(str(error)) < 400

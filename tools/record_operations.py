"""Write the table of operations that a worker executes, `core/farpoint/operations/aten.txt`.

Run torch's own databases of operations, modules and optimizers, and a list of common calls, under a recorder that sees
what reaches `__torch_dispatch__` below autograd: composite operations arrive decomposed, backward formulas arrive too.
From what was seen, subtract what the rules in `FORBIDDEN` name. Nothing else gets in but by an edit of the table::

    PYTHONPATH=core:plugins python tools/record_operations.py            # compare with the table
    PYTHONPATH=core:plugins python tools/record_operations.py --write    # replace it, then review the difference

The databases are part of torch; they need numpy and expecttest. A run takes some minutes on one core.
"""

# ruff: noqa: BLE001, S102, S112 - whatever a sample of torch raises means only that it is not one for us

from __future__ import annotations

import argparse
import inspect
import itertools
import os
import pickle
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

TABLE = Path(__file__).parent.parent / "core" / "farpoint" / "operations" / "aten.txt"

HEADER = """\
# The operations that a worker executes: aten overloads, one a line, sorted. Anything else is refused.
#
# Recorded by tools/record_operations.py from torch's own databases of operations, modules and optimizers, forward and
# backward, minus what the rules in that tool subtract. The file is frozen: a new torch adds nothing by itself.
#
# An operation gets in by review. Ask of it: does it take a path, a callable, an address, a storage or a generator?
# Does it return memory that it has not written? Can it reach memory outside its operands? Which of its numbers decide
# how long it runs or how much it allocates, and are they capped in arguments.py? Does it hand values to the caller
# without `get`? Overloads that the installed torch lacks are skipped.
"""

SECONDS = 20
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)

FORBIDDEN: tuple[tuple[str, str], ...] = (
    (r"from_file", "reads and writes files by name"),
    (r"_efficientzerotensor", "makes a tensor without memory, which kernels below its dispatch key crash on"),
    (
        r"(_?set_?|set_data|_set_.*|set_source.*)",
        "lets a tensor point at the storage of another, without a bound",
    ),
    (r".*storage.*", "deals in storages, not in tensors"),
    (r"_reshape_alias.*", "makes a view from strides that nothing checks"),
    (r"_?resize.*", "grows a storage that others may share, and returns memory that was not written"),
    (r"(_local_scalar_dense|item|equal|is_nonzero|allclose)", "hands a value to the caller without get"),
    (r"_?(print|assert|functional_assert|functional_sym).*", "acts on the process, not on tensors"),
    (r"(_assert.*|sym_.*|_functional_.*)", "acts on the process, or on symbolic sizes"),
    (
        r"(record_stream|_?pin_memory|is_pinned|_lazy_.*|_sync)",
        "deals in devices and streams that are not there",
    ),
    (r".*(cudnn|miopen|cuda|mps|_xpu|hpu).*", "is for a device that is not there"),
    (r".*(mkldnn|xnnpack|vulkan|onednn).*", "makes or takes tensors of a layout that does not travel"),
    (
        r".*(sparse|sspaddmm|coalesce|_csr|_csc|_bsr|_bsc|_coo).*",
        "makes or takes sparse tensors, which do not travel",
    ),
    (
        r"(crow_indices|col_indices|ccol_indices|row_indices|_?indices|_?values|_dimV|_dimI|_nnz|_?dense_dim).*",
        "the same",
    ),
    (r"(q_scale|q_zero_point|q_per_channel.*|int_repr.*|_make_per_.*|qscheme)", "deals in quantized tensors"),
    (r"(quantize_.*|dequantize.*|quantized_.*|_empty_.*affine.*|fbgemm_.*|_choose_qparams.*)", "the same"),
    (
        r".*nested.*|to_padded_tensor|_jagged.*|_padded_dense.*|_nt_.*",
        "makes or takes nested tensors, which do not travel",
    ),
    (r"(align_.*|refine_names|rename.*|.*_names?)", "deals in named tensors"),
    (
        r"(data|_version|requires_grad_|retain_grad|_backward|is_leaf|output_nr|_fw_primal.*|_?make_dual.*|_unpack_dual)",
        "is autograd's, which lives in the client",
    ),
    (
        r"(_add_batch_dim|_remove_batch_dim|_wrap_.*|_unwrap_.*|_test_.*|_has_same_storage_numel|_new_zeros_with.*)",
        "is internal to functorch, to tests or to autograd",
    ),
    (
        r"(_use_.*|_is_zerotensor|is_.*|_fused_sdp_choice.*|_has_.*|_propagate_xla.*)",
        "answers about a tensor; the client knows the answer",
    ),
    (r"(lift|_to_cpu|_to_functional.*|_from_functional.*|_enable_functional.*)", "is internal to tracing"),
    (r"(_?c10d.*|_transform_bias_rescale_qkv)", "is internal"),
    (r"(_pin.*|to_dense|_to_dense)", "expects a layout that does not travel"),
    (
        r"(_weight_int4pack.*|_convert_weight_to_int4pack.*|_dyn_quant.*|_weight_int8pack.*|_scaled_.*mm.*)",
        "reads packed weights whose layout nothing checks",
    ),
    (
        r"_?segment_reduce.*",
        "trusts lengths and offsets, and its `unsafe` switch turns off what it does check",
    ),
    (
        r"_fused_moving_avg_obs_fq_helper.*",
        "trusts the sizes of seven buffers; observers of quantization stay with the client",
    ),
    (r"(_mkl_linear|_rowwise_prune|_embedding_bag_per_sample.*_meta)", "is internal"),
)
"""Pattern of the name of an operation without its overload, matched in full, and why what it names stays outside."""

RETURN_NOTHING = {"_linalg_check_errors"}
"""Operations that are there for the error that they raise: without it `torch.linalg.inv` of a singular matrix would succeed."""

ADDED: dict[str, str] = {
    "aten::_assert_async.msg": "raises on the CPU if a truth value of the caller's is false: for what torch reads only to raise",
    "aten::_segment_reduce_backward.default": "what it trusts is checked by a rule",
    "aten::cov.default": "is composite and reads weights to check them; never recorded, as it comes apart above dispatch",
    "aten::narrow.Tensor": "likewise, its start",
    "aten::one_hot.default": "likewise, its classes",
    "aten::resize_.default": "is carried out by the worker, not by torch: it charges the growth, and zeroes it",
    "aten::resize_as_.default": "likewise",
    "aten::scatter.value_reduce": "the same as scatter.reduce with a number, which too few samples call",
    "aten::scatter_.value_reduce": "likewise",
    "aten::segment_reduce.default": "what it trusts is checked by a rule, also if it is told `unsafe`",
    "aten::tensor_split.tensor_indices_or_sections": "as narrow.Tensor, its indices",
    "torch_nn::_linear_cross_entropy_batch_chunked.default": "is Python of torch's own, made of operations that check what they get",
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction.default": "likewise",
}
"""What is in the table by review alone, and why it may be."""

FORBIDDEN_TYPES = re.compile(
    r"Storage|Stream|Generator\(|RRef|Future|Dict|\bt\b|Any|Callable|__torch__|Dimname|Tensor\?\?"
)
"""Types in a schema that keep it outside: what they are cannot come from a peer."""


def spell(overload: torch._ops.OpOverload) -> str:
    """Return the name of an overload as the table spells it."""
    return f"{overload.namespace}::{overload._schema.name.split('::')[1]}.{overload._overloadname}"


def resolve(name: str) -> torch._ops.OpOverload:
    """Return the overload that a name of the table spells."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    return found


def objection(overload: torch._ops.OpOverload) -> str | None:
    """Return why an overload must not be in the table, or None."""
    if overload.namespace != "aten":
        return "is not of aten"
    base = overload._schema.name.split("::")[1]
    for pattern, reason in FORBIDDEN:
        if re.fullmatch(pattern, base):
            return reason
    if (base, overload._overloadname) == ("linalg_ldl_solve", "out"):
        return "corrupts memory where out has to be resized"
    if base.startswith("empty") and overload._overloadname.endswith("out"):
        return "resizes a tensor without writing it"
    for argument in overload._schema.arguments:
        if FORBIDDEN_TYPES.search(str(argument.type)):
            return f"takes a {argument.type}"
    returns = [str(value.type) for value in overload._schema.returns]
    written = any(a.alias_info is not None and a.alias_info.is_write for a in overload._schema.arguments)
    if not any("Tensor" in kind for kind in returns) and not written and base not in RETURN_NOTHING:
        return "returns no tensor"
    if any("Tensor" not in kind for kind in returns):
        return "returns something besides tensors"
    return None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which overloads ran, for what, and some of the calls.

    Attributes:
        seen: Overload by name, in the order they were met.
        origin: What made the first call.
        calls: A few small calls of each, for `--calls`: they are what a fuzzer starts from.
    """

    def __init__(self, keep: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, torch._ops.OpOverload] = {}
        self.origin: dict[str, str] = {}
        self.calls: dict[str, list[Any]] = {}
        self.label = ""
        self._keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = spell(func)
        copy = self._copy(name, args, kwargs or {}) if self._keep else None
        result = func(*args, **(kwargs or {}))
        # What never runs on strided tensors of the CPU raises above, and stays out of the table.
        if name not in self.seen:
            self.seen[name] = func
            self.origin[name] = self.label
        if copy is not None:
            self.calls.setdefault(name, []).append(copy)
        return result

    def _copy(self, name: str, args: Any, kwargs: Any) -> Any:
        if len(self.calls.get(name, ())) >= self._keep:
            return None
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if sum(leaf.numel() for leaf in leaves) > 20_000 or any(
            leaf.layout is not torch.strided for leaf in leaves
        ):
            return None
        try:
            copy = tree_map(
                lambda leaf: leaf.detach().clone() if type(leaf) is torch.Tensor else leaf, (args, kwargs)
            )
            pickle.loads(pickle.dumps(copy))  # some unsigned dtypes go in and do not come out
        except Exception:
            return None
        return copy


class _TookTooLongError(Exception):
    pass


def _alarm(*_: object) -> None:
    raise _TookTooLongError


class Runner:
    """Runs one call after the other under the recorder, and counts those that failed."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.failed: Counter[str] = Counter()
        self.done = 0

    def __call__(self, label: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call; what it raises only counts, as many samples are not meant for every variant."""
        self.recorder.label = label
        signal.alarm(SECONDS)
        try:
            with self.recorder:
                result = call(*args, **kwargs)
            self.done += 1
            return result
        except Exception as error:
            self.failed[type(error).__name__] += 1
            return None
        finally:
            signal.alarm(0)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _backward(result: Any, inputs: list[torch.Tensor], *, twice: bool) -> None:
    outputs = [out for out in _tensors(result) if out.requires_grad]
    inputs = [leaf for leaf in inputs if leaf.requires_grad]
    if not outputs or not inputs:
        return
    seeds = [torch.ones_like(out) for out in outputs]
    grads = torch.autograd.grad(outputs, inputs, seeds, create_graph=twice, allow_unused=True)
    if not twice:
        return
    again = [grad for grad in grads if grad is not None and grad.requires_grad]
    if again:
        torch.autograd.grad(again, inputs, [torch.ones_like(grad) for grad in again], allow_unused=True)


def _forward_backward(
    call: Callable[..., Any], args: Any, kwargs: Any, leaves: list[torch.Tensor], twice: bool
) -> None:
    _backward(call(*args, **kwargs), leaves, twice=twice)


def _clone(sample: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, sample)


def operations(run: Runner) -> None:
    """Run the samples of every operation of torch's database."""
    from torch.testing._internal.common_methods_invocations import op_db

    for number, info in enumerate(op_db):
        if number % 50 == 0:
            print(
                f"{number} of {len(op_db)} operations: {len(run.recorder.seen)} overloads",
                file=sys.stderr,
                flush=True,
            )
        # Each in a process of its own: on torch 2.13 the forward-mode derivative of some crashes below a mode.
        if not _apart(run, partial(_database_entry, run, info, transforms=True)):
            print(f"{info.name} crashed; again without transforms", file=sys.stderr, flush=True)
            _apart(run, partial(_database_entry, run, info, transforms=False))


def _apart(run: Runner, work: Callable[[], None]) -> bool:
    recorder = run.recorder
    before = {name: len(calls) for name, calls in recorder.calls.items()}
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                work()
                calls = {name: calls[before.get(name, 0) :] for name, calls in recorder.calls.items()}
                found = (recorder.origin, calls, run.done, run.failed)
                with open(file.name, "wb") as result:
                    pickle.dump(found, result)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status != 0:
            return False
        origin, more, run.done, run.failed = pickle.load(file)
    for name, label in origin.items():
        recorder.seen.setdefault(name, resolve(name))
        recorder.origin.setdefault(name, label)
        recorder.calls.setdefault(name, []).extend(more.get(name, ()))
    return True


def _database_entry(run: Runner, info: Any, *, transforms: bool) -> None:
    try:
        supported = info.supported_dtypes("cpu")
    except Exception:
        supported = set(DTYPES)
    for dtype in DTYPES:
        if dtype not in supported:
            continue
        differentiable = info.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
        many = 12 if dtype is torch.float32 else 4
        try:
            samples = list(
                itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=differentiable), many)
            )
        except Exception:
            continue
        for index, sample in enumerate(samples):
            _operation(run, info, dtype, index, sample, transforms=transforms)


def _operation(
    run: Runner, info: Any, dtype: torch.dtype, index: int, sample: Any, *, transforms: bool
) -> None:
    label = f"{info.name} {info.variant_test_name} {dtype}".strip()
    arguments = (sample.input, *sample.args)
    leaves = _tensors((arguments, sample.kwargs))
    call = info.op
    result = run(label, lambda: call(*arguments, **sample.kwargs))
    if result is not None:
        for twice in {index < 3, False}:
            run(f"{label} backward", _forward_backward, call, arguments, sample.kwargs, leaves, twice)
    with torch.no_grad():
        if any(leaf.requires_grad for leaf in leaves):
            run(f"{label} no_grad", lambda: call(*arguments, **sample.kwargs))
        for variant in (info.inplace_variant, info.operator_variant, info.inplace_operator_variant):
            if variant is not None:
                copy = _clone((arguments, sample.kwargs))
                run(f"{label} variant", variant, *copy[0], **copy[1])
        if info.supports_out and isinstance(result, torch.Tensor):
            out = torch.zeros_like(result)
            run(f"{label} out=", lambda: call(*_clone(arguments), **_clone(sample.kwargs), out=out))
        elif info.supports_out and isinstance(result, tuple) and len(_tensors(result)) == len(result):
            outs = tuple(torch.zeros_like(each) for each in result)
            run(f"{label} out=", lambda: call(*_clone(arguments), **_clone(sample.kwargs), out=outs))
    if info.inplace_variant is not None and leaves and leaves[0].requires_grad:

        def inplace() -> None:
            first = arguments[0] * 1
            _backward(info.inplace_variant(first, *arguments[1:], **sample.kwargs), leaves, twice=False)

        run(f"{label} in-place backward", inplace)
    if transforms and index < 1 and isinstance(sample.input, torch.Tensor):
        plain = _clone(arguments)
        kwargs = _clone(sample.kwargs)
        run(
            f"{label} vmap",
            lambda: torch.func.vmap(lambda x: call(x, *plain[1:], **kwargs), randomness="same")(
                torch.stack([plain[0]] * 2)
            ),
        )
        if sample.input.requires_grad:
            run(
                f"{label} jvp",
                lambda: torch.func.jvp(
                    lambda x: call(x, *plain[1:], **kwargs), (plain[0],), (torch.ones_like(plain[0]),)
                ),
            )


def foreach(run: Runner) -> None:
    """Run the samples of the operations on lists of tensors, that optimizers use."""
    from torch.testing._internal import common_methods_invocations as database

    names = [name for name in dir(database) if name.startswith("foreach_") and name.endswith("_op_db")]
    for info in itertools.chain.from_iterable(getattr(database, name) for name in names):
        for dtype in DTYPES:
            try:
                samples = list(itertools.islice(info.sample_inputs("cpu", dtype, noncontiguous=False), 40))
            except Exception:
                continue
            for sample in samples:
                for variant in (info.method_variant, info.inplace_variant):
                    if variant is not None:
                        arguments, kwargs = _clone(((sample.input, *sample.args), sample.kwargs))
                        kwargs.pop("disable_fastpath", None)
                        run(f"{info.name} {dtype}", variant, *arguments, **kwargs)


def modules(run: Runner) -> None:
    """Run the samples of every module of torch's database, in training and in evaluation."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for dtype, training, onednn in itertools.product(
            (torch.float32, torch.float64), (True, False), (True, False)
        ):
            try:
                samples = info.module_inputs_func(info, "cpu", dtype, True, training)
            except Exception:
                continue
            with torch.backends.mkldnn.flags(enabled=onednn):
                for sample in samples:
                    if sample.forward_input is not None:
                        run(
                            f"{info.name} {dtype} train={training}",
                            _module_step,
                            info.module_cls,
                            sample,
                            dtype,
                            training,
                        )


def _module_step(kind: Any, sample: Any, dtype: torch.dtype, training: bool) -> None:
    made, called = sample.constructor_input, sample.forward_input
    module = kind(*made.args, **{"device": "cpu", "dtype": dtype, **made.kwargs})
    module.train(training)
    result = module(*called.args, **called.kwargs)
    _backward(result, [*module.parameters(), *_tensors((called.args, called.kwargs))], twice=False)
    with torch.no_grad():
        module(*_clone(called.args), **_clone(called.kwargs))


def optimizers(run: Runner) -> None:
    """Run two steps of every optimizer of torch's database, and clip the gradients."""
    from torch.testing._internal.common_optimizers import optim_db

    modes: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
    modes += [{"lr": torch.tensor(0.01)}, {"lr": torch.tensor(0.01), "fused": True}]
    for info in optim_db:
        for sample in info.optim_inputs_func(device="cpu"):
            for mode in modes:
                options = {**sample.kwargs, **mode}
                run(
                    f"{info.optim_cls} {mode}",
                    _optimizer_steps,
                    info.optim_cls,
                    options,
                    info.step_requires_closure,
                )


def _optimizer_steps(kind: Any, options: dict[str, Any], takes_closure: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1, bias=False))
    matrices_only = kind is getattr(torch.optim, "Muon", None)
    optimizer = kind([p for p in model.parameters() if p.ndim == 2 or not matrices_only], **options)
    batch = torch.randn(5, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(batch).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        return loss

    for _ in range(2):
        if takes_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def methods(run: Runner) -> None:
    """Call every method of a tensor with a few plain arguments, operators included."""
    skipped = {
        "backward",
        "share_memory_",
        "numpy",
        "storage",
        "untyped_storage",
        "__dlpack__",
        "set_",
        "resize_",
        "map_",
        "map2_",
        "apply_",
    }
    skipped |= {
        "__reduce__",
        "__reduce_ex__",
        "__setstate__",
        "__deepcopy__",
        "__init_subclass__",
        "__class__",
        "__del__",
        "register_hook",
    }
    skipped |= {"module_load", "cuda", "pin_memory", "record_stream", "xpu", "ipu", "_typed_storage"}
    for dtype in DTYPES:
        matrix = torch.ones(3, 3, dtype=dtype)
        vector = torch.ones(3, dtype=dtype)
        index = torch.tensor([0, 1])
        for name in dir(torch.Tensor):
            if name in skipped or not callable(getattr(torch.Tensor, name, None)):
                continue
            trials: list[tuple[Any, ...]] = [
                (),
                (matrix,),
                (2,),
                (0.5,),
                (0,),
                (0, 1),
                (vector,),
                (-1,),
                (0, index),
                (index,),
            ]
            trials += [
                (0, index, matrix[:2]),
                (0, index, 1.0),
                (matrix, 2),
                (matrix, matrix),
                (3, 3),
                (torch.float64,),
                (0, 1, 1),
                (2, 2, 2),
            ]
            trials += [
                (matrix.bool(), 1.0),
                (matrix.bool(), vector),
                (matrix.bool(),),
                (vector, vector),
                (True,),
                (0, 1, 0, 1),
            ]
            for arguments in trials:
                copies = _clone((matrix, *arguments))
                with torch.no_grad():
                    run(f"Tensor.{name} {dtype}", getattr(torch.Tensor, name), *copies)


def functions(run: Runner) -> None:
    """Call every function that tensors can override with numbers on one side or the other, and with `out=`."""
    skipped = re.compile(
        r"from_file|set_|manual_seed|save|load|cudnn|miopen|fbgemm|quantize|nested|mkldnn|_print|compile|numpy|resize"
    )
    packages = (torch, torch.special, torch.linalg, torch.fft, torch.nn.functional)
    found = [f for package in packages for f in torch.overrides.get_overridable_functions().get(package, ())]
    for function in sorted(set(found), key=lambda f: f.__name__):
        name = function.__name__
        if skipped.search(name):
            continue
        for dtype in (torch.float32, torch.int64):
            matrix = torch.ones(3, 3, dtype=dtype)
            for arguments in (
                (matrix,),
                (matrix, 2),
                (2, matrix),
                (matrix, 0.5),
                (0.5, matrix),
                (matrix, matrix),
                (matrix, matrix, 2),
            ):
                result = run(f"{name} {dtype}", function, *_clone(arguments))
                if isinstance(result, torch.Tensor):
                    run(f"{name} {dtype} out=", function, *_clone(arguments), out=torch.zeros_like(result))


def common(run: Runner) -> None:
    """Run calls that the databases leave out: factories, indexing, assignment, casts, random fills, in-place views."""
    for source in inspect.cleandoc(_COMMON).splitlines():
        # A backward pass that is itself recorded for autograd may take another way.
        for training, twice in ((True, True), (True, False), (False, False)):
            run(source, _lines, source, training, twice)


def _lines(source: str, training: bool, twice: bool) -> None:
    x = torch.rand(4, 6, requires_grad=training)
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "x": x, "y": x * 1}
    names["i"] = torch.tensor([0, 2, 1])
    names["m"] = torch.rand(4, 6) > 0.5
    names["g"] = torch.nn.GRU(6, 5, 2, dropout=0.1, bidirectional=True).train(training)
    names["l"] = torch.nn.LSTM(6, 5, proj_size=2).train(training)
    before = dict(names)
    exec(source, names)
    made = [value for name, value in names.items() if name == "y" or before.get(name) is not value]
    _backward([value for value in made if isinstance(value, torch.Tensor | tuple | list)], [x], twice=twice)


_COMMON = """
    r = torch.zeros(3), torch.ones(3), torch.full((2,), 1.5), torch.full((2,), 1), torch.full((2,), True), torch.full((2,), 1j)
    r = torch.empty(3), torch.empty_strided((2, 2), (2, 1)), torch.empty_permuted((2, 2), (1, 0)), torch.empty_like(x)
    r = x.new_empty(3), x.new_zeros(3), x.new_ones(3), x.new_full((2,), 1), x.new_tensor([1.0]), x.new_empty_strided((2,), (1,))
    r = torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2), torch.rand_like(x), torch.randn_like(x), torch.randint_like(x, 5), torch.randint_like(x, 2, 5)
    r = torch.rand(3), torch.randn(3), torch.randint(5, (3,)), torch.randint(2, 5, (3,)), torch.randperm(5), torch.scalar_tensor(1.0)
    r = torch.arange(5), torch.arange(1, 5), torch.arange(1, 5, 2), torch.range(1, 5), torch.linspace(0, 1, 5), torch.logspace(0, 1, 5), torch.eye(3), torch.eye(3, 4)
    r = torch.arange(5, out=torch.zeros(5)), torch.arange(0, 5, 1, out=torch.zeros(5)), torch.linspace(0, 1, 5, out=torch.zeros(5)), torch.logspace(0, 1, 5, out=torch.zeros(5)), torch.eye(3, out=torch.zeros(3, 3)), torch.eye(3, 4, out=torch.zeros(3, 4))
    r = torch.zeros(3, out=torch.ones(3)), torch.ones(3, out=torch.zeros(3)), torch.full((3,), 2.0, out=torch.zeros(3)), torch.rand(3, out=torch.zeros(3)), torch.randn(3, out=torch.zeros(3)), torch.randperm(3, out=torch.zeros(3, dtype=torch.long))
    r = torch.randint(5, (3,), out=torch.zeros(3)), torch.randint(2, 5, (3,), out=torch.zeros(3)), torch.range(1, 5, out=torch.zeros(5))
    r = torch.linspace(torch.tensor(0.0), torch.tensor(1.0), 5), torch.linspace(0.0, torch.tensor(1.0), 5), torch.linspace(torch.tensor(0.0), 1.0, 5), torch.logspace(torch.tensor(0.0), torch.tensor(1.0), 5), torch.logspace(0.0, torch.tensor(1.0), 5), torch.logspace(torch.tensor(0.0), 1.0, 5)
    r = torch.tril_indices(3, 3), torch.triu_indices(3, 3), torch.hann_window(5), torch.hamming_window(5), torch.blackman_window(5), torch.bartlett_window(5), torch.kaiser_window(5), torch.vander(torch.ones(3))
    r = torch.hann_window(5, periodic=False), torch.hamming_window(5, False), torch.hamming_window(5, False, 0.5), torch.hamming_window(5, False, 0.5, 0.4), torch.blackman_window(5, False), torch.bartlett_window(5, False), torch.kaiser_window(5, False), torch.kaiser_window(5, False, 8.0)
    r = torch.fft.fftfreq(5), torch.fft.rfftfreq(5), torch.tensor([1.0, 2.0]), torch.as_tensor([1, 2]), torch.tensor(1), torch.complex(x, x), torch.polar(x, x)
    r = torch.normal(0.0, 1.0, (3,)), torch.normal(x.detach(), 1.0), torch.normal(0.0, x.detach()), torch.normal(x.detach(), x.detach()), torch.bernoulli(x.detach()), torch.bernoulli(x.detach(), 0.5), torch.poisson(x.detach()), torch.binomial(x.detach() * 9, x.detach()), torch.multinomial(x.detach(), 2)
    z = x.detach().clone(); z.normal_(); z.uniform_(); z.exponential_(); z.geometric_(0.5); z.cauchy_(); z.log_normal_(); z.random_(); z.random_(5); z.random_(2, 5); z.bernoulli_(); z.bernoulli_(0.5); z.bernoulli_(z)
    y[0] = 1; y[:, 1] = 2.0; y[1:3] = 0; y[..., 0] = y[..., 1]; y[i] = 1.0; y[i, i] = 0.0; y[m] = 3.0; y[m.nonzero(as_tuple=True)] = 1.0
    r = x[0], x[:, 1], x[1:3], x[..., 0], x[None], x[i], x[i, i], x[m], x[::2], x[-1, -1], x[[0, 1]], x[i, 1:3], x[torch.tensor(0)], x[True], x[:, i], x[i[None], i[:, None]]
    r = x.float(), x.double(), x.half(), x.bfloat16(), x.int(), x.long(), x.bool(), x.cfloat(), x.to(torch.float64), x.type(torch.int8), x.to(dtype=torch.float16, copy=True), x.to("cpu"), x.cpu(), x.contiguous(memory_format=torch.contiguous_format)
    r = x.t(), x.T, x.mT, x.view(24), x.view(torch.int32), x.reshape(24), x.flatten(), x.unflatten(1, (2, 3)), x.permute(1, 0), x.transpose(0, 1), x.expand(2, 4, 6), x.expand_as(x), x.unsqueeze(0), x.unsqueeze(0).squeeze(0), x.unsqueeze(0).squeeze(), x[None].squeeze((0,)), x.narrow(0, 0, 2), x.select(0, 1), x.diagonal(), x.unfold(0, 2, 1), x.as_strided((2, 2), (6, 1)), x.split(2), x.split((1, 3)), x.chunk(2), x.unbind(), x.tensor_split(3), x.movedim(0, 1), x.detach(), x.clone(), x.view_as(x), x.swapaxes(0, 1), x.ravel(), x.real, x.hsplit(2), x.vsplit(2)
    z = x.detach().clone(); z.t_(); z.transpose_(0, 1); z.unsqueeze_(0); z.squeeze_(0); z.squeeze_(); z.unsqueeze_(0); z.squeeze_((0,)); z.swapaxes_(0, 1); z.as_strided_((2, 2), (6, 1)); z.detach_(); z.requires_grad_()
    y.mul_(2).add_(1).sub_(0.5).div_(2).clamp_(0, 1).pow_(2).sqrt_().copy_(x.detach()).zero_().fill_(1).fill_(torch.tensor(1.0)).neg_().exp_()
    y += 1; y *= 2; y -= x; y /= 2; y **= 2; y //= 1; y %= 3
    r = torch.where(m, x, 0.0), torch.where(m, 0.0, x), torch.where(m, x, x), torch.where(m, 1, 2), torch.where(m)
    r = x @ x.t(), torch.mm(x, x.t()), torch.einsum("ij,kj->ik", x, x), torch.bmm(x[None], x.t()[None]), torch.addmm(x @ x.t(), x, x.t()), torch.baddbmm((x @ x.t())[None], x[None], x.t()[None]), torch.matmul(x, x[0]), torch.dot(x[0], x[1]), torch.outer(x[0], x[1]), torch.tensordot(x, x, 2), torch.chain_matmul(x, x.t(), x), torch.linalg.multi_dot([x, x.t(), x])
    r = x.var(), x.std(), x.var(0), torch.var_mean(x, 0), torch.std_mean(x), x.norm(), x.norm(p=1, dim=0), torch.linalg.vector_norm(x), torch.linalg.matrix_norm(x), x.logsumexp(0), x.median(), x.mode(), x.kthvalue(1), x.topk(2), x.sort(), x.argsort(), x.msort(), x.cumsum(0), x.cumprod(0), x.cummax(0), x.logcumsumexp(0), x.quantile(0.5), x.nanquantile(0.5), x.histc(5), torch.histogram(x.detach(), 5)
    r = g(x[None].expand(3, 4, 6))[0], l(x[None].expand(3, 4, 6))[0], torch.nn.RNN(6, 5)(x)[0], torch.nn.RNN(6, 5, nonlinearity="relu")(x)[0], torch.nn.LSTMCell(6, 5)(x)[0], torch.nn.GRUCell(6, 5)(x), torch.nn.RNNCell(6, 5)(x), torch.nn.RNNCell(6, 5, nonlinearity="relu")(x)
    s = torch.nn.utils.rnn.pack_padded_sequence(x[None].expand(3, 4, 6), [3, 2, 2, 1]); r = g(s)[0].data; q, n = torch.nn.utils.rnn.pad_packed_sequence(g(s)[0]); w = l(s)[0].data, torch.nn.utils.rnn.pad_sequence([x, x[:2]])
    q = x.view(1, 2, 2, 6); r = F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q, is_causal=True), F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(2, 2)), F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    q = x.view(1, 2, 2, 6); r = torch.ops.aten._scaled_dot_product_attention_math(q, q, q), torch.ops.aten._scaled_dot_product_attention_math(q, q, q, is_causal=True, dropout_p=0.1)
    r = torch.nn.MultiheadAttention(6, 2)(x[None], x[None], x[None])[0], torch.nn.TransformerEncoderLayer(6, 2, 8)(x[None]), torch.nn.TransformerDecoderLayer(6, 2, 8)(x[None], x[None]), torch.nn.Transformer(6, 2, 1, 1, 8)(x[None], x[None])
    r = F.conv1d(x[None], torch.ones(2, 4, 2)), F.conv2d(x[None, None], torch.ones(1, 1, 2, 2), torch.ones(1)), F.conv3d(x[None, None, None], torch.ones(1, 1, 1, 2, 2)), F.conv_transpose2d(x[None, None], torch.ones(1, 1, 2, 2)), F.conv2d(x[None, None], torch.ones(1, 1, 2, 2), padding="same")
    r = F.batch_norm(x, torch.zeros(6), torch.ones(6), torch.ones(6), torch.zeros(6), True), F.batch_norm(x, torch.zeros(6), torch.ones(6)), F.layer_norm(x, (6,)), F.group_norm(x, 2), F.instance_norm(x[None]), F.rms_norm(x, (6,)), F.local_response_norm(x[None], 2), F.normalize(x)
    r = F.dropout(x), F.dropout(x, training=False), F.dropout1d(x), F.alpha_dropout(x), F.feature_alpha_dropout(x), F.dropout(y, inplace=True), F.rrelu(x, training=True), F.gumbel_softmax(x, hard=True)
    r = F.embedding(i, x), F.embedding(i, x, padding_idx=0), F.embedding_bag(i, x, torch.tensor([0])), F.embedding_bag(i, x, torch.tensor([0]), mode="sum"), F.embedding_bag(i[None], x, mode="max"), F.one_hot(i, 4)
    r = F.cross_entropy(x[:3], i), F.nll_loss(x[:3].log_softmax(1), i), F.mse_loss(x, x.detach() + 1), F.l1_loss(x, x.detach() + 1), F.smooth_l1_loss(x, x.detach() + 1), F.huber_loss(x, x.detach() + 1), F.binary_cross_entropy(x, x.detach()), F.binary_cross_entropy_with_logits(x, x.detach()), F.kl_div(x, x.detach()), F.cross_entropy(x, x.detach()), F.ctc_loss(x[:, None].log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])), F.ctc_loss(x[:, None].log_softmax(2), torch.tensor([[1, 2]]), (4,), (2,)), F.gaussian_nll_loss(x, x.detach(), x.detach()), F.poisson_nll_loss(x, x.detach())
    r = torch.stack([x, x]), torch.cat([x, x]), torch.hstack([x, x]), torch.vstack([x, x]), torch.dstack([x, x]), torch.column_stack([x, x]), torch.block_diag(x, x), torch.meshgrid(x[0], x[1], indexing="ij"), torch.cartesian_prod(x[0], x[1]), torch.broadcast_tensors(x, x[0]), x.repeat(2, 2), x.tile(2), x.repeat_interleave(2), x.repeat_interleave(torch.tensor([1, 2, 1, 2]), 0), x.roll(1), x.flip(0), x.rot90(), torch.combinations(x[0])
    r = torch.unique(i), torch.unique(i, return_inverse=True, return_counts=True), torch.unique(x.detach(), dim=0), torch.unique_consecutive(i), torch.nonzero(m), torch.argwhere(m), torch.count_nonzero(m), torch.masked_select(x, m), torch.bincount(i), torch.bucketize(x.detach(), x.detach()[0]), torch.searchsorted(x.detach(), x.detach()), torch.isin(i, i), torch.isin(i, 1), torch.isin(1, i), torch.take(x, i), torch.take_along_dim(x, i[None])
    y.index_add_(0, i, x[:3]); y.index_copy_(0, i, x[:3]); y.index_fill_(0, i, 1.0); y.masked_fill_(m, 0.0); y.masked_scatter_(m, x.detach().flatten()); y.scatter_(0, i[None], 1.0); y.scatter_add_(0, i[None], x[:1]); y.put_(i, x[0, :3].detach()); y.index_put_((i,), torch.ones(6)); y.fill_diagonal_(1)
    r = torch.linalg.inv(x @ x.t() + torch.eye(4)), torch.linalg.det(x @ x.t()), torch.linalg.slogdet(x @ x.t()), torch.linalg.solve(x @ x.t() + torch.eye(4), x), torch.linalg.cholesky(x @ x.t() + torch.eye(4)), torch.linalg.qr(x), torch.linalg.svd(x, False), torch.linalg.eigh(x @ x.t()), torch.linalg.lstsq(x, x)[0], torch.linalg.pinv(x), torch.linalg.matrix_power(x @ x.t(), 3), torch.linalg.matrix_exp(x @ x.t()), torch.trace(x), torch.tril(x), torch.triu(x), torch.linalg.lu_factor(x), torch.cholesky_inverse(x @ x.t() + torch.eye(4))
    r = torch.stft(x[0], 4, return_complex=True, window=torch.ones(4)), torch.istft(torch.stft(x[0], 4, return_complex=True, window=torch.ones(4)), 4, window=torch.ones(4)), torch.view_as_real(torch.fft.fft(x)), torch.view_as_complex(x.view(4, 3, 2)), torch.fft.fft(x).conj().real, torch.fft.fft(x).resolve_conj(), torch.fft.fft(x).conj().imag.resolve_neg(), torch.fft.hfft(torch.fft.fft(x)), torch.fft.fft(x).conj_physical()
    r = F.interpolate(x[None, None], scale_factor=2), F.interpolate(x[None, None], scale_factor=2, mode="bilinear"), F.interpolate(x[None, None], scale_factor=2, mode="bicubic"), F.grid_sample(x[None, None], torch.zeros(1, 2, 2, 2), align_corners=False), F.affine_grid(x[None, :2, :3], (1, 1, 2, 2), align_corners=False), F.pixel_shuffle(x.view(1, 4, 2, 3), 2), F.pad(x, (1, 1)), F.pad(x[None], (1, 1), mode="reflect"), F.unfold(x[None, None], 2), F.fold(x[None], 2, 2) if x.shape[1] == 1 else x, F.max_pool2d(x[None], 2), F.avg_pool2d(x[None], 2), F.adaptive_avg_pool2d(x[None], 2), F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2)
    with torch.random.fork_rng(): torch.manual_seed(0); r = torch.nn.init.xavier_normal_(torch.nn.Linear(3, 3).weight), torch.nn.init.orthogonal_(torch.zeros(3, 3)), torch.nn.init.trunc_normal_(torch.zeros(3, 3)), torch.nn.init.kaiming_uniform_(torch.zeros(3, 3)), torch.nn.init.constant_(torch.zeros(3, 3), 1.0), torch.nn.init.eye_(torch.zeros(3, 3)), torch.nn.init.dirac_(torch.zeros(3, 3, 3)), torch.nn.init.sparse_(torch.zeros(3, 3), 0.5)
    d = torch.distributions; r = d.Normal(x[0], 1.0).rsample(), d.Categorical(x.detach()).sample(), d.Gamma(x[0] + 1, 1.0).rsample(), d.Beta(x[0] + 1, 1.0).rsample(), d.Dirichlet(x[0] + 1).rsample(), d.StudentT(x[0].detach() + 1).rsample(), d.Bernoulli(x.detach()).sample(), d.MultivariateNormal(x[0], torch.eye(6)).rsample(), d.kl_divergence(d.Normal(x[0], 1.0), d.Normal(0.0, 1.0)), d.Poisson(x[0].detach()).sample(), d.Normal(x[0], 1.0).log_prob(x[0])
    f = torch.func; k = x.detach(); r = f.grad(lambda a: a.sin().sum())(k), f.jacrev(lambda a: a.sin().sum(0))(k), f.jacfwd(lambda a: a.sin().sum(0))(k), f.hessian(lambda a: a[0].sin().prod())(k), f.vmap(lambda a: a @ a)(k), f.vmap(torch.cumsum, in_dims=(0, None))(k, 0), f.linearize(lambda a: a.sin(), k)[0], f.vmap(f.grad(lambda a: F.linear(a, k).relu().sum()))(k)
    from torch.utils.checkpoint import checkpoint; r = checkpoint(lambda a: a.sin().exp() * F.dropout(a), x, use_reentrant=False), checkpoint(lambda a: a.sin(), x, use_reentrant=True)
    with torch.autocast("cpu", dtype=torch.bfloat16): r = F.linear(x, torch.ones(3, 6)).float(), F.conv1d(x[None], torch.ones(2, 4, 2)).float(), F.softmax(x @ x.t(), 0), F.layer_norm(x, (6,))
    q = torch.nn.utils.parametrizations; a = q.weight_norm(torch.nn.Linear(6, 2))(x), q.spectral_norm(torch.nn.Linear(6, 2))(x), q.orthogonal(torch.nn.Linear(6, 6))(x); b = torch.nn.utils.parameters_to_vector(g.parameters())
    z = torch.utils.data.default_collate([torch.ones(2), torch.ones(2)]); a = torch.nn.utils.stateless.functional_call(torch.nn.Linear(6, 2), {"weight": x[:2]}, (x,)); b = torch.cdist(x, x), torch.pdist(x), F.cosine_similarity(x, x), F.pairwise_distance(x, x), F.bilinear(x, x, torch.ones(2, 6, 6)), torch.cov(x), torch.corrcoef(x), torch.cumulative_trapezoid(x), torch.trapezoid(x), torch.gradient(x), torch.diff(x), torch.cross(x.view(8, 3), x.view(8, 3), dim=1)
    with torch.inference_mode(): r = x.detach() + 1, x.detach().mul(2).sum()
    r = F.hardtanh(y, inplace=True); r = F.relu6(y, inplace=True); r = F.hardswish(y, inplace=True); r = F.selu(y, inplace=True); r = F.celu(y, inplace=True); r = F.elu(y, inplace=True); r = F.threshold(y, 0.1, 0.2, inplace=True); r = F.rrelu(y, inplace=True); r = F.leaky_relu(y, inplace=True); r = F.silu(y, inplace=True); r = F.mish(y, inplace=True); r = F.hardsigmoid(y, inplace=True)
    w = x.detach().clone(); r = F.embedding(i, w, max_norm=1.0), F.embedding_bag(i[None], w, max_norm=1.0), torch.native_dropout(x, 0.5, True), F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], scale=0.5)
    q = x[None, None]; r = [F.interpolate(q, size=(3, 3), mode=n, antialias=a) for n in ("bilinear", "bicubic") for a in (True, False)]; a = [F.interpolate(q, size=(3, 3), mode=n) for n in ("nearest", "nearest-exact", "area")]; b = [F.interpolate(q[0], size=3, mode=n) for n in ("nearest", "nearest-exact", "linear")]; d = [F.interpolate(q[None], size=(2, 3, 3), mode=n) for n in ("nearest", "nearest-exact", "trilinear")]
    w = x.detach()[0].sort()[0]; r = torch.bucketize(0.5, w), torch.searchsorted(w, 0.5), torch.bucketize(w, w, right=True), torch.searchsorted(w, w, side="right")
    r = torch._weight_norm(x, torch.ones(4, 1), 0), torch._weight_norm(x, torch.ones(1, 6), 1), F.cross_entropy(x, x.detach(), label_smoothing=0.1), F.linear(x, torch.ones(2, 6), torch.ones(2))
    k = torch.amp.GradScaler("cpu"); o = torch.optim.SGD([x], 0.1); x.grad = x.detach().clone(); k.scale(x.sum()); k.unscale_(o); k.step(o); k.update()
    k = torch.eye(3); r = torch.linalg.eigvals(k), torch.linalg.eigvalsh(k), torch.linalg.svdvals(k), torch.linalg.matrix_rank(k), torch.linalg.cond(k), torch.linalg.tensorinv(torch.eye(4).reshape(2, 2, 2, 2)), torch.linalg.tensorsolve(k, k[0]), torch.linalg.ldl_factor(k), torch.linalg.lu(k), torch.lu_unpack(*torch.linalg.lu_factor(k)), torch.linalg.matrix_norm(k, 2), torch.linalg.vander(k[0]), torch.pca_lowrank(k), torch.svd_lowrank(k), torch.lobpcg(k)
    q = torch.quasirandom.SobolEngine(2, scramble=True); r = torch.conv_tbc(x[None], torch.ones(2, 6, 3), torch.ones(3), 1), torch.fmod(x, 2), torch.pdist(x), F.pad(x[None], (1, 1), mode="circular"), F.pad(x[None], (1, 1), mode="replicate"), F.lp_pool2d(x[None], 2, 2), F.triplet_margin_loss(x, x, x), F.margin_ranking_loss(x, x, x), F.hinge_embedding_loss(x, x), F.multilabel_soft_margin_loss(x, x), F.soft_margin_loss(x, x), F.cosine_embedding_loss(x, x, torch.ones(4))
    r = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255), torch.fake_quantize_per_channel_affine(x, torch.ones(6) * 0.1, torch.zeros(6), 1, 0, 255), torch.ao.quantization.FusedMovingAvgObsFakeQuantize()(x)
"""


def record(keep: int = 0, checkpoint: Callable[[Recorder], None] | None = None) -> tuple[Recorder, Runner]:
    """Run everything and return what was recorded."""
    recorder = Recorder(keep)
    run = Runner(recorder)
    signal.signal(signal.SIGALRM, _alarm)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in (common, methods, functions, foreach, optimizers, modules, operations):
            torch.manual_seed(0)
            source(run)
            if checkpoint is not None:
                checkpoint(recorder)
            print(
                f"{source.__name__}: {len(recorder.seen)} overloads, {run.done} calls, {sum(run.failed.values())} raised",
                file=sys.stderr,
                flush=True,
            )
    return recorder, run


def main() -> int:
    """Record, subtract, and compare with or replace the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table instead of comparing with it")
    parser.add_argument("--subtracted", action="store_true", help="list what the rules took out, and why")
    parser.add_argument("--calls", type=Path, help="also pickle a few calls of each overload into this file")
    options = parser.parse_args()

    recorder, _ = record(keep=8 if options.calls else 0)
    table = {name for name, overload in recorder.seen.items() if objection(overload) is None} | set(ADDED)
    if options.subtracted:
        for name, overload in sorted(recorder.seen.items()):
            if name not in table:
                print(f"{name}: {objection(overload)} (seen in {recorder.origin[name]})")
    if options.calls:
        with tempfile.NamedTemporaryFile(dir=options.calls.parent, delete=False) as file:
            pickle.dump({name: calls for name, calls in recorder.calls.items() if name in table}, file)
        Path(file.name).replace(options.calls)
    if options.write:
        TABLE.write_text(HEADER + "".join(f"{name}\n" for name in sorted(table)))
        print(f"{TABLE}: {len(table)} overloads")
        return 0
    frozen = {line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")}
    for name in sorted(table - frozen):
        print(f"+ {name} ({ADDED.get(name) or f'seen in {recorder.origin[name]}'})")
    for name in sorted(frozen - table):
        print(f"- {name}")
    return int(table != frozen)


if __name__ == "__main__":
    sys.exit(main())

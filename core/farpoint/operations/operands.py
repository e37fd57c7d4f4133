"""The tensors of one call, checked where torch trusts them.

Most operations check the shapes and the indices that they get. Backward formulas and fused kernels often do not, as only
torch itself calls them: given other shapes they read and write beyond their operands. Each such operation of the table
has rules here, found by running the table on distorted arguments. All others pass without a look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from farpoint.errors import ProtocolError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.operations import rules as of
from farpoint.operations.shapes import Call, Rule, bounded, shapes
from farpoint.operations.table import Operation

_NOTHING: Final[Mapping[str, object]] = {}
_UNKNOWN: Final[tuple[Rule, ...]] = (lambda call: None,)
_found: dict[Operation, tuple[Rule, ...]] = {}


def check_operands(
    operation: Operation,
    tensors: Sequence[torch.Tensor],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] = _NOTHING,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Check the operands of a call that is about to run. Free for operations that look after themselves.

    Args:
        operation: What is to be called.
        tensors: Its tensors, in the order of the schema. They stand for the arguments where those are not given.
        args: Its positional arguments, the tensors among them. Rules name arguments, so give them wherever they are known.
        kwargs: Its arguments by name.
        limits: How many results there may be.

    Raises:
        ProtocolError: Torch would trust the operands and crash or hang, or there would be too many results.
    """
    rules = _found.get(operation, _UNKNOWN)
    if rules is _UNKNOWN:
        name = operation.name.removeprefix("aten::")
        rules = _found[operation] = _RULES.get(name, _RULES.get(name.partition(".")[0], ()))
    if not rules:
        return
    arguments = operation.overload._schema.arguments
    given = args if args or kwargs else tensors
    values = {argument.name: value for argument, value in zip(arguments, given, strict=False)}
    call = Call(operation, {**values, **kwargs}, limits)
    for rule in rules:
        try:
            rule(call)
        except ProtocolError:
            raise
        except Exception as error:  # a rule that cannot read the operands does not vouch for them
            raise ProtocolError(
                f"{operation.name} was sent operands that do not fit: {str(error)[:200]}"
            ) from error


_POOL2D: Final = (shapes("grad_output=*hw self=*YX indices=*hw"), bounded("indices", "yx"))
_POOL3D: Final = (shapes("grad_output=*dhw self=*ZYX indices=*dhw"), bounded("indices", "zyx"))
_PAD1D: Final = (shapes("grad_output=*w self=*x"),)
_PAD2D: Final = (shapes("grad_output=*hw self=*yx"),)
_PAD3D: Final = (shapes("grad_output=*dhw self=*zyx"),)
_GRID2D: Final = (shapes("input=ncyx grid=nhwk grad_output=nchw"),)
_GRID3D: Final = (shapes("input=nczyx grid=ndhwk grad_output=ncdhw"),)
_SDPA: Final = (
    shapes("query=bHLE key=bGSE value=bGSE grad_out=bhle out=bhle logsumexp=bhl"),
    of.attention,
)
_POLYNOMIALS: Final = (
    "chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w "
    "hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p "
    "shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v "
    "shifted_chebyshev_polynomial_w"
)

# By the name of an overload, or of an operation for all of its overloads.
_RULES: Final[dict[str, tuple[Rule, ...]]] = {
    **{f"special_{polynomial}": (of.polynomial,) for polynomial in _POLYNOMIALS.split()},
    **dict.fromkeys(["split", "split_copy", "unsafe_split", "unbind", "unbind_copy"], (of.slices,)),
    **dict.fromkeys(["_fft_c2c", "_fft_c2r", "_fft_r2c"], (of.fft,)),
    **dict.fromkeys(["_fused_adam_", "_fused_adamw_", "_fused_adagrad_", "_fused_sgd_"], (of.fused_step,)),
    **dict.fromkeys(
        ["native_batch_norm", "native_batch_norm_backward", "batch_norm_backward"], (of.channels,)
    ),
    **dict.fromkeys(["_native_batch_norm_legit", "_batch_norm_with_update"], (of.channels,)),
    **dict.fromkeys(["_embedding_bag", "_embedding_bag_forward_only"], (of.bags,)),
    **dict.fromkeys(
        ["_embedding_bag_backward", "_embedding_bag_per_sample_weights_backward"], (of.bags_backward,)
    ),
    **dict.fromkeys(["_ctc_loss", "_ctc_loss_backward"], (of.ctc,)),
    **dict.fromkeys(["multi_margin_loss_backward", "multilabel_margin_loss_backward"], (of.margin_backward,)),
    **dict.fromkeys(["adaptive_max_pool2d_backward", "fractional_max_pool2d_backward"], _POOL2D),
    **dict.fromkeys(["adaptive_max_pool3d_backward", "fractional_max_pool3d_backward"], _POOL3D),
    **dict.fromkeys(["reflection_pad1d_backward", "replication_pad1d_backward"], _PAD1D),
    **dict.fromkeys(["reflection_pad2d_backward", "replication_pad2d_backward"], _PAD2D),
    **dict.fromkeys(["reflection_pad3d_backward", "replication_pad3d_backward"], _PAD3D),
    **dict.fromkeys(
        ["_softmax_backward_data", "_log_softmax_backward_data"], (shapes("grad_output=* output=*"),)
    ),
    **dict.fromkeys(["grid_sampler_2d", "grid_sampler_2d_backward"], _GRID2D),
    **dict.fromkeys(["grid_sampler_3d", "grid_sampler_3d_backward"], _GRID3D),
    **dict.fromkeys(
        ["div.Tensor_mode", "div.out_mode", "div_.Tensor_mode", "lcm", "lcm_"], (of.smallest_integer,)
    ),
    **dict.fromkeys(["segment_reduce", "_segment_reduce_backward"], (of.segments,)),
    "_adaptive_avg_pool2d_backward": (shapes("grad_output=*hw self=*YX"),),
    "_adaptive_avg_pool3d_backward": (shapes("grad_output=*dhw self=*ZYX"),),
    "_cdist_backward": (of.cdist_backward,),
    "embedding_dense_backward": (of.embedding_backward,),
    "_pdist_backward": (shapes("grad=k self=NM pdist=k"), of.pdist_backward),
    "_pdist_forward": (shapes("self=nm"),),
    "_scaled_dot_product_flash_attention_for_cpu": _SDPA,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _SDPA,
    "_weight_norm_interface": (of.weight_norm("v", "g"),),
    "_weight_norm_interface_backward": (of.weight_norm("saved_v", "saved_g saved_norms"),),
    "linalg_eig": (of.finite,),
    "linalg_eigvals": (of.finite,),
    "linalg_ldl_solve": (of.ldl_pivots,),
    "linalg_lu_solve": (of.lu_pivots("LU", "pivots"),),
    "lu_unpack": (of.lu_pivots("LU_data", "LU_pivots"),),
    "max_pool2d_with_indices_backward": _POOL2D,
    "max_pool3d_with_indices_backward": _POOL3D,
    "native_layer_norm_backward": (of.layer_norm_backward,),
    "nll_loss_backward": (of.nll_backward,),
}

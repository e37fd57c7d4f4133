"""Rules for single operations: what torch takes for granted when it calls them itself."""

from __future__ import annotations

import math
from typing import Final

import torch

from farpoint.operations.shapes import Call, Rule, check_values

MAX_DEGREE: Final = 10_000
"""Largest degree of an orthogonal polynomial: its recurrence takes one step for each, for each element."""


def polynomial(call: Call) -> None:
    degree = call.get("n")
    if isinstance(degree, torch.Tensor) and degree.numel() and not degree.is_complex():
        call.require(not bool((degree > MAX_DEGREE).any()), f"was sent a degree beyond {MAX_DEGREE}")


def smallest_integer(call: Call) -> None:
    """Refuse the smallest integer of a dtype where its negation, which has no such integer, stops the process."""
    divisor = call.get("other")
    if "div" in call.operation.name and call.get("rounding_mode") != "trunc":
        return
    dtype = torch.result_type(call.get("self"), divisor)
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return
    least = torch.iinfo(dtype).min
    if "div" in call.operation.name:
        hit = _has(divisor, -1) and _has(call.get("self"), least)
    else:
        hit = _has(divisor, least) or _has(call.get("self"), least)
    call.require(not hit, f"was sent {least}, which it cannot divide")


def _has(operand: torch.Tensor | float, number: int) -> bool:
    return bool((operand == number).any()) if isinstance(operand, torch.Tensor) else operand == number


def finite(call: Call) -> None:
    """Refuse infinities and NaN, which LAPACK's `geev` runs out of bounds on."""
    call.require(bool(torch.isfinite(call.tensor("self")).all()), "wants finite numbers")


def slices(call: Call) -> None:
    source = call.tensor("self")
    dim = call.get("dim", 0)
    if not source.ndim or not -source.ndim <= dim < source.ndim:
        return
    step = call.get("split_size", 1)
    count = -(-source.shape[dim] // step) if step > 0 else 0
    allowed = call.limits.results
    call.require(count <= allowed, f"would return {count} tensors, and {allowed} are allowed")


def lu_pivots(factors: str, pivots: str) -> Rule:
    def rule(call: Call) -> None:
        if not call.get("unpack_pivots", True):
            return
        shape = call.tensor(factors).shape
        call.require(len(shape) >= 2, f"wants matrices in {factors!r}")
        expected = [*shape[:-2], min(shape[-2:])]
        found = list(call.tensor(pivots).shape)
        # Batches of a solve broadcast; each matrix must still have all of its pivots.
        fits = found[-1:] == expected[-1:] if call.get("B") is not None else found == expected
        call.require(fits, f"wants pivots of shape {expected}, and {found} were sent")
        # LAPACK swaps rows by these numbers without looking.
        check_values(call, pivots, 1, shape[-2] + 1)

    return rule


def ldl_pivots(call: Call) -> None:
    factors, pivots = call.tensor("LD"), call.tensor("pivots")
    call.require(factors.ndim >= 2 and factors.shape[:-1] == pivots.shape, "wants a pivot for each row")
    size = factors.shape[-1]
    check_values(call, "pivots", -size, size + 1)
    for row in pivots.reshape(-1, size).tolist() if pivots.numel() else ():
        position = 0
        while position < size:
            # A negative pivot marks a block of two rows, and says so twice.
            block = 2 if row[position] < 0 else 1
            call.require(row[position] != 0 and position + block <= size, "was sent pivots that are none")
            call.require(block == 1 or row[position + 1] < 0, "was sent pivots that are none")
            position += block


def cdist_backward(call: Call) -> None:
    grad, x1, x2, distance = (call.tensor(name) for name in ("grad", "x1", "x2", "cdist"))
    fits = x1.ndim >= 2 and x2.ndim >= 2 and x1.shape[-1] == x2.shape[-1]
    call.require(fits, "wants two lists of points of one dimension")
    try:
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        call.refuse("was sent batches that do not broadcast")
    expected = (*batch, x1.shape[-2], x2.shape[-2])
    fits = tuple(grad.shape) == expected and tuple(distance.shape) == expected
    call.require(fits, f"wants distances and their gradient of shape {list(expected)}")


def pdist_backward(call: Call) -> None:
    points = call.sizes["n"]
    call.require(call.sizes["k"] == points * (points - 1) // 2, "wants one distance for each pair of points")


def ctc(call: Call) -> None:
    log_probs, targets = call.tensor("log_probs"), call.tensor("targets")
    call.require(log_probs.ndim == 3, "wants log_probs of three dimensions")
    steps, batch, classes = log_probs.shape
    lengths: dict[str, list[int]] = {}
    for name in ("input_lengths", "target_lengths"):
        value = call.get(name)
        lengths[name] = value.flatten().tolist() if isinstance(value, torch.Tensor) else list(value)
        call.require(len(lengths[name]) == batch, f"wants one of {name} for each sequence")
        call.require(
            all(type(n) is int and n >= 0 for n in lengths[name]), f"wants {name} that are not negative"
        )
    call.require(max(lengths["input_lengths"], default=0) <= steps, "was sent input_lengths beyond log_probs")
    longest = max(lengths["target_lengths"], default=0)
    if targets.ndim == 1:
        fits = targets.shape[0] == sum(lengths["target_lengths"])
    else:
        fits = targets.ndim == 2 and targets.shape[0] == batch and targets.shape[1] >= longest
    call.require(fits, "was sent targets that do not fit target_lengths")
    check_values(call, "targets", 0, classes)
    call.require(0 <= call.get("blank", 0) < classes, "was sent a blank that is no class")
    if call.get("log_alpha") is None:
        return
    alpha = call.tensor("log_alpha").shape
    fits = len(alpha) == 3 and alpha[0] == batch and alpha[1] == steps and alpha[2] >= 2 * longest + 1
    call.require(fits, "was sent log_alpha of another shape than it returns")
    call.require(call.tensor("neg_log_likelihood").numel() == batch, "wants one loss for each sequence")
    call.require(call.tensor("grad").numel() == batch, "wants one gradient for each sequence")


def bags(call: Call) -> None:
    indices, offsets = call.tensor("indices"), call.tensor("offsets")
    call.require(indices.ndim == 1 and offsets.ndim == 1, "wants indices and offsets of one dimension")
    check_values(call, "offsets", 0, indices.numel() + 1)
    if call.get("weight") is not None:
        call.require(call.tensor("weight").ndim == 2, "wants a weight of two dimensions")
        check_values(call, "indices", 0, call.tensor("weight").shape[0])
    if call.get("mode", 0) == 2:
        bags = offsets.numel() - bool(call.get("include_last_offset"))
        call.require(bags >= 1, "wants at least one bag to take the maximum of")


def bags_backward(call: Call) -> None:
    grad, indices, bags = call.tensor("grad"), call.tensor("indices"), call.tensor("offset2bag")
    rows = call.tensor("weight").shape[0] if call.get("weight") is not None else call.get("num_weights")
    call.require(
        grad.ndim == 2 and indices.ndim == 1, "wants a gradient of two dimensions and indices of one"
    )
    check_values(call, "indices", 0, rows)
    # Sums are recorded without it, and torch then derives it from the offsets.
    call.require(bags.numel() in (0, indices.numel()), "wants a bag for each index")
    check_values(call, "offset2bag", 0, grad.shape[0])
    if call.get("offsets") is not None:
        offsets = call.tensor("offsets")
        call.require(offsets.ndim == 1, "wants offsets of one dimension")
        ordered = bool((offsets[1:] >= offsets[:-1]).all())
        call.require(offsets.numel() <= grad.shape[0] + 1 and ordered, "was sent offsets that are no bags")
        check_values(call, "offsets", 0, indices.numel() + 1)
    if call.get("per_sample_weights") is not None:
        same = call.tensor("per_sample_weights").shape == indices.shape
        call.require(same, "wants a weight for each index")
    mode = call.get("mode")
    if call.get("bag_size") is not None:
        bag_size = call.tensor("bag_size").numel()
        call.require(bag_size == grad.shape[0] or (mode == 0 and bag_size == 0), "wants a size for each bag")
    if mode == 2:
        call.require(call.tensor("maximum_indices").shape == grad.shape, "wants an index for each maximum")
        check_values(call, "maximum_indices", -1, rows)


def embedding_backward(call: Call) -> None:
    grad, indices = call.tensor("grad_output"), call.tensor("indices")
    call.require(grad.shape[:-1] == indices.shape and grad.ndim > 0, "wants a gradient for each index")
    check_values(call, "indices", 0, call.get("num_weights"))


def fft(call: Call) -> None:
    source, dims = call.tensor("self"), call.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims)
    within = all(0 <= dim < source.ndim for dim in dims)
    call.require(
        bool(dims) and within and len(set(dims)) == len(dims), "wants different dims, counted from 0"
    )
    call.require(all(source.shape[dim] > 0 for dim in dims), "was sent an empty signal")
    base = call.operation.name.partition(".")[0]
    real_in, real_out = base.endswith("_r2c"), base.endswith("_c2r")
    call.require(source.is_complex() is not real_in, "was sent a signal of another kind")
    if real_out:
        last = call.get("last_dim_size")
        fits = last >= 1 and source.shape[dims[-1]] == last // 2 + 1
        call.require(fits, "was sent a last_dim_size that its input does not have")
    if call.get("out") is not None:
        call.require(call.tensor("out").is_complex() is not real_out, "was sent an out of another kind")


def fused_step(call: Call) -> None:
    parameters = call.get("self")
    steps = call.get("state_steps", ())
    for value in (call.get("lr"), call.get("grad_scale"), call.get("found_inf"), *steps):
        call.require(
            not isinstance(value, torch.Tensor) or value.numel() == 1, "wants single numbers to steer it"
        )
    call.require(
        "state_steps" not in call.values or len(steps) == len(parameters), "wants a step for each parameter"
    )
    for name, value in call.values.items():
        if not isinstance(value, list | tuple) or name == "state_steps":
            continue
        empty_allowed = name in ("max_exp_avg_sqs", "momentum_buffer_list")
        call.require(
            len(value) == len(parameters) or (empty_allowed and not value),
            f"wants {name!r} for each parameter",
        )
        for parameter, state in zip(parameters, value, strict=False):
            same = state.shape == parameter.shape and state.dtype == parameter.dtype
            call.require(same, f"wants {name!r} of the shape and dtype of the parameter")
            # The kernel walks raw memory: what overlaps or has gaps has less of it than it has elements.
            call.require(_dense(state), f"wants dense memory in {name!r}")
    if call.get("amsgrad"):
        call.require(len(call.get("max_exp_avg_sqs")) == len(parameters), "wants max_exp_avg_sqs for amsgrad")
    if call.get("momentum"):
        call.require(len(call.get("momentum_buffer_list")) == len(parameters), "wants buffers for momentum")


def _dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def attention(call: Call) -> None:
    sizes = call.sizes
    call.require(
        sizes["h"] == sizes["g"] or (sizes["g"] > 0 and sizes["h"] % sizes["g"] == 0), "wants heads in groups"
    )
    for name in ("grad_out", "out", "key", "value", "query", "logsumexp"):
        value = call.get(name)
        call.require(value is None or value.is_floating_point(), f"wants floating point numbers in {name!r}")
    mask = call.get("attn_mask")
    if mask is not None:
        full = (sizes["b"], sizes["h"], sizes["l"], sizes["s"])
        same = all(
            size in (1, whole) for size, whole in zip(reversed(mask.shape), reversed(full), strict=False)
        )
        call.require(mask.ndim in (2, 4) and same, "was sent a mask that does not fit the scores")


def weight_norm(value: str, others: str) -> Rule:
    def rule(call: Call) -> None:
        weight, dim = call.tensor(value), call.get("dim", 0)
        call.require(weight.ndim > 0 and weight.numel() > 0, "wants a weight that is not empty")
        call.require(dim in (0, weight.ndim - 1), "works along the first or the last dimension")
        for name in others.split():
            fits = call.tensor(name).numel() == weight.shape[dim]
            call.require(fits, f"wants {name!r} with one number for each slice of the weight")
        if call.get("grad_w") is not None:
            call.require(
                call.tensor("grad_w").shape == weight.shape, "wants a gradient of the weight's shape"
            )

    return rule


def margin_backward(call: Call) -> None:
    grad, scores = call.tensor("grad_output"), call.tensor("self")
    call.require(scores.ndim <= 2, "wants scores of at most two dimensions")
    rows = scores.shape[0] if scores.ndim == 2 else 1
    expected = rows if call.get("reduction", 1) == 0 else 1
    call.require(grad.numel() == expected, f"wants a gradient of {expected} numbers")
    if call.get("is_target") is not None:
        call.require(
            call.tensor("is_target").shape == scores.shape, "wants is_target of the shape of the scores"
        )
        call.require(call.tensor("target").shape == scores.shape, "wants a target of the shape of the scores")
        check_values(call, "target", -1, scores.shape[-1] if scores.ndim else 1)
    if call.get("weight") is not None:
        call.require(call.tensor("weight").numel() == scores.shape[-1], "wants a weight for each class")


def nll_backward(call: Call) -> None:
    grad, scores, target = call.tensor("grad_output"), call.tensor("self"), call.tensor("target")
    batched = scores.ndim == 2
    call.require(
        batched or (scores.ndim == 1 and scores.numel() > 0), "wants scores of one or two dimensions"
    )
    rows = scores.shape[0] if batched else 1
    call.require(target.numel() == rows, "wants a target for each row of scores")
    expected = rows if batched and call.get("reduction") == 0 else 1
    call.require(grad.numel() == expected, f"wants a gradient of {expected} numbers")


def layer_norm_backward(call: Call) -> None:
    source = call.tensor("input")
    inner = math.prod(call.get("normalized_shape"))
    outer = source.numel() // inner if inner else 0
    call.require(call.tensor("grad_out").shape == source.shape, "wants a gradient of the input's shape")
    for name, count in (("mean", outer), ("rstd", outer), ("weight", inner), ("bias", inner)):
        value = call.get(name)
        call.require(
            value is None or value.numel() == count or not inner, f"wants {count} numbers in {name!r}"
        )


def channels(call: Call) -> None:
    source = call.tensor("input")
    call.require(source.ndim >= 2, "wants a batch of channels")
    for name in ("weight", "bias", "running_mean", "running_var", "save_mean", "save_invstd", "save_var"):
        value = call.get(name)
        # In evaluation torch itself sends empty statistics.
        allowed = (
            {(source.shape[1],), (0,)}
            if name.startswith("save_") and not _training(call)
            else {(source.shape[1],)}
        )
        call.require(
            value is None or tuple(value.shape) in allowed, f"wants a number for each channel in {name!r}"
        )
    if not _training(call):
        held = call.get("running_mean") is not None and call.get("running_var") is not None
        call.require(held, "wants running statistics where it does not train")
    if call.get("grad_out") is not None:
        call.require(call.tensor("grad_out").shape == source.shape, "wants a gradient of the input's shape")


def _training(call: Call) -> bool:
    return bool(call.get("train", call.get("training", call.get("update", True))))


def segments(call: Call) -> None:
    """Check what torch checks unless it is told `unsafe`, and its backward formula never does: that no segment is outside of the data."""
    data, axis = call.tensor("data"), call.get("axis", 0)
    call.require(0 <= axis < data.ndim, "wants an axis that its data has")
    call.require((call.get("lengths") is None) != (call.get("offsets") is None), "wants either lengths or offsets")
    call.require(call.get("indices") is None, "takes no indices")
    name = "lengths" if call.get("offsets") is None else "offsets"
    bounds, size = call.tensor(name), data.shape[axis]
    call.require(bounds.ndim == axis + 1 and bounds.shape[:axis] == data.shape[:axis], f"was sent {name!r} that do not fit its data")
    check_values(call, name, 0, size + 1)
    if name == "offsets":
        call.require(bounds.shape[-1] > 0 and not bool((bounds.diff(dim=-1) < 0).any()), "wants offsets that ascend")
        count = bounds.shape[-1] - 1
    else:
        call.require(bool((bounds.sum(-1) <= size).all()), "wants lengths that add up to its data")
        count = bounds.shape[-1]
    if call.get("grad") is None:
        return
    expected = (*data.shape[:axis], count, *data.shape[axis + 1 :])
    for result in ("grad", "output"):
        call.require(tuple(call.tensor(result).shape) == expected, f"was sent {result!r} of another shape than it returns")
        call.require(call.tensor(result).dtype == data.dtype, f"was sent {result!r} of another dtype than its data")

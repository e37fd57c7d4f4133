"""What one does with autograd, `torch.func`, modules and distributions beyond a training loop: as here, or an error that says what to type."""

from __future__ import annotations

import copy
import functools
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrizations

import farpoint
from farpoint import (
    EncodeError,
    FarpointError,
    NotColocatedError,
    OperationNotAllowedError,
    PointerTensor,
    RemoteExecutionError,
    ValueNotHereError,
    VirtualWorker,
)

farpoint.TorchHook(torch)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch's own forward mode uses it
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of a checkpoint in a reentrant one
]
# Torch leaves some of what these return unsaid.
F: Any = nn.functional
distributions: Any = torch.distributions
forward_ad: Any = torch.autograd.forward_ad
functional: Any = torch.autograd.functional
checkpoint: Any = torch.utils.checkpoint.checkpoint
in_segments: Any = torch.utils.checkpoint.checkpoint_sequential


class Place(Protocol):
    """Where a case runs."""

    def send(self, value: Any) -> Any:
        """Bring a tensor or a module there, or take it as it is."""

    def seed(self, seed: int) -> None:
        """Seed what draws there."""

    def on(self) -> AbstractContextManager[Any]:
        """Let tensors begin there."""


class Here:
    def send(self, value: Any) -> Any:
        return value if isinstance(value, nn.Module) else value.detach().clone().requires_grad_(value.requires_grad)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()


class There:
    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def send(self, value: Any) -> Any:
        return value.send(self.worker)

    def seed(self, seed: int) -> None:
        self.worker.manual_seed(seed)

    def on(self) -> AbstractContextManager[Any]:
        return farpoint.on(self.worker)


def x(*shape: int, seed: int = 1, grad: bool = True) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def gradients(module: nn.Module) -> list[Any]:
    return [parameter.grad for parameter in module.parameters()]


def mlp(place: Place) -> Any:
    torch.manual_seed(2)
    return place.send(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


CASES: dict[str, Callable[[Any], Any]] = {}


def case(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CASES[function.__name__] = function
    return function


class Scaled(torch.autograd.Function):
    """`x * k` with everything by hand."""

    @staticmethod
    def forward(x: Any, k: float) -> Any:
        return x * k

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.k = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        assert ctx.needs_input_grad == (True, False)
        return grad * ctx.k + 0 * ctx.saved_tensors[0], None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, _: Any) -> Any:
        return tangent * ctx.k


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        values, order = x.sort()
        ctx.mark_non_differentiable(order)
        ctx.save_for_backward(order)
        return values, order

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        return torch.zeros_like(grad).index_copy(0, ctx.saved_tensors[0], grad)


scaled: Any = Scaled.apply
once: Any = Once.apply


@case
def module_hooks(place: Place) -> Any:
    model = mlp(place)
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[1].register_full_backward_pre_hook(lambda module, out: (out[0] * 5,))
    model[2].register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
    model[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0].sum()))
    model(place.send(x(5, 3))).sum().backward()
    return gradients(model), seen


@case
def functions_by_hand(place: Place) -> Any:
    p = place.send(x(4))
    values, order = once(p)
    (scaled(p, 3.0).sum() + (values * values).sum()).backward()
    with forward_ad.dual_level():
        dual = scaled(forward_ad.make_dual(p.detach(), place.send(x(4, seed=2, grad=False))), 2.0)
        return p.grad, order, *forward_ad.unpack_dual(dual)


@case
def forward_mode(place: Place) -> Any:
    p, t = place.send(x(3, grad=False)), place.send(x(3, seed=2, grad=False))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p, t)
        return tuple(forward_ad.unpack_dual((dual * dual).sin() @ dual))


@case
def forward_mode_of_a_module(place: Place) -> Any:
    model, p, t = mlp(place), place.send(x(2, 3, grad=False)), place.send(x(2, 3, seed=2, grad=False))
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(p, t))))


@case
def jacobians(place: Place) -> Any:
    p, t = place.send(x(3, grad=False)), place.send(x(3, seed=2, grad=False))

    def cubes(a: Any) -> Any:
        return (a**3).sum() * a

    func: Any = torch.func
    by_func = [func.jvp(cubes, (p,), (t,)), func.jacrev(cubes)(p), func.jacfwd(cubes)(p), func.hessian(lambda a: cubes(a).sum())(p)]
    return by_func, functional.hessian(lambda a: cubes(a).sum(), p), functional.jacobian(cubes, p, vectorize=True, strategy="forward-mode")


@case
def what_a_transform_does_not_transform(place: Place) -> Any:
    p, w = place.send(x(4, 3)), place.send(x(3, seed=2))
    model = mlp(place)
    state = dict(model.named_parameters())

    def loss(state: Any) -> Any:
        return torch.func.functional_call(model, state, (p,)).pow(2).mean()

    by_func = [torch.func.grad(lambda w: ((p @ w) ** 2).sum())(w), torch.vmap(lambda row: F.linear(row, w[None]))(p)]
    return by_func, torch.func.grad(loss)(state), torch.func.jacrev(torch.func.grad(loss))(state)["2.bias"]["2.bias"]


@case
def an_ensemble(place: Place) -> Any:
    torch.manual_seed(2)
    models = [place.send(nn.Linear(3, 2)) for _ in range(3)]
    state = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    return torch.vmap(lambda s, p: torch.func.functional_call(base, s, (p,)), in_dims=(0, None))(state, place.send(x(5, 3)))


@case
def higher_order(place: Place) -> Any:
    model, p = mlp(place), place.send(x(5, 3))
    (first,) = torch.autograd.grad(model(p).sum(), p, create_graph=True)
    ((first.norm(dim=1) - 1) ** 2).mean().backward()
    (unused,) = torch.autograd.grad(model(p).sum(), place.send(x(2)), allow_unused=True)
    y = p.sum(0)
    batched = torch.autograd.grad(y, p, y.new_ones(3).diag(), is_grads_batched=True)
    return gradients(model), unused, batched


@case
def saved_tensors_hooks(place: Place) -> Any:
    p = place.send(x(3))
    with torch.autograd.graph.save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        y = (p * p).sin().sum()
    y.backward()
    return p.grad


@case
def modes(place: Place) -> Any:
    p = place.send(x(3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p @ p
        with torch.autocast("cpu", enabled=False):
            z = p @ p
    (y.float() + z).sum().backward()
    unrecorded = [torch.no_grad()(lambda: p * 2)(), torch.inference_mode()(lambda: p * 2)()]
    return y, z, p.grad, unrecorded, [t.requires_grad for t in unrecorded]


def checkpointed(reentrant: bool, place: Place) -> Any:
    """Two checkpoints that draw, one in the other, and one of a function that writes what it draws."""
    place.seed(3)
    w, p = place.send(x(4, 4)), place.send(x(6, 4, seed=2))

    def inner(a: Any) -> Any:
        return F.rrelu(F.dropout(a @ w, 0.5), training=True).sin()

    def outer(a: Any) -> Any:
        return checkpoint(inner, F.dropout(a, 0.3), use_reentrant=reentrant) + torch.rand_like(a)

    y = checkpoint(outer, checkpoint(inner, p, use_reentrant=reentrant), use_reentrant=reentrant)
    loss = y.pow(2).sum()
    loss.backward(retain_graph=not reentrant)
    if not reentrant:
        loss.backward()
    return y, w.grad, p.grad, F.dropout(p.detach(), 0.5)


CASES["checkpoint_reentrant"] = functools.partial(checkpointed, True)
CASES["checkpoint"] = functools.partial(checkpointed, False)


@case
def checkpoint_sequential(place: Place) -> Any:
    torch.manual_seed(2)
    model: Any = place.send(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.3)))
    place.seed(1)
    y = in_segments(model, 2, place.send(x(6, 4)), use_reentrant=False)
    y.sum().backward()
    return y, gradients(model)


@case
def parametrized_there(place: Place) -> Any:
    model = mlp(place)
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[2], orthogonal_map="cayley")
    y = model(place.send(x(5, 3)))
    y.sum().backward()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    return y, gradients(model), model(place.send(x(5, 3)))


@case
def a_deep_copy_has_no_gradients(place: Place) -> Any:
    model = mlp(place)
    model(place.send(x(5, 3))).sum().backward()
    twin, tensor = copy.deepcopy(model), copy.deepcopy(model[0].weight.grad)
    twin(place.send(x(5, 3))).sum().backward()
    return gradients(twin), tensor


@case
def sequences(place: Place) -> Any:
    a, b = place.send(x(3, 2)), place.send(x(5, 2, seed=2))
    padded = nn.utils.rnn.pad_sequence([a, b], batch_first=True, padding_value=7.0)
    padded.pow(2).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    packed = nn.utils.rnn.pack_padded_sequence(padded, place.send(torch.tensor([3, 5])), batch_first=True, enforce_sorted=False)
    return a.grad, b.grad, padded, packed.data


@case
def draws_of_distributions(place: Place) -> Any:
    p = place.send(x(2, 3))
    made = [
        distributions.Categorical(logits=p),
        distributions.Bernoulli(logits=p),
        distributions.Beta(p.exp(), p.exp()),
        distributions.Independent(distributions.Exponential(p.exp()), 1),
        distributions.Multinomial(5, logits=p),
    ]
    found = []
    for distribution in made:
        place.seed(5)
        sample = distribution.sample()
        found.append((sample, distribution.log_prob(sample)))
    torch.stack([log_prob.sum() for _, log_prob in found]).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    return found, p.grad


@case
def noise_that_begins_there(place: Place) -> Any:
    p = place.send(x(3))
    place.seed(5)
    with place.on():
        sample = distributions.Normal(p, p.exp()).rsample()
    sample.sum().backward()
    return sample, p.grad


@case
def a_scaler(place: Place) -> Any:
    model = mlp(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    batch = place.send(x(5, 3))
    with place.on(), farpoint.allow_scalars():
        scaler.scale(model(batch).pow(2).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        return list(model.parameters()), scaler.get_scale()


def home(values: Any) -> Any:
    """Return values, those of pointers in place of them."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: farpoint.get(t.detach(), keep=True), values)


@pytest.fixture(scope="module", params=["virtual", "tcp"])
def worker(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "virtual":
        with VirtualWorker(id="carol") as made:
            yield made
    else:
        with farpoint.local_cluster("dave") as cluster:
            yield cluster.dave


@pytest.fixture
def bob() -> Iterator[Any]:
    with VirtualWorker(id="bob") as made:
        yield made


NEAR = {"forward_mode_of_a_module"}
"""Cases in which torch takes one kernel for tensors here and another one for a subclass, and sums are done in another order."""


@pytest.mark.parametrize("name", CASES)
def test_as_here(name: str, worker: Any) -> None:
    with torch.random.fork_rng(devices=()):
        expected = home(CASES[name](Here()))
        found = home(CASES[name](There(worker)))
    exact: Any = {"rtol": None, "atol": None} if name in NEAR else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(found, expected, **exact, equal_nan=True)
    worker.synchronize()
    gc.collect()
    assert len(worker) == 0


HOOKS: dict[str, tuple[Callable[[Any], Any], type[FarpointError]]] = {
    "tolist": (lambda g: g.tolist(), ValueNotHereError),
    "numpy": (lambda g: g.numpy(), ValueNotHereError),
    "float": (lambda g: float(g.sum()), ValueNotHereError),
    "apply_": (lambda g: g.apply_(lambda value: value), ValueNotHereError),
    "data_ptr": (lambda g: g.data_ptr(), ValueNotHereError),
    "allclose": (lambda g: torch.allclose(g, g), ValueNotHereError),
    "a local tensor": (lambda g: g + torch.ones(3), NotColocatedError),
    "format": (lambda g: f"{g.sum():.2f}", ValueNotHereError),
}


RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "backward": lambda y, p: y.sum().backward(),
    "autograd.backward": lambda y, p: torch.autograd.backward([y], [y.detach()]),
    "autograd.grad": lambda y, p: torch.autograd.grad(y.sum(), p),
    "recomputed": lambda y, p: y.sum().backward(),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("how", RUNS)
def test_the_gate_holds_while_the_engine_runs(name: str, how: str, bob: Any) -> None:
    call, error = HOOKS[name]
    p = x(3).send(bob)

    def careless(value: Any) -> Any:
        if not isinstance(value, PointerTensor) or torch._C._current_graph_task_id() == -1:
            return value * value
        call(value)
        raise AssertionError("the gate let it through")

    y: Any = checkpoint(careless, p, use_reentrant=False) if how == "recomputed" else p * 2
    if how != "recomputed":
        p.register_hook(careless)
    with pytest.raises(error, match="bob"):
        RUNS[how](y, p)


def _changes(p: Any) -> None:
    calls: list[int] = []

    def other(a: Any) -> Any:
        calls.append(0)
        return F.dropout(a, 0.5).sin() if len(calls) == 1 else (a * torch.rand_like(a)).sin()

    checkpoint(other, p, use_reentrant=False).sum().backward()


def _anomalous(p: Any) -> None:
    with torch.autograd.detect_anomaly():
        (-p * p).sqrt().sum().backward()


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a shell by DLPack": (lambda p: torch._C._to_dlpack(p), RuntimeError, "data pointer"),
    "a local gradient": (lambda p: setattr(p, "grad", torch.ones(3)), NotColocatedError, r"p\.grad = x: .*x\.send\(bob\)"),
    "a local gradient to begin with": (lambda p: (p * 2).backward(torch.ones(3)), NotColocatedError, r"x\.send\(bob\)"),
    "set to a local tensor": (lambda p: p.detach().set_(torch.ones(3)), NotColocatedError, r"p\.set_\(x\)"),
    "a generator": (lambda p: p.detach().normal_(generator=torch.Generator()), EncodeError, r"manual_seed\(seed\)"),
    "sparse gradients": (lambda p: F.embedding(p.detach().long() * 0, p[:, None], sparse=True).sum().backward(), OperationNotAllowedError, "sparse"),
    "a bag of them": (
        lambda p: F.embedding_bag((p.detach().long() * 0)[None], p[:, None], mode="sum", sparse=True).sum().backward(),
        OperationNotAllowedError,
        "its result is sparse",
    ),
    "other random numbers in a second run": (_changes, FarpointError, "draws other random numbers in a checkpoint"),
    "anomalies": (_anomalous, ValueNotHereError, r"detect_anomaly\(\) needs .*allow_scalars\(\)"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, bob: Any) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call(x(3).send(bob))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomalies_are_found_where_numbers_may_be_read(bob: Any) -> None:
    p = torch.tensor([-1.0]).requires_grad_().send(bob)  # type: ignore[attr-defined]  # the hook's
    with farpoint.allow_scalars(), pytest.raises(RuntimeError, match="SqrtBackward0' returned nan"), torch.autograd.detect_anomaly():
        p.sqrt().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_preserves_nothing_draws_anew(reentrant: bool, bob: Any) -> None:
    p = torch.ones(200).requires_grad_().send(bob)  # type: ignore[attr-defined]  # the hook's
    y: Any = checkpoint(F.dropout, p, use_reentrant=reentrant, preserve_rng_state=False)
    assert len(bob) == 2  # what was drawn is not kept
    y.sum().backward()
    assert not torch.equal(y.detach().get(), p.grad.get())


def test_distributions_are_checked_there(bob: Any) -> None:
    p = x(3, grad=False).send(bob)
    distributions.Normal(p, -p.exp())
    with pytest.raises(RemoteExecutionError, match="scale of Normal must satisfy GreaterThan"):
        bob.synchronize()
    with farpoint.allow_scalars():
        distributions.Normal(p, p.exp()).log_prob(p * float("nan"))
    with pytest.raises(RemoteExecutionError, match="value of Normal must satisfy Real"):
        bob.synchronize()


def test_what_is_on_the_device_meta_is_here(bob: Any) -> None:
    p = x(2, 3).send(bob).t()
    for made in (p.to("meta"), torch.empty_like(p, device="meta")):
        assert not isinstance(made, PointerTensor) and made.is_meta and made.shape == p.shape and made.dtype == p.dtype
    assert p.to("meta").stride() == p.stride()


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def test_what_came_home_is_saved_and_loaded(bob: Any) -> None:
    plain, tagged = x(3, grad=False).send(bob).get(), x(3, grad=False).tag("#x").describe("three").send(bob).get()
    assert torch.equal(saved(plain), plain) and vars(plain) == {}
    [found] = bob.search("#x") or [saved(tagged).send(bob)]
    assert torch.equal(found.get(), tagged)
    assert bob.search("#x") == []


def test_a_state_is_where_the_model_is(bob: Any) -> None:
    model: Any = nn.Linear(3, 2).send(bob)  # type: ignore[operator]  # the hook's
    optimizer = torch.optim.Adam(model.parameters())
    model(x(4, 3).send(bob)).sum().backward()
    optimizer.step()
    there = optimizer.state_dict()["state"][0]["exp_avg"]
    assert isinstance(there, PointerTensor)
    here = there.get(keep=True)
    model.get()
    assert torch.equal(saved(optimizer.state_dict())["state"][0]["exp_avg"], here)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
def test_a_compiled_model_trains_as_it_does_here(bob: Any) -> None:
    """What it cannot compile runs as it is; what runs below, of ours, it leaves alone."""
    from torch._dynamo.utils import counters

    models: list[Any] = [mlp(Here()), mlp(There(bob))]
    counters.clear()
    torch._dynamo.reset()
    sends: list[Any] = [Here().send, There(bob).send]
    for model, send in zip(models, sends, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled: Any = torch.compile(model, backend="eager")
        for step in range(10):
            optimizer.zero_grad()
            compiled(send(x(5, 3, seed=step))).pow(2).mean().backward()
            optimizer.step()
    assert counters["frames"]["total"] < 30  # hundreds, where it follows into what issues commands
    torch.testing.assert_close(home(list(models[1].parameters())), home(list(models[0].parameters())), rtol=0, atol=0)
    torch._dynamo.reset()

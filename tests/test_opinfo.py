"""A slice of what `python -m opinfo` runs, the same one each time. All of it: tox -e opinfo."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import farpoint
from farpoint import VirtualWorker, modules
from farpoint.errors import (
    FarpointError,
    NotColocatedError,
    PointerError,
    UnseenErrorWarning,
    ValueNotHereError,
)
from opinfo.columns import COLUMNS, matches
from opinfo.comparing import DifferenceError, RoundingError, compare
from opinfo.exceptions import LISTED, Listed
from opinfo.places import Place, copies
from opinfo.running import Outcome, Trial, run

FAILED_ONCE = frozenset(
    """
    __getitem__ __rmatmul__ bernoulli cauchy combinations cov histogramdd istft linalg.eigvalsh linalg.lstsq linalg.matrix_power
    linalg.matrix_rank linalg.pinv.singular linalg.svd linalg.svdvals lu_unpack masked.prod masked.var matmul narrow
    nn.functional.dropout nn.functional.fractional_max_pool2d nn.functional.gaussian_nll_loss
    nn.functional.linear_cross_entropy.chunked nn.functional.max_unpool2d nn.functional.one_hot nn.functional.rrelu norm.nuc normal
    ormqr prod quantile scatter _segment_reduce.lengths _segment_reduce.offsets svd tensor_split unravel_index view_as_real fft.hfft
    nn.BatchNorm1d nn.GaussianNLLLoss nn.GRU nn.LSTM nn.RNN nn.TransformerEncoder Adagrad.fused resize_ resize_as_
    """.split()
)
EACH = {"forward": 6, "backward": 12, "chain": 12, "train": 4, "eval": 4, "optimizers": 3}


@pytest.mark.filterwarnings("ignore")  # samples of torch's provoke most of torch's warnings
@pytest.mark.parametrize("name", COLUMNS)
def test_a_slice_of_each_column_is_what_local_torch_returns(name: str) -> None:
    each = EACH[name]
    results = list(COLUMNS[name].run(lambda number, entry: number % each == 0 or entry in FAILED_ONCE, 2))
    bad = [f"{r.entry}: {r.outcome.value}: {r.text}" for r in results if r.outcome in (Outcome.FAILED, Outcome.WRONG)]
    assert bad == []
    passed = sum(r.outcome is Outcome.PASSED for r in results)
    assert passed > len(results) // 2


def test_listed_exceptions_name_entries_of_the_database() -> None:
    for column, entry in LISTED:
        assert entry in COLUMNS[column].entries()


@pytest.fixture
def place() -> Any:
    with Place() as place:
        yield place


def test_what_differs_is_told_from_what_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: each outcome, from a call that behaves so."""

    def outcome(call: Any) -> Outcome:
        trial = Trial(torch.arange(3.0), call)
        return run("column", "entry", iter([trial]), place).outcome

    def is_here(x: Any) -> bool:
        return not isinstance(x, farpoint.PointerTensor)

    def refuse(x: Any) -> Any:
        return x + 1 if is_here(x) else float(x)

    assert outcome(lambda x: x + 1) is Outcome.PASSED
    assert outcome(lambda x: x + is_here(x)) is Outcome.WRONG
    assert outcome(lambda x: x if is_here(x) else x.double()) is Outcome.WRONG
    assert outcome(lambda x: x.view(3, 1) if is_here(x) else x.view(1, 3).t()) is not Outcome.FAILED
    assert outcome(refuse) is Outcome.FAILED
    assert outcome(lambda x: 1 / 0) is Outcome.ABSENT
    monkeypatch.setitem(LISTED, ("column", "entry"), Listed("entry", ValueNotHereError, "of this test"))
    assert outcome(refuse) is Outcome.LISTED
    assert outcome(lambda x: x + 1) is Outcome.FAILED
    assert outcome(lambda x: x if is_here(x) else x.view(7)) is Outcome.FAILED
    assert outcome(lambda x: x + is_here(x)) is Outcome.WRONG


def test_comparison_sees_every_difference(place: Place) -> None:
    x = torch.tensor([[1.0, math.nan], [3.0, 4.0]])
    compare("entry", x, place.send(x), place)
    compare("entry", (x, 1), (x, 1), place)
    for one, other in (
        (x, place.send(x + 1)),
        (x, place.send(x.double())),
        (x, place.send(x[0])),
        ((x, x), (place.send(x),)),
        (1, 2),
        (x, None),
        (torch.tensor([1j]), place.send(torch.tensor([1j])).conj()),
    ):
        with pytest.raises(DifferenceError) as raised:
            compare("entry", one, other, place)
        assert raised.type is DifferenceError
    for one, other in ((x, place.send(x + 1e-6)), (x, place.send(x.t().contiguous()).t())):
        with pytest.raises(RoundingError):
            compare("entry", one, other, place)


def test_what_is_sent_has_the_layout_of_the_sample(place: Place) -> None:
    whole = torch.arange(12.0).to(torch.complex64).view(3, 4)
    for tensor in (whole, whole.t(), whole[:, 1:3], whole[1:], whole.conj(), whole[:1].expand(3, 4), whole.imag):
        sent = copies(tensor, place.send)
        assert sent.stride() == tensor.stride() and sent.storage_offset() == tensor.storage_offset()
        assert sent.is_conj() == tensor.is_conj() and sent.is_neg() == tensor.is_neg()
        assert torch.equal(place.fetch(sent), tensor)


def test_the_command_prints_the_table_and_fails_with_an_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opinfo", "add", "item", "--column", "forward", "--samples", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| forward | 1 | 1 | 0 | 0 | 0 |" in done.stdout
    assert matches([])(0, "add") and matches(["a*"])(0, "add") and not matches(["b*"])(0, "add")


@pytest.fixture
def bob() -> Any:
    worker = VirtualWorker(id="bob")
    yield worker
    worker.close()


def test_a_worker_that_is_asked_from_within_an_operation_looks_at_conj_bits(bob: VirtualWorker) -> None:
    """What torch switches off below a dispatch is on in the worker, though it is called from there."""
    a, b = torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)
    expected = torch.linalg.lstsq(a, b, driver="gelsd").residuals
    found: Any = torch.linalg.lstsq(farpoint.send(a, bob), farpoint.send(b, bob), driver="gelsd").residuals
    assert torch.equal(found.get(), expected)


def test_a_mode_of_the_user_does_not_reach_a_worker(bob: VirtualWorker) -> None:
    x = torch.randn(8, 8)
    p: Any = farpoint.send(x, bob)
    q = p @ p
    with torch.autocast("cpu", torch.bfloat16):
        found = q.get()
    assert found.dtype == torch.float32 and torch.equal(found, x @ x)
    r: Any = p.clone()
    with torch.inference_mode():
        bob.synchronize()
    stored = bob._worker.store[r.id_at_location]
    assert not stored.is_inference()


def test_inference_leaves_the_generator_alone(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.ones(3, 5, 7), bob)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    functions: Any = (torch.rand_like, torch.bernoulli, torch.nn.functional.dropout, torch.nn.functional.rrelu)
    results = [function(p) for function in functions]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(result.shape == (3, 5, 7) for result in results)


def test_what_torch_makes_itself_goes_along_and_what_the_user_brings_does_not(bob: VirtualWorker) -> None:
    x = torch.randn(4, 3)
    rnn = torch.nn.GRU(3, 2)
    with pytest.raises(NotColocatedError):
        rnn(farpoint.send(x, bob))
    expected = rnn(x)[0]
    for name, parameter in list(rnn.named_parameters()):
        setattr(rnn, name, torch.nn.Parameter(farpoint.send(parameter.detach(), bob)))
    found: Any = rnn(farpoint.send(x, bob))[0]  # whose first state it makes itself
    assert torch.equal(found.detach().get(), expected)
    with pytest.raises(NotColocatedError):
        rnn(farpoint.send(x, bob), torch.zeros(1, 2))
    p: Any = farpoint.send(x, bob)
    variance: Any = torch.masked.var(p, dim=0, unbiased=True)
    assert torch.equal(variance.get(), torch.masked.var(x, dim=0, unbiased=True))
    with pytest.raises(NotColocatedError):
        torch.masked.var(p, dim=0, unbiased=True, mask=x > 0)
    with pytest.raises(NotColocatedError):
        torch.nn.Sequential(torch.nn.Linear(3, 2))(p)


def test_what_is_presumed_is_checked_by_the_worker(bob: VirtualWorker) -> None:
    x = torch.rand(3)
    p: Any = farpoint.send(x, bob)
    loss: Any = torch.nn.functional.gaussian_nll_loss(p, p, p)
    assert torch.equal(loss.get(), torch.nn.functional.gaussian_nll_loss(x, x, x))
    torch.nn.functional.gaussian_nll_loss(p, p, -p)
    with pytest.raises(FarpointError, match="var has negative"):
        bob.synchronize()
    for question in (bool, lambda q: q.equal(q), lambda q: q.allclose(q)):
        with pytest.raises(ValueNotHereError):
            question(p[0])


def test_what_is_done_as_a_whole_is_what_torch_does(bob: VirtualWorker) -> None:
    x = torch.tensor([2, 0, 1])
    p: Any = farpoint.send(x, bob)
    for classes in (-1, 5):
        found: Any = torch.nn.functional.one_hot(p, num_classes=classes)
        assert torch.equal(found.get(), torch.nn.functional.one_hot(x, num_classes=classes))
    parts: Any = torch.tensor_split(p, farpoint.send(torch.tensor([1]), bob))
    assert [part.get().tolist() for part in parts] == [[2], [0, 1]]
    with pytest.raises((FarpointError, RuntimeError), match=r"one_hot|negative"):
        torch.nn.functional.one_hot(p - 1)


def both(call: Any, operands: Any, bob: VirtualWorker) -> list[tuple[Any, Any]]:
    """Return what a call makes of pointers, its first and second gradients included, each beside what it makes here."""
    found = []
    for send in (lambda x: farpoint.send(x, bob), torch.clone):
        given = [send(x.detach()).requires_grad_() if x.is_floating_point() or x.is_complex() else send(x) for x in operands]
        leaves = [x for x in given if x.requires_grad]
        result = call(*given)
        results = list(result) if isinstance(result, tuple) else [result]
        first = torch.autograd.grad([(y * y.conj()).real.sum() for y in results], leaves, create_graph=True)
        second = torch.autograd.grad([(g * g.conj()).real.sum() for g in first], leaves)
        found.append([*results, *first, *second])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("name", ["cov", "narrow", "tensor_split"])
def test_gradients_of_what_depends_on_values(bob: VirtualWorker, name: str) -> None:
    torch.manual_seed(0)
    x, z, weights = torch.randn(3, 5), torch.randn(5, dtype=torch.complex64), torch.rand(5)
    counts = torch.tensor([1, 2, 0, 1, 3])
    one, two, last = torch.tensor(1), torch.tensor(2, dtype=torch.int32), torch.tensor(-2)
    calls: dict[str, list[tuple[Any, list[torch.Tensor]]]] = {
        "cov": [
            (lambda x, w: torch.cov(x, aweights=w), [x, weights]),
            (lambda x, w: torch.cov(x, correction=2, aweights=w), [x, weights + 1]),
            (lambda x, c: x.cov(fweights=c, correction=0), [x, counts]),
            (lambda x, c, w: x[0].cov(fweights=c, aweights=w), [x, counts, weights]),
            (lambda z, w: torch.cov(z, aweights=w), [z, weights]),
        ],
        "narrow": [
            (lambda x, one: torch.narrow(x, 1, one, 2), [x, one]),
            (lambda x, two: x.t().narrow(dim=0, start=two, length=3), [x, two]),
            (lambda x, last: x.narrow(-1, last, 2), [x, last]),
            (lambda x, one: x[:1].expand(4, 5).narrow(0, one, 2), [x, one]),
        ],
        "tensor_split": [
            (torch.tensor_split, [x, torch.tensor([1, 2])]),
            (lambda x, i: x.tensor_split(i, dim=1), [x, torch.tensor([3, 1, -1, 9])]),
            (lambda x, i: torch.tensor_split(x, tensor_indices_or_sections=i, dim=-1), [x, torch.tensor(3)]),
        ],
    }
    for call, operands in calls[name]:
        pairs = both(call, operands, bob)
        assert torch.equal(pairs[0][0].detach().get(keep=True), pairs[0][1].detach())
        for far, near in pairs:
            assert far.shape == near.shape and far.stride() == near.stride()
            torch.testing.assert_close(far.detach().get(), near.detach(), rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p, w = farpoint.send(x, bob).requires_grad_(), farpoint.send(counts, bob)
        infinite: Any = torch.cov(p, fweights=w, correction=9)  # no degree of freedom
        assert infinite.isinf().any().get(keep=True) and torch.equal(infinite.detach().get(), torch.cov(x, fweights=counts, correction=9))


def test_what_is_wrong_is_refused_with_a_gradient_too(bob: VirtualWorker) -> None:
    x = torch.randn(3, 5)
    p: Any = farpoint.send(x, bob).requires_grad_()

    def sent(*values: float) -> Any:
        return farpoint.send(torch.tensor(values), bob)

    wrong: list[tuple[Any, str]] = [
        (lambda: torch.cov(p, aweights=sent(1.0, 1.0, -1.0, 1.0, 1.0)), "aweights cannot be negative"),
        (lambda: torch.cov(p, fweights=sent(0, 0, 0, 0, 0)), "sum to zero"),
        (lambda: torch.narrow(p, 1, sent(4)[0], 2), "exceeds dimension size"),
        (lambda: torch.narrow(p, 1, sent(-9)[0], 2), "start out of range"),
        (lambda: torch.narrow(p, 2, sent(4)[0], 2), "Dimension out of range"),
        (lambda: torch.tensor_split(p, sent(0)[0]), "number of sections must be larger than 0"),
        (lambda: torch.tensor_split(p, sent(1, 2), dim=2), "Dimension out of range"),
    ]
    for call, text in wrong:
        with pytest.raises((FarpointError, RuntimeError, IndexError), match=text):
            call()


def test_parts_by_indices_that_are_a_tensor_are_views(bob: VirtualWorker) -> None:
    x = torch.arange(6.0)
    leaves: list[Any] = [farpoint.send(x, bob).requires_grad_(), x.clone().requires_grad_()]
    found = []
    for leaf, index in zip(leaves, (farpoint.send(torch.tensor([1, 4]), bob), torch.tensor([1, 4])), strict=True):
        whole = leaf * 1
        part = torch.tensor_split(whole, index)[1]
        part.mul_(whole[0] + 3)
        whole.narrow(0, index[0], 2).exp_()
        whole.sum().backward()
        found += [whole.detach(), leaf.grad]
    assert torch.equal(found[0].get(), found[2]) and torch.equal(found[1].get(), found[3])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_cumulative_average_never_reads_how_many_there_were(bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch, dims: int) -> None:
    torch.manual_seed(0)
    kind: Any = getattr(torch.nn, f"BatchNorm{dims}d")
    batches = [torch.randn(4, 3, *[5] * dims) * 3 + n for n in range(7)]
    near, far = kind(3, momentum=None), kind(3, momentum=None)
    modules.send(far, bob)
    sent = [farpoint.send(batch, bob).requires_grad_() for batch in batches]
    with monkeypatch.context() as patched:
        patched.setattr("farpoint.handover.get", None)
        with farpoint.allow_scalars():  # would fetch it
            results = [far(p) for p in sent]
            total: Any = torch.stack(results).pow(3).sum()
            total.backward()
    here = [batch.clone().requires_grad_() for batch in batches]
    expected = [near(x) for x in here]
    total = torch.stack(expected).pow(3).sum()
    total.backward()
    pairs = [*zip(results, expected, strict=True), *((p.grad, x.grad) for p, x in zip(sent, here, strict=True))]
    pairs += [(b, near.get_buffer(name)) for name, b in far.named_buffers()]
    pairs += [(w.grad, near.get_parameter(name).grad) for name, w in far.named_parameters()]
    for there, local in pairs:
        assert torch.equal(there.detach().get(keep=True), local.detach())
    far.eval()
    assert torch.equal(far(sent[0]).detach().get(), near.eval()(here[0]).detach())


def test_a_cumulative_average_of_other_layouts_and_dtypes(bob: VirtualWorker) -> None:
    torch.manual_seed(0)
    for dtype, turn in ((torch.float32, True), (torch.float64, False), (torch.float64, True)):
        near, far = (torch.nn.BatchNorm1d(3, momentum=None, affine=False, dtype=dtype) for _ in range(2))
        modules.send(far, bob)
        for _ in range(3):
            x = torch.randn(4, 5, 3, dtype=dtype).transpose(1, 2) if turn else torch.randn(4, 3, 5, dtype=dtype)
            far(farpoint.send(x.transpose(1, 2), bob).transpose(1, 2) if turn else farpoint.send(x, bob))
            near(x)
        for name, tensor in near.named_buffers():
            torch.testing.assert_close(far.get_buffer(name).get(keep=True), tensor, rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]


def test_a_module_of_which_only_the_counter_is_elsewhere(bob: VirtualWorker) -> None:
    module = torch.nn.BatchNorm1d(3, momentum=None)
    module.num_batches_tracked = farpoint.send(torch.tensor(0), bob)
    with pytest.raises(ValueNotHereError):
        module(torch.randn(4, 3))
    with pytest.raises(NotColocatedError):
        module(farpoint.send(torch.randn(4, 3), bob))
    assert not any(buffer.isnan().any() for buffer in (module.get_buffer("running_mean"), module.get_buffer("running_var")))


def test_a_factor_that_is_no_number_is_left_to_torch(bob: VirtualWorker) -> None:
    p, mean, variance = (farpoint.send(torch.rand(4, 3)[: n or None].squeeze(), bob) for n in (0, 1, 1))
    torch.nn.functional.batch_norm(p, mean, variance, training=True, momentum=math.nan)
    assert mean.get().isnan().all()
    with pytest.raises(ValueNotHereError):
        float(p[0, 0])


@pytest.mark.parametrize("unsafe", [False, True])
def test_segments_beyond_their_data_are_refused(bob: VirtualWorker, unsafe: bool) -> None:
    data: Any = farpoint.send(torch.arange(6.0), bob)

    def reduce(**given: Any) -> Any:
        sent: Any = {name: farpoint.send(torch.tensor(value), bob) for name, value in given.items()}
        reduced: Any = torch.segment_reduce(data, "sum", unsafe=unsafe, **sent)
        return reduced.get()

    assert reduce(lengths=[2, 4]).tolist() == [1.0, 14.0] and reduce(offsets=[0, 2, 6]).tolist() == [1.0, 14.0]

    for given in ({"lengths": [2, 5]}, {"lengths": [-1, 7]}, {"offsets": [0, 3, 7]}, {"offsets": [0, 4, 2]}, {"offsets": [-1, 2]}):
        with pytest.raises(FarpointError):
            reduce(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnseenErrorWarning)
        bob.close()


def test_pointers_that_are_spent_stay_so(bob: VirtualWorker) -> None:
    p: Any = farpoint.send(torch.ones(2, 2), bob)
    p.get()
    with pytest.raises(PointerError):
        torch.masked.var(p, dim=0, unbiased=True)

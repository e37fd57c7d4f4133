"""Data sets of pointers: the batches of local ones, for a constant number of commands, and shards on several workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import farpoint
from farpoint import ForkedPointerError, NotColocatedError, PointerError, VirtualWorker
from farpoint.data import FederatedDataLoader, FederatedDataset, RemoteDataset
from farpoint.protocol.messages import Kind

X, Y = torch.arange(26.0).reshape(13, 2), torch.arange(13)
SEED = 5


def send(*tensors: torch.Tensor, to: Any) -> list[Any]:
    return [farpoint.send(tensor, to) for tensor in tensors]


def home(batch: Any) -> list[Any]:
    """Return the values of a batch, and of the batches in it, as lists."""
    if isinstance(batch, list | tuple):
        return [home(part) for part in batch]
    values: Any = farpoint.get(batch, keep=True).tolist()
    return values  # type: ignore[no-any-return]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


class Watch:
    """A worker, and how many commands and packets come to it."""

    def __init__(self, worker: VirtualWorker, patch: pytest.MonkeyPatch) -> None:
        self.worker = worker
        self.commands = 0
        execute = worker._worker.execute

        def counted(guest: Any, number: int, message: list[Any]) -> None:
            self.commands += message[0] not in (Kind.DEFINE, Kind.RELEASE, Kind.SYNC)
            execute(guest, number, message)

        patch.setattr(worker._worker, "execute", counted)

    def __call__(self) -> int:
        """Return how many commands have come since the last call."""
        self.worker.synchronize()
        commands, self.commands = self.commands, 0
        return commands


@pytest.fixture
def watch(bob: VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(bob, monkeypatch)


LOADERS: dict[str, Any] = {
    "in order": lambda data: DataLoader(data, batch_size=4),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True, generator=generator()),
    "without the last": lambda data: DataLoader(data, batch_size=4, drop_last=True),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 13, 9, generator=generator())),
    "batches by a sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(range(9), 4, drop_last=False)),
    "whole batches": lambda data: DataLoader(
        data, sampler=BatchSampler(RandomSampler(data, generator=generator()), 4, drop_last=False), batch_size=None
    ),
    "a subset": lambda data: DataLoader(Subset(data, [1, 3, 5, 7, 9]), batch_size=2),
    "a split": lambda data: DataLoader(random_split(data, [6, 7], generator())[1], batch_size=3),
    "one": lambda data: [data[4], data[-1]],
}


@pytest.mark.parametrize("kind", [RemoteDataset, TensorDataset])
@pytest.mark.parametrize("how", LOADERS)
@pytest.mark.parametrize("chain", [False, True])
def test_batches_are_those_of_local_tensors(kind: Any, how: str, chain: bool, bob: VirtualWorker, alice: VirtualWorker) -> None:
    pointers = send(X, Y, to=bob)
    data: Dataset[Any] = kind(*(send(*pointers, to=alice) if chain else pointers))
    assert len(data) == 13  # type: ignore[arg-type]  # a Dataset of torch need not have a length
    expected = [[part.tolist() for part in batch] for batch in LOADERS[how](TensorDataset(X, Y))]
    found = [[farpoint.get(part) for part in batch] if chain else batch for batch in LOADERS[how](data)]
    assert home(found) == expected


@pytest.mark.parametrize(("whole", "allowed"), [(False, 6), (True, 2)])
def test_a_batch_takes_a_constant_number_of_commands(whole: bool, allowed: int, bob: VirtualWorker, watch: Watch) -> None:
    data = RemoteDataset(*send(torch.randn(600, 3), torch.arange(600), to=bob))
    watch()
    for size in (1, 10, 300):
        sampler = BatchSampler(RandomSampler(data), size, drop_last=False)
        loader: Any = DataLoader(data, sampler=sampler, batch_size=None) if whole else DataLoader(data, size, shuffle=True)
        batches = iter(loader)
        for _ in range(2):
            batch = next(batches)
            assert len(batch[0]) == size and watch() == allowed


def test_more_rows_than_an_operation_returns(bob: VirtualWorker) -> None:
    data = RemoteDataset(*send(torch.arange(3000), to=bob))
    rows = data.__getitems__(list(range(2500)))
    assert len(rows) == 2500 and home(rows[-1]) == [2499]
    whole = data[list(range(2999, 0, -1))]
    assert home(whole)[0][:2] == [2999, 2998]
    assert home(default_collate(rows[:1024])) == [list(range(1024))]


def test_nothing_is_left(bob: VirtualWorker) -> None:
    data = RemoteDataset(*send(X, Y, to=bob))
    for batch in DataLoader(data, batch_size=4, shuffle=True):
        del batch
    assert len(bob) == 2


def test_what_is_no_remote_data_is_refused(bob: VirtualWorker, alice: VirtualWorker) -> None:
    p, q = send(X, Y, to=bob)
    for wrong in ((), (X,), (p, Y), (p.sum(),)):
        with pytest.raises(PointerError, match="RemoteDataset consists of"):
            RemoteDataset(*wrong)
    with pytest.raises(ValueError, match="these have 13, 12"):
        RemoteDataset(p, q[1:])
    with pytest.raises(NotColocatedError, match="bob"):
        RemoteDataset(p, *send(Y, to=alice))
    with pytest.raises(PointerError, match="at least one shard"):
        FederatedDataset([])
    q.free()
    with pytest.raises(farpoint.PointerSpentError):
        RemoteDataset(p, q)


def shards(*workers: VirtualWorker) -> FederatedDataset:
    """Return 5 rows on the first worker, 8 on the next."""
    parts = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    return FederatedDataset(RemoteDataset(*send(*part, to=worker)) for part, worker in zip(parts, workers, strict=True))


class TestFederated:
    """Shards on several workers."""

    def test_rows(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        data = shards(bob, alice)
        assert len(data) == 13 and data.workers == [bob, alice]
        assert [home(data[i]) for i in range(13)] == [[X[i].tolist(), i] for i in range(13)]
        assert home(data[-1])[1] == 12 and home(data[-13])[1] == 0
        for index in (13, -14):
            with pytest.raises(IndexError, match="13"):
                data[index]
        assert [row[0].location for row in data] == [bob] * 5 + [alice] * 8  # type: ignore[attr-defined]  # by index, as torch's do

    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize(("size", "drop_last", "lengths"), [
        (1, False, [1] * 13), (4, False, [4, 1, 4, 4]), (4, True, [4, 4, 4]), (5, False, [5, 5, 3]), (6, True, [6]), (99, False, [5, 8]),
    ])
    def test_batches(
        self, shuffle: bool, size: int, drop_last: bool, lengths: list[int], bob: VirtualWorker, alice: VirtualWorker
    ) -> None:
        loader = FederatedDataLoader(shards(bob, alice), size, shuffle, drop_last=drop_last, generator=generator())
        assert len(loader) == len(lengths)
        for _ in range(2):
            batches = list(loader)
            assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == lengths
            values = [(x, y) for batch in batches for x, y in zip(*home(batch), strict=True)]
            assert all(x == X[y].tolist() for x, y in values)
            seen = [y for _, y in values]
            assert len(set(seen)) == len(seen) == sum(lengths)
            assert (seen == sorted(seen)) == (not shuffle)
            assert all((y < 5) == (x.location is bob) for x, ys in batches for y in home(ys))  # type: ignore[attr-defined]
            assert [place.id for place in dict.fromkeys(x.location for x, _ in batches)] in (["bob", "alice"], ["alice"])  # type: ignore[attr-defined]

    def test_a_shuffle_is_reproducible_and_new_each_time(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        data = shards(bob, alice)
        loaders = [FederatedDataLoader(data, 4, shuffle=True, generator=generator()) for _ in range(2)]
        first, second = ([home(list(loader)) for _ in range(2)] for loader in loaders)
        assert first == second and first[0] != first[1]

    def test_an_empty_shard(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        data = FederatedDataset([RemoteDataset(*send(X[:0], to=bob)), RemoteDataset(*send(X[:3], to=alice))])
        loader = FederatedDataLoader(data, 2, shuffle=True)
        assert len(data) == 3 and len(loader) == 2 and sum(len(x) for (x,) in loader) == 3

    def test_a_batch_takes_one_command_for_each_tensor(self, bob: VirtualWorker, alice: VirtualWorker, watch: Watch) -> None:
        loader = iter(FederatedDataLoader(shards(bob, alice), 4, shuffle=True))
        watch()
        batch = next(loader)
        assert len(batch) == 2 and watch() == 2

    def test_a_model_that_goes_to_the_data(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        weight: Any = torch.zeros(2)
        for x, y in FederatedDataLoader(shards(bob, alice), 4):
            there = farpoint.send(weight, x.location).requires_grad_()  # type: ignore[attr-defined]  # a pointer
            ((x / 26) @ there - y / 13).square().mean().backward()  # type: ignore[no-untyped-call]  # torch's own
            gradient: Any = there.grad
            weight = weight - 0.5 * gradient.get()
        loss = ((X / 26) @ weight - Y / 13).square().mean()
        assert float(loss) < float((Y / 13).square().mean()) / 5


class TestProcesses:
    """Pointers are of use in the process that made them."""

    @pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12, about any fork beside a thread
    @pytest.mark.parametrize("kind", [RemoteDataset, TensorDataset])
    def test_a_fork_says_why(self, kind: Any, bob: VirtualWorker) -> None:
        with pytest.raises(ForkedPointerError, match="num_workers=0"):
            next(iter(DataLoader(kind(*send(X, Y, to=bob)), batch_size=4, num_workers=1, multiprocessing_context="fork")))

    def test_another_process_says_why(self, bob: VirtualWorker) -> None:
        loader = DataLoader(RemoteDataset(*send(X, Y, to=bob)), batch_size=4, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(PointerError, match="num_workers=0"):
            iter(loader)

    def test_the_federated_loader_says_it_at_once(self, bob: VirtualWorker, alice: VirtualWorker) -> None:
        with pytest.raises(PointerError, match="num_workers=0"):
            FederatedDataLoader(shards(bob, alice), num_workers=2)

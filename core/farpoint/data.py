"""Data sets whose rows are on workers, for the loaders and samplers of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, Dataset, RandomSampler, SequentialSampler, TensorDataset

from farpoint import gate
from farpoint.errors import PointerError
from farpoint.pointer import PointerTensor

_ROWS = 1024  # what one operation may return
_ALONE = (
    "a pointer is of use only in the process that made it, whose links no other process shares. Load data with num_workers=0: "
    "nothing waits for a batch anyway"
)


class RemoteDataset(TensorDataset):
    """A `TensorDataset` of pointers that takes a batch with a constant number of commands.

    Torch's own class works on pointers, too, and issues a command for each row and tensor. This one issues, for a batch of up to
    1,024 rows, three for each tensor: the rows are picked together, taken apart for the loader, and put together by
    `default_collate`. Without automatic batching it is one::

        batches = BatchSampler(RandomSampler(data), batch_size=4096, drop_last=False)
        DataLoader(data, sampler=batches, batch_size=None)

    `torch.utils.data.random_split` and `Subset` of it work as well. Processes of a loader cannot use pointers: `num_workers` is 0.

    Args:
        *tensors: Pointers of the same length, reached by the same way.

    Raises:
        PointerError: One is none, or has no rows.
        NotColocatedError: They are in different places.
        ValueError: They have different lengths.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        if not tensors:
            raise PointerError("a RemoteDataset consists of at least one pointer")
        for tensor in tensors:
            if not isinstance(tensor, PointerTensor) or not tensor.ndim:
                raise PointerError("a RemoteDataset consists of pointers with rows: x.send(worker)")
            gate.check_live(tensor)
            if tensor._route is not cast("PointerTensor", tensors[0])._route:
                raise gate.elsewhere(RemoteDataset, cast("PointerTensor", tensors[0]), tensor)
        if len({len(tensor) for tensor in tensors}) > 1:
            raise ValueError(f"the tensors of a RemoteDataset have as many rows, and these have {', '.join(str(len(t)) for t in tensors)}")
        super().__init__(*tensors)

    @property
    def location(self) -> Any:
        """The worker that its pointers point at."""
        return cast("PointerTensor", self.tensors[0]).location

    def __reduce__(self) -> Any:
        raise PointerError(_ALONE)  # to a process of a loader that is not forked

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
        """Return one row of each tensor, or those of a list of indices or of a slice, with one command for each tensor."""
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        """Return the rows of many indices, as a loader asks for them."""
        rows: list[tuple[torch.Tensor, ...]] = []
        for begin in range(0, len(indices), _ROWS):
            picked = self[list(indices[begin : begin + _ROWS])]
            rows.extend(zip(*(tensor.unbind(0) for tensor in picked), strict=True))
        return rows


class FederatedDataset(Dataset[Any]):
    """Shards on several workers, one after the other as one data set.

    Args:
        shards: Data sets that are taken by lists of indices, each on one worker.

    Attributes:
        shards: The same.

    Raises:
        PointerError: There is none.
    """

    def __init__(self, shards: Iterable[RemoteDataset]) -> None:
        self.shards = tuple(shards)
        if not self.shards:
            raise PointerError("a FederatedDataset consists of at least one shard")

    @property
    def workers(self) -> list[Any]:
        """The workers of its shards, in order."""
        return [shard.location for shard in self.shards]

    def __len__(self) -> int:
        """Return the number of rows on all workers."""
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return a row, on the worker where it is.

        Raises:
            IndexError: There are not so many.
        """
        left = index + len(self) if index < 0 else index
        for shard in self.shards if left >= 0 else ():
            if left < len(shard):
                return shard[left]
            left -= len(shard)
        raise IndexError(f"row {index} of a FederatedDataset of {len(self)}")


class FederatedDataLoader:
    """Batches of a `FederatedDataset`: each is on one worker, those of one worker follow each other, and none is mixed.

    A batch is a list of pointers, one for each tensor of the shard; `batch[0].location` is where it is. Taking it issues one command
    for each tensor, and waits for nothing.

    Args:
        dataset: The shards.
        batch_size: Rows of a batch; the last one of each worker may have less.
        shuffle: Whether the rows of each worker are taken in a random order, a new one each time.
        drop_last: Whether a last batch that has less is left out.
        generator: What the order is drawn from, here; torch's own if not given.
        num_workers: Processes that load: there can be none.

    Raises:
        PointerError: `num_workers` is not 0.
    """

    def __init__(
        self,
        dataset: FederatedDataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        num_workers: int = 0,
    ) -> None:
        if num_workers:
            raise PointerError(_ALONE)
        self.dataset = dataset
        self._batches: list[tuple[RemoteDataset, BatchSampler]] = []
        for shard in dataset.shards:
            rows: Any = RandomSampler(shard, generator=generator) if shuffle and len(shard) else SequentialSampler(cast("Sized", shard))
            self._batches.append((shard, BatchSampler(rows, batch_size, drop_last)))

    def __len__(self) -> int:
        """Return the number of batches: each worker's last one counts for itself."""
        return sum(len(batches) for _, batches in self._batches)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Yield the batches, worker by worker."""
        for shard, batches in self._batches:
            for indices in batches:
                yield list(shard[indices])

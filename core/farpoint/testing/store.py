"""The contract of object stores: subclass it, give one fixture, run pytest."""

from __future__ import annotations

import threading

import pytest
import torch

from farpoint.store import NO_ANNOTATION, Annotation, ObjectStore
from farpoint.testing.contract import Contract

NOTE = Annotation(tags=frozenset({"#x", "#y"}), description="what it is", requires_grad=True)


class StoreContract(Contract):
    """Every guarantee of `farpoint.store.ObjectStore`, one test for each.

    Give a fixture `store` that returns a new, empty store::

        from farpoint.plugins import plugins
        from farpoint.testing import StoreContract

        class TestShelf(StoreContract):
            @pytest.fixture
            def store(self):
                return plugins.store("shelf", "alice")

    The tests themselves cannot be overridden.
    """

    @pytest.fixture
    def store(self) -> ObjectStore:
        """Return the store to test."""
        raise NotImplementedError("give a fixture `store` that returns an empty store to test")

    # A mapping.

    def test_a_new_store_is_empty(self, store: ObjectStore) -> None:
        """Nothing is in it, and it keeps nothing alive."""
        assert len(store) == 0 and list(store) == [] and store.nbytes == 0

    @pytest.mark.parametrize("object_id", [1, 2, 2**31, 2**32, 2**63 - 1])
    def test_what_is_stored_is_read(self, store: ObjectStore, object_id: int) -> None:
        """A tensor is found under its id, by every way of reading."""
        store[object_id] = torch.arange(3.0)
        assert torch.equal(store[object_id], torch.arange(3.0))
        found = store.get(object_id)
        assert found is not None and torch.equal(found, torch.arange(3.0))
        assert object_id in store and object_id + 1 not in store
        assert len(store) == 1 and list(store) == list(store.keys()) == [object_id]
        assert [key for key, _ in store.items()] == [object_id] and len(list(store.values())) == 1

    def test_a_missing_id_raises_key_error(self, store: ObjectStore) -> None:
        """Reading, deleting and annotating what is not there raises, and changes nothing."""
        store[1] = torch.ones(1)
        for missing in (2, 2**63 - 1):
            with pytest.raises(KeyError):
                store[missing]
            with pytest.raises(KeyError):
                del store[missing]
            with pytest.raises(KeyError):
                store.pop(missing)
            with pytest.raises(KeyError):
                store.annotate(missing, NOTE)
            assert store.get(missing) is None and store.get(missing, 5) == 5
            assert store.pop(missing, 5) == 5
            store[missing] = torch.ones(1)
            assert store.annotation(missing) == NO_ANNOTATION, "the refused annotation was kept"
            del store[missing]
        assert list(store) == [1]

    def test_what_is_deleted_is_gone(self, store: ObjectStore) -> None:
        """A deleted object is not read, counted or iterated over; `pop` returns it."""
        for object_id in (1, 2, 3):
            store[object_id] = torch.full((2,), float(object_id))
        del store[2]
        assert torch.equal(store.pop(1), torch.full((2,), 1.0))
        assert list(store) == [3] and len(store) == 1 and 2 not in store and store.get(1) is None
        for object_id in (1, 2):
            with pytest.raises(KeyError):
                store[object_id]
            with pytest.raises(KeyError):
                del store[object_id]

    def test_iteration_is_oldest_first(self, store: ObjectStore) -> None:
        """Ids come in the order they were first stored in, not in theirs; a deleted one comes back last."""
        ids = [7, 3, 2**40, 1, 5]
        for object_id in ids:
            store[object_id] = torch.ones(1)
        assert list(store) == ids
        del store[3]
        store[3] = torch.ones(1)
        assert list(store) == [7, 2**40, 1, 5, 3]

    def test_the_store_may_change_during_iteration(self, store: ObjectStore) -> None:
        """An iteration that has begun goes on while objects come and go."""
        for object_id in range(1, 20):
            store[object_id] = torch.ones(1)
        for object_id in store:
            del store[object_id]
            store[object_id + 100] = torch.ones(1)
            if len(store) > 30:
                break
        assert len(store) == 19

    # Aliasing.

    @pytest.mark.parametrize("whole_first", [True, False])
    def test_views_share_memory(self, store: ObjectStore, whole_first: bool) -> None:
        """An in-place change through either of two views is seen through the other, stored in either order."""
        whole = torch.zeros(4, 4)
        views = {1: whole, 2: whole.t()[1:, ::2]}
        for object_id in (1, 2) if whole_first else (2, 1):
            store[object_id] = views[object_id]
        store[1].fill_(3)
        assert bool((store[2] == 3).all())
        store[2].fill_(5)
        assert int((store[1] == 5).sum()) == store[2].numel() == 6
        assert bool((store[1][::2, 1:] == 5).all())

    def test_a_reading_stays_valid(self, store: ObjectStore) -> None:
        """What was read before a change, also of another view stored later, sees that change."""
        store[1] = torch.zeros(4)
        early = store[1]
        store[2] = early[1:3]
        store[2].add_(1)
        assert early.tolist() == store[1].tolist() == [0, 1, 1, 0]
        early.mul_(3)
        assert store[2].tolist() == [3, 3]

    def test_a_view_outlives_its_base(self, store: ObjectStore) -> None:
        """A view keeps its memory after the other objects that share it were deleted or replaced."""
        base = torch.arange(6.0)
        store[1], store[2], store[3] = base, base[2:4], base[3:]
        del store[1], base
        store[3] = torch.zeros(1)
        store[2].add_(10)
        assert store[2].tolist() == [12, 13]

    # Replacement.

    def test_replacement_keeps_the_annotation(self, store: ObjectStore) -> None:
        """A second object under an id takes the place and the annotation of the first."""
        store[1] = torch.zeros(2)
        store[2] = torch.zeros(2)
        store.annotate(1, NOTE)
        store[1] = torch.ones(3)
        assert torch.equal(store[1], torch.ones(3)) and len(store) == 2 and set(store) == {1, 2}
        assert store.annotation(1) == NOTE

    def test_replacement_leaves_what_shared_memory(self, store: ObjectStore) -> None:
        """A replaced object is another one: those that shared memory with the first are as they were."""
        base = torch.zeros(4)
        store[1], store[2] = base, base[:2]
        store[1] = torch.ones(4)
        assert store[2].tolist() == [0, 0]
        store[1].fill_(7)
        assert store[2].tolist() == [0, 0]

    # Annotations.

    def test_annotations_return(self, store: ObjectStore) -> None:
        """An annotation is read as it was written, replaces the one before, and is no other object's."""
        store[1], store[2] = torch.zeros(2), torch.zeros(2)
        assert store.annotation(1) == NO_ANNOTATION
        store.annotate(1, NOTE)
        assert store.annotation(1) == NOTE and store.annotation(2) == NO_ANNOTATION
        other = Annotation(description="\u00fcber \U0001f600 \0")
        store.annotate(1, other)
        assert store.annotation(1) == other
        store[1].add_(1)
        assert store.annotation(1) == other

    def test_deletion_deletes_the_annotation(self, store: ObjectStore) -> None:
        """An id that is used again has nothing written on it, by whichever way it was deleted."""
        for delete in (store.__delitem__, store.pop, lambda _: store.clear(), lambda _: store.popitem()):
            store[1] = torch.zeros(2)
            store.annotate(1, NOTE)
            delete(1)
            store[1] = torch.zeros(2)
            assert store.annotation(1) == NO_ANNOTATION
            del store[1]

    # Bytes.

    def test_bytes_of_tensors_are_counted(self, store: ObjectStore) -> None:
        """Each tensor counts with its bytes, until it is deleted or replaced."""
        store[1] = torch.zeros(256, dtype=torch.float64)
        store[2] = torch.zeros(512, dtype=torch.uint8)
        assert store.nbytes == 2048 + 512
        store[1] = torch.zeros(16, dtype=torch.float32)
        assert store.nbytes == 64 + 512
        del store[2]
        assert store.nbytes == 64
        store[3] = torch.zeros(0)
        assert store.nbytes == 64

    def test_a_storage_counts_once(self, store: ObjectStore) -> None:
        """Views of one storage count it once, whole, and as long as one of them is there."""
        base = torch.zeros(1024, dtype=torch.uint8)
        store[1] = base[:16]
        assert store.nbytes == 1024
        store[2], store[3], store[4] = base, base.view(torch.float32), base[0].expand(5000)
        assert store.nbytes == 1024
        store[5] = torch.zeros(1024, dtype=torch.uint8)
        assert store.nbytes == 2048
        del store[1], store[2], store[3]
        assert store.nbytes == 2048
        del store[4]
        assert store.nbytes == 1024

    # Threads and the end.

    def test_threads_do_not_disturb_each_other(self, store: ObjectStore) -> None:
        """Several threads store, read, annotate, iterate and delete at once, each its own ids."""
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def work(lane: int) -> None:
            try:
                start.wait(10)
                for step in range(1, 151):
                    object_id = step * 4 + lane
                    store[object_id] = torch.full((3,), float(object_id))
                    store.annotate(object_id, Annotation(description=str(object_id)))
                    assert store[object_id].tolist() == [object_id] * 3
                    assert store.annotation(object_id).description == str(object_id)
                    assert object_id in list(store) and store.nbytes >= 12 and len(store) >= 1
                    if step % 3:
                        del store[object_id]
                        assert object_id not in store
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a thread waits for ever"
        assert not errors, errors
        kept = {step * 4 + lane for lane in range(4) for step in range(3, 151, 3)}
        assert set(store) == kept and len(store) == len(kept) and store.nbytes == 12 * len(kept)

    def test_close_twice(self, store: ObjectStore) -> None:
        """The second `close` does nothing, also with objects in the store."""
        store[1] = torch.zeros(4)
        store.annotate(1, NOTE)
        store.close()
        store.close()

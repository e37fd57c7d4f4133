"""The object stores in this repository keep the contract that strangers' stores keep."""

from __future__ import annotations

import importlib

import pytest
import torch

from farpoint.plugins import plugins
from farpoint.store import NO_ANNOTATION, Annotation, ObjectStore
from farpoint.testing.store import StoreContract


class TestMemory(StoreContract):
    """The store in memory."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        if "memory" not in plugins.store_names():
            plugins.register(importlib.import_module("farpoint_memory"), "farpoint_memory")
        return plugins.store("memory", "alice")

    def test_it_keeps_the_very_objects(self, store: ObjectStore) -> None:
        tensor, thing = torch.ones(2), object()
        store[1], store[2] = tensor, thing
        assert store[1] is tensor and store[2] is thing and store.nbytes == 8

    def test_close_forgets_everything(self, store: ObjectStore) -> None:
        store[1] = torch.ones(2)
        store.annotate(1, Annotation(description="text"))
        store.close()
        assert len(store) == 0 and store.nbytes == 0 and store.annotation(1) == NO_ANNOTATION


def test_overriding_a_test_of_the_contract_is_refused() -> None:
    with pytest.raises(AssertionError, match="overrides test_close_twice"):
        type("TestLenient", (StoreContract,), {"test_close_twice": lambda self: None})

"""What holds for every test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from farpoint import VirtualWorker
from farpoint.errors import UnseenErrorWarning
from farpoint.remote import handles


@pytest.fixture(autouse=True)
def _close_what_stayed() -> Iterator[None]:
    """Close the workers that a test has left because it failed, so that no other test fails with it."""
    before = handles()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnseenErrorWarning)
        for handle in handles():
            if handle not in before:
                handle.close()


@pytest.fixture
def bob() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="bob") as bob:
        yield bob


@pytest.fixture
def alice() -> Iterator[VirtualWorker]:
    with VirtualWorker(id="alice") as alice:
        yield alice

"""What all contracts have in common."""

from __future__ import annotations

from typing import Any


class Contract:
    """A class of tests that is shipped: who subclasses it gives fixtures, and cannot override the tests themselves."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("test_") and any(name in vars(base) for base in cls.__mro__[1:]):
                raise AssertionError(
                    f"{cls.__name__} overrides {name}, which is part of the contract; give it another name"
                )

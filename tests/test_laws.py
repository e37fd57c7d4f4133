"""The laws, on every combination of what is registered: used as a stranger uses them."""

from farpoint.testing.laws import *  # noqa: F403  # the names are those of `__all__`

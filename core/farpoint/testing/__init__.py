"""Contracts that a plugin's own tests subclass."""

from farpoint.testing.serializer import SerializerContract
from farpoint.testing.store import StoreContract
from farpoint.testing.transport import TransportContract

__all__ = ["SerializerContract", "StoreContract", "TransportContract"]

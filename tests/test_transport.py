"""The transports in this repository keep the contract that strangers' transports keep."""

from __future__ import annotations

from typing import Any

import pytest

from farpoint.errors import TransportError
from farpoint.testing.transport import Recorder, TransportContract, join
from farpoint.transport import Transport
from farpoint_virtual.transport import VirtualTransport


class TestVirtual(TransportContract):
    """Links within this process."""

    @pytest.fixture
    def transport(self) -> Transport:
        return VirtualTransport()

    def test_who_listens_is_said(self, transport: Transport) -> None:
        transport.listen("virtual://alice", lambda _: Recorder())
        with pytest.raises(TransportError, match="virtual://alice"):
            transport.connect("virtual://bob", Recorder())

    def test_a_message_is_not_copied(self, transport: Transport, url: str) -> None:
        seen: list[Any] = []
        far = Recorder()
        far.received = seen.append  # type: ignore[method-assign,assignment]
        link, _ = join(transport, url, Recorder(), far)
        frames: list[Any] = [b"one", bytearray(b"two")]
        link.write(frames)
        assert seen[0] is frames

    def test_a_receiver_that_raises_ends_the_link(self, transport: Transport, url: str) -> None:
        error = ValueError("broken on purpose")

        def fail(_: list[bytes]) -> None:
            raise error

        near, far = Recorder(), Recorder(fail)
        ends = join(transport, url, near, far)
        ends[0].write([b"x"])
        assert near.losses == far.losses == [error]
        for link in ends:
            with pytest.raises(TransportError):
                link.write([b"y"])
            link.close()
        assert near.losses == far.losses == [error]

"""All harnesses by name."""

from __future__ import annotations

from typing import Final

from fuzz import (
    bulk,
    capabilities,
    greeting,
    msgpack_decode,
    session_messages,
    tcp_framing,
    torch_decode,
    websocket_framing,
)
from fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        *(msgpack_decode.TARGET, torch_decode.TARGET, session_messages.TARGET, bulk.TARGET, tcp_framing.TARGET),
        *(websocket_framing.TARGET, greeting.HELLO, greeting.WELCOME, capabilities.TARGET),
    )
}

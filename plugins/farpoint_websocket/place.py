"""Where one listens, or dials: a URL in its parts."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import attrs

from farpoint.errors import TransportError


@attrs.frozen
class Place:
    """A URL like `wss://example.org:8765/farpoint?compress=1`.

    Attributes:
        url: As it was written.
        secure: Whether the link is encrypted.
        host: Name or address.
        port: 0 for one that the system chooses.
        path: What stands behind the port: for a web proxy, and without a meaning to us.
        compress: Whether chunks are compressed, if both sides ask for it.
    """

    url: str
    secure: bool
    host: str
    port: int
    path: str
    compress: bool

    @property
    def bare(self) -> str:
        """The URL without the options that are ours."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.secure else 'ws'}://{host}:{self.port}{self.path}"

    @property
    def spelled(self) -> str:
        """The URL in full."""
        return self.bare + ("?compress=1" if self.compress else "")


def parse(url: str) -> Place:
    """Read a URL.

    Raises:
        TransportError: It is none of ours.
    """
    example = "write ws://host:port or wss://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TransportError(url, f"this is no URL ({error}); {example}") from error
    if parts.username is not None or parts.password is not None:
        # The URL is not repeated: there is a secret in it.
        raise TransportError(
            f"{parts.scheme}://...@{parts.hostname}", "a URL holds no secrets; use Credentials(token=...)"
        )
    if parts.scheme not in {"ws", "wss"} or not parts.hostname or parts.fragment:
        raise TransportError(url, f"this is no place to reach over WebSocket; {example}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    compress = options.pop("compress", "0")
    if options or compress not in {"0", "1"}:
        raise TransportError(url, "the only option in a URL is ?compress=1")
    secure = parts.scheme == "wss"
    default = 443 if secure else 80
    return Place(url, secure, parts.hostname, default if port is None else port, parts.path, compress == "1")

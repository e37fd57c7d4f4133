"""Who may speak over a link, and how it is protected: what a transport is told beside a URL."""

from __future__ import annotations

import hmac
import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from farpoint.errors import InsecureListenerError
from farpoint.limits import DEFAULT_LIMITS, Limits


@attrs.frozen
class Credentials:
    """What the side that dials brings.

    Attributes:
        token: Shown to the listener before anything else; empty if it has none.
        tls: How to verify the listener, and the certificate to show; None for what the scheme of the URL implies.
        limits: Time-outs and sizes.
        insecure: Whether a worker that has a TLS context may do without it where others can listen in.
    """

    token: str = attrs.field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    limits: Limits = DEFAULT_LIMITS
    insecure: bool = False


@attrs.frozen
class Admission:
    """Whom a listener lets in.

    Attributes:
        tokens: Whoever shows one of them may come in; if there are none, everybody.
        tls: The certificate to show, and how to verify those of clients; None for a link in the clear.
        origins: Web pages that may open a link; none by default. Programs that are no browsers have no origin.
        limits: Time-outs and sizes.
        verify: Says whether a token that is none of these opens the door as well: one that the worker itself has made.
    """

    tokens: tuple[str, ...] = attrs.field(default=(), repr=False)
    tls: ssl.SSLContext | None = None
    origins: tuple[str, ...] = ()
    limits: Limits = DEFAULT_LIMITS
    verify: Callable[[str], bool] | None = None

    def admits(self, token: str) -> bool:
        """Return whether a token opens the door, in a time that does not depend on it."""
        shown = token.encode(errors="replace")
        matches = [hmac.compare_digest(shown, known.encode()) for known in self.tokens]
        return any(matches) or not self.tokens or (self.verify is not None and self.verify(token))

    def principal(self, token: str, identity: str) -> str:
        """Return whom somebody who was let in counts as, empty if there is no telling.

        That is whoever the certificate names, else the holder of a token, if there are several. A single token is everybody's, and
        a capability shows who has introduced somebody, not who that is.

        Args:
            token: What was shown.
            identity: The name in the certificate that was shown, empty if none was.
        """
        if identity:
            return f"the certificate of {identity!r}"
        shown = token.encode(errors="replace")
        matches = [hmac.compare_digest(shown, known.encode()) for known in self.tokens]
        return f"token {matches.index(True) + 1}" if len(matches) > 1 and any(matches) else ""


NO_CREDENTIALS = Credentials()
EVERYBODY = Admission()


def tls_context(purpose: ssl.Purpose, authority: Path | None, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Return a context that trusts an authority, and shows a certificate.

    Args:
        purpose: Who shall be verified: `ssl.Purpose.SERVER_AUTH` for whom we dial, `CLIENT_AUTH` for who dials us.
        authority: File with those who sign what the other side shows; what the system trusts if not given.
        certificate: Files with what we show, chain included, and its key.

    Raises:
        InsecureListenerError: A file cannot be read, or is not what it must be.
    """
    path: Path | None = authority
    try:
        context = ssl.create_default_context(purpose, cafile=authority)
        if certificate is not None:
            path = certificate[0]
            context.load_cert_chain(*certificate)
    except ssl.SSLError as error:
        what = "this certificate and its key do not belong together, or are none" if path != authority else "there is no certificate in it"
        raise InsecureListenerError(str(path), f"{what} ({error.reason or error})", "give files in PEM format; `farpoint certs` makes some") from error
    except OSError as error:
        names = [str(file) for file in (authority, *(certificate or ())) if file is not None and not os.access(file, os.R_OK)]
        place = names[0] if names else str(path)
        raise InsecureListenerError(place, f"it cannot be read: {error.strerror or error}", "check the path, and who may read it") from error
    return context


def is_local(url: str) -> bool:
    """Return whether only this machine reaches an address."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def name_in(certificate: Mapping[str, Any] | None) -> str:
    """Return the name in a certificate that was verified: its first alternative name, else its common name.

    Args:
        certificate: As `ssl.SSLSocket.getpeercert` returns it; nothing, or empty, if none was shown.
    """
    if not certificate:
        return ""
    for _, name in certificate.get("subjectAltName", ()):
        return str(name)
    subject = {key: value for group in certificate.get("subject", ()) for key, value in group}
    return str(subject.get("commonName", ""))

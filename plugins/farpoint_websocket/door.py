"""Who gets in: decided from the request, before there is a link."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Hashable
from http import HTTPStatus
from typing import Any

import attrs
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers, MultipleValuesError
from websockets.http11 import Request, Response

from farpoint.access import Admission
from farpoint.limits import Limits
from farpoint_websocket.connection import ServerEnd

MINUTE = 60.0

STRANGERS = 4_096
"""Addresses whose failed logins are remembered; beyond that the oldest are forgotten."""

CROWD = 2
"""Connections that are let through to the door for each link that is allowed: those beyond the limit get an answer."""


@attrs.define
class _Failures:
    """The failed logins of one address.

    Attributes:
        since: When the first was.
        count: How many there are.
    """

    since: float
    count: int = 0


class Door:
    """The doorkeeper of one listener.

    Args:
        admission: Whom it lets in.
        clock: Tells the time.
    """

    def __init__(self, admission: Admission, clock: Callable[[], float] = time.monotonic) -> None:
        self._admission = admission
        self._clock = clock
        self._failures: dict[Hashable, _Failures] = {}
        self._guests: dict[object, Hashable] = {}

    def check(self, guest: object, host: str, headers: Headers) -> tuple[HTTPStatus, str] | None:
        """Return why a request is turned away, or None and count the guest.

        Args:
            guest: Who is counted until `leave` is called for it.
            host: Its address.
            headers: Of its request.
        """
        if not headers.get_all("Upgrade"):
            return HTTPStatus.UPGRADE_REQUIRED, (
                "A farpoint worker listens here, and it speaks WebSocket.\n"
                "Reach it from Python, with the scheme ws:// or wss:// in place of http:// or https://.\n"
            )
        address = network(host)
        if self._locked(address):
            return HTTPStatus.TOO_MANY_REQUESTS, "Too many wrong tokens from your address. Wait a minute.\n"
        if not self._admission.admits(token_in(headers)):
            self._fail(address)
            return HTTPStatus.UNAUTHORIZED, "The token is missing or not accepted here.\n"
        limits = self._admission.limits
        if len(self._guests) >= limits.links:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"There are {limits.links} links here already. Try again later.\n"
        if list(self._guests.values()).count(address) >= limits.links_per_address:
            return HTTPStatus.SERVICE_UNAVAILABLE, (
                f"There are {limits.links_per_address} links from your address already. Close one.\n"
            )
        self._guests[guest] = address
        return None

    def leave(self, guest: object) -> None:
        """Count a guest no more, if it was counted."""
        self._guests.pop(guest, None)

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return the answer that turns a request away, None to let it in."""
        assert isinstance(connection, ServerEnd)
        refusal = self.check(connection, connection.remote_address[0], request.headers)
        if refusal is None:
            connection.left = lambda: self.leave(connection)
            return None
        response = connection.respond(*refusal)
        if refusal[0] is HTTPStatus.UPGRADE_REQUIRED:
            response.headers["Upgrade"] = "websocket"
        if refusal[0] is HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    def _locked(self, address: Hashable) -> bool:
        failures = self._failures.get(address)
        if failures is not None and self._clock() - failures.since >= MINUTE:
            del self._failures[address]
            failures = None
        return failures is not None and failures.count >= self._admission.limits.failed_logins

    def _fail(self, address: Hashable) -> None:
        if address not in self._failures:
            if len(self._failures) >= STRANGERS:
                del self._failures[next(iter(self._failures))]
            self._failures[address] = _Failures(self._clock())
        self._failures[address].count += 1


class Doorstep(socket.socket):
    """A listening socket that hangs up on who has too many connections already, before they cost more than that.

    A connection that has not said who it is takes a descriptor, and under TLS some memory and work.

    Args:
        family: Of its address.
        limits: How many links are allowed; `CROWD` times as many connections are.
    """

    def __init__(self, family: int, limits: Limits) -> None:
        # asyncio sends without delay only through sockets that say TCP: without it the second of two short messages
        # waits for the other side's delayed acknowledgement, 40 ms.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._limits = limits
        self._present: list[tuple[Hashable, socket.socket]] = []

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if self._crowded(network(address[0])):
            connection.close()
            raise ConnectionAbortedError("too many connections")
        self._present.append((network(address[0]), connection))
        return connection, address

    def _crowded(self, address: Hashable) -> bool:
        self._present = [(where, guest) for where, guest in self._present if guest.fileno() >= 0]
        near = sum(where == address for where, _ in self._present)
        return len(self._present) >= CROWD * self._limits.links or near >= CROWD * self._limits.links_per_address


def network(host: str) -> Hashable:
    """Return what counts as one address: of IPv6 the network that one customer gets."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address
    return address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False)


def token_in(headers: Headers) -> str:
    """Return the token that a request shows, empty if it shows none."""
    try:
        scheme, _, token = headers.get("Authorization", "").partition(" ")
    except MultipleValuesError:
        return ""
    return token.strip() if scheme.lower() == "bearer" else ""

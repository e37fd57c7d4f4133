"""How a link is dialled, and what is said if it fails."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus

from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    NegotiationError,
)
from websockets.typing import Subprotocol

from farpoint.access import Credentials
from farpoint.errors import NobodyListensError, NotAdmittedError, TransportError
from farpoint_websocket.connection import WRITE_LIMIT, ClientEnd, Dial, logger
from farpoint_websocket.exchange import describe
from farpoint_websocket.link import WebsocketLink
from farpoint_websocket.listener import speakable
from farpoint_websocket.place import Place
from farpoint_websocket.runner import Runner
from farpoint_websocket.wire import MAX_CHUNK, SUBPROTOCOL


def dial(runner: Runner, place: Place, credentials: Credentials) -> WebsocketLink:
    """Return a link that the other side has accepted.

    Raises:
        TransportError: There is none, and why.
    """
    if not place.port:
        raise TransportError(place.url, "nobody listens at port 0: dial the url of the listener, which says what it became")
    if credentials.token and not speakable(credentials.token):
        raise TransportError(
            place.url, "the token cannot be shown in an HTTP header: use visible ASCII characters"
        )
    tls = credentials.tls
    if place.secure and tls is None:
        # Reads the certificates of the system: nothing for the event loop.
        tls = ssl.create_default_context()
    if not place.secure and tls is not None:
        raise TransportError(place.url, "ws is not encrypted, and Credentials(tls=...) is given; dial wss://")
    try:
        return runner.call(place.url, _dial(runner, place, credentials, tls))
    except TransportError:
        raise
    except Exception as error:
        kind = NobodyListensError if _refused(error) else NotAdmittedError if _turned_away(error) else TransportError
        raise kind(place.url, explain(error, place, credentials)) from error


async def _dial(
    runner: Runner, place: Place, credentials: Credentials, tls: ssl.SSLContext | None
) -> WebsocketLink:
    limits = credentials.limits
    async with asyncio.timeout(limits.open_seconds):
        connection = await Dial(
            place.bare,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression="deflate" if place.compress else None,
            additional_headers={"Authorization": f"Bearer {credentials.token}"} if credentials.token else None,
            user_agent_header="farpoint",
            # What the environment says about proxies is meant for browsing.
            proxy=None,
            open_timeout=None,
            ping_interval=None,
            close_timeout=limits.close_seconds,
            max_size=MAX_CHUNK,
            write_limit=WRITE_LIMIT,
            logger=logger,
            create_connection=ClientEnd,
            ssl=tls,
        )
        assert isinstance(connection, ClientEnd)
        if connection.subprotocol != SUBPROTOCOL:
            connection.transport.abort()
            raise NegotiationError("no subprotocol")
        link = WebsocketLink(runner, place.url, connection, limits)
        # Whoever accepts may already write. It waits in the inbox.
        link.exchange.ready()
        runner.spawn(link.live())
        try:
            await link.exchange.opened.wait()
        except asyncio.CancelledError:
            link.exchange.fail(TransportError(place.url, "dialling was given up"))
            raise
        if not link.exchange.accepted:
            raise link.exchange.cause or TransportError(place.url, "the listener has closed the link at once")
        return link


def explain(error: Exception, place: Place, credentials: Credentials) -> str:
    """Return what an attempt to connect has failed at, and what to try next."""
    tls = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {tls.verify_message}. If you know who issued it, pass "
            "Credentials(tls=ssl.create_default_context(cafile=...))"
        )
    if tls is not None and tls.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
        return "who listens there does not speak TLS; try ws:// if that is meant to be so"
    if tls is not None:
        return f"TLS failed: {tls.reason or tls}; both sides must share a version and a cipher"
    if isinstance(error, InvalidStatus):
        return _explain_status(error, credentials)
    if isinstance(error, NegotiationError):
        return f"who listens there speaks WebSocket, but not {SUBPROTOCOL}: it is no farpoint worker; check host and port"
    if isinstance(error, InvalidMessage | ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        if not place.secure:
            other = "or one that wants TLS: try wss://"
        elif isinstance(error, InvalidMessage):
            other = "or one that wants a certificate of yours: load it into the context of Credentials(tls=...)"
        else:
            other = "or one that does not speak TLS: try ws:// if that is meant to be so"
        return f"who listens there does not answer as it should: it is no farpoint worker, {other}; check host and port"
    if isinstance(error, InvalidHandshake):
        return f"who listens there does not speak WebSocket as it should: {error}; check host and port"
    if isinstance(error, TimeoutError):
        return (
            f"no answer within {credentials.limits.open_seconds:g} s; check host, port and firewall, or allow more with "
            "Credentials(limits=Limits(open_seconds=...))"
        )
    if isinstance(error, socket.gaierror):
        return f"no machine is known by the name {place.host}: {error.strerror}; check the name"
    if _refused(error):
        return "nobody listens there; start the worker first, and dial the url of its listener"
    if isinstance(error, ConnectionClosed):
        return describe(error)
    return f"it cannot be reached: {error}; check host and port"


def _turned_away(error: Exception) -> bool:
    shut = (HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS)
    return isinstance(error, InvalidStatus) and error.response.status_code in shut


def _refused(error: Exception) -> bool:
    # asyncio reports several addresses that refuse as one OSError without a number.
    return isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error)


def _explain_status(error: InvalidStatus, credentials: Credentials) -> str:
    response = error.response
    text = (response.body or b"").decode(errors="replace").strip()[:300]
    match response.status_code:
        case HTTPStatus.UNAUTHORIZED if credentials.token:
            return "the token is not accepted there; ask its operator for the right one"
        case HTTPStatus.UNAUTHORIZED:
            return "a token is needed there; pass Credentials(token=...)"
        case HTTPStatus.TOO_MANY_REQUESTS:
            return "too many wrong tokens came from this address; wait a minute, then try again with the right one"
        case HTTPStatus.SERVICE_UNAVAILABLE:
            return f"it takes no further link now: {text}"
        case HTTPStatus.BAD_REQUEST:
            return f"who listens there speaks WebSocket, but not {SUBPROTOCOL}; check host and port ({text})"
        case status if 300 <= status < 400:
            return f"it sends us on to {response.headers.get('Location', 'nowhere')}; dial that yourself if you trust it"
        case status:
            return f"who listens there is no farpoint worker: it answers HTTP {status} {text}; check host and port"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

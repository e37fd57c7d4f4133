"""A place where links arrive: one thread accepts, each connection greets on a thread of its own."""

from __future__ import annotations

import logging
import socket
import ssl
import threading

from farpoint.access import Admission
from farpoint.errors import DecodeError
from farpoint.transport import Accept, Listener
from farpoint_tcp.door import Door
from farpoint_tcp.framing import Answer, answer
from farpoint_tcp.greeting import Deadline, Refusal, handshake, hang_up, meet, wrap
from farpoint_tcp.link import StreamLink
from farpoint_tcp.place import Place
from farpoint_tcp.stream import Stream, TlsStream, prepare, remote_name
from farpoint_tcp.watch import watch

_log = logging.getLogger("farpoint.tcp")


class StreamListener(Listener):
    """Accepts connections at a place.

    Args:
        place: Where.
        accept: Called with each link.
        admission: Whom to let in.
        tls: The certificate to show, None for links in the clear.
    """

    def __init__(self, place: Place, accept: Accept, admission: Admission, tls: ssl.SSLContext | None) -> None:
        self._place = place
        self._accept = accept
        self._admission = admission
        self._tls = tls
        self._door = Door(admission)
        self._closed = threading.Event()
        self._once = threading.Lock()
        self._sock = place.bind()
        self.url = place.listening(self._sock)
        watch.note(self)
        self._thread = threading.Thread(target=self._run, name=f"farpoint listener {self.url}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._once.acquire(False):
            return
        watch.forget(self)
        self._closed.set()
        self._place.release()  # while it is still taken: nobody else can have come in its place
        self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread, and ends the listening in forked children too
        self._thread.join()
        self._sock.close()

    def forked(self) -> None:
        """Be closed, in a child that was just forked: the place belongs to the parent."""
        self._once = threading.Lock()
        self._once.acquire()
        self._sock.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if not self._closed.is_set():
                    # No descriptors or memory left; the caller waits in the backlog.
                    _log.warning("%s: cannot accept: %s", self.url, error)
                    self._closed.wait(0.1)
                continue
            self._greet_alone(sock)

    def _greet_alone(self, sock: socket.socket) -> None:
        """Greet on a thread, if there is room for one more."""
        try:
            address, party = self._place.caller(sock)
        except OSError:  # gone already
            sock.close()
            return
        if not self._door.enter(party):
            _log.info("%s: no room for %s", self.url, address)
            self._turn_away(sock)
            return
        name = f"farpoint {self.url} from {address}"
        try:
            threading.Thread(target=self._serve, args=(sock, address, party), name=name, daemon=True).start()
        except RuntimeError as error:
            _log.warning("%s: no thread for %s: %s", self.url, address, error)
            self._door.leave(party)
            sock.close()

    def _serve(self, sock: socket.socket, address: str, party: str) -> None:
        """Greet a connection, and be the reader of its link until that ends."""
        try:
            stream, identity, token = self._greet(sock, party)
        except (OSError, DecodeError) as error:
            _log.info("%s: %s is not let in: %s", self.url, address, error)
            self._door.leave(party)
            return
        try:
            link = StreamLink(
                stream, f"{self._place.scheme}://{address}", address, identity, self._admission.limits, watch
            )
            link.token = token
            link.say_first(answer(Answer.WELCOME))
            try:
                receiver = self._accept(link)
            except BaseException:
                _log.exception("%s: accepting %s failed", self.url, address)
                link.refuse(answer(Answer.FAILED))
            else:
                link.run(receiver)
        finally:
            self._door.leave(party)

    def _greet(self, sock: socket.socket, party: str) -> tuple[Stream, str, str]:
        """Return what a connection has become, the name in its certificate, and the token that it has shown.

        Raises:
            DecodeError: It is not let in.
            OSError: It broke, or took too long.
        """
        deadline = Deadline(self._admission.limits.open_seconds)
        try:
            prepare(sock)
            if self._tls is not None:
                sock = wrap(sock, self.url, self._tls, None)
                handshake(sock, deadline)
            token = meet(sock, deadline)
            if not self._door.admits(party, token):
                raise Refusal(Answer.NOT_LET_IN, "it shows no token that opens the door, or has to wait")
            if self._closed.is_set():
                raise ConnectionAbortedError("the listener was closed meanwhile")
            return TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else Stream(sock), remote_name(sock), token
        except Refusal as refusal:
            hang_up(sock, self._admission.limits.close_seconds, answer(refusal.answer))
            raise
        except ssl.SSLError:  # about which OpenSSL has told the other side
            hang_up(sock, self._admission.limits.close_seconds)
            raise
        except BaseException:
            sock.close()
            raise

    def _turn_away(self, sock: socket.socket) -> None:
        """Say that there is no room, without waiting."""
        with sock:
            try:
                sock.setblocking(False)
                if self._tls is None:  # before a handshake an answer in the clear could not be read
                    sock.send(answer(Answer.NO_ROOM))
            except OSError:
                pass  # it has hung up itself

"""What a transport is: ordered messages between two parties, whatever carries them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeAlias

from farpoint.access import EVERYBODY, NO_CREDENTIALS, Admission, Credentials
from farpoint.serializer import Frame


class Receiver(Protocol):
    """What a transport tells about one end of a link."""

    def received(self, frames: Sequence[Frame]) -> None:
        """Take one message. Called for one message at a time, in the order of the peer's writes.

        The frames may be used until this call returns. It raises nothing.
        """

    def lost(self, cause: Exception | None) -> None:
        """Learn that the link is gone: called exactly once, after the last `received`.

        Args:
            cause: What broke it, or None after a `close` of either side.
        """


class Link(ABC):
    """One end of an ordered, bidirectional connection.

    A link guarantees:

    * Messages arrive whole, in order and exactly once, with the frames they were written with: any number of frames
      from one up, any size including 0. What is read is bytes: the type of a buffer may differ.
    * `write` may be called from any thread, also from within `received`. It blocks while the peer is slow, and
      raises `TransportError` once the link is gone. No frame is kept after it returns: the caller may reuse its
      memory at once.
    * `close` is idempotent, may be called from any thread, and delivers what was written before it.
    * The loss of a link is reported once, to the `Receiver`, with its cause.

    Attributes:
        address: Where the peer is, for logs and errors.
        identity: The name in the certificate that the peer has shown, empty if it has shown none.
        token: What the peer has shown to be let in, at the end of the listener. Never to be logged.
    """

    address: str = ""
    identity: str = ""
    token: str = ""

    @property
    def heard(self) -> float:
        """When something last came from the peer, also an answer to a ping, as `time.monotonic` tells it; 0 if that is not known."""
        return 0.0

    @abstractmethod
    def write(self, frames: Sequence[Frame]) -> None:
        """Send one message.

        Raises:
            TransportError: The link is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """End the link. The second call does nothing."""


class Listener(ABC):
    """A place where links arrive."""

    url: str
    """Where a peer dials to arrive here."""

    @abstractmethod
    def close(self) -> None:
        """Accept no further link. Links that exist stay. The second call does nothing."""


Accept: TypeAlias = Callable[[Link], Receiver]
"""Called with this end of each new link before its first message; returns who receives."""


class Transport(ABC):
    """Makes links for the URLs of its schemes.

    Attributes:
        schemes: The URL schemes that it serves, like `("virtual",)`.
        inline: Whether `write` itself calls the receiver, on the same thread. Then no call waits for anybody, and a link is
            lost only when one side closes it. Elsewhere a session survives its link.
        within_process: Whether its links stay within one process, so that no worker in another one can be reached.
    """

    schemes: ClassVar[tuple[str, ...]]
    inline: ClassVar[bool] = False
    within_process: ClassVar[bool] = False

    @abstractmethod
    def local_url(self, name: str) -> str:
        """Return a URL on this machine to listen at, where nobody listens yet.

        A port of 0 may be in it: `Listener.url` says which it became. Nothing is reserved.

        Args:
            name: Who will listen: letters, digits and `_.:#-`. It may be part of the URL, to be read by people.
        """

    def encrypts(self, url: str) -> bool:
        """Return whether links to `url` are under TLS, so that what `Credentials.tls` says applies to them.

        True unless a transport knows better: then it is given what there is, and decides itself.
        """
        return True

    @abstractmethod
    def connect(self, url: str, receiver: Receiver, credentials: Credentials = NO_CREDENTIALS) -> Link:
        """Return this end of a new link to whoever listens at `url`.

        Raises:
            NobodyListensError: Nobody listens there.
            TransportError: It cannot be reached, or it does not let us in.
        """

    @abstractmethod
    def listen(self, url: str, accept: Accept, admission: Admission = EVERYBODY) -> Listener:
        """Accept links at `url` until the listener is closed.

        Who is not admitted gets no link, and `accept` is not called for it.

        Raises:
            TransportError: The place is taken, or cannot be listened at.
        """

"""A worker as a process of its own: what `farpoint worker` runs until somebody ends it."""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import attrs
import torch

from farpoint.access import Admission, Credentials, is_local, tls_context
from farpoint.errors import InsecureListenerError, PluginError, TransportError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.plugins import plugins
from farpoint.remote import preferred_serializers
from farpoint.worker import Worker

logger = logging.getLogger("farpoint.host")


@attrs.frozen(kw_only=True)
class Hosting:
    """How a worker shall be hosted.

    Attributes:
        name: Its name.
        listen: Where it listens.
        advertise: Where others dial, if that is another URL.
        store: Name of the kind of its object store.
        serializer: Name of the serializer that it offers where it dials; empty for the default.
        tokens: Whoever shows one of them may come in. The first one is what it shows itself where it dials.
        insecure: Whether it may do without tokens, and without TLS where others can listen in.
        certificate: Files with its certificate, chain included, and its key.
        clients: File with the authorities whose clients may come in, and nobody else: mutual TLS.
        trusted: File with the authorities whose workers it trusts where it dials; `clients` if not given, else the system's.
        origins: Web pages that may open a link.
        device: Where operations run.
        limits: What it puts up with.
        reachable: Patterns of the URLs that it dials when a client introduces a worker; none for all.
        isolate: Whether the operations of each session run in a process of its own.
    """

    name: str
    listen: str
    advertise: str = ""
    store: str = "memory"
    serializer: str = ""
    tokens: tuple[str, ...] = attrs.field(default=(), repr=False)
    insecure: bool = False
    certificate: tuple[Path, Path] | None = None
    clients: Path | None = None
    trusted: Path | None = None
    origins: tuple[str, ...] = ()
    device: str = "cpu"
    limits: Limits = DEFAULT_LIMITS
    reachable: tuple[str, ...] = ()
    isolate: bool = False

    def check(self) -> None:
        """Refuse what would let strangers in, and what nobody could reach.

        Raises:
            InsecureListenerError: It would let strangers in, or speak in the clear where they can listen in.
            PluginError: The transport is unknown, or stays within one process.
            TransportError: Others are told a URL that nobody can dial.
            ValueError: Operations cannot run on that device.
        """
        check_device(self.device)
        if plugins.transport(self.listen).within_process:
            raise PluginError(
                "transport",
                self.listen,
                "its links stay within one process, so nobody could reach this worker",
                fix="listen at ws://127.0.0.1:8765, or make a farpoint.VirtualWorker where it is used",
            )
        if is_wildcard(self.listen) and not self.advertise:
            parts = urlsplit(self.listen)
            told = f"{parts.scheme}://{socket.gethostname()}:{parts.port}"
            raise TransportError(
                self.listen, "this is every address of this machine, and none to be dialled", f"say where, like --advertise {told}"
            )
        if self.clients is not None and self.certificate is None:
            raise InsecureListenerError(
                self.listen, "without a certificate of its own it cannot ask others for theirs", "give --tls-cert and --tls-key too"
            )
        if self.insecure:
            return
        if not self.tokens and self.clients is None:
            raise InsecureListenerError(self.listen, "everybody could come in", "give --token-file FILE, or --insecure if that is meant")
        if self.certificate is None and not is_local(self.listen):
            raise InsecureListenerError(
                self.listen,
                "others can reach it, and all that is said could be read and changed on the way",
                "listen at wss:// or tls:// with --tls-cert and --tls-key (`farpoint certs` makes some), "
                "or give --insecure if the network is trusted",
            )

    def admission(self) -> Admission:
        """Return whom the listener lets in.

        Raises:
            InsecureListenerError: A certificate, a key or an authority cannot be read.
        """
        tls = None
        if self.certificate is not None:
            tls = tls_context(ssl.Purpose.CLIENT_AUTH, self.clients, self.certificate)
            if self.clients is not None:
                tls.verify_mode = ssl.CERT_REQUIRED
        return Admission(tokens=self.tokens, tls=tls, origins=self.origins, limits=self.limits)

    def credentials(self) -> Credentials:
        """Return what the worker shows where it dials others: its first token, and its certificate.

        Raises:
            InsecureListenerError: A certificate, a key or an authority cannot be read.
        """
        trusted = self.trusted or self.clients
        shows = self.certificate is not None or trusted is not None
        tls = tls_context(ssl.Purpose.SERVER_AUTH, trusted, self.certificate) if shows else None
        return Credentials(self.tokens[0] if self.tokens else "", tls, self.limits, insecure=self.insecure)

    def worker(self) -> Worker:
        """Return the worker, which listens.

        Raises:
            InsecureListenerError: A certificate, a key or an authority cannot be read.
            PluginError: A transport, a serializer or a store is unknown or broken.
            TransportError: It cannot listen there.
            ValueError: The name is none.
        """
        return Worker(
            self.name,
            self.listen,
            preferred_serializers(self.serializer or None),
            self.store,
            self.limits,
            admission=self.admission(),
            credentials=self.credentials(),
            advertise=self.advertise,
            reachable=self.reachable,
            isolate=self.isolate,
        )


def is_wildcard(url: str) -> bool:
    """Return whether an address means every address of this machine."""
    try:
        return ipaddress.ip_address(urlsplit(url).hostname or "").is_unspecified
    except ValueError:
        return False


def check_device(name: str) -> None:
    """Refuse a device where operations cannot run.

    Raises:
        ValueError: There is none of that name here, or workers do not support it yet.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device of torch; it finds {', '.join(_devices())} here; write cpu") from error
    if device.type == "cpu" and not device.index:
        return
    if device.type != "meta" and str(device) not in (found := _devices()) and f"{device}:0" not in found:
        raise ValueError(f"torch finds no device {name!r} here, it finds {', '.join(found)}; write cpu")
    raise ValueError(f"workers do not support the device {name!r} yet: operations run on the CPU only; write cpu")


def _devices() -> list[str]:
    """Return the devices that torch finds on this machine."""
    found = torch.accelerator.current_accelerator()
    return ["cpu"] + ([f"{found.type}:{number}" for number in range(torch.accelerator.device_count())] if found is not None else [])


def host(hosting: Hosting, announce: Callable[[Worker], None], *, until_eof: bool = False) -> None:
    """Host a worker until SIGINT, SIGTERM or SIGHUP.

    Args:
        hosting: How.
        announce: Called when it listens.
        until_eof: Whether it ends as well when standard input does: when the process is gone that holds its other end.

    Raises:
        InsecureListenerError: It would let strangers in.
        PluginError: A transport, a serializer or a store is unknown or broken.
        TransportError: It cannot listen there.
        ValueError: The name is none, or operations cannot run on that device.
    """
    hosting.check()
    with _endings() as over:
        worker = hosting.worker()
        try:
            announce(worker)
            _wait(over, until_eof=until_eof)
            logger.info("%s ends", worker.id)
        finally:
            worker.close(farewell=True)


@contextmanager
def _endings() -> Iterator[int]:
    """Return a file descriptor that becomes readable when this process is asked to end. Asked twice, it ends at once.

    The handler writes to a pipe and does nothing else: it may run between any two lines, also of who holds a lock.
    """
    reading, writing = os.pipe()

    def end(*_: object) -> None:
        os.write(writing, b".")
        for number in before:
            signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` is respected
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, end)
    try:
        yield reading
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def _wait(over: int, *, until_eof: bool) -> None:
    """Wait until one may read from a descriptor, or, if that is asked for, standard input ends."""
    inputs = [over]
    if until_eof:
        inputs.append(sys.stdin.fileno())
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if over in ready or not os.read(ready[0], 4096):
            return

"""Workers on this machine, each a process of its own: for tests, for notebooks, and for what needs more than one interpreter."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import attrs

from farpoint.certificates import make_certificates
from farpoint.connection import connect
from farpoint.errors import InvalidNameError, PluginError, WorkerLostError
from farpoint.limits import DEFAULT_LIMITS, Limits
from farpoint.names import check_worker_id
from farpoint.plugins import plugins
from farpoint.remote import RemoteWorker
from farpoint.tokens import new_token

START_SECONDS: Final = 120.0
END_SECONDS: Final = 10.0
_SHOWN: Final = 10
_ENCRYPTED: Final = ("tls", "wss")

_open: dict[int, LocalCluster] = {}
_inherited: list[LocalCluster] = []


class LocalCluster(Mapping[str, RemoteWorker]):
    """Workers by name, each a process of its own on this machine: `cluster["bob"]`, or `cluster.bob`.

    It is a context manager that ends them. They also end with this process, however that ends.

    Args:
        names: What the workers are called.
        transport: Name of a transport, or a URL scheme.
        serializer: Name of the serializer; `FARPOINT_SERIALIZER` or msgpack if not given.
        store: Name of the kind of their object stores.
        limits: What they and this process put up with.

    Attributes:
        processes: The process of each worker, to be stopped and killed by tests.
        urls: Where each worker listens.
        token: What opens their doors, also to each other.

    Raises:
        WorkerLostError: A process ended before its worker listened.
        PluginError: The transport is unknown, or its links stay within one process.
    """

    def __init__(
        self,
        *names: str,
        transport: str = "tcp",
        serializer: str | None = None,
        store: str = "memory",
        limits: Limits | None = None,
    ) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.urls: dict[str, str] = {}
        self.token = new_token()
        self._limits = limits or DEFAULT_LIMITS
        self._serializer = serializer
        self._handles: dict[str, RemoteWorker] = {}
        self._transport = transport
        self._owner = os.getpid()
        self._closed = False
        if plugins.transport(plugins.local_url(transport, "me")).within_process:
            raise PluginError(
                "transport", transport, "its links stay within one process", fix="farpoint.VirtualWorker makes workers in this process"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="farpoint-")
        secret = Path(self._folder.name, "token")
        secret.touch(0o600)
        secret.write_text(self.token)
        defaults = attrs.asdict(DEFAULT_LIMITS)
        changed = {name: value for name, value in attrs.asdict(self._limits).items() if value != defaults[name]}
        self._options = ["--store", store, "--token-file", str(secret), "--until-eof", "--announce-json"]
        self._options += [word for name, value in changed.items() for word in ("--limit", f"{name}={value}")]
        if serializer is not None:
            self._options += ["--serializer", serializer]
        self._authority: Path | None = None
        _open[id(self)] = self
        try:
            if urlsplit(plugins.local_url(transport, "me")).scheme in _ENCRYPTED:
                made = make_certificates(Path(self._folder.name))
                self._authority = made.authority
                self._options += ["--tls-cert", str(made.server), "--tls-key", str(made.server_key), "--ca", str(made.authority)]
            self.add(*names)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> RemoteWorker:
        handle = self._handles[name]
        if handle.peer.channel.lost is not None and not self._closed:
            handle = self._handles[name] = self._connect(name)
        return handle

    def __getattr__(self, name: str) -> RemoteWorker:
        if name in self.__dict__.get("_handles", ()):
            return self[name]
        raise AttributeError(f"the cluster has no worker {name!r}: it has {', '.join(self.__dict__.get('_handles', ())) or 'none'}")

    def __contains__(self, name: object) -> bool:
        return name in self._handles  # without connecting

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def __repr__(self) -> str:
        return f"<LocalCluster {' '.join(f'{name} at {url}' for name, url in self.urls.items())}{' (closed)' if self._closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, *names: str) -> None:
        """Start more workers, and connect to them.

        Raises:
            InvalidNameError: A name cannot be a worker's, or there is a worker that has it.
            WorkerLostError: A process ended before its worker listened.
        """
        for name in names:
            if check_worker_id(name) in self.processes:
                raise InvalidNameError("worker id", name, "another one: the cluster has a worker that is called so")
        for name in dict.fromkeys(names):
            self._start(name, plugins.local_url(self._transport, name))
        for name in dict.fromkeys(names):
            self._await(name)
            self._handles[name] = self._connect(name)

    def output(self, name: str) -> str:
        """Return what a worker has written to its standard error: its log, and why it has ended."""
        return Path(self._folder.name, f"{name}.log").read_text(errors="replace")

    def restart(self, name: str) -> None:
        """End a worker without a goodbye, and begin a new life of it at the same URL.

        Its objects are lost. Sessions with it, also that of the handle in use, learn of it like that of any worker that was killed;
        `cluster[name]` connects anew once its session is over.

        Raises:
            WorkerLostError: The new process ended before it listened.
        """
        self._end(self.processes[name], killed=True)
        self._start(name, self.urls[name])
        self._await(name)

    def close(self) -> None:
        """End the workers. The second call does nothing."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        del _open[id(self)]
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)  # one that was stopped could not end
        for name, handle in self._handles.items():
            threading.Thread(target=_mourn, args=(self.processes[name], handle), daemon=True).start()
        try:
            for handle in self._handles.values():
                handle.close()
        finally:
            for process in self.processes.values():
                if process.stdin is not None:
                    process.stdin.close()  # all at once, and then wait for each
            for process in self.processes.values():
                self._end(process)
            self._folder.cleanup()

    def _start(self, name: str, url: str) -> None:
        """Start a process. It is no part of the foreground: Ctrl-C is for this one, which then ends it."""
        words = [sys.executable, "-m", "farpoint_cli", "worker", name, "--listen", url, *self._options]
        with Path(self._folder.name, f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603  # this interpreter
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0
            )

    def _await(self, name: str) -> None:
        """Wait until a worker says where it listens."""
        process = self.processes[name]
        assert process.stdout is not None
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            code = process.wait()
            said = " | ".join(self.output(name).splitlines()[-_SHOWN:])
            raise WorkerLostError(name, f"its process ended with code {code} before it listened, and said: {said or 'nothing'}")
        self.urls[name] = json.loads(line)["url"]

    def _connect(self, name: str) -> RemoteWorker:
        return connect(self.urls[name], token=self.token, ca=self._authority, serializer=self._serializer, limits=self._limits)

    @staticmethod
    def _end(process: subprocess.Popen[bytes], *, killed: bool = False) -> None:
        if killed:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def local_cluster(
    *names: str,
    transport: str = "tcp",
    serializer: str | None = None,
    store: str = "memory",
    limits: Limits | None = None,
) -> LocalCluster:
    """Start workers on this machine, each a process of its own, and connect to them::

        with farpoint.local_cluster("bob", "alice") as cluster:
            x = torch.ones(3).send(cluster.bob).move(cluster.alice)

    Arguments and errors are those of `LocalCluster`.
    """
    return LocalCluster(*names, transport=transport, serializer=serializer, store=store, limits=limits)


def _mourn(process: subprocess.Popen[bytes], handle: RemoteWorker) -> None:
    """End the session with a worker when its process ends: nobody need wait for an answer any more."""
    process.wait()
    handle.peer.end(ConnectionError("its process has ended"))


@atexit.register
def _leave() -> None:
    for cluster in list(_open.values()):
        cluster.close()


def _leave_parent() -> None:
    """Forget the clusters in a forked child: they are the parent's. They are kept, so that no finalizer runs for them here."""
    _inherited.extend(_open.values())
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)

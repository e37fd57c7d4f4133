"""The worker's handles of the processes apart from it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import torch

import farpoint
from farpoint.isolation.pipe import REPLY, REQUEST, Pipe

_START_SECONDS: Final = 120.0
"""Time for the zygote to import torch, on a machine that has other things to do."""
_STOP_SECONDS: Final = 5.0


class Process:
    """One executor.

    Args:
        serial: What the zygote knows it by.
        pid: Its process id.
        pipe: The way to it.

    Attributes:
        busy: Held while the pipe is used.
    """

    def __init__(self, serial: int, pid: int, pipe: Pipe) -> None:
        self.pid = pid
        self.pipe = pipe
        self.busy = threading.RLock()
        self._serial = serial
        self._ending = threading.Lock()
        self._how = ""

    def end(self) -> str:
        """End it, whatever it is doing, and return how it has ended. The second call only returns that."""
        with self._ending:
            if not self._how:
                self._how = _spell(zygote.end(self._serial))
                self.pipe.shut()
                with self.busy:
                    self.pipe.close()
        return self._how


class Zygote:
    """The process that forks executors: one for all isolated workers of this process, started by the first and ended by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ready = False
        self._serials = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def enter(self) -> None:
        """Begin to use it. It starts at once, so that the first operation finds it ready."""
        with self._lock:
            self._users += 1
            if self._process is None:
                self._start()

    def leave(self) -> None:
        """Use it no more."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stop()

    def fork(self, allowed: int) -> Process:
        """Return a new executor.

        Args:
            allowed: Bytes of memory that it may take.

        Raises:
            OSError: There is none to be had.
        """
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serial = next(self._serials)
        with there:
            try:
                with self._lock:
                    if self._process is None or self._process.poll() is not None:
                        self._stop()
                        self._start()
                    pid = self._ask(REQUEST.pack(b"fork", serial, allowed, torch.get_num_threads()), [there.fileno()])
                if pid < 0:
                    raise OSError("no process could be forked")
            except BaseException:
                here.close()
                raise
        return Process(serial, pid, Pipe(here))

    def end(self, serial: int) -> int:
        """End an executor and return its wait status, -1 where that is not known."""
        with self._lock:
            try:
                return self._ask(REQUEST.pack(b"end ", serial, 0, 0), [])
            except OSError:
                return -1  # it went with the zygote that had forked it

    def disown(self) -> None:
        """Forget what belongs to the process that this one was forked from."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.returncode = 0  # or its finalizer would wait for a process that is no child of this one
        self.__init__()  # type: ignore[misc]  # as new; the lock may be held by a thread that does not exist here

    def _ask(self, request: bytes, descriptors: list[int]) -> int:
        if self._control is None:
            raise OSError("the zygote was ended")
        socket.send_fds(self._control, [request], descriptors)
        reply = self._control.recv(REPLY.size)
        if len(reply) != REPLY.size:
            raise OSError("the zygote has died")
        self._ready = True
        return int(REPLY.unpack(reply)[0])

    def _start(self) -> None:
        self._control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_START_SECONDS)
        paths = [str(Path(farpoint.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        number = there.fileno()
        with there:
            self._process = subprocess.Popen(  # noqa: S603  # this interpreter, with arguments of ours
                [sys.executable, "-P", "-m", "farpoint.isolation.zygote", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
                pass_fds=[number],
                start_new_session=True,  # an interrupt from the terminal is for the worker
            )

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_STOP_SECONDS if self._ready else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its executors, if it has any, die with it
                self._process.wait()
        self._process = self._control = None
        self._ready = False


zygote: Final = Zygote()
os.register_at_fork(after_in_child=zygote.disown)


def _spell(status: int) -> str:
    if status < 0:
        return "the process that it was forked from has died"
    if os.WIFSIGNALED(status):
        return f"it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it ended itself, with status {os.WEXITSTATUS(status)}"

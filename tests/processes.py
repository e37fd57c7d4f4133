"""Workers as processes of their own, started by the command as a user does."""

from __future__ import annotations

import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import farpoint

SECONDS = 60.0
COMMAND = [sys.executable, "-m", "farpoint_cli", "worker"]


class Process:
    """`farpoint worker` as it runs, once it listens, with what it has printed.

    Args:
        words: Arguments of the command.
        environment: Its environment variables, those of this process if not given.
    """

    def __init__(self, *words: str, environment: dict[str, str] | None = None) -> None:
        self.popen = subprocess.Popen(
            [*COMMAND, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.popen.stdout is not None
        self.said = ""
        while "farpoint.connect(" not in self.said:
            line = self.popen.stdout.readline()
            assert line, (self.popen.wait(SECONDS), self.said, self.log)
            self.said += line

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._news:
                self.log.append(line.rstrip("\n"))
                self._news.notify_all()

    def logged(self, pattern: str) -> str:
        """Return the first line of the log that matches, as soon as it is there."""

        def found() -> str | None:
            return next((line for line in self.log if re.search(pattern, line)), None)

        with self._news:
            line = self._news.wait_for(found, SECONDS)
        assert line, (pattern, self.log)
        return line

    def url(self) -> str:
        found = re.search(r'farpoint\.connect\("([^"]+)"', self.said)
        assert found is not None, self.said
        return found[1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, and return its exit code."""
        self.popen.send_signal(number)
        code = self.popen.wait(SECONDS)
        self._reader.join(SECONDS)
        for pipe in (self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            pipe.close()
        return code


def running() -> Iterator[Callable[..., Process]]:
    """Yield a function that starts `farpoint worker`, and end what it has started: the body of a fixture."""
    started: list[Process] = []

    def start(*words: str, environment: dict[str, str] | None = None) -> Process:
        started.append(Process(*words, environment=environment))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.end(signal.SIGKILL)


def paste(process: Process) -> Any:
    """Do what the command says: paste its line."""
    [line] = re.findall(r"^    (farpoint\.connect\(.*\))$", process.said, re.MULTILINE)
    return eval(line, {"farpoint": farpoint, "pathlib": pathlib})  # noqa: S307  # what it prints for that

"""Looks after all links of this process: silence, what came while a receiver works, and forks."""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol


class Forkable(Protocol):
    """Has a descriptor that a forked child must not use."""

    def forked(self) -> None:
        """Let go of it, in the child."""


class Watched(Forkable, Protocol):
    """What is looked after."""

    def look(self, now: float) -> float:
        """Do what is due without waiting, and return after how many seconds to look again."""

    def give_up(self, cause: Exception) -> None:
        """End it."""


class Watch:
    """Looks at each link often enough, on one thread that lives as long as there are links."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._links: set[Watched] = set()
        self._listeners: set[Forkable] = set()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._running = False

    def add(self, link: Watched) -> None:
        """Look after a link."""
        with self._lock:
            self._links.add(link)
            running, self._running = self._running, True
        self._news.set()
        if not running:
            threading.Thread(target=self._run, name="farpoint watch", daemon=True).start()

    def remove(self, link: Watched) -> None:
        """Forget a link."""
        with self._lock:
            self._links.discard(link)
            if not self._links:
                self._news.set()

    def note(self, listener: Forkable) -> None:
        """Remember a listener, for forks."""
        with self._lock:
            self._listeners.add(listener)

    def forget(self, listener: Forkable) -> None:
        """Forget a listener."""
        with self._lock:
            self._listeners.discard(listener)

    def forked(self) -> None:
        """Let go of everything in a forked child: it has the descriptors, and none of the threads."""
        inherited: list[Forkable] = [*self._links, *self._listeners]
        self._begin()  # the lock may have been held when this process was forked
        for one in inherited:
            one.forked()

    def _run(self) -> None:
        while True:
            self._news.clear()
            with self._lock:
                links = list(self._links)
                if not links:
                    self._running = False
                    return
            now, pause = time.monotonic(), 1.0
            for link in links:
                try:
                    pause = min(pause, link.look(now))
                except Exception as error:  # costs this link, and no other
                    link.give_up(error)
            del links, link
            self._news.wait(pause)


watch = Watch()
"""The one of this process."""

os.register_at_fork(after_in_child=watch.forked)

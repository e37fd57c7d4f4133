"""Whom a listener lets in: how many at a time, and how often somebody may guess a token."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from farpoint.access import Admission

MINUTE = 60.0

REMEMBERED = 4096
"""Addresses whose wrong tokens are remembered. Of more the oldest are forgotten."""


class Door:
    """Counts who is inside and who has failed to come in, for each address.

    Args:
        admission: Whom to let in.
        clock: What time it is, in seconds.
    """

    def __init__(self, admission: Admission, clock: Callable[[], float] = time.monotonic) -> None:
        self._admission = admission
        self._clock = clock
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def enter(self, address: str) -> bool:
        """Return whether there is room for one more from there, and count it if there is."""
        limits = self._admission.limits
        with self._lock:
            if self._inside.total() >= limits.links or self._inside[address] >= limits.links_per_address:
                return False
            self._inside[address] += 1
            return True

    def leave(self, address: str) -> None:
        """Count one from there out."""
        with self._lock:
            self._inside[address] -= 1
            if not self._inside[address]:
                del self._inside[address]

    def admits(self, address: str, token: str) -> bool:
        """Return whether a token opens the door to somebody from there.

        After too many wrong ones within a minute no token does, until a minute has passed since the last of them.
        """
        with self._lock:
            now = self._clock()
            failures = self._failures.get(address)
            if failures is not None and len(failures) == failures.maxlen:
                first, last = failures[0], failures[-1]
                if last - first < MINUTE and now - last < MINUTE:
                    return False
            if self._admission.admits(token):
                return True
            if failures is None:
                failures = self._failures[address] = deque(maxlen=max(1, self._admission.limits.failed_logins))
            failures.append(now)
            self._failures.move_to_end(address)
            if len(self._failures) > REMEMBERED:
                self._failures.popitem(last=False)
            return False


def party(host: str) -> str:
    """Return what counts as one address: an IPv4 address, or the network of 64 bits that one owner of IPv6 has."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return "loopback" if address.is_loopback else str(address)

"""Admission control: connection limits, enforced with accept credits.

Accepting costs a credit of the account that the server's listeners share, so a server that gives
out no credits accepts nothing, and the kernel's backlog holds what comes. It gives out what is free
below ``max_connections``, and never more than a few for each listener at a time: what has been
accepted and has no task yet must stay little.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import _epoll

if TYPE_CHECKING:
    from .._epoll import Account

#: Connections that may be accepted and not yet have begun, for each listener.
_IN_FLIGHT = 64

_MAPPED = "::ffff:"  # an IPv4 address, as a socket of IPv6 sees it


class Admission:
    """See the module. ``None``: no limit."""

    def __init__(self, most: int | None, most_per_peer: int | None) -> None:
        self.account: Account = _epoll.open_account()
        self._most = most
        self._most_per_peer = most_per_peer
        self._ahead = 0
        self._granted = 0  # credits that are out, and what was accepted for them and not taken yet
        self._peers: Counter[str] = Counter()

    def open(self, listeners: int) -> None:
        """Accepting begins."""
        self._ahead = listeners * _IN_FLIGHT
        self.grant(0)

    def taken(self, connections: int, active: int) -> None:
        """So many have been taken over; ``active`` there are now."""
        self._granted -= connections
        self.grant(active)

    def grant(self, active: int) -> None:
        """Gives out the credits that are free while so many connections are active."""
        free = self._ahead - self._granted
        if self._most is not None:
            free = min(free, self._most - active - self._granted)
        if free > 0:
            self._granted += free
            _epoll.add_credits(self.account, free)

    def enter(self, peer: bytes) -> bool:
        """Whether a connection from there may begin; it counts then until :meth:`leave`."""
        if self._most_per_peer is None:
            return True
        host = _host(peer)
        if host and self._peers[host] >= self._most_per_peer:
            return False
        self._peers[host] += 1
        return True

    def leave(self, peer: bytes | None) -> None:
        """One that had entered has ended."""
        if self._most_per_peer is not None and peer is not None:
            host = _host(peer)
            self._peers[host] -= 1
            if not self._peers[host]:
                del self._peers[host]


def _host(peer: bytes) -> str:
    """The remote IP address; ``""`` on UNIX sockets, which have none."""
    address = _epoll.peer_address(peer)
    return address[0].removeprefix(_MAPPED) if isinstance(address, tuple) else ""

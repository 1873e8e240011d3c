"""Admission control: connection limits, enforced with accept credits.

Accepting a connection costs a credit from the account that the server's listeners share. A server
that grants no credits accepts nothing, and the kernel's backlog holds incoming connections. Credits
are granted for the room left below ``max_connections``, but never more than a few per listener, so
that few accepted connections wait for a task.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import _epoll

if TYPE_CHECKING:
    from .._epoll import Account

#: Connections per listener that may be accepted but not yet started. Those with TLS take several
#: times as long to start, and all of a batch start in one round of the event loop.
_IN_FLIGHT, _IN_FLIGHT_TLS = 64, 16

_MAPPED = "::ffff:"  # prefix of an IPv4 address on an IPv6 socket


class Admission:
    """Admission control of one server; see the module. A limit of ``None`` means no limit."""

    def __init__(self, most: int | None, most_per_peer: int | None, *, tls: bool) -> None:
        self.account: Account = _epoll.open_account()
        self._most = most
        self._most_per_peer = most_per_peer
        self._per_listener = _IN_FLIGHT_TLS if tls else _IN_FLIGHT
        self._ahead = 0
        self._granted = 0  # unspent credits, plus connections accepted but not yet taken over
        self._peers: Counter[str] = Counter()

    def open(self, listeners: int) -> None:
        """Starts accepting on that many listeners."""
        self._ahead = listeners * self._per_listener
        self.grant(0)

    def taken(self, connections: int, active: int) -> None:
        """Records that ``connections`` were taken over, which makes ``active`` in all."""
        self._granted -= connections
        self.grant(active)

    def grant(self, active: int) -> None:
        """Grants the credits that ``active`` connections leave free."""
        free = self._ahead - self._granted
        if self._most is not None:
            free = min(free, self._most - active - self._granted)
        if free > 0:
            self._granted += free
            _epoll.add_credits(self.account, free)

    def enter(self, peer: bytes) -> bool:
        """Whether a connection from this peer may start; if so, it counts until :meth:`leave`."""
        if self._most_per_peer is None:
            return True
        host = _host(peer)
        if host and self._peers[host] >= self._most_per_peer:
            return False
        self._peers[host] += 1
        return True

    def leave(self, peer: bytes | None) -> None:
        """Records that a connection which had entered has ended."""
        if self._most_per_peer is not None and peer is not None:
            host = _host(peer)
            self._peers[host] -= 1
            if not self._peers[host]:
                del self._peers[host]


def _host(peer: bytes) -> str:
    """The remote IP address; ``""`` for UNIX sockets, which have none."""
    address = _epoll.peer_address(peer)
    return address[0].removeprefix(_MAPPED) if isinstance(address, tuple) else ""

"""Typed attributes of connections beyond AnyIO's ``SocketAttribute``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import anyio

if TYPE_CHECKING:
    from .._epoll import ConnectionStatistics

__all__ = ("AnypollAttribute", "PeerCredentials")


#: The key, beside the attributes below, for a connection's number: found through what wraps it.
ORIGIN_KEY = object()


class PeerCredentials(NamedTuple):
    """Who was at the other end of a UNIX socket when it was connected (``SO_PEERCRED``,
    unix(7)); of a socket pair: who made it.
    """

    pid: int
    """0 if the process is in a PID namespace that cannot be seen from here"""
    uid: int
    gid: int


class AnypollAttribute(anyio.TypedAttributeSet):
    """What a :class:`Connection` tells beyond AnyIO's ``SocketAttribute``, also through streams
    that wrap it: ``tls_stream.extra(AnypollAttribute.statistics)``.
    """

    poller: int = anyio.typed_attribute()
    """the poller that serves the connection, as an index into ``anypoll.statistics().pollers``;
    not there once the connection is closed
    """
    statistics: ConnectionStatistics = anyio.typed_attribute()
    """the counters of now, as :meth:`Connection.statistics` gives them; also after the close"""
    peer_credentials: PeerCredentials = anyio.typed_attribute()
    """pid, uid and gid of the peer; of open UNIX connections only"""

"""A native networking engine for AnyIO and Trio.

``async with anypoll.serve(handler, port=8000): ...`` serves connections whose sockets are read and
written by C threads that never hold the GIL. A connection is an AnyIO ``SocketStream`` with a
nocopy reader and writer.
"""

from __future__ import annotations

from dataclasses import dataclass as _dataclass

from ._buffers.errors import (
    ConnectTimeout as ConnectTimeout,
    IdleTimeout as IdleTimeout,
    MessageTooLarge as MessageTooLarge,
    ReadTimeout as ReadTimeout,
    WriteTimeout as WriteTimeout,
)
from ._connection.sockets import (
    AnypollAttribute as AnypollAttribute,
    Keepalive as Keepalive,
    PeerCredentials as PeerCredentials,
)
from ._epoll import (
    ConnectionStatistics as ConnectionStatistics,
    MemoryStatistics as MemoryStatistics,
    PollerStatistics as PollerStatistics,
)
from ._loop import runtime
from ._loop.pollers import LoadBalance as LoadBalance
from ._network.connectables import (
    TCPConnectable as TCPConnectable,
    UNIXConnectable as UNIXConnectable,
)
from ._network.dialer import connect_tcp as connect_tcp, connect_unix as connect_unix
from ._network.listener import (
    create_tcp_listener as create_tcp_listener,
    create_unix_listener as create_unix_listener,
)
from ._server.serve import serve as serve, serve_forever as serve_forever
from ._server.server import Server as Server, ServerStatistics as ServerStatistics
from .streams import (
    Connection as Connection,
    SocketListener as SocketListener,
    TLSConnection as TLSConnection,
    UNIXConnection as UNIXConnection,
    socketpair as socketpair,
)


@_dataclass(frozen=True, slots=True)
class Statistics:
    """What :func:`statistics` gives."""

    pollers: tuple[PollerStatistics, ...]
    """one entry per poller; empty before first use. Those that get connections come first; behind
    them are those that end with their last connection.
    """
    memory: MemoryStatistics
    """received bytes: those of all pollers and event loops, and what only views keep"""


def statistics() -> Statistics:
    """Counters of the process's pollers, and its blocks of received bytes. Any thread."""
    return Statistics(pollers=runtime.poller_statistics(), memory=runtime.memory_statistics())


def configure(
    *,
    pollers: int | None = None,
    load_balance: LoadBalance | None = None,
    block_size: int | None = None,
    checkpoint_budget: int | None = None,
) -> None:
    """Sets options of the process; ``None`` leaves one as it is.

    Before first use this only records. Afterwards the number of pollers grows at once; when it
    shrinks, the pollers beyond it get no new connections, serve those they have (and the listeners,
    whose connections go to others), and end with the last of them.

    :param pollers: threads that read and write, 1 at first
    :param load_balance: which poller gets a new connection: ``"round_robin"``, ``"random"``,
        ``"least_connections"``, or a callable that is given the pollers' statistics and returns an
        index. It is called in the thread that opens the connection. One that fails, or returns a
        wrong index, is logged (logger ``anypoll.pollers``), and round robin chooses.
    :param block_size: bytes of the first block that a connection's input is put into, 2048 at
        first, and the least of later ones, which grow with what arrives. From 2048 to 1 MiB;
        rounded up to a power of two, and no more than the connection's ``read_high_water``. Holds
        for connections made from then on
    :param checkpoint_budget: how many reads and flushes in a row may do without a checkpoint; holds
        for connections made from then on
    :raises ValueError, TypeError: for nonsense; nothing is changed then
    :raises OSError: if there are no resources for more pollers; nothing is changed then
    """
    runtime.configure(
        pollers=pollers,
        load_balance=load_balance,
        block_size=block_size,
        checkpoint_budget=checkpoint_budget,
    )


__all__ = (
    "AnypollAttribute",
    "ConnectTimeout",
    "Connection",
    "ConnectionStatistics",
    "IdleTimeout",
    "Keepalive",
    "LoadBalance",
    "MemoryStatistics",
    "MessageTooLarge",
    "PeerCredentials",
    "PollerStatistics",
    "ReadTimeout",
    "Server",
    "ServerStatistics",
    "SocketListener",
    "Statistics",
    "TCPConnectable",
    "TLSConnection",
    "UNIXConnectable",
    "UNIXConnection",
    "WriteTimeout",
    "configure",
    "connect_tcp",
    "connect_unix",
    "create_tcp_listener",
    "create_unix_listener",
    "serve",
    "serve_forever",
    "socketpair",
    "statistics",
)

# Tracebacks and reprs name the public home of a thing, not the file it lies in.
for _name in __all__:
    _thing = globals()[_name]
    if getattr(_thing, "__module__", "").startswith("anypoll._"):
        _thing.__module__ = "anypoll"
del _name, _thing

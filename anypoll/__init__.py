"""A native networking engine for AnyIO and Trio.

``async with anypoll.serve(handler, port=8000): ...`` serves connections whose sockets are read and
written by C threads that never hold the GIL. A connection is an AnyIO ``SocketStream`` with a
nocopy reader and writer.
"""

from __future__ import annotations

from dataclasses import dataclass as _dataclass
from typing import Literal as _Literal

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
from ._tls.session import TLSHandshake as TLSHandshake
from .streams import (
    Connection as Connection,
    SocketListener as SocketListener,
    TLSConnection as TLSConnection,
    UNIXConnection as UNIXConnection,
    socketpair as socketpair,
)


@_dataclass(frozen=True, slots=True)
class Statistics:
    """The process-wide counters returned by :func:`statistics`."""

    pollers: tuple[PollerStatistics, ...]
    """one entry per poller; empty before first use. Those that get connections come first, followed
    by those that end with their last connection.
    """
    memory: MemoryStatistics
    """blocks of received bytes: those of all pollers and event loops, and those only views keep"""


def statistics() -> Statistics:
    """Counters of the process's pollers, and of its blocks of received bytes. Any thread."""
    return Statistics(pollers=runtime.poller_statistics(), memory=runtime.memory_statistics())


def configure(
    *,
    pollers: int | None = None,
    load_balance: LoadBalance | None = None,
    block_size: int | None = None,
    checkpoint_budget: int | None = None,
    direct_resume: bool | None = None,
    driver: _Literal["auto", "thread"] | None = None,
    spin: int | None = None,
) -> None:
    """Sets process-wide options; ``None`` leaves an option unchanged.

    Before first use this only records them. Afterwards the number of pollers grows at once; when it
    shrinks, the surplus pollers get no new connections, keep serving those they have (and their
    listeners, whose connections go to others), and end with the last of them.

    :param pollers: threads that read and write, initially 1
    :param load_balance: which poller gets a new connection: ``"round_robin"``, ``"random"``,
        ``"least_connections"``, or a callable that takes the pollers' statistics and returns an
        index. It is called in the thread that opens the connection. If it raises, or returns a
        wrong index, that is logged (logger ``anypoll.pollers``), and round robin chooses.
    :param block_size: bytes of the first block for a connection's input, initially 2048, and the
        minimum for later ones, which grow with the input. From 2048 to 1 MiB; rounded up to a power
        of two, and limited by the connection's ``read_high_water``. Applies to connections created
        from then on
    :param checkpoint_budget: how many reads and flushes in a row may go without a checkpoint;
        applies to connections created from then on
    :param direct_resume: whether a server's handler that waits for its connection is resumed
        directly when its input has come, initially True, or by the event loop's scheduler like any
        task. The same for calls of request mode. Applies to tasks that start from then on: a
        handler's, or one of those that make the calls, each of which makes many
    :param driver: who does a poller's work. ``"auto"``, initially: the event loop itself, as long
        as it is the only one that uses anypoll and there is one poller; the poller's thread then
        only looks after timeouts and unsent output while Python is busy. That saves the switch of
        threads for each request. ``"thread"``: always the threads, which read ahead while Python
        is busy, and can use other cores. Applies to loops that drive already at once, to others
        with the next connection or listener
    :param spin: for how many microseconds an event loop that drives its poller waits for more input
        without sleeping, from 0 (not at all) to 1000; initially 20. It does so only as long as that
        finds something most of the time, if all handlers that it woke wait for their connections
        again, and if it can see no other task that wants to run. Others that wait for the event
        loop, such as its timers, may have to wait for up to 9 times as long. It makes clients that
        answer at once faster, and may occupy the core that one of them uses
    :raises ValueError, TypeError: for invalid values; nothing is changed then
    :raises OSError: if resources for more pollers are exhausted; nothing is changed then
    """
    runtime.configure(
        pollers=pollers,
        load_balance=load_balance,
        block_size=block_size,
        checkpoint_budget=checkpoint_budget,
        direct_resume=direct_resume,
        driver=driver,
        spin=spin,
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
    "TLSHandshake",
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

# Tracebacks and reprs should name an object's public home, not the file that defines it.
for _name in __all__:
    _thing = globals()[_name]
    if getattr(_thing, "__module__", "").startswith("anypoll._"):
        _thing.__module__ = "anypoll"
del _name, _thing

"""The server behind ``serve()``: a task per connection, and an end that loses nothing.

A server owns one task group. In it runs one task per listener, which takes batches of accepted
descriptors and starts a handler task for each, and the handler tasks. Nothing that happens in a
handler reaches the task group: its exceptions end at :meth:`Server._run`.

The end comes in one of two ways. Gracefully: listeners close, each idle connection's wait sees the
end of the stream, busy ones go on until they wait with nothing buffered, and the block ends with
the last of them, or with ``shutdown_timeout``. By force (an exception in the block, a cancellation,
the timeout): the handlers are cancelled, and close their connections.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import anyio
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
)
from anyio.abc import TaskStatus

from . import _epoll, _sockets
from ._config import Keepalive, Limits, seconds
from ._endpoint import ORIGIN
from ._errors import IdleTimeout, MessageTooLarge, ReadTimeout, WriteTimeout
from ._listener import SocketListener, nodelay_fd, open_listeners
from .streams import Connection, new_connection

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ("Server", "ServerStatistics")

logger = logging.getLogger("anypoll.server")

Handler = Callable[[Connection], Awaitable[Any]]

#: Connections that may be accepted and not yet have a task.
_IN_FLIGHT = 64

#: What a connection may end with without anybody having to know; and the reason that is counted.
_REASONS: dict[type[BaseException], str] = {
    EndOfStream: "eof",
    IncompleteRead: "incomplete",
    BrokenResourceError: "broken",
    ClosedResourceError: "closed",
    ReadTimeout: "read_timeout",
    WriteTimeout: "write_timeout",
    IdleTimeout: "idle_timeout",
    DelimiterNotFound: "delimiter_not_found",
    MessageTooLarge: "message_too_large",
}


#: The peer has said all it had to say, and may still wait for the answers: as good as a return.
_ENDED_BY_PEER = frozenset({"eof", "incomplete"})


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counters of a server since its start."""

    accepted: int
    active: int
    """connections that have not ended yet"""
    rejected: int
    handler_errors: int
    closed: Mapping[str, int]
    """how often connections ended for which reason"""
    bytes_received: int
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class Options:
    limits: Limits
    keepalive: bool | Keepalive
    nodelay: bool
    shutdown_timeout: float


class Server:
    """What ``async with anypoll.serve(...)`` gives."""

    def __init__(self, handler: Handler, options: Options) -> None:
        if not isinstance(options, Options):
            raise TypeError(f"a server is made by serve(), not of {type(options).__name__}")
        self._handler = handler
        self._options = options
        self._account = _epoll.open_account()
        self._listeners: list[SocketListener] = []
        self._addresses: tuple[_sockets.Address, ...] = ()
        self._connections: set[Connection] = set()
        self._shutting_down = anyio.Event()
        self._ended = anyio.Event()
        self._idle = anyio.Event()  # no connection is left, and none will come
        self._accepting = 0
        self._deadline = float("inf")
        self._grace: anyio.CancelScope | None = None
        self._accepted = self._handler_errors = self._received = self._sent = 0
        self._closed: Counter[str] = Counter()

    # --- what a user asks ------------------------------------------------------------------------

    @property
    def listeners(self) -> Sequence[SocketListener]:
        """The listeners, in the order of their addresses."""
        return tuple(self._listeners)

    @property
    def addresses(self) -> tuple[_sockets.Address, ...]:
        """Of all listeners, as AnyIO's ``local_address`` gives them; also after the end."""
        return self._addresses

    @property
    def port(self) -> int:
        """The TCP port.

        :raises AttributeError: if the server listens on UNIX sockets only
        """
        for address in self._addresses:
            if isinstance(address, tuple):
                return address[1]
        raise AttributeError("this server has no TCP port")

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Those whose handlers and close callbacks have not ended yet: a snapshot."""
        return tuple(self._connections)

    @property
    def shutting_down(self) -> bool:
        """Whether the server is ending, or has ended."""
        return self._shutting_down.is_set()

    async def wait_shutting_down(self) -> None:
        """Until the server begins to end."""
        await self._shutting_down.wait()

    def statistics(self) -> ServerStatistics:
        """Counters of now; works after the end too."""
        live = [connection.statistics() for connection in self._connections]
        return ServerStatistics(
            accepted=self._accepted,
            active=len(self._connections),
            rejected=0,
            handler_errors=self._handler_errors,
            closed=MappingProxyType(dict(self._closed)),
            bytes_received=self._received + sum(s.bytes_received for s in live),
            bytes_sent=self._sent + sum(s.bytes_sent for s in live),
        )

    async def shutdown(self, timeout: float | None = None) -> None:
        """Ends the server gracefully; returns when all is done.

        :param timeout: seconds after which the handlers that still run are cancelled; ``None``:
            ``shutdown_timeout``. Of several calls the shortest decides.
        """
        timeout = seconds(timeout, "timeout")
        self._begin_shutdown(self._options.shutdown_timeout if timeout is None else timeout)
        await self._ended.wait()

    # --- accepting -------------------------------------------------------------------------------

    def _adopt(self, listeners: Sequence[SocketListener]) -> None:
        """Takes over listeners that were made by themselves: their sockets move to the account."""
        if any(listener._closed for listener in listeners):
            raise ClosedResourceError
        self._open([listener._give_away() for listener in listeners])

    def _open(self, sockets: Sequence[socket.socket]) -> None:
        self._listeners = open_listeners(sockets, self._account)
        self._note_addresses()

    def _note_addresses(self) -> None:
        self._addresses = tuple(
            _sockets.plain_address(listener._raw_socket.getsockname())
            for listener in self._listeners
        )

    async def _accept(self, listener: SocketListener, group: anyio.abc.TaskGroup) -> None:
        self._accepting += 1
        try:
            while True:
                batch = await listener.accept_batch()
                for fd, peer in batch:
                    self._start(listener, fd, peer, group)
                _epoll.add_credits(self._account, len(batch))
        except ClosedResourceError:
            if not self.shutting_down:
                logger.error("A listener was closed while its server was running")
        except BrokenResourceError as exc:
            logger.error("A listener has failed: %s", exc.__cause__)
        finally:
            self._accepting -= 1
            self._check_idle()

    def _start(
        self, listener: SocketListener, fd: int, peer: bytes, group: anyio.abc.TaskGroup
    ) -> None:
        """Makes the connection and its task. An fd that fails here is closed, and nobody else's."""
        try:
            connection = self._connection(listener, fd, peer)
        except OSError as exc:
            self._closed["failed"] += 1
            logger.debug("An accepted connection could not be opened: %s", exc)
            return
        self._accepted += 1
        self._connections.add(connection)
        group.start_soon(self._run, connection, name=self._name(connection))

    @staticmethod
    def _name(connection: Connection) -> str:
        """For tasks and log records, which may be kept for long: not the connection itself."""
        return f"anypoll connection {connection._core.number & 0xFFFFFFFF}"

    def _connection(self, listener: SocketListener, fd: int, peer: bytes) -> Connection:
        options = self._options
        kind = listener._kind
        connection = new_connection(fd, kind, options.limits, peer)
        core = connection._core
        try:
            if kind == _epoll.TCP:
                if options.nodelay:
                    nodelay_fd(fd)
                if options.keepalive:
                    connection.set_keepalive(options.keepalive)
            connection._server = self
            core.held = True
            core.draining = self.shutting_down
            core.register()
        except BaseException:
            core.close()
            raise
        return connection

    # --- handling --------------------------------------------------------------------------------

    async def _run(self, connection: Connection) -> None:
        """One connection, from its first byte to its end."""
        reason = "cancelled"
        try:
            await self._handler(connection)
            reason = "done"
            await connection._core.finish(self._drain_timeout(connection))
        except Exception as exc:  # noqa: BLE001 -- that is the promise: it stops nothing else
            reason = self._judge(connection, exc)
            if reason in _ENDED_BY_PEER:
                await connection._core.finish(self._drain_timeout(connection))
        finally:
            try:
                await connection._core.end()
            finally:
                self._leave(connection, reason)

    def _drain_timeout(self, connection: Connection) -> float:
        timeout = connection.write_timeout
        return self._options.shutdown_timeout if timeout is None else timeout

    def _judge(self, connection: Connection, exc: Exception) -> str:
        reason = _normal_end(exc, connection._core.number)
        if reason is not None:
            logger.debug("%s ended: %s", self._name(connection), reason)
            return reason
        self._handler_errors += 1
        logger.error("The handler of %s has failed", self._name(connection), exc_info=exc)
        return "error"

    def _leave(self, connection: Connection, reason: str) -> None:
        statistics = connection.statistics()
        self._received += statistics.bytes_received
        self._sent += statistics.bytes_sent
        self._closed[reason] += 1
        self._connections.discard(connection)
        self._check_idle()

    # --- the end ---------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        if self.shutting_down and not self._connections and not self._accepting:
            self._idle.set()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener._close()

    def _begin_shutdown(self, timeout: float) -> None:
        self._deadline = min(self._deadline, anyio.current_time() + timeout)
        if self._grace is not None:
            self._grace.deadline = min(self._grace.deadline, self._deadline)
        if self.shutting_down:
            return
        self._shutting_down.set()
        self._close_listeners()
        for connection in self._connections:
            connection._core.end_if_idle()
        self._check_idle()

    async def _wait_idle(self) -> None:
        """Until the last connection has ended, or the grace is over."""
        with anyio.CancelScope(deadline=self._deadline) as self._grace:
            await self._idle.wait()

    async def _lifetime(self, *, task_status: TaskStatus[None]) -> None:
        """Everything a server has runs inside of this."""
        try:
            async with anyio.create_task_group() as group:
                for listener in self._listeners:
                    group.start_soon(self._accept, listener, group)
                _epoll.add_credits(self._account, _IN_FLIGHT)
                task_status.started()
                await self._shutting_down.wait()
                await self._wait_idle()
                group.cancel_scope.cancel()
        finally:
            self._shutting_down.set()
            self._close_listeners()
            self._ended.set()


def _normal_end(exc: BaseException, number: int) -> str | None:
    """The reason, if nothing is in ``exc`` but what the peer of that connection can cause."""
    if isinstance(exc, BaseExceptionGroup):
        reasons = [_normal_end(e, number) for e in exc.exceptions]
        return reasons[0] if all(reasons) else None
    about: BaseException | None = exc  # or a wrapper's, with the connection's own as its cause
    while about is not None and getattr(about, ORIGIN, None) != number:
        about = about.__cause__
    if about is None:
        return None
    kinds = {kind.__name__ for kind in type(exc).__mro__}  # Trio's exceptions have AnyIO's names
    return next((reason for kind, reason in _REASONS.items() if kind.__name__ in kinds), None)

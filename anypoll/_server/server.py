"""The server object: its listeners, its public methods, graceful and forced shutdown.

A server owns one task group. It runs one task per listener, which takes batches of accepted
descriptors and hands them to :class:`Lifecycle`, and whatever that starts. Nothing that happens in
those tasks reaches the task group.

A server ends in one of two ways. Gracefully: listeners close, the waits of idle connections see the
end of stream, busy connections go on until they wait with nothing buffered, and the block ends with
the last of them or at ``shutdown_timeout``. By force (an exception in the block, a cancellation,
the timeout): the handlers are cancelled, and close their connections.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import anyio
from anyio import BrokenResourceError, ClosedResourceError
from anyio.abc import TaskStatus

from .._buffers.arguments import seconds
from .._connection.sockets import Address, plain_address
from .._loop import runtime
from .._network.listener import SocketListener, open_listeners
from .admission import Admission
from .lifecycle import Guests, Lifecycle
from .options import Options
from .statistics import ServerStatistics

__all__ = ("Server", "ServerStatistics")

logger = logging.getLogger("anypoll.server")

#: Connections that begin in one round of the event loop, before others have a turn.
_MANY = 8


class Server:
    """A running server, as ``async with anypoll.serve(...)`` returns it."""

    def __init__(self, options: Options) -> None:
        if not isinstance(options, Options):
            raise TypeError(f"a server is made by serve(), not of {type(options).__name__}")
        self._options = options
        admission = Admission(
            options.max_connections,
            options.max_connections_per_peer,
            tls=options.ssl_context is not None,
        )
        self._admission = admission
        self._hub = runtime.current_hub()
        self._lifecycle = Lifecycle(self, options, admission, self._hub)
        self._guests = Guests(self._lifecycle)
        self._lifecycle.on_leave = self._check_idle
        self._listeners: list[SocketListener] = []
        self._addresses: tuple[Address, ...] = ()
        self._ending = False
        self._shutting_down = anyio.Event()  # the same, for those who wait
        self._ended = anyio.Event()
        self._idle = anyio.Event()  # no connection is left, and none will come
        self._accepting = 0
        self._deadline = float("inf")
        self._grace: anyio.CancelScope | None = None

    # --- public ----------------------------------------------------------------------------------

    @property
    def listeners(self) -> Sequence[SocketListener]:
        """The listeners, in the order of their addresses."""
        return tuple(self._listeners)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses of all listeners, as AnyIO's ``local_address``; also after the end."""
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
    def connections(self) -> tuple[Any, ...]:
        """A snapshot of the connections whose hooks and close callbacks have not all ended, as
        their handlers see them. Any thread.
        """
        return self._lifecycle.faces()

    @property
    def shutting_down(self) -> bool:
        """Whether the server is ending or has ended. Any thread."""
        return self._ending

    async def wait_shutting_down(self) -> None:
        """Waits until the server begins to end.

        :raises RuntimeError: in another event loop
        """
        self._hub.check()
        await self._shutting_down.wait()

    def statistics(self) -> ServerStatistics:
        """The current counters; works after the end too. Any thread: the counters are of one
        moment, and ``accepted`` is ``active`` plus the sum of ``closed``.
        """
        return self._lifecycle.statistics()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Ends the server gracefully; returns when it has ended.

        :param timeout: seconds after which handlers still running are cancelled; ``None``:
            ``shutdown_timeout``. Of several calls the shortest timeout wins.
        :raises RuntimeError: in another event loop; the server keeps running then
        """
        timeout = seconds(timeout, "timeout")
        self._hub.check()
        self._begin_shutdown(self._options.shutdown_timeout if timeout is None else timeout)
        await self._ended.wait()

    def _owner_of_requests(self) -> Lifecycle | Guests:
        """The owner of a connection that enters request mode."""
        return self._guests if self._options.on_request is None else self._lifecycle

    # --- accepting -------------------------------------------------------------------------------

    def _adopt(self, listeners: Sequence[SocketListener]) -> None:
        """Takes over listeners created separately: their sockets move to the server's account."""
        if any(listener._closed for listener in listeners):
            raise ClosedResourceError
        self._open([listener._give_away() for listener in listeners])

    def _open(self, sockets: Sequence[socket.socket]) -> None:
        self._listeners = open_listeners(sockets, self._admission.account)
        self._addresses = tuple(
            plain_address(listener._raw_socket.getsockname()) for listener in self._listeners
        )

    async def _accept(self, listener: SocketListener) -> None:
        self._accepting += 1
        try:
            while True:
                batch = await listener.accept_batch()
                self._lifecycle.begin(listener, batch)
                self._admission.taken(len(batch), len(self._lifecycle.connections))
                if len(batch) >= _MANY:
                    await listener._hub.checkpoint()  # a storm: others have a turn in between
        except ClosedResourceError:
            if not self.shutting_down:
                logger.error("A listener was closed while its server was running")
        except BrokenResourceError as exc:
            logger.error("A listener has failed: %s", exc.__cause__)
            listener._close()  # or clients would wait in its backlog forever
        finally:
            self._accepting -= 1
            self._check_idle()

    # --- end -------------------------------------------------------------------------------------

    def _check_idle(self) -> None:
        if self.shutting_down and not self._lifecycle.connections and not self._accepting:
            self._idle.set()

    def _end(self) -> None:
        """Accepts nothing more, and says so."""
        self._ending = True
        self._shutting_down.set()
        self._close_listeners()

    def _close_listeners(self) -> None:
        with ExitStack() as stack:  # each, whatever another raises
            for listener in reversed(self._listeners):
                stack.callback(listener._close)

    def _begin_shutdown(self, timeout: float) -> None:
        self._deadline = min(self._deadline, anyio.current_time() + timeout)
        if self._grace is not None:
            self._grace.deadline = min(self._grace.deadline, self._deadline)
        if self.shutting_down:
            return
        self._end()
        self._lifecycle.drain()
        self._check_idle()

    async def _wait_idle(self) -> None:
        """Waits until the last connection has ended, or the grace period is over."""
        with anyio.CancelScope(deadline=self._deadline) as self._grace:
            await self._idle.wait()

    async def _lifetime(self, *, task_status: TaskStatus[None]) -> None:
        """Everything that belongs to a server runs inside this."""
        try:
            async with anyio.create_task_group() as group:
                self._lifecycle.open(group)
                for listener in self._listeners:
                    group.start_soon(self._accept, listener)
                self._admission.open(len(self._listeners))
                task_status.started()
                try:
                    await self._shutting_down.wait()
                    await self._wait_idle()
                finally:
                    try:
                        self._end()
                    finally:
                        group.cancel_scope.cancel()
                        await self._lifecycle.end()
        finally:
            try:
                self._end()
            finally:
                self._ended.set()

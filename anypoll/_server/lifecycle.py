"""The lifecycle of a server's connections, from ``on_prepare`` to the last close callback.

For each connection, the following happen in this order, each at most once: ``on_prepare``, before
anything is read; ``on_connect``; the handler, or the calls of request mode; ``on_disconnect``, if
the peer has gone by then; pending output is sent; the connection is closed; the close callbacks
run. A connection counts as active until these have ended.

Nothing that happens here reaches the server's task group. Ends that a peer can cause are counted.
Any other exception from the user's code is an error: it is logged once, counted, and passed to
``on_error``.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import anyio
from anyio import EndOfStream

from .. import _epoll
from .._buffers.errors import GRACEFUL, Reason, error_in, normal_end, os_error
from .._connection.requests import Function, Requests
from .._connection.stream import Connection, new_connection
from .._loop import runtime
from .._loop.callbacks import cancellation_suppressed
from .._loop.workers import Workers
from .._native import Drive, register
from .._network.listener import SocketListener, nodelay_fd
from .._tls.sessions import HandshakeError, TLSSessions
from .disconnect import DisconnectHook, PeerGoneError
from .options import Hook, Options
from .statistics import ServerStatistics

if TYPE_CHECKING:
    from .._loop.hub import Hub
    from .admission import Admission

logger = logging.getLogger("anypoll.server")


def _own_context() -> Context:
    """The caller's context variables, with sniffio told which library is running.

    Tasks are also started from callbacks of the event loop. There sniffio, which AnyIO asks if it
    is installed, finds nothing: ``asyncio.run()`` does not set its variable, and no task is active.
    """
    context = copy_context()
    with suppress(ImportError):
        import sniffio  # noqa: PLC0415 -- AnyIO does not need it: Trio brings it

        context.run(sniffio.current_async_library_cvar.set, sniffio.current_async_library())
    return context


class Lifecycle:
    """All connections of one server; see the module. The ``Owner`` of those in request mode."""

    def __init__(self, server: Any, options: Options, admission: Admission, hub: Hub) -> None:
        self._server = server
        self._options = options
        self._admission = admission
        self._group: anyio.abc.TaskGroup | None = None
        self.context = _own_context()
        self.workers = Workers(hub, self._begin)
        self.connections: dict[Connection, DisconnectHook | None] = {}
        self._sessions = TLSSessions(
            options.ssl_context, options.tls_handshake_timeout, options.on_request
        )
        self.on_leave: Callable[[], None] = lambda: None
        """called whenever a connection has ended while the server is ending"""
        # Held while values change that other threads must see as one. Reentrant, because signal
        # handlers and the garbage collector may run user code anywhere, which may read statistics.
        self._lock = threading.RLock()
        self._accepted = self._rejected = self._errors = self._received = self._sent = 0
        self._closed: Counter[str] = Counter()
        self.cut = False
        self._plain = options.handler is not None and not (
            options.ssl_context
            or options.on_connect
            or options.on_disconnect
            or options.cancel_on_disconnect
        )
        """the handler is called at once, and nothing but its end ends it"""
        own = options.ssl_context or options.cancel_on_disconnect
        self.caller = self.call if own else None

    def statistics(self) -> ServerStatistics:
        """The current counters; works after the end too. Any thread."""
        with self._lock:
            connections, accepted = list(self.connections), self._accepted
            closed, received, sent = dict(self._closed), self._received, self._sent
            tls = self._sessions.counts
        # A connection that ends meanwhile keeps its counters: no byte is lost or counted twice.
        live = [connection.statistics() for connection in connections]
        return ServerStatistics(
            accepted=accepted,
            active=len(connections),
            rejected=self._rejected,
            handler_errors=self._errors,
            closed=MappingProxyType(closed),
            bytes_received=received + sum(s.bytes_received for s in live),
            bytes_sent=sent + sum(s.bytes_sent for s in live),
            tls_handshakes=tls.handshakes,
            tls_resumed=tls.resumed,
            tls_failed=tls.failed,
            tls_handshake_seconds=tls.seconds,
        )

    def faces(self) -> tuple[Any, ...]:
        """The connections as their handlers see them. Any thread."""
        with self._lock:
            connections = list(self.connections)
        return tuple(map(self._sessions.face, connections))

    # --- tasks -----------------------------------------------------------------------------------

    def open(self, group: anyio.abc.TaskGroup) -> None:
        """Sets the group in which tasks run from now on. Call it in the group's block."""
        self._group = group
        self._handlers = self.workers.hub.tasks_in(group, self.context)

    def _begin(self, function: Callable[..., Awaitable[Any]], *args: Any) -> bool:
        """Runs the function in a task of the server, with the context variables of ``serve()``."""
        if self._group is None:
            return False
        start: Any = self._group.start_soon
        self.context.copy().run(start, function, *args)
        return True

    # --- start -----------------------------------------------------------------------------------

    def begin(self, listener: SocketListener, batch: list[tuple[int, bytes]]) -> None:
        """Turns accepted descriptors into connections, and has them handled."""
        ready: list[Connection] = []
        waiting = deque(batch)
        try:
            while waiting:
                connection = self._admit(listener, *waiting.popleft())
                if connection is not None:
                    ready.append(connection)
        except BaseException:  # on_prepare raised something that ends the server
            for fd, _ in waiting:
                _epoll.fd_close(fd)
            for connection in ready:
                self._end_early(connection, self._end, "cancelled")
            raise
        if ready:
            self._watch_all(ready)

    def _watch_all(self, ready: list[Connection]) -> None:
        results = register([connection._core for connection in ready])
        for connection, result in zip(ready, results, strict=True):
            if result < 0:
                logger.debug("A connection could not be watched: %s", os_error(result))
                self._end_early(connection, self._end, "failed")
            else:
                self._introduce(connection)

    def _admit(self, listener: SocketListener, fd: int, peer: bytes) -> Connection | None:
        """The connection, if it is to be watched. Nothing has been read from it yet."""
        if not self._admission.enter(peer):
            self._rejected += 1
            _epoll.fd_close(fd)
            return None
        try:
            connection = self._open(listener, fd, peer)
        except OSError as exc:
            self._admission.leave(peer)
            with self._lock:
                self._accepted += 1
                self._closed["failed"] += 1
            logger.debug("An accepted connection could not be opened: %s", exc)
            return None
        with self._lock:
            self._accepted += 1
            self.connections[connection] = None
        on_prepare = self._options.on_prepare
        return connection if on_prepare is None or self._prepare(connection, on_prepare) else None

    def _open(self, listener: SocketListener, fd: int, peer: bytes) -> Connection:
        """:raises OSError: if resources are exhausted; the descriptor is closed then"""
        options = self._options
        connection = new_connection(fd, listener._kind, options.limits, peer, listener._hub)
        core = connection._core
        try:
            if listener._kind == _epoll.TCP:
                if options.nodelay:
                    nodelay_fd(fd)
                if options.keepalive:
                    connection.set_keepalive(options.keepalive)
        except BaseException:
            core.close()
            raise
        core.held = True
        core.draining = self._server._ending
        connection._server = self._server
        if options.on_request is not None:
            core.requests = Requests(connection, core, options.on_request, self)
        return connection

    def _prepare(self, connection: Connection, on_prepare: Hook) -> bool:
        """Runs ``on_prepare``; returns whether the connection may go on."""
        try:
            result = on_prepare(connection)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError("on_prepare must be a plain function: it has returned an awaitable")
        except Exception as exc:  # noqa: BLE001 -- as promised: it stops nothing else
            self._end_early(connection, self.conclude, exc)
            return False
        except BaseException:
            self._end_early(connection, self._end, "cancelled")
            raise
        if connection._core.closed:
            self._end_early(connection, self._end, "refused")
            return False
        return True

    def _end_early(self, connection: Connection, end: Callable[..., Any], why: Any) -> None:
        """Ends a connection that has no task yet: it gets one for its end."""
        if connection._core.requests is not None:
            connection._core.requests.stop()
        self._begin(end, connection, why)

    def _introduce(self, connection: Connection) -> None:
        options = self._options
        core = connection._core
        if options.on_disconnect is not None or options.cancel_on_disconnect:
            self._watch(connection)
        if core.requests is None or options.on_request is None:
            self._handlers.start(self._run, connection)
        elif options.on_connect is not None or options.ssl_context is not None:
            core.requests.start(self._connect)
        else:
            self._connected(connection)
            core.requests.start()

    def _watch(self, connection: Connection) -> None:
        hook = None
        if self._options.on_disconnect is not None:
            hook = partial(self._disconnect, connection)
        disconnect = DisconnectHook(connection._core, hook, self._begin)
        self.connections[connection] = disconnect
        connection._core.watch_peer(disconnect.notice)

    def _connected(self, connection: Connection) -> None:
        disconnect = self.connections[connection]
        if disconnect is not None:
            disconnect.open()

    async def _connect(self, connection: Connection) -> None:
        await self._sessions.open(connection)
        if self._options.on_connect is not None:
            await self._options.on_connect(self._sessions.face(connection))
        self._connected(connection)
        requests, on_request = connection._core.requests, self._options.on_request
        if self._options.ssl_context is None or on_request is None or requests is None:
            return
        if self._sessions.calls_for_plaintext(connection):
            requests._conn = self._sessions.face(connection)
            if not self._options.cancel_on_disconnect:
                requests._call = None
        else:
            # Requests may have come along with the handshake: no ciphertext will announce them.
            await self.call(connection, on_request)

    # --- user code -------------------------------------------------------------------------------

    async def _run(self, connection: Connection) -> None:
        """The whole life of one connection in handler mode."""
        exc: Exception | None = None
        try:
            if self._plain:
                assert self._options.handler is not None
                await self._driven(self._options.handler(connection))
            else:
                await self._handle(connection)
        except BaseException as e:
            exc = error_in(e)
            if exc is None:
                with cancellation_suppressed():  # it must not replace the handler's outcome
                    await self.conclude(connection, e)
                raise
        try:  # as promised: an error stops nothing else
            if not self._plain or not self._conclude_now(connection, exc):
                await self.conclude(connection, exc)
        finally:
            exc = None  # its traceback leads back to this frame

    async def _handle(self, connection: Connection) -> None:
        assert self._options.handler is not None
        await self._connect(connection)
        if not connection._core.closed:  # on_connect may have refused it
            await self._driven(self.call(connection, self._options.handler))

    def _driven(self, awaitable: Awaitable[Any]) -> Awaitable[Any]:
        """The same, but resumed directly where that is possible."""
        hub, wanted = self.workers.hub, runtime.settings().direct_resume
        if wanted and hub.can_resume_directly and inspect.iscoroutine(awaitable):
            return Drive(hub, awaitable)
        return awaitable

    def call(self, conn: Any, function: Function) -> Awaitable[Any]:
        """Calls the function, in a scope that a disconnect cancels if that was asked for."""
        connection = self._sessions.below(conn)
        disconnect = self.connections[connection]
        awaitable = self._sessions.call(connection, function)
        if disconnect is not None and self._options.cancel_on_disconnect:
            return disconnect.scoped(awaitable)
        return awaitable

    async def _disconnect(self, connection: Connection) -> None:
        assert self._options.on_disconnect is not None
        try:
            await self._options.on_disconnect(self._sessions.face(connection))
        except BaseException as exc:  # as for the handler
            error = error_in(exc)
            if error is None:
                raise
            try:
                if await self._judge(connection, error) == "error":
                    connection._core.close()
            finally:
                del error  # its traceback refers to this frame

    # --- end -------------------------------------------------------------------------------------

    def _conclude_now(self, connection: Connection, exc: Exception | None) -> bool:
        """Does what :meth:`conclude` would do, if that would neither wait nor call anybody. If not,
        it returns False, and nothing is decided.
        """
        core = connection._core
        reason = "done" if exc is None else normal_end(exc, core.number)
        if reason not in GRACEFUL or core.callbacks is not None or core.requests is not None:
            return False
        if not core.closed and not core._may_close():
            return False
        if exc is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s ended: %s", self._name(connection), reason)
        core.close()
        core.held = False
        self._leave(connection, reason)
        return True

    async def conclude(self, conn: Any, exc: BaseException | None) -> None:
        """Called when the handler or the last call has ended, with its exception."""
        reason: Reason = "cancelled"
        sessions = self._sessions
        connection = sessions.below(conn)
        try:
            reason = await self._reason(connection, sessions.explained(connection, exc))
            disconnect = self.connections[connection]
            if disconnect is not None and reason != "cancelled" and sessions.is_open(connection):
                await disconnect.settle(gone=sessions.has_ended(connection))
            if reason in GRACEFUL:
                await self._finish(connection)
        finally:
            await self._end(connection, reason)

    async def _finish(self, connection: Connection) -> None:
        """Sends pending output, then ends this side of the connection."""
        own = self._sessions.face(connection).write_timeout
        timeout = self._options.shutdown_timeout if own is None else own
        await self._sessions.finish(connection, timeout)

    async def _reason(self, conn: Any, exc: BaseException | None) -> Reason:
        if exc is None:
            return "done"
        if isinstance(exc, PeerGoneError):
            return "disconnected"
        if isinstance(exc, HandshakeError):
            logger.debug("%s ended: TLS handshake: %r", self._name(conn), exc.__cause__)
            return "tls_handshake"
        if isinstance(exc, Exception):
            return await self._judge(conn, exc)
        return "cancelled"

    async def _end(self, connection: Connection, reason: Reason) -> None:
        """Closes the connection; nothing of it is left when this returns."""
        connection._core.close()
        self._sessions.shut(connection)
        disconnect = self.connections[connection]
        try:
            if disconnect is not None:
                await disconnect.over()
        finally:
            try:
                await connection._core.end()
            finally:
                self._leave(connection, reason)

    async def _judge(self, connection: Connection, exc: Exception) -> Reason:
        """The reason to count. An error is logged, and passed to ``on_error``."""
        name = self._name(connection)
        reason = normal_end(exc, connection._core.number)
        if reason is not None:
            logger.debug("%s ended: %s", name, reason)
            return reason
        self._errors += 1
        logger.error("The handler of %s has failed", name, exc_info=exc)
        if self._options.on_error is not None:
            try:
                result = self._options.on_error(self._sessions.face(connection), exc)
                if inspect.isawaitable(result):
                    await result
            except BaseException as failure:
                if error_in(failure) is None:
                    raise
                logger.exception("on_error has failed for %s", name)
        return "error"

    @staticmethod
    def _name(connection: Connection) -> str:
        """A name for log records, which may be kept for long and must not keep the connection."""
        return f"anypoll connection {connection._core.number & 0xFFFFFFFF}"

    def _leave(self, connection: Connection, reason: Reason) -> None:
        received, sent = connection._core._traffic()
        with self._lock:
            self._received += received
            self._sent += sent
            self._closed[reason] += 1
            del self.connections[connection]
        self._sessions.forget(connection)
        self._admission.leave(connection._core.peer)
        if self._server._ending:
            self.on_leave()
        else:
            self._admission.grant(len(self.connections))

    def drain(self) -> None:
        """Ends idle connections now, and the others as soon as they are idle."""
        for connection in tuple(self.connections):
            if not self._sessions.postpone_end(connection):
                connection._core.end_if_idle()

    async def end(self) -> None:
        """Ends connections that have no task for a cancellation to reach. The others end with their
        tasks, even if those are shielded and do not see the cancellation.
        """
        self.cut = True
        if self._options.on_request is None:
            await self._handlers.join()  # each connection has its handler
            return
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for connection in tuple(self.connections):
                    requests = connection._core.requests
                    if requests is not None and requests.taskless:
                        requests.stop()
                        group.start_soon(self._end, connection, "cancelled")


class Guests:
    """Owns connections put into request mode in a server with a handler, whose end closes them."""

    context = None
    cut = False  # they end with the handler
    caller = None

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self.workers = lifecycle.workers

    async def conclude(self, conn: Any, exc: BaseException | None) -> None:
        """Closes the connection after an error. The end of input is left to the handler."""
        if isinstance(exc, Exception) and not isinstance(exc, EndOfStream):
            await self._lifecycle._judge(conn, exc)
            conn._core.close()

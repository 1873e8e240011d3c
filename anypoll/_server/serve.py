"""The entry points ``serve()`` and ``serve_forever()``: options, and the ``async with`` block."""

from __future__ import annotations

import inspect
import os
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Any

import anyio
from anyio.abc import TaskStatus

from .._buffers.arguments import Limits, count, flag, seconds
from .._connection.requests import Function
from .._connection.sockets import Keepalive, check_keepalive
from .._loop.tasks import wait_shielded
from .options import Options
from .server import Server
from .targets import ListenTargets, all_different, flat

__all__ = ("serve", "serve_forever")

_ANOTHER_TASK = (
    "serve() must be left in the task that has entered it, as every task group. Where the two are"
    " different tasks (the fixtures of some plugins of pytest, components with start() and stop()),"
    " run serve_forever() in a task of its own, and end it by server.shutdown()"
)


def _leaves(exc: BaseException) -> set[int]:
    """The identities of the exceptions in a group, because Trio rebuilds the groups themselves."""
    if isinstance(exc, BaseExceptionGroup):
        return set().union(*(_leaves(e) for e in exc.exceptions))
    return {id(exc)}


class serve:  # noqa: N801 -- it is used like a function
    """Serves connections while the block runs.

    ``async with anypoll.serve(handler, host="127.0.0.1", port=0) as server: ...``

    Entering returns a :class:`Server` once every listener accepts. Leaving the block normally shuts
    the server down gracefully: it stops accepting, idle connections see ``EndOfStream``, busy ones
    may finish for ``shutdown_timeout`` seconds, and whatever is still running is then cancelled.
    Leaving it by an exception or by cancellation skips the grace period; the exception leaves
    ``serve()`` unchanged. In any case nothing of the server is left when the block has ended. The
    task that enters the block must leave it; a fixture, or a component with ``start()`` and
    ``stop()``, runs :func:`serve_forever` in a task of its own.

    Each connection gets a task that runs ``handler(connection)``. The connection is closed when the
    handler returns, raises, or is cancelled. After a return, pending output is sent first, for at
    most ``write_timeout``, or ``shutdown_timeout`` if that is unset. With ``on_request`` instead of
    a handler there is no task per connection: the function is called whenever input has arrived;
    see :meth:`Connection.set_on_request`. An exception from either, or from a hook, is logged
    (logger ``anypoll.server``), ends its connection, and stops nothing else. Exceptions that a peer
    can cause (an end of stream, a reset, a timeout, an oversized message) are only counted.

    The hooks of a connection are called in this order, each at most once: ``on_prepare``,
    ``on_connect``, then the handler or the requests, ``on_disconnect``, then the callbacks passed
    to :meth:`Connection.add_close_callback`.

    :param handler: a coroutine function of one argument, the :class:`Connection`
    :param on_request: likewise; exactly one of the two must be given
    :param on_prepare: a plain function of the connection, called before anything is read; it may
        set options, or refuse the connection by calling its ``abort()``
    :param on_connect: a coroutine function of the connection, called before the handler
    :param on_disconnect: a coroutine function of the connection, called as soon as the peer has
        ended its side or reset the connection, beside the handler if that is still running.
        Received input can still be read, and a peer that has only ended its side can still be
        answered.
    :param on_error: a plain or coroutine function of the connection and an exception, called for
        each exception that is logged
    :param cancel_on_disconnect: cancel the handler when the peer ends its side or resets the
        connection; not for protocols whose clients end their side and wait for the answer
    :param max_connections: at this number the server stops accepting until a connection has ended
    :param max_connections_per_peer: any more from the same IP address are closed at once
    :param host: address or name to listen on; ``None`` with a ``port``: all interfaces
    :param port: 0 chooses a port, the same on all addresses; see ``server.port``
    :param path: a UNIX socket, instead of host and port; the file of a dead socket is replaced
    :param path_mode: permissions of that socket's file
    :param sock: a bound socket or descriptor, or a list of them, instead
    :param listeners: from :func:`anypoll.create_tcp_listener` and the like, instead
    :param backlog: connections that may wait to be accepted
    :param reuse_port: ``SO_REUSEPORT``
    :param read_timeout: ``read_timeout`` of each connection, in seconds
    :param write_timeout: ``write_timeout`` of each connection, in seconds
    :param idle_timeout: ``idle_timeout`` of each connection, in seconds
    :param ssl_context: from :mod:`ssl`, with a certificate: connections speak TLS, and the handler,
        the requests and the hooks (except ``on_prepare``, which precedes the handshake) get a
        :class:`TLSConnection`. A failed handshake is only counted.
    :param tls_handshake_timeout: seconds that the handshake may take
    :param keepalive: TCP keepalive: ``True``, or a :class:`Keepalive`
    :param nodelay: ``TCP_NODELAY``
    :param shutdown_timeout: seconds that busy connections get when the server ends, and that each
        close callback may take
    :param read_high_water: bytes to read ahead at most
    :param write_high_water: bytes of pending output above which reads wait
    :param read_limit: bytes that a single request may ask for
    :raises ValueError, TypeError: on entering, for invalid arguments
    :raises OSError: on entering, if binding fails, with the address in its text
    :raises RuntimeError: on leaving in a task other than the one that entered; the server has ended
        then
    """

    def __init__(
        self,
        handler: Function | None = None,
        *,
        on_request: Function | None = None,
        host: Any = None,
        port: int | None = None,
        path: str | bytes | os.PathLike[Any] | None = None,
        path_mode: int | None = None,
        sock: Any = None,
        listeners: Any = None,
        on_prepare: Callable[[Any], None] | None = None,
        on_connect: Function | None = None,
        on_disconnect: Function | None = None,
        on_error: Callable[[Any, Exception], Any] | None = None,
        cancel_on_disconnect: bool = False,
        max_connections: int | None = None,
        max_connections_per_peer: int | None = None,
        backlog: int = 65536,
        reuse_port: bool = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        idle_timeout: float | None = None,
        ssl_context: ssl.SSLContext | None = None,
        tls_handshake_timeout: float = 30.0,
        keepalive: bool | Keepalive = False,
        nodelay: bool = True,
        shutdown_timeout: float = 10.0,
        read_high_water: int | None = None,
        write_high_water: int | None = None,
        read_limit: int | None = None,
    ) -> None:
        self._targets = (host, port, path, path_mode, sock, listeners, backlog, reuse_port)
        limits = {
            "read_timeout": read_timeout,
            "write_timeout": write_timeout,
            "idle_timeout": idle_timeout,
            "read_high_water": read_high_water,
            "write_high_water": write_high_water,
            "read_limit": read_limit,
        }
        self._limits: dict[str, Any] = {
            name: value for name, value in limits.items() if value is not None
        }
        self._options = {
            "keepalive": keepalive,
            "nodelay": nodelay,
            "shutdown_timeout": shutdown_timeout,
            "handler": handler,
            "on_request": on_request,
            "on_prepare": on_prepare,
            "on_connect": on_connect,
            "on_disconnect": on_disconnect,
            "on_error": on_error,
            "cancel_on_disconnect": cancel_on_disconnect,
            "ssl_context": ssl_context,
            "tls_handshake_timeout": tls_handshake_timeout,
            "max_connections": max_connections,
            "max_connections_per_peer": max_connections_per_peer,
        }

    async def _server(self) -> Server:
        """Creates the server, listening; on failure nothing is left open."""
        options = self._checked_options()
        targets = ListenTargets(*self._targets)
        server = Server(options)
        if targets.listeners is None:
            server._open(await targets.sockets())
        else:
            server._adopt(all_different(list(flat(targets.listeners))))
        return server

    def _checked_options(self) -> Options:
        given: dict[str, Any] = dict(self._options)
        if (given["handler"] is None) == (given["on_request"] is None):
            raise ValueError("serve() needs exactly one of handler and on_request")
        for name in ("handler", "on_request", "on_connect", "on_disconnect", "on_error"):
            if given[name] is not None and not callable(given[name]):
                raise ValueError(f"{name} must be a function, not {given[name]!r}")
        prepare = given["on_prepare"]
        if prepare is not None and (not callable(prepare) or inspect.iscoroutinefunction(prepare)):
            raise ValueError(f"on_prepare must be a plain function, not {prepare!r}")
        timeout = given["shutdown_timeout"]
        if seconds(timeout, "shutdown_timeout") is None:
            raise TypeError("shutdown_timeout must be a number of seconds")
        context = given["ssl_context"]
        if context is not None and not isinstance(context, ssl.SSLContext):
            kind = type(context).__name__
            raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {kind}")
        if seconds(given["tls_handshake_timeout"], "tls_handshake_timeout") is None:
            raise TypeError("tls_handshake_timeout must be a number of seconds")
        for name in ("max_connections", "max_connections_per_peer"):
            if given[name] is not None:
                given[name] = count(given[name], name, least=1)
        for name in ("nodelay", "cancel_on_disconnect"):
            flag(given[name], name)
        check_keepalive(given["keepalive"])
        return Options(Limits(**self._limits, close_callback_timeout=timeout), **given)

    async def __aenter__(self) -> Server:
        server = await self._server()
        self._running = server
        self._task = server._hub.current_task()
        self._group = anyio.create_task_group()
        try:
            await self._group.__aenter__()
            try:
                await self._group.start(server._lifetime)
            except BaseException as exc:
                await self._group.__aexit__(type(exc), exc, exc.__traceback__)
                raise
        except BaseException:
            server._close_listeners()
            raise
        return server

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._running._hub.current_task() is not self._task:
            await self._leave_elsewhere(exc)
            return
        if exc is None:
            try:
                self._running._begin_shutdown(self._running._options.shutdown_timeout)
            except BaseException as failure:  # the group is left in any case
                await self._group.__aexit__(type(failure), failure, failure.__traceback__)
                raise
        # On an exception the task group cancels what runs in it: the server's one task.
        try:
            await self._group.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup as group:
            if exc is None or not _leaves(group) <= _leaves(exc):
                raise
            # The block's own exception: it propagates by itself, without the group around it.

    async def _leave_elsewhere(self, exc: BaseException | None) -> None:
        """Leaves in a task other than the one that entered. The server can be ended from here, but
        its task group, and that group's cancel scope, stay open in the task that entered them.

        :raises RuntimeError: always, unless the exception leaving the block cancels the task or
            ends the program
        """
        server = self._running
        if server._hub.is_here():
            server._begin_shutdown(server._options.shutdown_timeout if exc is None else 0)
            try:
                await server._ended.wait()
            finally:
                server._begin_shutdown(0)
                await wait_shielded(server._ended)
        if exc is None or isinstance(exc, Exception):
            raise RuntimeError(_ANOTHER_TASK)


async def serve_forever(
    handler: Function | None = None,
    *,
    task_status: TaskStatus[Server] = anyio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Serves until it is cancelled, or ``server.shutdown()`` has ended it.

    This is :class:`serve` for a task group or a Trio nursery::

        server = await tg.start(functools.partial(anypoll.serve_forever, handler, port=8000))

    :param handler: as in :class:`serve`, and so are all other options
    :param task_status: receives the :class:`Server` once every listener accepts
    """
    if not callable(getattr(task_status, "started", None)):
        raise TypeError(f"task_status must have a started(), unlike {type(task_status).__name__}")
    async with serve(handler, **options) as server:
        task_status.started(server)
        await server._ended.wait()

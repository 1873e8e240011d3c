"""``serve()`` and ``serve_forever()``: what to listen on, the options, and the block."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import anyio
from anyio.abc import TaskStatus
from anyio.streams.stapled import MultiListener

from . import _sockets
from ._config import Keepalive, Limits, count, seconds
from ._listener import SocketListener
from ._server import Handler, Options, Server

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ("serve", "serve_forever")


@dataclass(frozen=True, slots=True)
class _Where:
    """What to listen on; exactly one kind."""

    host: Any
    port: int | None
    path: Any
    path_mode: int | None
    sock: Any
    listeners: Any
    backlog: int
    reuse_port: bool

    def __post_init__(self) -> None:
        tcp = self.host is not None or self.port is not None
        given = [tcp, self.path is not None, self.sock is not None, self.listeners is not None]
        if sum(given) != 1:
            raise ValueError("serve() needs exactly one of host/port, path, sock and listeners")
        if self.port is not None:
            _sockets.port_number(self.port, "port")
        if self.host is not None:
            _sockets.host_text(self.host, "host")
        if self.path_mode is not None:
            count(self.path_mode, "path_mode", most=0o7777)
        if self.sock in ([], ()):
            raise ValueError("sock must be a socket, a descriptor, or a list of some, not empty")
        count(self.backlog, "backlog", least=1)

    async def sockets(self) -> list[socket.socket]:
        """Listening sockets.

        :raises OSError: for a failed bind; nothing is left open
        """
        if self.path is not None:
            return [_sockets.unix_listening(self.path, mode=self.path_mode, backlog=self.backlog)]
        if self.sock is not None:
            return self._listening(self.sock)
        return await _sockets.tcp_listening(
            None if self.host is None else _sockets.host_text(self.host, "host"),
            self.port or 0,
            family=socket.AF_UNSPEC,
            backlog=self.backlog,
            reuse_port=self.reuse_port,
        )

    def _listening(self, given: Any) -> list[socket.socket]:
        """What was given, valid; if anything of it is not, all descriptors stay the caller's."""
        families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        sockets: list[socket.socket] = []
        made: list[socket.socket] = []
        try:
            for one in given if isinstance(given, (list, tuple)) else [given]:
                sock = _sockets.validated(one, families=families, listening=True)
                made += [] if sock is one else [sock]
                if any(sock.fileno() == other.fileno() for other in sockets):
                    raise ValueError(f"sock must not contain the descriptor {sock.fileno()} twice")
                sockets.append(sock)
            for sock in sockets:
                sock.listen(min(self.backlog, _sockets.BACKLOG_MOST))
        except BaseException:
            for sock in made:
                sock.detach()
            raise
        return sockets


def _flat(listeners: Any) -> Iterable[SocketListener]:
    """The sockets' listeners in whatever :func:`anypoll.create_tcp_listener` and its like gave."""
    if isinstance(listeners, SocketListener):
        yield listeners
    elif isinstance(listeners, MultiListener):
        yield from _flat(listeners.listeners)
    elif isinstance(listeners, (list, tuple)):
        for listener in listeners:
            yield from _flat(listener)
    else:
        raise ValueError(f"serve() cannot use the listener {listeners!r}")


def _all_different(listeners: list[SocketListener]) -> list[SocketListener]:
    """:raises ValueError: if there is none, or one is there twice"""
    if not listeners or len(set(listeners)) < len(listeners):
        raise ValueError("listeners must be SocketListeners, at least one, and each only once")
    return listeners


def _leaves(exc: BaseException) -> set[int]:
    """The identities of the exceptions in a group: Trio rebuilds the groups themselves."""
    if isinstance(exc, BaseExceptionGroup):
        return set().union(*(_leaves(e) for e in exc.exceptions))
    return {id(exc)}


class serve:  # noqa: N801 -- it is used as a function
    """Serves connections for as long as the block runs.

    ``async with anypoll.serve(handler, host="127.0.0.1", port=0) as server: ...``

    Entering returns a :class:`Server` when every listener accepts. Leaving the block normally shuts
    the server down gracefully: it stops accepting, idle connections see ``EndOfStream``, busy ones
    may finish for ``shutdown_timeout`` seconds, and what then still runs is cancelled. Leaving it
    with an exception, or by cancellation, skips the grace; the exception leaves ``serve()``
    unchanged. In any case nothing of the server is left when the block has ended.

    Each connection gets a task that runs ``handler(connection)``. The connection is closed when
    that returns (what was written is sent before, for at most ``write_timeout``, or else
    ``shutdown_timeout``), raises, or is cancelled. An exception that leaves a handler is logged
    (logger ``anypoll.server``) and stops nothing else; those that a peer can cause (the end of its
    stream, a reset, a timeout, a message that is too large) are only counted.

    :param handler: a coroutine function of one argument, the :class:`Connection`
    :param host: address or name to listen on; ``None`` with a ``port``: all interfaces
    :param port: 0 chooses one, the same on all addresses; see ``server.port``
    :param path: a UNIX socket, instead of host and port
    :param path_mode: permissions of that socket's file
    :param sock: a bound socket or descriptor, or a list of them, instead
    :param listeners: of :func:`anypoll.create_tcp_listener` and its like, instead
    :param backlog: connections that may wait to be accepted
    :param reuse_port: ``SO_REUSEPORT``
    :param read_timeout: ``read_timeout`` of each connection, in seconds
    :param write_timeout: ``write_timeout`` of each connection, in seconds
    :param idle_timeout: ``idle_timeout`` of each connection, in seconds
    :param keepalive: TCP keepalive: ``True``, or a :class:`Keepalive`
    :param nodelay: ``TCP_NODELAY``
    :param shutdown_timeout: seconds that busy connections get when the server ends, and that each
        close callback may take
    :param read_high_water: bytes that are read ahead at most
    :param write_high_water: bytes of pending output above which reads wait
    :param read_limit: bytes that a single request may ask for
    :raises ValueError, TypeError: on entering, for nonsense
    :raises OSError: on entering, for a failed bind
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        host: Any = None,
        port: int | None = None,
        path: str | bytes | os.PathLike[Any] | None = None,
        path_mode: int | None = None,
        sock: Any = None,
        listeners: Any = None,
        backlog: int = 65536,
        reuse_port: bool = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        idle_timeout: float | None = None,
        keepalive: bool | Keepalive = False,
        nodelay: bool = True,
        shutdown_timeout: float = 10.0,
        read_high_water: int | None = None,
        write_high_water: int | None = None,
        read_limit: int | None = None,
    ) -> None:
        self._handler = handler
        self._where = (host, port, path, path_mode, sock, listeners, backlog, reuse_port)
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
        self._options = (keepalive, nodelay, shutdown_timeout)

    async def _server(self) -> Server:
        """The server, listening; nothing is left open if it fails."""
        handler = self._handler
        if not callable(handler):
            raise ValueError("serve() needs a handler: an async function of one argument")
        where = _Where(*self._where)
        keepalive, nodelay, shutdown_timeout = self._options
        if seconds(shutdown_timeout, "shutdown_timeout") is None:
            raise TypeError("shutdown_timeout must be a number of seconds")
        _sockets.check_keepalive(keepalive)
        limits = Limits(**self._limits, close_callback_timeout=shutdown_timeout)
        options = Options(limits, keepalive, bool(nodelay), shutdown_timeout)
        server = Server(handler, options)
        if where.listeners is None:
            server._open(await where.sockets())
        else:
            server._adopt(_all_different(list(_flat(where.listeners))))
        return server

    async def __aenter__(self) -> Server:
        server = await self._server()
        self._running = server
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
        if exc is None:
            self._running._begin_shutdown(self._running._options.shutdown_timeout)
        # With an exception the task group cancels what runs in it: the server's one task.
        try:
            await self._group.__aexit__(exc_type, exc, traceback)
        except BaseExceptionGroup as group:
            if exc is None or not _leaves(group) <= _leaves(exc):
                raise
            # the block's own exception: it goes on by itself, without the group around it


async def serve_forever(
    handler: Handler,
    *,
    task_status: TaskStatus[Server] = anyio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Serves until it is cancelled, or ``server.shutdown()`` has ended it.

    The other form of :class:`serve`, for a task group or a Trio nursery::

        server = await tg.start(functools.partial(anypoll.serve_forever, handler, port=8000))

    :param handler: as in :class:`serve`, and so are all other options
    :param task_status: told the :class:`Server` when every listener accepts
    """
    if not callable(getattr(task_status, "started", None)):
        raise TypeError(f"task_status must have a started(), unlike {type(task_status).__name__}")
    async with serve(handler, **options) as server:
        task_status.started(server)
        await server._ended.wait()

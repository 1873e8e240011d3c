"""The base class of a connection: the state its input and output share, and error translation.

A connection is one object built in four layers of inheritance: this class, ``Output`` (flushing and
sending), ``Input`` (waiting for bytes) and ``Core`` (opening and closing), one file each.
"""

from __future__ import annotations

import os
import socket
import time
from errno import EAGAIN, EBADF, ECONNRESET, EPIPE
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
from anyio import BusyResourceError, ClosedResourceError, EndOfStream, IncompleteRead

from .. import _epoll, _native
from .._buffers.arguments import BLOCK_SIZE
from .._buffers.errors import (
    POLLER_ENDED,
    IdleTimeout,
    ReadTimeout,
    WriteTimeout,
    about,
    stream_error,
)
from .._epoll import ECUT, EEOF, EIDLE, ELATE, ETLS, conn_buffered
from .._loop import runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager

    from .._buffers.arguments import Limits
    from .._buffers.reader import Reader
    from .._buffers.writer import Writer
    from .._epoll import Conn, ConnectionStatistics, Poller
    from .._loop.callbacks import Callbacks
    from .._loop.hub import Hub

AGAIN = -EAGAIN
_WINDOW = 64 * 1024  # bytes that C shows beyond a request
LONG = 1e9  # seconds; as good as forever

_E = TypeVar("_E", bound=Exception)


def deadline_after(timeout: float | None) -> int:
    """When ``timeout`` seconds are over, in ns of ``CLOCK_MONOTONIC``; 0: never."""
    if timeout is None or timeout > LONG:
        return 0
    return time.monotonic_ns() + int(timeout * 1e9)


class RequestMode(Protocol):
    """Request mode as a connection sees it; ``requests.py`` has the theory."""

    taskless: bool
    carries: bool
    _conn: Any
    _call: Any

    @property
    def idle(self) -> bool:
        """Whether the connection waits for input, and no call is running or due."""

    def start(self, before: Callable[[Any], Awaitable[Any]] | None = None) -> None:
        """Starts request mode."""

    def replace(self, function: Callable[[Any], Awaitable[Any]]) -> None:
        """Calls another function from now on."""

    def on_close(self) -> None:
        """The connection was closed."""

    def closing(self) -> AbstractContextManager[None]:
        """For an ``aclose()`` that has to read."""

    def on_draining(self) -> None:
        """The server is ending."""

    def stop(self) -> None:
        """Lets no further call start."""


class Encryption(Protocol):
    """A session that the core has, as its connection sees it; ``_tls/native.py`` has the theory."""

    @property
    def has_begun(self) -> bool:
        """Whether part of a record has come."""

    def broken(self, code: int) -> Exception:
        """The exception for ``ETLS`` and ``ECUT``."""

    async def say_goodbye(self, core: Any, deadline: int) -> bool:
        """Ends this side of the session. Returns whether it could be told."""

    async def close(self, core: Any) -> None:
        """Marks the connection closed, and performs the closing handshake."""


class Endpoint(_native.Core):
    """See the module. Owns ``fd`` from the call on, even if the call fails."""

    __slots__ = ("__weakref__",)

    reader: Reader
    writer: Writer
    hub: Hub
    poller: Poller
    handle: Conn
    kind: int
    limits: Limits
    budget: int
    read_timeout: float | None
    write_timeout: float | None
    idle_timeout: float | None
    requests: RequestMode | None
    """request mode, if the connection is in it"""
    watcher: Callable[[], None] | None
    """called once, when the peer has gone"""
    callbacks: Callbacks | None
    """run at the end, if there are any"""
    session: Encryption | None
    """the TLS session that the core has, so that all input and output is plaintext"""
    held: bool
    """a handler has the connection, so its server runs the callbacks when that has ended"""
    peer: bytes | None
    """the peer's address, if accept4 returned it"""
    raw: socket.socket | None
    """the descriptor as a Python socket, which then owns it"""
    closed: bool
    draining: bool
    """a wait with nothing unread ends as if the peer had ended its side"""
    failure: int
    """the first socket error seen"""
    name: str | None
    """what a warning calls it"""

    def __init__(
        self,
        fd: int,
        kind: int,
        limits: Limits,
        *,
        peer: bytes | None = None,
        hub: Hub | None = None,
    ) -> None:
        self.closed = True  # until there is something to close
        self.kind = kind
        try:
            self.hub = hub = runtime.current_hub() if hub is None else hub
            self.poller = runtime.on_poller(
                hub, lambda poller: _epoll.open_connection(self, poller, fd, limits.read_high_water)
            )
        except BaseException:
            if _epoll.fd_close(fd) < 0:  # the core did not own it yet
                os.close(fd)
            raise
        self.limits = limits
        if limits.read_limit < _WINDOW:  # the window must not let a larger request through
            _epoll.conn_set_window(self.handle, limits.read_limit)
        settings = runtime.settings()
        self.budget = settings.checkpoint_budget
        if settings.block_size != BLOCK_SIZE:
            _epoll.conn_set_block(self.handle, settings.block_size)
        self.read_timeout = limits.read_timeout
        self.write_timeout = limits.write_timeout
        if limits.idle_timeout is not None:
            self.set_idle_timeout(limits.idle_timeout)
        self.peer = peer
        self.closed = False

    def _make_handle(self, address: int) -> Conn:
        return _epoll.connection_at(address)

    def _mark_closed(self) -> None:
        self.closed = True

    def set_idle_timeout(self, timeout: float | None) -> None:
        """Sets the idle timeout, which restarts its clock."""
        self.idle_timeout = timeout
        if timeout is None or timeout > LONG:
            _epoll.conn_set_idle(self.handle, 0)
        else:
            _epoll.conn_set_idle(self.handle, max(int(timeout * 1e9), 1))

    def statistics(self) -> ConnectionStatistics:
        """The connection's counters; works after the close too."""
        return _epoll.connection_statistics(self.handle, self.reader._start, self.writer._size)

    def _let_go(self) -> None:
        self.held = False

    def _begin_draining(self) -> None:
        self.draining = True

    def watch_peer(self, watcher: Callable[[], None]) -> None:
        """Has ``watcher`` called once, when the peer has ended its side or reset the connection. It
        is called in the hub, so it must not run user code.
        """
        self.watcher = watcher
        _epoll.conn_watch_peer(self.handle)

    def _no_more_news(self) -> None:
        self.requests = self.watcher = None

    # --- the socket object -----------------------------------------------------------------------

    def raw_socket(self) -> socket.socket:
        """The descriptor as a Python socket, made on first use; always the same object."""
        if self.raw is None:
            fd = _epoll.conn_fd(self.handle, 1)
            if fd < 0:
                raise self._own(ClosedResourceError())
            raw = socket.socket(fileno=fd)
            raw.setblocking(False)  # it is, but the object does not know
            self.adopt_raw(raw)
        assert self.raw is not None
        return self.raw

    def adopt_raw(self, sock: socket.socket) -> None:
        """Has the descriptor closed through ``sock``, which owns it."""
        _epoll.conn_fd(self.handle, 1)
        self.raw = sock
        runtime.raw_sockets.add(sock)

    def _close_raw(self) -> None:
        """Closes the socket object: the C side has ended, and left the descriptor to it."""
        raw = self.raw
        if raw is None:
            return
        if raw.fileno() >= 0:
            _notify_closing(raw)
            raw.close()
        runtime.raw_sockets.discard(raw)

    def _forget_raw(self) -> None:
        """Drops the socket object: the C side has given the descriptor away."""
        if self.raw is not None:
            runtime.raw_sockets.discard(self.raw)
        self.raw = None

    # --- errors ----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.closed:
            raise self._own(ClosedResourceError())
        self.hub.check()

    def _check_plain(self, action: str) -> None:
        """For what goes past the reader and the writer.

        :raises BusyResourceError: while the core has a TLS session, which alone may use the socket
        """
        if self.session is not None:
            self._check_usable()
            raise BusyResourceError(action)

    def _own(self, exc: _E) -> _E:
        """Marks an exception as this connection's, so that a server can tell a disconnected peer
        from a handler that has lost something else.
        """
        return about(exc, self.number)

    @property
    def origin(self) -> int:
        """See ``Source``."""
        return self.number

    def _closed_error(self) -> Exception:
        return self._own(ClosedResourceError())

    def _read_error(self, code: int) -> Exception:
        if self.closed or code == -EBADF:
            return self._own(ClosedResourceError())
        if code == EEOF:
            buffered = conn_buffered(self.handle, self.reader._start)
            return self._own(IncompleteRead() if buffered > 0 else EndOfStream())
        if code == ELATE:
            return self._own(ReadTimeout(f"not received within {self.read_timeout} s"))
        return self._fail(code)

    def _write_error(self, code: int) -> Exception:
        if self.closed:
            return self._own(ClosedResourceError())
        if code == ELATE:
            return self._own(WriteTimeout(f"not sent within {self.write_timeout} s"))
        if _epoll.conn_status(self.handle) & _epoll.IS_SHUT:
            return self._own(ClosedResourceError())  # after send_eof(), as in Trio
        return self._fail(code)

    def _fail(self, code: int) -> Exception:
        """Marks the connection broken: it accepts no writes from now on."""
        self.failure = self.failure or code
        self.writer._shut = True
        if code == EIDLE:
            return self._own(IdleTimeout("the connection was idle for too long"))
        if code in (ETLS, ECUT) and self.session is not None:
            return self._own(self.session.broken(code))
        return self._own(stream_error(code))

    def why_unwritable(self) -> Exception:
        """What a write raises once ``writer._shut`` is set."""
        return self._write_error(self.failure or -EPIPE)

    def status(self) -> int:
        """The current ``IS_*`` bits; a connection found broken refuses writes from then on."""
        if self.closed:
            return _epoll.IS_CLOSED
        status = _epoll.conn_status(self.handle)
        if status & _epoll.IS_BROKEN and not self.failure:
            failed = _epoll.poller_ended(self.poller)
            if failed:
                self._fail(POLLER_ENDED - failed)
            else:
                self._fail(_code_of(status))
        return status


def _code_of(status: int) -> int:
    """Why a connection of that status is broken."""
    if status & _epoll.IS_IDLE_END:
        return EIDLE
    if status & _epoll.IS_FAILED:
        return ETLS
    return ECUT if status & _epoll.IS_CUT else -ECONNRESET


def _notify_closing(sock: socket.socket) -> None:
    """Wakes tasks that wait for the raw socket by the event loop's own means."""
    try:
        anyio.notify_closing(sock)
    except Exception:  # noqa: BLE001 -- no event loop here, or another one: nobody to tell
        return

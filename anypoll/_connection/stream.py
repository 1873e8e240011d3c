"""A connection as an AnyIO socket stream: its public classes.

A :class:`Connection` is an :class:`anyio.abc.SocketStream`, and any code written for one can use
it. It also has a nocopy ``reader`` and ``writer`` over the same buffers: ``receive()`` takes what
the reader has buffered, and ``send()`` first sends what the writer has pending.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from anyio import BusyResourceError

from .. import _native
from .._buffers.arguments import Limits, seconds
from .._buffers.reader import Reader
from .._buffers.writer import Writer
from .._epoll import IS_BROKEN, IS_EOF, SEQPACKET, TCP, UNIX, ConnectionStatistics
from .._loop.callbacks import Callback, Callbacks
from .core import Core
from .requests import Function, Requests, unserved
from .sockets import SocketSurface, set_nodelay, validated
from .unix import DescriptorStream, MessageCore, UNIXCore

if TYPE_CHECKING:
    from typing import Self

    from .._loop.hub import Hub

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_DEFAULT = Limits()


class Connection(_native.Stream, SocketSurface):
    """A connected stream socket, served by a poller.

    Connections come from a server, a listener, :func:`anypoll.connect_tcp` and the like, or from
    :meth:`from_socket`. A connection belongs to the event loop in which it was created: other loops
    get ``RuntimeError``. One task may read while another writes; a second task that reads, or a
    second one that writes, gets ``BusyResourceError``.
    """

    __slots__ = ("_core", "_server", "_writer", "state")

    _reader: Reader

    state: Any
    """any object of the user's, initially ``None``"""

    def __init__(self, core: Core) -> None:
        if not isinstance(core, Core):
            raise TypeError(
                f"a connection is made by from_socket() and its like, not of {type(core).__name__}"
            )
        self._core = core
        self._reader = core.reader = Reader(core)
        self._writer = core.writer = Writer(core)
        self._server: Any = None
        self.state = None

    @classmethod
    async def from_socket(cls, sock_or_fd: socket.socket | int) -> Self:
        """Takes over a connected stream socket, TCP or UNIX, and owns it from then on.

        :raises TypeError: if it is neither a socket nor a descriptor
        :raises ValueError: if it is not a connected stream socket of a supported family
        """
        families = (socket.AF_UNIX,) if issubclass(cls, UNIXConnection) else _FAMILIES
        sock = validated(sock_or_fd, families=families, listening=False)
        connection: Any = open_socket(sock)
        return connection  # type: ignore[no-any-return]

    _next_message = SocketSurface.__anext__

    def __repr__(self) -> str:
        state = "closed" if self._core.closed else f"fd={self.fileno()}"
        return f"<anypoll.{type(self).__name__} {state}>"

    # --- nocopy ----------------------------------------------------------------------------------

    @property
    def reader(self) -> Reader:
        """The nocopy input."""
        return self._reader

    @property
    def writer(self) -> Writer:
        """The nocopy output."""
        return self._writer

    # --- AnyIO's stream --------------------------------------------------------------------------
    # receive() and send() are native

    async def send_eof(self) -> None:
        """Flushes, then ends this side; the peer's data can still be read. Idempotent."""
        await self._core.send_eof()

    async def aclose(self) -> None:
        """Closes the connection. A checkpoint.

        From now on every other call raises ``ClosedResourceError``, including calls that are
        waiting. The writer's pending output is drained first, for at most ``write_timeout``, unless
        the scope is cancelled. The descriptor is closed on every way out. Then the close callbacks
        run, unless the connection has a handler, whose server runs them; a cancellation takes
        effect after them.
        """
        await self._core.aclose()

    # --- timeouts --------------------------------------------------------------------------------

    @property
    def _source(self) -> Any:
        """Who answers reads and writes: the core, unless that has a TLS session."""
        return self._reader._core

    @property
    def read_timeout(self) -> float | None:
        """Seconds that one read call may take in all; ``None``: forever.

        It works like a cancel scope around the call: outer scopes keep working, nothing is lost,
        and the connection stays usable after the ``ReadTimeout``. The time is real time: Trio's
        ``MockClock`` does not move it.
        """
        return self._source.read_timeout  # type: ignore[no-any-return]

    @read_timeout.setter
    def read_timeout(self, value: float | None) -> None:
        self._source.read_timeout = seconds(value, "read_timeout")

    @property
    def write_timeout(self) -> float | None:
        """Seconds that one ``send()`` or ``flush()`` may take; ``None``: forever.

        After a ``WriteTimeout`` the bytes not sent are still pending and go out first; ``abort()``
        is the way to give up.
        """
        return self._source.write_timeout  # type: ignore[no-any-return]

    @write_timeout.setter
    def write_timeout(self, value: float | None) -> None:
        self._source.write_timeout = seconds(value, "write_timeout")

    @property
    def idle_timeout(self) -> float | None:
        """Seconds without a byte in or out after which the connection is ended, whatever the
        handler is doing; ``None``: never. Setting it restarts the clock.

        The socket is then shut down, pending output is dropped, ``is_active`` becomes False, and
        the close callbacks run. Buffered input can still be read; after that, reads and writes
        raise :class:`IdleTimeout`. A write that the peer does not take is not traffic.
        """
        return self._core.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, value: float | None) -> None:
        self._core.set_idle_timeout(seconds(value, "idle_timeout"))

    # --- state -----------------------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """False as soon as the connection is known to be dead or closed; does no I/O. A peer that
        has only ended its own side does not make it False. Any thread.
        """
        return not self._core.closed and not self._core.status() & IS_BROKEN

    @property
    def at_eof(self) -> bool:
        """Whether the peer has ended its side and everything has been read."""
        core = self._core
        return not core.closed and bool(core.status() & IS_EOF) and not len(self._reader)

    @property
    def server(self) -> Any:
        """The :class:`anypoll.Server` that accepted the connection, or ``None``."""
        return self._server

    def statistics(self) -> ConnectionStatistics:
        """Counts of bytes and system calls; works after the close too. Any thread."""
        return self._core.statistics()

    # --- actions ---------------------------------------------------------------------------------

    def abort(self) -> None:
        """Closes at once with an RST; pending output is dropped. Counts as this side's close.
        Idempotent. Any thread; outside the event loop's, it takes effect once the loop gets to it.
        """
        self._core.abort()

    def add_close_callback(self, callback: Callback) -> None:
        """Has ``callback`` called once, when the connection has ended. A plain function.

        Callbacks run last in, first out. In a server they run when the handler has ended and the
        connection is closed; elsewhere in :meth:`aclose`, which waits for them. After
        :meth:`abort`, :meth:`detach`, an idle end or a forgotten connection, or if the connection
        is already closed, plain callbacks are called at once, and async ones in a background task.
        All are shielded from cancellation. Each may take the ``shutdown_timeout`` of its server, or
        10 seconds elsewhere; then it is cancelled. That, and any exception from a callback, is
        logged (logger ``anypoll.connection``) and does not stop the others.

        :param callback: a plain or async callable that takes nothing, or else the connection
        :raises TypeError: for anything else
        :raises RuntimeError: outside the connection's event loop
        """
        core = self._core
        core._check_loop()
        if core.callbacks is None:
            core.callbacks = Callbacks(core.hub, core.limits.close_callback_timeout)
        core.callbacks.add(self, callback, late=core.over)

    def set_on_request(self, function: Function) -> None:
        """Puts the connection into request mode, or replaces the function there. A plain function.

        From now on ``function(connection)`` is called in a task whenever there is input and no call
        is running, including input that is already there. It must consume input, or wait for more
        through the reader; if it returns without consuming any, it is called again only when more
        has arrived. Between calls there is no task, and nobody else may read. What a call has
        written is flushed when it returns.

        The connection is closed when a call has raised; when the peer has ended its side and
        nothing is unread, or a call has consumed nothing of what is (pending output is sent first,
        for at most ``write_timeout``, or 10 seconds if that is unset); and when it is broken. In a
        server with a handler, the end of the handler closes it instead. An exception is logged
        (logger ``anypoll.connection``, in a server ``anypoll.server``) unless a peer can cause it.

        :param function: a coroutine function of one argument, the connection
        :raises TypeError: if it is not callable
        :raises ClosedResourceError: if the connection is closed
        :raises BusyResourceError: while another task is reading
        :raises RuntimeError: outside the connection's event loop
        """
        core = self._core
        if not callable(function):
            raise TypeError(f"function must be a coroutine function, not {function!r}")
        core._check_usable()
        core._check_loop()
        core._check_plain("reading from")
        if core.requests is not None:
            core.requests.replace(function)
            return
        if core._reading:
            raise BusyResourceError("reading from")
        server = self._server
        owner = unserved(core.hub) if server is None else server._owner_of_requests()
        core.requests = Requests(self, core, function, owner)
        core.requests.start()

    async def wait_writable(self) -> None:
        """Waits until a ``send()`` would probably not have to wait. A checkpoint.

        :raises BusyResourceError: while another task is sending
        """
        await self._core.wait_writable()

    def detach(self) -> tuple[socket.socket, bytes]:
        """Takes the socket out of the pollers, still open, with the bytes already read ahead.

        Afterwards the connection counts as closed, and its close callbacks run.

        :raises BusyResourceError: with pending output or a waiting task
        """
        return self._core.detach()


class UNIXConnection(Connection, DescriptorStream):
    """A :class:`Connection` over a UNIX socket, which can also carry file descriptors.

    Over a ``SOCK_SEQPACKET`` socket it carries messages, not a stream: ``send()`` sends one, and
    ``receive()`` returns one, truncated to ``max_bytes``. ``reader`` and ``writer`` raise
    ``ValueError`` there.
    """

    __slots__ = ()


# --- opening -------------------------------------------------------------------------------------


def new_connection(
    fd: int, kind: int, limits: Limits, peer: bytes | None = None, hub: Hub | None = None
) -> Connection:
    """A connection that no poller watches yet; owns ``fd`` from the call on.

    :param hub: that of the running event loop, if the caller knows it
    :raises OSError: if resources are exhausted
    """
    if kind == TCP:
        return Connection(Core(fd, kind, limits, peer=peer, hub=hub))
    if kind == UNIX:
        return UNIXConnection(UNIXCore(fd, kind, limits, peer=peer, hub=hub))
    connection = UNIXConnection(MessageCore(fd, kind, limits, peer=peer, hub=hub))
    connection._writer._shut = True
    return connection


def kind_of(sock: socket.socket) -> int:
    """The kind of socket, in the core's terms."""
    if sock.family != socket.AF_UNIX:
        return TCP
    return SEQPACKET if sock.type == socket.SOCK_SEQPACKET else UNIX


def open_socket(sock: socket.socket, limits: Limits = _DEFAULT) -> Connection:
    """A connection over a connected, non-blocking socket, which it keeps as its raw socket.

    :raises OSError: if resources are exhausted; the socket is closed then
    """
    connection = _over(sock, limits)
    connection._core.adopt_raw(sock)
    connection._core.register()
    return connection


def open_fd(sock: socket.socket, limits: Limits = _DEFAULT) -> Connection:
    """Like :func:`open_socket`, but without keeping the socket object: it costs memory, and is
    created again on demand.
    """
    connection = _over(sock, limits)
    sock.detach()
    connection._core.register()
    return connection


def _over(sock: socket.socket, limits: Limits) -> Connection:
    kind = kind_of(sock)
    if kind == TCP:
        try:
            set_nodelay(sock, True)
        except BaseException:
            sock.close()
            raise
    try:
        return new_connection(sock.fileno(), kind, limits)
    except BaseException:
        sock.detach()  # the descriptor has been closed
        raise


def socketpair() -> tuple[Connection, Connection]:
    """Two connections, connected to each other. A plain function.

    :raises OSError: if resources are exhausted
    :raises RuntimeError: outside an event loop
    """
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    try:
        first = open_fd(a)
    except BaseException:
        b.close()
        raise
    try:
        return first, open_fd(b)
    except BaseException:
        first._core.close()
        raise

"""A TLS connection: AnyIO's ``TLSStream`` with timeouts, a nocopy reader and a nocopy writer."""

from __future__ import annotations

import ssl
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

import anyio
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from anyio.streams.tls import TLSStream

from .._buffers.arguments import flat_view, positive, seconds
from .._buffers.errors import ORIGIN, REASON, IdleTimeout, ReadTimeout
from .._connection.endpoint import LONG
from .._connection.stream import Connection
from .._epoll import SEQPACKET, ConnectionStatistics
from .._loop.callbacks import Callback, _needs_an_argument
from .engine import Engine
from .input import Source
from .output import Sink, within

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from typing_extensions import Buffer

    from .._connection.sockets import Address
    from ..nocopy import Reader, Writer

__all__ = ("TLSConnection",)

#: Seconds that a closing handshake may take if there is no ``write_timeout``.
CLOSE_TIMEOUT = 10.0

#: What ends a closing handshake early: the peer has gone, or somebody else has closed.
_GONE = (BrokenResourceError, ClosedResourceError, EndOfStream, IdleTimeout, ssl.SSLError)


class TLSConnection(TLSStream):
    """An AnyIO ``TLSStream`` over a :class:`Connection`, made by :meth:`wrap`.

    It has a nocopy ``reader`` and ``writer`` over the decrypted bytes, and timeouts around its
    operations, as a :class:`Connection` has. One task may read and another write at the same time.
    The connection below is its own from then on: nobody else may read or write there.

    Unlike AnyIO's, a session survives that a call was cancelled or timed out, ``send()`` too. What
    a peer does wrong after the handshake is a ``BrokenResourceError``, with the ``ssl.SSLError`` as
    its cause.
    """

    def __init__(
        self,
        transport_stream: Connection,
        standard_compatible: bool,
        _ssl_object: ssl.SSLObject,
        _read_bio: ssl.MemoryBIO,
        _write_bio: ssl.MemoryBIO,
    ) -> None:
        connection = _connection(transport_stream)
        super().__init__(connection, standard_compatible, _ssl_object, _read_bio, _write_bio)
        self._connection = connection
        self._engine = Engine(
            connection._core, _ssl_object, _read_bio, _write_bio, standard_compatible
        )
        self._sink = Sink(self._engine, self)
        self._source = Source(self._engine, self._sink, self)
        self._closing = False
        self._unwrapped = False

    @classmethod
    async def wrap(  # type: ignore[override]  # AnyIO's takes any stream
        cls,
        transport_stream: Connection,
        *,
        server_side: bool | None = None,
        hostname: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        standard_compatible: bool = True,
    ) -> Self:
        """Does the handshake. What the connection has read ahead belongs to it, and what its writer
        has pending goes out before it.

        The ``read_timeout`` and ``write_timeout`` of the connection become those of the session,
        and the connection has none then. The handshake is one read. If it fails the connection has
        its timeouts back, and stays open.

        :param transport_stream: a :class:`Connection`
        :param server_side: whether this is the server; ``None``: if there is no ``hostname``
        :param hostname: of the peer, to be checked
        :param ssl_context: ``None``: one with the defaults of :mod:`ssl`
        :param standard_compatible: whether each side must end with a ``close_notify``, so that
            nobody else can cut the stream off unnoticed; ``False`` for protocols that tell where
            they end
        :raises ssl.SSLError: if the handshake fails: the certificate, no common cipher, no TLS
        :raises ReadTimeout: after the connection's ``read_timeout`` seconds
        :raises BrokenResourceError: if the peer has gone; ``EndOfStream``, if it has ended and this
            is not ``standard_compatible``
        :raises ClosedResourceError: if the connection was closed, or has ended its side
        :raises BusyResourceError: while another task is reading or sending
        :raises TypeError, ValueError: for anything but a :class:`Connection` over a byte stream,
            and other nonsense
        """
        connection = _connection(transport_stream)
        check_tls(ssl_context, hostname, "hostname")
        _check_hostname(server_side, hostname, ssl_context)
        _check_idle(connection)
        timeouts = connection.read_timeout, connection.write_timeout
        connection.read_timeout = connection.write_timeout = None
        shake_hands = partial(
            super().wrap,
            connection,
            server_side=server_side,
            hostname=hostname,
            ssl_context=ssl_context,
            standard_compatible=standard_compatible,
        )
        try:
            stream: Any = await within(
                connection._core, timeouts[0], shake_hands, ReadTimeout, "no TLS handshake"
            )
        except BaseException as exc:
            connection.read_timeout, connection.write_timeout = timeouts
            # not the end of the stream or the server, nor the program's own close
            if hasattr(exc, ORIGIN) and not isinstance(exc, (ClosedResourceError, EndOfStream)):
                exc.__dict__[REASON] = "tls_handshake"
            raise
        stream._engine.established = True
        stream._source.timeout, stream._sink.timeout = timeouts
        return stream  # type: ignore[no-any-return]

    async def _call_sslobject_method(self, func: Callable[..., Any], *args: object) -> Any:
        """What AnyIO's ``wrap()`` does its handshake with."""
        result = await self._engine.run(func, *args)
        await self._connection._core.flush()
        return result

    def __repr__(self) -> str:
        return f"<anypoll.{type(self).__name__} over {self._connection!r}>"

    # --- the nocopy side -------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The connection below, which carries the ciphertext."""
        return self._connection

    @property
    def reader(self) -> Reader:
        """The nocopy input: decrypted bytes. ``receive()`` takes from the same buffer."""
        return self._source.reader

    @property
    def writer(self) -> Writer:
        """The nocopy output: bytes to be encrypted. It is flushed by itself as a connection's is:
        when the reader has to wait, when a server's handler ends, and in ``aclose()``.
        """
        return self._sink.writer

    def peek(self, n: SupportsIndex, /) -> Coroutine[Any, Any, memoryview]:
        """:meth:`anypoll.nocopy.Reader.peek`."""
        return self.reader.peek(n)

    def next(self, n: SupportsIndex, /) -> Coroutine[Any, Any, memoryview]:
        """:meth:`anypoll.nocopy.Reader.next`."""
        return self.reader.next(n)

    def skip(self, n: SupportsIndex, /) -> Coroutine[Any, Any, None]:
        """:meth:`anypoll.nocopy.Reader.skip`."""
        return self.reader.skip(n)

    def until(
        self, delimiter: bytes, *, max_bytes: SupportsIndex = 65536
    ) -> Coroutine[Any, Any, memoryview]:
        """:meth:`anypoll.nocopy.Reader.until`."""
        return self.reader.until(delimiter, max_bytes=max_bytes)

    # --- AnyIO's stream --------------------------------------------------------------------------

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """At least one and at most ``max_bytes`` bytes, as soon as there are any. A checkpoint.

        :raises EndOfStream: when the peer has ended its side with a ``close_notify``, or at all, if
            this is not ``standard_compatible``
        :raises ReadTimeout: after ``read_timeout`` seconds; nothing is lost
        :raises BrokenResourceError: after a reset, an end without ``close_notify``, or something
            that is no TLS; with the ``OSError`` or ``ssl.SSLError`` as its cause
        :raises ClosedResourceError, BusyResourceError: as :meth:`Connection.receive`
        :raises ValueError, TypeError: for ``max_bytes`` below 1, or no integer
        """
        return await self._source.receive(positive(max_bytes, "max_bytes"))

    async def send(self, item: Buffer) -> None:
        """Sends what the writer has pending, then ``item``. A checkpoint.

        Returns when the kernel has everything; ``item`` may be changed then. If the call is
        cancelled or times out before anything of ``item`` was encrypted, none of it will be sent;
        else the rest still goes out, before anything that is sent later.

        :param item: bytes, or anything bytes-like
        :raises WriteTimeout: after ``write_timeout`` seconds
        :raises BrokenResourceError, ClosedResourceError, BusyResourceError: as
            :meth:`Connection.send`
        :raises TypeError: if ``item`` is not bytes-like
        :raises ValueError: if its bytes do not lie side by side
        """
        await self._sink.send(item if type(item) is bytes else flat_view(item, "item"))

    async def send_eof(self) -> None:
        """Flushes, and ends this side with a ``close_notify``; what the peer sends can still be
        read. Idempotent.

        :raises NotImplementedError: below TLS 1.3, where the peer would end its side too
            (RFC 5246, section 7.2.1)
        """
        version = self._engine.ssl.version()
        if version != "TLSv1.3":
            text = f"send_eof() requires at least TLSv1.3; current session uses {version}"
            raise self._connection._core._own(NotImplementedError(text))  # the peer has chosen it
        await self._sink.send_eof()

    async def unwrap(self) -> tuple[Connection, bytes]:
        """Flushes, and does the closing handshake. The connection stays open, and has its timeouts
        back; what was decrypted and not consumed can still be read here.

        :return: the connection, and what the peer has sent on it behind the end of the session
        :raises ReadTimeout: after ``read_timeout`` seconds
        :raises BusyResourceError: while another task is reading or sending
        :raises MessageTooLarge: if the peer sends more than ``read_limit`` bytes and does not end
        """
        if self._source.is_busy:
            raise BusyResourceError("reading from")
        await self._sink.send_eof()
        core, to_the_end = self._connection._core, self._source.to_the_end
        await within(core, self.read_timeout, to_the_end, ReadTimeout, "no closing handshake")
        self._unwrapped = True
        self._connection._core.draining = self._engine.ending
        self._connection.read_timeout = self.read_timeout
        self._connection.write_timeout = self.write_timeout
        return self._connection, self._engine.leftover()

    async def aclose(self) -> None:
        """Closes the session and the connection. A checkpoint.

        Every other call raises ``ClosedResourceError`` from now on, also one that is waiting. What
        the writer has pending is sent, then a ``close_notify``; if this is ``standard_compatible``,
        that of the peer is waited for, and what still comes before it is thrown away, but not much
        more than 64 KiB of it. All that may take ``write_timeout``, or else 10 seconds, and is left
        out if another task is sending, or has given up a ``send()`` of which something is still
        unsent. What the peer does meanwhile is no error. The descriptor is closed on every way out.
        """
        self._connection._core._check_loop()
        first, self._closing = not self._closing, True
        try:
            if first and not self._unwrapped and not self._connection._core.closed:
                timeout = CLOSE_TIMEOUT if self.write_timeout is None else self.write_timeout
                await self._say_goodbye(timeout, wait=self.standard_compatible)
        finally:
            self._shut()
            if not self._unwrapped:
                self._connection._core.close()
            await self._connection.aclose()

    async def _say_goodbye(self, timeout: float, *, wait: bool) -> None:
        self._engine.closed = self._sink.writer._shut = True
        with anyio.move_on_after(min(timeout, LONG)), suppress(*_GONE):
            await self._sink.close(wait=wait)

    def _shut(self) -> None:
        self._engine.closed = True
        self._source.shut()
        self._sink.writer._close()

    async def _finish(self, timeout: float) -> None:
        """The end of a server's handler that has returned: as ``Core.finish()``, with a
        ``close_notify``.
        """
        deadline = anyio.current_time() + timeout
        if not self._engine.closed:
            await self._say_goodbye(timeout, wait=False)
        await self._connection._core.finish(max(deadline - anyio.current_time(), 0))

    # --- timeouts --------------------------------------------------------------------------------

    @property
    def read_timeout(self) -> float | None:
        """Seconds that one read call may take as a whole, as a cancel scope around it: nothing is
        lost, and the session stays usable after the ``ReadTimeout``. ``None`` for ever.
        """
        return self._source.timeout

    @read_timeout.setter
    def read_timeout(self, value: float | None) -> None:
        self._source.timeout = seconds(value, "read_timeout")

    @property
    def write_timeout(self) -> float | None:
        """Seconds that one ``send()`` or ``flush()`` may take; ``None`` for ever. After a
        ``WriteTimeout`` the bytes that were not sent are still pending and go out first.
        """
        return self._sink.timeout

    @write_timeout.setter
    def write_timeout(self, value: float | None) -> None:
        self._sink.timeout = seconds(value, "write_timeout")

    @property
    def idle_timeout(self) -> float | None:
        """That of the connection, see :attr:`Connection.idle_timeout`."""
        return self._connection.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, value: float | None) -> None:
        self._connection.idle_timeout = value

    # --- of the connection -----------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """That of the connection: any object of the user's."""
        return self._connection.state

    @state.setter
    def state(self, value: Any) -> None:
        self._connection.state = value

    @property
    def server(self) -> Any:
        """The :class:`anypoll.Server` the connection was accepted by, or ``None``."""
        return self._connection.server

    @property
    def is_active(self) -> bool:
        """False as soon as the session or its connection is known to be dead or closed."""
        engine = self._engine
        return not engine.closed and engine.failure is None and self._connection.is_active

    @property
    def at_eof(self) -> bool:
        """Whether the peer has ended its side and everything was read."""
        unread = len(self.reader)  # this looks at what has arrived
        return self._engine.ended and not unread and not self._engine.closed

    @property
    def local_address(self) -> Address:
        """See :attr:`Connection.local_address`."""
        return self._connection.local_address

    @property
    def remote_address(self) -> Address:
        """See :attr:`Connection.remote_address`."""
        return self._connection.remote_address

    def statistics(self) -> ConnectionStatistics:
        """Those of the connection: encrypted bytes are counted. Any thread."""
        return self._connection.statistics()

    def abort(self) -> None:
        """See :meth:`Connection.abort`."""
        if self._connection._core.hands_over(self.abort):
            return
        self._closing = True
        self._shut()
        self._connection.abort()

    def add_close_callback(self, callback: Callback) -> None:
        """As :meth:`Connection.add_close_callback`; a callback of one argument gets this stream."""
        function: Any = callback  # which may be anything
        wants_it = callable(function) and _needs_an_argument(function)
        self._connection.add_close_callback(partial(function, self) if wants_it else function)


def _connection(stream: object) -> Connection:
    if not isinstance(stream, Connection):
        kind = type(stream).__name__
        raise TypeError(f"transport_stream must be an anypoll Connection, not {kind}")
    if stream._core.kind == SEQPACKET:
        raise ValueError("transport_stream must be a stream of bytes: TLS has no messages")
    return stream


def check_tls(ssl_context: object, hostname: object, name: str) -> None:
    """:raises TypeError: for what the handshake could not use"""
    if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
        kind = type(ssl_context).__name__
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {kind}")
    if hostname is not None and not isinstance(hostname, (str, bytes)):
        raise TypeError(f"{name} must be a str or None, not {type(hostname).__name__}")


def _check_idle(connection: Connection) -> None:
    """Before a byte is sent: one that comes to nothing must not leave half a handshake pending."""
    core = connection._core
    core._check_usable()
    if core._reading:
        raise BusyResourceError("reading from")
    if core._writing:
        raise BusyResourceError("writing to")
    if core.writer._shut:
        raise core.why_unwritable()


def _check_hostname(
    server_side: bool | None, hostname: str | None, context: ssl.SSLContext | None
) -> None:
    """An ``SSLObject``, unlike an ``SSLSocket``, would silently check no name."""
    if server_side is False and not hostname and (context is None or context.check_hostname):
        raise ValueError("hostname must be given: the context checks it")

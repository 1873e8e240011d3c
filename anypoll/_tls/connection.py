"""A TLS connection: AnyIO's ``TLSStream`` with timeouts, a nocopy reader and a nocopy writer."""

from __future__ import annotations

import ssl
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import BusyResourceError, ClosedResourceError, EndOfStream
from anyio.streams.tls import TLSStream

from .. import _native
from .._buffers.arguments import seconds
from .._buffers.errors import ORIGIN, REASON, ReadTimeout
from .._connection.sockets import AnypollAttribute
from .._connection.stream import Connection
from .._epoll import SEQPACKET, ConnectionStatistics
from .._loop.callbacks import Callback, _needs_an_argument
from . import openssl
from .memory.session import MemorySession
from .native import NativeSession
from .session import NO_HANDSHAKE, within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from .._connection.sockets import Address
    from ..nocopy import Reader, Writer
    from .session import Session, TLSHandshake

__all__ = ("TLSConnection",)


class TLSConnection(_native.Stream, TLSStream):
    """An AnyIO ``TLSStream`` over a :class:`Connection`, made by :meth:`wrap`.

    It has a nocopy ``reader`` and ``writer`` over the decrypted bytes, and timeouts around its
    operations, like a :class:`Connection`. One task may read while another writes. It owns the
    connection below: nobody else may read or write there.

    ``receive()``, ``send()`` and the calls of the reader raise what a connection's raise. The peer
    has ended its side when it has sent a ``close_notify``; or in any way, if the session is not
    ``standard_compatible``. An end without it, or anything that is not TLS, after the handshake
    raises ``BrokenResourceError``, with the ``ssl.SSLError`` as its cause.

    Unlike AnyIO's, a session survives cancelled and timed-out calls, including ``send()``: if that
    is abandoned before any of its item was encrypted, none of it will be sent; otherwise the rest
    still goes out, before anything sent later.
    """

    _reader: Reader

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
        self._session: Session
        pointer = openssl.ssl_pointer(_ssl_object) if _is_for_the_core(_ssl_object) else 0
        if pointer:
            self._session = NativeSession(
                connection, _ssl_object, pointer, standard_compatible=standard_compatible
            )
        else:
            self._session = MemorySession(
                connection._core, self, _ssl_object, _read_bio, _write_bio, standard_compatible
            )
        self._ssl_object = self._session.ssl
        self._reader = self._session.reader
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
        """Performs the handshake. Input that the connection has read ahead is part of it, and the
        writer's pending output goes out first.

        The connection's ``read_timeout`` and ``write_timeout`` become those of the session, and the
        connection then has none. The handshake counts as one read. If it fails, the connection gets
        its timeouts back, and stays open, but is of no use any more.

        :param transport_stream: a :class:`Connection`
        :param server_side: whether this is the server; ``None``: if there is no ``hostname``
        :param hostname: the peer's name, to be checked
        :param ssl_context: ``None``: one with the defaults of :mod:`ssl`
        :param standard_compatible: whether each side must end with a ``close_notify``, so that
            nobody else can truncate the stream unnoticed; ``False`` for protocols that mark their
            own end
        :raises ssl.SSLError: if the handshake fails: the certificate, no common cipher, no TLS
        :raises ReadTimeout: after the connection's ``read_timeout`` seconds
        :raises BrokenResourceError: if the peer has gone; ``EndOfStream`` if it has ended its side
            and this is not ``standard_compatible``
        :raises ClosedResourceError: if the connection was closed, or has ended its side
        :raises BusyResourceError: while another task is reading or sending
        :raises TypeError, ValueError: for anything but a :class:`Connection` over a byte stream,
            and for other invalid arguments
        """
        connection = _connection(transport_stream)
        check_tls(ssl_context, hostname, "hostname")
        _check_hostname(server_side, hostname, ssl_context)
        _check_idle(connection)
        core = connection._core
        timeouts = core.read_timeout, core.write_timeout
        core.read_timeout = core.write_timeout = None
        stream: Any
        try:
            if hostname is None and server_side and type(ssl_context) is ssl.SSLContext:
                bios = ssl.MemoryBIO(), ssl.MemoryBIO()
                ssl_object = ssl_context.wrap_bio(*bios, server_side=True)
                stream = cls(connection, standard_compatible, ssl_object, *bios)
                await stream._session.shake_hands(timeouts[0])
            else:
                shake_hands = partial(
                    super().wrap,
                    connection,
                    server_side=server_side,
                    hostname=hostname,
                    ssl_context=ssl_context,
                    standard_compatible=standard_compatible,
                )
                stream = await within(core, timeouts[0], shake_hands, ReadTimeout, NO_HANDSHAKE)
        except BaseException as exc:
            core.read_timeout, core.write_timeout = timeouts
            # Not the end of the stream or the server, nor the program's own close.
            if hasattr(exc, ORIGIN) and not isinstance(exc, (ClosedResourceError, EndOfStream)):
                exc.__dict__[REASON] = "tls_handshake"
            raise
        session = stream._session
        session.read_timeout, session.write_timeout = timeouts
        return stream  # type: ignore[no-any-return]

    async def _call_sslobject_method(self, *_: object) -> Any:
        """AnyIO's ``wrap()`` performs its handshake with this."""
        await self._session.shake_hands(None)

    def __repr__(self) -> str:
        return f"<anypoll.{type(self).__name__} over {self._connection!r}>"

    # --- nocopy ----------------------------------------------------------------------------------

    @property
    def connection(self) -> Connection:
        """The connection below, which carries the ciphertext."""
        return self._connection

    @property
    def reader(self) -> Reader:
        """The nocopy input: decrypted bytes. ``receive()`` takes from the same buffer."""
        return self._reader

    @property
    def writer(self) -> Writer:
        """The nocopy output: bytes to be encrypted. Like a connection's, it is flushed by itself
        when the reader has to wait, when a server's handler ends, and in ``aclose()``.
        """
        return self._session.writer

    # --- AnyIO's stream --------------------------------------------------------------------------
    # receive() and send() are native

    _next_message = TLSStream.__anext__

    async def send_eof(self) -> None:
        """Flushes, and ends this side with a ``close_notify``; the peer's data can still be read.
        Idempotent.

        :raises NotImplementedError: below TLS 1.3, where the peer would end its side too
            (RFC 5246, section 7.2.1)
        """
        version = self._ssl_object.version()
        if version != "TLSv1.3":
            text = f"send_eof() requires at least TLSv1.3; current session uses {version}"
            raise self._connection._core._own(NotImplementedError(text))  # the peer has chosen it
        await self._session.send_eof()

    async def unwrap(self) -> tuple[Connection, bytes]:
        """Flushes, and performs the closing handshake. The connection stays open, and gets its
        timeouts back; decrypted bytes not yet consumed can still be read here.

        :return: the connection, and the bytes that the peer sent after the end of the session
        :raises ReadTimeout: after ``read_timeout`` seconds
        :raises BusyResourceError: while another task is reading or sending
        :raises MessageTooLarge: if the peer sends more than ``read_limit`` bytes without ending
        """
        if self._unwrapped:
            await self._connection._core.hub.checkpoint()
            return self._connection, b""
        if self._session.is_reading:
            raise BusyResourceError("reading from")
        await self._session.send_eof()
        core, to_the_end = self._connection._core, self._session.to_the_end
        await within(core, self.read_timeout, to_the_end, ReadTimeout, "no closing handshake")
        timeouts = self.read_timeout, self.write_timeout
        rest = await self._session.part()
        self._unwrapped = True
        self._connection.read_timeout, self._connection.write_timeout = timeouts
        return self._connection, rest

    async def aclose(self) -> None:
        """Closes the session and the connection. A checkpoint.

        From now on every other call raises ``ClosedResourceError``, including calls that are
        waiting. The writer's pending output is sent, then a ``close_notify``. If this is
        ``standard_compatible``, the peer's is awaited; what precedes that is discarded, but not
        much more than 64 KiB of it. All this may take ``write_timeout``, or 10 seconds if that is
        unset, and is skipped if another task is sending, or if an abandoned ``send()`` still has
        unsent output. Errors that the peer causes meanwhile are ignored. The descriptor is closed
        on every way out.
        """
        self._connection._core._check_loop()
        first, self._closing = not self._closing, True
        try:
            if first and not self._unwrapped and not self._connection._core.closed:
                await self._session.close(wait=self.standard_compatible)
        finally:
            self._session.shut()
            if not self._unwrapped:
                self._connection._core.close()
            await self._connection.aclose()

    # --- timeouts --------------------------------------------------------------------------------

    @property
    def read_timeout(self) -> float | None:
        """Seconds that one read call may take in all, as if in a cancel scope: nothing is lost, and
        the session stays usable after the ``ReadTimeout``. ``None``: forever.
        """
        return self._session.read_timeout

    @read_timeout.setter
    def read_timeout(self, value: float | None) -> None:
        self._session.read_timeout = seconds(value, "read_timeout")

    @property
    def write_timeout(self) -> float | None:
        """Seconds that one ``send()`` or ``flush()`` may take; ``None``: forever. After a
        ``WriteTimeout`` the bytes not sent are still pending and go out first.
        """
        return self._session.write_timeout

    @write_timeout.setter
    def write_timeout(self, value: float | None) -> None:
        self._session.write_timeout = seconds(value, "write_timeout")

    @property
    def idle_timeout(self) -> float | None:
        """The connection's; see :attr:`Connection.idle_timeout`."""
        return self._connection.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, value: float | None) -> None:
        self._connection.idle_timeout = value

    # --- the connection's ------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The connection's: any object of the user's."""
        return self._connection.state

    @state.setter
    def state(self, value: Any) -> None:
        self._connection.state = value

    @property
    def server(self) -> Any:
        """The :class:`anypoll.Server` that accepted the connection, or ``None``."""
        return self._connection.server

    @property
    def handshake(self) -> TLSHandshake:
        """How long the handshake has taken, and whether it has resumed a session."""
        return self._session.handshake

    @property
    def is_active(self) -> bool:
        """False as soon as the session or its connection is known to be dead or closed."""
        session = self._session
        return not session.closed and not session.is_broken and self._connection.is_active

    @property
    def at_eof(self) -> bool:
        """Whether the peer has ended its side and everything has been read."""
        unread = len(self.reader)  # this looks at what has arrived
        return self._session.has_ended and not unread and not self._session.closed

    @property
    def local_address(self) -> Address:
        """See :attr:`Connection.local_address`."""
        return self._connection.local_address

    @property
    def remote_address(self) -> Address:
        """See :attr:`Connection.remote_address`."""
        return self._connection.remote_address

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """AnyIO's :class:`~anyio.streams.tls.TLSAttribute`, and those of the connection."""
        session = self._session
        return {**super().extra_attributes, AnypollAttribute.tls_native: lambda: session.native}

    def statistics(self) -> ConnectionStatistics:
        """The connection's, which count encrypted bytes. Any thread."""
        return self._connection.statistics()

    def abort(self) -> None:
        """See :meth:`Connection.abort`."""
        if self._connection._core.hands_over(self.abort):
            return
        self._closing = True
        self._session.shut()
        self._connection.abort()

    def add_close_callback(self, callback: Callback) -> None:
        """Like :meth:`Connection.add_close_callback`; a callback that takes an argument gets this
        stream.
        """
        function: Any = callback  # of any type, still unchecked
        wants_it = callable(function) and _needs_an_argument(function)
        self._connection.add_close_callback(partial(function, self) if wants_it else function)


def _is_for_the_core(ssl_object: object) -> bool:
    """Whether the core can have the session."""
    return isinstance(ssl_object, ssl.SSLObject) and openssl.why_not(ssl_object.context) is None


def _connection(stream: object) -> Connection:
    if not isinstance(stream, Connection):
        kind = type(stream).__name__
        text = f"transport_stream must be an anypoll Connection, not {kind}"
        if isinstance(stream, TLSConnection):
            text += "; for TLS in TLS there is anyio.streams.tls.TLSStream.wrap()"
        raise TypeError(text)
    if stream._core.kind == SEQPACKET:
        raise ValueError("transport_stream must be a stream of bytes: TLS has no messages")
    return stream


def check_tls(ssl_context: object, hostname: object, name: str) -> None:
    """:raises TypeError: for arguments that the handshake could not use"""
    if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
        kind = type(ssl_context).__name__
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {kind}")
    if hostname is not None and not isinstance(hostname, (str, bytes)):
        raise TypeError(f"{name} must be a str or None, not {type(hostname).__name__}")


def _check_idle(connection: Connection) -> None:
    """Checks before a byte is sent: a doomed attempt must not leave half a handshake pending."""
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
    """Requires a hostname: an ``SSLObject``, unlike an ``SSLSocket``, would silently check none."""
    if server_side is False and not hostname and (context is None or context.check_hostname):
        raise ValueError("hostname must be given: the context checks it")

"""An httpcore network backend: anypoll below its connection pools, and so below httpx.

It serves ``httpcore`` and its fork ``httpcore2`` (below ``httpx2``) alike. They have the same
interface, but each recognises only its own exceptions, on which it retries or replaces a
connection. So where both are installed, an exception raised here belongs to both.

Before each request a pool asks whether an idle connection is still good. httpcore's own backends
poll the descriptor for that; here the pollers have already read what arrived, including an end of
stream, and the answer costs no system call.

Plain connections use the connection's own timeouts. Over TLS a scope surrounds the operation: below
a ``TLSStream``, a ``TimeoutError`` would be taken for a broken connection.
"""

from __future__ import annotations

import importlib
import ssl
import sys
from collections.abc import Awaitable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream

import anypoll

__all__ = ("AnypollBackend", "AnypollStream", "AnypollTLSStream")

_READ_MOST = 2**30  # as much as OpenSSL can count
_LIBRARIES = ("httpcore", "httpcore2")


def _installed() -> list[ModuleType]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
    if not found:
        raise ModuleNotFoundError(
            "anypoll.integrations.httpcore needs httpcore or httpcore2", name=_LIBRARIES[0]
        )
    return found


if TYPE_CHECKING:
    import httpcore
    import httpcore2
    from httpcore import (
        ConnectError,
        ConnectTimeout,
        ReadError,
        ReadTimeout,
        WriteError,
        WriteTimeout,
    )

    # Each declares its own library's classes as results; the classes below return what is both.
    class AsyncNetworkBackend(  # type: ignore[misc]
        httpcore.AsyncNetworkBackend, httpcore2.AsyncNetworkBackend
    ): ...

    class AsyncNetworkStream(  # type: ignore[misc]
        httpcore.AsyncNetworkStream, httpcore2.AsyncNetworkStream
    ): ...

else:
    _libraries = _installed()

    def _of_all(name: str) -> type:
        """The class of that name, or a class derived from that of each library."""
        classes = tuple(getattr(library, name) for library in _libraries)
        if len(classes) == 1:
            return classes[0]
        return type(name, classes, {"__module__": __name__, "__doc__": f"{name} of all of them."})

    AsyncNetworkBackend = _of_all("AsyncNetworkBackend")
    AsyncNetworkStream = _of_all("AsyncNetworkStream")
    ConnectError = _of_all("ConnectError")
    ConnectTimeout = _of_all("ConnectTimeout")
    ReadError = _of_all("ReadError")
    ReadTimeout = _of_all("ReadTimeout")
    WriteError = _of_all("WriteError")
    WriteTimeout = _of_all("WriteTimeout")

_SocketOption = (
    tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
)

#: How a connection fails, apart from timeouts; an ``ssl.SSLError`` is an ``OSError``.
_FAILURES = (BrokenResourceError, ClosedResourceError, EndOfStream, OSError)


def _reason(exc: BaseException) -> str:
    """The reason for an exception: AnyIO's own have no text, but their causes do."""
    return str(exc) or str(exc.__cause__ or "") or type(exc).__name__


def _translated(kind: type[Exception], exc: Exception) -> Exception:
    """The httpcore exception for one of the connection's, with its text and its attributes, which
    tell a server that it is about one of its own connections.
    """
    error = kind(_reason(exc))
    error.__dict__.update(exc.__dict__)
    return error


class AnypollBackend(AsyncNetworkBackend):
    """Opens the connections of a pool: ``AsyncConnectionPool(network_backend=AnypollBackend())``.

    It has no state: one backend may serve any number of pools, in any event loops.
    """

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> AnypollStream:
        """Connects to a TCP server, at the first of its addresses that answers.

        :param timeout: seconds for everything, including name resolution
        :param local_address: the host to connect from
        :param socket_options: arguments of ``setsockopt``; set once connected
        :raises httpcore.ConnectTimeout: after ``timeout`` seconds
        :raises httpcore.ConnectError: if no address could be connected, or an option is refused
        :raises ValueError, TypeError: for invalid arguments
        """
        options = _checked(socket_options)
        connecting = anypoll.connect_tcp(host, port, local_host=local_address, timeout=timeout)
        return await _opened(connecting, options)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> AnypollStream:
        """Connects to a UNIX socket; otherwise like :meth:`connect_tcp`."""
        options = _checked(socket_options)
        return await _opened(anypoll.connect_unix(path, timeout=timeout), options)

    async def sleep(self, seconds: float) -> None:
        """Sleeps between attempts to connect."""
        _check_timeout(seconds, "seconds")
        await anyio.sleep(seconds)


def _checked(options: Iterable[_SocketOption] | None) -> list[_SocketOption]:
    """Validates the form of options; only a socket will show whether the kernel takes them."""
    if options is None:
        return []
    if not isinstance(options, Iterable):
        raise TypeError(f"socket_options must be iterable, not {type(options).__name__}")
    known = list(options)
    option: Any
    for option in known:
        if not isinstance(option, (tuple, list)) or len(option) not in (3, 4):
            raise TypeError("socket_options must be tuples, the arguments of setsockopt()")
        for part in option:
            _check_part(part)
    return known


def _check_part(part: object) -> None:
    if isinstance(part, int):
        if not -(2**31) <= part < 2**31:  # Python would raise an OverflowError
            raise ValueError("socket_options must be made of numbers of 32 bits")
    elif part is not None and not isinstance(part, (bytes, bytearray)):
        raise TypeError(
            f"socket_options must be made of integers and bytes, not {type(part).__name__}"
        )


async def _opened(
    connecting: Awaitable[anypoll.Connection], options: list[_SocketOption]
) -> AnypollStream:
    try:
        connection = await connecting
        try:
            for option in options:
                connection.extra(SocketAttribute.raw_socket).setsockopt(*option)
        except BaseException:
            connection.abort()
            raise
    except TimeoutError as exc:
        raise ConnectTimeout(_reason(exc)) from exc
    except OSError as exc:
        raise ConnectError(_reason(exc)) from exc
    return AnypollStream(connection)


class AnypollStream(AsyncNetworkStream):
    """A connection as httpcore sees it. :class:`AnypollBackend` opens them."""

    def __init__(self, connection: anypoll.Connection) -> None:
        if not isinstance(connection, anypoll.Connection):
            raise TypeError(f"expected an anypoll.Connection, got {type(connection).__qualname__}")
        self._connection = connection

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Returns at most ``max_bytes`` bytes; ``b""`` once the peer has ended its side.

        :param timeout: seconds; nothing is lost when they are over
        :raises httpcore.ReadTimeout: after ``timeout`` seconds
        :raises httpcore.ReadError: if the connection breaks or is closed
        :raises ValueError, TypeError: if ``max_bytes`` is below 1, or for other invalid arguments
        """
        if not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be a positive integer, not {max_bytes!r}")
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        _check_timeout(timeout, "timeout")
        try:
            return await self._receive(min(max_bytes, _READ_MOST), timeout)
        except EndOfStream:
            return b""
        except TimeoutError as exc:
            raise _translated(ReadTimeout, exc) from exc
        except _FAILURES as exc:
            raise _translated(ReadError, exc) from exc

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Returns when the kernel has everything; an empty ``buffer`` does nothing.

        :param timeout: seconds
        :raises httpcore.WriteTimeout: after ``timeout`` seconds; part may have been sent
        :raises httpcore.WriteError: if the connection breaks or is closed
        :raises ValueError, TypeError: for invalid arguments; nothing is written then
        """
        if not isinstance(buffer, (bytes, bytearray, memoryview)):
            raise TypeError(f"buffer must be bytes, not {type(buffer).__name__}")
        _check_timeout(timeout, "timeout")
        if not buffer:
            return
        try:
            await self._send(buffer, timeout)
        except TimeoutError as exc:
            raise _translated(WriteTimeout, exc) from exc
        except _FAILURES as exc:
            raise _translated(WriteError, exc) from exc

    async def aclose(self) -> None:
        """Closes the connection. Over TLS without a closing handshake, as is usual for HTTP."""
        await self._connection.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> AnypollTLSStream:
        """Performs a client's TLS handshake; also over a stream that has TLS already.

        If it fails or is cancelled, the connection is closed.

        :param server_hostname: the name the certificate must have, if the context checks that
        :param timeout: seconds for the handshake
        :raises httpcore.ConnectTimeout: after ``timeout`` seconds
        :raises httpcore.ConnectError: if the handshake fails
        :raises ValueError: without a ``server_hostname`` that the context would check
        :raises ValueError, TypeError: for invalid arguments; the connection stays as it is
        """
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}")
        if server_hostname is not None and not isinstance(server_hostname, str):
            raise TypeError(f"server_hostname must be a str or None, not {server_hostname!r}")
        _check_timeout(timeout, "timeout")
        self._connection.read_timeout = self._connection.write_timeout = None
        try:
            if ssl_context.check_hostname and server_hostname is None:
                # An SSLObject, unlike an SSLSocket, would silently check no name.
                raise ValueError("server_hostname is needed: the context checks it")
            with _within(timeout):
                tls = await TLSStream.wrap(
                    self._below(),
                    server_side=False,
                    hostname=server_hostname,
                    ssl_context=ssl_context,
                    standard_compatible=False,
                )
        except BaseException as exc:
            await anyio.aclose_forcefully(self._connection)
            if isinstance(exc, TimeoutError):
                raise ConnectTimeout(_reason(exc)) from exc
            if isinstance(exc, _FAILURES):
                raise ConnectError(_reason(exc)) from exc
            raise
        return AnypollTLSStream(self._connection, tls)

    def get_extra_info(self, info: str) -> Any:
        """The information known by one of these names; ``None`` for other names, and for what a
        closed connection no longer knows.

        ``"is_readable"`` says, without any I/O, whether a connection that should be idle has unread
        bytes, or is ended, dead or closed: in short, whether a pool must drop it.
        ``"client_addr"`` and ``"server_addr"`` are the two ends, ``"socket"`` is the socket, which
        must not be read, and ``"ssl_object"`` is the TLS session.
        """
        if info == "is_readable":
            return self._is_readable()
        try:
            if info == "client_addr":
                return self._connection.local_address
            if info == "server_addr":
                return self._connection.remote_address
            if info == "socket":
                return self._connection.extra(SocketAttribute.raw_socket)
        except (ClosedResourceError, OSError):
            pass
        return None

    # --- what TLS does differently ---------------------------------------------------------------

    def _below(self) -> anyio.abc.ByteStream:
        return self._connection

    async def _receive(self, max_bytes: int, timeout: float | None) -> bytes:
        self._connection.read_timeout = timeout
        return await self._connection.receive(max_bytes)

    async def _send(self, buffer: bytes, timeout: float | None) -> None:
        self._connection.write_timeout = timeout
        await self._connection.send(buffer)

    def _is_readable(self) -> bool:
        connection = self._connection
        return not connection.is_active or connection.at_eof or len(connection.reader) > 0


class AnypollTLSStream(AnypollStream):
    """A stream over TLS, as :meth:`AnypollStream.start_tls` returns it."""

    def __init__(self, connection: anypoll.Connection, tls: TLSStream) -> None:
        super().__init__(connection)
        if not isinstance(tls, TLSStream):
            raise TypeError(f"expected an anyio TLSStream, got {type(tls).__qualname__}")
        self._tls = tls
        self._ended = False
        """the session cannot go on, whatever the connection below says"""

    def get_extra_info(self, info: str) -> Any:
        """See :meth:`AnypollStream.get_extra_info`."""
        if info == "ssl_object":
            return self._tls.extra(TLSAttribute.ssl_object)
        return super().get_extra_info(info)

    def _below(self) -> anyio.abc.ByteStream:
        return self._tls

    async def _receive(self, max_bytes: int, timeout: float | None) -> bytes:
        with _within(timeout):
            try:
                return await self._tls.receive(max_bytes)
            except _FAILURES:
                self._ended = True
                raise

    async def _send(self, buffer: bytes, timeout: float | None) -> None:
        with _within(timeout):
            try:
                await self._tls.send(buffer)
            except BaseException:  # a partly sent record cannot be sent again
                self._ended = True
                raise

    def _is_readable(self) -> bool:
        return self._ended or super()._is_readable() or _has_unread(self._tls)


def _check_timeout(timeout: object, name: str) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, (int, float)):
        kind = type(timeout).__name__
        raise TypeError(f"{name} must be a number of seconds or None, not {kind}")
    if not timeout >= 0:
        raise ValueError(f"{name} must not be negative")
    if timeout > sys.float_info.max and not isinstance(timeout, float):
        raise ValueError(f"{name} must be a number of seconds that a float can hold")


def _within(timeout: float | None) -> Any:
    return anyio.fail_after(timeout, reason=f"not done within {timeout} s")


def _has_unread(stream: Any) -> bool:
    """Whether a TLS stream, or one below it, has bytes that it took from its connection and nobody
    has read: the rest of decrypted data, or records not yet examined.
    """
    while isinstance(stream, TLSStream):
        if stream.extra(TLSAttribute.ssl_object).pending() or stream._read_bio.pending:
            return True
        stream = stream.transport_stream
    return False

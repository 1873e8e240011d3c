"""An httpcore network backend: anypoll below its connection pools, and so below httpx.

It serves ``httpcore`` and its fork ``httpcore2`` (below ``httpx2``) alike. Their interface is the
same, but each knows only exceptions of its own, for which it retries or replaces a connection. So
where both are installed, what is raised here is an exception of both.

A pool asks whether an idle connection is still good before each request. httpcore's own backends
poll the descriptor for that; here the pollers have read ahead what arrived, an end of stream too,
and the answer costs no system call.

Timeouts of plain connections are those of the connection itself. Over TLS a scope lies around the
operation: below a ``TLSStream`` a ``TimeoutError`` would be taken for a broken connection.
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

    # Each names its own library's classes as results; the classes below return what is both.
    class AsyncNetworkBackend(  # type: ignore[misc]
        httpcore.AsyncNetworkBackend, httpcore2.AsyncNetworkBackend
    ): ...

    class AsyncNetworkStream(  # type: ignore[misc]
        httpcore.AsyncNetworkStream, httpcore2.AsyncNetworkStream
    ): ...

else:
    _libraries = _installed()

    def _of_all(name: str) -> type:
        """The class of that name, or one that is the class of each library."""
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

#: How a connection fails, apart from a timeout; an ``ssl.SSLError`` is an ``OSError``.
_FAILURES = (BrokenResourceError, ClosedResourceError, EndOfStream, OSError)


def _reason(exc: BaseException) -> str:
    """AnyIO's exceptions say nothing; what caused them does."""
    return str(exc) or str(exc.__cause__ or "") or type(exc).__name__


def _translated(kind: type[Exception], exc: Exception) -> Exception:
    """What httpcore calls an exception of the connection, with its text and its attributes: by
    these a server knows that it is about a connection of its own.
    """
    error = kind(_reason(exc))
    error.__dict__.update(exc.__dict__)
    return error


class AnypollBackend(AsyncNetworkBackend):
    """Opens the connections of a pool: ``AsyncConnectionPool(network_backend=AnypollBackend())``.

    It has no state: one may serve any number of pools, in any event loops.
    """

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> AnypollStream:
        """Connects to a TCP server, over the first of its addresses that answers.

        :param timeout: seconds for all of it, name resolution included
        :param local_address: the host to connect from
        :param socket_options: arguments of ``setsockopt``; set once it is connected
        :raises httpcore.ConnectTimeout: after ``timeout`` seconds
        :raises httpcore.ConnectError: if no address could be connected, or an option is refused
        :raises ValueError, TypeError: for nonsense
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
        """Connects to a UNIX socket; the rest is as in :meth:`connect_tcp`."""
        options = _checked(socket_options)
        return await _opened(anypoll.connect_unix(path, timeout=timeout), options)

    async def sleep(self, seconds: float) -> None:
        """Sleeps, between tries to connect."""
        _check_timeout(seconds, "seconds")
        await anyio.sleep(seconds)


def _checked(options: Iterable[_SocketOption] | None) -> list[_SocketOption]:
    """Whether the kernel takes them shows when there is a socket; here, whether they are any."""
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
    """A connection as httpcore sees it. A connected one comes from :class:`AnypollBackend`."""

    def __init__(self, connection: anypoll.Connection) -> None:
        if not isinstance(connection, anypoll.Connection):
            raise TypeError(f"expected an anypoll.Connection, got {type(connection).__qualname__}")
        self._connection = connection

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At most ``max_bytes`` bytes; ``b""`` once the peer has ended its side.

        :param timeout: seconds; nothing is lost when they are over
        :raises httpcore.ReadTimeout: after ``timeout`` seconds
        :raises httpcore.ReadError: if the connection breaks or is closed
        :raises ValueError, TypeError: for ``max_bytes`` below 1, and other nonsense
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
        """Returns when the kernel has everything; nothing is done for an empty ``buffer``.

        :param timeout: seconds
        :raises httpcore.WriteTimeout: after ``timeout`` seconds; a part may have been sent
        :raises httpcore.WriteError: if the connection breaks or is closed
        :raises ValueError, TypeError: for nonsense; nothing is written then
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
        """Closes the connection. Over TLS no closing handshake is made, as is usual for HTTP."""
        await self._connection.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> AnypollTLSStream:
        """Makes the TLS handshake of a client; also over a stream that has TLS already.

        The connection is closed if that fails or is cancelled.

        :param server_hostname: whom the certificate must name, if the context checks that
        :param timeout: seconds for the handshake
        :raises httpcore.ConnectTimeout: after ``timeout`` seconds
        :raises httpcore.ConnectError: if the handshake fails
        :raises ValueError: without a ``server_hostname`` that the context would check
        :raises ValueError, TypeError: for nonsense; the connection stays as it is
        """
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}")
        if server_hostname is not None and not isinstance(server_hostname, str):
            raise TypeError(f"server_hostname must be a str or None, not {server_hostname!r}")
        _check_timeout(timeout, "timeout")
        self._connection.read_timeout = self._connection.write_timeout = None
        try:
            if ssl_context.check_hostname and server_hostname is None:
                # an SSLObject, unlike an SSLSocket, would silently check no name
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
        """What is known by one of these names; ``None`` for others, and for what a closed
        connection does not know any more.

        ``"is_readable"`` says, without any I/O, whether a connection that should be idle has
        unread bytes, or has ended, or is dead or closed: whether a pool must give it up.
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

    # --- what TLS does in another way ------------------------------------------------------------

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
    """The same over TLS: what :meth:`AnypollStream.start_tls` gives."""

    def __init__(self, connection: anypoll.Connection, tls: TLSStream) -> None:
        super().__init__(connection)
        if not isinstance(tls, TLSStream):
            raise TypeError(f"expected an anyio TLSStream, got {type(tls).__qualname__}")
        self._tls = tls
        self._ended = False
        """the session can't go on, whatever the connection below says"""

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
            except BaseException:  # a record that was not sent as a whole can't be sent again
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
    has read: a rest of decrypted ones, or records that were not looked at.
    """
    while isinstance(stream, TLSStream):
        if stream.extra(TLSAttribute.ssl_object).pending() or stream._read_bio.pending:
            return True
        stream = stream.transport_stream
    return False

"""Trio's stream interfaces over connections and listeners.

For code written against them: ``trio.SSLStream``, ``trio.serve_listeners``, and anything that takes
a :class:`trio.abc.Stream`.

A stream here keeps Trio's contract to the letter. Every call is a checkpoint; a cancelled call has
done nothing (except ``send_all`` and ``aclose``, as in Trio); the end of the stream is ``b""``; and
the exceptions are Trio's. The cause of each is what Trio's own stream would give, the socket's
``OSError``, or, if there is none, the connection's exception.

Below, there is still an anypoll connection: ``stream.connection`` has its addresses, options and
statistics, and its nocopy reader and writer, which share the buffers with the stream.
"""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn, SupportsIndex

import anyio
import trio
from anyio.abc import SocketAttribute
from anyio.streams.stapled import MultiListener

import anypoll

__all__ = (
    "TrioListener",
    "TrioStream",
    "open_tcp_listeners",
    "open_tcp_stream",
    "open_unix_socket",
    "serve_tcp",
)

_RECEIVE_SIZE = 65536  # as in Trio's own streams
_BACKLOG = 65535  # likewise

#: A connection's exceptions, and Trio's names for them. A connection ended for being idle is as
#: dead as a broken one.
_TRIOS: dict[type[Exception], type[Exception]] = {
    anyio.BrokenResourceError: trio.BrokenResourceError,
    anyio.BusyResourceError: trio.BusyResourceError,
    anyio.ClosedResourceError: trio.ClosedResourceError,
    anypoll.IdleTimeout: trio.BrokenResourceError,
}
_ERRORS: tuple[type[Exception], ...] = tuple(_TRIOS)
_ACCEPT_ERRORS: tuple[type[Exception], ...] = (*_ERRORS, OSError)


def _translated(exc: Exception) -> Exception:
    """Trio's exception for one of ``_ERRORS``, with its text and its attributes, by which a server
    recognises that it is about one of its own connections, whose peer may go at any time.
    """
    kind = next(trios for kind, trios in _TRIOS.items() if isinstance(exc, kind))
    error = kind(str(exc) or str(exc.__cause__ or ""))
    error.__dict__.update(exc.__dict__)
    return error


def _has_messages(connection: anypoll.Connection) -> bool:
    if not isinstance(connection, anypoll.UNIXConnection) or connection.fileno() < 0:
        return False
    return bool(connection.extra(SocketAttribute.raw_socket).type == socket.SOCK_SEQPACKET)


class TrioStream(trio.abc.HalfCloseableStream):
    """A :class:`trio.abc.HalfCloseableStream` over a connection, which it owns.

    The connection's ``read_timeout`` and ``write_timeout`` apply here too: ``receive_some`` and
    ``send_all`` raise ``anypoll.ReadTimeout`` and ``anypoll.WriteTimeout``, which have no
    counterpart in Trio, and the stream stays usable.

    :raises TypeError: if ``connection`` is not an :class:`anypoll.Connection`
    :raises ValueError: if it carries messages (``SOCK_SEQPACKET``), not a stream
    """

    __slots__ = ("__weakref__", "_eof_sent", "connection")

    connection: anypoll.Connection
    """the connection below"""

    def __init__(self, connection: anypoll.Connection) -> None:
        if not isinstance(connection, anypoll.Connection):
            raise TypeError(f"expected an anypoll.Connection, got {type(connection).__qualname__}")
        if _has_messages(connection):
            raise ValueError("a TrioStream needs a stream, not a socket with messages")
        self.connection = connection
        self._eof_sent = False

    def __repr__(self) -> str:
        return f"<anypoll.integrations.trio.TrioStream over {self.connection!r}>"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends the writer's pending output, then ``data``.

        Returns when the kernel has everything; ``data`` may be changed then. If the call is
        cancelled before a byte of ``data`` was sent, none will be; if part of it was sent, the rest
        still goes out, before anything sent later.

        :raises trio.BrokenResourceError: if the peer has gone
        :raises trio.ClosedResourceError: if the stream is closed, before or during the call, or
            after ``send_eof()``
        :raises trio.BusyResourceError: while another task is sending
        :raises anypoll.WriteTimeout: after the connection's ``write_timeout``
        """
        if self._eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof()")
        try:
            await self.connection.send(data)
        except _ERRORS as exc:
            raise _translated(exc) from exc.__cause__ or exc

    async def wait_send_all_might_not_block(self) -> None:
        """Waits until the kernel has room, and earlier output has gone out.

        :raises trio.BrokenResourceError: if the peer has gone
        :raises trio.ClosedResourceError: if the stream is closed, before or during the call
        :raises trio.BusyResourceError: while another task is sending
        """
        try:
            await self.connection.wait_writable()
        except _ERRORS as exc:
            raise _translated(exc) from exc.__cause__ or exc

    async def send_eof(self) -> None:
        """Sends the writer's pending output, then ends this side; the peer's data can still be
        received. Idempotent.

        :raises trio.BrokenResourceError: if the peer has gone
        :raises trio.ClosedResourceError: if the stream is closed, before or during the call
        :raises trio.BusyResourceError: while another task is sending
        """
        try:
            await self.connection.send_eof()
        except _ERRORS as exc:
            raise _translated(exc) from exc.__cause__ or exc
        self._eof_sent = True

    async def receive_some(self, max_bytes: SupportsIndex | None = None) -> bytes:
        """Returns at least one and at most ``max_bytes`` bytes, as soon as there are any; ``b""``
        when the peer has ended its side.

        :param max_bytes: ``None``: 65536
        :raises trio.BrokenResourceError: after a reset
        :raises trio.ClosedResourceError: if the stream is closed, before or during the call
        :raises trio.BusyResourceError: while another task is reading
        :raises anypoll.ReadTimeout: after the connection's ``read_timeout``; nothing is lost
        :raises TypeError: if ``max_bytes`` is not an integer
        :raises ValueError: if it is below 1
        """
        try:
            return await self.connection.receive(_RECEIVE_SIZE if max_bytes is None else max_bytes)
        except anyio.EndOfStream:  # the connection has already taken the checkpoint
            return b""
        except _ERRORS as exc:
            raise _translated(exc) from exc.__cause__ or exc

    async def aclose(self) -> None:
        """Closes the connection; its descriptor is closed on every way out.

        The writer's pending output is drained first, for at most ``write_timeout``, unless the
        scope is cancelled.
        """
        await self.connection.aclose()


class TrioListener(trio.abc.Listener[TrioStream]):
    """A :class:`trio.abc.Listener` over anypoll's listeners, which it owns.

    The pollers accept, and handle a lack of descriptors or memory themselves: they stop for 100 ms
    at a time, and report this once per episode (logger ``anypoll.server``, WARNING). ``accept()``
    just waits meanwhile; :func:`trio.serve_listeners`, which would do the same, sees none of it.

    :param listener: from :func:`anypoll.create_tcp_listener` and the like: a
        :class:`anypoll.SocketListener`, or a ``MultiListener`` of such
    :raises TypeError: if it is anything else
    :raises ValueError: if it contains no listener
    """

    __slots__ = ("__weakref__", "_accepted", "_accepting", "_listeners", "listener")

    listener: anypoll.SocketListener | MultiListener[Any]
    """the listener below"""

    def __init__(self, listener: anypoll.SocketListener | MultiListener[Any]) -> None:
        self.listener = listener
        self._listeners = tuple(_flat(listener))
        if not self._listeners:
            raise ValueError("a MultiListener without any listener accepts nothing")
        self._accepted: deque[anypoll.Connection] = deque()  # beyond the one requested
        self._accepting = False

    def __repr__(self) -> str:
        return f"<anypoll.integrations.trio.TrioListener over {self.listener!r}>"

    async def accept(self) -> TrioStream:
        """Returns the next connection, as a stream. If cancelled, it loses none.

        :raises trio.ClosedResourceError: if the listener is closed, before or during the call
        :raises trio.BusyResourceError: while another task is accepting
        :raises OSError: if the listening socket has failed, or resources for the connection are
            exhausted, which is closed then
        """
        if self._accepting:
            raise trio.BusyResourceError("another task is already accepting from this listener")
        self._accepting = True
        try:
            return TrioStream(await self._next())
        except anyio.BrokenResourceError as exc:  # unknown to Trio's listeners
            error = exc.__cause__ or exc
        except _ERRORS as exc:
            raise _translated(exc) from exc
        finally:
            self._accepting = False
        raise error

    async def _next(self) -> anypoll.Connection:
        if len(self._listeners) == 1:
            return await self._listeners[0].accept()
        if self._accepted:
            await trio.lowlevel.checkpoint()
        else:
            await self._accept_from_any()
        if not self._accepted:
            raise anyio.ClosedResourceError
        return self._accepted.popleft()

    async def _accept_from_any(self) -> None:
        """Accepts from all listeners until one has a connection. Several may have one at the same
        time; if the caller is cancelled then, all of them wait for the next call.
        """
        errors: list[Exception] = []

        async def accept(listener: anypoll.SocketListener) -> None:
            try:
                self._accepted.append(await listener.accept())
            except _ACCEPT_ERRORS as exc:
                errors.append(exc)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(accept, listener)
        try:
            if errors and not self._accepted:
                raise errors[0]
        finally:
            errors.clear()  # breaks the cycle of exception, traceback and this frame

    async def aclose(self) -> None:
        """Closes all listeners, on every way out; connections that nobody accepted are reset."""
        for listener in self._listeners:
            with trio.CancelScope(
                shield=True
            ) as scope:  # a Cancelled from outside would end the loop
                scope.cancel()
                await listener.aclose()
        while self._accepted:
            self._accepted.popleft().abort()
        await trio.lowlevel.checkpoint()


def _flat(listener: Any) -> Iterator[anypoll.SocketListener]:
    if isinstance(listener, anypoll.SocketListener):
        yield listener
    elif isinstance(listener, MultiListener):
        for inner in listener.listeners:
            yield from _flat(inner)
    else:
        raise TypeError(
            "expected an anypoll.SocketListener or a MultiListener of such, got "
            f"{type(listener).__qualname__}"
        )


# --- opening, with Trio's names and parameters ---------------------------------------------------


def _text(host: str | bytes) -> str:
    # Non-ASCII bytes stay as surrogates, which no name has: a `gaierror`, as in Trio.
    return host.decode("ascii", "surrogateescape") if isinstance(host, bytes) else host


def _check_port(port: object) -> None:
    if not isinstance(port, int):
        raise TypeError(f"port must be an integer, not {type(port).__name__}")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be between 0 and 65535, not {port:#x}")


async def open_tcp_stream(
    host: str | bytes,
    port: int,
    *,
    happy_eyeballs_delay: float | None = 0.25,
    local_address: str | None = None,
) -> TrioStream:
    """:func:`trio.open_tcp_stream` on anypoll's engine: :func:`anypoll.connect_tcp`.

    :param host: name or address
    :param happy_eyeballs_delay: seconds before the next address is tried as well; ``None``: one at
        a time
    :param local_address: address or name to connect from
    :raises OSError: if no address could be connected, with the reasons as its cause
    :raises TypeError: if ``port`` is not an integer
    :raises ValueError: if ``host`` is neither ``str`` nor ``bytes``, or ``port`` is above 65535
    """
    if not isinstance(host, (str, bytes)):
        raise ValueError(f"host must be str or bytes, not {type(host).__name__}")
    _check_port(port)
    delay = math.inf if happy_eyeballs_delay is None else happy_eyeballs_delay
    return TrioStream(
        await anypoll.connect_tcp(
            _text(host), port, local_host=local_address, happy_eyeballs_delay=delay
        )
    )


async def open_unix_socket(
    filename: str | bytes | os.PathLike[str] | os.PathLike[bytes],
) -> TrioStream:
    """:func:`trio.open_unix_socket` on anypoll's engine: :func:`anypoll.connect_unix`.

    :param filename: the path of the socket
    :raises OSError: ``FileNotFoundError``, ``ConnectionRefusedError``, ...
    """
    return TrioStream(await anypoll.connect_unix(filename))


async def open_tcp_listeners(
    port: int, *, host: str | bytes | None = None, backlog: int | None = None
) -> list[TrioListener]:
    """:func:`trio.open_tcp_listeners` on anypoll's engine: :func:`anypoll.create_tcp_listener`.

    Two things differ from Trio: with port 0 all listeners have the same port, and without a host
    there is one listener, for IPv4 and IPv6 together.

    :param port: 0 chooses a port
    :param host: name or address; ``None``: all interfaces
    :param backlog: connections that may wait to be accepted; ``None``: 65535
    :return: one listener per address
    :raises OSError: if binding fails
    :raises TypeError, ValueError: for an invalid port or backlog
    """
    _check_port(port)
    multi = await anypoll.create_tcp_listener(
        local_host=None if host is None else _text(host),
        local_port=port,
        backlog=_BACKLOG if backlog is None else backlog,
    )
    return [TrioListener(listener) for listener in _flat(multi)]


async def serve_tcp(
    handler: Callable[[TrioStream], Awaitable[object]],
    port: int,
    *,
    host: str | bytes | None = None,
    backlog: int | None = None,
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[list[TrioListener]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """:func:`trio.serve_tcp` on anypoll's engine: :func:`open_tcp_listeners`, then
    :func:`trio.serve_listeners`.

    As there, an exception that leaves the handler ends the server. :func:`anypoll.serve` logs it
    and goes on, so prefer that for a server that need not be Trio's.

    :param handler: called with each stream, which is closed when the handler returns
    :param handler_nursery: where the handlers run, if not in a nursery of this function's
    :param task_status: receives the listeners
    """
    listeners = await open_tcp_listeners(port, host=host, backlog=backlog)
    await trio.serve_listeners(
        handler, listeners, handler_nursery=handler_nursery, task_status=task_status
    )

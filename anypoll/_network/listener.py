"""Listeners: credit-based accepting in batches, and connections over what was accepted.

A poller accepts as long as the account has credits, and hands over batches. A plain listener has an
account of its own: ``accept()`` adds a credit, and takes it back when cancelled; if the credit was
spent by then, the connection waits for the next ``accept()``. A server's listeners share one
account, and take whole batches.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError
from anyio.abc import SocketListener as AnyIOSocketListener, SocketStream
from anyio.streams.stapled import MultiListener

from .. import _epoll
from .._buffers.arguments import Limits
from .._buffers.errors import stream_error
from .._connection.sockets import validated
from .._connection.stream import Connection, kind_of, new_connection
from .._epoll import MAIL_FAILED, MAIL_STARVED, TCP
from .._loop import runtime
from .addresses import host_text, port_number
from .binding import BACKLOG_MOST, tcp_listening, unix_listening

if TYPE_CHECKING:
    from typing import Self

    from .._epoll import Account, Poller

__all__ = ("SocketListener", "create_tcp_listener", "create_unix_listener")

logger = logging.getLogger("anypoll.server")

#: Pollers that may fail in a row without any having accepted a connection.
_MOVES = 8

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class SocketListener(AnyIOSocketListener):
    """A listening socket, served by a poller; yields :class:`Connection` objects.

    When descriptors or memory run short, it stops accepting for 100 ms at a time, and reports this
    once per episode (logger ``anypoll.server``, WARNING).
    """

    __slots__ = (
        "_accepting",
        "_account",
        "_closed",
        "_handle",
        "_hub",
        "_kind",
        "_number",
        "_poller",
        "_raw",
        "_ready",
    )

    def __init__(self, sock: socket.socket, account: Account | None = None) -> None:
        self._closed = True  # until there is something to close
        if not isinstance(sock, socket.socket):
            raise TypeError(
                f"a listener is made by from_socket() and its like, not of {type(sock).__name__}"
            )
        self._raw = sock
        self._hub = runtime.current_hub()
        self._account = account if account is not None else _epoll.open_account()
        self._kind = kind_of(sock)
        self._ready: deque[tuple[int, bytes]] = deque()
        self._accepting = False
        self._listen()
        self._closed = False

    def _listen(self) -> None:
        """Has a poller accept connections.

        :raises OSError: if resources are exhausted
        """
        self._poller = runtime.on_poller(self._hub, self._open_on)
        _epoll.listener_fd(self._handle, 1)
        runtime.raw_sockets.add(self._raw)
        self._number = _epoll.listener_id(self._handle)
        self._hub.addressees[self._number] = weakref.ref(self)
        runtime.handles[self._number] = self._handle

    def _open_on(self, poller: Poller) -> None:
        self._handle = _epoll.open_listener(
            poller, self._hub.handle, self._raw.fileno(), self._account
        )

    def _move(self) -> None:
        """Moves to another poller after its own has failed; takes what that had accepted.

        :raises BrokenResourceError: if there is no other; the listener can then only be closed
        """
        self._hub.forget(self._number)
        _epoll.listener_close(self._handle, 1)
        self._let_go()
        try:
            self._listen()
        except OSError as exc:
            raise BrokenResourceError from exc

    @classmethod
    async def from_socket(cls, sock_or_fd: socket.socket | int) -> Self:
        """Takes over a bound stream socket, TCP or UNIX; makes it listen if it does not yet.

        :raises TypeError: if it is neither a socket nor a descriptor
        :raises ValueError: if it is not a bound stream socket of a supported family
        """
        sock = validated(sock_or_fd, families=_FAMILIES, listening=True)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.listen(BACKLOG_MOST)
        return cls(sock)

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn("unclosed anypoll listener", ResourceWarning, stacklevel=1, source=self)
            self._close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"fd={self._raw.fileno()}"
        return f"<anypoll.SocketListener {state}>"

    @property
    def _raw_socket(self) -> socket.socket:
        return self._raw

    # --- notifications from the hub --------------------------------------------------------------

    def on_token(self, bits: int, error: int) -> None:
        """Called by the hub when connections have come, or an error has."""
        if bits & MAIL_FAILED:
            runtime.bury_pollers()
        if bits & MAIL_STARVED:
            logger.warning(
                "Accepting on %s is paused, again and again until it works: %s",
                self._raw.getsockname() if self._raw.fileno() >= 0 else "a listener",
                os.strerror(error),
            )
        self._hub.wake_reader(self._number)

    def on_hub_end(self) -> None:
        """The event loop has ended."""
        self._closed = True
        self._raw.close()
        self._let_go()
        self._drop_ready()

    # --- accepting -------------------------------------------------------------------------------

    async def accept(self) -> Connection:
        """Returns the next connection. A checkpoint; if cancelled, it loses none.

        :raises ClosedResourceError: if the listener is closed, before or during the call
        :raises BusyResourceError: while another task is accepting
        :raises BrokenResourceError: if the socket has failed
        """
        self._enter()
        try:
            if self._take():
                await self._hub.checkpoint()
            else:
                _epoll.add_credits(self._account, 1)
                await self._wait_with_credit()
            if self._closed:
                raise ClosedResourceError
            fd, peer = self._ready.popleft()
        finally:
            self._accepting = False
        connection = new_connection(fd, self._kind, Limits(), peer)
        try:
            if self._kind == TCP:
                nodelay_fd(fd)
            connection._core.register()
        except BaseException:
            connection._core.close()
            raise
        return connection

    def _enter(self) -> None:
        if self._accepting:
            raise BusyResourceError("accepting connections from")
        if self._closed:
            raise ClosedResourceError
        self._hub.check()
        self._accepting = True

    async def _wait_with_credit(self) -> None:
        try:
            if self._take():
                await self._hub.checkpoint()
            while not self._closed and not self._take():
                await self._hub.wait_read(self._number)
        except BaseException:
            self._hub.readers.pop(self._number, None)
            if not self._closed:
                _epoll.take_back_credit(self._account)
            raise

    def _take(self) -> bool:
        """Whether a connection is ready."""
        if not self._ready:
            try:
                self._ready.extend(_epoll.take_accepted(self._handle))
            except OSError as exc:
                raise stream_error(-exc.errno) from exc  # type: ignore[operator]
        return bool(self._ready)

    async def accept_batch(self) -> list[tuple[int, bytes]]:
        """Returns all accepted connections, at least one. For a server, whose account holds the
        credits. If the poller fails, another goes on accepting.

        :raises ClosedResourceError: if the listener is closed, before or during the call
        :raises BrokenResourceError: if the socket has failed, or one poller after another has
        """
        self._enter()
        moves = 0
        try:
            while True:
                try:
                    if self._take():
                        break
                except BrokenResourceError:
                    if not _epoll.poller_ended(self._poller) or moves == _MOVES:
                        raise
                    moves += 1
                    self._move()
                    continue
                await self._hub.wait_read(self._number)
                if self._closed:
                    raise ClosedResourceError
            batch = list(self._ready)
            self._ready.clear()
            return batch
        except BaseException:
            self._hub.readers.pop(self._number, None)
            raise
        finally:
            self._accepting = False

    # --- end -------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        runtime.raw_sockets.discard(self._raw)
        runtime.handles.pop(self._number, None)

    def _drop_ready(self) -> None:
        while self._ready:
            _epoll.fd_close(self._ready.popleft()[0])

    def _give_away(self) -> socket.socket:
        """The socket, still open; the listener then counts as closed. For a server.

        :raises ClosedResourceError: if it is closed
        """
        if self._closed:
            raise ClosedResourceError
        sock = self._raw
        self._forget()
        self._raw = socket.socket(sock.family, sock.type)
        self._raw.close()
        return sock

    def _forget(self) -> None:
        self._closed = True
        self._hub.forget(self._number)
        _epoll.listener_close(self._handle, 1)
        self._let_go()
        self._drop_ready()
        self._hub.wake_reader(self._number)

    def _close(self) -> None:
        if self._closed:
            return
        self._forget()
        try:
            anyio.notify_closing(self._raw)
        except Exception:  # noqa: BLE001, S110 -- no event loop here, so nobody waits either
            pass
        self._raw.close()

    async def aclose(self) -> None:
        """Closes the listener; connections that nobody accepted are reset. A checkpoint."""
        self._close()
        if self._hub.dead:
            await anyio.lowlevel.checkpoint()
        else:
            await self._hub.checkpoint()


def nodelay_fd(fd: int) -> None:
    """Sets ``TCP_NODELAY`` on a descriptor that someone else owns."""
    _epoll.set_nodelay(fd)


def open_listeners(
    sockets: Sequence[socket.socket], account: Account | None = None
) -> list[SocketListener]:
    """A listener for each socket: all or none.

    :raises OSError: if resources are exhausted; the sockets are closed then
    """
    listeners: list[SocketListener] = []
    try:
        for sock in sockets:
            listeners += [SocketListener(sock, account)]
    except BaseException:
        for listener in listeners:
            listener._close()
        for sock in sockets:
            sock.close()
        raise
    return listeners


class _Listeners(MultiListener[SocketStream]):
    """Closes all listeners even in a cancelled scope, where AnyIO's own stops after the first."""

    async def aclose(self) -> None:
        for listener in self.listeners:
            if isinstance(listener, SocketListener):
                listener._close()
        await super().aclose()


async def create_tcp_listener(
    *,
    local_host: Any = None,
    local_port: int = 0,
    family: int = socket.AF_UNSPEC,
    backlog: int = 65536,
    reuse_port: bool = False,
) -> MultiListener[SocketStream]:
    """Listens for TCP connections, like :func:`anyio.create_tcp_listener`.

    :param local_host: address or name; ``None``: all interfaces, IPv4 and IPv6. Of a name's
        addresses, those of a family that this machine lacks are skipped if there are others.
    :param local_port: 0 chooses a port, the same on all addresses
    :param family: restricts what ``local_host`` resolves to
    :param backlog: connections that may wait to be accepted; 65536 at most
    :param reuse_port: ``SO_REUSEPORT``: several sockets share the port
    :raises OSError: if binding fails, with the address in its text
    :raises socket.gaierror: an ``OSError`` too: for a name without addresses, or an invalid one
    :raises ValueError, TypeError: for invalid arguments
    """
    sockets = await tcp_listening(
        None if local_host is None else host_text(local_host, "local_host"),
        port_number(local_port, "local_port"),
        family=family,
        backlog=backlog,
        reuse_port=reuse_port,
    )
    return _Listeners(open_listeners(sockets))


async def create_unix_listener(
    path: str | bytes | os.PathLike[Any],
    *,
    mode: int | None = None,
    backlog: int = 65536,
    kind: int = socket.SOCK_STREAM,
) -> SocketListener:
    """Listens on a UNIX socket, like :func:`anyio.create_unix_listener`.

    :param path: a leading NUL makes it abstract. The file of a dead socket is replaced; that of a
        live one, and any other file, never is.
    :param mode: permissions of the socket's file
    :param kind: ``SOCK_STREAM`` or ``SOCK_SEQPACKET``
    :raises OSError: if binding fails, with the path in its text
    :raises ValueError, TypeError: for any other ``kind``, and other invalid arguments
    """
    sock = await unix_listening(path, mode=mode, backlog=backlog, kind=kind)
    await anyio.lowlevel.checkpoint()
    return open_listeners([sock])[0]

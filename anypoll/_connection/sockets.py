"""A connection's socket: adoption, socket options, addresses, AnyIO's typed attributes."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio import ClosedResourceError
from anyio.abc import SocketAttribute, SocketStream

from .. import _epoll
from .._buffers.arguments import count_field
from .._buffers.errors import ORIGIN_KEY
from .._epoll import TCP, ConnectionStatistics
from .._loop import runtime

if TYPE_CHECKING:
    from .core import Core

IPAddress = tuple[str, int]
Address = IPAddress | str | bytes

_INET = {socket.AF_INET, socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Keepalive:
    """TCP keepalive: the first probe follows ``idle`` seconds of silence, the others come every
    ``interval`` seconds; after ``count`` unanswered probes the connection is broken (see
    ``tcp(7)``).
    """

    idle: int = 60
    interval: int = 15
    count: int = 4

    def __post_init__(self) -> None:
        for name in ("idle", "interval"):
            count_field(self, name, least=1, most=32767)
        count_field(self, "count", least=1, most=127)


class PeerCredentials(NamedTuple):
    """The process at the other end of a UNIX socket when it was connected (``SO_PEERCRED``,
    unix(7)); for a socket pair, the process that created it.
    """

    pid: int
    """0 if the process is in a PID namespace not visible from here"""
    uid: int
    gid: int


class AnypollAttribute(anyio.TypedAttributeSet):
    """Attributes of a :class:`Connection` beyond AnyIO's ``SocketAttribute``, also available
    through streams that wrap it: ``tls_stream.extra(AnypollAttribute.statistics)``.
    """

    poller: int = anyio.typed_attribute()
    """the poller that serves the connection, as an index into ``anypoll.statistics().pollers``;
    absent once the connection is closed
    """
    statistics: ConnectionStatistics = anyio.typed_attribute()
    """the current counters, as from :meth:`Connection.statistics`; also after the close"""
    peer_credentials: PeerCredentials = anyio.typed_attribute()
    """pid, uid and gid of the peer; only on open UNIX connections"""
    tls_native: bool = anyio.typed_attribute()
    """whether the core encrypts and decrypts; only on TLS connections. :doc:`/tls` says when not"""


def plain_address(address: Any) -> Address:
    """A socket's address as AnyIO gives it: an IPv6 address as ``(host%scope, port)``; a UNIX
    socket's path as ``str``, an abstract name as ``bytes`` with its leading NUL.
    """
    if isinstance(address, bytes):
        return address
    if isinstance(address, tuple):
        host, port, *rest = address
        scope = rest[1] if len(rest) == 2 else 0
        return (f"{host.partition('%')[0]}%{scope}" if scope else host), port
    return str(address)


# --- options -------------------------------------------------------------------------------------


def set_nodelay(sock: socket.socket, on: bool) -> None:
    """Sets ``TCP_NODELAY``."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, on)


def check_keepalive(keepalive: object) -> None:
    """:raises TypeError: for anything but a ``bool`` or a :class:`~anypoll.Keepalive`"""
    if not isinstance(keepalive, (bool, Keepalive)):
        raise TypeError(f"keepalive must be a bool or a Keepalive, not {keepalive!r}")


def set_keepalive(sock: socket.socket, keepalive: bool | Keepalive) -> None:
    """Sets ``SO_KEEPALIVE``, and its timing if a :class:`~anypoll.Keepalive` is given.

    :raises TypeError: for anything else
    """
    check_keepalive(keepalive)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(keepalive))
    if isinstance(keepalive, Keepalive):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, keepalive.idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, keepalive.interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, keepalive.count)


_UCRED = struct.Struct("=iII")  # struct ucred


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The peer of a connected UNIX socket; see unix(7), ``SO_PEERCRED``."""
    record = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(record))


# --- adopting ------------------------------------------------------------------------------------


def _described(sock: socket.socket) -> tuple[str, str]:
    return socket.AddressFamily(sock.family).name, socket.SocketKind(sock.type).name


def validated(sock_or_fd: Any, *, families: Sequence[int], listening: bool) -> socket.socket:
    """The socket, non-blocking and of the kind that is wanted. The messages are AnyIO's.

    :raises TypeError: if it is neither a socket nor a descriptor
    :raises ValueError: if it is the wrong kind of socket
    """
    if isinstance(sock_or_fd, socket.socket):
        sock, made = sock_or_fd, False
    elif isinstance(sock_or_fd, int):
        if not -(2**31) <= sock_or_fd < 2**31:  # Python would raise an OverflowError
            raise ValueError(_MISSING[listening])
        try:
            sock, made = socket.socket(fileno=sock_or_fd), True
        except OSError as exc:
            if exc.errno == errno.ENOTSOCK:
                raise ValueError("the file descriptor does not refer to a socket") from exc
            raise ValueError(_MISSING[listening]) from exc
    else:
        raise TypeError(f"expected an int or socket, got {type(sock_or_fd).__qualname__} instead")
    try:
        _validate(sock, families, listening=listening)
    except BaseException:
        if made:
            sock.detach()  # the caller keeps the descriptor
        raise
    sock.setblocking(False)
    return sock


_MISSING = {
    False: "the socket must be connected",
    True: "the socket must be bound to a local address",
}


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _validate(sock: socket.socket, families: Sequence[int], *, listening: bool) -> None:
    try:
        ready = _is_bound(sock) if listening else bool(sock.getpeername() or True)
    except OSError as exc:
        raise ValueError(_MISSING[listening]) from exc
    if not ready:
        raise ValueError(_MISSING[listening])
    if listening and sock.type == socket.SOCK_STREAM and _has_peer(sock):
        raise ValueError("the socket must not be connected")
    family, kind = _described(sock)
    if sock.family not in families:
        wanted = " or ".join(socket.AddressFamily(f).name for f in families)
        raise ValueError(f"address family mismatch: expected {wanted}, got {family}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"socket type mismatch: expected SOCK_STREAM, got {kind}")


def _is_bound(sock: socket.socket) -> bool:
    name = sock.getsockname()
    return bool(name[1] if sock.family in _INET else name)


# --- public surface ------------------------------------------------------------------------------


class SocketSurface(SocketStream):
    """A connection's socket as its user sees it; :class:`anypoll.Connection` has the rest."""

    __slots__ = ()

    _core: Core

    def fileno(self) -> int:
        """The descriptor; -1 once the connection is closed."""
        return -1 if self._core.closed else max(_epoll.conn_fd(self._core.handle, 0), -1)

    @property
    def local_address(self) -> Address:
        """The address of this end: host and port, or the path of a UNIX socket. An abstract name is
        ``bytes``, with its leading NUL.

        :raises ClosedResourceError: if the connection is closed
        """
        return plain_address(self._socket().getsockname())

    @property
    def remote_address(self) -> Address:
        """The address of the other end.

        :raises ClosedResourceError: if the connection is closed and was not accepted (or was
            accepted by a UNIX socket, from a peer with a name)
        :raises OSError: if it was not accepted, and the peer had gone before this was first asked
        """
        core = self._core
        known = _epoll.peer_address(core.peer) if core.peer is not None else None
        return known if known is not None else plain_address(self._socket().getpeername())

    def set_nodelay(self, on: bool) -> None:
        """Sets ``TCP_NODELAY``, which is on by default; ignored on UNIX sockets.

        :raises ClosedResourceError: if the connection is closed
        :raises TypeError: for anything but a ``bool``
        """
        if not isinstance(on, bool):
            raise TypeError(f"on must be a bool, not {on!r}")
        if self._is_tcp():
            set_nodelay(self._raw_socket, on)

    def set_keepalive(self, keepalive: bool | Keepalive) -> None:
        """Sets TCP keepalive; ``True`` uses the system's timing; ignored on UNIX sockets.

        :raises ClosedResourceError: if the connection is closed
        :raises TypeError: for anything but a ``bool`` or a :class:`Keepalive`
        """
        check_keepalive(keepalive)
        if self._is_tcp():
            set_keepalive(self._raw_socket, keepalive)

    def _is_tcp(self) -> bool:
        if self._core.closed:
            raise self._core._own(ClosedResourceError())
        return self._core.kind == TCP

    # --- for AnyIO -------------------------------------------------------------------------------

    @property
    def _raw_socket(self) -> socket.socket:
        core = self._core
        if core.raw is not None:
            return core.raw
        return core.raw_socket()

    def _socket(self) -> socket.socket:
        if self._core.closed:
            raise self._core._own(ClosedResourceError())
        return self._raw_socket

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """AnyIO's :class:`~anyio.abc.SocketAttribute` and :class:`anypoll.AnypollAttribute`, where
        they apply.
        """
        return {**self._anyio_attributes(), **self._own_attributes()}

    def _anyio_attributes(self) -> dict[Any, Callable[[], Any]]:
        attributes: dict[Any, Callable[[], Any]] = {
            SocketAttribute.family: lambda: self._raw_socket.family,
            SocketAttribute.local_address: lambda: self.local_address,
            SocketAttribute.raw_socket: lambda: self._raw_socket,
        }
        try:
            remote: Any = self.remote_address
        except (OSError, ClosedResourceError):
            remote = None
        if remote is not None:
            attributes[SocketAttribute.remote_address] = lambda: remote
        if self._core.kind == TCP:
            attributes[SocketAttribute.local_port] = lambda: self._socket().getsockname()[1]
            if remote is not None:
                attributes[SocketAttribute.remote_port] = lambda: remote[1]
        return attributes

    def _own_attributes(self) -> dict[Any, Callable[[], Any]]:
        core = self._core
        attributes: dict[Any, Callable[[], Any]] = {
            AnypollAttribute.statistics: core.statistics,
            ORIGIN_KEY: lambda: core.number,
        }
        if not core.closed:
            attributes[AnypollAttribute.poller] = lambda: runtime.poller_index(core.poller)
            if core.kind != TCP:
                attributes[AnypollAttribute.peer_credentials] = lambda: peer_credentials(
                    self._socket()
                )
        return attributes

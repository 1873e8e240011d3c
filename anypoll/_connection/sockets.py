"""The socket of a connection, as its user sees it: descriptor, addresses, options, attributes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from anyio import ClosedResourceError
from anyio.abc import SocketAttribute, SocketStream

from .. import _epoll
from .._epoll import TCP
from .._loop import runtime
from .._network import sockets as _sockets
from .attributes import ORIGIN_KEY, AnypollAttribute

if TYPE_CHECKING:
    from .._buffers.limits import Keepalive
    from .core import Core


class SocketSurface(SocketStream):
    """See the module; :class:`anypoll.Connection` has the rest."""

    __slots__ = ("_core",)

    _core: Core

    def fileno(self) -> int:
        """The descriptor; -1 once the connection is closed."""
        return -1 if self._core.closed else max(_epoll.conn_fd(self._core.handle, 0), -1)

    @property
    def local_address(self) -> _sockets.Address:
        """The address of this end: host and port, or the path of a UNIX socket; an abstract name,
        with its leading NUL, is ``bytes``.

        :raises ClosedResourceError: if the connection is closed
        """
        return _sockets.plain_address(self._socket().getsockname())

    @property
    def remote_address(self) -> _sockets.Address:
        """The address of the other end.

        :raises ClosedResourceError: if the connection is closed, and was not accepted (or by a
            UNIX socket, from a peer with a name)
        :raises OSError: if the peer had gone before anybody asked, and it was not accepted
        """
        core = self._core
        known = _epoll.peer_address(core.peer) if core.peer is not None else None
        return known if known is not None else _sockets.plain_address(self._socket().getpeername())

    def set_nodelay(self, on: bool) -> None:
        """``TCP_NODELAY``, which is on at first; ignored on UNIX sockets.

        :raises ClosedResourceError: if the connection is closed
        :raises TypeError: for anything but a ``bool``
        """
        if not isinstance(on, bool):
            raise TypeError(f"on must be a bool, not {on!r}")
        if self._is_tcp():
            _sockets.set_nodelay(self._raw_socket, on)

    def set_keepalive(self, keepalive: bool | Keepalive) -> None:
        """TCP's keepalive probes, ``True`` with the system's times; ignored on UNIX sockets.

        :raises ClosedResourceError: if the connection is closed
        :raises TypeError: for anything but a ``bool`` or a :class:`Keepalive`
        """
        _sockets.check_keepalive(keepalive)
        if self._is_tcp():
            _sockets.set_keepalive(self._raw_socket, keepalive)

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
        """AnyIO's :class:`~anyio.abc.SocketAttribute` and :class:`anypoll.AnypollAttribute`, as far
        as they apply.
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
                attributes[AnypollAttribute.peer_credentials] = lambda: _sockets.peer_credentials(
                    self._socket()
                )
        return attributes

"""Listen targets: TCP addresses, a UNIX path, sockets already bound, or listeners."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from anyio.streams.stapled import MultiListener

from .._buffers.arguments import count, flag
from .._connection.sockets import validated
from .._network.addresses import host_text, port_number
from .._network.binding import BACKLOG_MOST, tcp_listening, unix_listening
from .._network.listener import SocketListener


@dataclass(frozen=True, slots=True)
class ListenTargets:
    """What to listen on: exactly one kind of target."""

    host: Any
    port: int | None
    path: Any
    path_mode: int | None
    sock: Any
    listeners: Any
    backlog: int
    reuse_port: bool

    def __post_init__(self) -> None:
        tcp = self.host is not None or self.port is not None
        given = [tcp, self.path is not None, self.sock is not None, self.listeners is not None]
        if sum(given) != 1:
            raise ValueError("serve() needs exactly one of host/port, path, sock and listeners")
        if self.port is not None:
            port_number(self.port, "port")
        if self.host is not None:
            host_text(self.host, "host")
        if self.path_mode is not None:
            count(self.path_mode, "path_mode", most=0o7777)
        if self.sock in ([], ()):
            raise ValueError("sock must be a socket, a descriptor, or a list of some, not empty")
        count(self.backlog, "backlog", least=1)
        flag(self.reuse_port, "reuse_port")

    async def sockets(self) -> list[socket.socket]:
        """Listening sockets.

        :raises OSError: if binding fails; nothing is left open
        """
        if self.path is not None:
            mode, backlog = self.path_mode, self.backlog
            return [await unix_listening(self.path, mode=mode, backlog=backlog)]
        if self.sock is not None:
            return self._listening(self.sock)
        return await tcp_listening(
            None if self.host is None else host_text(self.host, "host"),
            self.port or 0,
            family=socket.AF_UNSPEC,
            backlog=self.backlog,
            reuse_port=self.reuse_port,
        )

    def _listening(self, given: Any) -> list[socket.socket]:
        """The given sockets, validated; if any is invalid, all descriptors stay the caller's."""
        families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        sockets: list[socket.socket] = []
        made: list[socket.socket] = []
        try:
            for one in given if isinstance(given, (list, tuple)) else [given]:
                sock = validated(one, families=families, listening=True)
                made += [] if sock is one else [sock]
                if any(sock.fileno() == other.fileno() for other in sockets):
                    raise ValueError(f"sock must not contain the descriptor {sock.fileno()} twice")
                sockets.append(sock)
            for sock in sockets:
                sock.listen(min(self.backlog, BACKLOG_MOST))
        except BaseException:
            for sock in made:
                sock.detach()
            raise
        return sockets


def flat(listeners: Any) -> Iterable[SocketListener]:
    """The socket listeners in what :func:`anypoll.create_tcp_listener` and the like returned."""
    if isinstance(listeners, SocketListener):
        yield listeners
    elif isinstance(listeners, MultiListener):
        yield from flat(listeners.listeners)
    elif isinstance(listeners, (list, tuple)):
        for listener in listeners:
            yield from flat(listener)
    else:
        raise ValueError(f"serve() cannot use the listener {listeners!r}")


def all_different(listeners: list[SocketListener]) -> list[SocketListener]:
    """:raises ValueError: if there are none, or one appears twice"""
    if not listeners or len(set(listeners)) < len(listeners):
        raise ValueError("listeners must be SocketListeners, at least one, and each only once")
    return listeners

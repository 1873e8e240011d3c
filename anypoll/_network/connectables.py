"""AnyIO connectables that open anypoll connections.

They subclass AnyIO's, so whatever accepts, distinguishes or wraps those works with these.
"""

from __future__ import annotations

from dataclasses import dataclass

import anyio

from .._connection.stream import Connection, UNIXConnection
from .addresses import host_text, unix_path
from .dialer import connect_tcp, connect_unix

__all__ = ("TCPConnectable", "UNIXConnectable")


@dataclass
class TCPConnectable(anyio.TCPConnectable):
    """A TCP server to connect to, like :class:`anyio.TCPConnectable`.

    :param host: address or name of the server
    :param port: 1 to 65535
    :raises ValueError, TypeError: for any other ``port``, or an invalid ``host``
    """

    def __post_init__(self) -> None:
        if not isinstance(self.port, int):
            raise TypeError(f"port must be an integer, not {type(self.port).__name__}")
        host_text(self.host, "host")
        super().__post_init__()

    async def connect(self) -> Connection:
        """Opens a new connection.

        :raises ConnectionFailed: if connecting fails, with the ``OSError`` as its cause
        """
        try:
            connection: Connection = await connect_tcp(self.host, self.port)
        except OSError as exc:
            where = f"{self.host}:{self.port}"
            raise anyio.ConnectionFailed(f"error connecting to {where}: {exc}") from exc
        return connection


@dataclass
class UNIXConnectable(anyio.UNIXConnectable):
    """A UNIX socket to connect to, like :class:`anyio.UNIXConnectable`.

    :param path: ``str``, ``bytes`` or ``PathLike``; a leading NUL makes it abstract
    :raises ValueError, TypeError: for an invalid ``path``
    """

    def __post_init__(self) -> None:
        unix_path(self.path)

    async def connect(self) -> UNIXConnection:
        """Opens a new connection.

        :raises ConnectionFailed: if connecting fails, with the ``OSError`` as its cause
        """
        try:
            return await connect_unix(self.path)
        except OSError as exc:
            raise anyio.ConnectionFailed(f"error connecting to {self.path!r}: {exc}") from exc

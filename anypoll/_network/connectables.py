"""AnyIO connectables that open anypoll connections.

They are subclasses of AnyIO's, so whatever takes, tells apart or wraps those takes these.
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
    """A TCP server to connect to, as :class:`anyio.TCPConnectable`.

    :param host: address or name of the server
    :param port: 1 to 65535
    :raises ValueError, TypeError: for another ``port``, and for a ``host`` that is none
    """

    def __post_init__(self) -> None:
        if not isinstance(self.port, int):
            raise TypeError(f"port must be an integer, not {type(self.port).__name__}")
        host_text(self.host, "host")
        super().__post_init__()

    async def connect(self) -> Connection:
        """A new connection.

        :raises ConnectionFailed: if there is none to be had, with the ``OSError`` as its cause
        """
        try:
            connection: Connection = await connect_tcp(self.host, self.port)
        except OSError as exc:
            where = f"{self.host}:{self.port}"
            raise anyio.ConnectionFailed(f"error connecting to {where}: {exc}") from exc
        return connection


@dataclass
class UNIXConnectable(anyio.UNIXConnectable):
    """A UNIX socket to connect to, as :class:`anyio.UNIXConnectable`.

    :param path: ``str``, ``bytes`` or ``PathLike``; a leading NUL makes it abstract
    :raises ValueError, TypeError: for a ``path`` that is none
    """

    def __post_init__(self) -> None:
        unix_path(self.path)

    async def connect(self) -> UNIXConnection:
        """A new connection.

        :raises ConnectionFailed: if there is none to be had, with the ``OSError`` as its cause
        """
        try:
            return await connect_unix(self.path)
        except OSError as exc:
            raise anyio.ConnectionFailed(f"error connecting to {self.path!r}: {exc}") from exc

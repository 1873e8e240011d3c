"""What TLS adds to the lives of a server's connections.

A server without it asks here too, and gets the plain connections: whoever asks need not know.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from anyio import EndOfStream

from .._buffers.errors import normal_end
from .handshake import handshake
from .requests import Calls

if TYPE_CHECKING:
    from .._connection.requests import Function
    from .._connection.stream import Connection
    from .connection import TLSConnection


class HandshakeError(Exception):
    """A peer has not come to TLS; the cause says why."""


class TLSSessions:
    """The TLS sessions of one server.

    :param context: ``None``: it has none
    :param timeout: seconds for a handshake
    :param on_request: ``None``: the server has a handler
    """

    def __init__(
        self, context: ssl.SSLContext | None, timeout: float, on_request: Function | None
    ) -> None:
        self._context = context
        self._timeout = timeout
        self._on_request = on_request
        self._streams: dict[Connection, TLSConnection] = {}
        self._calls: dict[Connection, Calls] = {}

    async def open(self, connection: Connection) -> None:
        """Does the handshake, if there is one to do.

        :raises HandshakeError: if nothing has come of it, for which the peer is to blame
        :raises EndOfStream: if the server is ending
        """
        if self._context is None:
            return
        try:
            stream = await handshake(connection, self._context, self._timeout)
        except EndOfStream:
            raise
        except Exception as exc:
            if normal_end(exc, connection._core.number) is None:
                raise
            raise HandshakeError from exc
        self._streams[connection] = stream
        if self._on_request is not None:
            self._calls[connection] = Calls(stream, self._on_request)

    def is_open(self, connection: Connection) -> bool:
        """Whether the user's code may get to see it."""
        return self._context is None or connection in self._streams

    def face(self, connection: Connection) -> Any:
        """The connection as the user's code gets it."""
        return self._streams.get(connection, connection)

    def call(self, connection: Connection, function: Function) -> Awaitable[Any]:
        """Calls the handler; or the request function, as often as is due."""
        calls = self._calls.get(connection)
        return function(self.face(connection)) if calls is None else calls.make()

    # --- the end ---------------------------------------------------------------------------------

    def has_ended(self, connection: Connection) -> bool:
        """Whether the peer has ended its side in a way that the socket does not show."""
        stream = self._streams.get(connection)
        return stream is not None and stream._engine.ended

    def explained(self, connection: Connection, exc: BaseException | None) -> BaseException | None:
        """The reason of an end, as the session knows it."""
        calls = self._calls.get(connection)
        return exc if calls is None else calls.explained(exc)

    def postpone_end(self, connection: Connection) -> bool:
        """The server is ending. Whether something has begun that the connection knows nothing of:
        then it ends behind that.
        """
        calls = self._calls.get(connection)
        return calls is not None and calls.postpone_end()

    async def finish(self, connection: Connection, timeout: float) -> None:
        """What is pending goes out, and the peer gets the end of this side."""
        stream = self._streams.get(connection)
        await (connection._core.finish(timeout) if stream is None else stream._finish(timeout))

    def shut(self, connection: Connection) -> None:
        """No call of the session finds anything any more."""
        if (stream := self._streams.get(connection)) is not None:
            stream._shut()

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        self._streams.pop(connection, None)
        self._calls.pop(connection, None)

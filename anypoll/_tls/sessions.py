"""TLS sessions of a server's connections: handshake, request mode and closing of each.

A server without TLS asks here too, and gets the plain connections: the caller need not know.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import EndOfStream

from .._buffers.errors import normal_end
from .connection import TLSConnection
from .handshake import handshake
from .memory.requests import Calls
from .memory.session import MemorySession

if TYPE_CHECKING:
    from .._connection.requests import Function
    from .._connection.stream import Connection
    from .session import TLSHandshake


class HandshakeError(Exception):
    """A peer has failed the TLS handshake; the cause says why."""


class TLSCounts(NamedTuple):
    """What became of the handshakes of one server."""

    handshakes: int = 0
    resumed: int = 0
    failed: int = 0
    seconds: float = 0.0


class TLSSessions:
    """The TLS sessions of one server.

    :param context: ``None``: no TLS
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
        self.counts = TLSCounts()
        """replaced as a whole, so that all are of one moment in any thread"""

    async def open(self, connection: Connection) -> None:
        """Performs the handshake, if the server uses TLS.

        :raises HandshakeError: if it fails through the fault of the peer
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
            self.counts = self.counts._replace(failed=self.counts.failed + 1)
            raise HandshakeError from exc
        self._count(stream.handshake)
        self._streams[connection] = stream
        session = stream._session
        if self._on_request is not None and isinstance(session, MemorySession):
            self._calls[connection] = Calls(stream, session, self._on_request)

    def _count(self, made: TLSHandshake) -> None:
        done, resumed, failed, seconds = self.counts
        self.counts = TLSCounts(done + 1, resumed + made.resumed, failed, seconds + made.seconds)

    def is_open(self, connection: Connection) -> bool:
        """Whether user code may see the connection yet."""
        return self._context is None or connection in self._streams

    def face(self, connection: Connection) -> Any:
        """The connection as user code sees it."""
        return self._streams.get(connection, connection)

    def below(self, conn: Any) -> Connection:
        """The connection that user code sees like this."""
        return conn.connection if isinstance(conn, TLSConnection) else conn

    def calls_for_plaintext(self, connection: Connection) -> bool:
        """Whether request mode itself finds out which calls are due: all but the session of a
        connection works on plaintext.
        """
        return connection not in self._calls

    def call(self, connection: Connection, function: Function) -> Awaitable[Any]:
        """Calls the handler or the request function; the latter as often as is due, if the
        connection does not know how often that is.
        """
        calls = self._calls.get(connection)
        return function(self.face(connection)) if calls is None else calls.make()

    # --- end -------------------------------------------------------------------------------------

    def has_ended(self, connection: Connection) -> bool:
        """Whether the peer has ended its side in a way that the socket does not show."""
        stream = self._streams.get(connection)
        return stream is not None and stream._session.has_ended

    def explained(self, connection: Connection, exc: BaseException | None) -> BaseException | None:
        """The reason for an end, as the session knows it."""
        calls = self._calls.get(connection)
        return exc if calls is None else calls.explained(exc)

    def postpone_end(self, connection: Connection) -> bool:
        """The server is ending. Returns whether something has begun that the connection knows
        nothing of: then the end waits for that.
        """
        calls = self._calls.get(connection)
        return calls is not None and calls.postpone_end()

    async def finish(self, connection: Connection, timeout: float) -> None:
        """Sends pending output, then ends this side of the connection."""
        stream = self._streams.get(connection)
        await (connection._core if stream is None else stream._session).finish(timeout)

    def shut(self, connection: Connection) -> None:
        """From now on no call of the session finds anything."""
        if (stream := self._streams.get(connection)) is not None:
            stream._session.shut()

    def forget(self, connection: Connection) -> None:
        """Forgets a connection that has ended."""
        self._streams.pop(connection, None)
        self._calls.pop(connection, None)

"""The server's TLS handshake with an untrusted peer."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from anyio import BrokenResourceError

from .connection import TLSConnection

if TYPE_CHECKING:
    from .._connection.stream import Connection


async def handshake(
    connection: Connection,
    ssl_context: ssl.SSLContext,
    timeout: float | None,
    *,
    standard_compatible: bool = True,
) -> TLSConnection:
    """Performs a server's handshake. On failure the connection is closed, and the exception is one
    that a peer can cause, marked as that connection's; nothing is logged.

    :param timeout: seconds for all of it; afterwards the connection's ``read_timeout`` applies
    :raises ReadTimeout: after ``timeout`` seconds
    :raises BrokenResourceError: if the peer has gone, or with the ``ssl.SSLError`` as its cause
    :raises EndOfStream: if the server is ending
    """
    core = connection._core
    read_timeout, core.read_timeout = core.read_timeout, timeout
    try:
        stream = await TLSConnection.wrap(
            connection,
            server_side=True,
            ssl_context=ssl_context,
            standard_compatible=standard_compatible,
        )
    except BaseException as exc:
        connection._core.close()
        connection._core.release_callbacks()
        if not isinstance(exc, ssl.SSLError):
            raise
        raise connection._core._own(BrokenResourceError()) from exc
    stream._session.read_timeout = read_timeout
    return stream

"""Request mode over TLS: calls for plaintext, made of calls for ciphertext.

The connection below is in request mode, and its call comes here. What has come may be a part of a
record, a message of TLS itself, or several requests; so everything is decrypted, and the user's
function is called as often as the rules of request mode say for the plaintext.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from anyio import EndOfStream

if TYPE_CHECKING:
    from ._tls import TLSConnection


class Calls:
    """Of one TLS connection."""

    __slots__ = ("_at", "_function", "_stream")

    def __init__(self, stream: TLSConnection, function: Callable[[Any], Awaitable[Any]]) -> None:
        self._stream = stream
        self._function = function
        self._at = (-1, -1)  # what was consumed and decrypted when the last call began

    async def make(self) -> None:
        """Those that are due.

        :raises EndOfStream: if none will ever be due, because the peer has ended its side
        :raises BrokenResourceError: if it has sent what is no TLS, or has cut the session off
        """
        stream, engine = self._stream, self._stream._engine
        while self._is_due():
            if stream._sink.stands_high:  # of a peer that does not read
                await stream._sink.drain()
            await self._function(stream)
            if stream.writer._size and not engine.closed:
                stream._sink.push()
                engine.send_collected()
        if engine.closed:
            return
        if engine.failure:
            raise engine.broken()
        if engine.ended:
            raise engine.core._own(EndOfStream())

    def _is_due(self) -> bool:
        unread = len(self._stream.reader)  # this decrypts what has arrived
        decrypted = self._stream._engine.decrypted
        last, self._at = self._at, (decrypted - unread, decrypted)
        return unread > 0 and last != self._at

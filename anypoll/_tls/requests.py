"""Request mode over TLS: calls for plaintext, driven by calls for ciphertext.

The connection below is in request mode, and its call comes here. What has come may be a part of a
record, a message of TLS itself, or several requests; so everything is decrypted, and the user's
function is called as often as the rules of request mode say for the plaintext. The answers go out
together, when there is no more to answer or a call has to wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError, EndOfStream

from .._buffers.errors import ReadTimeout, normal_end
from .._epoll import IS_EOF
from .output import within

if TYPE_CHECKING:
    from .connection import TLSConnection


class Calls:
    """Of one TLS connection."""

    __slots__ = ("_consumed", "_decrypted", "_function", "_stream")

    def __init__(self, stream: TLSConnection, function: Callable[[Any], Awaitable[Any]]) -> None:
        self._stream = stream
        self._function = function
        self._consumed = self._decrypted = -1  # bytes of plaintext, when the last call began

    async def make(self) -> None:
        """Those that are due.

        :raises EndOfStream: if none will ever be due, because the peer has ended its side
        :raises BrokenResourceError: if it has sent what is no TLS, or has cut the session off
        :raises MessageTooLarge: if the last call has left more than ``read_limit`` where it was
        :raises ReadTimeout: if output above high water did not drain within ``read_timeout``
        """
        while await self._make_some() and self._stream._sink.stands_high:
            if not await self._drain():  # OpenSSL answers too, without any call
                return

    async def _make_some(self) -> bool:
        """Those that are due as long as output does not stand high. False: it is closed."""
        stream, engine = self._stream, self._stream._engine
        budget = engine.core.budget
        while self._is_due():
            await self._function(stream)
            budget -= 1
            if not engine.closed:
                await self._after_call(pause=not budget)
            budget = budget or engine.core.budget
        if engine.closed:
            return False
        stream._source.consume(0)  # what was consumed is nothing that has begun
        engine.follow_draining()
        if engine.failure:
            raise engine.broken()
        if engine.ended:
            raise engine.core._own(EndOfStream())
        return True

    async def _drain(self) -> bool:
        stream = self._stream
        core, drain = stream._engine.core, stream._sink.drain
        return await within(core, stream.read_timeout, drain, ReadTimeout, "output not drained")

    async def _after_call(self, *, pause: bool) -> None:
        """What was written is encrypted, and goes together with the next answer.

        :param pause: others get their turn
        """
        sink, core = self._stream._sink, self._stream._engine.core
        sink.push()
        if core.requests is not None:
            core.requests.carries = core.writer._size > 0
        if sink.stands_high:
            await self._drain()
        elif pause:
            await core.hub.checkpoint()

    def _is_due(self) -> bool:
        """Whether there is anything unread; but if the last call has consumed nothing, only if
        there is more than when it began.
        """
        engine = self._stream._engine
        unread = len(self._stream.reader)  # this decrypts what has arrived
        if not unread:
            return False
        consumed = engine.decrypted - unread
        if consumed == self._consumed:
            if engine.decrypted == self._decrypted and not self._is_there_more():
                return False
            self._stream._source.check_request(engine.decrypted - consumed)
        self._consumed, self._decrypted = consumed, engine.decrypted
        return True

    def _is_there_more(self) -> bool:
        """Decrypts a record beyond what is read ahead, if there is one."""
        engine = self._stream._engine
        while not self._stream._sink.stands_high and engine.arrived():
            if engine.decrypted > self._decrypted:
                return True
        return False

    # --- the end ---------------------------------------------------------------------------------

    def explained(self, exc: BaseException | None) -> BaseException | None:
        """An end of the connection is one of the session only if the peer has said so before."""
        engine = self._stream._engine
        core = engine.core
        if exc is None or core.closed or engine.ended or not core.status() & IS_EOF:
            return exc
        if normal_end(exc, core.number) == "eof":
            try:
                while engine.arrived():
                    pass
            except BrokenResourceError as broken:
                return broken
        return exc

    def postpone_end(self) -> bool:
        """The server is ending. Whether something has begun: the end is due behind that."""
        engine = self._stream._engine
        engine.ending = engine.ending or engine.has_begun
        return engine.has_begun

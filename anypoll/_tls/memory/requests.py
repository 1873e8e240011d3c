"""Request mode over TLS: calls for plaintext, driven by calls for ciphertext.

The connection below is in request mode, and its call comes here. The input may be part of a record,
a message of TLS itself, or several requests. So everything is decrypted, and the user's function is
called as often as the rules of request mode require for the plaintext. The answers go out together,
when there is nothing more to answer or a call has to wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError, EndOfStream

from ..._buffers.errors import ReadTimeout, normal_end
from ..._epoll import IS_EOF
from ..session import within

if TYPE_CHECKING:
    from .session import MemorySession


class Calls:
    """The calls for one TLS connection's plaintext."""

    __slots__ = ("_consumed", "_decrypted", "_engine", "_function", "_session", "_stream")

    def __init__(
        self, stream: Any, session: MemorySession, function: Callable[[Any], Awaitable[Any]]
    ) -> None:
        self._stream = stream  # the argument of calls
        self._session = session
        self._engine = session.engine
        self._function = function
        self._consumed = self._decrypted = -1  # bytes of plaintext when the last call began

    async def make(self) -> None:
        """Makes the calls that are due.

        :raises EndOfStream: if none will ever be due, because the peer has ended its side
        :raises BrokenResourceError: if it has sent data that is not TLS, or has cut the session off
        :raises MessageTooLarge: if the last call left more than ``read_limit`` unread
        :raises ReadTimeout: if output above high water did not drain within ``read_timeout``
        """
        while await self._make_some() and self._session.sink.stands_high:
            if not await self._drain():  # OpenSSL also answers without any call
                return

    async def _make_some(self) -> bool:
        """Makes the due calls while output is below high water. False: the stream is closed."""
        session, engine = self._session, self._engine
        budget = engine.core.budget
        while not engine.closed and self._is_due():
            await self._function(self._stream)
            budget -= 1
            if not engine.closed:
                await self._after_call(pause=not budget)
            budget = budget or engine.core.budget
        if engine.closed:
            return False
        session.source.consume(0)  # consumed bytes no longer count as begun
        engine.follow_draining()
        if engine.failure:
            raise engine.broken()
        if engine.ended:
            raise engine.core._own(EndOfStream())
        return True

    async def _drain(self) -> bool:
        session = self._session
        core, drain = self._engine.core, session.sink.drain
        return await within(core, session.read_timeout, drain, ReadTimeout, "output not drained")

    async def _after_call(self, *, pause: bool) -> None:
        """Encrypts what was written, to go out with the next answer.

        :param pause: give other tasks a turn
        """
        sink, core = self._session.sink, self._engine.core
        sink.push()
        if core.requests is not None:
            core.requests.carries = core.writer._size > 0
        if sink.stands_high:
            await self._drain()
        elif pause:
            await core.hub.checkpoint()

    def _is_due(self) -> bool:
        """Whether anything is unread; but if the last call consumed nothing, only whether there is
        more than when it began.
        """
        engine = self._engine
        unread = len(self._session.reader)  # this decrypts what has arrived
        if not unread:
            return False
        consumed = engine.decrypted - unread
        if consumed == self._consumed:
            if engine.decrypted == self._decrypted and not self._is_there_more():
                return False
            self._session.source.check_request(engine.decrypted - consumed)
        self._consumed, self._decrypted = consumed, engine.decrypted
        return True

    def _is_there_more(self) -> bool:
        """Decrypts a record beyond what is read ahead, if there is one."""
        engine = self._engine
        while not self._session.sink.stands_high and engine.arrived():
            if engine.decrypted > self._decrypted:
                return True
        return False

    # --- end -------------------------------------------------------------------------------------

    def explained(self, exc: BaseException | None) -> BaseException | None:
        """The connection's end ends the session properly only if the peer announced it."""
        engine = self._engine
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
        """The server is ending. Returns whether something has begun, which the end waits for."""
        engine = self._engine
        engine.ending = engine.ending or engine.has_begun
        return engine.has_begun

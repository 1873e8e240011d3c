"""A connection's receive path: waiting for bytes or a delimiter.

The reader moves through a window on the C side's first block without calling C. When the window is
not enough, :meth:`Input.fill` asks C, which checks what is buffered, reads the socket if it is
known to be readable, and otherwise arms a wait. After the wake-up the question is asked again from
the start, until it is answered. So cancellation loses nothing, a wake-up needs no payload, and a
timeout that coincides with the data yields the data.

The gate. A waiting reader, a close, output above high water and a spent checkpoint budget must all
stop the reader's fast path. They set ``reader._end = SHUT``, which no request can satisfy; the next
call to C opens the gate again.
"""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    WouldBlock,
)

from .. import _epoll
from .._buffers.arguments import positive, shown
from .._buffers.chain import EMPTY
from .._buffers.errors import MessageTooLarge
from .._buffers.reader import SCATTER, SHUT
from .._epoll import (
    EDELIM,
    EQUEUED,
    NEW_BLOCK,
    NOWAIT,
    conn_buffered,
    conn_consume,
    conn_find,
    conn_queued,
    conn_read,
)
from .endpoint import AGAIN
from .output import Output

_WAITING = frozenset({AGAIN, EQUEUED})  # the wait is armed


class Input(Output):
    """A connection's receive path; see the module."""

    __slots__ = ()

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` exceeds the limit for a single request"""
        if n > self.limits.read_limit:
            limit = self.limits.read_limit
            raise self._own(MessageTooLarge(f"{shown(n)} bytes asked for; read_limit is {limit}"))

    def fill_nowait(self, n: int, flags: int = 0) -> None:
        """Like :meth:`fill`, but without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        self._enter_reading()
        self._reading = False
        result = conn_read(self.handle, self.reader._start, n, flags | NOWAIT, 0, b"", 0)
        if result < 0:
            self.reader._end = SHUT  # C may have moved the buffered bytes
        if result == AGAIN:
            raise self._own(WouldBlock())
        if result < 0:
            raise self._read_error(result)
        if not flags & SCATTER and n:
            if result & NEW_BLOCK:
                self._show()
            self.reader._end = result & (NEW_BLOCK - 1)

    def _enter_reading(self) -> None:
        if self._reading:
            raise BusyResourceError("reading from")
        self._check_usable()
        self._reading = True

    def _ended(self, code: int) -> Exception:
        """The reason why no more input will come. Output written in answer to earlier input must
        not be lost if the handler lets the exception pass, so it is sent as if the reader waited.
        """
        if self.writer._size:
            self._send_pending()
        self.reader._end = SHUT  # C may have moved the buffered bytes
        return self._read_error(code)

    # --- buffered input --------------------------------------------------------------------------

    def buffered(self) -> int:
        """Unread bytes; 0 once the connection is closed."""
        if self.closed:
            return 0
        return max(conn_buffered(self.handle, self.reader._start), 0) + self._straight

    def consume(self, n: int) -> None:
        """Consumes buffered bytes, whichever blocks they lie in, and closes the window; the C side
        will hand out the block again.
        """
        reader = self.reader
        conn_consume(self.handle, reader._start, n)
        reader._view = EMPTY
        reader._start = reader._end = 0

    def take_parts(self, n: int) -> list[memoryview]:
        """Consumes buffered bytes; returns a view for each block that they lie in."""
        parts, reader = [], self.reader
        while n > 0:
            self._show()
            stop = min(reader._start + n, reader._end)
            parts.append(reader._view[reader._start : stop])
            n -= stop - reader._start
            reader._start = stop
        return parts

    # --- delimiters ------------------------------------------------------------------------------

    def _not_found(self, max_bytes: int) -> Exception:
        return self._own(DelimiterNotFound(max_bytes))

    def find_nowait(self, delimiter: bytes, max_bytes: int) -> int:
        """Like :meth:`find`, but without waiting.

        :raises WouldBlock: if the delimiter is not there
        """
        self._enter_reading()
        self._reading = False
        size = len(delimiter)
        result = conn_find(
            self.handle, self.reader._start, delimiter, size, max_bytes, NOWAIT, 0, b"", 0
        )
        if result == AGAIN:
            raise self._own(WouldBlock())
        return self._found(result, max_bytes)

    def _found(self, result: int, max_bytes: int) -> int:
        if result == EDELIM:
            raise self._own(DelimiterNotFound(max_bytes))
        if result < 0:
            raise self._ended(result)
        length = result & (NEW_BLOCK - 1)
        reader = self.reader
        if result & NEW_BLOCK:
            self._show()
        if reader._start + length > reader._end:
            end = conn_read(self.handle, reader._start, length, NOWAIT, 0, b"", 0)
            reader._end = end & (NEW_BLOCK - 1)
        return length

    async def _before_reading(self, deadline: int) -> bool:
        """Prepares a reader call: output above high water must drain, and a checkpoint is taken if
        one is due. Returns whether the task was suspended.
        """
        reader = self.reader
        suspended = await self._bound_output(deadline)
        if reader._budget <= 0 and not suspended:
            reader._end = SHUT  # nobody else gets any bytes meanwhile
            await self.hub.checkpoint()
            suspended = True
        if suspended:
            reader._budget = self.budget
            if self.closed:
                raise self._own(ClosedResourceError())
        return suspended

    def has_arrived(self) -> bool:
        """Whether any input is unread, including input not yet read from the socket, and part of
        what is still to be decrypted.
        """
        if self.closed:
            return False
        if self.session is not None and self.session.has_begun:
            return True
        return self._straight > 0 or _epoll.conn_arrived(self.handle, self.reader._start) > 0

    def _end_if_drained(self) -> None:
        """Called when the server is ending: keeps a wait with nothing unread from beginning."""
        if not self.has_arrived():
            _epoll.conn_disarm_read(self.handle)
            raise self._own(EndOfStream())

    def _check_unread(self) -> None:
        """Called if a call of request mode has left input unread.

        :raises MessageTooLarge: if that is more than the limit for a single request
        """
        if (unread := self.buffered()) > self.limits.read_limit:
            self.check_request(unread)

    def _stop_waiting(self) -> None:
        self.hub.readers.pop(self.number, None)
        _epoll.conn_disarm_read(self.handle)

    def _max_bytes(self, value: SupportsIndex) -> int:
        return positive(value, "max_bytes")

    async def _checkpoint_and_raise(self, exc: Exception | type[Exception]) -> NoReturn:
        try:
            await self.hub.checkpoint()
            raise exc
        finally:
            del exc

    def end_if_idle(self) -> None:
        """From now on, a wait with nothing unread (a current one too) sees the end of stream."""
        self._begin_draining()
        self.hub.wake_reader(self.number)
        if self.requests is not None:
            self.requests.on_draining()

    @property
    def idle(self) -> bool:
        """Whether a reader waits with nothing unread and nothing unsent."""
        return (
            self.hub.waits(self.number)
            and not self.writer._size
            and conn_queued(self.handle) <= 0
            and conn_buffered(self.handle, self.reader._start) == 0
        )

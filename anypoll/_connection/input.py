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

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    WouldBlock,
)

from .. import _epoll
from .._buffers.arguments import shown
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
    conn_want,
)
from .endpoint import AGAIN, deadline_after
from .output import VECTORED, Output

_WAITING = frozenset({AGAIN, EQUEUED})  # the wait is armed


class Input(Output):
    """A connection's receive path; see the module."""

    __slots__ = ()

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` exceeds the limit for a single request"""
        if n > self.limits.read_limit:
            limit = self.limits.read_limit
            raise self._own(MessageTooLarge(f"{shown(n)} bytes asked for; read_limit is {limit}"))

    def _show(self) -> None:
        """Opens the window on a new block."""
        reader, view = self.reader, self.hub.view
        memory = _epoll.show_block(self.handle, reader._start, view)
        if memory is not None:
            reader._view = memory
        reader._start = view.start
        reader._end = view.end

    async def fill(self, n: int, flags: int = 0) -> bool:
        """Waits for ``n`` unread bytes, and opens the window on them unless ``SCATTER`` is set.
        Returns whether the task was suspended.

        This is one undivided coroutine: every request that has to wait comes through here, and each
        additional frame costs it 100 ns.

        :raises EndOfStream, IncompleteRead: if the peer ends its side first
        :raises ReadTimeout: after ``read_timeout``
        :raises BrokenResourceError, ClosedResourceError, BusyResourceError: as AnyIO's streams do
        """
        if self._reading:
            raise BusyResourceError("reading from")
        if self.closed:
            raise self._own(ClosedResourceError())
        reader, writer, hub, handle = self.reader, self.writer, self.hub, self.handle
        deadline = 0 if self.read_timeout is None else deadline_after(self.read_timeout)
        self._reading = True
        suspended = False
        try:
            if reader._budget <= 0 or writer._size >= VECTORED or self.number in hub.outputs:
                suspended = await self._before_reading(deadline)
            while True:
                size = writer._size
                if size:
                    output = writer._take_joined() if size < VECTORED else self._send_all()
                    result = conn_read(
                        handle, reader._start, n, flags, deadline, output, len(output)
                    )
                    if result != AGAIN and output:
                        self._after_output(result, output)
                elif deadline or flags:
                    result = conn_read(handle, reader._start, n, flags, deadline, b"", 0)
                else:
                    result = conn_want(handle, reader._start, n)
                if result >= 0:
                    if not suspended:
                        hub.check()
                        reader._budget -= 1
                    if n and not flags & SCATTER:
                        if result & NEW_BLOCK:
                            self._show()
                            result &= NEW_BLOCK - 1
                        reader._end = result
                    return suspended
                if result not in _WAITING:
                    raise self._ended(result)
                if self.draining:
                    self._end_if_drained()
                reader._end = SHUT
                try:
                    end = await hub.wait_read(self.number)
                except BaseException:  # cancelled: nothing was consumed, the buffer has it all
                    self._stop_waiting()
                    raise
                if self.closed:
                    raise self._own(ClosedResourceError())
                reader._budget = self.budget
                if end and not flags and reader._view is not EMPTY:  # unless a release() intervened
                    reader._end = end
                    return True
                suspended = True
        finally:
            self._reading = False

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
            self._send(self.writer._take())
        self.reader._end = SHUT  # C may have moved the buffered bytes
        return self._read_error(code)

    # --- buffered input --------------------------------------------------------------------------

    def buffered(self) -> int:
        """Unread bytes; 0 once the connection is closed."""
        return 0 if self.closed else max(conn_buffered(self.handle, self.reader._start), 0)

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

    async def find(self, delimiter: bytes, max_bytes: int) -> int:
        """Waits for the delimiter, and opens the window on the bytes through it, whose number it
        returns.

        :raises DelimiterNotFound: if it is not within the first ``max_bytes``
        """
        self._enter_reading()
        reader, writer, hub, handle = self.reader, self.writer, self.hub, self.handle
        deadline = 0 if self.read_timeout is None else deadline_after(self.read_timeout)
        length = len(delimiter)
        try:
            if reader._budget <= 0 or writer._size >= VECTORED or self.number in hub.outputs:
                await self._before_reading(deadline)
            while True:
                size = writer._size
                output = writer._take_joined() if size < VECTORED else self._send_all()
                start = reader._start
                result = conn_find(
                    handle, start, delimiter, length, max_bytes, 0, deadline, output, len(output)
                )
                if output and result != AGAIN:
                    self._after_output(result, output)
                if result not in _WAITING:
                    reader._budget -= 1
                    return self._found(result, max_bytes)
                if self.draining:
                    self._end_if_drained()
                reader._end = SHUT
                try:
                    await hub.wait_read(self.number)
                except BaseException:
                    self._stop_waiting()
                    raise
                if self.closed:
                    raise self._own(ClosedResourceError())
                reader._budget = self.budget
        finally:
            self._reading = False

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
        """Whether any input is unread, including input not yet read from the socket."""
        return not self.closed and _epoll.conn_arrived(self.handle, self.reader._start) > 0

    def _end_if_drained(self) -> None:
        """Called when the server is ending: keeps a wait with nothing unread from beginning."""
        if not self.has_arrived():
            _epoll.conn_disarm_read(self.handle)
            raise self._own(EndOfStream())

    def _stop_waiting(self) -> None:
        self.hub.readers.pop(self.number, None)
        _epoll.conn_disarm_read(self.handle)

    async def receive(self, max_bytes: int) -> bytes:
        """At least one byte, copied; always a checkpoint.

        :raises EndOfStream: when the peer has ended
        """
        reader = self.reader
        try:
            suspended = await self.fill(1)
        except EndOfStream:  # a success, to code that turns it into b""
            await self.hub.checkpoint()
            raise
        if not suspended:
            # A checkpoint before anything is taken: if it is cancelled, the input stays.
            self._reading, end, reader._end = True, reader._end, SHUT
            try:
                await self.hub.checkpoint()
            finally:
                self._reading = False
            if self.closed:
                raise self._own(ClosedResourceError())
            if reader._view is EMPTY:  # a release() intervened
                self.fill_nowait(1)
            else:
                reader._end = end
        start = reader._start
        stop = min(start + max_bytes, reader._end)
        reader._start = stop
        return bytes(reader._view[start:stop])

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
            self.number in self.hub.readers
            and not self.writer._size
            and conn_queued(self.handle) <= 0
            and conn_buffered(self.handle, self.reader._start) == 0
        )

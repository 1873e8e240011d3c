"""Nocopy reading and writing: views into received blocks, and output that is sent in one call.

A :class:`Reader` hands out read-only memoryviews of exactly the bytes that were asked for. A view
stays valid and unchanged for as long as it is held; the block it lies in is recycled when the last
view of it is gone. A small view keeps its whole block alive: copy with ``bytes()`` what is to be
kept for long.

Requests that lie in the window (``_view[_start:_end]``) never leave this module; for all others
``Core.fill`` asks the C side. Anything that must stop the quick path (another task is waiting, the
connection was closed, output stands above high water) sets ``_end`` to a value that no request can
meet. ``_budget`` counts calls that did not suspend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from anyio import EndOfStream

from ._config import count
from ._endpoint import SHUT
from ._epoll import SCATTER, conn_buffered, conn_consume, conn_queued, show_block

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._connection import Core
    from ._epoll import Piece

__all__ = ("Reader", "Writer")

_EMPTY = memoryview(b"")
_REFERENCED = 4096  # bytes objects above this are sent by reference


class Reader:
    """The nocopy input of a connection: ``conn.reader``.

    All counts are bytes. ``n == 0`` gives an empty view at once. Every method that waits raises

    * ``EndOfStream`` if the peer has ended and nothing is buffered, ``IncompleteRead`` if something
      is, but too little: it stays, and a smaller request gets it;
    * ``ReadTimeout`` if the whole call took longer than ``read_timeout``: nothing is consumed;
    * ``MessageTooLarge`` at once for more than ``read_limit``;
    * ``BrokenResourceError`` (with the ``OSError`` as its cause) after a reset, ``IdleTimeout``
      after the idle timeout, ``ClosedResourceError`` after the connection was closed;
    * ``BusyResourceError`` while another task is reading;
    * ``TypeError`` or ``ValueError`` for a count that is not an integer, or negative.

    A call that is cancelled has consumed nothing. A call that finds its bytes does not suspend,
    except for one in ``checkpoint_budget`` calls in a row.
    """

    __slots__ = ("_budget", "_core", "_end", "_limit", "_start", "_view")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._view = _EMPTY
        self._start = self._end = 0
        self._budget = core.budget
        self._limit = core.limits.read_limit

    # --- the window ------------------------------------------------------------------------------

    def _close(self) -> None:
        self._view = _EMPTY
        self._start = 0
        self._end = SHUT

    def _drop_view(self) -> None:
        """The C side has taken the block back: it was read to its end."""
        self._view = _EMPTY
        self._start = 0
        self._end = min(self._end, 0)

    def release(self) -> None:
        """Lets go of what was consumed.

        Never needed for safety, since views keep what they show; it only lets memory be recycled
        earlier.
        """
        if not self._core.closed:
            self._consume(0)

    def __len__(self) -> int:
        """Unread bytes, those included that were read ahead and no call has looked at."""
        core = self._core
        return 0 if core.closed else max(conn_buffered(core.handle, self._start), 0)

    def __bool__(self) -> bool:
        return True  # a reader without input is a reader all the same

    @property
    def buffered(self) -> int:
        """The same as ``len(reader)``."""
        return len(self)

    # --- contiguous views ------------------------------------------------------------------------

    async def peek(self, n: SupportsIndex, /) -> memoryview:
        """``n`` contiguous bytes, which stay unread."""
        if type(n) is int:
            start = self._start
            stop = start + n
            if start < stop <= self._end and self._budget > 0:
                self._budget -= 1
                return self._view[start:stop]
        if type(n) is not int or not 0 < n <= self._limit:
            n = self._count(n)
        await self._core.fill(n)
        start = self._start
        return self._view[start : start + n]

    async def next(self, n: SupportsIndex, /) -> memoryview:
        """``n`` contiguous bytes, consumed."""
        if type(n) is int:
            start = self._start
            stop = start + n
            if start < stop <= self._end and self._budget > 0:
                self._start = stop
                self._budget -= 1
                return self._view[start:stop]
        if type(n) is not int or not 0 < n <= self._limit:
            n = self._count(n)
        await self._core.fill(n)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    async def skip(self, n: SupportsIndex, /) -> None:
        """Consumes ``n`` bytes."""
        n = self._count(n)
        if n <= self._end - self._start and self._budget > 0:
            self._start += n
            self._budget -= 1
            return
        await self._core.fill(n, SCATTER)
        self._consume(n)

    async def until(self, delimiter: bytes, *, max_bytes: SupportsIndex = 65536) -> memoryview:
        """The bytes through the delimiter, consumed.

        :param delimiter: one byte or several; they may lie in different blocks
        :param max_bytes: how far to look, the delimiter included
        :raises DelimiterNotFound: if it is not within the first ``max_bytes`` bytes, however they
            arrived; nothing is consumed then
        :raises TypeError, ValueError: for a delimiter that is empty or not bytes-like
        """
        delimiter, most = self._delimiter(delimiter, max_bytes)
        n = await self._core.find(delimiter, most)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    def peek_nowait(self, n: SupportsIndex, /) -> memoryview:
        """As :meth:`peek`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._have_nowait(n)
        return self._view[self._start : self._start + n]

    def next_nowait(self, n: SupportsIndex, /) -> memoryview:
        """As :meth:`next`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._have_nowait(n)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    def skip_nowait(self, n: SupportsIndex, /) -> None:
        """As :meth:`skip`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._count(n)
        if n <= self._end - self._start:
            self._start += n
            return
        self._core.fill_nowait(n, SCATTER)
        self._consume(n)

    def until_nowait(self, delimiter: bytes, *, max_bytes: SupportsIndex = 65536) -> memoryview:
        """As :meth:`until`, without waiting.

        :raises WouldBlock: if the delimiter is not there, but may still come
        """
        delimiter, most = self._delimiter(delimiter, max_bytes)
        n = self._core.find_nowait(delimiter, most)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    # --- across blocks, and copies ---------------------------------------------------------------

    async def next_parts(self, n: SupportsIndex, /) -> list[memoryview]:
        """``n`` bytes, consumed: a view for each block they lie in, never copied."""
        n = self._count(n)
        await self._core.fill(n, SCATTER)
        return self._parts(n)

    async def read_bytes(self, n: SupportsIndex, /) -> bytes:
        """``n`` bytes, consumed, as a copy."""
        if type(n) is int:
            start = self._start
            stop = start + n
            if start < stop <= self._end and self._budget > 0:
                self._start = stop
                self._budget -= 1
                return bytes(self._view[start:stop])
        parts = await self.next_parts(n)
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    async def read_str(self, n: SupportsIndex, /, encoding: str = "utf-8") -> str:
        """``n`` bytes, consumed and decoded.

        :raises UnicodeDecodeError: if they are not text in ``encoding``; they are consumed
        """
        return (await self.read_bytes(n)).decode(encoding)

    async def read_byte(self) -> int:
        """One byte, consumed, as a number."""
        return (await self.next(1))[0]

    async def readinto(self, buffer: Buffer, /) -> int:
        """Fills ``buffer`` with what is there, consumed; waits only if nothing is.

        Returns the number of bytes: at least 1, or 0 when the peer has ended (or ``buffer`` is
        empty).

        :raises TypeError: if ``buffer`` is not writable
        """
        with memoryview(buffer).cast("B") as into:
            if into.readonly:
                raise TypeError("readinto() needs a writable buffer")
            if not into:
                return 0
            try:
                await self._core.fill(1)
            except EndOfStream:
                return 0
            n = min(len(into), self._end - self._start)
            into[:n] = self._view[self._start : self._start + n]
            self._start += n
            return n

    # --- the slow path ---------------------------------------------------------------------------

    def _count(self, n: SupportsIndex) -> int:
        n = count(n, "n")
        self._core.check_request(n)
        return n

    @staticmethod
    def _delimiter(delimiter: bytes, max_bytes: SupportsIndex) -> tuple[bytes, int]:
        if not isinstance(delimiter, (bytes, bytearray, memoryview)):
            raise TypeError(f"delimiter must be bytes, not {type(delimiter).__name__}")
        if not len(delimiter):
            raise ValueError("delimiter must not be empty")
        return bytes(delimiter), count(max_bytes, "max_bytes", most=2**31)

    def _have_nowait(self, n: SupportsIndex) -> int:
        n = self._count(n)
        if n > self._end - self._start:
            self._core.fill_nowait(n)
        return n

    def _consume(self, n: int) -> None:
        """Consumes bytes that are there, whichever blocks they lie in, and closes the window; the C
        side will hand the block out again.
        """
        conn_consume(self._core.handle, self._start, n)
        self._view = _EMPTY
        self._start = self._end = 0

    def _parts(self, n: int) -> list[memoryview]:
        parts = []
        core, view = self._core, self._core.hub.view
        while n > 0:
            memory = show_block(core.handle, self._start, view)
            if memory is not None:
                self._view = memory
            self._start, self._end = view.start, view.end
            stop = min(self._start + n, self._end)
            parts.append(self._view[self._start : stop])
            n -= stop - self._start
            self._start = stop
        return parts


class Writer:
    """The nocopy output of a connection: ``conn.writer``.

    Writes are plain functions into a buffer; nothing is sent before :meth:`flush`, or before the
    connection's reader has to wait, or the handler ends, or ``aclose()``. After the connection was
    closed or has broken every call raises what its streams raise.
    """

    __slots__ = ("_core", "_high_water", "_pieces", "_reserved", "_reserved_size", "_shut", "_size")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pieces: list[bytes] = []  # what may be sent
        self._size = 0  # bytes in _pieces
        self._high_water = core.limits.write_high_water
        self._reserved: list[memoryview] = []  # what malloc() has handed out
        self._reserved_size = 0
        self._shut = False  # closed, broken, or ended by send_eof()

    # --- what the connection does ----------------------------------------------------------------

    def _close(self) -> None:
        self._pieces = []
        self._size = 0
        self._reserved = []
        self._reserved_size = 0
        self._shut = True

    def _take(self) -> list[Piece]:
        """What may be sent, and is not pending any more; small neighbours are joined."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        if len(pieces) == 1:
            return pieces  # type: ignore[return-value]
        out: list[Piece] = []
        small: list[bytes] = []
        for piece in pieces:
            if len(piece) <= _REFERENCED:
                small.append(piece)
                continue
            if small:
                out.append(b"".join(small))
                small = []
            out.append(piece)
        if small:
            out.append(b"".join(small))
        return out

    def _take_joined(self) -> bytes:
        """What may be sent, in one piece, and not pending any more."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        self._size = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _put_back(self, data: bytes) -> None:
        self._pieces.insert(0, data)
        self._size += len(data)

    # --- writing ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Bytes written and not yet taken by the kernel, an open reservation included."""
        core = self._core
        queued = 0 if core.closed else max(conn_queued(core.handle), 0)
        return self._size + self._reserved_size + queued

    def __bool__(self) -> bool:
        return True

    @property
    def buffered(self) -> int:
        """The same as ``len(writer)``."""
        return len(self)

    @property
    def malloc_len(self) -> int:
        """The bytes of the open reservation."""
        return self._reserved_size

    def write(self, data: Buffer, /) -> int:
        """Appends ``data``; returns its length in bytes.

        ``bytes`` are kept by reference, anything else is copied.

        :raises TypeError: if ``data`` is not bytes-like
        """
        if type(data) is not bytes:
            # not bytes(data) of just anything: that would take a number for a size
            data = data.tobytes() if type(data) is memoryview else bytes(memoryview(data))
        if self._shut:
            raise self._core.why_unwritable()
        if self._reserved:
            self._seal()
        size = len(data)
        self._pieces.append(data)
        self._size += size
        if self._size >= self._high_water:
            self._core.reader._end = SHUT  # the next reader call lets it drain first
        return size

    def write_str(self, data: str, /, encoding: str = "utf-8") -> int:
        """Appends text; returns its length in bytes.

        :raises TypeError: if ``data`` is not a ``str``
        :raises UnicodeEncodeError: if it cannot be encoded
        """
        if not isinstance(data, str):
            raise TypeError(f"a str is required, not {type(data).__name__}")
        return self.write(data.encode(encoding))

    def write_byte(self, value: SupportsIndex, /) -> int:
        """Appends one byte, 0 to 255; returns 1.

        :raises TypeError, ValueError: if it is not an integer in that range
        """
        return self.write(bytes((count(value, "value", most=255),)))

    def malloc(self, n: SupportsIndex, /) -> memoryview:
        """Reserves ``n`` bytes, zeroed, at the end of the output, for the caller to fill.

        The reservation is open until :meth:`malloc_ack`, :meth:`flush` or the next write; a further
        ``malloc`` adds to it. What is written to the memory after that goes nowhere.
        """
        n = count(n, "n", most=2**31)
        self._check()
        memory = memoryview(bytearray(n))
        self._reserved.append(memory)
        self._reserved_size += n
        return memory

    def malloc_ack(self, n: SupportsIndex, /) -> None:
        """Ends the reservation, and keeps only its first ``n`` bytes.

        :raises ValueError: if it is shorter; it stays open then
        """
        n = count(n, "n", most=self._reserved_size)
        self._check()
        self._close_reservation(n)

    def _seal(self) -> None:
        if self._reserved:
            self._close_reservation(self._reserved_size)

    def _close_reservation(self, keep: int) -> None:
        """Copied, since the caller still holds the writable memory."""
        reserved, self._reserved, self._reserved_size = self._reserved, [], 0
        for memory in reserved:
            part = bytes(memory[:keep])
            keep -= len(part)
            if part:
                self._pieces.append(part)
                self._size += len(part)

    def _check(self) -> None:
        if self._shut:
            raise self._core.why_unwritable()

    async def flush(self) -> None:
        """Returns when the kernel has everything that was written.

        :raises WriteTimeout: if that took longer than ``write_timeout``; what is left is pending
        :raises BrokenResourceError: with the ``OSError`` as its cause
        :raises ClosedResourceError: if the connection was or is closed
        :raises BusyResourceError: while another task is sending
        """
        await self._core.flush()

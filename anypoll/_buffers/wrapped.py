"""Adapters that put the nocopy reader and writer on any AnyIO byte stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio.lowlevel
from anyio import (
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
)
from anyio.abc import ByteReceiveStream, ByteSendStream

from .arguments import Limits, as_bytes, shown
from .chain import EMPTY, Chain, Piece
from .errors import ORIGIN_KEY, MessageTooLarge, about
from .reader import SCATTER, SHUT, Reader
from .writer import Writer

_JOINED = 16 * 1024  # output up to this size goes to the stream in one piece
_UNKNOWN = -1  # the stream has not been asked yet


def origin_of(stream: object) -> int | None:
    """The number of the connection that lies below ``stream``, if one does."""
    number = getattr(getattr(stream, "_core", None), "origin", None)
    if isinstance(number, int):
        return number
    with suppress(Exception):  # a closed stream may have lost its attributes
        return stream.extra(ORIGIN_KEY, None)  # type: ignore[attr-defined, no-any-return]
    return None


class StreamSource:
    """Gets more bytes from a stream; see ``Source``.

    The reader's window lies in the first view of a chain of received chunks, which is filled until
    a request can be met. ``_shown`` is where the reader stood when the window was opened: it has
    consumed everything between that and ``reader._start`` since.
    """

    __slots__ = (
        "_chain",
        "_ended",
        "_origin",
        "_reading",
        "_shown",
        "_stream",
        "budget",
        "closed",
        "limits",
        "reader",
    )

    def __init__(self, stream: ByteReceiveStream, budget: int) -> None:
        self._stream = stream
        self._chain = Chain()
        self._shown = 0
        self._reading = self._ended = False
        self._origin: int | None = _UNKNOWN
        self.closed = False  # only the stream knows
        self.limits = Limits()
        self.budget = budget
        self.reader = Reader(self)

    # --- the window ------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Removes what the reader has consumed from the chain, and closes the window."""
        reader = self.reader
        self._chain.drop(reader._start - self._shown)
        reader._view = EMPTY
        reader._start = self._shown = 0
        reader._end = min(reader._end, 0)

    def _open(self, n: int) -> None:
        """Opens the window on ``n`` bytes, and on what follows them in the same block."""
        reader = self.reader
        reader._view, start = self._chain.contiguous(n)
        reader._start = self._shown = start
        reader._end = min(len(reader._view), start + self.limits.read_limit)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if self._reading:
            raise BusyResourceError("reading from")
        self._reading = True
        try:
            self._settle()
            self.reader._end = SHUT  # keeps others out while this task waits
            yield
        finally:
            self._reading = False
            self.reader._end = max(self.reader._end, 0)

    async def _checkpoint_if_due(self) -> bool:
        due = self.reader._budget <= 0
        if due:
            await anyio.lowlevel.checkpoint()
            self.reader._budget = self.budget
        return due

    async def _receive(self) -> None:
        if self._ended:
            raise self._end_of_stream()
        try:
            chunk = await self._stream.receive()
        except EndOfStream:
            self._ended = True
            raise self._end_of_stream() from None
        self.reader._budget = self.budget
        self._chain.append(memoryview(as_bytes(chunk)))

    def _end_of_stream(self) -> Exception:
        return about(IncompleteRead() if len(self._chain) else EndOfStream(), self.origin)

    def _missing(self) -> Exception:
        return self._end_of_stream() if self._ended else about(WouldBlock(), self.origin)

    @property
    def origin(self) -> int | None:
        """See ``Source``."""
        if self._origin == _UNKNOWN:
            self._origin = origin_of(self._stream)
        return self._origin

    # --- for the reader --------------------------------------------------------------------------

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` exceeds the limit for a single request"""
        limit = self.limits.read_limit
        if n > limit:
            text = f"{shown(n)} bytes asked for; the limit is {limit}"
            raise about(MessageTooLarge(text), self.origin)

    async def fill(self, n: int, flags: int = 0) -> bool:
        """See ``Source``."""
        with self._entered():
            suspended = await self._checkpoint_if_due()
            while len(self._chain) < n:
                await self._receive()
                suspended = True
            if not suspended:
                self.reader._budget -= 1
        if n and not flags & SCATTER:
            self._open(n)
        return suspended

    def fill_nowait(self, n: int, flags: int = 0) -> None:
        """See ``Source``."""
        with self._entered():
            if len(self._chain) < n:
                raise self._missing()
        if n and not flags & SCATTER:
            self._open(n)

    async def find(self, delimiter: bytes, max_bytes: int) -> int:
        """See ``Source``."""
        with self._entered():
            suspended = await self._checkpoint_if_due()
            while not (length := self._found(delimiter, max_bytes)):
                await self._receive()
                suspended = True
            if not suspended:
                self.reader._budget -= 1
        self._open(length)
        return length

    def find_nowait(self, delimiter: bytes, max_bytes: int) -> int:
        """See ``Source``."""
        with self._entered():
            length = self._found(delimiter, max_bytes)
            if not length:
                raise self._missing()
        self._open(length)
        return length

    def _found(self, delimiter: bytes, max_bytes: int) -> int:
        length = self._chain.find(delimiter, max_bytes)
        if not length and len(self._chain) >= max_bytes:
            raise about(DelimiterNotFound(max_bytes), self.origin)
        return length

    def buffered(self) -> int:
        """The number of bytes received and not consumed."""
        return len(self._chain) - (self.reader._start - self._shown)

    def consume(self, n: int) -> None:
        """See ``Source``."""
        self._settle()
        self._chain.drop(n)

    def take_parts(self, n: int) -> list[memoryview]:
        """See ``Source``."""
        self._settle()
        return self._chain.take(n)

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._stream.aclose()


class StreamSink:
    """Passes bytes to a stream; see ``Sink``."""

    __slots__ = ("_stream", "_writing", "limits", "writer")

    def __init__(self, stream: ByteSendStream) -> None:
        self._stream = stream
        self._writing = False
        self.limits = Limits()
        self.writer = Writer(self)

    async def flush(self) -> None:
        """Passes pending output to the stream; a checkpoint."""
        self.claim()
        try:
            await self.flush_claimed()
        finally:
            self._writing = False

    def claim(self) -> None:
        """See ``Sink``."""
        if self._writing:
            raise BusyResourceError("writing to")
        self._writing = True

    async def flush_claimed(self) -> None:
        """See ``Sink``."""
        self.writer._seal()
        await self._send_pending()

    def release(self) -> None:
        """Ends the claim. Sends nothing: a stream takes no bytes without waiting."""
        self._writing = False

    def why_broken(self) -> Exception | None:
        """``None``: only the stream knows."""
        return None

    async def _send_pending(self) -> None:
        if not self.writer._size:
            await anyio.lowlevel.checkpoint()
            return
        joined = self.writer._size <= _JOINED
        pieces: list[Piece] = [self.writer._take_joined()] if joined else self.writer._take()
        pieces.reverse()
        try:
            while pieces:
                await self._stream.send(as_bytes(pieces.pop()))
        finally:  # the piece being sent is the stream's
            if pieces:
                self.writer._put_back(pieces[::-1])

    async def send(self, item: Piece) -> None:
        """Sends ``item`` like the stream's own ``send()``, after the pending output."""
        self.writer.write(item)
        await self.flush()

    def queued(self) -> int:
        """0: what the stream has taken is its own."""
        return 0

    def stand_high(self) -> None:
        """Does nothing: there is no reader whose calls could wait."""

    def why_unwritable(self) -> Exception:
        """What a write raises after the end."""
        return about(ClosedResourceError(), self.origin)

    @property
    def origin(self) -> int | None:
        """See ``Sink``."""
        return origin_of(self._stream)

    async def aclose(self) -> None:
        """Closes the stream."""
        await self._stream.aclose()

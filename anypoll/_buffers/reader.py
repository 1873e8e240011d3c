"""The nocopy reader, over any source of bytes.

Requests that fit in the window (``_view[_start:_end]``) never leave this module. All others go to
``Source.fill``: a connection asks the C side, a wrapped stream asks its stream. Anything that must
stop the fast path (another task is waiting, the connection was closed, output is above high water)
sets ``_end`` to a value that no request can satisfy. ``_budget`` limits the calls in a row that do
not suspend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, SupportsIndex

from anyio import EndOfStream

from .. import _native
from .arguments import count, delimiter_bytes, room_in, text_encoding
from .chain import EMPTY
from .errors import about
from .linkbuffer import LinkBuffer

if TYPE_CHECKING:
    from typing_extensions import Buffer


from .arguments import Limits

SHUT = -1  # a window end that no request can satisfy
SCATTER = 2  # flag for ``fill``: the bytes may span several blocks; the core's ``AP_SCATTER``


class Source(Protocol):
    """Where a reader gets more bytes: a connection's ``Core``, or a wrapped stream.

    The window that it opens is ``reader._view[reader._start:reader._end]``. ``reader._start`` tells
    it how much the reader has consumed since.
    """

    budget: int
    limits: Limits

    @property
    def closed(self) -> bool:
        """Whether there is nothing to be had any more."""

    @property
    def origin(self) -> int | None:
        """The number of the connection whose peer sent the bytes, if known."""

    async def fill(self, n: int, flags: int = 0) -> bool:
        """Opens the window on ``n`` bytes (not with ``SCATTER``); returns whether it suspended."""

    def fill_nowait(self, n: int, flags: int = 0) -> None:
        """Like :meth:`fill`, or raises ``WouldBlock``."""

    async def find(self, delimiter: bytes, max_bytes: int) -> int:
        """The length through the delimiter; opens the window on those bytes."""

    def find_nowait(self, delimiter: bytes, max_bytes: int) -> int:
        """Like :meth:`find`, or raises ``WouldBlock``."""

    def buffered(self) -> int:
        """The number of unread bytes."""

    def consume(self, n: int) -> None:
        """Consumes buffered bytes, whichever blocks they lie in, and closes the window."""

    def take_parts(self, n: int) -> list[memoryview]:
        """Like :meth:`consume`, and returns the views."""

    def check_request(self, n: int) -> None:
        """:raises MessageTooLarge: if ``n`` exceeds the limit for a single request"""

    async def aclose(self) -> None:
        """Closes the source."""


class Reader(_native.Reader):
    """The nocopy input of a connection: ``conn.reader``.

    All counts are in bytes. ``n == 0`` yields an empty view at once. Every method that waits raises

    * ``EndOfStream`` if the peer has ended its side and nothing is buffered, ``IncompleteRead`` if
      something is, but too little: it stays, and a smaller request gets it;
    * ``ReadTimeout`` if the whole call took longer than ``read_timeout``: nothing is consumed;
    * ``MessageTooLarge`` at once for more than ``read_limit``;
    * ``BrokenResourceError`` (with the ``OSError`` as its cause) after a reset, ``IdleTimeout``
      after the idle timeout, ``ClosedResourceError`` after the connection was closed;
    * ``BusyResourceError`` while another task is reading;
    * ``TypeError`` or ``ValueError`` for a count that is not an integer, or is negative.

    A cancelled call has consumed nothing. A call that finds its bytes does not suspend, except for
    one in every ``checkpoint_budget`` calls in a row.
    """

    __slots__ = ()

    _core: Source

    def __init__(self, core: Source) -> None:
        if not hasattr(core, "limits"):
            kind = type(core).__name__
            raise TypeError(f"a reader is a connection's, or made by wrap_reader(), not of {kind}")
        self._core = core
        self._view = EMPTY
        self._start = self._end = 0
        self._budget = core.budget
        self._limit = core.limits.read_limit

    # --- the window ------------------------------------------------------------------------------

    def _close(self) -> None:
        self._view = EMPTY
        self._start = 0
        self._end = SHUT

    def _drop_view(self) -> None:
        """The C side has taken back the block, which was read to its end."""
        self._view = EMPTY
        self._start = 0
        self._end = min(self._end, 0)

    def release(self) -> None:
        """Releases what was consumed.

        Never needed for safety, because views keep what they show; it only lets memory be recycled
        earlier.
        """
        if not self._core.closed:
            self._core.consume(0)

    def __len__(self) -> int:
        """The number of unread bytes, including those read ahead that no call has looked at."""
        return self._core.buffered()

    def __bool__(self) -> bool:
        return True  # a reader without input is still a reader

    @property
    def buffered(self) -> int:
        """The same as ``len(reader)``."""
        return len(self)

    # --- contiguous views ------------------------------------------------------------------------

    def peek_nowait(self, n: SupportsIndex, /) -> memoryview:
        """Like :meth:`peek`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._have_nowait(n)
        return self._view[self._start : self._start + n]

    def next_nowait(self, n: SupportsIndex, /) -> memoryview:
        """Like :meth:`next`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._have_nowait(n)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    def skip_nowait(self, n: SupportsIndex, /) -> None:
        """Like :meth:`skip`, without waiting.

        :raises WouldBlock: if the bytes are not there
        """
        n = self._count(n)
        if n <= self._end - self._start:
            self._start += n
            return
        self._core.fill_nowait(n, SCATTER)
        self._core.consume(n)

    def until_nowait(self, delimiter: bytes, *, max_bytes: SupportsIndex = 65536) -> memoryview:
        """Like :meth:`until`, without waiting.

        :raises WouldBlock: if the delimiter is not there, but may still come
        """
        delimiter = delimiter_bytes(delimiter)
        most = count(max_bytes, "max_bytes", most=2**31)
        n = self._core.find_nowait(delimiter, most)
        start = self._start
        self._start = start + n
        return self._view[start : start + n]

    # --- across blocks, and copies ---------------------------------------------------------------

    async def next_parts(self, n: SupportsIndex, /) -> list[memoryview]:
        """``n`` bytes, consumed: a view for each block they lie in, never copied."""
        n = self._count(n)
        await self._core.fill(n, SCATTER)
        return self._core.take_parts(n)

    async def slice(self, n: SupportsIndex, /) -> LinkBuffer:
        """``n`` bytes, consumed, as a separate buffer: never copied, and valid beyond the end of
        the connection.
        """
        return LinkBuffer._of(await self.next_parts(n), self._core.origin)

    async def read_str(self, n: SupportsIndex, /, encoding: str = "utf-8") -> str:
        """``n`` bytes, consumed and decoded.

        :raises UnicodeDecodeError: if they are not text in ``encoding``; they are still consumed
        :raises ValueError: if there is no such encoding
        """
        if encoding != "utf-8":
            text_encoding(encoding)
        data = await self.read_bytes(n)
        try:
            return data.decode(encoding)
        except UnicodeError as exc:
            about(exc, self._core.origin)
            raise

    async def read_byte(self) -> int:
        """One byte, consumed, as a number."""
        return (await self.next(1))[0]

    async def readinto(self, buffer: Buffer, /) -> int:
        """Fills ``buffer`` with buffered bytes, consumed; waits only if there are none.

        Returns the number of bytes: at least 1, or 0 when the peer has ended its side (or
        ``buffer`` is empty).

        :raises TypeError: if ``buffer`` is not writable
        """
        with room_in(buffer) as into:
            try:
                await self._core.fill(1 if into else 0)
            except EndOfStream:
                return 0
            if not into:
                return 0
            n = min(len(into), self._end - self._start)
            into[:n] = self._view[self._start : self._start + n]
            self._start += n
            return n

    # --- for the native calls --------------------------------------------------------------------

    def _until_arguments(
        self, delimiter: bytes, max_bytes: SupportsIndex = 65536
    ) -> tuple[bytes, int]:
        return delimiter_bytes(delimiter), count(max_bytes, "max_bytes", most=2**31)

    def _count(self, n: SupportsIndex) -> int:
        n = count(n, "n")
        self._core.check_request(n)
        return n

    def _have_nowait(self, n: SupportsIndex) -> int:
        n = self._count(n)
        if n > self._end - self._start:
            self._core.fill_nowait(n)
        return n

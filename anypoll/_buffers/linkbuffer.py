"""The output buffer behind every writer, and ``LinkBuffer``, a standalone nocopy buffer.

Nothing here waits or does I/O, and only two things are copied. Small ``bytes`` written one after
another are joined, because a separate piece costs more than its bytes. And a reservation
(``malloc``) is copied when it ends, because the caller still has the writable memory.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

from anyio import ClosedResourceError, DelimiterNotFound, WouldBlock

from .. import _native
from .arguments import as_bytes, as_view, count, delimiter_bytes, room_in, text_encoding
from .chain import Chain, Piece
from .errors import about

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

_MOST = 2**31

#: The reservation of writers that have none, as nearly all do: a list for each would cost memory.
_NONE: list[memoryview] = []


class BaseWriter(_native.Writer):
    """The base class of all writers: gathers output. All counts are in bytes."""

    __slots__ = ()

    def __init__(self, high_water: int) -> None:
        self._pieces: list[Piece] = []  # pending output; views in it are never changed again
        self._size = 0  # bytes in _pieces
        self._reserved = _NONE  # memory handed out by malloc(), and data inserted into it
        self._reserved_size = 0
        self._high_water = high_water
        self._shut = False  # no more writes are accepted; _refuse() says why

    def _refuse(self) -> NoReturn:
        """Raises the error of a write after the end."""
        raise ClosedResourceError

    def _stands_high(self) -> None:
        """``_size`` has reached ``_high_water``."""

    # --- for the owner ---------------------------------------------------------------------------

    def _close(self) -> None:
        self._pieces = []
        self._size = 0
        self._reserved = _NONE
        self._reserved_size = 0
        self._shut = True

    def _put_back(self, pieces: list[Piece]) -> None:
        self._pieces[:0] = pieces
        self._size += sum(map(len, pieces))

    # --- writing ---------------------------------------------------------------------------------

    @property
    def malloc_len(self) -> int:
        """Bytes in the open reservation, including those of ``write_direct``."""
        return self._reserved_size

    def _as_bytes(self, data: Buffer) -> bytes:
        return as_bytes(data)

    def write_str(self, data: str, /, encoding: str = "utf-8") -> int:
        """Appends text; returns its length in bytes.

        :raises TypeError: if ``data`` is not a ``str``
        :raises UnicodeEncodeError: if it cannot be encoded
        :raises ValueError: if there is no such encoding
        """
        if not isinstance(data, str):
            raise TypeError(f"a str is required, not {type(data).__name__}")
        if encoding != "utf-8":
            text_encoding(encoding)
        return self.write(data.encode(encoding))

    def write_byte(self, value: SupportsIndex, /) -> int:
        """Appends one byte, 0 to 255; returns 1.

        :raises TypeError, ValueError: if it is not an integer in that range
        """
        return self.write(bytes((count(value, "value", most=255),)))

    def append(self, buffer: LinkBuffer, /) -> int:
        """Moves everything written to ``buffer``, flushed or not, to the end of the output; no byte
        is copied, and ``buffer`` is empty afterwards. Returns the number of bytes moved.

        :raises TypeError: if it is not a :class:`LinkBuffer`
        :raises ValueError: if it is this buffer itself
        :raises ClosedResourceError: if it is closed
        """
        if not isinstance(buffer, LinkBuffer):
            raise TypeError(f"a LinkBuffer is required, not {type(buffer).__name__}")
        if buffer is self:
            raise ValueError("a LinkBuffer cannot be appended to itself")
        self._check()
        return self._extend(buffer._give_all())

    def _extend(self, pieces: Sequence[Piece]) -> int:
        """Appends pieces that will not change any more, as they are."""
        self._check()
        self._seal()
        size = sum(map(len, pieces))
        self._pieces.extend(pieces)
        self._size += size
        if self._size >= self._high_water:
            self._stands_high()
        return size

    # --- reserving -------------------------------------------------------------------------------

    def malloc(self, n: SupportsIndex, /) -> memoryview:
        """Reserves ``n`` zeroed bytes at the end of the output for the caller to fill.

        The reservation is open until :meth:`malloc_ack`, ``flush()``, :meth:`append` or the next
        write; another ``malloc`` adds to it. Anything written to the memory after that is lost.

        :raises ValueError, TypeError: if ``n`` is negative, above 2 GiB, or not an integer
        """
        n = count(n, "n", most=_MOST)
        self._check()
        memory = memoryview(bytearray(n))
        if n:
            if self._reserved is _NONE:
                self._reserved = []
            self._reserved.append(memory)
            self._reserved_size += n
        return memory

    def write_direct(self, data: Buffer, remain: SupportsIndex, /) -> int:
        """Inserts ``data`` by reference into the open reservation, ``remain`` bytes before its end;
        returns its length in bytes.

        So the fields of a message can be reserved at once, and its large parts put between them
        without copying. ``data`` must not change until it has been sent.

        :raises ValueError: if ``remain`` is negative or exceeds :attr:`malloc_len`, or if ``data``
            is not contiguous
        :raises TypeError: if ``data`` is not bytes-like, or ``remain`` is not an integer
        """
        view = as_view(data)
        remain = count(remain, "remain", most=self._reserved_size)
        self._check()
        if view:
            if self._reserved is _NONE:
                self._reserved = []
            self._reserved.insert(self._cut(remain), view)
            self._reserved_size += len(view)
        return len(view)

    def _cut(self, remain: int) -> int:
        """The index in ``_reserved`` after which ``remain`` bytes lie; splits the part that
        straddles it, if any.
        """
        index = len(self._reserved)
        while remain > 0:
            index -= 1
            part = self._reserved[index]
            if remain < len(part):
                cut = len(part) - remain
                self._reserved[index : index + 1] = [part[:cut], part[cut:]]
                return index + 1
            remain -= len(part)
        return index

    def malloc_ack(self, n: SupportsIndex, /) -> None:
        """Ends the reservation, keeping only its first ``n`` bytes.

        :raises ValueError: if it is shorter than that; it stays open then
        """
        n = count(n, "n", most=self._reserved_size)
        self._check()
        self._close_reservation(n)

    def _seal(self) -> None:
        if self._reserved:
            self._close_reservation(self._reserved_size)

    def _close_reservation(self, keep: int) -> None:
        reserved, self._reserved, self._reserved_size = self._reserved, _NONE, 0
        for memory in reserved:
            part: Piece = memory[:keep]
            keep -= len(part)
            if not memory.readonly:  # from malloc(): the caller can still write to it
                part = bytes(part)
            if part:
                self._pieces.append(part)
                self._size += len(part)
        if self._size >= self._high_water:
            self._stands_high()

    def _check(self) -> None:
        if self._shut:
            self._refuse()


class LinkBuffer(BaseWriter):
    """A standalone buffer, without a connection: written like a :class:`Writer`, read like a
    :class:`Reader`.

    Every method is a plain function. Written bytes become readable with :meth:`flush`. A read that
    asks for more than there is raises ``WouldBlock`` and consumes nothing. Views are read-only, and
    stay valid and unchanged for as long as they are held. After :meth:`close` every call raises
    ``ClosedResourceError``.

    One thread may read while another writes. Writing and ``flush()`` belong to the writing thread,
    everything else (including ``parts()`` and ``to_bytes()``) to the reading thread; any thread may
    call ``len()``, and ``close()`` is for when both are done.

    :param block_size: bytes; small writes are gathered in blocks of up to this size
    """

    __slots__ = ("_block_size", "_chain", "_origin")

    _origin: int | None
    """the connection whose peer has sent all of the contents"""

    def __init__(self, block_size: SupportsIndex = 4096) -> None:
        self._block_size = count(block_size, "block_size", least=1, most=_MOST)
        super().__init__(sys.maxsize)
        self._chain = Chain()  # the readable bytes
        self._origin = None

    @classmethod
    def _of(cls, parts: Iterable[memoryview], origin: int | None) -> LinkBuffer:
        """A buffer from which ``parts`` can be read."""
        buffer = cls()
        buffer._origin = origin
        for part in parts:
            buffer._chain.append(part)
        return buffer

    def __repr__(self) -> str:
        state = "closed" if self._shut else f"{len(self)} bytes"
        return f"<anypoll.nocopy.LinkBuffer {state}>"

    def __len__(self) -> int:
        """The number of readable bytes."""
        return len(self._chain)

    def __bool__(self) -> bool:
        return True  # an empty buffer is still a buffer

    @property
    def buffered(self) -> int:
        """The same as ``len(buffer)``."""
        return len(self)

    def close(self) -> None:
        """Drops the contents. Idempotent; views already handed out stay valid."""
        self._close()
        self._chain.clear()

    # --- writing end -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Makes the written bytes readable."""
        self._check()
        self._seal()
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces:
            self._origin = None
        for piece in _native.gather(pieces, self._block_size):
            self._chain.append(memoryview(piece))

    def _give_all(self) -> list[memoryview]:
        self.flush()
        return self.next_parts(len(self))

    # --- reading end -----------------------------------------------------------------------------

    def peek(self, n: SupportsIndex, /) -> memoryview:
        """``n`` contiguous bytes, left unread.

        :raises WouldBlock: if they are not there
        """
        n = self._have(n)
        view, start = self._chain.contiguous(n)
        return view[start : start + n]

    def next(self, n: SupportsIndex, /) -> memoryview:
        """``n`` contiguous bytes, consumed.

        :raises WouldBlock: if they are not there
        """
        view = self.peek(n)
        self._chain.drop(len(view))
        return view

    def skip(self, n: SupportsIndex, /) -> None:
        """Consumes ``n`` bytes.

        :raises WouldBlock: if they are not there
        """
        self._chain.drop(self._have(n))

    def until(self, delimiter: bytes, *, max_bytes: SupportsIndex = 65536) -> memoryview:
        """The bytes through the delimiter, consumed.

        :raises WouldBlock: if it is not there, but may still be written
        :raises DelimiterNotFound: if it is not within the first ``max_bytes`` bytes
        """
        delimiter = delimiter_bytes(delimiter)
        most = count(max_bytes, "max_bytes", most=_MOST)
        self._check()
        length = self._chain.find(delimiter, most)
        if length:
            return self.next(length)
        missing = DelimiterNotFound(most) if len(self) >= most else WouldBlock()
        raise about(missing, self._origin)

    def next_parts(self, n: SupportsIndex, /) -> list[memoryview]:
        """``n`` bytes, consumed: a view for each block they lie in, never copied.

        :raises WouldBlock: if they are not there
        """
        return self._chain.take(self._have(n))

    def slice(self, n: SupportsIndex, /) -> LinkBuffer:
        """``n`` bytes, consumed, as a separate buffer that shares the blocks.

        :raises WouldBlock: if they are not there
        """
        return LinkBuffer._of(self.next_parts(n), self._origin)

    def read_bytes(self, n: SupportsIndex, /) -> bytes:
        """``n`` bytes, consumed, as a copy.

        :raises WouldBlock: if they are not there
        """
        return b"".join(self.next_parts(n))

    def read_str(self, n: SupportsIndex, /, encoding: str = "utf-8") -> str:
        """``n`` bytes, consumed and decoded.

        :raises WouldBlock: if they are not there
        :raises UnicodeDecodeError: if they are not text in ``encoding``; they are still consumed
        :raises ValueError: if there is no such encoding
        """
        if encoding != "utf-8":
            text_encoding(encoding)
        data = self.read_bytes(n)
        try:
            return data.decode(encoding)
        except UnicodeError as exc:
            about(exc, self._origin)
            raise

    def read_byte(self) -> int:
        """One byte, consumed, as a number.

        :raises WouldBlock: if there is none
        """
        return self.next(1)[0]

    def readinto(self, buffer: Buffer, /) -> int:
        """Fills ``buffer`` with readable bytes, consumed; returns their number.

        :raises WouldBlock: if there are none and ``buffer`` has room
        :raises TypeError: if ``buffer`` is not writable
        """
        self._check()
        with room_in(buffer) as into:
            if into and not len(self):
                raise about(WouldBlock(), self._origin)
            done = 0
            for part in self._chain.take(min(len(into), len(self))):
                into[done : done + len(part)] = part
                done += len(part)
            return done

    peek_nowait = peek
    next_nowait = next  # noqa: A003 -- the method
    skip_nowait = skip
    until_nowait = until

    def release(self) -> None:
        """Does nothing: consumed bytes are released at once. Present because a reader has it."""
        self._check()

    def parts(self) -> list[memoryview]:
        """The readable bytes, as a view for each block; consumes nothing."""
        self._check()
        return self._chain.parts(len(self))

    def to_bytes(self) -> bytes:
        """A copy of the readable bytes; consumes nothing."""
        return b"".join(self.parts())

    def _have(self, n: SupportsIndex) -> int:
        n = count(n, "n")
        self._check()
        if n > len(self):
            raise about(WouldBlock(), self._origin)
        return n

"""A buffer chain: unread bytes as a queue of views into any number of blocks.

Pure: nothing here waits or does I/O. A block is the memory behind a view: a ``bytes`` object or a
poller's block; whoever holds a view of it keeps it alive. So moving, cutting and sharing move
references and copy nothing; bytes are merged only if they must be contiguous and are not.

One thread may append while another takes. The taker works at the left end of a deque; the appender
works at the right end and then adds to ``_appended``, which nobody else writes; ``_taken`` is the
taker's. A deque's own operations are atomic, with or without the GIL. So the taker finds at least
the bytes that it counts, and no lock is needed.
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache

from .._native import EMPTY

__all__ = ("EMPTY", "Chain", "Piece")

#: A run of output bytes that nobody changes.
Piece = bytes | memoryview


class Chain:
    """A buffer chain; see the module. All counts are in bytes; requested bytes must be present."""

    __slots__ = ("_appended", "_parts", "_pos", "_searched", "_taken")

    def __init__(self) -> None:
        self._parts: deque[memoryview] = deque()
        self._pos = 0  # bytes of the first view that are taken
        self._appended = self._taken = 0
        self._searched = (b"", 0)  # a delimiter, and up to where it is known to be absent

    def __len__(self) -> int:
        taken = self._taken  # read first: to a third thread it must not be the newer value
        return self._appended - taken

    def append(self, view: memoryview) -> None:
        """Appends a read-only view."""
        if view:
            self._parts.append(view)
            self._appended += len(view)

    def clear(self) -> None:
        """Drops everything. Nobody may be appending or taking."""
        self._parts.clear()
        self._pos = 0
        self._taken = self._appended

    def parts(self, n: int) -> list[memoryview]:
        """The first ``n`` bytes, as a view for each block."""
        parts = []
        start, index = self._pos, 0
        while n > 0:  # by index: the other thread may append meanwhile
            part = self._parts[index][start : start + n]
            start, index = 0, index + 1
            n -= len(part)
            parts.append(part)
        return parts

    def contiguous(self, n: int) -> tuple[memoryview, int]:
        """A view that contains the first ``n`` bytes contiguously, and their offset in it.

        If they span several blocks they are merged, once: looking at them again costs nothing.
        """
        if not n:
            return EMPTY, 0
        if self._pos + n > len(self._parts[0]):
            merged = memoryview(b"".join(self.parts(n)))
            self._drop(n)
            if self._pos:  # the rest of the last block, without the merged part
                self._parts[0] = self._parts[0][self._pos :]
                self._pos = 0
            self._parts.appendleft(merged)
        return self._parts[0], self._pos

    def take(self, n: int) -> list[memoryview]:
        """Removes the first ``n`` bytes, and returns them as a view for each block."""
        parts = self.parts(n)
        self.drop(n)
        return parts

    def drop(self, n: int) -> None:
        """Removes the first ``n`` bytes."""
        self._drop(n)
        self._taken += n

    def _drop(self, n: int) -> None:
        parts = self._parts
        self._pos += n
        while parts and self._pos >= len(parts[0]):
            self._pos -= len(parts.popleft())

    # --- searching -------------------------------------------------------------------------------

    def find(self, delimiter: bytes, max_bytes: int) -> int:
        """The length through the first delimiter within ``max_bytes`` bytes, or 0 if there is none.

        A search resumes where the last one for the same delimiter ended.
        """
        limit = min(len(self), max_bytes)
        known, searched = self._searched
        begin = max(searched - self._taken, 0) if known == delimiter else 0
        end = self._search(delimiter, begin, limit)
        if not end:
            absent = max(limit - len(delimiter) + 1, begin)
            self._searched = (delimiter, self._taken + absent)
        return end

    def _search(self, delimiter: bytes, begin: int, limit: int) -> int:
        """Searches from ``begin`` on. ``before`` holds the last bytes in front of a part, so that a
        delimiter that spans parts is found.
        """
        pattern, overlap = _pattern(delimiter), len(delimiter) - 1
        before, offset = b"", 0
        for part in self.parts(limit):
            here, skip = offset, max(begin - offset, 0)
            offset += len(part)
            if offset <= begin:
                continue
            found = (before + part[:overlap]).find(delimiter) if before else -1
            if found >= 0:
                return here - len(before) + found + len(delimiter)
            match = pattern.search(part, skip)
            if match:
                return here + match.end()
            if overlap:
                before = (before + part[max(skip, len(part) - overlap) :])[-overlap:]
        return 0


@lru_cache(maxsize=64)
def _pattern(delimiter: bytes) -> re.Pattern[bytes]:
    """``re`` searches a memoryview in place; ``bytes.find`` would need a copy."""
    return re.compile(re.escape(delimiter))

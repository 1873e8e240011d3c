"""Splitting received bytes into frames: for peers whose library hands out bytes as they arrive."""

from __future__ import annotations

from _launch import HEADER_SIZE


class Splitter:
    """Each frame is taken apart as a handler would need it; the replies leave together."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def answer(self, data: bytes) -> bytes:
        """The replies to the frames that ``data`` completes, for one write; maybe none."""
        if self._rest:
            data = self._rest + data
        replies = []
        start, size = 0, len(data)
        while size - start >= HEADER_SIZE:
            end = start + HEADER_SIZE + int.from_bytes(data[start : start + HEADER_SIZE], "big")
            if end > size:
                break
            replies.append(data[start:end])
            start = end
        self._rest = data[start:]
        return b"".join(replies)

"""A reader, a writer or a buffer as what other code knows: AnyIO's streams, a raw file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
from anyio import ClosedResourceError, WouldBlock
from anyio.abc import ByteReceiveStream, ByteSendStream

from .._connection.attributes import ORIGIN_KEY
from .arguments import flat_view
from .errors import about
from .limits import positive
from .linkbuffer import LinkBuffer
from .reader import Reader
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer


def as_receive_stream(reader: Reader) -> ByteReceiveStream:
    """An AnyIO stream that takes its bytes from ``reader``, first those that it has read ahead.

    Closing it closes what the reader belongs to: the connection, or the stream it was put on.

    :raises TypeError: if it is not a :class:`Reader`
    """
    if not isinstance(reader, Reader):
        raise TypeError(f"a Reader is required, not {type(reader).__name__}")
    return _ReceiveStream(reader)


def as_send_stream(writer: Writer) -> ByteSendStream:
    """An AnyIO stream that sends through ``writer``, behind what that has pending.

    Closing it closes what the writer belongs to: the connection, or the stream it was put on.

    :raises TypeError: if it is not a :class:`Writer`
    """
    if not isinstance(writer, Writer):
        raise TypeError(f"a Writer is required, not {type(writer).__name__}")
    return _SendStream(writer)


def as_raw_io(buffer: LinkBuffer) -> io.RawIOBase:
    """A raw file over ``buffer``: reading takes from it, and finds the end of the file when it is
    empty; writing adds to it, and flushes. Closing the file leaves the buffer as it is.

    :raises TypeError: if it is not a :class:`LinkBuffer`
    """
    if not isinstance(buffer, LinkBuffer):
        raise TypeError(f"a LinkBuffer is required, not {type(buffer).__name__}")
    return _RawIO(buffer)


class _ReceiveStream(ByteReceiveStream):
    __slots__ = ("_closed", "_reader")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        max_bytes = positive(max_bytes, "max_bytes")
        await anyio.lowlevel.checkpoint()
        if self._closed:
            raise about(ClosedResourceError(), self._reader._core.origin)
        reader = self._reader
        await reader.peek(1)
        return bytes(reader.next_nowait(min(max_bytes, reader._end - reader._start)))

    async def aclose(self) -> None:
        self._closed = True
        await self._reader._core.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {ORIGIN_KEY: lambda: self._reader._core.origin}


class _SendStream(ByteSendStream):
    __slots__ = ("_closed", "_writer")

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._closed = False

    async def send(self, item: Buffer) -> None:
        if self._closed:
            raise about(ClosedResourceError(), self._writer._core.origin)
        await self._writer._core.send(item if type(item) is bytes else flat_view(item, "item"))

    async def aclose(self) -> None:
        self._closed = True
        await self._writer._core.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {ORIGIN_KEY: lambda: self._writer._core.origin}


class _RawIO(io.RawIOBase):
    def __init__(self, buffer: LinkBuffer) -> None:
        self._buffer = buffer

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, into: Buffer, /) -> int:
        self._check()
        try:
            return self._buffer.readinto(into)
        except WouldBlock:
            return 0

    def write(self, data: Buffer, /) -> int:
        self._check()
        size = self._buffer.write(data)
        self._buffer.flush()
        return size

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

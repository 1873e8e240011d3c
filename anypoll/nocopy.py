"""Nocopy reading and writing: views into received blocks, and gathered output.

A :class:`Reader` hands out read-only memoryviews of exactly the bytes requested. A view stays valid
and unchanged for as long as it is held; the block it lies in is recycled when the last view of it
is gone. A small view keeps its whole block alive: use ``bytes()`` to copy what you keep for long.

A :class:`Writer` gathers output; ``flush()`` sends it in as few system calls as possible.

Every connection has both. A :class:`LinkBuffer` is both in one, without any I/O. Both can also be
put on any AnyIO byte stream (a ``TLSStream``, say) with :func:`wrap_reader` and
:func:`wrap_writer`, or be turned into one with :func:`as_receive_stream` and
:func:`as_send_stream`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
from anyio import ClosedResourceError, WouldBlock
from anyio.abc import ByteReceiveStream, ByteSendStream

from ._buffers.arguments import flat_view, positive
from ._buffers.errors import ORIGIN_KEY, about
from ._buffers.linkbuffer import LinkBuffer
from ._buffers.reader import Reader
from ._buffers.wrapped import StreamSink, StreamSource
from ._buffers.writer import Writer
from ._loop import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer

__all__ = (
    "LinkBuffer",
    "Reader",
    "Writer",
    "as_raw_io",
    "as_receive_stream",
    "as_send_stream",
    "wrap_reader",
    "wrap_writer",
)


def wrap_reader(stream: ByteReceiveStream) -> Reader:
    """A nocopy reader over ``stream``, which must have no other reader from now on: its bytes are
    read ahead, up to 64 KiB beyond the request.

    Exceptions from the stream propagate unchanged, and nothing that has arrived is lost. A request
    above 64 MiB raises ``MessageTooLarge``. There are no timeouts but those around the call.

    :raises TypeError: if it is not a ``ByteReceiveStream``
    """
    if not isinstance(stream, ByteReceiveStream):
        raise TypeError(f"a ByteReceiveStream is required, not {type(stream).__name__}")
    return StreamSource(stream, runtime.settings().checkpoint_budget).reader


def wrap_writer(stream: ByteSendStream) -> Writer:
    """A nocopy writer over ``stream``. ``flush()`` returns when the stream has taken everything.

    If a ``flush()`` fails or is cancelled, the pieces not yet passed to the stream are still
    pending. Nothing is flushed automatically.

    :raises TypeError: if it is not a ``ByteSendStream``
    """
    if not isinstance(stream, ByteSendStream):
        raise TypeError(f"a ByteSendStream is required, not {type(stream).__name__}")
    return StreamSink(stream).writer


def as_receive_stream(reader: Reader) -> ByteReceiveStream:
    """An AnyIO stream that takes its bytes from ``reader``, those already read ahead first.

    Closing it closes what the reader belongs to: the connection, or the stream it was put on.

    :raises TypeError: if it is not a :class:`Reader`
    """
    if not isinstance(reader, Reader):
        raise TypeError(f"a Reader is required, not {type(reader).__name__}")
    return _ReceiveStream(reader)


def as_send_stream(writer: Writer) -> ByteSendStream:
    """An AnyIO stream that sends through ``writer``, after the writer's pending output.

    Closing it closes what the writer belongs to: the connection, or the stream it was put on.

    :raises TypeError: if it is not a :class:`Writer`
    """
    if not isinstance(writer, Writer):
        raise TypeError(f"a Writer is required, not {type(writer).__name__}")
    return _SendStream(writer)


def as_raw_io(buffer: LinkBuffer) -> io.RawIOBase:
    """A raw file over ``buffer``: reading takes bytes from it, and reaches the end of the file when
    it is empty; writing adds to it, and flushes. Closing the file leaves the buffer as it is.

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


for _name in __all__:
    globals()[_name].__module__ = "anypoll.nocopy"
del _name

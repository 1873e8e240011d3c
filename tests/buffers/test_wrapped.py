"""Readers and writers over other streams, and streams over readers and writers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
)
from anyio.abc import ByteReceiveStream, ByteSendStream
from anyio.streams.stapled import StapledByteStream
from peers import KIB, MIB, holds, opened, pattern, within

import anypoll
from anypoll import MessageTooLarge
from anypoll.nocopy import (
    Reader,
    Writer,
    as_receive_stream,
    as_send_stream,
    wrap_reader,
    wrap_writer,
)

pytestmark = pytest.mark.anyio


class Source(ByteReceiveStream):
    """Gives the chunks it was given, one for each call; then ends, or fails."""

    def __init__(self, *chunks: Any, end: BaseException | None = None) -> None:
        self.chunks = list(chunks)
        self.end = end or EndOfStream()
        self.calls = 0
        self.closed = False
        self.gate: anyio.Event | None = None

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        self.calls += 1
        if self.gate:
            await self.gate.wait()
        if not self.chunks:
            raise self.end
        chunk: bytes = self.chunks.pop(0)
        return chunk

    async def aclose(self) -> None:
        self.closed = True


class Sink(ByteSendStream):
    """Keeps what it is sent, and fails at the piece it is told."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.fail_at: int | None = None
        self.block_at: int | None = None
        self.blocked = anyio.Event()
        self.closed = False

    async def send(self, item: bytes) -> None:
        assert type(item) is bytes
        await anyio.lowlevel.checkpoint()
        if self.fail_at == len(self.sent):
            raise BrokenResourceError
        if self.block_at == len(self.sent):
            self.blocked.set()
            await anyio.sleep_forever()
        self.sent.append(item)

    async def aclose(self) -> None:
        self.closed = True


# --- wrap_reader ---------------------------------------------------------------------------------


async def test_requests_across_chunks() -> None:
    reader = wrap_reader(Source(b"ab", b"cdef", b"g", b"hijklmnopqrstuvwxyz"))
    assert isinstance(reader, Reader)
    assert await reader.peek(3) == b"abc"
    assert await reader.next(4) == b"abcd"
    await reader.skip(2)
    assert await reader.read_byte() == ord("g")
    assert await reader.read_str(2) == "hi"
    assert [bytes(part) for part in await reader.next_parts(3)] == [b"jkl"]
    assert (await reader.slice(3)).to_bytes() == b"mno"
    assert await reader.read_bytes(2) == b"pq"
    into = bytearray(3)
    assert await reader.readinto(into) == 3
    assert into == b"rst"
    assert len(reader) == reader.buffered == 6
    reader.release()
    assert await reader.next(6) == b"uvwxyz"
    with pytest.raises(EndOfStream):
        await reader.next(1)
    assert await reader.readinto(into) == 0


async def test_parts_are_the_chunks_themselves() -> None:
    chunks = [pattern(50, i) for i in range(3)]
    parts = await wrap_reader(Source(*chunks)).next_parts(120)
    assert [part.obj for part in parts] == chunks
    assert all(part.readonly for part in parts)


async def test_a_chunk_that_may_change_is_copied() -> None:
    chunk = bytearray(b"abcd")
    reader = wrap_reader(Source(chunk))
    view = await reader.peek(4)
    chunk[:] = b"xxxx"
    assert view == b"abcd"


async def test_until_fills_from_the_source() -> None:
    """netpoll's adapter looks only at what it has."""
    source = Source(b"one", b" line\r", b"\nthe ", b"next\r\nrest")
    reader = wrap_reader(source)
    assert await reader.until(b"\r\n") == b"one line\r\n"
    assert await reader.until(b"\r\n") == b"the next\r\n"
    with pytest.raises(DelimiterNotFound):
        await reader.until(b"\r\n", max_bytes=4)
    with pytest.raises(IncompleteRead):
        await reader.until(b"\r\n", max_bytes=5)
    assert await reader.read_bytes(4) == b"rest"
    with pytest.raises(EndOfStream):
        await reader.until(b"\r\n")


async def test_the_end_within_a_request() -> None:
    """L09."""
    reader = wrap_reader(Source(b"abc"))
    with pytest.raises(IncompleteRead):
        await reader.next(4)
    assert len(reader) == 3
    with pytest.raises(IncompleteRead):
        reader.next_nowait(4)
    assert await reader.next(3) == b"abc"
    for _ in range(2):
        with pytest.raises(EndOfStream):
            await reader.peek(1)
    with pytest.raises(EndOfStream):
        reader.peek_nowait(1)


async def test_the_end_is_asked_for_once() -> None:
    source = Source()
    reader = wrap_reader(source)
    for _ in range(3):
        with pytest.raises(EndOfStream):
            await reader.next(1)
    assert source.calls == 1


async def test_an_error_comes_through_and_nothing_is_lost() -> None:
    source = Source(b"ab", end=BrokenResourceError())
    reader = wrap_reader(source)
    with pytest.raises(BrokenResourceError):
        await reader.next(3)
    assert await reader.next(2) == b"ab"
    source.chunks = [b"cd"]
    assert await reader.next(2) == b"cd"


async def test_nowait() -> None:
    reader = wrap_reader(Source(b"abcdefgh"))
    for call in (lambda: reader.next_nowait(1), lambda: reader.until_nowait(b"c")):
        with pytest.raises(WouldBlock):
            call()
    await reader.peek(1)
    assert reader.peek_nowait(2) == b"ab"
    assert reader.until_nowait(b"c") == b"abc"
    reader.skip_nowait(1)
    assert reader.next_nowait(4) == b"efgh"
    with pytest.raises(WouldBlock):
        reader.skip_nowait(1)


async def test_a_cancelled_request_has_consumed_nothing() -> None:
    source = Source(b"abc", b"def")
    reader = wrap_reader(source)
    assert await reader.next(1) == b"a"
    source.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(reader.next, 5)
        await holds(lambda: source.calls == 2)
        group.cancel_scope.cancel()
    source.gate.set()
    assert await reader.next(5) == b"bcdef"


async def test_two_readers_at_once() -> None:
    source = Source(b"abc", b"def")
    reader = wrap_reader(source)
    await reader.peek(1)
    source.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(reader.skip, 5)
        await holds(lambda: source.calls == 2)
        for call in (
            lambda: reader.next(1),  # also one that would find its bytes
            lambda: reader.until(b"x"),
        ):
            with pytest.raises(BusyResourceError, match="already reading from"):
                await call()
        with pytest.raises(BusyResourceError):
            reader.next_nowait(1)
        source.gate.set()
    assert await reader.next(1) == b"f"


async def test_reads_that_find_their_bytes_are_checkpoints_now_and_then() -> None:
    reader = wrap_reader(Source(b"x" * 1000))
    await reader.next(1)
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            others += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        await anyio.lowlevel.checkpoint()
        before = others
        for _ in range(200):
            await reader.next(1)
        assert 0 < others - before < 20
        group.cancel_scope.cancel()


async def test_a_request_above_the_limit() -> None:
    reader = wrap_reader(Source())
    with pytest.raises(MessageTooLarge, match="the limit is"):
        await reader.next(64 * MIB + 1)


@pytest.mark.parametrize("n", [-1, "1", 1.5])
async def test_nonsense_counts(n: Any) -> None:
    reader = wrap_reader(Source(b"abc"))
    for method in (reader.next, reader.peek, reader.skip, reader.next_parts, reader.slice):
        with pytest.raises((TypeError, ValueError), match="n must be"):
            await method(n)
    assert await reader.next(3) == b"abc"


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: wrap_reader(b""), "ByteReceiveStream"),  # type: ignore[arg-type]
        (lambda: wrap_reader(Sink()), "ByteReceiveStream"),  # type: ignore[arg-type]
        (lambda: wrap_writer(Source()), "ByteSendStream"),  # type: ignore[arg-type]
        (lambda: as_receive_stream(Source()), "Reader"),  # type: ignore[arg-type]
        (lambda: as_send_stream(None), "Writer"),  # type: ignore[arg-type]
    ],
)
async def test_what_cannot_be_wrapped(call: Callable[[], object], what: str) -> None:
    with pytest.raises(TypeError, match=f"a {what} is required"):
        call()


# --- wrap_writer ---------------------------------------------------------------------------------


async def test_small_pieces_go_out_as_one() -> None:
    sink = Sink()
    writer = wrap_writer(sink)
    assert isinstance(writer, Writer)
    writer.write(b"one ")
    writer.write_str("two ")
    writer.malloc(5)[:] = b"three"
    assert len(writer) == writer.buffered == 13
    assert sink.sent == []
    await writer.flush()
    assert sink.sent == [b"one two three"]
    assert len(writer) == 0
    await writer.flush()
    assert len(sink.sent) == 1


async def test_large_pieces_go_out_as_they_are() -> None:
    sink, data = Sink(), pattern(100 * KIB)
    writer = wrap_writer(sink)
    writer.write(b"head")
    writer.write(data)
    writer.malloc(4)
    writer.write_direct(data, 2)
    await writer.flush()
    assert b"".join(sink.sent) == b"head" + data + bytes(2) + data + bytes(2)
    assert any(item is data for item in sink.sent)


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_flush_that_fails_keeps_what_was_not_begun(how: str) -> None:
    sink = Sink()
    writer = wrap_writer(sink)
    pieces = [pattern(20 * KIB, i) for i in range(4)]
    for piece in pieces:
        writer.write(piece)
    if how == "fails":
        sink.fail_at = 1
        with pytest.raises(BrokenResourceError):
            await writer.flush()
    else:
        sink.block_at = 1
        async with anyio.create_task_group() as group:
            group.start_soon(writer.flush)
            await within(sink.blocked.wait())
            group.cancel_scope.cancel()
    assert len(writer) == 40 * KIB
    writer.write(b"later")
    sink.fail_at = sink.block_at = None
    await writer.flush()
    assert sink.sent == [pieces[0], pieces[2], pieces[3], b"later"]


async def test_two_flushes_at_once() -> None:
    sink = Sink()
    writer = wrap_writer(sink)
    writer.write(b"x")
    sink.block_at = 0
    async with anyio.create_task_group() as group:
        group.start_soon(writer.flush)
        await within(sink.blocked.wait())
        with pytest.raises(BusyResourceError, match="already writing to"):
            await writer.flush()
        group.cancel_scope.cancel()


# --- over real streams ---------------------------------------------------------------------------


async def test_a_pair_of_adapters_is_a_stream() -> None:
    a, b = anypoll.socketpair()
    async with b:
        stream = StapledByteStream(as_send_stream(a.writer), as_receive_stream(a.reader))
        a.writer.write(b"first ")
        await stream.send(bytearray(b"second"))
        assert await b.reader.next(12) == b"first second"
        await b.send(b"0123456789")
        assert await a.reader.peek(2) == b"01"
        assert await stream.receive(4) == b"0123"
        assert await a.reader.next(1) == b"4"
        assert await stream.receive() == b"56789"
        await b.send_eof()
        with pytest.raises(EndOfStream):
            await stream.receive()
        await stream.aclose()
        assert a.fileno() == -1


async def test_adapters_over_wrapped_streams() -> None:
    source, sink = Source(b"abc", b"def"), Sink()
    receiving = as_receive_stream(wrap_reader(source))
    sending = as_send_stream(wrap_writer(sink))
    assert await receiving.receive(2) == b"ab"
    assert await receiving.receive() == b"c"
    assert [chunk async for chunk in receiving] == [b"def"]
    await sending.send(b"xyz")
    assert sink.sent == [b"xyz"]
    await receiving.aclose()
    await sending.aclose()
    assert source.closed
    assert sink.closed
    with pytest.raises(ClosedResourceError):
        await receiving.receive()
    with pytest.raises(ClosedResourceError):
        await sending.send(b"x")


async def test_adapter_calls_are_checkpoints_and_check_their_arguments() -> None:
    async with opened() as (conn, peer):
        peer.send(b"abc")
        receiving, sending = as_receive_stream(conn.reader), as_send_stream(conn.writer)
        await conn.reader.peek(3)
        for n in (0, -1):
            with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
                await receiving.receive(n)
        with pytest.raises(TypeError, match="max_bytes must be a positive integer"):
            await receiving.receive(1.5)  # type: ignore[arg-type]
        calls: list[Callable[[], Any]] = [receiving.receive, lambda: sending.send(b"x")]
        for call in calls:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        assert await receiving.receive() == b"abc"
        with pytest.raises(TypeError):
            await sending.send("text")  # type: ignore[arg-type]

"""The reader and the writer of a connection, against a plain socket at the other end."""

from __future__ import annotations

import array
import gc
import socket
import sys
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
)
from calls import Index, all_raise, called
from peers import (
    KIB,
    MIB,
    arrive,
    arrived,
    at_once,
    blocked,
    given_up,
    holds,
    opened,
    pattern,
    read_all,
    read_to_end,
    reset,
    send_all,
    send_until_full,
    served,
    settle,
    stalled,
    suspends,
    within,
)

import anypoll
from anypoll import MessageTooLarge, ReadTimeout, WriteTimeout

pytestmark = pytest.mark.anyio

both_kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


# --- what the calls give -------------------------------------------------------------------------


@both_kinds
async def test_each_call_takes_exactly_its_bytes(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        reader = conn.reader
        await arrive(conn, peer, b"peek next skip GET / HTTP/1.1\r\npartsbytesh\xc3\xa9llo!into")
        assert await reader.peek(4) == b"peek"
        assert await reader.next(5) == b"peek "
        assert await reader.next(5) == b"next "
        assert await reader.skip(5) is None
        assert await reader.until(b"\r\n") == b"GET / HTTP/1.1\r\n"
        assert b"".join(await reader.next_parts(5)) == b"parts"
        data = await reader.read_bytes(5)
        assert data == b"bytes"
        assert type(data) is bytes
        assert await reader.read_str(6) == "héllo"
        assert await reader.read_byte() == ord("!")
        buffer = bytearray(2)
        assert await reader.readinto(buffer) == 2
        assert buffer == b"in"
        assert len(reader) == reader.buffered == 2


async def test_calls_without_waiting() -> None:
    async with opened() as (conn, peer):
        reader = conn.reader
        for call in (
            lambda: reader.peek_nowait(1),
            lambda: reader.next_nowait(1),
            lambda: reader.skip_nowait(1),
            lambda: reader.until_nowait(b"."),
        ):
            with pytest.raises(WouldBlock):
                call()
        await arrive(conn, peer, b"peeknextskipuntil.")
        assert reader.peek_nowait(4) == b"peek"
        assert reader.next_nowait(4) == b"peek"
        assert reader.next_nowait(4) == b"next"
        assert reader.skip_nowait(4) is None
        with pytest.raises(WouldBlock):
            reader.next_nowait(7)
        with pytest.raises(WouldBlock):
            reader.skip_nowait(7)
        with pytest.raises(WouldBlock):
            reader.until_nowait(b"!")
        with pytest.raises(DelimiterNotFound):
            reader.until_nowait(b".", max_bytes=5)
        assert reader.until_nowait(b".", max_bytes=6) == b"until."
        peer.shutdown(socket.SHUT_WR)
        await holds(lambda: conn.at_eof)
        for call in (lambda: reader.next_nowait(1), lambda: reader.until_nowait(b".")):
            with pytest.raises(EndOfStream):
                call()


async def test_a_request_waits_for_its_last_byte() -> None:
    async with opened() as (conn, peer):
        for call, expected in (
            (lambda: conn.reader.peek(3), b"abc"),
            (lambda: conn.reader.next(3), b"abc"),
            (lambda: conn.reader.read_bytes(3), b"abc"),
            (lambda: conn.reader.read_str(3), "abc"),
            (lambda: conn.reader.next_parts(3), [b"abc"]),
            (lambda: conn.reader.until(b"c"), b"abc"),
            (lambda: conn.reader.skip(3), None),
        ):
            async with blocked(call) as outcome:
                await arrive(conn, peer, b"ab")
                assert not outcome
                await send_all(peer, b"c")
            assert outcome == [expected]
            if expected == b"abc" and len(conn.reader):  # the peek
                assert await conn.reader.next(3) == b"abc"
        assert len(conn.reader) == 0


async def test_readinto_takes_what_there_is() -> None:
    async with opened() as (conn, peer):
        reader = conn.reader
        buffer = bytearray(b"........")
        await arrive(conn, peer, b"abc")
        assert await reader.readinto(buffer) == 3
        assert buffer == b"abc....."
        numbers = array.array("i", [0, 0])
        async with blocked(lambda: reader.readinto(numbers)) as outcome:
            assert not outcome
            await send_all(peer, bytes(8))
        assert outcome == [8]
        assert await reader.readinto(bytearray()) == 0
        for wrong in (b"read-only", memoryview(b"read-only"), "text", 5):
            with pytest.raises((TypeError, ValueError)):
                await reader.readinto(wrong)  # type: ignore[arg-type]
        await arrive(conn, peer, b"end")
        peer.shutdown(socket.SHUT_WR)
        assert await within(reader.readinto(buffer)) == 3
        assert await within(reader.readinto(buffer)) == 0
        assert await within(reader.readinto(buffer)) == 0


async def test_text_in_another_encoding() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, "héé".encode("latin-1") + b"\xff!")
        for wrong in ("no such encoding", None, 5):
            with pytest.raises((ValueError, TypeError), match="encoding must be"):
                await conn.reader.read_str(3, encoding=wrong)  # type: ignore[arg-type]
        assert await conn.reader.read_str(3, encoding="latin-1") == "héé"
        with pytest.raises(UnicodeDecodeError):
            await conn.reader.read_str(1)
        assert await conn.reader.next(1) == b"!"


async def test_the_length_counts_what_was_read_ahead() -> None:
    async with opened() as (conn, peer):
        assert len(conn.reader) == conn.reader.buffered == 0
        assert bool(conn.reader)
        assert bool(conn.writer)
        await send_all(peer, b"0123456789")
        await holds(lambda: len(conn.reader) == 10)
        await conn.reader.next(3)
        assert len(conn.reader) == conn.reader.buffered == 7
        assert conn.statistics().buffered_input == 7
        await conn.receive(2)
        assert len(conn.reader) == 5
    assert len(conn.reader) == conn.reader.buffered == 0


# --- arguments -----------------------------------------------------------------------------------

COUNTED = [
    "peek",
    "next",
    "skip",
    "next_parts",
    "read_bytes",
    "read_str",
    "peek_nowait",
    "next_nowait",
    "skip_nowait",
]


async def test_a_wrong_count_changes_nothing() -> None:
    """L05."""
    async with opened() as (conn, peer):
        calls = {method: getattr(conn.reader, method) for method in COUNTED}
        await arrive(conn, peer, b"abcd")
        for window in (False, True):
            if window:
                assert await conn.reader.peek(1) == b"a"
            for wrong in (-1, -(2**70), 2**70, 2**63, 2**64 + 1, Index(-1)):
                await all_raise(calls, ValueError, wrong)  # of which MessageTooLarge is one
            for wrong in (1.0, 1.5, float("nan"), "1", b"1", None, [1], 1j):
                await all_raise(calls, TypeError, wrong)
            await all_raise(calls, TypeError)
            assert len(conn.reader) == 4
        assert await conn.reader.next(4) == b"abcd"


async def test_whatever_is_an_index_will_do() -> None:
    async with opened() as (conn, peer):
        for method in COUNTED:
            for one in (1, True, Index(1)):
                await arrive(conn, peer, b"ab")
                given = await called(getattr(conn.reader, method), one)
                if method.startswith("peek"):
                    await conn.reader.skip(1)
                if not method.startswith("skip"):
                    assert given in (b"a", "a", [b"a"])
                assert await conn.reader.next(1) == b"b"


@pytest.mark.parametrize("ended", [False, True])
async def test_no_bytes_are_there_at_once(ended: bool) -> None:
    """L05. Also when nothing is buffered, and behind the end of the stream."""
    async with opened() as (conn, peer):
        reader = conn.reader
        if ended:
            peer.shutdown(socket.SHUT_WR)
            await holds(lambda: conn.at_eof)
        for view in (
            at_once(reader.peek(0)),
            at_once(reader.next(0)),
            reader.peek_nowait(0),
            reader.next_nowait(0),
        ):
            assert isinstance(view, memoryview)
            assert len(view) == 0
        assert at_once(reader.skip(0)) is None
        assert reader.skip_nowait(0) is None
        assert at_once(reader.next_parts(0)) == []
        assert at_once(reader.read_bytes(0)) == b""
        assert at_once(reader.read_str(0)) == ""
        if not ended:
            await arrive(conn, peer, b"ab")
            assert at_once(reader.next(0)) == b""
            assert at_once(reader.peek(1)) == b"a"
            assert at_once(reader.peek(0)) == b""
            assert at_once(reader.next(2)) == b"ab"


async def test_wrong_delimiters_change_nothing() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"ab\n")
        for until in (conn.reader.until, conn.reader.until_nowait):
            for wrong in (b"", bytearray(), memoryview(b"")):
                with pytest.raises(ValueError):
                    await called(until, wrong)
            for wrong in ("\n", 10, None, [10], 1.0):
                with pytest.raises(TypeError):
                    await called(until, wrong)
            with pytest.raises(ValueError):
                await called(until, b"\n", max_bytes=-1)
            for wrong in ("1", 1.0, None):
                with pytest.raises(TypeError):
                    await called(until, b"\n", max_bytes=wrong)
        assert await conn.reader.next(3) == b"ab\n"


async def test_any_bytes_may_be_a_delimiter() -> None:
    async with opened() as (conn, peer):
        long = pattern(5000)
        await arrive(conn, peer, b"a\nb\0c.." + long + b"rest")
        assert await conn.reader.until(bytearray(b"\n")) == b"a\n"
        assert await conn.reader.until(memoryview(b"\0")) == b"b\0"
        assert await conn.reader.until(long) == b"c.." + long
        assert await conn.reader.next(4) == b"rest"


# --- views ---------------------------------------------------------------------------------------


async def test_views_are_exact_and_read_only() -> None:
    """L38."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"abcdefgh.")
        views = [
            await conn.reader.peek(3),
            await conn.reader.next(3),
            *(await conn.reader.next_parts(3)),
            conn.reader.peek_nowait(2),
            conn.reader.next_nowait(2),
            await conn.reader.until(b"."),
        ]
        assert views == [b"abc", b"abc", b"def", b"gh", b"gh", b"."]
        for view in views:
            assert type(view) is memoryview
            assert view.readonly
            assert (view.format, view.itemsize, view.ndim, view.contiguous) == ("B", 1, 1, True)
            assert view.nbytes == len(view)
            with pytest.raises(TypeError):
                view[0] = 0  # type: ignore[index]


@both_kinds
async def test_a_view_stays_while_megabytes_go_on_arriving(kind: str) -> None:
    """L42, L14: through next, receive(), readinto, release and views of other messages."""
    data = pattern(8 * MIB)
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(send_all, peer, data)
        held: list[tuple[int, memoryview]] = []
        reader, place = conn.reader, 0
        into = bytearray(3000)
        while place < len(data) - 70_000:
            held.append((place, await within(reader.peek(1 + place % 7000))))
            held.append((place, await within(reader.next(11))))
            place += 11
            held.append((place, await within(reader.next(place % 5000))))
            place += place % 5000
            place += len(await conn.receive(20_000))
            for part in await within(reader.next_parts(30_001)):
                held.append((place, part))
                place += len(part)
            place += await within(reader.readinto(into))
            reader.release()
            if len(held) > 300:  # the others are kept to the end
                del held[::2]
        assert await within(reader.read_bytes(len(data) - place)) == data[place:]
        assert len(held) > 100
        for place, view in held:
            assert view == data[place : place + len(view)]


@pytest.mark.parametrize("end", ["aclose", "abort", "reset", "collect", "detach"])
async def test_a_view_outlives_its_connection(end: str) -> None:
    """O14."""
    data = pattern(50_000)
    async with opened("tcp") as (conn, peer):
        await send_all(peer, data)
        small = await within(conn.reader.next(1000))
        large = await within(conn.reader.peek(40_000))
        parts = await within(conn.reader.next_parts(45_000))
        if end == "abort":
            conn.abort()
        elif end == "reset":
            reset(peer)
            with pytest.raises(BrokenResourceError):
                await within(conn.reader.next(50_000))
        elif end == "detach":
            await holds(lambda: len(conn.reader) == 4000)
            sock, rest = conn.detach()
            sock.close()
            assert rest == data[46_000:]
        await conn.aclose()
        conn = None  # type: ignore[assignment]
        gc.collect()
        for seed in range(4):  # others may use what was recycled
            async with opened() as (other, other_peer), anyio.create_task_group() as group:
                group.start_soon(send_all, other_peer, pattern(500_000, seed + 1))
                for _ in range(10):
                    await within(other.reader.skip(50_000))
        assert small == data[:1000]
        assert large == data[1000:41_000]
        assert b"".join(parts) == data[1000:46_000]


def test_a_view_outlives_its_event_loop(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    backend, options = anyio_backend
    data = pattern(100_000)
    connections: list[anypoll.Connection] = []

    async def main(*, close: bool) -> list[memoryview]:
        ours, theirs = anypoll.socketpair()
        connections.append(ours)
        async with theirs, anyio.create_task_group() as group:
            group.start_soon(theirs.send, data)
            views = [await ours.reader.next(10), *(await ours.reader.next_parts(99_990))]
        if close:
            await ours.aclose()
        return views

    kept = anyio.run(lambda: main(close=True), backend=backend, backend_options=options)
    kept_open = anyio.run(lambda: main(close=False), backend=backend, backend_options=options)
    assert all(conn.fileno() == -1 for conn in connections)  # the loop's end has closed them
    for _ in range(2):
        anyio.run(lambda: main(close=True), backend=backend, backend_options=options)
    connections.clear()
    gc.collect()
    assert b"".join(kept) == data
    assert b"".join(kept_open) == data


async def test_parts_are_the_blocks_themselves() -> None:
    data = pattern(40_000)
    async with opened() as (conn, peer):
        for first in range(0, len(data), 500):
            await arrive(conn, peer, data[first : first + 500])
        before = anypoll.statistics().pollers[0].blocks_in_use
        parts = await conn.reader.next_parts(len(data))
        assert len(parts) > 1
        assert all(len(part) for part in parts)
        assert b"".join(parts) == data
        assert anypoll.statistics().pollers[0].blocks_in_use == before


# --- until ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n\r\n", b"abcab"])
@pytest.mark.parametrize("waiting", [False, True])
async def test_a_delimiter_may_be_split_anywhere(delimiter: bytes, waiting: bool) -> None:
    message = b"ab\ra\r\rabca" + delimiter
    length = message.index(delimiter) + len(delimiter)
    message = message[:length]
    async with opened() as (conn, peer):
        for cut in range(1, len(message)):
            for second in range(cut, len(message)):
                pieces = [p for p in (message[:cut], message[cut:second], message[second:]) if p]
                if waiting:
                    async with blocked(lambda: conn.reader.until(delimiter)) as outcome:
                        for piece in pieces[:-1]:
                            await arrive(conn, peer, piece)
                        assert not outcome
                        await send_all(peer, pieces[-1])
                    assert outcome == [message]
                else:
                    for piece in pieces:
                        await arrive(conn, peer, piece)
                    assert await within(conn.reader.until(delimiter)) == message
                assert len(conn.reader) == 0


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"--end"])
async def test_a_delimiter_on_every_place_of_a_block_border(delimiter: bytes) -> None:
    """The first blocks hold about 2 KiB; the messages walk over their ends."""
    async with opened() as (conn, peer):
        for size in range(1980, 2070):
            message = b"x" * size + delimiter
            await arrive(conn, peer, message[:1500])
            await arrive(conn, peer, message[1500:])
            assert await conn.reader.until(delimiter) == message


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
async def test_max_bytes_does_not_depend_on_the_chunks(chunk: int) -> None:
    message = b"0123456789\r\n"
    async with opened() as (conn, peer):
        for first in range(0, len(message), chunk):
            await arrive(conn, peer, message[first : first + chunk])
        for most in range(12):
            with pytest.raises(DelimiterNotFound):
                await conn.reader.until(b"\r\n", max_bytes=most)
            assert len(conn.reader) == 12
        assert await conn.reader.until(b"\r\n", max_bytes=12) == message


@pytest.mark.parametrize("most", [1, 5, 11])
async def test_enough_bytes_without_the_delimiter_end_the_wait(most: int) -> None:
    """Even if the delimiter comes in the same segment, or never."""
    async with opened() as (conn, peer):
        call = lambda: conn.reader.until(b"\r\n", max_bytes=most)  # noqa: E731
        for tail in (b"", b"6789ab\r\n"):
            async with blocked(call) as outcome:
                for byte in b"0123456789a"[: most - 1]:
                    await arrive(conn, peer, bytes([byte]))
                assert not outcome
                await send_all(peer, b"x" + tail)
            assert isinstance(outcome[0], DelimiterNotFound)
            await holds(lambda: len(conn.reader) == most + len(tail))  # noqa: B023
            assert await conn.reader.next(most) == b"0123456789a"[: most - 1] + b"x"
            await conn.reader.skip(len(tail))


async def test_a_search_goes_on_where_it_must() -> None:
    """After a limit that was too low, a limit within the delimiter, an other delimiter, a peek, and
    bytes that were consumed meanwhile.
    """
    async with opened() as (conn, peer):
        reader = conn.reader
        await arrive(conn, peer, b"ab--end")
        for most in (3, 4, 5, 6):
            with pytest.raises(DelimiterNotFound):
                await reader.until(b"--end", max_bytes=most)
        with pytest.raises(WouldBlock):
            reader.until_nowait(b"--END")
        assert await reader.peek(7) == b"ab--end"
        assert await reader.until(b"--end") == b"ab--end"
        await arrive(conn, peer, b"1234--en")
        with pytest.raises(WouldBlock):
            reader.until_nowait(b"--end")
        await reader.skip(7)  # into the delimiter, which is none any more
        await arrive(conn, peer, b"d.--end")
        assert await reader.until(b"--end") == b"nd.--end"
        await arrive(conn, peer, b"no delimiter in here, and then")
        async with anyio.create_task_group() as group:
            group.start_soon(reader.until, b"\r\n")
            await settle()
            group.cancel_scope.cancel()
        assert await reader.until(b",") == b"no delimiter in here,"
        await arrive(conn, peer, b"\r\n")
        assert await reader.until(b"\r\n") == b" and then\r\n"


async def test_the_whole_of_a_long_line() -> None:
    line = b"x" * 300_000 + b"\n"
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(send_all, peer, line + line)
        with pytest.raises(DelimiterNotFound):
            await within(conn.reader.until(b"\n"))  # max_bytes is 65536
        for _ in range(2):
            assert await within(conn.reader.until(b"\n", max_bytes=300_001)) == line


@pytest.mark.parametrize("size", [401, 4096, 100_000])
@pytest.mark.parametrize("failure", ["nowait", "scattered nowait", "timeout", "end", "cancel"])
async def test_a_request_that_fails_leaves_everything_in_place(size: int, failure: str) -> None:
    """Although the input may have been moved to a larger block meanwhile."""
    data = pattern(3000)
    async with opened() as (conn, peer):
        reader = conn.reader
        await arrive(conn, peer, data[:600])
        assert await reader.next(200) == data[:200]
        if failure == "nowait":
            with pytest.raises(WouldBlock):
                reader.peek_nowait(size)
        elif failure == "scattered nowait":
            with pytest.raises(WouldBlock):
                reader.skip_nowait(size)
        elif failure == "timeout":
            conn.read_timeout = 0
            with pytest.raises(ReadTimeout):
                await reader.next(size)
            conn.read_timeout = None
        elif failure == "end":
            peer.shutdown(socket.SHUT_WR)
            with pytest.raises(IncompleteRead):
                await within(reader.next(size))
        else:
            assert suspends(reader.next(size))
        assert await reader.next(300) == data[200:500]
        assert await reader.next(100) == data[500:600]
        assert len(reader) == 0
        with pytest.raises(EndOfStream if failure == "end" else WouldBlock):
            reader.next_nowait(1)
        if failure != "end":
            await arrive(conn, peer, data[600:])
            assert await reader.next(2400) == data[600:]


# --- limits --------------------------------------------------------------------------------------


async def test_too_large_a_request_does_not_wait() -> None:
    async with served(read_limit=1000) as (conn, peer):
        reader = conn.reader
        await arrive(conn, peer, bytes(1100))
        for window in (False, True):
            if window:
                await reader.peek(1)
            for call in (
                reader.next,
                reader.peek,
                reader.skip,
                reader.next_parts,
                reader.read_bytes,
                reader.read_str,
            ):
                with pytest.raises(MessageTooLarge):
                    at_once(call(1001))
            for plain in (reader.next_nowait, reader.peek_nowait, reader.skip_nowait):
                with pytest.raises(MessageTooLarge):
                    plain(1001)
        assert at_once(reader.next(1000)) == bytes(1000)
        assert len(reader) == 100


async def test_the_limit_is_64_mib() -> None:
    async with opened() as (conn, _):
        with pytest.raises(MessageTooLarge):
            at_once(conn.reader.next(64 * MIB + 1))
        assert suspends(conn.reader.next(64 * MIB))


@pytest.mark.parametrize("method", ["next", "skip"])
async def test_a_length_prefix_costs_no_memory(method: str) -> None:
    def memory() -> int:
        return sum(p.bytes_in_use for p in anypoll.statistics().pollers)

    async with opened() as (conn, peer), anyio.create_task_group() as group:
        before = memory()
        group.start_soon(getattr(conn.reader, method), 60 * MIB)
        await settle()
        assert memory() - before < 64 * KIB
        sent = 0
        for _ in range(8):  # memory follows what arrives
            await arrive(conn, peer, bytes(64 * KIB))
            sent += 64 * KIB
            assert memory() - before < 2 * sent + MIB
        group.cancel_scope.cancel()


@both_kinds
async def test_reading_ahead_stops_at_high_water(kind: str) -> None:
    """O16."""
    data = pattern(16 * MIB)
    async with opened(kind) as (conn, peer):
        sent = await send_until_full(conn, peer, data)
        assert sent < len(data)
        assert conn.statistics().bytes_received == len(conn.reader) == 256 * KIB
        async with anyio.create_task_group() as group:
            group.start_soon(send_all, peer, data[sent:])
            place = 0
            while place < len(data):
                n = min(300_007, len(data) - place)
                assert await within(conn.reader.next(n)) == data[place : place + n]
                place += n
                assert len(conn.reader) <= 256 * KIB


@both_kinds
@pytest.mark.parametrize("method", ["next", "skip", "until"])
async def test_a_wait_lifts_the_high_water_mark(kind: str, method: str) -> None:
    """Paused at 256 KiB and consumed to 100 KiB, which is above the low mark: who waits for 200,000
    bytes gets them all the same.
    """
    data = b"x" * 1_000_000
    rest = 256 * KIB - 100 * KIB
    data = data[: rest + 199_999] + b"\n" + data[rest + 200_000 :]
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(send_all, peer, data)
        await holds(lambda: len(conn.reader) == 256 * KIB)
        await conn.reader.skip(rest)
        assert len(conn.reader) == 100 * KIB
        if method == "until":
            assert (
                await within(conn.reader.until(b"\n", max_bytes=300_000))
                == (data[rest : rest + 200_000])
            )
        else:
            await within(getattr(conn.reader, method)(200_000))
        assert await within(conn.reader.read_bytes(800_000 - rest)) == data[rest + 200_000 :]


async def test_a_request_above_high_water() -> None:
    """O16."""
    data = pattern(3_000_000)
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        group.start_soon(send_all, peer, data + b"tail")
        assert await within(conn.reader.peek(1_000_000)) == data[:1_000_000]
        assert await within(conn.reader.next(3_000_000)) == data
        assert await within(conn.reader.next(4)) == b"tail"


async def test_own_marks() -> None:
    """O25."""
    async with served(read_high_water=10_000) as (conn, peer):
        sent = await send_until_full(conn, peer, pattern(16 * MIB))
        assert sent > 10_000
        assert len(conn.reader) == 10_000
        assert await within(conn.reader.next(20_000)) == pattern(16 * MIB)[:20_000]


# --- waiting -------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("method", ["next", "skip", "until"])
async def test_one_wake_up_for_a_request(kind: str, method: str) -> None:
    """L02: and not one for each segment."""
    async with opened(kind) as (conn, peer):
        before = conn.statistics().wakeups
        argument = b"\n" if method == "until" else 100
        async with blocked(lambda: getattr(conn.reader, method)(argument)) as outcome:
            for _ in range(99):
                await arrive(conn, peer, b"x")
            assert not outcome
            assert conn.statistics().wakeups == before
            await send_all(peer, b"\n")
        assert len(outcome) == 1
        assert conn.statistics().wakeups == before + 1
        assert conn.statistics().reads >= 100


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["peek", "next", "skip", "until", "next_parts", "read_bytes", "read_byte", "readinto"]
)
async def test_the_budget_of_calls_without_suspension(method: str) -> None:
    arguments = {"until": (b"x",), "read_byte": (), "readinto": (bytearray(1),)}.get(method, (1,))
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"x" * 200)
        call = getattr(conn.reader, method)
        for _ in range(64):
            at_once(call(*arguments))
        assert suspends(call(*arguments))
        await within(call(*arguments))
        for _ in range(63):
            at_once(call(*arguments))
        assert suspends(call(*arguments)) or suspends(call(*arguments))


async def test_flushes_count_as_well() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, bytes(100))
        for _ in range(32):
            at_once(conn.reader.next(1))
            conn.writer.write_byte(1)
            at_once(conn.writer.flush())
        assert suspends(conn.writer.flush())
        await conn.writer.flush()
        for _ in range(64):
            at_once(conn.writer.flush())
        assert suspends(conn.reader.next(1))


async def test_cancellation_is_seen_within_the_budget() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, bytes(1000))
        calls = 0
        with anyio.CancelScope() as scope:
            scope.cancel()
            while True:
                await conn.reader.next(1)
                calls += 1
                assert calls <= 64
        assert len(conn.reader) == 1000 - calls


async def test_another_budget() -> None:
    anypoll.configure(checkpoint_budget=3)
    try:
        async with opened() as (conn, peer):
            await arrive(conn, peer, bytes(10))
            for _ in range(3):
                at_once(conn.reader.next(1))
            assert suspends(conn.reader.next(1))
    finally:
        anypoll.configure(checkpoint_budget=64)


async def test_a_real_suspension_renews_the_budget() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, bytes(60))
        for _ in range(60):
            at_once(conn.reader.next(1))
        async with blocked(lambda: conn.reader.next(1)) as outcome:
            await send_all(peer, bytes(65))
        assert outcome == [bytes(1)]
        for _ in range(64):
            at_once(conn.reader.next(1))


# --- timeouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["next", "until"])
async def test_a_read_timeout_is_for_the_whole_call(method: str) -> None:
    """O13: a peer that sends a byte now and then does not prolong it.

    L31: and nothing of it is left.
    """
    argument: Any = b"\n" if method == "until" else 60_000
    async with opened() as (conn, peer):
        conn.read_timeout = 0.05
        sent = 0

        async def drip() -> None:
            nonlocal sent
            while True:
                await send_all(peer, b"x")
                sent += 1
                await anyio.sleep(0.005)

        async with anyio.create_task_group() as group:
            group.start_soon(drip)
            for _ in range(2):
                with pytest.raises(ReadTimeout):
                    await within(getattr(conn.reader, method)(argument))
            group.cancel_scope.cancel()
        await holds(lambda: len(conn.reader) == sent)
        assert await conn.reader.next(sent) == b"x" * sent
        conn.read_timeout = None
        async with blocked(lambda: conn.reader.next(1)) as outcome:
            await anyio.sleep(0.06)
            assert not outcome
            await send_all(peer, b"y")
        assert outcome == [b"y"]


async def test_outer_scopes_go_on_working() -> None:
    async with opened() as (conn, peer):
        conn.read_timeout = 60
        with anyio.move_on_after(0.01) as scope:
            await conn.reader.next(1)
        assert scope.cancelled_caught
        conn.read_timeout = 0.01
        with anyio.fail_after(30), pytest.raises(ReadTimeout):
            await conn.reader.next(1)
        assert issubclass(ReadTimeout, TimeoutError)
        await arrive(conn, peer, b"x")
        assert await conn.reader.next(1) == b"x"


async def test_the_timeouts_of_a_server_are_those_of_its_connections() -> None:
    async with served(read_timeout=0.01, write_timeout=0.02) as (conn, _):
        assert (conn.read_timeout, conn.write_timeout) == (0.01, 0.02)
        with pytest.raises(ReadTimeout):
            await within(conn.reader.next(1))


@both_kinds
async def test_a_write_timeout_leaves_the_rest_pending(kind: str) -> None:
    """O10."""
    data, more = pattern(16 * MIB), pattern(100_000, 1)
    async with opened(kind) as (conn, peer):
        conn.write_timeout = 0.05
        conn.writer.write(data)
        for _ in range(2):
            with pytest.raises(WriteTimeout):
                await within(conn.writer.flush())
        await stalled(conn)
        left = len(conn.writer)
        assert 0 < left < len(data)
        conn.write_timeout = None
        conn.writer.write(more)
        assert len(conn.writer) == left + len(more)
        async with blocked(conn.writer.flush) as outcome:
            assert await read_all(peer, len(data) + len(more)) == data + more
        assert outcome == [None]
        assert len(conn.writer) == 0


# --- writing -------------------------------------------------------------------------------------


async def test_what_is_written_goes_out_with_flush() -> None:
    async with opened() as (conn, peer):
        writer = conn.writer
        assert writer.write(b"bytes ") == 6
        assert writer.write(bytearray(b"bytearray ")) == 10
        assert writer.write(memoryview(b"memoryview ")[1:]) == 10
        assert writer.write(memoryview(b"s.t.e.p. ")[::2]) == 5
        assert writer.write(array.array("H", [0x2020])) == 2
        assert writer.write(b"") == 0
        assert writer.write_str("héllo ") == 7
        assert writer.write_byte(0) == 1
        assert writer.write_byte(255) == 1
        expected = b"bytes bytearray emoryview step   h\xc3\xa9llo \0\xff"
        assert len(writer) == writer.buffered == len(expected)
        assert conn.statistics().buffered_output == len(expected)
        await anyio.sleep(0)
        assert arrived(peer) == 0
        await writer.flush()
        assert len(writer) == 0
        assert peer.recv(100) == expected
        assert conn.statistics().writes == 1


async def test_text_to_write_in_another_encoding() -> None:
    async with opened() as (conn, peer):
        assert conn.writer.write_str("é", encoding="latin-1") == 1
        with pytest.raises(UnicodeEncodeError):
            conn.writer.write_str("€", encoding="latin-1")
        await conn.writer.flush()
        assert peer.recv(10) == b"\xe9"


async def test_nonsense_to_the_writer_changes_nothing() -> None:
    """O11, L05."""
    async with opened() as (conn, peer):
        writer = conn.writer
        writer.write(b"before ")
        writer.malloc(3)[:] = b"abc"
        for call, wrongs in (
            (writer.write, (5, "text", None, [1], 1.5)),
            (writer.write_str, (b"bytes", 5, None)),
            (writer.write_byte, (-1, 256, 1.0, "a", b"a", None, 2**70)),
            (writer.malloc, (-1, 1.0, "1", None, 2**70, Index(-1))),
            (writer.malloc_ack, (-1, 4, 1.0, "1", None, 2**70)),
        ):
            for wrong in wrongs:
                with pytest.raises((TypeError, ValueError)):
                    call(wrong)
                assert writer.malloc_len == 3
                assert len(writer) == 10
        await writer.flush()
        assert peer.recv(100) == b"before abc"


async def test_reservations() -> None:
    """L27."""
    async with opened() as (conn, peer):
        writer = conn.writer
        memory = writer.malloc(4)
        assert type(memory) is memoryview
        assert not memory.readonly
        assert memory == bytes(4)
        assert writer.malloc_len == len(writer) == 4
        memory[:] = b"abcd"
        more = writer.malloc(4)
        assert writer.malloc_len == 8
        more[:] = b"efgh"
        writer.malloc_ack(6)
        assert writer.malloc_len == 0
        assert len(writer) == 6
        memory[:] = more[:] = b"XXXX"  # goes nowhere
        assert len(writer.malloc(0)) == 0
        writer.malloc(2)[:] = b"gh"
        writer.write(b"-")  # ends the reservation, and keeps it
        assert writer.malloc_len == 0
        writer.malloc(5)[:2] = b"ij"
        writer.malloc_ack(2)
        writer.malloc_ack(0)
        writer.malloc(3)
        writer.malloc_ack(0)
        writer.malloc(2)[:] = b"kl"
        await writer.flush()  # so does this
        assert writer.malloc_len == len(writer) == 0
        assert peer.recv(100) == b"abcdefgh-ijkl"


async def test_a_reservation_is_zeroed() -> None:
    """O11: never what others have sent."""
    async with opened() as (conn, peer):
        for size in (100, 5000, 100_000):
            conn.writer.malloc(size)[:] = b"x" * size
            conn.writer.malloc_ack(size)
            async with anyio.create_task_group() as group:
                group.start_soon(conn.writer.flush)
                assert await read_all(peer, size) == b"x" * size
            assert conn.writer.malloc(size) == bytes(size)
            conn.writer.malloc_ack(0)


async def test_a_buffer_may_be_changed_after_write() -> None:
    async with opened() as (conn, peer):
        for size in (10, 5000, 100_000):
            data = bytearray(pattern(size))
            conn.writer.write(data)
            conn.writer.write(memoryview(data))
            data[:] = bytes(size)
            data.append(0)  # nothing holds it
            async with anyio.create_task_group() as group:
                group.start_soon(conn.writer.flush)
                assert await read_all(peer, 2 * size) == pattern(size) * 2


@pytest.mark.parametrize("end", ["abort", "reset", "cancelled aclose"])
async def test_output_that_is_given_up_is_let_go_of(end: str) -> None:
    """L15."""
    data = pattern(16 * MIB)
    baseline = sys.getrefcount(data)
    async with opened("tcp") as (conn, peer):
        conn.writer.write(data)
        await given_up(conn, conn.writer.flush)
        assert sys.getrefcount(data) > baseline
        if end == "abort":
            conn.abort()
        elif end == "reset":
            reset(peer)
            with pytest.raises(BrokenResourceError):
                await within(conn.writer.flush())
        else:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await conn.aclose()
        gc.collect()
        await holds(lambda: sys.getrefcount(data) == baseline)


@both_kinds
async def test_a_cancelled_flush_keeps_the_order(kind: str) -> None:
    """L44."""
    expected = bytearray()
    async with opened(kind) as (conn, peer):
        for seed in range(4):
            for size in (10, 5000, 4 * MIB, 300):
                expected += pattern(size, seed)
                conn.writer.write(pattern(size, seed))
            await given_up(conn, conn.writer.flush)
        conn.writer.write(b"the end")
        async with blocked(conn.writer.flush) as outcome:
            assert await read_all(peer, len(expected) + 7) == expected + b"the end"
        assert outcome == [None]


# --- the flush that happens by itself ------------------------------------------------------------


@pytest.mark.parametrize("method", ["next", "until", "receive"])
async def test_output_goes_out_when_the_reader_waits(method: str) -> None:
    """One system call for a whole batch of answers."""
    arguments = {"until": (b"\n",), "receive": ()}.get(method, (1,))
    call = conn_call(method)
    async with opened() as (conn, peer):
        for round_ in range(1, 4):
            for i in range(10):
                conn.writer.write(b"answer %d " % i)
            async with blocked(lambda: call(conn, *arguments)) as outcome:
                await holds(lambda: arrived(peer) == 90)
                assert len(conn.writer) == 0
                assert not outcome
                peer.send(b"\n")
            assert conn.statistics().writes == round_
            assert peer.recv(1000) == b"".join(b"answer %d " % i for i in range(10))


def conn_call(method: str) -> Callable[..., Any]:
    def call(conn: anypoll.Connection, *args: Any) -> Any:
        return getattr(conn if method == "receive" else conn.reader, method)(*args)

    return call


async def test_a_pipelining_server_answers_in_one_piece() -> None:
    """As long as requests are there nothing is sent; then all answers go out together."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"".join(b"request %2d\n" % i for i in range(50)))

        async def serve() -> None:
            while True:
                line = await conn.reader.until(b"\n")
                conn.writer.write(b"re: ")
                conn.writer.write(line)

        async with blocked(serve) as outcome:
            await holds(lambda: arrived(peer) == 50 * 15)
            assert conn.statistics().writes == 1
            peer.shutdown(socket.SHUT_WR)
        assert isinstance(outcome[0], EndOfStream)
        assert peer.recv(9999) == b"".join(b"re: request %2d\n" % i for i in range(50))


async def test_output_that_is_too_much_for_one_piece() -> None:
    """Above 16 KiB the pieces go out as they are, and still with one call."""
    pieces = [pattern(n, n) for n in (100, 5000, 1, 20_000, 50_000, 3)]
    async with opened() as (conn, peer):
        for piece in pieces:
            conn.writer.write(piece)
        async with blocked(lambda: conn.reader.next(1)) as outcome:
            assert await read_all(peer, 75_104) == b"".join(pieces)
            assert conn.statistics().writes == 1
            await send_all(peer, b"x")
        assert outcome == [b"x"]


async def test_a_call_that_finds_its_bytes_flushes_nothing() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"abc\n")
        conn.writer.write(b"pending")
        await conn.reader.peek(2)
        await conn.reader.next(2)
        await conn.reader.until(b"\n")
        conn.reader.skip_nowait(0)
        with pytest.raises(WouldBlock):
            conn.reader.next_nowait(1)
        assert len(conn.writer) == 7
        assert arrived(peer) == 0
        await conn.writer.flush()


async def test_an_open_reservation_is_not_sent() -> None:
    """One task may fill it while another reads."""
    async with opened() as (conn, peer):
        conn.writer.write(b"sent ")
        memory = conn.writer.malloc(6)
        async with blocked(lambda: conn.reader.next(1)) as outcome:
            await holds(lambda: arrived(peer) == 5)
            assert len(conn.writer) == conn.writer.malloc_len == 6
            memory[:] = b"filled"
            assert not outcome
            await conn.writer.flush()
            await holds(lambda: arrived(peer) == 11)
            peer.send(b"x")
        assert outcome == [b"x"]
        assert peer.recv(100) == b"sent filled"


@pytest.mark.parametrize("how", ["aclose", "handler"])
async def test_an_open_reservation_is_not_sent_at_the_end(how: str) -> None:
    if how == "aclose":
        async with opened() as (conn, peer):
            conn.writer.write(b"sent")
            conn.writer.malloc(6)
            await conn.aclose()
            assert await read_to_end(peer) == b"sent"
        return

    async def handler(conn: anypoll.Connection) -> None:
        conn.writer.write(b"sent")
        conn.writer.malloc(6)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            peer.setblocking(False)
            assert await read_to_end(peer) == b"sent"


@both_kinds
async def test_a_flush_beside_a_read(kind: str) -> None:
    """Neither order makes anybody busy, and both make progress."""
    data = pattern(8 * MIB)
    async with opened(kind) as (conn, peer):
        # the reader waits first
        async with blocked(lambda: conn.reader.next(1)) as read:
            conn.writer.write(data)
            async with blocked(conn.writer.flush) as flushed:
                await send_all(peer, b"x")
                await holds(lambda: read)
                assert not flushed
                assert await read_all(peer, len(data)) == data
            assert flushed == [None]
        assert read == [b"x"]
        # the writer waits first
        conn.writer.write(data)
        async with blocked(conn.writer.flush) as flushed:
            conn.writer.write(b"more")
            async with blocked(lambda: conn.reader.next(1)) as read:
                assert not flushed
                await send_all(peer, b"y")
            assert read == [b"y"]
            assert await read_all(peer, len(data) + 4) == data + b"more"
        assert flushed == [None]
        # output that the waiting reader has handed over, and then a send
        conn.writer.write(data)
        async with blocked(lambda: conn.reader.next(1)) as read:
            async with blocked(lambda: conn.send(b"behind")) as sent:
                assert await read_all(peer, len(data) + 6) == data + b"behind"
            assert sent == [None]
            await send_all(peer, b"z")
        assert read == [b"z"]


# --- write_high_water ----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("method", ["next", "until", "receive"])
async def test_a_peer_that_does_not_read_stops_the_reader(kind: str, method: str) -> None:
    """L44: also a call that finds its bytes; it goes on when the output has drained."""
    arguments = {"until": (b"x",), "receive": ()}.get(method, (1,))
    call = conn_call(method)
    data = pattern(16 * MIB)
    async with opened(kind) as (conn, peer):
        await arrive(conn, peer, b"x")
        await conn.reader.peek(1)
        conn.writer.write(data)
        async with blocked(lambda: call(conn, *arguments)) as outcome:
            await holds(lambda: arrived(peer) > 0)
            await stalled(conn)
            assert not outcome
            assert await read_all(peer, len(data)) == data
        assert len(outcome) == 1
        assert outcome[0] in (b"x", [b"x"], None)


async def test_the_output_of_a_server_is_bounded() -> None:
    """L44. Pipelined requests for large answers, from a peer that does not read."""
    answer = pattern(100_000)
    most = answers = 0

    async def handler(conn: anypoll.Connection) -> None:
        nonlocal most, answers
        while True:
            await conn.reader.next(10)
            conn.writer.write(answer)
            answers += 1
            most = max(most, len(conn.writer))

    async with anypoll.serve(handler, host="127.0.0.1", port=0, write_high_water=300_000) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            peer.setblocking(False)
            await send_all(peer, b"0123456789" * 500)
            await holds(lambda: server.connections)
            [conn] = server.connections
            await holds(lambda: conn.statistics().buffered_output)
            await stalled(conn)
            assert answers < 400  # the kernel's buffers hold some
            for _ in range(500):
                assert await read_all(peer, len(answer)) == answer
            peer.shutdown(socket.SHUT_WR)
            assert await read_all(peer, 1) == b""
    assert most <= 300_000 + len(answer)


@both_kinds
@pytest.mark.parametrize("how", ["send", "flush"])
async def test_duplex_protocols_do_not_deadlock(kind: str, how: str) -> None:
    """A task that reads never waits for what another one sends."""
    data = pattern(16 * MIB)
    async with opened(kind) as (conn, peer):

        async def write() -> None:
            if how == "send":
                await conn.send(data)
            else:
                conn.writer.write(data)
                await conn.writer.flush()

        async with blocked(write) as outcome:
            for i in range(200):
                await arrive(conn, peer, b"message %3d\n" % i)
                assert await within(conn.reader.until(b"\n")) == b"message %3d\n" % i
            assert not outcome
            assert await read_all(peer, len(data)) == data
        assert outcome == [None]


async def test_a_reader_that_waits_for_output_times_out_as_a_reader() -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"x")
        conn.read_timeout = 0.02
        data = pattern(4 * MIB)
        conn.writer.write(data)
        with pytest.raises(ReadTimeout):
            await within(conn.reader.next(1))
        assert len(conn.reader) == 1
        conn.read_timeout = None
        async with blocked(lambda: conn.reader.next(1)) as outcome:
            assert await read_all(peer, len(data)) == data
        assert outcome == [b"x"]


# --- writing after the end -----------------------------------------------------------------------


async def test_half_close_is_not_close() -> None:
    """O1: the peer has ended its side, and gets its answer."""
    data = pattern(16 * MIB)
    async with opened("tcp") as (conn, peer):
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream):
            await within(conn.reader.next(1))
        assert conn.is_active
        conn.writer.write(data)
        async with blocked(conn.writer.flush) as outcome:
            assert await read_all(peer, len(data)) == data
        assert outcome == [None]

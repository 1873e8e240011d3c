"""LinkBuffer: what it promises, one promise a test; the properties are in a file of their own."""

from __future__ import annotations

import gc
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from anyio import ClosedResourceError, DelimiterNotFound, WouldBlock
from peers import KIB, pattern

from anypoll.nocopy import LinkBuffer, as_raw_io


def filled(*pieces: bytes, block_size: int = 4096) -> LinkBuffer:
    """A block for each piece."""
    buffer = LinkBuffer(block_size)
    for piece in pieces:
        buffer.write(piece)
        buffer.flush()
    return buffer


# --- writing and flushing ------------------------------------------------------------------------


def test_what_is_written_can_be_read_after_flush() -> None:
    buffer = LinkBuffer()
    assert buffer.write(b"abc") == 3
    assert len(buffer) == buffer.buffered == 0
    with pytest.raises(WouldBlock):
        buffer.next(1)
    buffer.flush()
    assert len(buffer) == buffer.buffered == 3
    assert buffer.next(3) == b"abc"
    buffer.flush()
    buffer.flush()
    assert len(buffer) == 0


def test_text_and_single_bytes() -> None:
    buffer = LinkBuffer()
    assert buffer.write_str("ä") == 2
    assert buffer.write_str("ä", "latin-1") == 1
    assert buffer.write_byte(255) == 1
    buffer.flush()
    for wrong in ("no such encoding", None, 5):
        with pytest.raises((ValueError, TypeError), match="encoding must be"):
            buffer.read_str(2, wrong)  # type: ignore[arg-type]
    assert buffer.read_str(2) == "ä"
    assert buffer.read_str(1, "latin-1") == "ä"
    assert buffer.read_byte() == 255


def test_large_bytes_are_not_copied() -> None:
    data = pattern(5000)
    buffer = LinkBuffer()
    buffer.write(b"small")
    buffer.write(data)
    buffer.write(b"small")
    buffer.flush()
    assert [bytes(part) for part in buffer.parts()] == [b"small", data, b"small"]
    assert buffer.parts()[1].obj is data


def test_small_writes_are_gathered_in_blocks() -> None:
    buffer = LinkBuffer(block_size=10)
    for _ in range(9):
        buffer.write(b"abcd")
    buffer.flush()
    assert [len(part) for part in buffer.parts()] == [8, 8, 8, 8, 4]
    assert buffer.to_bytes() == b"abcd" * 9


# --- reserving -----------------------------------------------------------------------------------


def test_a_reservation_is_filled_and_flushed() -> None:
    buffer = LinkBuffer()
    memory = buffer.malloc(4)
    assert memory == bytes(4)
    assert not memory.readonly
    memory[:] = b"abcd"
    assert buffer.malloc_len == 4
    assert len(buffer) == 0
    buffer.flush()
    assert buffer.malloc_len == 0
    assert buffer.to_bytes() == b"abcd"
    memory[:] = b"xxxx"
    assert buffer.to_bytes() == b"abcd"


def test_malloc_ack_keeps_the_first_bytes() -> None:
    buffer = LinkBuffer()
    buffer.malloc(4)[:] = b"abcd"
    buffer.malloc(4)[:] = b"efgh"
    with pytest.raises(ValueError, match="between 0 and 8"):
        buffer.malloc_ack(9)
    assert buffer.malloc_len == 8
    buffer.malloc_ack(6)
    assert buffer.malloc_len == 0
    buffer.write(b"!")
    buffer.flush()
    assert buffer.to_bytes() == b"abcdef!"


def test_write_direct_puts_pieces_into_a_reservation() -> None:
    """L27, netpoll's TestLinkBufferWriteDirect: five inserts into one malloc, one at its end."""
    buffer = LinkBuffer()
    memory = buffer.malloc(32)
    memory[:] = bytes(range(32))
    for remain in (30, 20, 13, 5, 0):
        assert buffer.write_direct(b"[%d]" % remain, remain) == len(b"[%d]" % remain)
    expected = bytearray()
    for i in range(32):
        if 32 - i in (30, 20, 13, 5):
            expected += b"[%d]" % (32 - i)
        expected.append(i)
    expected += b"[0]"
    assert buffer.malloc_len == len(expected)
    buffer.flush()
    assert buffer.to_bytes() == expected


def test_malloc_ack_after_write_direct_keeps_its_bytes() -> None:
    """L27."""
    buffer = LinkBuffer()
    buffer.malloc(4)[:] = b"abcd"
    buffer.write_direct(b"1234", 2)
    buffer.malloc_ack(5)
    buffer.flush()
    assert buffer.to_bytes() == b"ab123"


def test_write_direct_without_a_reservation() -> None:
    buffer = LinkBuffer()
    buffer.write(b"a")
    assert buffer.write_direct(b"b", 0) == 1
    assert buffer.malloc_len == 1
    with pytest.raises(ValueError, match="remain must be between 0 and 1"):
        buffer.write_direct(b"c", 2)
    buffer.flush()
    assert buffer.to_bytes() == b"ab"


def test_write_direct_does_not_copy() -> None:
    data = b"x" * 100
    buffer = LinkBuffer()
    buffer.malloc(2)
    buffer.write_direct(data, 1)
    buffer.flush()
    assert buffer.parts()[1].obj is data


# --- reading -------------------------------------------------------------------------------------


def test_views_are_read_only_and_exact() -> None:
    """L38."""
    buffer = filled(b"abc", b"def")
    for view in (buffer.peek(2), buffer.next(4), *buffer.next_parts(1)):
        assert view.readonly
        assert view.ndim == 1
    assert buffer.read_bytes(1) == b"f"


def test_a_request_across_blocks_is_merged_once() -> None:
    """L37: peeking again and again must not copy again and again."""
    buffer = filled(b"ab", b"cd", b"ef")
    first = buffer.peek(3)
    assert first == b"abc"
    assert buffer.peek(3).obj is first.obj
    assert buffer.peek(2).obj is first.obj
    assert buffer.parts()[-1] == b"ef"
    assert buffer.to_bytes() == b"abcdef"


def test_peeks_across_blocks_take_constant_memory() -> None:
    """L37, netpoll's TestLinkBufferPeekOutOfMemory."""
    buffer = filled(*[pattern(100, i) for i in range(50)])
    data = buffer.to_bytes()
    for i in range(1000):
        n = 4000 + i % 1000
        assert buffer.peek(n) == data[:n]
    held = {id(part.obj): len(part.obj) for part in buffer.parts()}  # type: ignore[arg-type]
    assert sum(held.values()) <= 2 * len(data)


def test_until() -> None:
    buffer = filled(b"one\r", b"\ntwo", b"\r\nthree")
    assert buffer.until(b"\r\n") == b"one\r\n"
    assert buffer.until(b"\r\n") == b"two\r\n"
    with pytest.raises(WouldBlock):
        buffer.until(b"\r\n")
    assert len(buffer) == 5
    with pytest.raises(DelimiterNotFound):
        buffer.until(b"\r\n", max_bytes=5)
    buffer.write(b"\r\n")
    buffer.flush()
    with pytest.raises(DelimiterNotFound):
        buffer.until(b"\r\n", max_bytes=6)
    assert buffer.until(b"\r\n", max_bytes=7) == b"three\r\n"


def test_until_does_not_look_twice_at_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = LinkBuffer()
    begins: list[int] = []
    chain: Any = buffer._chain
    search = type(chain)._search

    def watched(self: Any, delimiter: bytes, begin: int, limit: int) -> int:
        begins.append(begin)
        found: int = search(self, delimiter, begin, limit)
        return found

    monkeypatch.setattr(type(chain), "_search", watched)
    for _ in range(5):
        buffer.write(b"x" * 10)
        buffer.flush()
        with pytest.raises(WouldBlock):
            buffer.until(b"\r\n")
    assert begins == [0, 9, 19, 29, 39]


def test_readinto() -> None:
    buffer, into = filled(b"ab", b"cd"), bytearray(3)
    assert buffer.readinto(into) == 3
    assert into == b"abc"
    assert buffer.readinto(into) == 1
    assert into == b"dbc"
    assert buffer.readinto(bytearray()) == 0
    with pytest.raises(WouldBlock):
        buffer.readinto(into)
    with pytest.raises(TypeError, match="writable"):
        buffer.readinto(b"abc")


@pytest.mark.parametrize(
    ("nowait", "plain", "argument"),
    [
        ("peek_nowait", "peek", 2),
        ("next_nowait", "next", 2),
        ("skip_nowait", "skip", 2),
        ("until_nowait", "until", b"b"),
    ],
)
def test_the_nowait_calls_are_the_same(nowait: str, plain: str, argument: Any) -> None:
    one, two = filled(b"abc"), filled(b"abc")
    assert getattr(one, nowait)(argument) == getattr(two, plain)(argument)
    assert one.to_bytes() == two.to_bytes()


# --- sharing -------------------------------------------------------------------------------------


def test_a_slice_shares_the_blocks() -> None:
    data = pattern(8 * KIB)
    buffer = LinkBuffer()
    buffer.write(data)
    buffer.flush()
    buffer.skip(100)
    piece = buffer.slice(1000)
    assert piece.to_bytes() == data[100:1100]
    assert piece.parts()[0].obj is data
    assert buffer.to_bytes() == data[1100:]
    piece.write(b"more")
    piece.flush()
    assert piece.read_bytes(1004) == data[100:1100] + b"more"


def test_slices_of_slices_outlive_what_they_came_from() -> None:
    buffer = filled(pattern(5000), pattern(5000, 1))
    outer = buffer.slice(9000)
    inner = outer.slice(6000)
    buffer.close()
    outer.close()
    assert inner.to_bytes() == pattern(5000) + pattern(5000, 1)[:1000]


def test_a_block_goes_with_its_last_view() -> None:
    """L15: nothing else keeps the user's memory."""
    data = pattern(5000)
    baseline = sys.getrefcount(data)
    buffer = LinkBuffer()
    buffer.write(data)
    buffer.flush()
    view = buffer.next(10)
    piece = buffer.slice(100)
    buffer.skip(5000 - 110)
    assert sys.getrefcount(data) > baseline
    del view
    piece.close()
    gc.collect()
    assert sys.getrefcount(data) == baseline


def test_append_moves_everything() -> None:
    """netpoll's TestLinkBufferWriteBuffer: the order is kept."""
    data = pattern(5000)
    one, two = filled(b"1"), filled(b"2", data)
    two.write(b"not flushed")
    two.malloc(2)[:] = b"ok"
    two.skip(1)
    one.write(b"between")
    assert one.append(two) == 5000 + 11 + 2
    assert len(two) == 0
    assert two.malloc_len == 0
    assert len(one) == 1
    one.write(b"end")
    one.flush()
    assert one.to_bytes() == b"1between" + data + b"not flushedok" + b"end"
    assert any(part.obj is data for part in one.parts())
    two.write(b"usable again")
    two.flush()
    assert two.to_bytes() == b"usable again"


# --- nonsense, and the end -----------------------------------------------------------------------

CALLS: list[Callable[[LinkBuffer], object]] = [
    lambda b: b.peek(1),
    lambda b: b.next(1),
    lambda b: b.skip(1),
    lambda b: b.until(b"x"),
    lambda b: b.next_parts(1),
    lambda b: b.slice(1),
    lambda b: b.read_bytes(1),
    lambda b: b.read_str(1),
    lambda b: b.read_byte(),
    lambda b: b.readinto(bytearray(1)),
    lambda b: b.release(),
    lambda b: b.parts(),
    lambda b: b.to_bytes(),
    lambda b: b.write(b"x"),
    lambda b: b.write_str("x"),
    lambda b: b.write_byte(1),
    lambda b: b.malloc(1),
    lambda b: b.malloc_ack(0),
    lambda b: b.write_direct(b"x", 0),
    lambda b: b.append(LinkBuffer()),
    lambda b: b.flush(),
]


def test_every_call_after_close() -> None:
    buffer = filled(b"xyz")
    view = buffer.peek(3)
    buffer.close()
    buffer.close()
    for call in CALLS:
        with pytest.raises(ClosedResourceError):
            call(buffer)
    assert len(buffer) == 0
    assert view == b"xyz"


COUNTED = ("peek", "next", "skip", "next_parts", "slice", "read_bytes")


@pytest.mark.parametrize("method", [*COUNTED, "malloc", "malloc_ack"])
def test_nonsense_counts(method: str) -> None:
    """L05, O11."""
    buffer = filled(b"abc")
    buffer.malloc(1)
    for n in (-1, -(2**70), 1.5, "1", None):
        with pytest.raises(ValueError if isinstance(n, int) else TypeError, match="n must be"):
            getattr(buffer, method)(n)
    for n in (4, 2**40, 2**70) if method in COUNTED else ():
        with pytest.raises(WouldBlock):
            getattr(buffer, method)(n)
    assert (buffer.to_bytes(), buffer.malloc_len) == (b"abc", 1)


def test_nonsense_to_write() -> None:
    buffer = filled(b"x")
    buffer.malloc(1)
    closed = LinkBuffer()
    closed.close()
    every_other = memoryview(b"abcdef")[::2]
    for call, wrongs, error, text in (
        (buffer.write, (5, "text", None, [1, 2]), TypeError, None),
        (lambda d: buffer.write_direct(d, 0), (5, "text", None, [1, 2]), TypeError, None),
        (lambda d: buffer.write_direct(d, 0), (every_other,), ValueError, "side by side"),
        (buffer.write_byte, (-1, 256), ValueError, "value must be"),
        (buffer.write_byte, (1.0, "a", None), TypeError, "value must be"),
        (buffer.write_str, (b"bytes",), TypeError, "a str is required"),
        (lambda text: buffer.write_str(text, "ascii"), ("ä",), UnicodeEncodeError, None),
        (buffer.append, (b"x", None, [b"x"]), TypeError, "a LinkBuffer is required"),
        (buffer.append, (buffer,), ValueError, "to itself"),
        (buffer.append, (closed,), ClosedResourceError, None),
        (LinkBuffer, (0, -1, 2**40), ValueError, "block_size must be"),
        (LinkBuffer, ("4096", None, 1.0), TypeError, "block_size must be"),
    ):
        for wrong in wrongs:
            with pytest.raises(error, match=text):
                call(wrong)  # type: ignore[operator]
            assert (buffer.to_bytes(), buffer.malloc_len) == (b"x", 1)
    assert buffer.write(every_other) == 3
    buffer.flush()
    assert buffer.to_bytes() == b"x\0ace"


def test_nonsense_delimiters() -> None:
    buffer = filled(b"abc")
    for wrong, most, error, text in (
        (b"", 9, ValueError, "must not be empty"),
        ("a", 9, TypeError, "must be bytes"),
        (b"a", -1, ValueError, "max_bytes must be"),
    ):
        with pytest.raises(error, match=text):
            buffer.until(wrong, max_bytes=most)  # type: ignore[arg-type]
    assert buffer.until(bytearray(b"c")) == b"abc"


def test_nothing_is_asked_for() -> None:
    """L05: zero is no error."""
    buffer = LinkBuffer()
    assert buffer.peek(0) == buffer.next(0) == buffer.read_bytes(0) == b""
    assert buffer.next_parts(0) == []
    assert buffer.read_str(0) == ""
    assert len(buffer.slice(0)) == 0
    buffer.skip(0)
    assert buffer.malloc(0) == b""
    assert buffer.write(b"") == buffer.write_direct(b"", 0) == 0
    buffer.malloc_ack(0)
    buffer.flush()
    assert (len(buffer), buffer.parts()) == (0, [])


# --- two threads ---------------------------------------------------------------------------------


def test_a_reader_and_a_writer_in_two_threads() -> None:
    """The stream is byte-exact, whatever the interleaving."""
    total = 300_000
    data = pattern(total)
    buffer = LinkBuffer(64)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            at, n = 0, 1
            while at < total:
                buffer.write(data[at : at + n])
                buffer.flush()
                at, n = at + n, n % 997 + 7
                assert len(buffer) >= 0
        except BaseException as exc:  # noqa: BLE001 -- for the main thread
            failures.append(exc)

    got = bytearray()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        n = 1
        while len(got) < total and not failures:
            n = min(n % 613 + 1, max(len(buffer), 1))
            try:
                view = buffer.peek(n)
                assert buffer.parts()[0][:1] == view[:1]
                got += buffer.next(n)
            except WouldBlock:
                continue
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert failures == []
    assert got == data


# --- as a file -----------------------------------------------------------------------------------


def test_as_raw_io() -> None:
    buffer = filled(b"line 1\nli", b"ne 2\n")
    file = as_raw_io(buffer)
    assert isinstance(file, io.RawIOBase)
    assert file.readable()
    assert file.writable()
    assert not file.seekable()
    assert file.readline() == b"line 1\n"
    assert file.write(b"line 3\n") == 7
    assert file.read(7) == b"line 2\n"
    assert file.read() == b"line 3\n"
    assert file.read(1) == b""
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")
    buffer.write(b"still open")
    buffer.flush()
    assert buffer.to_bytes() == b"still open"
    with pytest.raises(TypeError, match="a LinkBuffer is required"):
        as_raw_io(b"")  # type: ignore[arg-type]

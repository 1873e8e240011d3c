"""LinkBuffers against a model of plain bytes: any sequence of calls on several of them, with blocks
so small that everything lies across some. No byte is lost, repeated or moved, and no view changes.
"""

from __future__ import annotations

from typing import Any

import pytest
from anyio import DelimiterNotFound, WouldBlock
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from anypoll.nocopy import LinkBuffer

SIZES = st.one_of(st.integers(0, 12), st.integers(0, 300), st.sampled_from([4095, 4096, 4097]))
DELIMITERS = st.sampled_from([b"a", b"ab", b"aab", b"abab", b"bbbbb", b"a" * 20])
TWO_LETTERS = st.text("ab", max_size=40).map(str.encode)


class Model:
    """What a LinkBuffer must hold: readable, written, and reserved bytes."""

    def __init__(self, block_size: int) -> None:
        self.buffer = LinkBuffer(block_size)
        self.readable = bytearray()
        self.written = bytearray()
        self.reserved = bytearray()

    def seal(self) -> None:
        self.written += self.reserved
        self.reserved = bytearray()

    def taken(self, n: int) -> bytes:
        data = bytes(self.readable[:n])
        del self.readable[:n]
        return data


class LinkBuffers(RuleBasedStateMachine):
    """L22, L27, L38."""

    buffers = Bundle("buffers")

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Model] = []
        self.views: list[tuple[memoryview, bytes]] = []

    def expect(self, view: memoryview, data: bytes) -> None:
        assert view.readonly
        assert view == data
        self.views.append((view, data))

    @rule(target=buffers, block_size=st.integers(8, 64))
    def new(self, block_size: int) -> Model:
        self.models.append(Model(block_size))
        return self.models[-1]

    # --- writing -----------------------------------------------------------------------------

    @rule(model=buffers, data=st.one_of(TWO_LETTERS, SIZES.map(bytes)), mutable=st.booleans())
    def write(self, model: Model, data: bytes, mutable: bool) -> None:
        given: Any = bytearray(data) if mutable else data
        assert model.buffer.write(given) == len(data)
        if mutable:
            given[:] = b"x" * len(data)
        model.seal()
        model.written += data

    @rule(model=buffers, data=TWO_LETTERS)
    def malloc(self, model: Model, data: bytes) -> None:
        memory = model.buffer.malloc(len(data))
        assert memory == bytes(len(data))
        memory[:] = data
        model.reserved += data

    @rule(model=buffers, part=st.floats(0, 1))
    def malloc_ack(self, model: Model, part: float) -> None:
        keep = int(part * len(model.reserved))
        model.buffer.malloc_ack(keep)
        del model.reserved[keep:]
        model.seal()

    @rule(model=buffers, data=TWO_LETTERS, part=st.floats(0, 1))
    def write_direct(self, model: Model, data: bytes, part: float) -> None:
        remain = int(part * len(model.reserved))
        assert model.buffer.write_direct(data, remain) == len(data)
        at = len(model.reserved) - remain
        model.reserved[at:at] = data

    @rule(model=buffers, other=buffers)
    def append(self, model: Model, other: Model) -> None:
        if model is other:
            with pytest.raises(ValueError, match="to itself"):
                model.buffer.append(other.buffer)
            return
        other.seal()
        data = other.taken(len(other.readable)) + bytes(other.written)
        other.written.clear()
        assert model.buffer.append(other.buffer) == len(data)
        model.seal()
        model.written += data

    @rule(model=buffers)
    def flush(self, model: Model) -> None:
        model.buffer.flush()
        model.seal()
        model.readable += model.written
        model.written.clear()

    # --- reading -----------------------------------------------------------------------------

    @rule(
        model=buffers,
        method=st.sampled_from(["peek", "next", "skip", "next_parts", "read_bytes"]),
        n=SIZES,
    )
    def read(self, model: Model, method: str, n: int) -> None:
        call = getattr(model.buffer, method)
        if n > len(model.readable):
            with pytest.raises(WouldBlock):
                call(n)
            return
        data = bytes(model.readable[:n]) if method == "peek" else model.taken(n)
        result = call(n)
        if method in ("peek", "next"):
            self.expect(result, data)
        elif method == "next_parts":
            assert b"".join(result) == data
            assert all(len(part) for part in result)
            for part in result:
                self.expect(part, bytes(part))
        else:
            assert result == (None if method == "skip" else data)

    @rule(target=buffers, model=buffers, part=st.floats(0, 1))
    def slice(self, model: Model, part: float) -> Any:
        if len(self.models) > 20:
            return multiple()
        n = int(part * len(model.readable))
        piece = Model(16)
        piece.buffer = model.buffer.slice(n)
        piece.readable += model.taken(n)
        self.models.append(piece)
        return piece

    @rule(model=buffers, delimiter=DELIMITERS, most=st.one_of(st.just(65536), SIZES))
    def until(self, model: Model, delimiter: bytes, most: int) -> None:
        at = bytes(model.readable[:most]).find(delimiter)
        if at >= 0:
            data = model.taken(at + len(delimiter))
            self.expect(model.buffer.until(delimiter, max_bytes=most), data)
            return
        with pytest.raises(DelimiterNotFound if len(model.readable) >= most else WouldBlock):
            model.buffer.until(delimiter, max_bytes=most)

    @rule(model=buffers, n=SIZES)
    def readinto(self, model: Model, n: int) -> None:
        into = bytearray(n)
        if n and not model.readable:
            with pytest.raises(WouldBlock):
                model.buffer.readinto(into)
            return
        got = model.buffer.readinto(into)
        assert got == min(n, len(model.readable))
        assert into[:got] == model.taken(got)

    @rule(model=buffers)
    def look(self, model: Model) -> None:
        parts = model.buffer.parts()
        assert b"".join(parts) == model.readable == model.buffer.to_bytes()
        for part in parts:
            self.expect(part, bytes(part))

    # --- always ------------------------------------------------------------------------------

    @invariant()
    def sizes_are_right(self) -> None:
        for model in self.models:
            assert len(model.buffer) == len(model.readable)
            assert model.buffer.malloc_len == len(model.reserved)

    def teardown(self) -> None:
        for model in self.models:
            self.flush(model)
            assert model.buffer.to_bytes() == model.readable
            model.buffer.close()
        for view, data in self.views:
            assert view == data


LinkBuffers.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestLinkBuffers = LinkBuffers.TestCase

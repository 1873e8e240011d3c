"""A game in which the users of connections get in each other's way, at random.

Some players are the handlers of a server, which the hub resumes directly; the others are tasks
that it wakes. Each reads its own line to the end, and meanwhile awaits other things, reads and
writes other players' lines, cancels what they wait for, in all the ways there are, and closes those
that may be closed. All have input at about the same time, so that one batch of tokens wakes many.

A byte that a peer has sent is either read once, by whomever, or still unread. What is written
arrives whole, or not at all. Views stay what they were.

`native/test_races.py` plays short games, and `make soak ARGS="--only races"` as many as there is
time for. All decisions come from the seed, but who comes when is up to the machine.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import sniffio
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    WouldBlock,
)
from anyio.abc import SocketAttribute
from peers import pattern, reset, send_all, socket_pair
from serving import connected

import anypoll
from anypoll import Connection, ReadTimeout, WriteTimeout
from anypoll._connection.stream import open_socket

_HEADER = struct.Struct("!II")
#: What may come of any call, and has changed nothing.
_IN_VAIN = (BusyResourceError, ReadTimeout, WriteTimeout, DelimiterNotFound, WouldBlock)
_ON_A_DEAD_SOCKET = (BrokenPipeError, ConnectionResetError)


class Line:
    """A connection, its peer, and what is known of both."""

    conn: Connection

    def __init__(self, dice: random.Random, peer: socket.socket) -> None:
        self.dice = dice
        self.peer = peer
        self.most = dice.choice([8, 8, 3000, 100_000])
        """bytes that are read in one call"""
        self.data = pattern(min(self.most * 200, 5_000_000), dice.randrange(1 << 32))
        self.position = 0
        """in the data: what has been read"""
        self.resets = dice.random() < 0.1
        """the peer does, at some time"""
        self.may_be_closed = dice.random() < 0.25
        self.closed = False
        """or about to be"""
        self.over = False
        """all is read, or nothing more will be"""
        self.users = 0
        """calls by others"""
        self.scope = anyio.CancelScope()
        self.event = anyio.Event()
        self.task: asyncio.Task[Any] | None = None
        """while it may be cancelled natively"""
        self.cancels = 0
        self.views: list[tuple[memoryview, bytes]] = []
        self.frames = 0
        self.sent: set[int] = set()
        """frames that must arrive"""
        self.output = bytearray()
        self.listening = anyio.CancelScope()
        self.deaf = anyio.Event()

    # --- reading ---------------------------------------------------------------------------------

    def take(self, data: bytes | bytearray | memoryview) -> None:
        """What a call has returned is what comes next."""
        after = self.position + len(data)
        expected = self.data[self.position : after]
        if data != expected:
            raise AssertionError(f"{bytes(data[:20])!r} at {self.position}, not {expected[:20]!r}")
        self.position = after
        if isinstance(data, memoryview) and self.dice.random() < 0.05:
            self.views.append((data, expected))

    async def read(self, dice: random.Random) -> None:
        """In one of the ways. Others may do so, too; from what a call has taken until it is noted
        here nobody else runs.
        """
        conn, n = self.conn, dice.randint(1, self.most)
        match dice.randrange(9):
            case 0:
                self.take(await conn.receive(dice.choice([n, 65536])))
            case 1:
                await conn.peek(n)
                self.take(conn.reader.next_nowait(n))
            case 2:
                await conn.skip(n)
                self.position += n
            case 3:
                self.take(await conn.reader.read_bytes(n))
            case 4:
                self.take(b"".join(await conn.reader.next_parts(n)))
            case 5:
                room = bytearray(n)
                size = await conn.reader.readinto(room)
                if size == 0:
                    raise EndOfStream
                self.take(room[:size])
            case 6:
                delimiter = bytes([dice.randrange(256)])
                self.take(await conn.until(delimiter, max_bytes=self.most))
            case 7:
                conn.read_timeout = 0.0005
                try:
                    self.take(await conn.next(n))
                finally:
                    conn.read_timeout = None
            case _:
                self.take(await conn.next(n))

    @contextmanager
    def used(self) -> Iterator[None]:
        """By another player: its owner waits for that."""
        self.users += 1
        try:
            with self.excused():
                yield
        finally:
            self.users -= 1

    def _end(self) -> None:
        self.over = True
        if not self.resets and self.position != len(self.data):
            raise AssertionError(f"the end at {self.position} of {len(self.data)}")

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Only for what must have happened."""
        try:
            yield
        except _IN_VAIN:
            pass
        except IncompleteRead:
            with suppress(BusyResourceError):
                self.take(self.conn.reader.next_nowait(len(self.conn.reader)))
        except EndOfStream:
            self._end()
        except ClosedResourceError:
            assert self.closed
            self.over = True
        except BrokenResourceError:
            assert self.resets
            self.over = True

    # --- writing ---------------------------------------------------------------------------------

    def _frame(self, dice: random.Random) -> tuple[int, bytes]:
        self.frames += 1
        size = dice.choice([5, 50, 500] * 10 + [300_000])
        return self.frames, _HEADER.pack(self.frames, size) + pattern(size, self.frames)

    async def write(self, dice: random.Random) -> None:
        number, frame = self._frame(dice)
        conn, how = self.conn, dice.randrange(4)
        if dice.random() < 0.2:
            conn.write_timeout = dice.choice([None, 0.0005])
        if how == 0:
            await conn.send(frame)
        else:
            conn.writer.write(frame)
        self.sent.add(number)
        if how == 1:
            await conn.writer.flush()

    def check_output(self) -> None:
        """If the connection was closed or reset, only that there is nothing in between."""
        seen, rest = [], memoryview(self.output)
        while len(rest) >= _HEADER.size:
            number, size = _HEADER.unpack_from(rest)
            whole = rest[_HEADER.size : _HEADER.size + size]
            assert whole == pattern(size, number)[: len(whole)], f"frame {number} is another"
            seen.append(number)
            rest = rest[_HEADER.size + len(whole) :]
            if len(whole) < size:
                assert self.closed or self.resets, f"frame {number} is torn"
        assert len(seen) == len(set(seen)), "a frame came twice"
        if not (self.closed or self.resets):
            assert not rest
            assert self.sent <= set(seen), f"frames are missing: {self.sent - set(seen)}"

    # --- the peer --------------------------------------------------------------------------------

    async def feed(self) -> None:
        dice = random.Random(self.dice.random())
        data, position = self.data, 0
        end = dice.randrange(len(data)) if self.resets else len(data)
        with suppress(*_ON_A_DEAD_SOCKET):  # somebody has closed it
            while position < end:
                step = dice.randint(1, 4 * self.most)
                await send_all(self.peer, data[position : min(position + step, end)])
                position += step
                await anyio.sleep(dice.choice([0, 0, 0.0003]))
        if self.resets:
            self.listening.cancel()
            await self.deaf.wait()
            reset(self.peer)
        else:
            with suppress(OSError):
                self.peer.shutdown(socket.SHUT_WR)

    async def listen(self) -> None:
        """Not always at once: then its sender has to wait."""
        dice = random.Random(self.dice.random())
        with self.listening, suppress(*_ON_A_DEAD_SOCKET):
            while True:
                await anyio.wait_readable(self.peer)
                if dice.random() < 0.1:
                    await anyio.sleep(0.001)
                piece = self.peer.recv(200_000)
                if not piece:
                    break
                self.output += piece
        self.deaf.set()


class Game:
    """All players of one event loop. ``told`` counts what has happened."""

    def __init__(self, seed: object, players: int = 6) -> None:
        self.dice = random.Random(f"{seed}")
        self.players = players
        self.lines: list[Line] = []
        self.ports: dict[int, Line] = {}
        self.told: Counter[str] = Counter()
        self.natively = sniffio.current_async_library() == "asyncio"

    # --- what a player does -----------------------------------------------------------------------

    def others(self, me: Line) -> list[Line]:
        return [line for line in self.lines if line is not me and not line.over]

    async def pause(self, me: Line, dice: random.Random) -> None:
        """Waits for something else than its own connection."""
        match dice.randrange(5):
            case 0:
                await anyio.sleep(0)
            case 1:
                await anyio.lowlevel.checkpoint()
            case 2:
                with anyio.move_on_after(0.002):
                    await me.event.wait()
                me.event = anyio.Event()
            case 3:
                await anyio.sleep(0.0003)
            case _:
                if dice.random() < 0.1:
                    await anyio.to_thread.run_sync(int)

    async def at_once(self, me: Line, dice: random.Random) -> None:
        """Two tasks of one player, of which the other may close the connection."""

        async def other() -> None:
            await self.pause(me, dice)
            if me.may_be_closed and dice.random() < 0.1:
                self.close(me)
            with me.excused():
                await me.read(dice)

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            with me.excused():
                await (me.read(dice) if dice.random() < 0.7 else me.write(dice))

    async def act(self, me: Line, dice: random.Random, *, simply: bool = False) -> None:
        others = self.others(me)
        how = dice.randrange(12)
        if how < 2:
            await self.pause(me, dice)
        elif how == 2 and others:
            line = dice.choice(others)
            with line.used():
                await (line.read(dice) if dice.random() < 0.5 else line.write(dice))
        elif how == 3 and not simply:
            await self.at_once(me, dice)
        elif how == 4 and not simply:
            with anyio.CancelScope(shield=True), me.excused():
                await me.read(dice)
        elif how < 8:
            with me.excused():
                await me.write(dice)
        with me.excused():
            await me.read(dice)

    def disturb(self, me: Line, dice: random.Random) -> None:
        """Another player, or none; without waiting."""
        others = self.others(me)
        if not others:
            return
        line = dice.choice(others)
        match dice.randrange(8):
            case 0 | 1:
                line.scope.cancel()
            case 2 if line.task is not None:
                line.cancels += 1
                line.task.cancel()
            case 3:
                line.event.set()
            case 4 if line.may_be_closed and dice.random() < 0.1:
                self.close(line)
            case 5:
                with line.excused():
                    line.take(line.conn.reader.next_nowait(1))
            case 6:
                line.conn.reader.release()
            case 7:
                line.conn.statistics()

    def close(self, line: Line) -> None:
        line.closed = True
        line.conn.abort()
        self.told["closed"] += 1

    async def turn(self, me: Line, dice: random.Random) -> None:
        """One that may be cancelled, by others or by a deadline."""
        soon = dice.choice([0, 0.0005, 60, 60])
        if self.natively and dice.random() < 0.3:
            await self.turn_with_native_cancellation(me, dice, soon)
            return
        with anyio.move_on_after(soon) as me.scope:
            await self.act(me, dice)
        self.told["cancelled"] += me.scope.cancelled_caught

    async def turn_with_native_cancellation(
        self, me: Line, dice: random.Random, soon: float
    ) -> None:
        me.task = task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(soon):
                await self.act(me, dice, simply=True)
        except TimeoutError:
            self.told["cancelled natively"] += 1
        except asyncio.CancelledError:
            if not me.cancels:
                raise
            self.told["cancelled natively"] += 1
        me.task = None
        if me.cancels:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)  # one that has come too late
        for _ in range(me.cancels):
            task.uncancel()
        me.cancels = 0

    async def play(self, me: Line) -> None:
        dice = random.Random(me.dice.random())
        while not me.over:
            await self.turn(me, dice)
            self.disturb(me, dice)
        for view, expected in me.views:
            assert view == expected
        me.views.clear()
        while me.users:
            await anyio.sleep(0)
        me.conn.write_timeout = None
        with me.excused():
            await me.conn.send(b"")  # aclose() does not wait for the rest of one that was given up

    # --- the game ---------------------------------------------------------------------------------

    async def handle(self, conn: Connection) -> None:
        line = self.ports[conn.extra(SocketAttribute.remote_port)]
        line.conn = conn
        await self.started()
        await self.play(line)

    async def work(self, line: Line) -> None:
        async with line.conn:
            await self.started()
            await self.play(line)

    async def started(self) -> None:
        """All know all others."""
        while not all(hasattr(line, "conn") for line in self.lines):
            await anyio.sleep(0.001)

    def _open(self, number: int, server: anypoll.Server) -> Line:
        dice = random.Random(self.dice.random())
        if number % 2:
            ours, peer = socket_pair(dice.choice(["tcp", "unix"]))
            ours.setblocking(False)
            peer.setblocking(False)
            line = Line(dice, peer)
            line.conn = open_socket(ours)
        else:
            line = Line(dice, connected(server))
            self.ports[line.peer.getsockname()[1]] = line
        self.lines.append(line)
        return line

    async def run(self) -> None:
        """To the end. What went wrong is an AssertionError, or whatever else should not be."""
        serve: Any = anypoll.serve(self.handle, host="127.0.0.1", port=0)
        with ExitStack() as stack:
            async with serve as server, anyio.create_task_group() as group:
                for number in range(self.players):
                    line = self._open(number, server)
                    stack.callback(line.peer.close)
                    if number % 2:
                        group.start_soon(self.work, line)
                with anyio.fail_after(60):
                    await self.started()
                for line in self.lines:
                    group.start_soon(line.listen)
                    group.start_soon(line.feed)
        for line in self.lines:
            line.check_output()
        statistics = server.statistics()
        assert not statistics.active
        assert not statistics.handler_errors

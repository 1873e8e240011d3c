"""Readers that cancel and close one another, at random: not a byte is lost or seen twice.

Half of them are handlers, which the hub resumes directly; the others are tasks that it wakes. All
have input at about the same time, so that one batch of tokens wakes many.
"""

from __future__ import annotations

import random
import socket
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio import ClosedResourceError
from peers import holds, opened, pattern, send_all
from serving import connected

import anypoll
from anypoll import Connection

pytestmark = pytest.mark.anyio

READERS = 6  # of each kind
SIZE = 3000
LONG = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40)]


class Game:
    """Who plays, and what each has read."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.data = pattern(SIZE, seed)
        self.conns: list[Connection] = []
        self.scopes: dict[int, anyio.CancelScope] = {}
        self.got: list[bytes] = []
        self.closed: list[bytes] = []
        self.cancelled = 0

    async def read(self, conn: Connection, dice: random.Random, n: int) -> bytes:
        """Some bytes, in one of the ways; cancelled, it has read nothing."""
        how = dice.randrange(6)
        if how == 0:
            return await conn.receive(n)
        if how == 1:
            data = bytes(await conn.peek(n))
            await conn.skip(n)
            return data
        if how == 2:
            await anyio.lowlevel.checkpoint()
        elif how == 3 and dice.random() < 0.1:
            await anyio.to_thread.run_sync(int)
        elif how == 4:
            conn.read_timeout = 0.0005
            try:
                return bytes(await conn.next(n))
            except anypoll.ReadTimeout:
                return b""
            finally:
                conn.read_timeout = None
        return bytes(await conn.next(n))

    def disturb(self, me: int, dice: random.Random) -> None:
        """Cancels what somebody else waits for, or closes it, if it is one to be closed."""
        other = dice.choice(list(self.scopes))
        if other == me:
            return
        if other % 4 == 0 and dice.random() < 0.02:
            self.conns[other].abort()
        elif dice.random() < 0.5:
            self.scopes[other].cancel()

    async def play(self, conn: Connection) -> None:
        me = len(self.conns)
        self.conns.append(conn)
        dice = random.Random(self.seed * 1000 + me)
        got = bytearray()
        try:
            while len(got) < SIZE:
                n = min(dice.randrange(1, 9), SIZE - len(got))
                with anyio.move_on_after(dice.choice([0, 0.0005, 60, 60])) as scope:
                    self.scopes[me] = scope
                    got += await self.read(conn, dice, n)
                self.cancelled += scope.cancelled_caught
                self.disturb(me, dice)
        except ClosedResourceError:
            self.closed.append(bytes(got))
        else:
            self.got.append(bytes(got))
        del self.scopes[me]

    async def feed(self, sock: socket.socket, dice: random.Random) -> None:
        position = 0
        while position < SIZE:
            step = dice.randrange(1, 30)
            try:
                await send_all(sock, self.data[position : position + step])
            except (BrokenPipeError, ConnectionResetError):  # somebody has closed it
                return
            position += step
            await anyio.sleep(dice.choice([0, 0, 0.0003]))

    @property
    def over(self) -> bool:
        return len(self.got) + len(self.closed) == 2 * READERS


@pytest.mark.parametrize("seed", [0, 1, 2, *LONG])
async def test_readers_that_disturb_one_another(seed: int) -> None:
    game = Game(seed)
    async with AsyncExitStack() as stack:
        serve: Any = anypoll.serve(game.play, host="127.0.0.1", port=0)
        server = await stack.enter_async_context(serve)
        group = await stack.enter_async_context(anyio.create_task_group())
        socks = []
        for _ in range(READERS):
            sock = stack.enter_context(connected(server))
            sock.setblocking(False)
            conn, peer = await stack.enter_async_context(opened())
            group.start_soon(game.play, conn)
            socks += [sock, peer]
        await holds(lambda: len(game.conns) == 2 * READERS)
        for number, sock in enumerate(socks):
            group.start_soon(game.feed, sock, random.Random(seed * 7919 + number))
        await holds(lambda: game.over)
    assert all(got == game.data for got in game.got)
    assert all(game.data.startswith(got) for got in game.closed)
    assert game.cancelled > READERS

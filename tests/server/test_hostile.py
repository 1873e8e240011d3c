"""Slow and hostile peers: what they cost is bounded, the log stays empty, and the others are served
throughout.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import select
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import DelimiterNotFound, EndOfStream
from peers import KIB, MIB, holds, read_to_end, reset, send_all, within
from serving import MODES, all_is_accounted_for, client, connected, is_served, local  # noqa: F401

import anypoll
from anypoll import Connection, MessageTooLarge

pytestmark = pytest.mark.anyio


def in_use() -> int:
    """Bytes in blocks of all pollers."""
    return sum(poller.bytes_in_use for poller in anypoll.statistics().pollers)


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


async def echo_line(conn: Connection) -> None:
    await conn.send(await conn.until(b"\n"))


async def echo_lines(conn: Connection) -> None:
    with contextlib.suppress(EndOfStream):
        while True:
            await echo_line(conn)


LINES: dict[str, Any] = {"handler": echo_lines, "on_request": echo_line}
is_answered = functools.partial(is_served, data=b"good\n")


def beside(bad: Callable[[Connection], Any]) -> Callable[[Connection], Any]:
    """A handler that echoes the lines of those that begin with ``g``, and is ``bad`` to others."""

    async def handler(conn: Connection) -> None:
        await (echo_lines if bytes(await conn.peek(1)) == b"g" else bad)(conn)

    return handler


async def test_one_that_never_reads() -> None:
    """It asks for more and more, and takes nothing: its input stops, and so does its output."""
    question, answer = bytes(10), bytes(64 * KIB)

    async def bad(conn: Connection) -> None:
        conn.state = 0
        while True:
            await conn.skip(len(question))
            conn.writer.write(answer)
            conn.state += 1

    async with local(beside(bad), shutdown_timeout=0) as server, client(server) as good:
        await is_answered(good)
        with connected(server) as sock:
            asked = sock.send(question)
            stuck = 0
            answered = -1
            await holds(lambda: any(c.state is not None for c in server.connections))
            bad_conn = next(c for c in server.connections if c.state is not None)
            while stuck < 20:
                with contextlib.suppress(BlockingIOError):
                    asked += sock.send(question * 1000)
                await is_answered(good)
                statistics = bad_conn.statistics()
                assert statistics.buffered_output <= 256 * KIB + len(answer)
                assert statistics.buffered_input <= 512 * KIB
                stuck = stuck + 1 if answered == bad_conn.state else 0
                answered = bad_conn.state
            assert answered * len(question) < asked
            assert in_use() < 2 * MIB


async def test_a_byte_at_a_time() -> None:
    """Nobody is woken for what cannot be a whole line yet, and a line has its limit."""
    result: list[Any] = []

    async def bad(conn: Connection) -> None:
        try:
            await conn.until(b"\r\n", max_bytes=1000)
        except DelimiterNotFound:
            result.append(conn.statistics())

    async with local(beside(bad)) as server, client(server) as good, client(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = 0
        before = in_use()
        while not result:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await send_all(sock, b"x")
            sent += 1
            if sent % 50 == 0:
                await is_answered(good)
            await anyio.lowlevel.checkpoint()
        assert sent >= 1000
        assert result[0].wakeups < 10
        assert in_use() - before < 256 * KIB


@pytest.mark.parametrize(
    ("mode", "timeout"),
    [("handler", "idle_timeout"), ("handler", "read_timeout"), ("on_request", "idle_timeout")],
)
async def test_those_that_open_and_never_speak(mode: str, timeout: str) -> None:
    def prepare(conn: Connection) -> None:
        if conn.server is not None and len(conn.server.connections) == 1:
            setattr(conn, timeout, None)  # the good one, who comes first and may take its time

    options: dict[str, Any] = {mode: LINES[mode], timeout: 0.1, "on_prepare": prepare}
    async with local(**options) as server, client(server) as good:
        await is_answered(good)
        silent = [connected(server) for _ in range(50)]
        await holds(lambda: server.statistics().accepted == 51)
        await is_answered(good)
        for sock in silent:
            assert await within(read_to_end(sock)) == b""
            sock.close()
        await holds(lambda: len(server.connections) == 1)
        await is_answered(good)
        assert server.statistics().closed == {timeout: 50}
        assert server.statistics().handler_errors == 0


async def test_a_hostile_length() -> None:
    """What it promises costs nothing; only what comes does. Too much is refused at once."""
    sizes: list[int] = []
    errors: list[str] = []

    async def bad(conn: Connection) -> None:
        size = int.from_bytes(await conn.next(4), "big")
        sizes.append(size)
        try:
            await conn.next(size)
        except MessageTooLarge:
            errors.append("too large")
            raise

    async with local(beside(bad)) as server, client(server) as good:
        for size in (2**32 - 1, 64 * MIB + 1):
            async with client(server) as sock:
                await send_all(sock, size.to_bytes(4, "big"))
                assert await within(read_to_end(sock)) == b""
        assert errors == ["too large"] * 2
        before = in_use()
        promising = [connected(server) for _ in range(20)]
        for sock in promising:
            await send_all(sock, (60 * MIB).to_bytes(4, "big") + b"and no more")
        await holds(lambda: len(sizes) == 22)
        await anyio.wait_all_tasks_blocked()
        await is_answered(good)
        assert in_use() - before < 20 * 64 * KIB
        for sock in promising:
            sock.close()
        await holds(lambda: len(server.connections) == 1)
        assert server.statistics().closed == {"message_too_large": 2, "incomplete": 20}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_connects_and_resets_in_a_row(mode: str, count: int) -> None:
    """Some before they are accepted, others after they have spoken."""

    memory = 0
    options: dict[str, Any] = {mode: LINES[mode]}
    async with local(**options) as server, client(server) as good:
        for number in range(count):
            sock = connected(server)
            if number % 3:
                sock.send(b"half of a line")
            if number % 5 == 0:
                await anyio.lowlevel.checkpoint()
            reset(sock)
            if number % 100 == 0:
                await is_answered(good)
            if number == count // 2:
                memory = resident()
        await is_answered(good)

        def all_have_ended() -> bool:  # more may still come out of the backlog
            statistics = server.statistics()
            return sum(statistics.closed.values()) == statistics.accepted - 1

        await holds(all_have_ended)
        assert resident() - memory < 16 * MIB
        statistics = server.statistics()
        assert statistics.handler_errors == 0
        assert statistics.accepted <= count + 1
        assert statistics.active == 1


PEER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    sock.settimeout(60)
    print("connected", flush=True)
    assert sock.recv(1) == b""
    print("ended", flush=True)
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("mode", MODES)
async def test_an_idle_peer_of_a_process_that_computes(mode: str) -> None:
    """The pollers end it, and it sees that, while this process does not give up the interpreter
    for anything else: the event loop has its turn afterwards.
    """
    events: list[str] = []

    async def work(conn: Connection) -> None:
        with contextlib.suppress(anypoll.IdleTimeout):
            await conn.next(1)

    def told(line: bytes, peer: subprocess.Popen[bytes]) -> bool:
        assert peer.stdout is not None

        if not select.select([peer.stdout], [], [], 0)[0]:
            return False
        assert os.read(peer.stdout.fileno(), 100) == line
        return True

    options: dict[str, Any] = {mode: work}
    async with local(**options) as server:
        command = [sys.executable, "-c", textwrap.dedent(PEER), str(server.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:
            await holds(lambda: told(b"connected\n", peer))
            await holds(lambda: server.connections)
            [conn] = server.connections
            conn.add_close_callback(lambda: events.append("the event loop knows"))
            conn.idle_timeout = 0.01
            digest, rounds = 0, 0
            while rounds % 1000 or not told(b"ended\n", peer):  # a long computation
                digest = hash((digest, rounds))
                rounds += 1
                assert rounds < 2_000_000_000
            events.append("the peer knows")
            await holds(lambda: len(events) == 2)
            del conn
    assert events == ["the peer knows", "the event loop knows"]

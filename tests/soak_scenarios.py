"""The soak test's scenarios: one function per kind of client, well-behaved or hostile.

A scenario is `async def name(soak, rng)`, registered with its weight. All its decisions come from
`rng`, and what it raises is a failure. It talks to the server behind `soak.port`, whose handler is
`handler` and whose idle timeout `soak.idle`, or opens its own.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import ssl
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import anyio
import certificates
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    IncompleteRead,
    wait_readable,
    wait_writable,
)
from peers import KIB, MIB, read_to_end, reset, send_all
from races import Game

import anypoll
from anypoll.mux import ShardQueue

HOST = "127.0.0.1"
LIMIT = MIB
LINE_MOST = 64 * KIB
#: How a connection may end for who uses it while somebody else ends it.
ENDS = (EndOfStream, IncompleteRead, BrokenResourceError, ClosedResourceError)

Client: TypeAlias = "anypoll.Connection | anypoll.TLSConnection"

_FRAME = struct.Struct("!cI")


class Soak(Protocol):
    """What a scenario may know."""

    port: int
    idle: float
    backend: str
    options: dict[str, object]


Scenario = Callable[[Soak, random.Random], Awaitable[None]]
SCENARIOS: dict[str, tuple[Scenario, int]] = {}


def scenario(weight: int) -> Callable[[Scenario], Scenario]:
    """Registers a function; out of all weights so often."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = function, weight
        return function

    return register


# --- the protocol ---------------------------------------------------------------------------------


async def handler(conn: anypoll.Connection) -> None:
    """Frames: E and bytes, which come back; L and a line, which comes back; D and as many bytes as
    are to come. At the end of the stream it returns, so what it has answered must still arrive.
    """
    while True:
        kind, size = _FRAME.unpack(await conn.next(_FRAME.size))
        if kind == b"E":
            conn.writer.write(bytes(await conn.next(size)))
        elif kind == b"L":
            conn.writer.write(bytes(await conn.until(b"\n", max_bytes=LINE_MOST)))
        else:
            conn.writer.write(bytes(size))
            await conn.writer.flush()


def requests(rng: random.Random, count: int, most: int = 100 * KIB) -> list[tuple[bytes, bytes]]:
    """Some requests, and the answers to them."""
    made = []
    for _ in range(count):
        data = rng.randbytes(int(most ** rng.random()))
        if rng.random() < 0.3:
            line = data[: LINE_MOST - 1].replace(b"\n", b" ") + b"\n"
            made.append((_FRAME.pack(b"L", 0) + line, line))
        else:
            made.append((_FRAME.pack(b"E", len(data)) + data, data))
    return made


def same(got: bytes, expected: bytes) -> None:
    """:raises AssertionError: without megabytes in its text"""
    if got != expected:
        at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), "end")
        raise AssertionError(f"{len(got)} bytes for {len(expected)}, which differ at {at}")


async def ask(conn: anypoll.Connection, request: bytes, answer: bytes) -> None:
    await conn.send(request)
    same(bytes(await conn.next(len(answer))), answer)


async def plain(soak: Soak) -> socket.socket:
    """A socket of the kernel's, connected."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.connect((HOST, soak.port))
        except BlockingIOError:
            await wait_writable(sock)
    except BaseException:
        sock.close()
        raise
    return sock


# --- well-behaved ---------------------------------------------------------------------------------


@scenario(10)
async def echo(soak: Soak, rng: random.Random) -> None:
    async with await anypoll.connect_tcp(HOST, soak.port) as conn:
        for request, answer in requests(rng, rng.randint(1, 12)):
            await ask(conn, request, answer)


@scenario(6)
async def segments_and_half_close(soak: Soak, rng: random.Random) -> None:
    """All requests at once, cut anywhere; then the end; and only then are the answers read."""
    made = requests(rng, rng.randint(1, 6), 20 * KIB)
    stream = b"".join(request for request, _ in made)
    with await plain(soak) as sock:
        while stream:
            n = rng.randint(1, max(1, int(len(stream) ** rng.random())))
            await send_all(sock, stream[:n])
            stream = stream[n:]
            if rng.random() < 0.2:
                await anyio.sleep(0)
        sock.shutdown(socket.SHUT_WR)
        same(await read_to_end(sock), b"".join(answer for _, answer in made))


@scenario(4)
async def half_close(soak: Soak, rng: random.Random) -> None:
    made = requests(rng, rng.randint(0, 4), 20 * KIB)
    async with await anypoll.connect_tcp(HOST, soak.port) as conn:
        for request, _ in made:
            conn.writer.write(request)
        await conn.send_eof()
        same(b"".join([piece async for piece in conn]), b"".join(answer for _, answer in made))


@scenario(4)
async def timeouts(soak: Soak, rng: random.Random) -> None:
    """A read that runs into its timeout has lost nothing."""
    async with await anypoll.connect_tcp(HOST, soak.port) as conn:
        for request, answer in requests(rng, 3, 5 * KIB):
            cut = rng.randrange(len(request))
            await conn.send(request[:cut])
            conn.read_timeout = rng.uniform(0, 0.005)
            try:
                await conn.next(len(answer) + 1)
            except anypoll.ReadTimeout:
                pass
            else:
                raise AssertionError("more than the answer")
            conn.read_timeout = None
            await ask(conn, request[cut:], answer)


@scenario(6)
async def cancellation(soak: Soak, rng: random.Random) -> None:
    """At any moment; then the connection is closed, in one of two ways."""
    conn = await anypoll.connect_tcp(HOST, soak.port)
    with anyio.move_on_after(rng.expovariate(500)):
        while True:
            for request, answer in requests(rng, 4):
                await ask(conn, request, answer)
    if rng.random() < 0.5:
        conn.abort()
    with anyio.CancelScope() as scope:
        if rng.random() < 0.3:
            scope.cancel()
        await conn.aclose()


@scenario(3)
async def descriptors(_soak: Soak, rng: random.Random) -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        for _ in range(rng.randint(1, 4)):
            data, count = rng.randbytes(rng.randint(1, 2000)), rng.randint(1, 5)
            with open(os.devnull) as file:
                await first.send_fds(data, [file] * count)
            if rng.random() < 0.3:  # not asked for: they are closed
                same(bytes(await second.next(len(data))), data)
                continue
            got, fds = await second.receive_fds(4 * KIB, 9)
            for fd in fds:
                os.close(fd)
            assert len(fds) == count
            same(got + bytes(await second.next(len(data) - len(got))), data)  # it is a stream


# --- ends from outside ----------------------------------------------------------------------------


async def _until_the_end(port: int, rng: random.Random) -> None:
    try:
        async with await anypoll.connect_tcp(HOST, port) as conn:
            while True:
                for request, answer in requests(rng, 5, 10 * KIB):
                    await ask(conn, request, answer)
    except ENDS:
        return
    except OSError as exc:  # it came too late
        if exc.__cause__ is None:
            raise


@scenario(4)
async def shutdown(_soak: Soak, rng: random.Random) -> None:
    """A server ends while its clients are at work, idle, or have sent a part of a request."""
    what: dict[str, Any] = rng.choice([{"handler": handler}, {"on_request": on_request}])
    async with (
        anyio.create_task_group() as group,
        anypoll.serve(**what, host=HOST, port=0) as server,
    ):
        for _ in range(rng.randint(1, 5)):
            group.start_soon(_until_the_end, server.port, random.Random(rng.random()))
        await anyio.sleep(rng.expovariate(50))
        await server.shutdown(rng.choice([0, 0.01, 10]))
        statistics = server.statistics()
        assert statistics.active == 0
        assert statistics.handler_errors == 0


@functools.cache
def _ssl_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's; made once, for it takes long."""
    return certificates.client_context(), certificates.server_context()


async def _dial(port: int, context: ssl.SSLContext | None) -> Client:
    conn = await anypoll.connect_tcp(HOST, port)
    if context is None:
        return conn
    try:
        return await anypoll.TLSConnection.wrap(
            conn, hostname=certificates.NAMES[1], ssl_context=context
        )
    except BaseException:
        conn.abort()
        raise


async def on_request(conn: Client) -> None:
    """One frame; see ``handler``."""
    kind, size = _FRAME.unpack(await conn.next(_FRAME.size))
    if kind == b"E":
        conn.writer.write(bytes(await conn.next(size)))
    else:
        conn.writer.write(bytes(await conn.until(b"\n", max_bytes=LINE_MOST)))


async def _talk(port: int, context: ssl.SSLContext | None, rng: random.Random) -> None:
    """Pipelines, then leaves in one of several ways."""
    made = requests(rng, rng.randint(1, 8), 20 * KIB)
    conn = await _dial(port, context)
    try:
        for request, _ in made:
            conn.writer.write(request)
        await conn.writer.flush()
        same(bytes(await conn.next(sum(len(a) for _, a in made))), b"".join(a for _, a in made))
        if rng.random() < 0.3:
            await conn.send(made[0][0][:-1])  # one that never becomes whole
    finally:
        if rng.random() < 0.5:
            conn.abort()
        await conn.aclose()


async def _leave(port: int, context: ssl.SSLContext | None, rng: random.Random) -> None:
    """Is cancelled at any moment, that of the handshake too."""
    with anyio.move_on_after(rng.expovariate(200)):
        await _talk(port, context, rng)


@scenario(7)
async def server(_soak: Soak, rng: random.Random) -> None:
    """One with all hooks, limits, and clients that stay or leave; each hook once."""
    client, context = _ssl_contexts() if rng.random() < 0.3 else (None, None)
    what: dict[str, Any] = rng.choice([{"handler": handler}, {"on_request": on_request}])
    told: Counter[str] = Counter()

    async def on_connect(conn: Client) -> None:
        told["connect"] += 1
        conn.add_close_callback(lambda: told.update(["closed"]))

    async def on_disconnect(_conn: Client) -> None:
        told["disconnect"] += 1

    async with (
        anypoll.serve(
            **what,
            host=HOST,
            port=0,
            ssl_context=context,
            on_connect=on_connect,
            on_disconnect=on_disconnect,
            max_connections=rng.randint(1, 4),
            read_limit=LIMIT,
            idle_timeout=30,
            shutdown_timeout=5,
        ) as serving,
        anyio.create_task_group() as group,
    ):
        for _ in range(rng.randint(1, 6)):
            kind = rng.choice([_talk, _leave])
            group.start_soon(kind, serving.port, client, random.Random(rng.random()))
    statistics = serving.statistics()
    assert statistics.active == 0
    assert statistics.handler_errors == 0
    assert told["closed"] == told["connect"] <= statistics.accepted
    assert told["disconnect"] <= told["connect"]


@scenario(2)
async def mux(soak: Soak, rng: random.Random) -> None:
    """Several tasks write through one queue; whole requests come back, in some order."""
    made = requests(rng, rng.randint(2, 30), 2 * KIB)
    async with await anypoll.connect_tcp(HOST, soak.port) as conn:
        async with ShardQueue(conn) as queue, anyio.create_task_group() as group:
            for request, _ in made:
                cut = rng.randrange(len(request))
                group.start_soon(queue.add, request[:cut], request[cut:])
        got = bytes(await conn.next(sum(len(answer) for _, answer in made)))
        answers = sorted((answer for _, answer in made), key=len)
        if rng.random() < 0.5:
            await conn.send_eof()
        assert sorted(got) == sorted(b"".join(answers))


async def _in_child() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        await first.send(b"child")
        same(bytes(await second.next(5)), b"child")


def _child(soak: Soak, inherited: anypoll.Connection) -> None:
    """Never returns. The thread is there because this one is inside of an event loop."""
    done = []

    def run() -> None:
        assert not inherited.is_active
        anyio.run(_in_child, backend=soak.backend, backend_options=soak.options)
        done.append(True)

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(30)
    finally:
        os._exit(not done)


@scenario(1)
async def fork(soak: Soak, rng: random.Random) -> None:
    """The child starts afresh; the parent is undisturbed."""
    async with await anypoll.connect_tcp(HOST, soak.port) as conn:
        [(request, answer)] = requests(rng, 1)
        await conn.send(request[:3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it is what is tried here
            pid = os.fork()
        if pid == 0:
            _child(soak, conn)
        await ask(conn, request[3:], answer)
        pidfd = os.pidfd_open(pid)
        try:
            with anyio.CancelScope(shield=True):
                await wait_readable(pidfd)
        finally:
            os.close(pidfd)
            status = os.waitpid(pid, 0)[1]
        assert status == 0, f"the child ended with {status:#x}"


@scenario(1)
async def races(_soak: Soak, rng: random.Random) -> None:
    """Users of connections that read, cancel and close what is one another's."""
    await Game(rng.random(), players=rng.randint(2, 10)).run()


# --- hostile --------------------------------------------------------------------------------------


async def _ends(sock: socket.socket) -> None:
    """Until the server has ended the connection, in whichever way."""
    with suppress(ConnectionError):
        await read_to_end(sock)


@scenario(4)
async def resets(soak: Soak, rng: random.Random) -> None:
    """In the middle of a request, or of the answer."""
    for request, _ in requests(rng, rng.randint(1, 20)):
        sock = await plain(soak)
        try:
            with anyio.move_on_after(0.5):
                await send_all(sock, request[: rng.randint(0, len(request))])
        except ConnectionError:
            pass
        finally:
            reset(sock)


@scenario(1)
async def never_reads(soak: Soak, rng: random.Random) -> None:
    """Asks for megabytes until nobody takes its requests any more."""
    with await plain(soak) as sock:
        try:
            with anyio.move_on_after(rng.uniform(0, 1.5 * soak.idle)):
                while True:
                    await send_all(sock, _FRAME.pack(b"D", MIB // 2) * 20)
                    await anyio.sleep(0.001)
        except ConnectionError:
            pass
        reset(sock)


@scenario(1)
async def trickles(soak: Soak, rng: random.Random) -> None:
    """A line, byte by byte."""
    line = rng.randbytes(rng.randint(1, 30)).replace(b"\n", b" ") + b"\n"
    with await plain(soak) as sock:
        for byte in _FRAME.pack(b"L", 0) + line:
            await send_all(sock, bytes([byte]))
            await anyio.sleep(rng.expovariate(50))
        sock.shutdown(socket.SHUT_WR)
        same(await read_to_end(sock), line)


@scenario(1)
async def never_speaks(soak: Soak, _rng: random.Random) -> None:
    """The idle timeout ends it."""
    with await plain(soak) as sock:
        await _ends(sock)


@scenario(2)
async def hostile_prefix(soak: Soak, rng: random.Random) -> None:
    """A length that is not allowed, or a line without an end: refused at once."""
    with await plain(soak) as sock:
        try:
            if rng.random() < 0.5:
                await send_all(sock, _FRAME.pack(b"E", rng.randint(LIMIT + 1, 2**32 - 1)))
            else:
                await send_all(sock, _FRAME.pack(b"L", 0) + b"x" * (2 * LINE_MOST))
        except ConnectionError:
            pass
        await _ends(sock)

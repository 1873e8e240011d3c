"""TLS over a network that damages what it carries: each byte of each flight is changed, or the
last. Nobody hangs or crashes, and no plaintext is wrong.

What is damaged ends with a FIN: a length that has grown must not make anybody wait for ever.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import accumulate
from pathlib import Path

import anyio
import pytest
from anyio import BrokenResourceError
from certificates import client_context, server_context
from peers import holds, read_to_end, send_all
from serving import all_is_accounted_for  # noqa: F401
from tls_peers import NAME, Peer, both

import anypoll
from anypoll import Connection, TLSConnection

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

VERSIONS = ["TLSv1_2", "TLSv1_3"]
Damage = Callable[[bytes], bytes]
#: Handshakes that are under way at the same time.
AT_ONCE = 20


def cut(at: int) -> Damage:
    return lambda data: data[:at]


def flip(at: int, mask: int) -> Damage:
    """Or a cut: signatures differ in size, so there may be no such byte."""
    return lambda data: (
        data[:at] + bytes(byte ^ mask for byte in data[at : at + 1]) + data[at + 1 :]
        if at < len(data)
        else data[:-1]
    )


def damages(size: int, sanitized: bool) -> Iterator[Damage]:
    """At each byte, of certificates at some; under a sanitizer at some of all."""
    for at in range(size):
        if at % 17 if sanitized else at % 4 and 200 < at < size - 200 and size > 600:
            continue
        yield flip(at, 0xFF if at % 9 == 8 else 1 << at % 9)
        if not at % 3:
            yield cut(at)


async def try_all(test: Callable[[Damage], Awaitable[None]], size: int, sanitized: bool) -> int:
    """Returns how many there were."""
    todo = list(damages(size, sanitized))
    count = len(todo)

    async def work() -> None:
        while todo:
            await test(todo.pop())

    async with anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(work)
    return count


def limited(context: ssl.SSLContext, version: str) -> ssl.SSLContext:
    context.maximum_version = getattr(ssl.TLSVersion, version)
    return context


def flight(peer: Peer) -> bytes:
    """What it has to say now."""
    with suppress(ssl.SSLWantReadError):
        peer.ssl.do_handshake()
    return peer.outgoing.read()


def end(sock: socket.socket) -> None:
    with suppress(OSError):  # the other has gone
        sock.shutdown(socket.SHUT_WR)


async def deliver(sock: socket.socket, data: bytes, damage: Damage) -> None:
    with suppress(ConnectionError):  # the other may close before it has read all
        await send_all(sock, damage(data))
    end(sock)


async def rest(sock: socket.socket) -> bytes:
    try:
        return await read_to_end(sock)
    except ConnectionResetError:
        return b""


# --- to a server ---------------------------------------------------------------------------------


class Served:
    """A server that echoes a line, and what its handlers have seen."""

    def __init__(self, path: Path, version: str) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.client = limited(client_context(), version)
        self.server: anypoll.Server

    async def handler(self, stream: TLSConnection) -> None:
        line = bytes(await stream.until(b"\n"))
        self.lines.append(line)
        await stream.send(line)

    @asynccontextmanager
    async def peer(self) -> AsyncIterator[Peer]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
            yield Peer(sock, self.client)

    async def is_well(self) -> None:
        async with self.peer() as peer:
            await peer.shake_hands()
            await peer.send(b"well\n")
            assert await peer.receive(5) == b"well\n"
        await holds(lambda: not self.server.connections)
        assert self.lines.pop() == b"well\n"
        assert self.server.statistics().handler_errors == 0


@asynccontextmanager
async def served(path: Path, version: str) -> AsyncIterator[Served]:
    ours = Served(path, version)
    async with anypoll.serve(
        ours.handler, path=path, ssl_context=server_context(lenient=False)
    ) as ours.server:
        await ours.is_well()
        yield ours
        await ours.is_well()


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_hello_of_a_client(version: str, tmp_path: Path, sanitized: bool) -> None:
    async with served(tmp_path / "s", version) as ours:

        async def test(damage: Damage) -> None:
            async with ours.peer() as peer:
                await deliver(peer.sock, flight(peer), damage)
                await rest(peer.sock)

        async with ours.peer() as peer:
            size = len(flight(peer))
        count = await try_all(test, size, sanitized)
        await holds(lambda: not ours.server.connections)
        assert ours.server.statistics().closed["tls_handshake"] == count + 1
        assert ours.lines == []


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_last_flight_of_a_client(version: str, tmp_path: Path, sanitized: bool) -> None:
    """In TLS 1.3 it has a request behind it already."""
    async with served(tmp_path / "s", version) as ours:

        async def test(damage: Damage) -> int:
            async with ours.peer() as peer:
                await send_all(peer.sock, flight(peer))
                while not (last := flight(peer)):
                    await peer.more()
                if version == "TLSv1_3":
                    last += peer.encrypted(b"word\n")
                await deliver(peer.sock, last, damage)
                peer.incoming.write(await rest(peer.sock))
                with suppress(ssl.SSLError):
                    peer.ssl.do_handshake()
                    assert peer.ssl.read(100) in {b"", b"word\n"}
                return len(last)

        size = await test(cut(1))
        await try_all(test, size, sanitized)
        await holds(lambda: not ours.server.connections)
    # a few bytes are not protected: the versions of records, and what TLS 1.3 only pretends
    assert set(ours.lines) <= {b"word\n"}
    assert len(ours.lines) < 60


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_a_client_says(version: str, tmp_path: Path, sanitized: bool) -> None:
    async with served(tmp_path / "s", version) as ours:

        async def test(damage: Damage) -> int:
            async with ours.peer() as peer:
                await peer.shake_hands()
                data = peer.encrypted(b"wo") + peer.encrypted(b"rd\n")
                await deliver(peer.sock, data, damage)
                await rest(peer.sock)
                return len(data)

        size = await test(cut(1))
        count = await try_all(test, size, sanitized) + 1
        await holds(lambda: not ours.server.connections)
        assert ours.server.statistics().closed["broken"] == count
    assert ours.lines == []


# --- to a client ---------------------------------------------------------------------------------


class Dialled:
    """Connections of ours, each with a server at its other end."""

    def __init__(self, version: str) -> None:
        self.client = client_context()
        self.server = limited(server_context(), version)

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Connection, Peer]]:
        ours, theirs = socket.socketpair()
        with theirs:
            async with await Connection.from_socket(ours) as conn:
                yield conn, Peer(theirs, self.server, server_side=True)

    async def wrapped(self, conn: Connection) -> TLSConnection:
        return await TLSConnection.wrap(conn, hostname=NAME, ssl_context=self.client)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("number", [1, 2])
async def test_the_flights_of_a_server(version: str, number: int, sanitized: bool) -> None:
    """In TLS 1.3 the second one has tickets, and something to read."""
    words = b"some words"
    ours = Dialled(version)

    async def test(damage: Damage) -> int:
        sizes: list[int] = []
        async with ours.pair() as (conn, peer):

            async def serve() -> None:
                await peer.more()
                data = flight(peer)
                if number == 2:
                    await send_all(peer.sock, data)
                    while not (data := flight(peer)):
                        await peer.more()
                    data += peer.encrypted(words)
                sizes.append(len(data))
                await deliver(peer.sock, data, damage)
                await rest(peer.sock)

            async def dial() -> None:
                try:
                    tls = await ours.wrapped(conn)
                except (ssl.SSLError, BrokenResourceError):
                    conn.abort()
                    return
                with pytest.raises(BrokenResourceError) as caught:
                    await tls.next(len(words) + 1)  # more than there is
                assert isinstance(caught.value.__cause__, ssl.SSLError)
                assert number == 2 or version == "TLSv1_3"
                tls.abort()

            await both(serve, dial)
        return sizes[0]

    size = await test(cut(1))
    await try_all(test, size, sanitized)


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_a_server_says(version: str, sanitized: bool) -> None:
    """What came whole can be read, and then no more."""
    ours = Dialled(version)

    async def test(damage: Damage) -> list[int]:
        sizes: list[int] = []
        sent = anyio.Event()
        async with ours.pair() as (conn, peer):

            async def serve() -> None:
                await peer.shake_hands()
                records = [peer.encrypted(word) for word in (b"one", b"two", b"six")]
                sizes.extend(len(record) for record in records)
                await deliver(peer.sock, b"".join(records), damage)
                sent.set()
                await rest(peer.sock)

            async def dial() -> None:
                tls = await ours.wrapped(conn)
                await sent.wait()
                size = 3 * whole(damage, sizes)
                if size:
                    assert await tls.next(size) == b"onetwosix"[:size]
                for _ in range(2):
                    with pytest.raises(BrokenResourceError) as caught:
                        await tls.receive()
                    assert isinstance(caught.value.__cause__, ssl.SSLError)
                tls.abort()

            await both(serve, dial)
        return sizes

    size = sum(await test(cut(1)))
    await try_all(test, size, sanitized)


def whole(damage: Damage, sizes: list[int]) -> int:
    """How many records come before the damage."""
    made = damage(bytes(sum(sizes)))
    at = len(made.rstrip(b"\0")) - 1 if any(made) else len(made)
    return sum(end <= at for end in accumulate(sizes))

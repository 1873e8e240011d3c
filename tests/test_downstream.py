"""What is built for AnyIO's streams runs on anypoll's without noticing: AnyIO's own wrappers, which
must do the same as over its own connections, and coredis.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.text import TextStream
from anyio.streams.tls import TLSAttribute, TLSListener, TLSStream
from certificates import client_context, server_context
from peers import MIB, holds, pattern, read_to_end, reset, socket_pair, within

import anypoll

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["anypoll-tcp", "anypoll-unix", "anyio-tcp"])
def maker(request: pytest.FixtureRequest) -> str:
    """Whose connections, and over what: each test must pass on AnyIO's own too."""
    return request.param  # type: ignore[no-any-return]


CLASSES: dict[str, Any] = {
    "anypoll-tcp": anypoll.Connection,
    "anypoll-unix": anypoll.UNIXConnection,
    "anyio-tcp": anyio.abc.SocketStream,
}


@contextlib.asynccontextmanager
async def one_of(maker: str) -> AsyncIterator[tuple[Any, socket.socket]]:
    """A connection, and the blocking socket at its other end."""
    ours, peer = socket_pair(maker.split("-")[1])
    stream = await CLASSES[maker].from_socket(ours)
    try:
        with peer:
            yield stream, peer
    finally:
        await anyio.aclose_forcefully(stream)


@contextlib.asynccontextmanager
async def pair_of(maker: str) -> AsyncIterator[tuple[Any, Any]]:
    """Two connections of one library to each other."""
    ends = [await CLASSES[maker].from_socket(sock) for sock in socket_pair(maker.split("-")[1])]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            await anyio.aclose_forcefully(end)


async def over_tls(
    first: Any, second: Any, *, standard_compatible: bool = True
) -> tuple[TLSStream, TLSStream]:
    """The handshake of a client and a server, and a first word, with which the tickets of TLS 1.3
    are read: a close with unread bytes is a reset.
    """
    streams: dict[bool, TLSStream] = {}

    async def wrap(stream: Any, server: bool) -> None:
        streams[server] = await TLSStream.wrap(
            stream,
            server_side=server,
            hostname=None if server else "anypoll.test",
            ssl_context=server_context(lenient=False) if server else client_context(),
            standard_compatible=standard_compatible,
        )

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wrap, first, False)
            tasks.start_soon(wrap, second, True)
    await streams[True].send(b"ready")
    assert await streams[False].receive() == b"ready"
    return streams[False], streams[True]


async def receive_all(stream: Any) -> bytes:
    received = b"".join([chunk async for chunk in stream])
    with pytest.raises(anyio.EndOfStream):
        await stream.receive()
    return received


async def receive_exactly(stream: Any, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += await stream.receive(size - len(received))
    return received


def descriptor(stream: Any) -> int:
    """-1 once it is closed; uvloop forgets the socket then."""
    try:
        return stream.extra(SocketAttribute.raw_socket).fileno()  # type: ignore[no-any-return]
    except (AttributeError, anyio.ClosedResourceError):
        return -1


# --- TLSStream -----------------------------------------------------------------------------------


async def test_tls_both_ways_at_once(maker: str) -> None:
    there, back = pattern(MIB + 17), pattern(MIB + 5, seed=1)
    async with pair_of(maker) as pair:
        client, server = await over_tls(*pair)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.send, there)
                tasks.start_soon(server.send, back)
                assert await receive_exactly(client, len(back)) == back
                assert await receive_exactly(server, len(there)) == there


async def test_starttls_in_the_middle_of_a_stream_and_back(maker: str) -> None:
    async with pair_of(maker) as (first, second):
        await first.send(b"STARTTLS\r\n")
        assert await second.receive() == b"STARTTLS\r\n"
        await second.send(b"220 go on\r\n")
        assert await first.receive() == b"220 go on\r\n"
        client, server = await over_tls(first, second)
        await client.send(b"secret")
        assert await server.receive() == b"secret"

        async def unwrap(stream: TLSStream) -> None:
            assert await stream.unwrap() == (stream.transport_stream, b"")

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(unwrap, client)
                tasks.start_soon(unwrap, server)
        await second.send(b"plain again")
        assert await first.receive() == b"plain again"


async def test_tls_begins_in_bytes_that_were_read_ahead() -> None:
    """The client pipelines its hello behind its command; nothing of it is lost to the reader."""
    async with pair_of("anypoll-tcp") as (first, second):
        bio = ssl.MemoryBIO()
        hello = client_context().wrap_bio(ssl.MemoryBIO(), bio, server_hostname="anypoll.test")
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        await first.send(b"STARTTLS\r\n" + bio.read())
        assert await second.until(b"\r\n") == b"STARTTLS\r\n"
        assert len(second.reader) > 0

        async def wrap() -> None:
            await TLSStream.wrap(second, server_side=True, ssl_context=server_context())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wrap)
            answer = await within(first.receive())
            tasks.cancel_scope.cancel()
        assert answer[:2] == b"\x16\x03"  # the server's part of the handshake


async def test_tls_closing_handshake(maker: str) -> None:
    async with pair_of(maker) as pair:
        client, server = await over_tls(*pair)
        await client.send(b"last words")
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.aclose)
                assert await receive_all(server) == b"last words"
                await server.aclose()
        assert [descriptor(end) for end in pair] == [-1, -1]
        for end in (client, server):
            with pytest.raises(anyio.ClosedResourceError):
                await end.transport_stream.receive()
            await end.transport_stream.aclose()


async def test_tls_end_without_a_closing_handshake(maker: str) -> None:
    async with pair_of(maker) as pair:
        client, server = await over_tls(*pair, standard_compatible=False)
        await client.send(b"last words")
        await client.aclose()
        assert await receive_all(server) == b"last words"
    async with pair_of(maker) as pair:
        client, server = await over_tls(*pair)
        await client.send(b"last words")
        await client.transport_stream.aclose()
        assert await server.receive() == b"last words"
        with pytest.raises(anyio.BrokenResourceError) as caught:
            await server.receive()
        assert isinstance(caught.value.__cause__, ssl.SSLError)


@pytest.mark.parametrize("maker", ["anypoll-tcp", "anyio-tcp"])
async def test_tls_reset(maker: str) -> None:
    async with pair_of(maker) as pair:
        _client, server = await over_tls(*pair)
        reset_on_close(pair[0].extra(SocketAttribute.raw_socket))
        await pair[0].aclose()
        with pytest.raises(anyio.BrokenResourceError):
            await server.receive()


def reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("maker", ["anypoll-tcp", "anyio-tcp"])
@pytest.mark.parametrize(
    ("how", "compatible", "error"),
    [
        ("reset", True, anyio.BrokenResourceError),
        ("FIN", True, anyio.BrokenResourceError),
        ("FIN", False, anyio.EndOfStream),
    ],
)
async def test_a_peer_that_ends_in_the_handshake(
    maker: str, how: str, compatible: bool, error: type[Exception]
) -> None:
    async with one_of(maker) as (stream, peer):
        if how == "reset":
            reset(peer)
        else:
            peer.shutdown(socket.SHUT_WR)
        with pytest.raises(error) as caught:
            await TLSStream.wrap(
                stream,
                hostname="anypoll.test",
                ssl_context=client_context(),
                standard_compatible=compatible,
            )
        if how == "reset":
            assert isinstance(caught.value.__cause__, OSError)
        else:
            assert descriptor(stream) >= 0  # it is its owner's to close


async def test_tls_calls_that_are_cancelled(maker: str) -> None:
    """A receive() loses nothing; a send() breaks the session."""
    async with pair_of(maker) as pair:
        client, server = await over_tls(*pair)
        for n in range(3):
            with anyio.move_on_after(0.005) as scope:
                await client.receive()
            assert scope.cancelled_caught
            await server.send(bytes([n]))
            assert await client.receive() == bytes([n])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.send, bytes(16 * MIB))
            await within(server.receive())
            tasks.cancel_scope.cancel()
        with pytest.raises(anyio.BrokenResourceError):
            await client.send(b"x")


async def test_tls_extra_attributes(maker: str) -> None:
    async with pair_of(maker) as pair:
        for stream, below in zip(await over_tls(*pair), pair, strict=True):
            assert set(below.extra_attributes) < set(stream.extra_attributes)
            for name in ("raw_socket", "family", "local_address", "remote_address"):
                attribute = getattr(SocketAttribute, name)
                assert stream.extra(attribute) == below.extra(attribute)


@pytest.mark.parametrize("how", ["forcefully", "cancelled", "in time"])
async def test_tls_close_that_may_not_wait_closes_at_once(maker: str, how: str) -> None:
    """The peer says nothing, so the closing handshake would last for ever."""
    async with pair_of(maker) as pair:
        client, _server = await over_tls(*pair)
        message = b""
        with anyio.CancelScope() as scope:
            if how == "forcefully":
                await anyio.aclose_forcefully(client)
            elif how == "cancelled":
                scope.cancel()
                await client.aclose()
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.aclose)
                    message = await within(pair[1].receive())
                    scope.cancel()
        assert scope.cancelled_caught == (how != "forcefully")
        assert descriptor(pair[0]) == -1
        # what is left of the closing handshake is its first message, unless it came too late
        assert bool(message + await within(receive_all(pair[1]))) == (how == "in time")


# --- TLSListener and connect_tcp(tls=True) -------------------------------------------------------


@contextlib.asynccontextmanager
async def tls_echo(library: Any, **options: Any) -> AsyncIterator[tuple[TLSListener, int]]:
    """The listener of an echo server with TLS, and its port."""

    async def handler(stream: TLSStream) -> None:
        async with stream:
            async for chunk in stream:
                await stream.send(chunk)

    listener = await library.create_tcp_listener(local_host="127.0.0.1")
    async with (
        TLSListener(listener, server_context(), **options) as tls,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(tls.serve, handler)
        yield tls, listener.extra(SocketAttribute.local_port)
        tasks.cancel_scope.cancel()


@pytest.fixture(params=[anypoll, anyio], ids=["anypoll", "anyio"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("compatible", [True, False])
@pytest.mark.usefixtures("tls_way")
async def test_connect_tcp_with_tls(library: Any, compatible: bool) -> None:
    async with tls_echo(anypoll, standard_compatible=compatible) as (_, port):
        for options in ({}, {"tls": True, "tls_hostname": "anypoll.test"}):
            stream = await library.connect_tcp(
                "127.0.0.1",
                port,
                ssl_context=client_context(),
                tls_standard_compatible=compatible,
                **options,
            )
            async with stream:
                assert isinstance(stream, TLSStream)
                assert stream.extra(TLSAttribute.standard_compatible) is compatible
                await stream.send(pattern(100_000))
                assert await receive_exactly(stream, 100_000) == pattern(100_000)


@pytest.mark.usefixtures("tls_way")
async def test_connect_tcp_refuses_wrong_certificates(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "anyio.streams.tls")
    async with tls_echo(library) as (_, port):
        for options in ({"tls_hostname": "other.test", "ssl_context": client_context()}, {}):
            with pytest.raises(ssl.SSLCertVerificationError):
                await anypoll.connect_tcp("127.0.0.1", port, tls=True, **options)


async def test_tls_listener_survives_its_clients(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with tls_echo(library, handshake_timeout=0.2) as (listener, port):
        with (
            socket.create_connection(("127.0.0.1", port)) as silent,
            socket.create_connection(("127.0.0.1", port)) as babbler,
            socket.create_connection(("127.0.0.1", port)) as gone,
        ):
            babbler.sendall(b"GET / HTTP/1.1\r\n\r\n")
            reset(gone)
            for sock in (silent, babbler):
                sock.setblocking(False)
                with contextlib.suppress(ConnectionResetError):
                    await read_to_end(sock)
        listener.handshake_timeout = 30
        async with await anypoll.connect_tcp(
            "127.0.0.1", port, ssl_context=client_context()
        ) as stream:
            await stream.send(b"still there")
            assert await stream.receive() == b"still there"
        await holds(lambda: len(caplog.records) >= 3)
        messages = {record.getMessage() for record in caplog.records}
        assert messages == {"Error during TLS handshake"}
    caplog.clear()


# --- buffered, text, stapled ---------------------------------------------------------------------


async def test_buffered(maker: str) -> None:
    async with one_of(maker) as (stream, peer):
        buffered = BufferedByteReceiveStream(stream)
        peer.sendall(b"header\r\nbo")
        assert await buffered.receive_until(b"\r\n", 100) == b"header"
        peer.sendall(b"dy|")
        assert await buffered.receive_exactly(4) == b"body"
        peer.sendall(b"split de")
        peer.sendall(b"limiter->-")
        with pytest.raises(anyio.DelimiterNotFound):
            await buffered.receive_until(b"->->", 8)
        peer.sendall(b">rest")
        peer.shutdown(socket.SHUT_WR)
        assert await buffered.receive_until(b"->->", 100) == b"|split delimiter"
        with pytest.raises(anyio.IncompleteRead):
            await buffered.receive_exactly(5)
        with pytest.raises(anyio.IncompleteRead):
            await buffered.receive_until(b"x", 100)
        assert await buffered.receive() == b"rest"
        with pytest.raises(anyio.EndOfStream):
            await buffered.receive()
        buffered.feed_data(b"fed")
        assert await buffered.receive_exactly(3) == b"fed"


async def test_buffered_receive_that_is_cancelled_loses_nothing(maker: str) -> None:
    async with one_of(maker) as (stream, peer):
        buffered = BufferedByteReceiveStream(stream)
        for piece in (b"one", b"two", b"three"):
            peer.sendall(piece)
            with anyio.move_on_after(0.02) as scope:
                await buffered.receive_exactly(12)
            assert scope.cancelled_caught
        peer.sendall(b".")
        assert await buffered.receive_exactly(12) == b"onetwothree."


async def test_text(maker: str) -> None:
    async with pair_of(maker) as (first, second):
        text = TextStream(first)
        await text.send("grüß dich")
        assert await receive_exactly(second, 11) == "grüß dich".encode()
        sign = "€".encode()
        await second.send(sign[:1])
        with anyio.move_on_after(0.02) as scope:
            await text.receive()
        assert scope.cancelled_caught  # half a character is none
        await second.send(sign[1:])
        assert await text.receive() == "€"
        await second.send(b"\xff")
        with pytest.raises(UnicodeDecodeError):
            await text.receive()
        await text.send_eof()
        assert await receive_all(second) == b""
        await second.aclose()
        await text.aclose()
        assert descriptor(first) == -1


async def test_stapled(maker: str) -> None:
    async with pair_of(maker) as out, pair_of(maker) as back:
        near = StapledByteStream(out[0], back[0])
        far = StapledByteStream(back[1], out[1])
        await near.send(b"question")
        assert await far.receive() == b"question"
        await far.send(b"answer")
        assert await near.receive() == b"answer"
        raw = SocketAttribute.raw_socket
        assert near.extra(raw) is back[0].extra(raw)
        await near.send_eof()  # closes what it sends with
        assert descriptor(out[0]) == -1
        assert await receive_all(far) == b""
        await far.send(b"more")
        assert await near.receive() == b"more"
        await near.aclose()
        assert descriptor(back[0]) == -1
        await far.aclose()


# --- coredis, whose own connections are anypoll's ------------------------------------------------


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[anypoll.Connection]:
    """Has coredis connect with anypoll's functions instead of AnyIO's, whose parameters and
    semantics they have; what was connected is listed.
    """
    pytest.importorskip("coredis")
    made: list[anypoll.Connection] = []

    def listing(connect: Any) -> Any:
        async def connect_and_list(*args: Any, **options: Any) -> Any:
            made.append(await connect(*args, **options))
            return made[-1]

        return connect_and_list

    for name in ("connect_tcp", "connect_unix"):
        theirs, ours = getattr(anyio, name), listing(getattr(anypoll, name))
        users = [
            module
            for key, module in sys.modules.items()
            if key.startswith("coredis") and vars(module).get(name) is theirs
        ]
        assert users
        for module in users:
            monkeypatch.setattr(module, name, ours)
    return made


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_coredis(
    kind: str, example: Any, connections: list[anypoll.Connection], tmp_path: Path
) -> None:
    import coredis

    expected: type[anypoll.Connection]
    if kind == "unix":
        expected, where = anypoll.UNIXConnection, {"path": str(tmp_path / "kv")}
    else:
        expected, where = anypoll.Connection, {"host": "127.0.0.1", "port": 0}

    async def count(client: Any) -> None:
        for _ in range(20):
            await client.incr("n")

    async with anypoll.serve(example("kv").handler, **where) as server:
        address: dict[str, Any] = {"unix_socket_path": where.get("path")}
        if kind == "tcp":
            address = {"host": "127.0.0.1", "port": server.port}
        async with coredis.Redis(**address, decode_responses=True) as client:
            assert await client.ping() == "PONG"
            assert await client.set("k", "v") is True
            assert await client.get("k") == "v"
            assert await client.get("missing") is None
            big = "x" * (3 * MIB)
            assert await client.set("big", big) is True
            assert await client.get("big") == big
            assert await client.hset("h", {"a": "1", "b": "2"}) == 2
            assert await client.hgetall("h") == {"a": "1", "b": "2"}
            assert await client.sadd("s", ["a", "b"]) == 2
            assert await client.smembers("s") == {"a", "b"}
            assert await client.rpush("l", ["a", "b"]) == 2
            assert await client.lrange("l", 0, -1) == ["a", "b"]
            assert await client.zadd("z", {"a": 1.5, "b": 2}) == 2
            popped = await client.zpopmin("z", 2)
            assert [(pair.member, pair.score) for pair in popped] == [("a", 1.5), ("b", 2.0)]
            with pytest.raises(coredis.exceptions.WrongTypeError):
                await client.get("l")
            with anyio.move_on_after(0):
                await client.get("big")  # a reply that nobody waits for
            assert await client.get("k") == "v"
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(count, client)
            assert await client.get("n") == "200"
            assert any(connection.is_active for connection in connections)
            assert {type(connection) for connection in connections} == {expected}
        assert not any(connection.is_active for connection in connections)


async def test_coredis_connects_anew(example: Any, connections: list[anypoll.Connection]) -> None:
    """A connection that the server has lost is noticed, and replaced."""
    import coredis

    async with (
        anypoll.serve(example("kv").handler, host="127.0.0.1", port=0) as server,
        coredis.Redis(host="127.0.0.1", port=server.port) as client,
    ):
        assert await client.set("k", "v") is True
        for connection in server.connections:
            connection.abort()
        await holds(lambda: not any(connection.is_active for connection in connections))
        with anyio.fail_after(30):
            while True:
                try:
                    assert await client.get("k") == b"v"
                except coredis.exceptions.ConnectionError:
                    continue
                break
        assert len(connections) >= 2

"""TLS connections: AnyIO's contract, and beyond it the reader, the writer and the timeouts.

The peers are another TLS connection, AnyIO's own, a blocking ``SSLSocket`` in a thread, and one
whose ciphertext is in the hands of the test, segment by segment.
"""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
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
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream
from certificates import client_context, server_context
from peers import (
    KIB,
    MIB,
    arrived,
    blocked,
    holds,
    opened,
    pattern,
    read_to_end,
    reset,
    send_all,
    socket_pair,
    suspends,
    within,
)
from tls_peers import (
    NAME,
    Instead,
    Peer,
    accepted,
    both,
    has_said_goodbye,
    over_memory,
    read_ahead,
    sends,
    waits,
)
from tls_serving import secure

import anypoll
from anypoll import (
    AnypollAttribute,
    Connection,
    MessageTooLarge,
    ReadTimeout,
    TLSConnection,
    WriteTimeout,
)
from anypoll._buffers.errors import normal_end
from anypoll._connection.stream import open_socket
from anypoll._tls.handshake import handshake
from anypoll._tls.session import CLOSE_MOST
from anypoll.nocopy import as_receive_stream, as_send_stream

pytestmark = pytest.mark.anyio


def contexts(version: str = "TLSv1.3") -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's."""
    client, server = client_context(), server_context()
    if version == "TLSv1.2":
        client.maximum_version = ssl.TLSVersion.TLSv1_2
    return client, server


async def open_pair(kind: str = "unix") -> tuple[Connection, Connection]:
    first, second = socket_pair(kind)
    return await Connection.from_socket(first), await Connection.from_socket(second)


@asynccontextmanager
async def tls_pair(
    kind: str = "unix", *, version: str = "TLSv1.3", compatible: bool = True
) -> AsyncIterator[tuple[TLSConnection, TLSConnection]]:
    """A client and a server, both ours, that have exchanged a first word: so the tickets of TLS
    1.3 are read.
    """
    ends = await open_pair(kind)
    made: dict[int, TLSConnection] = {}
    client, server = contexts(version)

    async def wrap(index: int, **options: Any) -> None:
        made[index] = await TLSConnection.wrap(
            ends[index], standard_compatible=compatible, **options
        )

    try:
        await both(
            partial(wrap, 0, hostname=NAME, ssl_context=client),
            partial(wrap, 1, server_side=True, ssl_context=server),
        )
        await made[1].send(b"ready")
        assert await within(made[0].receive()) == b"ready"
        yield made[0], made[1]
    finally:
        for end in ends:
            end.abort()


@asynccontextmanager
async def tls_and_peer(
    kind: str = "unix", *, compatible: bool = True, **timeouts: float
) -> AsyncIterator[tuple[TLSConnection, Peer]]:
    """A server of ours, and its client. The tickets are read."""
    async with opened(kind) as (conn, sock):
        peer = Peer(sock)
        tls = await accepted(conn, peer, standard_compatible=compatible)
        for name, value in timeouts.items():
            setattr(tls, name, value)
        await tls.send(b"ready")
        assert await peer.receive(5) == b"ready"
        try:
            yield tls, peer
        finally:
            tls.abort()


async def receive_exactly(stream: Any, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += await stream.receive(size - len(received))
    return received


async def received(peer: Peer, size: int, *functions: Callable[[], Awaitable[Any]]) -> bytes:
    """What the peer reads while the functions run."""
    got: list[bytes] = []

    async def receive() -> None:
        got.append(await peer.receive(size))

    await both(receive, *functions)
    return got[0]


async def give_up(stream: TLSConnection, data: bytes) -> None:
    """Cancels a ``send()`` of which the kernel has taken a part, and no more."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.send, data)
        await holds(lambda: stream.connection._core.queued() > 0)
        tasks.cancel_scope.cancel()


def is_normal(exc: BaseException, stream: TLSConnection) -> str | None:
    """The reason for which a server would count it."""
    return normal_end(exc, stream.connection._core.number)


# --- wrapping ------------------------------------------------------------------------------------


async def test_is_anyios_stream_and_has_its_attributes() -> None:
    async with tls_pair("tcp") as (client, server):
        for stream in (client, server):
            assert isinstance(stream, TLSStream)
            assert stream.transport_stream is stream.connection
            assert set(stream.connection.extra_attributes) < set(stream.extra_attributes)
            assert stream.extra(TLSAttribute.tls_version) == "TLSv1.3"
            assert stream.extra(TLSAttribute.standard_compatible) is True
            for name in ("local_address", "remote_address"):
                attribute = getattr(SocketAttribute, name)
                assert getattr(stream, name) == stream.extra(attribute)
        assert client.extra(TLSAttribute.server_side) is False
        assert server.extra(TLSAttribute.server_side) is True
        assert client.remote_address == server.local_address
        subject: Any = client.extra(TLSAttribute.peer_certificate)
        assert ("DNS", NAME) in subject["subjectAltName"]
        assert "TLSConnection" in repr(client)


async def test_wrap_takes_nothing_but_a_connection_of_bytes() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first.setblocking(False)
    with second:
        async with open_socket(first) as messages:
            with pytest.raises(ValueError, match="no messages"):
                await TLSConnection.wrap(messages, hostname=NAME)
    stream: Any = object()
    with pytest.raises(TypeError, match="transport_stream must be an anypoll Connection"):
        await TLSConnection.wrap(stream)


async def test_wrap_needs_a_connection_that_nobody_else_uses() -> None:
    """Else half a handshake would be pending there."""
    wrap = partial(TLSConnection.wrap, hostname=NAME, ssl_context=client_context())
    async with opened() as (conn, _peer):
        send = partial(conn.send, bytes(MIB))
        for call, name in ((conn.receive, "_reading"), (send, "_writing")):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await holds(partial(getattr, conn._core, name))
                with pytest.raises(BusyResourceError):
                    await wrap(conn)
                tasks.cancel_scope.cancel()
        assert len(conn.writer) == conn._core.queued()
        conn.abort()
        with pytest.raises(ClosedResourceError):
            await wrap(conn)
    async with opened() as (conn, _peer):
        await conn.send_eof()
        with pytest.raises(ClosedResourceError):
            await within(wrap(conn))


@pytest.mark.parametrize("context", [None, client_context()], ids=["default", "given"])
async def test_a_name_that_would_be_checked_must_be_given(context: Any) -> None:
    async with opened() as (conn, peer):
        with pytest.raises(ValueError, match="hostname must be given"):
            await TLSConnection.wrap(conn, server_side=False, ssl_context=context)
        assert arrived(peer) == 0


async def test_timeouts_move_from_the_connection_to_the_session() -> None:
    first, second = await open_pair()
    first.read_timeout, first.write_timeout = 30, 31
    client, server = contexts()
    made: list[TLSConnection] = []

    async def wrap() -> None:
        made.append(await TLSConnection.wrap(first, hostname=NAME, ssl_context=client))

    async with second:
        await both(wrap, partial(TLSConnection.wrap, second, server_side=True, ssl_context=server))
        [tls] = made
        assert (tls.read_timeout, tls.write_timeout) == (30, 31)
        assert (first.read_timeout, first.write_timeout) == (None, None)
        tls.read_timeout, tls.write_timeout, tls.idle_timeout = 1, 2, 3
        assert (tls.read_timeout, tls.write_timeout, first.idle_timeout) == (1, 2, 3)
        assert (first.read_timeout, first.write_timeout) == (None, None)
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="must not be negative"):
                tls.read_timeout = wrong
            with pytest.raises(ValueError, match="must not be negative"):
                tls.write_timeout = wrong
        tls.abort()


async def test_a_handshake_that_fails_leaves_the_connection_as_it_was() -> None:
    async with opened() as (conn, peer):
        conn.read_timeout, conn.write_timeout = 30, 31
        await send_all(peer, b"this is no TLS at all")
        with pytest.raises(ssl.SSLError) as caught:
            await TLSConnection.wrap(conn, hostname=NAME, ssl_context=client_context())
        assert caught.value.__cause__ is None  # or whoever follows the causes never ends
        assert normal_end(caught.value, -1) is None
        assert getattr(caught.value, "_anypoll_connection", None) == conn._core.number
        assert (conn.read_timeout, conn.write_timeout) == (30, 31)
        assert conn.fileno() != -1


async def test_a_handshake_is_one_read() -> None:
    async with opened() as (conn, peer):
        conn.read_timeout = 0.05
        with pytest.raises(ReadTimeout, match="no TLS handshake within"):
            await TLSConnection.wrap(conn, hostname=NAME, ssl_context=client_context())
        assert conn.read_timeout == 0.05
        assert arrived(peer) > 0


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_what_there_is_to_tell_of_a_handshake(version: str) -> None:
    """Also when the connection has been closed."""
    server = server_context()
    server.maximum_version = getattr(ssl.TLSVersion, version.replace(".", "_"))
    client, session, before = client_context(), None, time.monotonic()
    for resumed in (False, True):
        async with opened() as (conn, sock):
            peer = Peer(sock, client, session=session)
            tls = await accepted(conn, peer, server)
            await tls.send(b"x")
            assert await peer.receive(1) == b"x"
            session = peer.ssl.session
            assert tls.handshake.resumed is resumed
            tls.abort()
            assert tls.handshake.resumed is resumed
            assert 0 < tls.handshake.seconds < time.monotonic() - before


async def test_the_peer_is_told_why_a_handshake_has_failed() -> None:
    first, second = await open_pair()
    client, server = contexts()
    async with first, second:

        async def wrap() -> None:
            with pytest.raises(ssl.SSLError, match="ALERT"):
                await TLSConnection.wrap(second, server_side=True, ssl_context=server)

        async def refuse() -> None:
            with pytest.raises(ssl.SSLCertVerificationError):
                await TLSConnection.wrap(first, hostname="other.test", ssl_context=client)

        await both(wrap, refuse)


async def test_a_handshake_that_is_cancelled_leaves_nothing() -> None:
    async with opened() as (conn, peer):
        called: list[str] = []
        conn.add_close_callback(lambda: called.append("closed"))
        with anyio.move_on_after(0.02) as scope:
            await handshake(conn, server_context(), 30)
        assert scope.cancelled_caught
        assert conn.fileno() == -1
        assert called == ["closed"]
        assert await read_to_end(peer) == b""


@pytest.mark.parametrize("compatible", [True, False])
async def test_a_peer_that_ends_in_the_handshake(compatible: bool) -> None:
    async with opened() as (conn, peer):
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenResourceError if compatible else EndOfStream):
            await TLSConnection.wrap(
                conn,
                hostname=NAME,
                ssl_context=client_context(),
                standard_compatible=compatible,
            )


# --- in the middle of a stream -------------------------------------------------------------------


async def test_starttls_with_the_hello_read_ahead_and_the_answer_pending() -> None:
    async with opened() as (conn, sock):
        peer = Peer(sock)
        with pytest.raises(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
        await send_all(sock, b"STARTTLS\r\n" + peer.outgoing.read())
        assert await conn.until(b"\r\n") == b"STARTTLS\r\n"
        await holds(lambda: len(conn.reader) > 0)
        conn.writer.write(b"220 go on\r\n")
        made: list[TLSConnection] = []

        async def serve() -> None:
            made.append(
                await TLSConnection.wrap(conn, server_side=True, ssl_context=server_context())
            )

        async def dial() -> None:
            answer = b""
            while len(answer) < 11:
                await anyio.wait_readable(sock)
                answer += sock.recv(11 - len(answer))
            assert answer == b"220 go on\r\n"
            await peer.shake_hands()

        await both(serve, dial)
        await peer.send(b"secret")
        assert await within(made[0].receive()) == b"secret"
        made[0].abort()


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_unwrap_loses_nothing(version: str) -> None:
    async with tls_pair(version=version) as (client, server):
        client.read_timeout = 30
        client.writer.write(b"last words")
        assert await within(server.peek(0)) == b""

        async def unwrap_client() -> None:
            connection, rest = await client.unwrap()
            assert connection is client.connection
            while len(rest) < 5:
                rest += await connection.receive()
            assert rest == b"plain"

        async def unwrap_server() -> None:
            assert await server.unwrap() == (server.connection, b"")
            await server.connection.send(b"plain")

        await both(unwrap_client, unwrap_server)
        assert client.connection.read_timeout == 30
        assert bytes(await server.next(10)) == b"last words"
        with pytest.raises(EndOfStream):
            await server.receive()
        with pytest.raises(ClosedResourceError):
            await server.send(b"x")
        await server.connection.send(b"and again")
        assert await within(client.connection.receive()) == b"and again"
        await client.aclose()
        assert client.connection.fileno() == -1


async def test_unwrap_while_another_task_reads() -> None:
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(tls.next, 1)
        await holds(lambda: waits(tls))
        with pytest.raises(BusyResourceError):
            await tls.unwrap()
        await tls.send(b"nothing has ended")
        assert await peer.receive(17) == b"nothing has ended"
        await peer.send(b"x")


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "version"), [("tcp", "TLSv1.3"), ("unix", "TLSv1.2")])
async def test_both_ways_at_once(kind: str, version: str) -> None:
    there, back = pattern(3 * MIB + 17), pattern(3 * MIB + 5, seed=1)
    async with tls_pair(kind, version=version) as (client, server):
        got: dict[str, bytes] = {}

        async def receive(name: str, stream: TLSConnection, size: int) -> None:
            got[name] = await receive_exactly(stream, size)

        await both(
            partial(client.send, there),
            partial(server.send, back),
            partial(receive, "back", client, len(back)),
            partial(receive, "there", server, len(there)),
        )
        assert got == {"there": there, "back": back}
        assert server.statistics().bytes_received > len(there)


async def echo(stream: TLSConnection) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def test_with_anyios_own_stream() -> None:
    data = pattern(2 * MIB)
    async with secure(handler=echo) as server:
        stream = await anyio.connect_tcp(
            "127.0.0.1", server.port, tls=True, ssl_context=client_context()
        )

        async def receive() -> None:
            assert await receive_exactly(stream, len(data)) == data

        async with stream:
            await both(partial(stream.send, data), receive)
    assert server.statistics().handler_errors == 0


async def test_connect_tcp_gives_one() -> None:
    timeouts: Any = {"read_timeout": 30, "write_timeout": 31}
    async with secure(handler=echo) as server:
        stream = await anypoll.connect_tcp(
            "127.0.0.1", server.port, tls_hostname=NAME, ssl_context=client_context(), **timeouts
        )
        async with stream:
            assert type(stream) is TLSConnection
            assert (stream.read_timeout, stream.write_timeout) == (30, 31)
            stream.writer.write(b"line\nrest")
            assert await stream.until(b"\n") == b"line\n"
            assert await stream.next(4) == b"rest"


async def test_connect_tcp_tells_the_server_why_it_refuses() -> None:
    raised: list[BaseException | None] = []

    async def handler(conn: Connection) -> None:
        try:
            await handshake(conn, server_context(), 30)
        except BrokenResourceError as exc:
            raised.append(exc.__cause__)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            await anypoll.connect_tcp("127.0.0.1", server.port, tls=True)
        await holds(lambda: raised)
    assert "ALERT_UNKNOWN_CA" in str(raised[0])


# --- the reader ----------------------------------------------------------------------------------


async def test_reader_across_records() -> None:
    async with tls_and_peer() as (tls, peer):
        for part in (b"head", b"er\r", b"\nbody of ", b"it", b"tail"):
            await peer.send(part)
        reader = tls.reader
        assert reader is tls.reader
        assert bytes(await within(tls.peek(6))) == b"header"
        view = await within(tls.until(b"\r\n"))
        await within(tls.skip(5))
        assert await within(reader.read_str(5)) == "of it"
        assert await within(reader.read_byte()) == ord("t")
        room = bytearray(10)
        assert await within(reader.readinto(room)) == 3
        assert room[:3] == b"ail"
        assert bytes(view) == b"header\r\n"  # a view stays as it was
        await peer.send(pattern(50_000))
        parts = await within(reader.next_parts(40_000))
        rest = await within(reader.slice(10_000))
        assert b"".join(parts) + rest.to_bytes() == pattern(50_000)


async def test_receive_takes_from_the_readers_buffer() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"abcdefgh")
        assert bytes(await within(tls.next(2))) == b"ab"
        assert await within(tls.receive(3)) == b"cde"
        assert bytes(await within(tls.peek(1))) == b"f"
        assert await within(tls.receive()) == b"fgh"
        stream = as_receive_stream(tls.reader)
        await peer.send(b"ijk")
        assert await within(stream.receive()) == b"ijk"


async def test_reader_without_waiting() -> None:
    async with tls_and_peer() as (tls, peer):
        for function in (
            partial(tls.reader.peek_nowait, 1),
            partial(tls.reader.until_nowait, b"\n"),
        ):
            with pytest.raises(WouldBlock):
                function()
        record = peer.encrypted(b"a line\nmore")
        await send_all(peer.sock, record[:10])
        await holds(lambda: read_ahead(tls) in (0, 10))
        assert len(tls.reader) == 0
        await send_all(peer.sock, record[10:])
        await holds(lambda: len(tls.reader) == 11)  # it decrypts what has arrived
        assert bytes(tls.reader.until_nowait(b"\n")) == b"a line\n"
        tls.reader.skip_nowait(1)
        assert bytes(tls.reader.next_nowait(3)) == b"ore"
        with pytest.raises(WouldBlock):
            tls.reader.next_nowait(1)


async def test_what_arrived_is_decrypted_within_bounds() -> None:
    async with tls_and_peer() as (tls, peer):
        data = pattern(64 * KIB)
        await peer.send(data)
        sent = len(data)
        with anyio.move_on_after(0.5):
            while sent < 8 * MIB:
                await peer.send(data)
                sent += len(data)
                for _ in range(10):
                    len(tls.reader)
        high = tls.connection._core.limits.read_high_water
        assert len(tls.reader) <= high + 16 * KIB
        assert sent < 8 * MIB  # the kernel's buffers, and ours, are full
        parts = await within(tls.reader.next_parts(64 * KIB))
        assert b"".join(parts) == data


async def test_reader_limits_a_single_request() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"x" * 100)
        with pytest.raises(MessageTooLarge) as caught:
            await tls.next(2**30)
        assert is_normal(caught.value, tls) == "message_too_large"
        tls.read_timeout = 0
        with pytest.raises(ReadTimeout):  # so many would have been allowed
            await tls.skip(tls.connection._core.limits.read_limit)
        tls.read_timeout = None
        with pytest.raises(DelimiterNotFound) as missing:
            await within(tls.until(b"\n", max_bytes=50))
        assert is_normal(missing.value, tls) == "delimiter_not_found"
        assert len(await tls.next(100)) == 100


async def test_only_one_may_read_and_one_may_write() -> None:
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(tls.receive)
        await holds(lambda: waits(tls))
        for function in (tls.receive, partial(tls.next, 1), partial(tls.until, b"\n")):
            with pytest.raises(BusyResourceError):
                await function()
        with pytest.raises(BusyResourceError):
            tls.reader.next_nowait(1)
        tasks.start_soon(tls.send, bytes(4 * MIB))
        await holds(lambda: sends(tls))
        for send in (partial(tls.send, b"x"), tls.writer.flush, tls.send_eof):
            with pytest.raises(BusyResourceError):
                await send()
        await peer.send(b"enough")
        assert await peer.receive(4 * MIB) == bytes(4 * MIB)


async def test_who_asks_how_it_is_takes_no_wait_from_a_reader() -> None:
    async with tls_and_peer("tcp") as (tls, peer), blocked(tls.receive) as outcome:
        reset(peer.sock)
        with anyio.fail_after(60):
            while tls.is_active:  # asking makes the core look
                pass
        await holds(lambda: outcome)
    [error] = outcome
    assert isinstance(error, BrokenResourceError)
    assert isinstance(error.__cause__, ConnectionResetError)


async def test_calls_in_a_row_let_others_run() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(bytes(1000))
        await within(tls.peek(1000))
        calls = 0
        while not suspends(tls.next(1)):
            calls += 1
        budget = tls.connection._core.budget
        assert calls in (budget - 1, budget)  # the peek has used one up, or has suspended
        assert len(tls.reader) == 1000 - calls
        assert suspends(tls.receive(1))
        assert suspends(tls.send(b"x"))


# --- the writer ----------------------------------------------------------------------------------


async def test_pending_output_is_sent_when_the_reader_waits() -> None:
    async with tls_and_peer() as (tls, peer):
        writer = tls.writer
        assert writer is tls.writer
        before = tls.statistics().bytes_sent
        for n in range(100):
            writer.write(b"%03d" % n)
        assert len(writer) == 300
        assert arrived(peer.sock) == 0

        async def answer() -> None:
            assert await peer.receive(300) == b"".join(b"%03d" % n for n in range(100))
            await peer.send(b"thanks")

        async def wait() -> None:
            assert await tls.receive() == b"thanks"

        await both(answer, wait)
        assert tls.statistics().bytes_sent - before < 300 + 64  # in one record
        assert len(writer) == 0


async def test_send_goes_behind_what_is_pending_and_a_reservation_ends() -> None:
    async with tls_and_peer() as (tls, peer):
        tls.writer.write(b"first ")
        tls.writer.malloc(7)[:] = b"second "
        await tls.send(bytearray(b"third "))
        await as_send_stream(tls.writer).send(b"fourth ")
        tls.writer.write_str("fifth")
        await tls.writer.flush()
        assert await peer.receive(31) == b"first second third fourth fifth"
        await tls.send(b"")
        await tls.writer.flush()


async def test_a_reader_that_waits_leaves_an_open_reservation_alone() -> None:
    async with tls_and_peer() as (tls, peer):
        tls.writer.write(b"sent")
        memory = tls.writer.malloc(4)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tls.receive)
            assert await peer.receive(4) == b"sent"
            memory[:] = b"full"
            await tls.writer.flush()
            assert await peer.receive(4) == b"full"
            await peer.send(b"x")


@over_memory
async def test_what_is_written_while_another_task_sends_keeps_its_place() -> None:
    """Also if the reader waits already: nobody else would send it then. A native session leaves it
    to the next flush, as a connection does.
    """
    data = pattern(4 * MIB)
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(tls.receive)
        tasks.start_soon(tls.send, data)
        await holds(lambda: sends(tls) and tls.connection._core.queued() > 0)
        tls.writer.write(b"and this")
        assert await peer.receive(len(data) + 8) == data + b"and this"
        await peer.send(b"x")


async def test_what_is_pending_goes_out_when_a_claim_ends() -> None:
    """As a queue of many tasks makes one: see :mod:`anypoll.mux`."""
    async with tls_and_peer() as (tls, peer):
        tls.writer._core.claim()
        with pytest.raises(BusyResourceError):
            await tls.send(b"x")
        tls.writer.write(b"pending")
        tls.writer._core.release()
        assert await peer.receive(7) == b"pending"


async def test_output_above_high_water_drains_before_a_read() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"ab")
        assert bytes(await within(tls.next(1))) == b"a"
        data = pattern(2 * MIB)
        tls.writer.write(data)
        with anyio.move_on_after(0.05) as scope:
            await tls.next(1)  # it is there, but the peer does not read
        assert scope.cancelled_caught

        async def read() -> None:
            assert bytes(await tls.next(1)) == b"b"

        assert await received(peer, len(data), read) == data


async def test_a_peer_that_does_not_read_cannot_make_the_output_grow() -> None:
    async with tls_and_peer() as (tls, peer):
        high = tls.connection._core.limits.write_high_water
        most = 0

        async def serve() -> None:
            nonlocal most
            while True:
                await tls.next(1)
                tls.writer.write(bytes(10_000))
                most = max(most, len(tls.writer))

        async def flood() -> None:
            while True:  # until the socket is full
                await peer.send(b"x")
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            tasks.start_soon(flood)
            await holds(lambda: most >= high - 10_000)
            await anyio.sleep(0.2)  # time to grow on, if it could
            tasks.cancel_scope.cancel()
        assert high - 10_000 <= most < 2 * high


@over_memory
async def test_answers_of_openssl_cannot_grow_while_another_task_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As to a flood of requests to renegotiate, from a peer that does not read."""
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        engine, core = tls._session.engine, tls.connection._core
        high = core.limits.write_high_water
        monkeypatch.setattr(engine, "ssl", Answering(engine.ssl, engine._outgoing))
        tasks.start_soon(tls.send, bytes(8 * MIB))
        await holds(lambda: sends(tls) and core.queued() > 0)
        tasks.start_soon(tls.next, 2000)
        with anyio.move_on_after(0.3):
            for _ in range(1000):
                await peer.send(b"x")
        assert len(core.writer) < 8 * high  # of 10 MB
        assert len(engine.chain) < 1000
        tasks.cancel_scope.cancel()


class Answering(Instead):
    """It has much to say to each record."""

    def __init__(self, ssl_object: ssl.SSLObject, outgoing: ssl.MemoryBIO) -> None:
        super().__init__(ssl_object)
        self._outgoing = outgoing

    def read(self, size: int) -> bytes:
        data = self._ssl.read(size)
        self._outgoing.write(bytes(10_000))
        return data


@over_memory
async def test_a_write_that_must_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a renegotiation, which OpenSSL does not do any more by itself."""
    for reading in (False, True):
        async with tls_and_peer() as (tls, peer):
            wanted = Renegotiating(tls._session.engine.ssl)
            monkeypatch.setattr(tls._session.engine, "ssl", wanted)
            async with anyio.create_task_group() as tasks:
                if reading:
                    tasks.start_soon(tls.next, 4)
                    await holds(lambda: waits(tls))
                tasks.start_soon(tls.send, b"answer")
                await holds(partial(getattr, wanted, "refused"))
                await peer.send(b"more")
                assert await peer.receive(6) == b"answer"
            if not reading:
                assert bytes(await within(tls.next(4))) == b"more"


class Refusing(Instead):
    """It writes nothing before it has read, until it is told to."""

    refused = 0
    refuses = True

    def write(self, data: bytes) -> int:
        if self.refuses:
            self.refused += 1
            raise ssl.SSLWantReadError
        return self._ssl.write(data)


class Renegotiating(Refusing):
    """One that has read what it needs when it is asked again."""

    def write(self, data: bytes) -> int:
        self.refuses = not self.refused
        return super().write(data)


@over_memory
@pytest.mark.parametrize("compatible", [True, False])
async def test_a_write_that_must_read_first_finds_the_end(
    compatible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_and_peer(compatible=compatible) as (tls, peer):
        monkeypatch.setattr(tls._session.engine, "ssl", Refusing(tls._session.engine.ssl))
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenResourceError) as caught:
            await within(tls.send(b"x"))
        assert isinstance(caught.value.__cause__, ssl.SSLEOFError)


@over_memory
@pytest.mark.parametrize(
    "pending", [(), (b"",), (b"pending",), (pattern(MIB), b"")], ids=["none", "0", "7", "1 MiB"]
)
async def test_an_item_that_is_given_up_before_it_was_encrypted_is_not_sent(
    pending: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tls_and_peer() as (tls, peer):
        refusing = Refusing(tls._session.engine.ssl)
        monkeypatch.setattr(tls._session.engine, "ssl", refusing)
        for piece in pending:
            tls.writer.write(piece)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tls.send, bytes(300_000))
            await holds(lambda: waits(tls))
            tasks.cancel_scope.cancel()
        refusing.refuses = False
        expected = b"".join(pending) + b"end"
        assert await received(peer, len(expected), partial(tls.send, b"end")) == expected


async def test_a_flush_that_is_given_up_copies_what_the_caller_may_change() -> None:
    data = bytearray(pattern(4 * MIB))
    expected = b"head" + bytes(data) + b"end"
    async with tls_and_peer() as (tls, peer):
        tls.writer.malloc(4)[:] = b"head"
        tls.writer.write_direct(data, 0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tls.writer.flush)
            await holds(lambda: tls.connection._core.queued() > 0)
            tasks.cancel_scope.cancel()
        data[:] = bytes(len(data))
        assert await received(peer, len(expected), partial(tls.send, b"end")) == expected


# --- timeouts ------------------------------------------------------------------------------------

READS: dict[str, Callable[[TLSConnection], Awaitable[Any]]] = {
    "receive": lambda tls: tls.receive(),
    "next": lambda tls: tls.next(10),
    "peek": lambda tls: tls.peek(10),
    "skip": lambda tls: tls.skip(10),
    "until": lambda tls: tls.until(b"\n"),
    "parts": lambda tls: tls.reader.next_parts(10),
    "readinto": lambda tls: tls.reader.readinto(bytearray(10)),
}


@pytest.mark.parametrize("name", READS)
async def test_read_timeout_and_then_on(name: str) -> None:
    async with tls_and_peer() as (tls, peer):
        tls.read_timeout = 0.02
        few = name not in ("receive", "readinto")
        if few:
            await peer.send(b"begun")
            await holds(lambda: len(tls.reader) == 5)
        for _ in range(3):
            with pytest.raises(ReadTimeout, match="not received within") as caught:
                await READS[name](tls)
            assert is_normal(caught.value, tls) == "read_timeout"
        tls.read_timeout = None
        await peer.send(b"more\n")
        assert bytes(await within(tls.next(10 if few else 5))) == (
            b"begunmore\n" if few else b"more\n"
        )
        await tls.send(b"still good")
        assert await peer.receive(10) == b"still good"


async def test_a_timeout_is_for_the_whole_call() -> None:
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        tls.read_timeout = 0.3

        async def trickle() -> None:
            while True:
                await peer.send(b"x")
                await anyio.sleep(0.02)

        tasks.start_soon(trickle)
        with pytest.raises(ReadTimeout):
            await within(tls.until(b"\n"))
        tasks.cancel_scope.cancel()


async def test_outer_scopes_win_over_a_timeout() -> None:
    async with tls_and_peer() as (tls, _peer):
        tls.read_timeout = tls.write_timeout = 30
        for call in (partial(tls.next, 1), tls.receive, partial(tls.send, bytes(8 * MIB))):
            with anyio.move_on_after(0.02) as scope:
                await call()
            assert scope.cancelled_caught


async def test_no_time_at_all_is_enough_for_what_is_there() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"there")
        await holds(lambda: len(tls.reader) == 5)
        tls.read_timeout = 0
        assert bytes(await tls.next(5)) == b"there"
        with pytest.raises(ReadTimeout):
            await tls.next(1)
        tls.read_timeout = 1e300
        await peer.send(b"x")
        assert await within(tls.receive()) == b"x"


async def test_output_that_does_not_drain_is_a_read_timeout() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"ab")
        assert bytes(await within(tls.next(1))) == b"a"
        tls.read_timeout = 0.02
        tls.writer.write(bytes(2 * MIB))
        with pytest.raises(ReadTimeout, match="drain"):
            await tls.next(1)  # it is there


async def test_write_timeout_and_then_on() -> None:
    data = pattern(4 * MIB)
    async with tls_and_peer() as (tls, peer):
        tls.write_timeout = 0.5
        buffer = bytearray(data)
        with pytest.raises(WriteTimeout, match="not sent within") as caught:
            await tls.send(buffer)
        assert is_normal(caught.value, tls) == "write_timeout"
        buffer[:] = bytes(len(buffer))  # the caller may: its rest was copied
        tls.writer.write(b"written")
        with pytest.raises(WriteTimeout):
            await tls.writer.flush()
        with pytest.raises(WriteTimeout):
            await tls.send(b"nothing of this was encrypted")
        tls.write_timeout = None
        expected = data + b"written" + b"end"
        assert await received(peer, len(expected), partial(tls.send, b"end")) == expected


async def test_the_rest_of_a_send_that_was_given_up_goes_out_by_itself() -> None:
    data = pattern(4 * MIB)
    async with tls_and_peer() as (tls, peer):
        await give_up(tls, data)
        assert await peer.receive(len(data)) == data
        await tls.send(b"next")
        assert await peer.receive(4) == b"next"


async def test_two_ends_that_have_given_up_do_not_wait_for_each_other() -> None:
    there, back = pattern(3 * MIB), pattern(3 * MIB, seed=1)
    async with tls_pair() as (client, server):
        for stream, data in ((client, there), (server, back)):
            await give_up(stream, data)

        async def receive(stream: TLSConnection, data: bytes) -> None:
            assert await receive_exactly(stream, len(data)) == data

        await both(partial(receive, server, there), partial(receive, client, back))


async def test_a_send_that_is_cancelled_at_once_sends_nothing() -> None:
    async with tls_and_peer() as (tls, peer):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await tls.send(b"nothing of this")
        await tls.send(b"but this")
        assert await peer.receive(8) == b"but this"


@pytest.mark.parametrize("seed", range(2))
async def test_cancellations_at_random_lose_nothing(seed: int) -> None:
    """What was given up is there all or not at all, and in order; nothing else is missing."""
    rng = random.Random(seed)
    items = [bytes([n % 251]) * rng.choice([1, 100, 5000, 300_000]) for n in range(120)]
    async with tls_pair(rng.choice(["unix", "tcp"])) as (client, server):
        given_up: set[int] = set()
        framed = [
            len(item).to_bytes(4, "big") + n.to_bytes(4, "big") + item
            for n, item in enumerate(items)
        ]
        done = anyio.Event()
        seen: list[int] = []

        async def send() -> None:
            for n, frame in enumerate(framed):
                with anyio.move_on_after(rng.choice([None, 0, 0.0002, 0.001, 0.01])) as scope:
                    await client.send(frame)
                if scope.cancelled_caught:
                    given_up.add(n)
            await client.send(bytes(8))

        async def try_to_read(n: int) -> memoryview:
            while True:
                with anyio.move_on_after(rng.choice([None, 0.0002, 0.001, 0.01])):
                    return await server.next(n)

        async def receive() -> None:
            while True:
                size = int.from_bytes(await try_to_read(4), "big")
                n = int.from_bytes(await try_to_read(4), "big")
                if not size:
                    break
                assert bytes(await try_to_read(size)) == items[n]
                seen.append(n)
            done.set()

        await both(send, receive)
        assert seen == sorted(seen)
        assert set(range(len(items))) - set(seen) <= given_up


# --- the end of the stream -----------------------------------------------------------------------


@pytest.mark.parametrize("compatible", [True, False])
async def test_end_of_stream_after_close_notify(compatible: bool) -> None:
    async with tls_and_peer(compatible=compatible) as (tls, peer):
        await send_all(peer.sock, peer.encrypted(b"rest") + peer.close_notify())
        with pytest.raises(IncompleteRead) as caught:
            await within(tls.next(5))
        assert is_normal(caught.value, tls) == "incomplete"
        assert not tls.at_eof
        assert bytes(await tls.next(4)) == b"rest"
        assert tls.at_eof
        for _ in range(2):
            for call in (tls.receive, partial(tls.next, 1), partial(tls.until, b"\n")):
                with pytest.raises(EndOfStream) as ended:
                    await call()
                assert is_normal(ended.value, tls) == "eof"
        with pytest.raises(EndOfStream):
            tls.reader.next_nowait(1)
        assert tls.is_active
        await tls.send(b"half-close is not close")
        assert await peer.receive(23) == b"half-close is not close"


@pytest.mark.parametrize("how", ["FIN", "garbage", "bad mac", "reset", "reset while it sends"])
async def test_a_break(how: str) -> None:
    """Every call is told of it from then on, but what has arrived can be read."""
    async with tls_and_peer("tcp") as (tls, peer):
        if how == "FIN":
            await peer.send(b"rest")
            peer.sock.shutdown(socket.SHUT_WR)
        elif "reset" in how:
            reset(peer.sock)
        else:
            rest, record = peer.encrypted(b"rest"), bytearray(peer.encrypted(b"x" * 100))
            if how == "garbage":
                record[:] = pattern(len(record))
            else:
                record[50] ^= 1
            await send_all(peer.sock, rest + record)
        with pytest.raises(BrokenResourceError) as caught:
            await within(tls.send(bytes(8 * MIB)) if "sends" in how else tls.next(5))
        cause = ConnectionError if "reset" in how else ssl.SSLError
        assert isinstance(caught.value.__cause__, cause)
        assert is_normal(caught.value, tls) == "broken"
        assert not tls.is_active
        if "reset" not in how:
            assert bytes(await tls.next(4)) == b"rest"
        for call in (tls.receive, partial(tls.send, b"x"), tls.writer.flush):
            with pytest.raises(BrokenResourceError):
                await call()
        with pytest.raises(BrokenResourceError):
            tls.writer.write(b"x")
        if how in ("garbage", "bad mac"):
            with pytest.raises(ssl.SSLError, match="ALERT"):
                await within(peer.call(peer.ssl.read, 1))


async def test_an_end_without_close_notify_is_one_if_that_is_allowed() -> None:
    async with tls_and_peer(compatible=False) as (tls, peer):
        await peer.send(b"rest")
        peer.sock.shutdown(socket.SHUT_WR)
        assert await within(tls.receive()) == b"rest"
        await holds(lambda: tls.at_eof)
        with pytest.raises(EndOfStream) as caught:
            await within(tls.receive())
        assert is_normal(caught.value, tls) == "eof"
        await tls.send(b"can still be sent")
        assert await peer.receive(17) == b"can still be sent"


async def test_what_is_no_tls_is_also_why_another_task_cannot_send() -> None:
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        causes: list[BaseException | None] = []

        async def send() -> None:
            with pytest.raises(BrokenResourceError) as caught:
                await tls.send(bytes(8 * MIB))
            causes.append(caught.value.__cause__)

        tasks.start_soon(send)
        await holds(lambda: tls.connection._core.queued() > 0)
        await send_all(peer.sock, pattern(100))
        with pytest.raises(BrokenResourceError) as caught:
            await within(tls.receive())
        if not tls.extra(AnypollAttribute.tls_native):  # it tells the peer why, behind all else
            with suppress(ssl.SSLError):
                await peer.receive(8 * MIB)
        await holds(lambda: causes)
        assert causes == [caught.value.__cause__]
        with pytest.raises(BrokenResourceError) as again:
            await tls.receive()
        assert again.value.__cause__ is caught.value.__cause__


async def test_the_idle_timeout_of_the_connection() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"read ahead")
        await holds(lambda: len(tls.reader) == 10)
        tls.idle_timeout = 0.05
        await holds(lambda: not tls.is_active)
        assert bytes(await tls.next(10)) == b"read ahead"
        for call in (tls.receive, partial(tls.send, b"x")):
            with pytest.raises(anypoll.IdleTimeout) as caught:
                await call()
            assert is_normal(caught.value, tls) == "idle_timeout"


async def test_half_close() -> None:
    async with tls_and_peer() as (tls, peer):
        await peer.send(b"read ahead")
        await holds(lambda: read_ahead(tls) > 0)
        tls.writer.write(b"request")
        await tls.send_eof()
        await tls.send_eof()
        assert await peer.receive(100) == b"request"
        for call in (partial(tls.send, b"x"), tls.writer.flush):
            with pytest.raises(ClosedResourceError) as caught:
                await call()
            assert is_normal(caught.value, tls) == "closed"
        await peer.send(b" answer")
        assert bytes(await within(tls.next(17))) == b"read ahead answer"
        await send_all(peer.sock, peer.close_notify())
        with pytest.raises(EndOfStream):
            await within(tls.receive())
        await within(tls.aclose())


async def test_half_close_sends_what_is_written_until_then() -> None:
    data = pattern(4 * MIB)
    async with tls_and_peer() as (tls, peer), anyio.create_task_group() as tasks:
        tls.writer.write(data)
        tasks.start_soon(tls.send_eof)
        await holds(lambda: tls.connection._core.queued() > 0)
        tls.writer.write(b"and this")
        assert await peer.receive(len(data) + 100) == data + b"and this"
        await peer.send(b"answer")
        assert await within(tls.receive()) == b"answer"


async def test_there_is_no_half_close_below_tls_1_3() -> None:
    async with tls_pair(version="TLSv1.2") as (client, server):
        with pytest.raises(NotImplementedError, match=r"TLSv1\.3"):
            await client.send_eof()
        await client.send(b"still good")
        assert await within(server.receive()) == b"still good"


# --- closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_close_sends_what_is_pending_and_a_close_notify(version: str) -> None:
    async with tls_pair("tcp", version=version) as (client, server):
        client.writer.write(b"last words")

        async def serve() -> None:
            assert await server.receive() == b"last words"
            with pytest.raises(EndOfStream):
                await server.receive()
            await server.aclose()

        await both(client.aclose, serve)
        for stream in (client, server):
            assert stream.connection.fileno() == -1
            assert not stream.is_active
            await stream.aclose()
            for call in (stream.receive, partial(stream.send, b"x"), partial(stream.next, 1)):
                with pytest.raises(ClosedResourceError) as caught:
                    await call()
                assert is_normal(caught.value, stream) == "closed"
            with pytest.raises(ClosedResourceError):
                stream.writer.write(b"x")
            assert stream.statistics().bytes_sent > 0


@pytest.mark.parametrize("timeout", [None, 0.05, 0])
async def test_close_does_not_hang_on_a_silent_peer(
    timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anypoll._tls.session.CLOSE_TIMEOUT", 0.05)
    async with tls_and_peer() as (tls, peer):
        tls.write_timeout = timeout
        tls.writer.write(b"last words")
        await within(tls.aclose())
        assert tls.connection.fileno() == -1
        assert await peer.receive(100) == b"last words"
        assert await read_to_end(peer.sock) == b""


@pytest.mark.parametrize(
    ("peer_ends", "compatible"),
    [("reset", True), ("FIN", True), ("data", True), ("data", False)],
)
async def test_what_the_peer_does_in_a_closing_handshake_is_no_error(
    peer_ends: str, compatible: bool
) -> None:
    async with tls_and_peer("tcp", compatible=compatible) as (tls, peer):

        async def end() -> None:
            await anyio.wait_readable(peer.sock)
            if peer_ends == "reset":
                reset(peer.sock)
            elif peer_ends == "FIN":
                peer.sock.close()
            else:
                with suppress(OSError):  # it may be gone already
                    for _ in range(100):
                        await peer.send(pattern(10_000))
                    await send_all(peer.sock, peer.close_notify())

        await both(end, tls.aclose)
        assert tls.connection.fileno() == -1


@pytest.mark.parametrize("reads", [True, False])
async def test_close_does_not_listen_for_ever(reads: bool) -> None:
    """The peer streams on, and its end never comes. What was read ahead costs nothing more."""
    async with tls_and_peer("tcp") as (tls, peer), anyio.create_task_group() as tasks:

        async def stream() -> None:
            with suppress(ConnectionError):
                while True:
                    await peer.send(bytes(16 * KIB))

        tasks.start_soon(stream)
        if reads:
            await tls.next(100 * KIB)
        else:
            await holds(lambda: read_ahead(tls) > 100 * KIB)
        before = tls.statistics().bytes_received
        await within(tls.aclose())
        high = tls.connection._core.limits.read_high_water
        # A thread may read up to the mark before anything is discarded, and once more after that.
        assert tls.statistics().bytes_received - before <= 2 * (high + CLOSE_MOST)


async def test_close_without_waiting_if_that_is_allowed() -> None:
    async with tls_and_peer(compatible=False) as (tls, peer):
        tls.writer.write(b"last words")
        await within(tls.aclose())
        assert await peer.receive(100) == b"last words"  # and a close_notify, without an answer


@pytest.mark.parametrize("how", ["forcefully", "cancelled", "in time", "natively"])
async def test_close_that_is_cancelled_closes(how: str) -> None:
    async with tls_and_peer() as (tls, _peer):
        ended: list[str] = []
        tls.add_close_callback(lambda: ended.append("called"))
        with anyio.CancelScope() as scope:
            if how == "forcefully":
                await anyio.aclose_forcefully(tls)
            elif how == "cancelled":
                scope.cancel()
                await tls.aclose()
            elif how == "in time":
                scope.deadline = anyio.current_time() + 0.05
                await tls.aclose()
            else:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(tls.aclose)
                    await holds(lambda: waits(tls))
                    tasks.cancel_scope.cancel()
        assert tls.connection.fileno() == -1
        assert ended == ["called"]


@pytest.mark.parametrize("how", ["aclose", "abort", "second aclose"])
async def test_close_ends_the_waits_of_others(how: str) -> None:
    async with tls_and_peer() as (tls, _peer):
        raised: list[Exception] = []

        async def wait(function: Callable[[], Awaitable[Any]]) -> None:
            try:
                await function()
            except ClosedResourceError as exc:
                raised.append(exc)

        tls.write_timeout = 30
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, tls.receive)
                await holds(lambda: waits(tls))
                if how == "second aclose":
                    tasks.start_soon(tls.aclose)  # waits for an answer
                    await holds(lambda: has_said_goodbye(tls))
                    await holds(lambda: raised)
                    for call in (tls.receive, partial(tls.send, b"x")):
                        with pytest.raises(ClosedResourceError):
                            await within(call())
                else:
                    tasks.start_soon(wait, partial(tls.send, bytes(8 * MIB)))
                    await holds(lambda: sends(tls))
                if how == "abort":
                    tls.abort()
                    tls.abort()
                else:
                    await tls.aclose()
        assert len(raised) == (1 if how == "second aclose" else 2)
        assert all(is_normal(exc, tls) == "closed" for exc in raised)
        assert tls.connection.fileno() == -1


async def test_close_does_not_wait_for_what_was_given_up() -> None:
    async with tls_and_peer() as (tls, peer):
        tls.write_timeout = 60
        await give_up(tls, bytes(8 * MIB))
        with anyio.fail_after(30):
            await tls.aclose()
        with pytest.raises(ssl.SSLError):  # the peer can tell that it is torn
            await peer.receive(8 * MIB)


async def test_close_waits_for_what_was_written_behind_what_was_given_up() -> None:
    """Also when the same records carry both."""
    data = pattern(100_000)
    async with tls_and_peer(compatible=False) as (tls, peer):
        core = tls.connection._core
        core.raw_socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * KIB)
        await give_up(tls, data)
        tls.writer.write(b"end")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tls.receive)
            await holds(lambda: waits(tls))  # which sends what is pending
            tasks.cancel_scope.cancel()
        while core.queued() > 30_000:  # less than all that follows the first 64 KiB
            with suppress(BlockingIOError):
                peer.incoming.write(peer.sock.recv(KIB))
            await anyio.lowlevel.checkpoint()
        assert core.queued() > 0
        assert await received(peer, len(data) + 4, tls.aclose) == data + b"end"


async def test_close_callbacks_are_given_the_stream() -> None:
    async with tls_and_peer() as (tls, _peer):
        called: list[Any] = []

        async def asynchronous(stream: TLSConnection) -> None:
            await anyio.lowlevel.checkpoint()
            called.append(stream)

        tls.write_timeout = 0
        tls.add_close_callback(lambda: called.append("plain"))
        tls.add_close_callback(called.append)
        tls.add_close_callback(asynchronous)
        for wrong in (None, lambda a, b: None):
            with pytest.raises(TypeError, match="a close callback must"):
                tls.add_close_callback(wrong)  # type: ignore[arg-type]
        await tls.aclose()
        assert called == [tls, tls, "plain"]
        called.clear()


async def test_the_state_is_the_connections() -> None:
    async with tls_and_peer() as (tls, _peer):
        assert tls.state is None
        tls.state = "mine"
        assert tls.connection.state == "mine"
        assert tls.server is None

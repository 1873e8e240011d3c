"""Request mode over TLS: records and requests, calls and their answers, segment by segment."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from anyio.abc import SocketAttribute
from peers import KIB, MIB, holds, pattern, read_all, reset, send_all, stalled, within
from serving import all_is_accounted_for, connected, ends, errors, local  # noqa: F401
from tls_peers import Instead, Peer, has_begun
from tls_serving import MODES, echo, echo_line, rest, secure, talking

import anypoll
from anypoll import TLSConnection

pytestmark = pytest.mark.anyio


async def is_idle(server: anypoll.Server) -> None:
    """Until the one connection, in request mode, waits for ciphertext."""

    def idle() -> bool:
        connections = server.connections
        return len(connections) == 1 and connections[0]._connection._core.requests.idle

    await holds(lambda: server.connections and type(server.connections[0]) is TLSConnection)
    await holds(idle)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [1, 2, 100])
async def test_requests_in_one_record_or_over_several(mode: str, pieces: int) -> None:
    data = b"".join(b"line %d\n" % number for number in range(300))
    async with secure(**echo(mode)) as server, talking(server) as peer:
        size = len(data) // pieces + 1
        records = b"".join(
            peer.encrypted(data[start : start + size]) for start in range(0, len(data), size)
        )
        await send_all(peer.sock, records[:-7])
        await send_all(peer.sock, records[-7:])
        assert await peer.receive(len(data)) == data


@pytest.mark.parametrize("mode", MODES)
async def test_requests_that_come_with_the_last_flight_of_the_handshake(mode: str) -> None:
    async with secure(**echo(mode)) as server:
        with connected(server) as sock:
            peer = Peer(sock)
            with suppress(ssl.SSLWantReadError):
                peer.ssl.do_handshake()
            await send_all(sock, peer.outgoing.read())
            while True:
                await within(peer.more())
                try:
                    peer.ssl.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                break
            peer.ssl.write(b"one\ntwo\n")
            await send_all(sock, peer.outgoing.read())
            assert await peer.receive(8) == b"one\ntwo\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["close_notify", "close_notify, FIN", "FIN"])
async def test_input_that_comes_with_the_end_is_answered(mode: str, end: str) -> None:
    async with secure(**echo(mode)) as server:
        async with talking(server) as peer:
            last = peer.encrypted(b"last\n")
            if "close_notify" in end:
                last += peer.close_notify()
            await send_all(peer.sock, last)
            if "FIN" in end:
                peer.sock.shutdown(socket.SHUT_WR)
            if end == "FIN":
                await ends(server, broken=1)
            else:
                assert await rest(peer) == b"last\n"
        if end != "FIN":
            await ends(server, eof=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("end", ["FIN", "RST", "a record cut off", "no TLS", "half a request"])
async def test_ends_that_a_peer_can_cause(mode: str, end: str) -> None:
    async with secure(write_timeout=3600, **echo(mode)) as server, talking(server) as peer:
        await peer.send(b"one\n")
        assert await peer.receive(4) == b"one\n"
        if end == "RST":
            reset(peer.sock)
        else:
            if end == "no TLS":
                await send_all(peer.sock, b"\x17\x03\x03\x00\x20" + bytes(32))
            elif end == "a record cut off":
                await send_all(peer.sock, peer.encrypted(b"two\n")[:-1])
            elif end == "half a request":
                await send_all(peer.sock, peer.encrypted(b"tw") + peer.close_notify())
            peer.sock.shutdown(socket.SHUT_WR)
        await ends(server, **{"incomplete" if end == "half a request" else "broken": 1})


async def test_a_call_that_consumes_nothing_is_made_again_only_for_more() -> None:
    seen: list[int] = []

    async def function(stream: TLSConnection) -> None:
        seen.append(len(stream.reader))
        if seen[-1] >= 4:
            stream.writer.write(bytes(await stream.next(4)))

    async with secure(on_request=function) as server, talking(server) as peer:
        await peer.send(b"ab")
        await holds(lambda: seen)
        await is_idle(server)
        record = peer.encrypted(b"cd")
        received = server.connections[0].statistics().bytes_received
        await send_all(peer.sock, record[:12])  # no plaintext: no call
        await holds(lambda: server.connections[0].statistics().bytes_received == received + 12)
        await is_idle(server)
        assert seen == [2]
        await send_all(peer.sock, record[12:])
        assert await peer.receive(4) == b"abcd"
        assert seen == [2, 4]


async def test_more_than_high_water_is_still_news() -> None:
    size = 200 * KIB

    async def function(stream: TLSConnection) -> None:
        if len(stream.reader) >= size:
            stream.writer.write(bytes(await stream.next(size)))

    async with (
        secure(on_request=function, read_high_water=16 * KIB, read_limit=MIB) as server,
        talking(server) as peer,
    ):
        data = pattern(size)
        for start in range(0, size, 10 * KIB):
            await peer.send(data[start : start + 10 * KIB])
        assert await peer.receive(size) == data


async def test_what_calls_leave_unread_is_limited() -> None:
    async def function(_stream: TLSConnection) -> None:
        pass

    options = {"read_high_water": 16 * KIB, "read_limit": 32 * KIB}
    async with secure(on_request=function, **options) as server, talking(server) as peer:
        with suppress(ConnectionError):
            for _ in range(20):
                await peer.send(bytes(4 * KIB))
        await ends(server, message_too_large=1)


async def test_what_was_consumed_is_not_what_is_left_unread() -> None:
    """Also if it lies in the same record, and more comes while the call runs that takes nothing."""
    seen: list[int] = []
    go_on = anyio.Event()

    async def function(stream: TLSConnection) -> None:
        seen.append(len(stream.reader))
        if len(seen) == 1:
            await stream.next(800)
        elif len(seen) == 2:
            await go_on.wait()
        else:
            stream.writer.write(bytes(await stream.next(600)))

    async with secure(on_request=function, read_limit=1000) as server, talking(server) as peer:
        await peer.send(bytes(900))
        await holds(lambda: len(seen) == 2)
        before = server.connections[0].statistics().bytes_received
        await peer.send(bytes(500))
        await holds(lambda: server.connections[0].statistics().bytes_received > before)
        go_on.set()
        assert await peer.receive(600) == bytes(600)
    assert seen == [900, 100, 600]


async def test_answers_go_out_together_or_when_a_call_waits() -> None:
    go_on = anyio.Event()

    async def function(stream: TLSConnection) -> None:
        line = bytes(await stream.until(b"\n"))
        if line == b"wait\n":
            await go_on.wait()
        stream.writer.write(line)

    async with secure(on_request=function) as server, talking(server) as peer:
        await is_idle(server)
        writes = server.connections[0].statistics().writes
        await peer.send(b"x\n" * 50)
        assert await peer.receive(100) == b"x\n" * 50
        assert server.connections[0].statistics().writes == writes + 1
        await peer.send(b"one\ntwo\nwait\n")
        assert await peer.receive(8) == b"one\ntwo\n"
        go_on.set()
        assert await peer.receive(5) == b"wait\n"


@pytest.mark.parametrize(
    ("who", "tls_way"),
    [
        ("calls", "memory"),
        ("calls", "native"),
        ("OpenSSL", "memory"),
        ("OpenSSL, reset", "memory"),
    ],
    indirect=["tls_way"],
)
async def test_output_stays_bounded_while_the_peer_does_not_read(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is OpenSSL that answers: to a flood of key updates, say, which are no requests."""

    async def function(stream: TLSConnection) -> None:
        await stream.skip(1)
        stream.writer.write(bytes(3000))

    async with (
        secure(on_request=function, write_high_water=64 * KIB) as server,
        talking(server) as peer,
    ):
        await is_idle(server)
        [stream] = server.connections
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        raw_socket = stream.extra(SocketAttribute.raw_socket)
        raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        if who != "calls":
            engine = stream._session.engine
            monkeypatch.setattr(engine, "ssl", Answering(engine.ssl, engine._outgoing))
        count = 500 if who == "calls" else 15_000
        await send_all(peer.sock, b"".join([peer.encrypted(b"x") for _ in range(count)]))
        await stalled(stream.connection)
        assert len(stream.writer) < 512 * KIB
        if who == "OpenSSL, reset":
            reset(peer.sock)
            await ends(server, broken=1)
            return
        read = peer.receive if who == "calls" else partial(read_all, peer.sock)
        answers = await within(read(1_500_000))  # raw ones come behind the tickets
        assert answers.endswith(bytes(1_400_000))


async def test_output_that_does_not_drain_is_a_read_timeout() -> None:
    async def function(stream: TLSConnection) -> None:
        await stream.skip(1)
        stream.writer.write(bytes(4 * MIB))

    async with secure(on_request=function, read_timeout=0.02) as server, talking(server) as peer:
        await peer.send(b"xx")
        await ends(server, read_timeout=1)


async def test_what_is_unread_may_be_asked_while_it_waits_for_requests() -> None:
    async with secure(**echo("on_request")) as server, talking(server):
        await is_idle(server)
        [stream] = server.connections
        assert len(stream.reader) == 0
        assert not stream.at_eof


class Answering(Instead):
    """To it all input is some message of TLS, which it answers at length."""

    def __init__(self, ssl_object: ssl.SSLObject, outgoing: ssl.MemoryBIO) -> None:
        super().__init__(ssl_object)
        self._outgoing = outgoing

    def read(self, size: int) -> bytes:
        while True:
            self._ssl.read(size)
            self._outgoing.write(bytes(100))


async def test_others_get_their_turn_beside_calls_that_never_wait() -> None:
    """All that the first peer has sent is there, and its calls do not suspend."""
    turns: list[int] = []
    stop = anyio.Event()

    async def function(stream: TLSConnection) -> None:
        stream.reader.skip_nowait(1)
        turns.append(1)

    async def other() -> None:
        while not turns:
            await anyio.sleep(0)
        turns.append(2)
        stop.set()

    async with (
        secure(on_request=function) as server,
        talking(server) as peer,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(other)
        await peer.send(bytes(2000))
        await within(stop.wait())
        await holds(lambda: len(turns) == 2001)
        assert turns.index(2) < 1000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["of a record", "of a request"])
async def test_a_shutdown_leaves_half_a_request_its_time(mode: str, part: str) -> None:
    async def only_whole_ones(stream: TLSConnection) -> None:
        if len(stream.reader) >= 4:
            await echo_line(stream)

    what: Any = echo(mode) if mode == "handler" else {mode: only_whole_ones}
    async with (
        secure(**what, shutdown_timeout=1000) as server,
        talking(server) as peer,
        anyio.create_task_group() as tasks,
    ):
        await peer.send(b"one\n")
        assert await peer.receive(4) == b"one\n"
        [stream] = server.connections
        if part == "of a record":
            whole = peer.encrypted(b"two\n")
            first, second = whole[:9], whole[9:]
        else:
            first, second = peer.encrypted(b"tw"), peer.encrypted(b"o\n")
        received = stream.statistics().bytes_received
        await send_all(peer.sock, first)
        await holds(lambda: stream.statistics().bytes_received == received + len(first))
        await holds(lambda: has_begun(stream))
        if mode == "on_request":
            await is_idle(server)
        tasks.start_soon(server.shutdown)
        await within(server.wait_shutting_down())
        await send_all(peer.sock, second)
        assert await rest(peer) == b"two\n"
    assert dict(server.statistics().closed) == {"eof": 1}


@pytest.mark.parametrize("when", ["idle", "in a call"])
async def test_a_close_awaits_the_end_of_the_peer(when: str) -> None:
    """Also if no task has the connection, or a call that is running does not take it amiss."""
    called, go_on, gone_on = anyio.Event(), anyio.Event(), anyio.Event()

    async def function(stream: TLSConnection) -> None:
        await stream.next(1)
        called.set()
        if when != "idle":
            await go_on.wait()
            with suppress(ClosedResourceError):
                await stream.next(1)
            gone_on.set()

    async with secure(on_request=function) as server, talking(server) as peer:
        await is_idle(server)
        stream = server.connections[0]
        stream.write_timeout = 3600
        if when != "idle":
            await peer.send(b"x")
            await holds(called.is_set)
        stream.writer.write(b"last words")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.aclose)
            assert await rest(peer) == b"last words"
            if when != "idle":
                go_on.set()
                await within(gone_on.wait())
            await anyio.wait_all_tasks_blocked()
            assert server.statistics().active == 1
            await send_all(peer.sock, peer.encrypted(b"too late") + peer.close_notify())
        await ends(server, closed=1)


async def test_the_end_of_an_idle_connection_can_be_cut_short() -> None:
    async with secure(**echo("on_request")) as server, talking(server) as peer:
        await is_idle(server)
        stream = server.connections[0]
        stream.write_timeout = 3600
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.aclose)
            assert await rest(peer) == b""
            await stream.aclose()
        await ends(server, closed=1)

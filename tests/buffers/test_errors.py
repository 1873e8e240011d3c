"""Ends that a peer can cause, whatever call of ours its doing comes out of: they are counted under
their reason and not logged. What only the program can cause is an error.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from certificates import client_context, server_context
from peers import KIB, MIB, holds, reset, send_all
from serving import all_is_accounted_for, connected, errors  # noqa: F401
from tls_peers import Peer

import anypoll
from anypoll import Connection, TLSConnection
from anypoll.mux import ShardQueue
from anypoll.nocopy import as_receive_stream, as_send_stream, wrap_reader, wrap_writer

pytestmark = pytest.mark.anyio

Call = Callable[[Any], Awaitable[Any]]
Does = Callable[[socket.socket], Awaitable[Any]]


# --- what the peer does --------------------------------------------------------------------------


async def nothing(sock: socket.socket) -> None:
    """It is silent, and takes nothing."""


async def ends(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


async def resets(sock: socket.socket) -> None:
    reset(sock)


def sends(data: bytes, *, end: bool = False) -> Does:
    async def send(sock: socket.socket) -> None:
        await send_all(sock, data)
        if end:
            sock.shutdown(socket.SHUT_WR)

    return send


def in_tls(then: Callable[[Peer], Awaitable[Any]], version: str = "TLSv1_3") -> Does:
    async def do(sock: socket.socket) -> None:
        context = client_context()
        context.maximum_version = ssl.TLSVersion[version]
        peer = Peer(sock, context)
        await peer.shake_hands()
        await then(peer)

    return do


async def distrusts(sock: socket.socket) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        await Peer(sock, ssl.create_default_context()).shake_hands()


def says(data: bytes) -> Does:
    return in_tls(lambda peer: peer.send(data))


# --- what our calls make of it -------------------------------------------------------------------


def timed(name: str, call: Call) -> Call:
    async def do(conn: Connection) -> None:
        setattr(conn, name, 0.01)
        await call(conn)

    return do


def over(wrap: Callable[[Any], Any], call: Call) -> Call:
    """``call`` of a reader, a writer, or a stream over the connection."""
    return lambda conn: call(wrap(conn))


def tls(call: Call | None = None, **options: Any) -> Call:
    async def do(conn: Connection) -> None:
        stream = await TLSConnection.wrap(
            conn, server_side=True, ssl_context=server_context(), **options
        )
        if call is not None:
            await call(stream)

    return do


def grouped(call: Call) -> Call:
    async def do(conn: Connection) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, conn)

    return do


async def receive(conn: Any) -> None:
    await conn.receive()


async def write(writer: Any) -> None:
    """Until the peer is found to have gone."""
    while True:
        writer.write(bytes(64 * KIB))
        await writer.flush()


async def send(conn: Any) -> None:
    while True:
        await conn.send(bytes(64 * KIB))


async def decode_slice(conn: Connection) -> None:
    (await conn.reader.slice(1)).read_str(1)


async def exceed_slice(conn: Connection) -> None:
    (await conn.reader.slice(2)).slice(2).next(3)


async def search_slice(conn: Connection) -> None:
    (await conn.reader.slice(2)).until(b"\n", max_bytes=2)


async def queue(conn: Connection) -> None:
    async with ShardQueue(conn) as shards:
        while True:
            await shards.add(bytes(64 * KIB))


async def nowait(reader: Any) -> None:
    reader.next_nowait(3)


async def find_nowait(reader: Any) -> None:
    reader.until_nowait(b"\n")


def reader_of(conn: Any) -> Any:
    return conn.reader


def buffered(conn: Connection) -> Any:
    return wrap_reader(BufferedByteReceiveStream(conn))


async def goodbye(peer: Peer) -> None:
    await send_all(peer.sock, peer.close_notify())


async def breaks_tls(peer: Peer) -> None:
    await send_all(peer.sock, b"this is no record")


async def cuts_off(peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_WR)


async def stays(peer: Peer) -> None:
    """It says nothing more."""


def next_(n: int) -> Call:
    return lambda conn: conn.next(n)


def until(conn: Any) -> Awaitable[Any]:
    return conn.until(b"\n", max_bytes=2)  # type: ignore[no-any-return]


def text(reader: Any) -> Awaitable[str]:
    return reader.read_str(1)  # type: ignore[no-any-return]


def bad_name(reader: Any) -> Awaitable[str]:
    """Its decoder raises an error that is not a `UnicodeDecodeError`."""
    return reader.read_str(4, "punycode")  # type: ignore[no-any-return]


BAD = b"\xff"
TWO = sends(b"ab")

#: What the program calls, behind the first byte; what the peer does; what is counted.
ENDS: dict[str, tuple[Call, Does, str]] = {
    "receive, FIN": (receive, ends, "eof"),
    "next, FIN": (next_(3), sends(b"ab", end=True), "incomplete"),
    "receive, RST": (receive, resets, "broken"),
    "send, RST": (send, resets, "broken"),
    "receive, silent": (timed("read_timeout", receive), nothing, "read_timeout"),
    "send, silent": (timed("write_timeout", send), nothing, "write_timeout"),
    "idle": (timed("idle_timeout", receive), nothing, "idle_timeout"),
    "until": (until, TWO, "delimiter_not_found"),
    "next, too large": (next_(MIB + 1), nothing, "message_too_large"),
    "next_nowait": (over(reader_of, nowait), TWO, "would_block"),
    "until_nowait": (over(reader_of, find_nowait), TWO, "would_block"),
    "read_str": (over(reader_of, text), sends(BAD), "decoding"),
    "read_str, punycode": (over(reader_of, bad_name), sends(b"a-\xff\xff"), "decoding"),
    "in a group": (grouped(receive), ends, "eof"),
    "slice, read_str": (decode_slice, sends(BAD), "decoding"),
    "slice, next": (exceed_slice, TWO, "would_block"),
    "slice, until": (search_slice, TWO, "delimiter_not_found"),
    "wrap_reader, FIN": (over(wrap_reader, next_(1)), ends, "eof"),
    "wrap_reader, half": (over(wrap_reader, next_(3)), sends(b"ab", end=True), "incomplete"),
    "wrap_reader, until": (over(wrap_reader, until), TWO, "delimiter_not_found"),
    "wrap_reader, text": (over(wrap_reader, text), sends(BAD), "decoding"),
    "wrap_reader, nowait": (over(wrap_reader, nowait), nothing, "would_block"),
    "wrap_reader, large": (over(wrap_reader, next_(1 << 30)), nothing, "message_too_large"),
    "wrap_reader over a wrapper": (over(buffered, next_(1)), ends, "eof"),
    "wrap_writer": (over(wrap_writer, write), resets, "broken"),
    "as_receive_stream": (over(lambda c: as_receive_stream(c.reader), receive), ends, "eof"),
    "as_send_stream": (over(lambda c: as_send_stream(c.writer), send), resets, "broken"),
    "ShardQueue": (queue, resets, "broken"),
    "wrap, no TLS": (tls(), sends(b"this is no handshake"), "tls_handshake"),
    "wrap, no trust": (tls(receive), distrusts, "tls_handshake"),
    "wrap, FIN": (tls(), ends, "tls_handshake"),
    "wrap, RST": (tls(), resets, "tls_handshake"),
    "wrap, silent": (timed("read_timeout", tls()), nothing, "tls_handshake"),
    "wrap, FIN that is allowed": (tls(standard_compatible=False), ends, "eof"),
    "TLS, close_notify": (tls(receive), in_tls(goodbye), "eof"),
    "TLS, FIN": (tls(receive), in_tls(cuts_off), "broken"),
    "TLS, no record": (tls(receive), in_tls(breaks_tls), "broken"),
    "TLS, until": (tls(until), says(b"ab"), "delimiter_not_found"),
    "TLS, nowait": (tls(over(reader_of, nowait)), says(b"ab"), "would_block"),
    "TLS, read_str": (tls(over(reader_of, text)), says(BAD), "decoding"),
    "TLS, too large": (tls(next_(MIB + 1)), in_tls(stays), "message_too_large"),
    "TLS, wrap_reader": (tls(over(wrap_reader, text)), says(BAD), "decoding"),
    "TLS, unwrap": (tls(lambda s: s.unwrap()), says(bytes(MIB + 1)), "message_too_large"),
    "TLS, send_eof": (tls(lambda s: s.send_eof()), in_tls(stays, "TLSv1_2"), "tls_version"),
}


def trios(call: Call) -> Call:
    async def do(conn: Connection) -> None:
        from anypoll.integrations.trio import TrioStream

        await call(TrioStream(conn))

    return do


def httpcores(call: Call) -> Call:
    async def do(conn: Connection) -> None:
        from anypoll.integrations.httpcore import AnypollStream

        await call(AnypollStream(conn))

    return do


async def receive_some(stream: Any) -> None:
    while await stream.receive_some():
        pass


INTEGRATIONS: dict[str, tuple[Call, Does, str]] = {
    "Trio, RST": (trios(receive_some), resets, "broken"),
    "Trio, idle": (timed("idle_timeout", trios(receive_some)), nothing, "idle_timeout"),
    "httpcore, RST": (httpcores(lambda s: s.read(1)), resets, "broken"),
    "httpcore, silent": (httpcores(lambda s: s.read(1, 0.01)), nothing, "read_timeout"),
    "httpcore, full": (
        httpcores(lambda s: s.write(bytes(64 * MIB), 0.01)),
        nothing,
        "write_timeout",
    ),
}


async def outcome(mode: str, call: Call, does: Does, path: Path | None = None) -> dict[str, int]:
    """For which reason it ends, in a server of that mode."""

    async def function(conn: Connection) -> None:
        await conn.skip(1)
        await call(conn)

    where = {"host": "127.0.0.1", "port": 0} if path is None else {"path": path}
    options: dict[str, Any] = {mode: function, **where, "read_limit": MIB}
    async with anypoll.serve(**options) as server:
        with connected(server) as sock:
            sock.send(b"x")
            await holds(lambda: server.statistics().bytes_received)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_unless_gone, does, sock)
                await holds(lambda: server.statistics().closed)
                tasks.cancel_scope.cancel()
    return dict(server.statistics().closed)


async def _unless_gone(does: Does, sock: socket.socket) -> None:
    try:
        await does(sock)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server did not wait for the end of it


MODES = pytest.mark.parametrize("mode", ["handler", "on_request"])


@pytest.mark.parametrize("name", ENDS)
async def test_what_a_peer_causes_is_counted(name: str) -> None:
    call, does, reason = ENDS[name]
    assert await outcome("handler", call, does) == {reason: 1}


@pytest.mark.parametrize("name", ["receive, RST", "until", "in a group", "wrap, FIN", "TLS, FIN"])
async def test_so_it_is_in_a_call_of_request_mode(name: str) -> None:
    """The exceptions are the same, whoever catches them."""
    call, does, reason = ENDS[name]
    assert await outcome("on_request", call, does) == {reason: 1}


@pytest.mark.parametrize("name", INTEGRATIONS)
async def test_so_it_is_through_an_integration(name: str, anyio_backend: Any) -> None:
    if "Trio" in name and anyio_backend[0] != "trio":
        pytest.skip("Trio's streams are for Trio")
    call, does, reason = INTEGRATIONS[name]
    assert await outcome("handler", call, does) == {reason: 1}


async def test_so_it_is_of_descriptors(tmp_path: Path) -> None:
    def call(conn: Any) -> Awaitable[Any]:
        return conn.receive_fds(1, 1)  # type: ignore[no-any-return]

    assert await outcome("handler", call, ends, tmp_path / "socket") == {"eof": 1}


# --- what the program causes ---------------------------------------------------------------------


async def busy(conn: Connection) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(conn.receive)
        tasks.start_soon(conn.receive)


async def raises(kind: type[Exception], _conn: Connection) -> None:
    raise kind


async def translates(conn: Connection) -> None:
    try:
        await conn.receive()
    except anyio.EndOfStream as exc:
        raise NotImplementedError from exc


async def upstream(_conn: Connection) -> None:
    """Of another connection, whose peer does not speak TLS."""
    ours, theirs = anypoll.socketpair()
    async with ours, theirs:
        await theirs.send(b"this is no handshake")
        await TLSConnection.wrap(ours, hostname="anypoll.test", ssl_context=client_context())


async def its_own_cause(_conn: Connection) -> None:
    exc = OSError()
    raise exc from exc


ERRORS: dict[str, tuple[Call, Does]] = {
    "no integer": (lambda conn: conn.next("1"), nothing),
    "negative": (next_(-1), nothing),
    "no such encoding": (lambda conn: conn.reader.read_str(1, "none"), nothing),
    "two readers": (busy, nothing),
    "cannot be encoded": (lambda conn: conn.writer.write_str("\ud800"), nothing),
    "another's handshake": (upstream, nothing),
    "a wrong context": (
        lambda conn: TLSConnection.wrap(
            conn, server_side=True, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ),
        nothing,
    ),
    "about another connection": (partial(raises, anyio.EndOfStream), nothing),
    "the program's own text": (partial(raises, UnicodeError), nothing),
    "its own cause": (its_own_cause, nothing),
    "of an end": (translates, ends),
}


@MODES
@pytest.mark.parametrize(("call", "does"), ERRORS.values(), ids=ERRORS)
async def test_what_the_program_causes_is_an_error(
    mode: str, call: Call, does: Does, log: pytest.LogCaptureFixture
) -> None:
    assert await outcome(mode, call, does) == {"error": 1}
    assert len(errors(log)) == 1

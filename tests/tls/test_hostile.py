"""TLS with peers that mean harm: they do not finish, send what is no TLS, or what is TLS and makes
work. Whatever they do, memory stays bounded, others are served, and nothing is logged.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute
from certificates import authority, certificate, client_context, server_context
from peers import KIB, MIB, holds, opened, read_all, reset, resident, send_all, stalled, within
from serving import all_is_accounted_for, connected, ends, local  # noqa: F401
from tls_peers import NAME, Peer, both
from tls_records import (
    ALERT,
    CHANGE_CIPHER_SPEC,
    CLIENT_HELLO,
    CLOSE_NOTIFY,
    DATA,
    END_OF_EARLY_DATA,
    FINISHED,
    HANDSHAKE,
    HEARTBEAT,
    HELLO_REQUEST,
    INTERNAL_ERROR,
    KEY_UPDATE,
    SERVER_HELLO,
    USER_CANCELED,
    Forger,
    key_update,
    message,
    plain,
    split,
    ticket,
)
from tls_serving import MODES, Function, echo, secure, talking

import anypoll
from anypoll import Connection, ConnectTimeout, TLSConnection

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

#: By how much the process may grow, however much comes.
MOST = 48 * MIB


@pytest.fixture(autouse=True)
def memory_is_bounded(sanitized: bool) -> Iterator[None]:
    """A sanitizer keeps what was freed for a while."""
    before = resident()
    yield
    assert sanitized or resident() - before < MOST


async def is_served(peer: Peer, word: bytes = b"others\n") -> None:
    await peer.send(word)
    assert await peer.receive(len(word)) == word


@asynccontextmanager
async def target(mode: str = "handler", **options: Any) -> AsyncIterator[anypoll.Server]:
    """A server that echoes lines. What happens to it concerns nobody else."""
    async with (
        local(**{"ssl_context": server_context(), **echo(mode), **options}) as server,
        talking(server) as other,
    ):
        await is_served(other)
        yield server
        await is_served(other)
        async with talking(server) as another:
            await is_served(another)
        assert server.statistics().handler_errors == 0


@asynccontextmanager
async def forger(server: anypoll.Server, **options: Any) -> AsyncIterator[Forger]:
    """A client behind its handshake, that can make its records itself."""
    with connected(server) as sock:
        peer = Forger(sock, **options)
        await within(peer.shake_hands())
        yield peer


async def is_over(server: anypoll.Server, **reasons: int) -> None:
    """Until so many have ended, for these reasons."""
    await holds(lambda: server.statistics().closed == reasons)


async def pushed(sock: socket.socket, data: bytes) -> None:
    """As much as the other end takes before it closes."""
    with suppress(ConnectionError):
        await send_all(sock, data)


async def heard(sock: socket.socket) -> bytes:
    """All that still comes; a server that closes with unread input resets the connection."""
    got = bytearray()
    with suppress(ConnectionError), anyio.fail_after(60):
        while True:
            try:
                data = sock.recv(64 * KIB)
            except BlockingIOError:
                await anyio.wait_readable(sock)
                continue
            if not data:
                break
            got += data
    return bytes(got)


def hello(**options: Any) -> bytes:
    """A client's first flight."""
    with socket.socket() as unused:
        peer = Peer(unused, **options)
        with pytest.raises(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
        return peer.outgoing.read()


async def answered(sock: socket.socket, peer: Peer) -> bytes:
    """What a client says behind the server's first flight."""
    with pytest.raises(ssl.SSLWantReadError):
        peer.ssl.do_handshake()
    await send_all(sock, peer.outgoing.read())
    while True:
        await within(peer.more())
        with suppress(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
            return peer.outgoing.read()


# --- handshakes that take their time -------------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_handshake_may_drip(version: str) -> None:
    """Each byte arrives by itself."""
    taken: list[Connection] = []
    context = client_context()
    context.maximum_version = getattr(ssl.TLSVersion, version)

    class Dripping(Peer):
        async def send_drops(self) -> None:
            data = self.outgoing.read()
            for n in range(len(data)):
                count = taken[0].statistics().bytes_received + 1
                await send_all(self.sock, data[n : n + 1])
                while taken[0].statistics().bytes_received < count:
                    await anyio.sleep(0)

    async with secure(**echo("handler"), on_prepare=taken.append) as server:
        with connected(server) as sock:
            await holds(lambda: taken)
            peer = Dripping(sock, context)
            with anyio.fail_after(60):
                while True:
                    try:
                        peer.ssl.do_handshake()
                    except ssl.SSLWantReadError:
                        await peer.send_drops()
                        await peer.more()
                    else:
                        break
                await peer.send_drops()
                peer.ssl.write(b"drops\n")
                await peer.send_drops()
            assert await peer.receive(6) == b"drops\n"


async def test_messages_of_a_handshake_in_records_of_a_byte() -> None:
    """Also those that are encrypted."""
    async with target() as server:
        with connected(server) as sock:
            peer = Forger(sock)
            with pytest.raises(ssl.SSLWantReadError):
                peer.ssl.do_handshake()
            [whole] = split(peer.outgoing.read())
            await send_all(
                sock, b"".join(plain(bytes([byte]), version=0x0301) for byte in whole[5:])
            )
            await within(peer.more())
            while True:
                try:
                    peer.ssl.do_handshake()
                except ssl.SSLWantReadError:
                    await within(peer.more())
                else:
                    break
            *others, finished = split(peer.outgoing.read())
            peer.known = peer.secrets()
            label = "CLIENT_HANDSHAKE_TRAFFIC_SECRET"
            inner = peer.sealer_for(label).open(finished)
            sealer = peer.sealer_for(label)
            pieces = [sealer.seal(bytes([byte]), HANDSHAKE) for byte in inner[:-1]]
            await send_all(sock, b"".join(others + pieces))
            await peer.shake_hands()
            await is_served(peer)


#: Where a client stops: a share of its first flight, or of its second.
STOPS = [(1, 0), (1, 3), (1, 5), (1, 9), (1, -1), (1, None), (2, 5), (2, 6), (2, 10), (2, -1)]


@pytest.mark.parametrize("mode", MODES)
async def test_a_handshake_that_stops_makes_room_in_time(mode: str) -> None:
    """All stop at once, each somewhere else, and fill the server."""
    async with secure(
        **echo(mode), tls_handshake_timeout=0.3, max_connections=len(STOPS)
    ) as server:
        with sockets(server, len(STOPS)) as socks:
            for sock, (flight, end) in zip(socks, STOPS, strict=True):
                if flight == 1:
                    await send_all(sock, hello()[:end])
                else:
                    with suppress(ConnectionError, ssl.SSLError):  # a slow machine: its time is up
                        rest = await answered(sock, Peer(sock))
                        await send_all(sock, rest[:end])
            async with talking(server) as other:  # there was no room before
                await is_served(other)
                for sock, (flight, _) in zip(socks, STOPS, strict=True):
                    got = await heard(sock)
                    assert flight == 2 or len(got) == 0 or got[0] == HANDSHAKE
        assert server.statistics().closed["tls_handshake"] == len(STOPS)


@contextmanager
def sockets(server: anypoll.Server, count: int) -> Iterator[list[socket.socket]]:
    socks = [connected(server) for _ in range(count)]
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


async def test_progress_earns_no_more_time() -> None:
    """A client that never stops, and never comes to an end."""
    long = plain(message(CLIENT_HELLO, bytes(16000)))
    async with target(tls_handshake_timeout=0.2) as server:
        with connected(server) as sock, suppress(ConnectionError):
            for n in range(len(long)):
                await send_all(sock, long[n : n + 1])
                await anyio.sleep(0.001)
            pytest.fail("it was never cut off")
        await is_over(server, tls_handshake=1)


async def one_after_the_other(server: anypoll.Server, first: bytes) -> None:
    """Clients that connect, say something, and are gone before anybody can answer."""
    for n in range(100):
        sock = connected(server)
        if n % 4:
            await send_all(sock, first[: None if n % 2 else n])
        if n % 8 == 1:
            await anyio.sleep(0)
        reset(sock) if n % 3 else sock.close()


@pytest.mark.parametrize("mode", MODES)
async def test_clients_that_vanish(mode: str) -> None:
    first = hello()
    async with target(mode) as server:
        await one_after_the_other(server, first)
        await holds(lambda: server.statistics().accepted >= 101 and len(server.connections) == 1)
        assert set(server.statistics().closed) == {"tls_handshake"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
async def test_a_server_that_ends_amid_handshakes(mode: str, turns: int) -> None:
    """By force, wherever they are."""
    first = hello()
    async with secure(**echo(mode)) as server:
        with sockets(server, 20) as socks:
            for sock in socks:
                await send_all(sock, first)
            for _ in range(turns):
                await anyio.sleep(0)
            await within(server.shutdown(0))
            for sock in socks:
                await heard(sock)
        told = server.statistics()
        assert sum(told.closed.values()) == told.accepted
        assert told.handler_errors == 0


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_handshake_that_is_given_up_anywhere(version: str) -> None:
    """After any number of turns. What waits for it then finds the connection as it was, or closed
    by its owner.
    """
    context, ours = client_context(), server_context()
    context.maximum_version = getattr(ssl.TLSVersion, version)
    done = 0
    for turns in range(40):
        async with opened() as (conn, sock):
            peer = Peer(sock, context)

            async def wrap() -> None:
                nonlocal done
                await TLSConnection.wrap(conn, server_side=True, ssl_context=ours)
                done += 1

            async def shake_hands() -> None:
                with suppress(ssl.SSLError, ConnectionError):
                    await peer.shake_hands()  # noqa: B023

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wrap)
                tasks.start_soon(shake_hands)
                for _ in range(turns):
                    await anyio.sleep(0)
                tasks.cancel_scope.cancel()
            conn.abort()
            assert conn.fileno() == -1
    assert done < 40  # the first ones had no time


# --- handshakes that are none --------------------------------------------------------------------


FIRST = {
    "SSL 2": bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0")
    + bytes(16),
    "a version that there is not": plain(hello()[5:], version=0x0909),
    "a version long gone": plain(hello()[5:], version=0x0002),
    "an unknown type": plain(bytes(100), kind=64),
    "a record of 64 KiB": b"\x16\3\1\xff\xff" + bytes(MIB),
    "a record of a byte too much": b"\x16\3\1\x40\x01" + bytes(MIB),
    "a message of 16 MB": plain(b"\1\xff\xff\xff" + bytes(16_000)) * 100,
    "a message of a server": plain(message(2, bytes(100))),
    "a Finished": plain(message(FINISHED, bytes(32))),
    "application data": plain(b"hello", DATA) * 1000,
    "change_cipher_spec, for ever": plain(b"\1", CHANGE_CIPHER_SPEC) * 100_000,
    "an alert": plain(INTERNAL_ERROR, ALERT),
    "warnings": plain(USER_CANCELED, ALERT) * 100_000,
    "half an alert": plain(b"\1", ALERT) * 2,
    "a close_notify": plain(CLOSE_NOTIFY, ALERT),
    "empty records": plain(b"") * 100_000,
    "empty application data": plain(b"", DATA) * 100_000,
    "heartbeats": plain(b"\1\xff\xff", HEARTBEAT) * 100,
    "hellos": hello() * 1000,
    "hellos that are cut short": plain(hello()[5:-20]) * 1000,
    "zeros": bytes(MIB),
}


@pytest.mark.parametrize("mode", MODES)
async def test_what_begins_no_handshake(mode: str) -> None:
    async with target(mode) as server:
        for count, data in enumerate(FIRST.values(), 1):
            with connected(server) as sock:
                await within(pushed(sock, data))
                with suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_WR)  # OpenSSL ignores some of it, and waits
                await heard(sock)
            await is_over(server, tls_handshake=count)


async def test_a_hello_of_64_kb() -> None:
    context = client_context()
    context.set_alpn_protocols([f"{n:0250}" for n in range(240)])
    assert len(hello(context=context)) > 60_000
    async with target() as server:
        with connected(server) as sock:
            peer = Peer(sock, context)
            await within(peer.shake_hands())
            await is_served(peer)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """The certificate with so many behind it that it is more than 100 KB: OpenSSL's limit."""
    path = tmp_path / "chain.pem"
    parts = [certificate().private_key_pem, *certificate().cert_chain_pems]
    padding = authority().cert_pem.bytes() * 250
    path.write_bytes(b"".join(part.bytes() for part in parts) + padding)
    return path


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_chain_of_a_client_that_is_too_long(version: str, chain: Path) -> None:
    context, asking = client_context(), server_context()
    context.maximum_version = getattr(ssl.TLSVersion, version)
    context.load_cert_chain(chain)
    asking.verify_mode = ssl.CERT_REQUIRED
    authority().configure_trust(asking)
    async with local(**echo("handler"), ssl_context=asking) as server:
        with connected(server) as sock:
            with suppress(ssl.SSLError, ConnectionError):  # in TLS 1.3 it learns of it later
                peer = Peer(sock, context)
                await within(peer.shake_hands())
                await peer.receive(1)
            await ends(server, tls_handshake=1)


async def test_a_chain_of_a_server_that_is_too_long(chain: Path) -> None:
    context = server_context()
    context.load_cert_chain(chain)
    async with to_a_server() as (conn, sock):

        async def serve() -> None:
            with suppress(ssl.SSLError, ConnectionError):
                await Peer(sock, context, server_side=True).shake_hands()

        async def dial() -> None:
            with pytest.raises(ssl.SSLError) as caught:
                await TLSConnection.wrap(conn, hostname=NAME, ssl_context=client_context())
            assert caught.value.reason == "EXCESSIVE_MESSAGE_SIZE"
            await conn.aclose()

        await both(serve, dial)


# --- clients behind their handshake --------------------------------------------------------------


def told(server_saw: list[BaseException]) -> Function:
    """A handler that echoes lines, and keeps why it has ended."""

    async def handler(stream: TLSConnection) -> None:
        try:
            while True:
                stream.writer.write(bytes(await stream.until(b"\n")))
        except Exception as exc:
            server_saw.append(exc)
            raise

    return handler


BAD = {
    "a record of 64 KiB": lambda s: b"\x17\3\3\xff\xff" + bytes(MIB),
    "a record of a byte too much": lambda s: s.seal(bytes((1 << 14) + 1)),
    "padding beyond the limit": lambda s: s.seal(b"x", padding=(1 << 14) + 256),
    "no authentication": lambda s: b"\x17\3\3\0\x05hello",
    "a wrong code": lambda s: plain(bytes(40), DATA),
    "a repeated record": lambda s: (again := s.seal(b"x")) + again,
    "a lost record": lambda s: (s.seal(b"x"), s.seal(b"x"))[1],
    "no type": lambda s: s.seal_inner(bytes(20)),
    "an unknown type": lambda s: s.seal(b"x", 99),
    "a heartbeat": lambda s: s.seal(b"\1\xff\xff", HEARTBEAT),
    "a change_cipher_spec": lambda s: s.seal(b"\1", CHANGE_CIPHER_SPEC),
    "a plain change_cipher_spec": lambda s: plain(b"\1", CHANGE_CIPHER_SPEC),
    "plain HTTP": lambda s: b"GET / HTTP/1.1\r\n\r\n",
    "a plain alert": lambda s: plain(INTERNAL_ERROR, ALERT),
    "an alert": lambda s: s.seal(INTERNAL_ERROR, ALERT),
    "an unknown alert": lambda s: s.seal(b"\2\xff", ALERT),
    "half an alert": lambda s: s.seal(b"\2", ALERT),
    "an alert of a level that there is not": lambda s: s.seal(b"\3\x50", ALERT),
    "warnings": lambda s: b"".join(s.seal(USER_CANCELED, ALERT) for _ in range(100)),
    "empty data": lambda s: b"".join(s.seal(b"") for _ in range(1000)),
    "empty data, padded": lambda s: b"".join(s.seal(b"", padding=1000) for _ in range(1000)),
    "an empty message": lambda s: s.seal(b"", HANDSHAKE),
    "a new hello": lambda s: s.seal(hello()[5:], HANDSHAKE),
    "a HelloRequest": lambda s: s.seal(message(HELLO_REQUEST), HANDSHAKE),
    "a ticket": lambda s: s.seal(ticket(100), HANDSHAKE),
    "a Finished": lambda s: s.seal(message(FINISHED, bytes(48)), HANDSHAKE),
    "an EndOfEarlyData": lambda s: s.seal(message(END_OF_EARLY_DATA), HANDSHAKE),
    "a KeyUpdate of some other kind": lambda s: s.seal(message(KEY_UPDATE, b"\2"), HANDSHAKE),
    "a KeyUpdate that says nothing": lambda s: s.seal(message(KEY_UPDATE), HANDSHAKE),
    "a KeyUpdate of 16 MB": lambda s: s.seal(b"\x18\xff\xff\xff" + bytes(100), HANDSHAKE),
    "a KeyUpdate that is not the last": lambda s: s.seal(
        key_update(requested=False) * 2, HANDSHAKE
    ),
    "data within a message": lambda s: s.seal(b"\x18\0", HANDSHAKE) + s.seal(b"x"),
    "a KeyUpdate, and the old key": lambda s: (
        s.seal(key_update(requested=False), HANDSHAKE) + s.seal(b"x")
    ),
}


#: The only ones with a wrong code, or else this would test nothing but that.
UNAUTHENTIC = {
    "no authentication",
    "a wrong code",
    "a repeated record",
    "a lost record",
    "a KeyUpdate, and the old key",
}


def is_a_breach(name: str, exc: BaseException) -> None:
    assert type(exc) is BrokenResourceError
    assert isinstance(exc.__cause__, ssl.SSLError)
    unauthentic = exc.__cause__.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
    assert unauthentic == (name in UNAUTHENTIC), exc.__cause__


@pytest.mark.parametrize("mode", MODES)
async def test_what_breaks_a_session(mode: str) -> None:
    """What came before is served; the rest is the peer's affair."""
    saw: list[BaseException] = []
    function = {mode: told(saw)} if mode == "handler" else echo(mode)
    async with target(ssl_context=server_context()) as others, secure(**function) as server:
        for count, make in enumerate(BAD.values(), 1):
            async with forger(server) as peer:
                await peer.forge(b"first\n")
                assert await peer.receive(6) == b"first\n"
                await pushed(peer.sock, make(peer.sealer))
                await holds(lambda: server.statistics().closed.get("broken") == count)  # noqa: B023
                await heard(peer.sock)
        assert server.statistics().closed == {"broken": len(BAD)}
        assert others.statistics().closed == {}
    if mode == "handler":
        for name, exc in zip(BAD, saw, strict=True):
            is_a_breach(name, exc)


OLD = {
    "empty data": lambda s: b"".join(s.seal(b"") for _ in range(1000)),
    "warnings": lambda s: b"".join(s.seal(USER_CANCELED, ALERT) for _ in range(100)),
    "an alert": lambda s: s.seal(INTERNAL_ERROR, ALERT),
    "a record of a byte too much": lambda s: s.seal(bytes((1 << 14) + 1)),
    "a change_cipher_spec": lambda s: s.seal(b"\1", CHANGE_CIPHER_SPEC),
    "a Finished": lambda s: s.seal(message(FINISHED, bytes(12)), HANDSHAKE),
    "an unknown type": lambda s: s.seal(b"x", 99),
    "a heartbeat": lambda s: s.seal(b"\1\xff\xff", HEARTBEAT),
}


@pytest.mark.parametrize("mode", MODES)
async def test_what_breaks_a_session_of_tls_1_2(mode: str) -> None:
    async with target() as others, secure(**echo(mode)) as server:
        for count, make in enumerate(OLD.values(), 1):
            async with forger(server, version="TLSv1_2") as peer:
                await peer.forge(b"first\n")
                assert await peer.receive(6) == b"first\n"
                await pushed(peer.sock, make(peer.sealer))
                await holds(lambda: server.statistics().closed.get("broken") == count)  # noqa: B023
                await heard(peer.sock)
        assert server.statistics().closed == {"broken": len(OLD)}
        assert others.statistics().closed == {}


HARMLESS = {
    "some empty data": lambda s: b"".join(s.seal(b"") for _ in range(20)),
    "data in much padding": lambda s: s.seal(b"", padding=16_000),
    "a few warnings": lambda s: b"".join(s.seal(USER_CANCELED, ALERT) for _ in range(3)),
    "a KeyUpdate in pieces": lambda s: b"".join(
        s.seal(bytes([byte]), HANDSHAKE) for byte in key_update(requested=True)
    ),
}


@pytest.mark.parametrize("mode", MODES)
async def test_what_breaks_nothing_in_tls_1_2(mode: str) -> None:
    def empty(s: Any) -> bytes:
        return b"".join(s.seal(b"") for _ in range(20))

    def warnings(s: Any) -> bytes:
        return b"".join(s.seal(USER_CANCELED, ALERT) for _ in range(3))

    async with target(mode) as server, forger(server, version="TLSv1_2") as peer:
        for make in (empty, empty, warnings):
            await send_all(peer.sock, make(peer.sealer))
            await peer.forge(b"on we go\n")
            assert await peer.receive(9) == b"on we go\n"


@pytest.mark.parametrize("mode", MODES)
async def test_what_breaks_nothing(mode: str) -> None:
    async with target(mode) as server:
        for name, make in HARMLESS.items():
            async with forger(server) as peer:
                for _ in range(3):
                    await send_all(peer.sock, make(peer.sealer))
                    if "KeyUpdate" in name:
                        peer.sealer.update()
                    await peer.forge(b"on ")
                    await send_all(peer.sock, peer.sealer.seal(b"we go\n", padding=10))
                    assert await peer.receive(9) == b"on we go\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_data_behind_a_close_notify_does_not_count(mode: str, version: str) -> None:
    async with target(mode) as server, forger(server, version=version) as peer:
        s = peer.sealer
        data = s.seal(b"early\n") + s.seal(CLOSE_NOTIFY, ALERT)
        await pushed(peer.sock, data + s.seal(b"late\n") * 1000 + bytes(1000))
        assert await within(peer.receive(100)) == b"early\n"
        peer.sock.close()
        await is_over(server, eof=1)


async def test_many_records_of_a_byte(sanitized: bool) -> None:
    count = 5000 if sanitized else 50_000

    async def handler(stream: TLSConnection) -> None:
        await stream.skip(count)

    async with local(handler, ssl_context=server_context()) as server, forger(server) as peer:
        seal = peer.sealer.seal
        for _ in range(10):
            await send_all(peer.sock, b"".join([seal(b"x") for _ in range(count // 10)]))
        assert await peer.receive(1) == b""
        peer.sock.close()
        await is_over(server, done=1)


async def test_records_of_a_byte_that_nobody_reads(sanitized: bool) -> None:
    """What is read ahead is bounded in what it takes, not only in what it carries."""
    count = 10_000 if sanitized else 60_000
    begun, go_on = anyio.Event(), anyio.Event()

    async def handler(stream: TLSConnection) -> None:
        begun.set()
        await go_on.wait()
        assert len(stream.reader) <= 64 * KIB  # this decrypts what has come

    async with local(handler, ssl_context=server_context()) as server, forger(server) as peer:
        await within(begun.wait())
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
        seal = peer.sealer.seal
        with anyio.move_on_after(0.3):
            for _ in range(10):
                await send_all(peer.sock, b"".join([seal(b"x") for _ in range(count // 10)]))
        go_on.set()
        await heard(peer.sock)
        await is_over(server, done=1)


# --- storms --------------------------------------------------------------------------------------


async def test_key_updates_that_want_no_answer(sanitized: bool) -> None:
    """Without an end; then the next request comes under the newest key."""
    async with target() as server, forger(server) as peer:
        for _ in range(10):
            records = []
            for _ in range(100 if sanitized else 1000):
                records.append(peer.sealer.seal(key_update(requested=False), HANDSHAKE))
                peer.sealer.update()
            await send_all(peer.sock, b"".join(records))
        await peer.forge(b"still here\n")
        assert await peer.receive(11) == b"still here\n"


def tight(conn: Connection) -> None:
    """Not much can be on its way to the peer."""
    raw_socket = conn.extra(SocketAttribute.raw_socket)
    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)


def stream_to(server: anypoll.Server, sock: socket.socket) -> Any:
    [stream] = [c for c in server.connections if c.remote_address == sock.getsockname()]
    return stream


async def is_asleep() -> None:
    """Nobody turns in circles."""

    def polls() -> int:
        return sum(poller.polls for poller in anypoll.statistics().pollers)

    before = polls()
    await anyio.sleep(0.05)
    assert polls() - before < 50


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_answers_that_nobody_reads(mode: str, version: str) -> None:
    """To requests to change the key or, below TLS 1.3, to renegotiate. When they stand high, no
    more is read.
    """
    count = 16_000
    async with (
        target(mode, write_high_water=64 * KIB, on_prepare=tight) as server,
        forger(server, version=version) as peer,
    ):
        await peer.forge(b"first\n")
        assert await peer.receive(6) == b"first\n"
        stream = stream_to(server, peer.sock)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        again = message(CLIENT_HELLO, bytes(40))
        records = []
        for _ in range(count):
            if version == "TLSv1_3":
                records.append(peer.sealer.seal(key_update(requested=True), HANDSHAKE))
                peer.sealer.update()
            else:
                records.append(peer.sealer.seal(again, HANDSHAKE))
        last = peer.sealer.seal(b"last\n")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, peer.sock, b"".join(records))
            await stalled(stream.connection)
            assert stream.statistics().buffered_output < 192 * KIB
            await is_asleep()
            if version == "TLSv1_3":
                tasks.start_soon(send_all, peer.sock, last)
                assert await within(peer.receive(5)) == b"last\n"
            else:  # OpenSSL's client would not stand so many warnings
                got = await within(read_all(peer.sock, count * 31))
                assert [(r[0], len(r)) for r in split(got)] == [(ALERT, 31)] * count


# --- servers -------------------------------------------------------------------------------------


@asynccontextmanager
async def to_a_server() -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection of ours, and what it has dialled."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with await anypoll.connect_tcp(*listening.getsockname()) as conn:
            sock, _ = listening.accept()
            sock.setblocking(False)
            with sock:
                yield conn, sock


@asynccontextmanager
async def dialled(**options: Any) -> AsyncIterator[tuple[TLSConnection, Forger]]:
    """A session of ours with a server that can make its records itself."""
    made: list[TLSConnection] = []
    async with to_a_server() as (conn, sock):
        peer = Forger(sock, server_side=True, **options)

        async def wrap() -> None:
            made.append(await TLSConnection.wrap(conn, hostname=NAME, ssl_context=client_context()))

        await both(wrap, peer.shake_hands)
        try:
            yield made[0], peer
        finally:
            made[0].abort()


async def test_tickets_without_end(sanitized: bool) -> None:
    """The last one counts."""
    async with dialled() as (tls, peer):

        async def flood() -> None:
            for n in range(10):
                await send_all(
                    peer.sock,
                    b"".join(
                        peer.sealer.seal(ticket(1000, n), HANDSHAKE)
                        for _ in range(100 if sanitized else 2000)
                    ),
                )
            await peer.forge(b"last\n")

        async def read() -> None:
            assert bytes(await tls.until(b"\n")) == b"last\n"

        await both(flood, read)
        assert tls.extra(TLSAttribute.ssl_object).session.has_ticket


async def test_a_ticket_of_64_kb() -> None:
    async with dialled() as (tls, peer):
        whole = ticket(65_000)
        pieces = [whole[n : n + 16_000] for n in range(0, len(whole), 16_000)]
        for piece in pieces:
            await peer.forge(piece, HANDSHAKE)
        await peer.forge(b"last\n")
        assert bytes(await within(tls.until(b"\n"))) == b"last\n"


async def test_a_client_that_is_asked_for_new_keys_and_not_heard() -> None:
    count = 20_000
    async with dialled() as (tls, peer):
        tight(tls.connection)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        records = []
        for _ in range(count):
            records.append(peer.sealer.seal(key_update(requested=True), HANDSHAKE))
            peer.sealer.update()
        lines: list[bytes] = []

        async def read() -> None:
            while True:
                lines.append(bytes(await tls.until(b"\n")))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, peer.sock, b"".join(records))
            tasks.start_soon(read)
            await stalled(tls.connection)
            assert tls.statistics().buffered_output < count * 27 / 2
            await is_asleep()
            rest = (count - 1) * 27  # OpenSSL sends an answer only when there is something behind
            assert len(await within(read_all(peer.sock, rest))) == rest
            await peer.forge(b"last\n")
            await holds(lambda: lines == [b"last\n"])
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"a ticket"}))
async def test_what_breaks_a_session_with_a_server(name: str) -> None:
    async with dialled() as (tls, peer):
        await peer.forge(b"first\n")
        await pushed(peer.sock, BAD[name](peer.sealer))
        assert bytes(await within(tls.until(b"\n"))) == b"first\n"
        with pytest.raises(BrokenResourceError) as caught:
            await within(tls.until(b"\n"))
        is_a_breach(name, caught.value)
        with pytest.raises(BrokenResourceError):
            await tls.send(b"x")


SERVED = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an alert": plain(INTERNAL_ERROR, ALERT),
    "a close_notify": plain(CLOSE_NOTIFY, ALERT),
    "warnings": plain(USER_CANCELED, ALERT) * 10_000,
    "a hello of a client": plain(hello()[5:]),
    "an empty hello": plain(message(SERVER_HELLO)),
    "a message of 16 MB": plain(b"\2\xff\xff\xff" + bytes(16_000)) * 100,
    "a record of 64 KiB": b"\x16\3\3\xff\xff" + bytes(MIB),
    "empty records": plain(b"") * 10_000,
    "change_cipher_spec": plain(b"\1", CHANGE_CIPHER_SPEC) * 10_000,
    "application data": plain(b"hello", DATA),
    "zeros": bytes(MIB),
}


@pytest.mark.parametrize("name", SERVED)
async def test_a_server_that_speaks_something_else(name: str) -> None:
    async with to_a_server() as (conn, sock):

        async def serve() -> None:
            await pushed(sock, SERVED[name])
            with suppress(OSError):  # not connected any more
                sock.shutdown(socket.SHUT_WR)

        async def dial() -> None:
            with pytest.raises((ssl.SSLError, BrokenResourceError)):
                await TLSConnection.wrap(conn, hostname=NAME, ssl_context=client_context())
            await conn.aclose()

        await both(serve, dial)


@pytest.mark.parametrize("share", [0, 3, 5, 60, 127, 133, 300, -1])
async def test_a_server_that_never_finishes(share: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        async def stop() -> None:
            await anyio.wait_readable(listening)
            sock, _ = listening.accept()
            with sock:
                peer = Peer(sock, server_side=True)
                await peer.more()
                with suppress(ssl.SSLError):
                    peer.ssl.do_handshake()
                await pushed(sock, peer.outgoing.read()[:share])
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop)
            host, port = listening.getsockname()
            with pytest.raises(ConnectTimeout):
                await anypoll.connect_tcp(
                    host, port, tls_hostname=NAME, ssl_context=client_context(), timeout=0.1
                )
            tasks.cancel_scope.cancel()

"""TLS in a server: what handlers, hooks and requests see of it, how connections end, and what
becomes of those who cannot do it.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio import ClosedResourceError
from certificates import client_context, server_context
from peers import MIB, holds, pattern, read_to_end, reset, send_all, within
from serving import all_is_accounted_for, connected, ends, errors, local  # noqa: F401
from tls_peers import NAME, Peer
from tls_serving import MODES, Function, echo, echo_line, echo_lines, rest, secure, talking

import anypoll
from anypoll import Connection, TLSConnection

pytestmark = pytest.mark.anyio


async def never(_stream: Any) -> None:
    pytest.fail("called")


# --- handshakes ----------------------------------------------------------------------------------


async def garbage(sock: socket.socket) -> None:
    await send_all(sock, b"GET / HTTP/1.1\r\n\r\n")
    await read_to_end(sock)


async def leaves(sock: socket.socket) -> None:
    sock.close()


async def half_closes(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    await read_to_end(sock)


async def resets(sock: socket.socket) -> None:
    reset(sock)


async def is_silent(sock: socket.socket) -> None:
    assert await read_to_end(sock) == b""


async def stops(sock: socket.socket) -> None:
    await send_all(sock, b"\x16\x03\x01\x01")
    assert await read_to_end(sock) == b""


async def distrusts(sock: socket.socket) -> None:
    other = trustme.CA().cert_pem.bytes().decode()
    with pytest.raises(ssl.SSLCertVerificationError):
        await Peer(sock, ssl.create_default_context(cadata=other)).shake_hands()


@pytest.mark.parametrize(
    ("mode", "peer"),
    [
        ("handler", garbage),
        ("handler", half_closes),
        ("handler", is_silent),
        ("handler", distrusts),
        ("on_request", leaves),
        ("on_request", resets),
        ("on_request", is_silent),
        ("on_request", stops),
    ],
)
async def test_a_handshake_that_fails_is_only_counted(
    mode: str, peer: Function, log: pytest.LogCaptureFixture
) -> None:
    """It is the peer's affair: nothing of the user's runs but what ``on_prepare`` has asked for."""
    called: list[str] = []

    def on_prepare(conn: Connection) -> None:
        assert type(conn) is Connection
        conn.add_close_callback(lambda: called.append("closed"))

    context = server_context()
    if peer is distrusts:  # below 1.3 a server learns of it within the handshake
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    timeout = 0.05 if peer in (is_silent, stops) else 30
    hooks: dict[str, Any] = dict.fromkeys(("on_connect", "on_disconnect", mode), never)
    async with local(
        ssl_context=context,
        tls_handshake_timeout=timeout,
        read_timeout=30,
        on_prepare=on_prepare,
        **hooks,
    ) as server:
        with connected(server) as sock:
            await within(peer(sock))
            await ends(server, tls_handshake=1)
    assert called == ["closed"]
    assert server.statistics().handler_errors == 0
    assert all(record.exc_info is None for record in log.records)


async def test_max_connections_counts_handshakes() -> None:
    async with secure(**echo("handler"), max_connections=1) as server:
        with connected(server) as silent:
            await holds(lambda: server.connections)
            with connected(server) as sock:
                peer = Peer(sock)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(peer.shake_hands)
                    await anyio.sleep(0)
                    assert len(server.connections) == 1
                    silent.close()
                await peer.send(b"one\n")
                assert await peer.receive(4) == b"one\n"
        assert server.statistics().accepted == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("force", [False, True])
async def test_an_end_during_a_handshake(mode: str, force: bool) -> None:
    async with secure(**echo(mode), shutdown_timeout=1000) as server:
        with connected(server) as silent:
            await holds(lambda: server.connections)
            with suppress(ConnectionError):
                if force:
                    await send_all(silent, b"\x16\x03\x01\x02\x00")  # it has begun
                await within(server.shutdown(0 if force else None))
                assert await read_to_end(silent) == b""
    assert sum(server.statistics().closed.values()) == 1
    assert server.statistics().handler_errors == 0


@pytest.mark.parametrize("mode", MODES)
async def test_an_end_while_handshakes_are_computed(mode: str) -> None:
    """What has come is worked on, but nobody waits for more."""
    async with secure(**echo(mode), shutdown_timeout=1000) as server, AsyncExitStack() as stack:
        peers = [Peer(stack.enter_context(connected(server))) for _ in range(20)]
        for peer in peers:
            with suppress(ssl.SSLWantReadError):
                peer.ssl.do_handshake()
            await send_all(peer.sock, peer.outgoing.read())
        await holds(lambda: len(server.connections) == len(peers))
        await within(server.shutdown())
    assert server.statistics().closed == {"eof": len(peers)}
    assert server.statistics().tls_failed == 0


# --- hooks and handlers --------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close_notify", "FIN", "RST"])
@pytest.mark.parametrize("mode", MODES)
async def test_hooks_get_the_tls_connection(mode: str, end: str) -> None:
    told: list[tuple[str, type]] = []

    def tell(name: str, conn: Any) -> None:
        told.append((name, type(conn)))

    async def on_connect(stream: TLSConnection) -> None:
        tell("on_connect", stream)
        stream.state = "greeted"
        stream.add_close_callback(partial(tell, "closed"))
        await stream.send(b"hello\n")

    async def work(stream: TLSConnection) -> None:
        tell(mode, stream)
        await (echo_lines if mode == "handler" else echo_line)(stream)

    async def on_disconnect(stream: TLSConnection) -> None:
        tell("on_disconnect", stream)

    hooks = {"on_connect": on_connect, "on_disconnect": on_disconnect}
    prepare = partial(tell, "on_prepare")
    async with (
        secure(on_prepare=prepare, **hooks, **{mode: work}) as server,
        talking(server) as peer,
    ):
        await peer.send(b"one\n")
        assert await peer.receive(10) == b"hello\none\n"
        [conn] = server.connections
        assert (conn.server, conn.state) == (server, "greeted")
        if end == "close_notify":
            await send_all(peer.sock, peer.close_notify())
            assert await rest(peer) == b""
        elif end == "FIN":
            peer.sock.shutdown(socket.SHUT_WR)
        else:
            reset(peer.sock)
        await holds(lambda: sum(server.statistics().closed.values()))
    assert told == [
        ("on_prepare", Connection),
        ("on_connect", TLSConnection),
        (mode, TLSConnection),
        ("on_disconnect", TLSConnection),
        ("closed", TLSConnection),
    ]


@pytest.mark.parametrize("mode", MODES)
async def test_on_connect_may_refuse(mode: str) -> None:
    async def on_connect(stream: TLSConnection) -> None:
        await stream.aclose()

    async with secure(on_connect=on_connect, **{mode: never}) as server, talking(server) as peer:
        await send_all(peer.sock, peer.close_notify())
        await holds(lambda: sum(server.statistics().closed.values()) == 1)
    assert server.statistics().handler_errors == 0


@pytest.mark.parametrize("mode", MODES)
async def test_an_error_of_the_user(mode: str, log: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []

    async def fail(stream: TLSConnection) -> None:
        await stream.next(1)
        raise ValueError("mine")

    options: Any = {mode: fail, "on_error": lambda conn, exc: told.append((type(conn), exc))}
    async with secure(**options) as server, talking(server) as peer:
        await peer.send(b"x")
        await ends(server, error=1)
    [record] = errors(log)
    assert "mine" in str(record.exc_info)
    [(kind, exc)] = told
    assert kind is TLSConnection
    assert isinstance(exc, ValueError)


async def test_the_handler_is_cancelled_when_the_peer_goes() -> None:
    ended: list[str] = []

    async def wait(stream: TLSConnection) -> None:
        await stream.send(b"x")
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    async with secure(handler=wait, cancel_on_disconnect=True) as server, talking(server) as peer:
        assert await peer.receive(1) == b"x"
        reset(peer.sock)
        await ends(server, disconnected=1)
    assert ended == ["cancelled"]


async def test_timeouts_of_serve() -> None:
    seen: list[tuple[float | None, float | None, float | None]] = []

    async def note(stream: TLSConnection) -> None:
        seen.append((stream.read_timeout, stream.write_timeout, stream.idle_timeout))
        await stream.next(1)

    timeouts = {"read_timeout": 0.02, "write_timeout": 7, "idle_timeout": 50}
    async with secure(handler=note, **timeouts) as server, talking(server):
        await ends(server, read_timeout=1)
    assert seen == [(0.02, 7, 50)]


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with anypoll.serve(**echo("on_request"), path=path, ssl_context=server_context()):
        plain = await anypoll.connect_unix(path)
        async with await TLSConnection.wrap(
            plain, hostname=NAME, ssl_context=client_context()
        ) as stream:
            await stream.send(b"hi\n")
            assert await stream.next(3) == b"hi\n"


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_idle_connections_end_with_the_server(mode: str) -> None:
    async with secure(**echo(mode)) as server, talking(server) as one, talking(server) as other:
        for peer in (one, other):
            await peer.send(b"x\n")
            assert await peer.receive(2) == b"x\n"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.shutdown)
            for peer in (one, other):
                assert await rest(peer) == b""
                await send_all(peer.sock, peer.close_notify())
    assert server.statistics().closed == {"eof": 2}


@pytest.mark.parametrize("mode", MODES)
async def test_the_last_words_of_a_busy_one_arrive(mode: str) -> None:
    """Though most of what the peer has sent is never read."""
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(stream: TLSConnection) -> None:
        await stream.next(1)
        begun.set()
        await go_on.wait()
        stream.writer.write(pattern(2 * MIB))
        if mode == "on_request":
            await stream.reader.next_parts(100_000)

    async with secure(**{mode: slow}) as server, talking(server) as peer:
        await peer.send(b"x" + bytes(100_000))
        await within(begun.wait())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.shutdown)
            await within(server.wait_shutting_down())
            go_on.set()
            assert await rest(peer) == pattern(2 * MIB)
            await send_all(peer.sock, peer.close_notify())
            peer.sock.close()
    assert server.statistics().closed == {"done" if mode == "handler" else "eof": 1}


async def test_a_kept_stream_is_closed_behind_its_handler() -> None:
    kept: list[TLSConnection] = []

    async def keep(stream: TLSConnection) -> None:
        kept.append(stream)

    async with secure(handler=keep) as server, talking(server) as peer:
        assert await rest(peer) == b""
        await send_all(peer.sock, peer.close_notify())
        await ends(server, done=1)
        with pytest.raises(ClosedResourceError):
            await kept[0].receive()
        with pytest.raises(ClosedResourceError):
            await kept[0].send(b"x")

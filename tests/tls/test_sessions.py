"""What TLS adds to the lives of a server's connections: handshakes of all kinds, and the hooks."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from certificates import server_context
from peers import holds, read_to_end, reset, send_all, within
from serving import all_is_accounted_for, connected, errors, local  # noqa: F401
from tls_peers import Peer
from tls_serving import MODES, Function, echo, echo_line, echo_lines, ends, rest, secure, talking

from anypoll import Connection, TLSConnection

pytestmark = pytest.mark.anyio


async def garbage(sock: socket.socket) -> None:
    await send_all(sock, b"GET / HTTP/1.1\r\n\r\n")
    await read_to_end(sock)


async def leaves(sock: socket.socket) -> None:
    sock.close()


async def resets(sock: socket.socket) -> None:
    reset(sock)


async def is_silent(sock: socket.socket) -> None:
    assert await read_to_end(sock) == b""


async def distrusts(sock: socket.socket) -> None:
    peer = Peer(sock, ssl.create_default_context(cadata=_other_authority()))
    with pytest.raises(ssl.SSLCertVerificationError):
        await peer.shake_hands()


def _other_authority() -> str:
    import trustme

    return trustme.CA().cert_pem.bytes().decode()


@pytest.mark.parametrize("peer", [garbage, leaves, resets, is_silent, distrusts])
@pytest.mark.parametrize("mode", MODES)
async def test_a_handshake_that_fails_is_only_counted(
    mode: str, peer: Function, log: pytest.LogCaptureFixture
) -> None:
    """It is the peer's affair: nothing of the user's runs but what ``on_prepare`` has asked for."""
    called: list[str] = []

    async def hook(_conn: Any) -> None:
        called.append("hook")

    def on_prepare(conn: Connection) -> None:
        assert type(conn) is Connection
        conn.add_close_callback(lambda: called.append("closed"))

    context = server_context()
    if peer is distrusts:  # below 1.3 a server learns of it within the handshake
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    options: dict[str, Any] = dict.fromkeys(("on_connect", "on_disconnect", mode), hook)
    timeout = 0.05 if peer is is_silent else 30.0
    async with local(
        ssl_context=context,
        tls_handshake_timeout=timeout,
        on_prepare=on_prepare,
        **options,
    ) as server:
        with connected(server) as sock:
            await within(peer(sock))
            await ends(server, tls_handshake=1)
    assert called == ["closed"]
    assert server.statistics().handler_errors == 0
    assert all(record.exc_info is None for record in log.records)


@pytest.mark.parametrize("end", ["close_notify", "FIN", "RST"])
@pytest.mark.parametrize("mode", MODES)
async def test_hooks_get_the_tls_connection(mode: str, end: str) -> None:
    told: list[tuple[str, type]] = []

    def tell(name: str, conn: Any) -> None:
        told.append((name, type(conn)))

    async def hook(name: str, conn: Any) -> None:
        tell(name, conn)

    async def on_connect(stream: TLSConnection) -> None:
        tell("on_connect", stream)
        stream.add_close_callback(partial(tell, "closed"))

    async def work(stream: TLSConnection) -> None:
        tell(mode, stream)
        await (echo_lines if mode == "handler" else echo_line)(stream)

    hooks = {"on_connect": on_connect, "on_disconnect": partial(hook, "on_disconnect")}
    prepare = partial(tell, "on_prepare")
    async with (
        secure(on_prepare=prepare, **hooks, **{mode: work}) as server,
        talking(server) as peer,
    ):
        await peer.send(b"one\n")
        assert await peer.receive(4) == b"one\n"
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

    async def work(_stream: TLSConnection) -> None:
        pytest.fail("called")

    async with secure(on_connect=on_connect, **{mode: work}) as server, talking(server) as peer:
        await send_all(peer.sock, peer.close_notify())
        await holds(lambda: sum(server.statistics().closed.values()) == 1)
    assert server.statistics().handler_errors == 0


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

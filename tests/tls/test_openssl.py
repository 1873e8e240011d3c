"""TLS connections with OpenSSL's own programs at the other end, in both roles."""

from __future__ import annotations

import array
import fcntl
import random
import shutil
import socket
import ssl
import subprocess
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream
from anyio.streams.tls import TLSAttribute
from certificates import authority, certificate, client_context, server_context
from peers import MIB, holds, within
from serving import all_is_accounted_for, local  # noqa: F401
from tls_peers import NAME, both, over_memory

import anypoll
from anypoll import Connection, TLSConnection

pytestmark = pytest.mark.anyio

VERSIONS = {"tls1_2": "TLSv1.2", "tls1_3": "TLSv1.3"}
Program = Callable[..., AbstractAsyncContextManager[Connection]]

#: Digits only: OpenSSL's programs take a letter at the beginning of what they read for a command.
DATA = bytes(random.Random(0).choices(b"0123456789", k=MIB))


@pytest.fixture(name="run")
def program(foreign_env: dict[str, str], files: Callable[..., list[str]]) -> Program:
    """Runs ``openssl`` with these arguments: what goes in and comes out, as a connection."""
    path = shutil.which("openssl")
    if path is None:
        pytest.skip("openssl is not installed")

    @asynccontextmanager
    async def run(*args: str) -> AsyncIterator[Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
            process = subprocess.Popen([path, *args, *files()], env=foreign_env, **streams)
        try:
            async with await Connection.from_socket(ours) as conn:
                conn.state = process.kill
                with anyio.fail_after(60):
                    yield conn
        finally:
            process.kill()
            process.wait()

    return run


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """A certificate, and whom to trust: the options of both programs."""
    authority().cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate().private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    return lambda: ["-CAfile", str(tmp_path / "ca.pem"), "-cert", str(tmp_path / "cert.pem")]


@asynccontextmanager
async def client(run: Program, server: anypoll.Server, *options: str) -> AsyncIterator[Connection]:
    address = f"127.0.0.1:{server.port}"
    checks = ("-servername", NAME, "-verify_return_error")
    async with run("s_client", "-connect", address, *checks, *options) as conn:
        yield conn


@asynccontextmanager
async def server(
    run: Program, *options: str, **changes: Any
) -> AsyncIterator[tuple[Connection, TLSConnection]]:
    """An ``s_server``, and a client of ours."""
    context = client_context()
    context.set_alpn_protocols(["other", "test"])
    certificate().configure_cert(context)
    for name, value in changes.items():
        setattr(context, name, value)
    async with run("s_server", "-accept", "127.0.0.1:0", "-naccept", "1", *options) as conn:
        await conn.until(b"ACCEPT 127.0.0.1:")
        port = int(bytes(await conn.until(b"\n")))
        async with await anypoll.connect_tcp(
            "127.0.0.1", port, ssl_context=context, tls_hostname=NAME
        ) as tls:
            await conn.until(b"Secure Renegotiation IS supported\n")
            yield conn, tls


def kill(conn: Connection) -> None:
    """The program at the other end."""
    conn.state()


async def settled(conn: Connection) -> None:
    """Until the program has read what was sent to it: a command must stand at the beginning."""
    await holds(lambda: not queued(conn))


def queued(conn: Connection) -> int:
    """Bytes that the other end of the socket has not read."""
    left = array.array("i", [0])
    fcntl.ioctl(conn.fileno(), termios.TIOCOUTQ, left)
    return left[0]


async def takes(stream: Any, data: bytes) -> None:
    """What comes next."""
    assert await within(stream.reader.read_bytes(len(data))) == data


async def echo(stream: TLSConnection) -> None:
    while True:
        line = await stream.until(b"\n")
        stream.writer.write(bytes(line))


@pytest.mark.parametrize(("version", "end"), [("tls1_2", "client"), ("tls1_3", "server")])
async def test_a_server(run: Program, version: str, end: str, tls_way: str) -> None:
    names: list[str | None] = []
    told: list[Any] = []
    context = server_context()
    context.set_alpn_protocols(["test"])
    context.verify_mode = ssl.CERT_REQUIRED
    authority().configure_trust(context)
    if tls_way == "memory":  # with a callback of Python's it is always that
        context.sni_callback = lambda _ssl, name, _context: names.append(name)

    async def handler(stream: TLSConnection) -> None:
        told.append(stream.extra(TLSAttribute.tls_version))
        told.append(stream.extra(TLSAttribute.alpn_protocol))
        told.append(stream.extra(TLSAttribute.peer_certificate))
        await both(partial(stream.send, DATA), partial(takes, stream, DATA))
        if end == "client":
            with pytest.raises(EndOfStream):
                await stream.receive()

    async with local(handler, ssl_context=context) as server:
        options = ("-quiet", "-no_ign_eof", "-alpn", "other,test", f"-{version}")
        async with client(run, server, *options) as conn:
            await conn.until(b"verify return:1\n")
            while (await conn.peek(1))[0] not in b"0123456789":
                await conn.until(b"\n")
            await both(partial(conn.send, DATA), partial(takes, conn, DATA))
            if end == "client":
                await conn.send_eof()
            assert b"error" not in b"".join([chunk async for chunk in conn])
        await holds(lambda: server.statistics().closed == {"done": 1})
    assert names == ([NAME] if tls_way == "memory" else [])
    assert told[:2] == [VERSIONS[version], "test"]
    assert ("DNS", NAME) in told[2]["subjectAltName"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client(run: Program, version: str) -> None:
    options = ("-alpn", "test", "-Verify", "1", f"-{version}")
    async with server(run, *options) as (conn, tls):
        assert tls.extra(TLSAttribute.tls_version) == VERSIONS[version]
        assert tls.extra(TLSAttribute.alpn_protocol) == "test"

        async def send() -> None:
            await tls.send(b"\n" + DATA)

        async def arrives() -> None:
            await conn.until(b"\n" + DATA[:20], max_bytes=MIB)
            await takes(conn, DATA[20:])

        await both(send, arrives, partial(conn.send, DATA), partial(takes, tls, DATA))
        assert await within(tls.unwrap()) == (tls.connection, b"")
        await conn.until(b"DONE\n")


@pytest.mark.any_loop
@pytest.mark.parametrize(
    "options",
    [
        "-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA256",  # CBC
        "-tls1_2 -cipher ECDHE-ECDSA-CHACHA20-POLY1305",
        "-tls1_2 -no_etm -cipher ECDHE-ECDSA-AES256-SHA384",
        "-tls1_2 -no_ticket",
        "-tls1_2 -maxfraglen 512",
        "-tls1_2 -max_send_frag 512",
        "-tls1_3 -ciphersuites TLS_CHACHA20_POLY1305_SHA256",
        "-tls1_3 -ciphersuites TLS_AES_128_GCM_SHA256 -no_middlebox",
        "-tls1_3 -groups P-521:X25519",
        "-tls1_3 -maxfraglen 512",
        "-tls1_3 -max_send_frag 512",
        "-tls1_3 -status",
    ],
)
async def test_what_a_client_may_choose(run: Program, options: str) -> None:
    size = 100_000

    async def handler(stream: TLSConnection) -> None:
        await both(partial(stream.send, DATA[:size]), partial(takes, stream, DATA[:size]))

    async with (
        local(handler, ssl_context=server_context()) as ours,
        client(run, ours, "-quiet", "-no_ign_eof", *options.split()) as conn,
    ):
        await conn.until(b"verify return:1\n")
        while (await conn.peek(1))[0] not in b"0123456789":
            await conn.until(b"\n")
        await both(partial(conn.send, DATA[:size]), partial(takes, conn, DATA[:size]))
        await holds(lambda: ours.statistics().closed == {"done": 1})


@pytest.mark.any_loop
@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_program_that_is_killed(run: Program, version: str, role: str) -> None:
    """There is no close_notify: the stream may have been cut."""
    seen: list[BaseException] = []

    async def handler(stream: TLSConnection) -> None:
        await stream.send(b"hello\n")
        try:
            await stream.receive()
        except BrokenResourceError as exc:
            seen.append(exc)

    if role == "server":
        async with local(handler, ssl_context=server_context()) as ours:
            async with client(run, ours, f"-{version}") as conn:
                await conn.until(b"hello\n")
                kill(conn)
            await holds(lambda: ours.statistics().closed == {"done": 1})
    else:
        async with server(run, f"-{version}") as (conn, tls):
            await tls.send(b"hello\n")
            await conn.until(b"hello\n")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(handler, tls)
                await conn.until(b"hello\n")
                kill(conn)
    [exc] = seen
    assert isinstance(exc.__cause__, ssl.SSLEOFError)


@pytest.mark.parametrize(
    ("role", "command"), [("server", b"K\n"), ("client", b"k\n")], ids=["of both", "of its own"]
)
async def test_key_updates(run: Program, role: str, command: bytes) -> None:
    """OpenSSL's program tells of each message that it sends or gets."""

    async def talk(conn: Connection) -> None:
        for number in range(3):
            await conn.send(command)
            await settled(conn)
            await conn.send(b"=%d\n" % number)
            await conn.until(b">>> TLS 1.3, Handshake [length 0005], KeyUpdate")
            if command == b"K\n":
                await conn.until(b"<<< TLS 1.3, Handshake [length 0005], KeyUpdate")
            await conn.until(b"=%d\n" % number)

    if role == "client":
        async with (
            server(run, "-tls1_3", "-msg") as (conn, tls),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(echo, tls)
            await talk(conn)
            tasks.cancel_scope.cancel()
    else:
        async with (
            local(echo, ssl_context=server_context()) as ours,
            client(run, ours, "-tls1_3", "-msg") as conn,
        ):
            await conn.until(b"read R BLOCK\n")
            await talk(conn)


async def test_a_server_refuses_to_renegotiate(run: Program) -> None:
    async with local(echo, ssl_context=server_context()) as ours:
        async with client(run, ours, "-tls1_2") as conn:
            await conn.until(b"Extended master secret")
            await conn.send(b"1\n")
            await conn.until(b"\n1\n")
            await conn.send(b"R\n")
            await conn.until(b"no renegotiation")
        await holds(lambda: sum(ours.statistics().closed.values()) == 1)
        assert ours.statistics().handler_errors == 0


@over_memory
async def test_a_client_renegotiates(run: Program) -> None:
    """In the midst of what goes on: what is sent meanwhile waits for that. The core refuses it."""
    async with server(run, "-tls1_2", "-msg") as (conn, tls):
        for number in range(3):
            await conn.send(b"r\n")
            await conn.until(b"HelloRequest")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(takes, tls, b"%d\n" % number)
                await conn.until(b"ClientHello")
                await tls.send(b"here %d\n" % number)
                await conn.until(b"here %d\n" % number)
                await conn.send(b"%d\n" % number)


@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_certificate_that_is_asked_for_later(run: Program, role: str) -> None:
    if role == "client":
        async with server(run, "-tls1_3", "-verify", "1", post_handshake_auth=True) as (conn, tls):
            await conn.send(b"c\n")
            await settled(conn)
            await conn.send(b"1\n")
            await takes(tls, b"1\n")
            await tls.send(b"here\n")
            await conn.until(b"depth=0")
            await conn.until(b"here\n")
        return
    seen: list[Any] = []
    context = server_context()
    context.post_handshake_auth = True
    context.verify_mode = ssl.CERT_OPTIONAL
    authority().configure_trust(context)

    async def handler(stream: TLSConnection) -> None:
        session = stream.extra(TLSAttribute.ssl_object)
        seen.append(session.getpeercert())
        session.verify_client_post_handshake()
        await stream.send(b"who are you\n")
        await stream.until(b"\n")
        seen.append(session.getpeercert())

    async with (
        local(handler, ssl_context=context) as ours,
        client(run, ours, "-tls1_3", "-enable_pha") as conn,
    ):
        await conn.until(b"who are you\n")
        await conn.send(b"1\n")
        await holds(lambda: ours.statistics().closed == {"done": 1})
    assert not seen[0]
    assert seen[1]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_session_is_resumed(run: Program, version: str, tmp_path: Path) -> None:
    reused: list[bool] = []

    async def handler(stream: TLSConnection) -> None:
        reused.append(stream.extra(TLSAttribute.ssl_object).session_reused)
        await stream.send(b"hello\n")
        await stream.skip(1)

    async with local(handler, ssl_context=server_context()) as ours:
        for option in ("-sess_out", "-sess_in"):
            session = str(tmp_path / "session")
            async with client(run, ours, f"-{version}", option, session) as conn:
                await conn.until(b"hello\n")
                if option == "-sess_out":
                    await holds((tmp_path / "session").exists)
                await conn.send(b"1\n")
                await conn.until(b"closed\n")
    assert reused == [False, True]


async def test_an_upgrade_in_a_handler(run: Program) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"220 mail\r\n")
        await conn.until(b"\r\n")
        conn.writer.write(b"250-mail\r\n250 STARTTLS\r\n")
        assert await conn.until(b"\r\n") == b"STARTTLS\r\n"
        conn.writer.write(b"220 go on\r\n")
        async with await TLSConnection.wrap(
            conn, server_side=True, ssl_context=server_context()
        ) as tls:
            await tls.send(b"secret\n")
            await takes(tls, b"1\n")

    async with local(handler) as ours, client(run, ours, "-starttls", "smtp") as conn:
        await conn.until(b"secret\n")
        await conn.send(b"1\n")
        await conn.until(b"closed\n")
        await holds(lambda: ours.statistics().closed == {"done": 1})

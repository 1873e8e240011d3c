"""TLS connections with curl, and with asyncio's own TLS, at the other end.

OpenSSL's programs are in test_openssl.py; ``ssl``'s sockets and AnyIO's streams in
test_connection.py.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio import BrokenResourceError, to_thread
from certificates import authority, certificate, client_context, server_context
from peers import MIB, holds, pattern
from serving import all_is_accounted_for, ends, local  # noqa: F401
from tls_peers import NAME

import anypoll
from anypoll import TLSConnection

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

MODES = ["handler", "on_request"]
DATA = pattern(MIB)


# --- curl ----------------------------------------------------------------------------------------


async def answer(stream: TLSConnection) -> None:
    """A request of HTTP/1.1: its body comes back, or some data if it has none."""
    head = bytes(await stream.until(b"\r\n\r\n"))
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = await stream.reader.read_bytes(int(fields.get(b"content-length", 0)))
    body = body or DATA
    stream.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
    stream.writer.write(body)


async def answer_all(stream: TLSConnection) -> None:
    while True:
        await answer(stream)


def http(mode: str, **options: Any) -> anypoll.serve:
    function = answer_all if mode == "handler" else answer
    return local(**{"ssl_context": server_context(), mode: function, **options})


@pytest.fixture
def curl(tmp_path: Path, foreign_env: dict[str, str]) -> Callable[..., Awaitable[Any]]:
    """Runs curl for so many URLs at a server: its exit status, and what it has got."""
    path = shutil.which("curl")
    if path is None:
        pytest.skip("curl is not installed")
    authority().cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate().private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")

    async def run(server: anypoll.Server, *options: str, count: int = 1) -> tuple[int, list[bytes]]:
        urls: list[str] = []
        for n in range(count):
            urls += ["-o", str(tmp_path / f"got{n}"), f"https://{NAME}:{server.port}/{n}"]
        command = [path, "-sS", "--cacert", str(tmp_path / "ca.pem"), "--max-time", "60"]
        command += ["--resolve", f"{NAME}:{server.port}:127.0.0.1", *options, *urls]
        done = await anyio.run_process(
            command, env=foreign_env, check=False, stderr=subprocess.DEVNULL
        )
        got = [tmp_path / f"got{n}" for n in range(count)]
        return done.returncode, [file.read_bytes() for file in got if file.exists()]

    return run


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("mode", MODES)
async def test_curl(mode: str, version: str, curl: Any) -> None:
    """Requests one after the other on the same connection, which ends well."""
    async with http(mode) as server:
        result = await curl(server, f"--tlsv{version}", "--tls-max", version, count=5)
        assert result == (0, [DATA] * 5)
        await ends(server, eof=1)


@pytest.mark.parametrize("mode", MODES)
async def test_curl_sends(mode: str, curl: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    async with http(mode) as server:
        options = ("--data-binary", f"@{tmp_path / 'data'}", "-H", "Expect:")
        assert await curl(server, *options, count=2) == (0, [DATA] * 2)
        await ends(server, eof=1)


async def test_curl_with_many_connections(curl: Any) -> None:
    async with http("on_request") as server:
        options = ("--parallel", "--parallel-immediate", "--parallel-max", "8")
        assert await curl(server, *options, count=16) == (0, [DATA] * 16)
        await holds(lambda: not server.connections)
        assert set(server.statistics().closed) == {"eof"}


async def test_curl_with_a_certificate(curl: Any, tmp_path: Path) -> None:
    context = server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    authority().configure_trust(context)
    async with http("handler", ssl_context=context) as server:
        assert await curl(server, "--cert", str(tmp_path / "cert.pem")) == (0, [DATA])
        await ends(server, eof=1)
        status, _ = await curl(server)
        assert status != 0
        assert server.statistics().handler_errors == 0
        await ends(server, eof=1, tls_handshake=1)


async def test_curl_distrusts(curl: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    async with http("handler") as server:
        status, got = await curl(server, "--cacert", str(other))
        assert (status, got) == (60, [])  # CURLE_PEER_FAILED_VERIFICATION
        await holds(lambda: sum(server.statistics().closed.values()) == 1)


# --- asyncio -------------------------------------------------------------------------------------


async def in_a_thread(function: Callable[[], Any]) -> Any:
    """A coroutine function on a loop of asyncio of its own, whatever runs here."""
    return await to_thread.run_sync(lambda: asyncio.run(function()), abandon_on_cancel=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_client_of_asyncio(mode: str, version: str) -> None:
    async def echo(stream: TLSConnection) -> None:
        stream.writer.write(await stream.receive())

    async def echo_all(stream: TLSConnection) -> None:
        while True:
            await echo(stream)

    context = client_context()
    context.maximum_version = getattr(ssl.TLSVersion, version)

    async def client(port: int) -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=NAME
        )

        async def send() -> None:
            for start in range(0, len(DATA), 10_000):
                writer.write(DATA[start : start + 10_000])
                await writer.drain()

        _, got = await asyncio.gather(send(), reader.readexactly(len(DATA)))
        writer.close()
        await writer.wait_closed()
        return got

    options: Any = {mode: echo_all if mode == "handler" else echo}
    async with local(ssl_context=server_context(), **options) as server:
        assert await in_a_thread(partial(client, server.port)) == DATA
        await ends(server, eof=1)


@pytest.mark.parametrize("end", ["well", "aborted"])
async def test_a_server_of_asyncio(end: str) -> None:
    port: list[int] = []

    async def serve() -> None:
        done = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(len(DATA)))
            await writer.drain()
            if end == "aborted":
                assert await reader.readexactly(1) == b"x"
                writer.transport.abort()
            else:
                writer.close()
                await writer.wait_closed()
            done.set()

        async with await asyncio.start_server(
            handle, "127.0.0.1", 0, ssl=server_context()
        ) as server:
            port.append(server.sockets[0].getsockname()[1])
            await done.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_a_thread, serve)
        await holds(lambda: port)
        async with await anypoll.connect_tcp(
            "127.0.0.1", port[0], tls_hostname=NAME, ssl_context=client_context()
        ) as tls:
            async with anyio.create_task_group() as talk:
                talk.start_soon(tls.send, DATA)
                assert await tls.reader.read_bytes(len(DATA)) == DATA
            if end == "aborted":
                await tls.send(b"x")
                with pytest.raises(BrokenResourceError):
                    await tls.receive()
            else:
                assert [chunk async for chunk in tls] == []

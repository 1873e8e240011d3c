"""The programs in examples/, but for the key-value server (test_kv.py): each is run as it stands,
and its parts are tried on all loops.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio import BrokenResourceError, ClosedResourceError
from certificates import authority as own_authority, certificate
from peers import (
    KIB,
    MIB,
    holds,
    pattern,
    read_all,
    read_to_end,
    reset,
    send_all,
    within,
)
from programs import run_to_end, running, stop

import anypoll

EXAMPLES = Path(__file__).parent.parent / "examples"
HOST = "127.0.0.1"
#: Of a receive buffer; with less TCP begins to wait for its timers.
SMALL = 256 * KIB


def one_client(test: Any) -> Any:
    """A test of a program with a loop of its own: on one loop here."""
    return pytest.mark.unsanitized(pytest.mark.anyio(pytest.mark.loops("asyncio")(test)))


@contextlib.contextmanager
def program(name: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A running example, and the port that it says it listens on."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Listening on port "), process.communicate()
            yield process, int(line.split()[-1])
        finally:
            process.kill()


def connect(port: int) -> socket.socket:
    peer = socket.create_connection((HOST, port), timeout=30)
    peer.setblocking(False)
    return peer


async def echoed(port: int) -> None:
    """Much comes back as it was sent; half-closing ends it."""
    data = pattern(3 * MIB)
    with connect(port) as peer:
        async with anyio.create_task_group() as tg:

            async def send() -> None:
                await send_all(peer, data)
                peer.shutdown(socket.SHUT_WR)

            tg.start_soon(send)
            assert await read_to_end(peer) == data


@asynccontextmanager
async def served(handler: Any = None, **options: Any) -> AsyncIterator[anypoll.Server]:
    """In the end all of its connections have ended well."""
    async with anypoll.serve(handler, host=HOST, port=0, **options) as server:
        yield server
        await holds(lambda: not server.connections)
    assert server.statistics().handler_errors == 0


# --- echo ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_echo(example: Any) -> None:
    async with served(example("echo").handler) as server:
        await echoed(server.port)


@pytest.mark.trio
async def test_echo_in_a_nursery(example: Any) -> None:
    async with served(example("echo_trio").handler) as server:
        await echoed(server.port)


@pytest.mark.trio
async def test_echo_in_a_nursery_gives_up_on_who_is_silent(
    example: Any, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        await example("echo_trio").handler(first)  # a minute is over when nothing else can happen
    assert trio.current_time() == pytest.approx(60)


@one_client
@pytest.mark.parametrize(
    ("name", "signum"), [("echo.py", signal.SIGINT), ("echo_trio.py", signal.SIGTERM)]
)
async def test_the_echo_programs(name: str, signum: signal.Signals) -> None:
    with program(name, 0) as (process, port), connect(port) as idle:
        await echoed(port)
        stop(process, signum)
        assert await read_to_end(idle) == b""


# --- remote calls --------------------------------------------------------------------------------


@asynccontextmanager
async def rpc(example: Any) -> AsyncIterator[tuple[anypoll.Server, ModuleType]]:
    async with served(example("rpc_server").handler) as server:
        yield server, example("rpc_client")


@pytest.mark.anyio
async def test_many_calls_over_one_connection(example: Any) -> None:
    results: dict[int, int] = {}
    async with rpc(example) as (server, client), client.connect(HOST, server.port) as connection:

        async def call(number: int) -> None:
            results[number] = await connection.call("add", number, 1)

        async with anyio.create_task_group() as tg:
            for number in range(500):
                tg.start_soon(call, number)
        assert len(server.connections) == 1
        assert next(iter(server.connections)).statistics().writes < 250
    assert results == {number: number + 1 for number in range(500)}


@pytest.mark.anyio
async def test_calls_are_answered_in_any_order(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    released = anyio.Event()

    async def slow() -> str:
        await released.wait()
        return "slow"

    monkeypatch.setitem(example("rpc_server").METHODS, "slow", slow)

    async def call(connection: Any) -> None:
        order.append(await connection.call("slow"))

    async with (
        rpc(example) as (server, client),
        client.connect(HOST, server.port) as connection,
        anyio.create_task_group() as tg,
    ):
        tg.start_soon(call, connection)
        await anyio.wait_all_tasks_blocked()
        order.append(await connection.call("add", 1, 2))
        released.set()
    assert order == [3, "slow"]


@pytest.mark.anyio
async def test_calls_that_fail(example: Any) -> None:
    async with rpc(example) as (server, client), client.connect(HOST, server.port) as connection:
        with pytest.raises(client.RemoteError, match="there is no method 'nonsense'"):
            await connection.call("nonsense")
        with pytest.raises(client.RemoteError, match="TypeError"):
            await connection.call("add", 1)
        assert await connection.call("add", 0.5, 1) == 1.5


@pytest.mark.anyio
async def test_a_call_that_is_cancelled(example: Any) -> None:
    async with rpc(example) as (server, client), client.connect(HOST, server.port) as connection:
        with anyio.move_on_after(0) as scope:
            await connection.call("sleep", 0)
        assert scope.cancelled_caught
        assert await connection.call("sleep", 0) == 0
        assert connection._waiting == connection._replies == {}


@pytest.mark.anyio
async def test_a_server_that_goes_away(example: Any) -> None:
    client = example("rpc_client")
    with socket.create_server((HOST, 0)) as listening:
        async with client.connect(HOST, listening.getsockname()[1]) as connection:
            peer, _ = listening.accept()
            async with anyio.create_task_group() as tg:

                async def call() -> None:
                    with pytest.raises(ConnectionError, match="lost"):
                        await connection.call("sleep", 1000)

                for _ in range(3):
                    tg.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                peer.close()
            with pytest.raises((BrokenResourceError, ClosedResourceError)):
                await connection.call("add", 1, 2)


@pytest.mark.anyio
async def test_calls_that_run_are_answered_after_the_clients_end(example: Any) -> None:
    server_module = example("rpc_server")
    async with rpc(example) as (server, client):
        with connect(server.port) as peer:
            body = client.calls.encode(server_module.Call(7, "sleep", [0.01]))
            await send_all(peer, len(body).to_bytes(4, "big") + body)
            peer.shutdown(socket.SHUT_WR)
            got = await read_to_end(peer)
        reply = client.replies.decode(got[4:])
        assert (reply.id, reply.result, reply.error) == (7, 0.01, None)


@pytest.mark.anyio
@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", b"\0\0\0\2\xc1\xc1", b"\0\0\0\1\x05"])
async def test_who_speaks_nonsense_is_left(example: Any, nonsense: bytes) -> None:
    async with rpc(example) as (server, _client):
        with connect(server.port) as peer:
            await send_all(peer, nonsense)
            assert await read_to_end(peer) == b""


@pytest.mark.anyio
async def test_who_does_not_read_replies_is_not_read_either(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So neither tasks nor memory grow."""
    server_module = example("rpc_server")
    text, count, called = "x" * 50_000, 400, 0

    async def large(number: int) -> str:
        nonlocal called
        called += 1
        return text

    monkeypatch.setitem(server_module.METHODS, "large", large)
    async with rpc(example) as (server, client), anyio.create_task_group() as tg:
        size = 4 + len(client.calls.encode(server_module.Reply(200, text)))
        with connect(server.port) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            await holds(lambda: server.connections)
            [conn] = server.connections
            calls = [
                client.calls.encode(server_module.Call(200 + n, "large", [n])) for n in range(count)
            ]
            data = b"".join(len(body).to_bytes(4, "big") + body for body in calls)
            tg.start_soon(send_all, peer, data)
            await holds(lambda: called - conn.statistics().bytes_sent // size >= 100)
            await anyio.wait_all_tasks_blocked()
            assert called - conn.statistics().bytes_sent // size <= 100 + 10
            assert called < count
            await read_all(peer, count * size)
            assert called == count


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_the_rpc_programs(anypoll_command: list[str], backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is missing")
    target = f"{EXAMPLES / 'rpc_server.py'}:handler"
    command = [*anypoll_command, "serve", target, "--port", "0", "--backend", backend]
    with running(command) as (process, address):
        client = run_to_end(
            [sys.executable, EXAMPLES / "rpc_client.py", address.rpartition(":")[2]]
        )
        assert (client.stderr, client.returncode) == ("", 0)
        assert sorted(client.stdout.splitlines()) == sorted(f"{n} + 1 = {n + 1}" for n in range(10))
        stop(process)


# --- the gateway ---------------------------------------------------------------------------------


@asynccontextmanager
async def gateway(example: Any, **options: Any) -> AsyncIterator[tuple[anypoll.Server, Any]]:
    """One, and the listening socket of its target."""
    with socket.create_server((HOST, 0)) as target:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        handler = example("gateway").Gateway(HOST, target.getsockname()[1]).handler
        async with served(handler, **options) as server:
            yield server, target


async def accepted(target: socket.socket) -> socket.socket:
    await within(anyio.wait_readable(target))
    peer, _ = target.accept()
    peer.setblocking(False)
    return peer


@pytest.mark.anyio
async def test_a_gateway_forwards_both_ways_and_half_closes(example: Any) -> None:
    there, back = pattern(2 * MIB, seed=1), pattern(3 * MIB, seed=2)
    async with gateway(example) as (server, target):
        with connect(server.port) as client, await accepted(target) as origin:
            async with anyio.create_task_group() as tg:
                tg.start_soon(send_all, client, there)
                tg.start_soon(send_all, origin, back)
                got = [await read_all(origin, len(there)), await read_all(client, len(back))]
            assert got == [there, back]
            client.shutdown(socket.SHUT_WR)
            assert await read_to_end(origin) == b""
            await send_all(origin, b"still here")
            assert await read_all(client, 10) == b"still here"
            origin.close()
            assert await read_to_end(client) == b""


@pytest.mark.anyio
async def test_the_target_may_end_first(example: Any) -> None:
    async with gateway(example) as (server, target):
        with connect(server.port) as client, await accepted(target) as origin:
            await send_all(origin, b"bye")
            origin.shutdown(socket.SHUT_WR)
            assert await read_to_end(client) == b"bye"
            await send_all(client, b"thanks")
            client.shutdown(socket.SHUT_WR)
            assert await read_to_end(origin) == b"thanks"


@pytest.mark.anyio
async def test_a_gateway_slows_down_who_sends_too_fast(example: Any) -> None:
    data = pattern(8 * MIB)
    async with gateway(example) as (server, target):
        with connect(server.port) as client, await accepted(target) as origin:
            async with anyio.create_task_group() as tg:
                tg.start_soon(send_all, client, data)
                await holds(lambda: server.connections)
                [conn] = server.connections
                # what the target still has to take counts towards the high water, too
                await holds(lambda: conn.statistics().buffered_input >= 100 * KIB)
                assert conn.statistics().buffered_input <= MIB
                assert await read_all(origin, len(data)) == data


@pytest.mark.anyio
@pytest.mark.parametrize("which", ["client", "origin"])
async def test_a_break_reaches_the_other_end(example: Any, which: str) -> None:
    async with gateway(example) as (server, target):
        with connect(server.port) as client, await accepted(target) as origin:
            await send_all(client, b"hello")
            assert await read_all(origin, 5) == b"hello"
            gone, left = (client, origin) if which == "client" else (origin, client)
            reset(gone)
            with pytest.raises(ConnectionResetError):
                await read_to_end(left)


@pytest.mark.anyio
async def test_a_target_that_refuses(example: Any) -> None:
    with socket.create_server((HOST, 0)) as nobody:
        port = nobody.getsockname()[1]
    handler = example("gateway").Gateway(HOST, port).handler
    async with served(handler) as server:
        with connect(server.port) as client, pytest.raises(ConnectionResetError):
            await read_to_end(client)


@pytest.mark.anyio
async def test_a_pair_that_is_silent(example: Any) -> None:
    async with gateway(example, idle_timeout=0.05) as (server, target):
        with connect(server.port) as client, await accepted(target) as origin:
            for end in (client, origin):
                with contextlib.suppress(ConnectionResetError):
                    assert await read_to_end(end) == b""


@pytest.mark.anyio
async def test_an_end_that_takes_nothing(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example("gateway"), "WRITE", 0.05)
    async with gateway(example) as (server, target):
        with (
            connect(server.port) as client,
            await accepted(target),
            pytest.raises((ConnectionResetError, BrokenPipeError)),
        ):
            await within(send_all(client, bytes(64 * MIB)))


@one_client
async def test_the_gateway_program() -> None:
    with socket.create_server((HOST, 0)) as target:
        port = target.getsockname()[1]
        with program("gateway.py", 0, HOST, port) as (process, own), connect(own) as client:
            with await accepted(target) as origin:
                await send_all(client, b"there")
                assert await read_all(origin, 5) == b"there"
                await send_all(origin, b"and back")
                assert await read_all(client, 8) == b"and back"
                client.close()
            stop(process)


# --- request mode --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_sums_in_request_mode(example: Any) -> None:
    module = example("request_mode")
    async with served(on_request=module.on_request, on_prepare=module.on_prepare) as server:
        with connect(server.port) as one, connect(server.port) as other:
            await send_all(one, b"1\n2\n")
            assert await read_all(one, 4) == b"1\n3\n"
            await send_all(other, b"5\n1")
            assert await read_all(other, 2) == b"5\n"
            await send_all(one, b"x\n-3\n")
            assert await read_all(one, 18) == b"a number, please\n0\n"[:18]
            await send_all(other, b"0\n")
            assert await read_all(other, 3) == b"15\n"
            assert {conn.idle_timeout for conn in server.connections} == {3600}


@one_client
async def test_the_program_in_request_mode() -> None:
    with program("request_mode.py", 0) as (process, port), connect(port) as client:
        await send_all(client, b"7\n")
        assert await read_all(client, 2) == b"7\n"
        stop(process)


# --- TLS -----------------------------------------------------------------------------------------


@pytest.mark.unsanitized
def test_tls_server_and_client(tmp_path: Path) -> None:
    authority, leaf = tmp_path / "authority.pem", certificate()
    own_authority().cert_pem.write_to_path(str(authority))
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(str(chain), append=True)
    leaf.private_key_pem.write_to_path(str(key))
    with program("tls.py", "serve", chain, key, 0) as (process, port):
        ask = [sys.executable, str(EXAMPLES / "tls.py"), "ask", str(authority), str(port)]
        good = run_to_end([*ask, "anypoll.test"])
        assert (good.returncode, good.stdout) == (0, "HELLO\nWORLD\n"), good.stderr
        wrong = run_to_end([*ask, "other.test"])
        assert wrong.returncode != 0
        assert "certificate" in wrong.stderr
        stop(process)


# --- the texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_example_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"examples{os.sep}{path.name}" in text

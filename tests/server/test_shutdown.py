"""A server's graceful end, with hooks, limits and request mode. (What test_server.py has of it is
about handlers alone.)
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import EndOfStream
from peers import KIB, MIB, holds, pattern, read_all, read_to_end, send_all, within
from serving import (
    FOR_EVER,
    HOST,
    MODES,
    all_is_accounted_for,  # noqa: F401
    client,
    connected,
    echoing,
    faults_are_undone,  # noqa: F401
    is_served,
    local,
    no_event_comes,  # noqa: F401
    turned_away,
)

import anypoll
from anypoll import Connection, _epoll

pytestmark = pytest.mark.anyio


def serving(mode: str, **options: Any) -> anypoll.serve:
    """An echo server whose grace no test waits for."""
    return local(**echoing(mode), **{"shutdown_timeout": FOR_EVER} | options)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for both ends of a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("mode", MODES)
async def test_a_thousand_idle_connections(mode: str) -> None:
    """L40. They have spoken before. No timer ends them: the grace is for ever."""
    closed = 0

    def count() -> None:
        nonlocal closed
        closed += 1

    async with serving(mode, on_prepare=lambda conn: conn.add_close_callback(count)) as server:
        socks = [connected(server) for _ in range(1000)]
        for sock in socks:
            sock.send(b"x")
        for sock in socks:
            assert await within(read_all(sock, 1)) == b"x"
        await holds(lambda: len(server.connections) == 1000)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(60):
            await server.shutdown()
        assert server.connections == ()
    for sock in socks:
        assert await read_to_end(sock) == b""
        sock.close()
    statistics = server.statistics()
    assert (statistics.accepted, statistics.active, statistics.handler_errors) == (1000, 0, 0)
    assert sum(statistics.closed.values()) == closed == 1000
    assert not {"cancelled", "error"} & set(statistics.closed)
    assert statistics.bytes_received == statistics.bytes_sent == 1000


@pytest.mark.parametrize("kind", ["tcp", "unix", "messages"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_request_that_no_poller_has_read(
    mode: str, kind: str, deaf: Callable[[], Awaitable[None]], tmp_path: Path
) -> None:
    """It has come before the end, and is answered."""
    sort = socket.SOCK_SEQPACKET if kind == "messages" else socket.SOCK_STREAM
    if kind == "tcp":
        listener = await anypoll.create_tcp_listener(local_host=HOST)
    else:
        listener = await anypoll.create_unix_listener(tmp_path / "socket", kind=sort)
    options = {"shutdown_timeout": FOR_EVER, "listeners": listener}
    async with anypoll.serve(**echoing(mode), **options) as server:
        [address, *_] = server.addresses
        with socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX, sort) as sock:
            sock.connect(address)
            sock.setblocking(False)
            await is_served(sock, b"first")
            await anyio.wait_all_tasks_blocked()
            await deaf()
            sock.send(b"second")
            async with anyio.create_task_group() as group:
                group.start_soon(server.shutdown)
                await anyio.wait_all_tasks_blocked()
                assert len(server.connections) == 1
                _epoll.clear_faults()
            assert await within(read_to_end(sock)) == b"second"
    assert server.statistics().handler_errors == 0


@pytest.mark.parametrize("mode", MODES)
async def test_the_last_bytes_reach_the_peer(mode: str) -> None:
    """Of one that is at work when the end comes, however slowly they are taken."""
    data = pattern(2 * MIB)
    at_work = anyio.Event()
    go_on = anyio.Event()

    async def work(conn: Connection) -> None:
        await conn.next(1)
        at_work.set()
        await go_on.wait()
        conn.writer.write(data)

    options: dict[str, Any] = {mode: work, "shutdown_timeout": FOR_EVER}
    got = b""

    async def take(sock: socket.socket) -> None:
        nonlocal got
        await server.wait_shutting_down()
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        while piece := await read_all(sock, 100 * KIB):
            got += piece
            await anyio.lowlevel.checkpoint()
        sock.close()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group, local(**options) as server:
            sock = connected(server)
            await send_all(sock, b"x")
            await at_work.wait()
            group.start_soon(take, sock)
    assert got == data
    assert "cancelled" not in server.statistics().closed


@pytest.mark.parametrize("mode", MODES)
async def test_the_end_of_the_server_is_not_the_peers(mode: str) -> None:
    """No ``on_disconnect``; nor is the rest left out."""
    told: list[str] = []

    def prepare(conn: Connection) -> None:
        told.append("on_prepare")
        conn.add_close_callback(lambda: told.append("on_close"))

    async def connect(conn: Connection) -> None:
        told.append("on_connect")

    async def disconnect(conn: Connection) -> None:
        told.append("on_disconnect")

    hooks = {"on_prepare": prepare, "on_connect": connect, "on_disconnect": disconnect}
    async with serving(mode, **hooks, cancel_on_disconnect=True) as server:
        sock = connected(server)
        await is_served(sock)
        await anyio.wait_all_tasks_blocked()
    assert await read_to_end(sock) == b""
    sock.close()
    assert told == ["on_prepare", "on_connect", "on_close"]
    assert sum(server.statistics().closed.values()) == 1
    assert "disconnected" not in server.statistics().closed


@pytest.mark.parametrize("where", ["on_connect", "on_disconnect", "on_close"])
@pytest.mark.parametrize("mode", MODES)
async def test_hooks_that_run_are_waited_for(mode: str, where: str) -> None:
    """As handlers are, if they are at work; one that waits for input sees the end of the stream."""
    begun, go_on = anyio.Event(), anyio.Event()
    ended: list[str] = []

    async def hook(conn: Connection) -> None:
        begun.set()
        await go_on.wait()
        if where == "on_connect":
            with pytest.raises(EndOfStream):
                await conn.next(1)
        ended.append(where)

    hooks: dict[str, Any] = {where: hook}
    if where == "on_close":
        hooks = {"on_prepare": lambda conn: conn.add_close_callback(hook)}

    async def release() -> None:
        await server.wait_shutting_down()
        await anyio.wait_all_tasks_blocked()
        assert server.shutting_down
        assert len(server.connections) == server.statistics().active == 1
        go_on.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group, serving(mode, **hooks) as server:
            sock = connected(server)
            if where != "on_connect":
                sock.close()
            await begun.wait()
            group.start_soon(release)
    sock.close()
    assert ended == [where]
    assert server.connections == ()
    assert "cancelled" not in server.statistics().closed


@pytest.mark.parametrize("mode", MODES)
async def test_full_servers_end_with_those_that_are_in(mode: str) -> None:
    """At once. No place that becomes free is given to anybody then: those that wait are reset."""
    async with serving(mode, max_connections=5) as server:
        socks = [connected(server) for _ in range(20)]
        for sock in socks[:5]:
            await is_served(sock)
    for sock in socks:
        assert await turned_away(sock)
        sock.close()
    assert server.statistics().accepted == 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before", "during", "together"])
async def test_ends_from_all_sides(mode: str, when: str) -> None:
    """Twice, from several tasks, from a hook, and against a cancellation, in any order: the block
    ends, and nothing is left.
    """

    async def disconnect(conn: Connection) -> None:
        assert conn.server is not None
        with anyio.move_on_after(0.01):
            await conn.server.shutdown()

    with anyio.fail_after(60), anyio.CancelScope() as scope:
        async with (
            serving(mode, on_disconnect=disconnect) as server,
            anyio.create_task_group() as group,
        ):
            socks = [connected(server) for _ in range(5)]
            if when != "before":
                await holds(lambda: len(server.connections) == 5)
            for timeout in (None, 30, None):
                group.start_soon(server.shutdown, timeout)
            socks[0].close()
            if when == "together":
                scope.cancel()
            elif when == "during":
                await server.wait_shutting_down()
                scope.cancel()
            await server.shutdown()
    for sock in socks:
        sock.close()
    assert scope.cancel_called == (when != "before")
    assert server.shutting_down
    assert server.connections == ()
    statistics = server.statistics()
    assert statistics.active == 0
    assert sum(statistics.closed.values()) == statistics.accepted
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, server.port))


@pytest.mark.parametrize("mode", MODES)
async def test_an_end_at_once_after_the_start(mode: str) -> None:
    """With peers in the backlog, before the event loop has had a turn."""
    for _ in range(10):
        async with serving(mode) as server:
            socks = [connected(server) for _ in range(10)]
        for sock in socks:
            assert await turned_away(sock)
            sock.close()
        statistics = server.statistics()
        assert sum(statistics.closed.values()) == statistics.accepted <= 10
        assert statistics.active == 0


async def test_waiting_for_the_beginning_of_the_end() -> None:
    """Any number may wait, also afterwards, and be cancelled."""
    seen = 0

    async def wait() -> None:
        nonlocal seen
        await server.wait_shutting_down()
        assert server.shutting_down
        seen += 1

    async with anyio.create_task_group() as group, serving("handler") as server, client(server):
        for _ in range(3):
            group.start_soon(wait)
        with anyio.move_on_after(0) as scope:
            await server.wait_shutting_down()
        assert scope.cancelled_caught
        await anyio.wait_all_tasks_blocked()
        assert (seen, server.shutting_down) == (0, False)
    assert seen == 3
    await within(server.wait_shutting_down())

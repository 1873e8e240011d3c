"""How many connections a server lets in: its limits, and what happens without descriptors."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from certificates import server_context
from peers import holds, read_all, read_to_end, send_all, within
from serving import (
    HOST,
    MODES,
    all_is_accounted_for,  # noqa: F401
    client,
    connected,
    echo,
    errors,
    faults_are_undone,  # noqa: F401
    is_served,
    local,
    turned_away,
)
from tls_peers import plain_or_tls

import anypoll
from anypoll import Connection, _epoll
from anypoll._loop import runtime as _runtime
from anypoll._server import lifecycle

pytestmark = pytest.mark.anyio


async def greet(conn: Connection) -> None:
    """Says that it is there, and waits for the peer to go."""
    await conn.send(b"!")
    with contextlib.suppress(EndOfStream):
        await conn.next(1)


async def greeted(sock: socket.socket) -> bool:
    return await within(read_all(sock, 1)) == b"!"


def silent(sock: socket.socket) -> bool:
    """Nothing has come, not even the end."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def connect_from(host: str, address: Any) -> socket.socket:
    sock = socket.create_connection(address, source_address=(host, 0))
    sock.setblocking(False)
    return sock


class Peak:
    """The most connections that a server has ever had, as its hooks see it."""

    most = 0

    def __call__(self, conn: Connection) -> None:
        assert conn.server is not None
        assert conn.server.statistics().active == len(conn.server.connections)
        self.most = max(self.most, len(conn.server.connections))


# --- max_connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_never_more_than_there_may_be(kind: str, mode: str, tmp_path: Path) -> None:
    """The others wait in the kernel, none is turned away, and all have their turn."""
    peak = Peak()
    where: dict[str, Any] = (
        {"path": tmp_path / "s"} if kind == "unix" else {"host": HOST, "port": 0}
    )
    handler = {"handler": greet, "on_request": echo}[mode]
    options: dict[str, Any] = {mode: handler, "max_connections": 3, "on_prepare": peak}
    async with anypoll.serve(**options, **where) as server:
        waiting = [connected(server) for _ in range(10)]
        if mode == "on_request":
            for sock in waiting:
                await send_all(sock, b"!")
        while waiting:
            first, *waiting = waiting
            assert await greeted(first)
            await holds(lambda: len(server.connections) == min(3, len(waiting) + 1))  # noqa: B023
            assert all(silent(sock) for sock in waiting[2:])
            first.close()
        await holds(lambda: not server.connections)
        statistics = server.statistics()
        assert (statistics.accepted, statistics.rejected, statistics.handler_errors) == (10, 0, 0)
    assert peak.most == 3


async def test_one_limit_for_all_listeners() -> None:
    peak = Peak()
    listeners = [await anypoll.create_tcp_listener(local_host=HOST) for _ in range(3)]
    options: dict[str, Any] = {"max_connections": 2, "on_prepare": peak}
    async with anypoll.serve(greet, listeners=listeners, **options) as server:
        socks = [connect_from(HOST, address) for address in server.addresses * 4]
        with anyio.fail_after(30):
            while socks:
                for sock in [s for s in socks if not silent(s)]:
                    assert await greeted(sock)
                    sock.close()
                    socks.remove(sock)
                await anyio.sleep(0.001)
        await holds(lambda: not server.connections)
    assert peak.most <= 2
    assert server.statistics().accepted == 12


@pytest.mark.parametrize("why", ["not watched", "not opened", "refused"])
async def test_those_that_do_not_begin_take_no_place(
    why: str, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else is concerned, and what ``on_prepare`` has asked for is done."""
    failing = True
    closed = 0

    def prepare(conn: Connection) -> None:
        def count() -> None:
            nonlocal closed
            closed += 1

        conn.add_close_callback(count)
        if failing and why == "refused":
            conn.abort()

    new_connection = lifecycle.new_connection

    def no_memory(fd: int, *args: Any) -> Connection:
        if failing and why == "not opened":
            os.close(fd)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return new_connection(fd, *args)

    monkeypatch.setattr(lifecycle, "new_connection", no_memory)
    reason = "refused" if why == "refused" else "failed"
    async with local(greet, max_connections=2, on_prepare=prepare) as server:
        if why == "not watched":
            fault("EPOLL_CTL", errno.ENOSPC, times=-1)
        for _ in range(5):
            async with client(server) as sock:
                assert await turned_away(sock)
        await holds(lambda: server.statistics().closed == {reason: 5})
        _epoll.clear_faults()
        failing = False
        for _ in range(3):
            async with client(server) as one, client(server) as two:
                assert await greeted(one)
                assert await greeted(two)
        await holds(lambda: not server.connections)
        statistics = server.statistics()
        assert statistics.closed == {reason: 5, "done": 6}
        assert statistics.accepted == 11
        assert statistics.handler_errors == statistics.rejected == 0
    assert closed == (6 if why == "not opened" else 11)


async def test_a_place_is_taken_until_the_last_callback_has_ended() -> None:
    go_on = anyio.Event()

    async def handler(conn: Connection) -> None:
        conn.add_close_callback(go_on.wait)
        await conn.send(b"!")

    async with (
        local(handler, max_connections=1) as server,
        client(server) as first,
        client(server) as second,
    ):
        assert await read_to_end(first) == b"!"
        await anyio.wait_all_tasks_blocked()
        assert server.statistics().accepted == len(server.connections) == 1
        assert silent(second)
        go_on.set()
        assert await greeted(second)


async def test_what_is_accepted_ahead_is_little(by_threads: None) -> None:
    """While Python does something else, the rest stays in the backlog."""
    async with local(greet) as server:
        before = len(os.listdir("/proc/self/fd"))
        socks = [connected(server) for _ in range(200)]
        deadline = time.monotonic() + 30
        while (ahead := len(os.listdir("/proc/self/fd")) - before - 200) < 64:
            assert time.monotonic() < deadline
        assert ahead == 64
        for sock in socks:
            assert await greeted(sock)
            sock.close()


# --- max_connections_per_peer --------------------------------------------------------------------


async def test_one_more_from_the_same_peer_is_closed_at_once() -> None:
    async with local(greet, max_connections_per_peer=2) as server:
        [address] = server.addresses
        for _ in range(3):
            with (
                connect_from("127.0.0.1", address) as one,
                connect_from("127.0.0.1", address) as two,
                connect_from("127.0.0.2", address) as other,
            ):
                for sock in (one, two, other):
                    assert await greeted(sock)
                for _ in range(2):
                    with connect_from("127.0.0.1", address) as third:
                        assert await turned_away(third)
                assert len(server.connections) == server.statistics().active == 3
            await holds(lambda: not server.connections)
        statistics = server.statistics()
        assert (statistics.accepted, statistics.rejected) == (9, 6)
        assert sum(statistics.closed.values()) == 9
    assert not server._admission._peers  # nothing is remembered of those that have gone


async def test_one_that_is_turned_away_takes_no_place() -> None:
    async with local(greet, max_connections=2, max_connections_per_peer=1) as server:
        [address] = server.addresses
        with connect_from("127.0.0.1", address) as one:
            assert await greeted(one)
            for _ in range(20):
                with connect_from("127.0.0.1", address) as again:
                    assert await turned_away(again)
            with connect_from("127.0.0.2", address) as other:
                assert await greeted(other)
    assert server.statistics().rejected == 20


async def test_a_peer_is_the_same_in_both_families() -> None:
    """A socket of IPv6 sees an IPv4 address mapped."""
    try:
        both = await anypoll.create_tcp_listener(local_host="::")
    except OSError:
        pytest.skip("this machine has no IPv6")
    ipv4 = await anypoll.create_tcp_listener(local_host=HOST)
    async with anypoll.serve(greet, listeners=[both, ipv4], max_connections_per_peer=1) as server:
        mapped, plain = ((HOST, address[1]) for address in server.addresses)
        try:
            first = socket.create_connection(mapped)
        except ConnectionRefusedError:
            pytest.skip("sockets of IPv6 are for IPv6 only here")
        with first:
            first.setblocking(False)
            assert await greeted(first)
            with connect_from(HOST, plain) as second:
                assert await turned_away(second)
            with socket.create_connection(("::1", mapped[1])) as other:
                other.setblocking(False)
                assert await greeted(other)
    assert server.statistics().rejected == 1


async def test_unix_sockets_have_no_peers_address(tmp_path: Path) -> None:
    async with anypoll.serve(greet, path=tmp_path / "s", max_connections_per_peer=1) as server:
        socks = [connected(server) for _ in range(5)]
        for sock in socks:
            assert await greeted(sock)
            sock.close()
    assert server.statistics().rejected == 0


# --- without descriptors -------------------------------------------------------------------------


def polls() -> int:
    return sum(poller.polls for poller in anypoll.statistics().pollers)


@pytest.fixture
def no_spin() -> Iterator[None]:
    """A spin is made of polls, as many as fit into its time."""
    before = _runtime.settings().spin
    anypoll.configure(spin=0)
    yield
    anypoll.configure(spin=before)


@pytest.mark.usefixtures("no_spin")
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_accepting_pauses_for_want_of_resources(
    code: int, fault: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    """L35, O5: any number of times, one line in the log for each, and without a busy loop. Who is
    there already notices nothing.
    """
    async with local(echo) as server, client(server) as old:
        await is_served(old)
        for _ in range(3):
            before = polls()
            fault("ACCEPT", code, times=2)  # tried again after 100 ms
            async with client(server) as new:
                await send_all(new, b"new")
                await holds(lambda: log.records)
                await is_served(old, b"old")
                assert await within(read_all(new, 3)) == b"new"
            await holds(lambda: len(server.connections) == 1)
            assert polls() - before < 50
            [record] = errors(log)
            assert (record.name, record.levelname) == ("anypoll.server", "WARNING")
            assert os.strerror(code) in record.getMessage()
            assert str(server.addresses[0]) in record.getMessage()
    assert server.statistics().accepted == 4


async def test_listeners_without_descriptors_make_one_line(
    fault: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    """An episode is one of the server, however many listeners it has."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(3)]
    for sock in sockets:
        sock.setblocking(False)
    fault("ACCEPT", errno.EMFILE, times=6)
    async with anypoll.serve(echo, sock=sockets) as server:
        clients = [connect_from(HOST, address) for address in server.addresses]
        for sock in clients:
            with sock:
                await is_served(sock)
    assert len(errors(log)) == 1


async def test_an_end_while_accepting_is_paused(
    fault: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for the pause."""
    fault("ACCEPT", errno.EMFILE, times=1_000_000)
    async with local(echo) as server:
        sock = connected(server)
        await holds(lambda: log.records)
    assert await turned_away(sock)
    sock.close()
    assert len(errors(log)) == 1
    assert server.statistics().accepted == 0


async def test_limits_and_pauses_together(
    fault: Callable[..., None], log: pytest.LogCaptureFixture
) -> None:
    """No place is lost by a pause: afterwards there are as many as before."""
    peak = Peak()
    async with local(greet, max_connections=2, on_prepare=peak) as server:
        for _ in range(3):
            fault("ACCEPT", errno.EMFILE, times=1)
            socks = [connected(server) for _ in range(6)]
            for sock in socks:
                assert await greeted(sock)
                sock.close()
            await holds(lambda: not server.connections)
    assert peak.most == 2
    assert server.statistics().accepted == 18
    assert 1 <= len(errors(log)) <= 3


# --- storms --------------------------------------------------------------------------------------


@plain_or_tls
async def test_a_storm_of_clients_leaves_others_their_turns(tls_way: str) -> None:
    begun: list[int] = []

    def prepare(_: anypoll.Connection) -> None:
        begun.append(1)

    tls = tls_way != "plain"
    context = server_context() if tls else None
    async with local(greet, on_prepare=prepare, ssl_context=context) as server:
        socks = [connected(server) for _ in range(200)]  # while the event loop stands still
        most = last = 0
        with anyio.fail_after(60):
            while len(begun) < 200:
                await anyio.lowlevel.checkpoint()
                most, last = max(most, len(begun) - last), len(begun)
        assert most <= (16 if tls else 64) * 2
        for sock in socks:
            sock.close()

"""What may be called from any thread: statistics, snapshots, abort()."""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError
from peers import KIB, holds, settle, within
from serving import all_is_accounted_for, local  # noqa: F401 -- a fixture
from tls_peers import plain_or_tls

import anypoll

pytestmark = pytest.mark.anyio


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def dial(server: anypoll.Server, context: ssl.SSLContext | None) -> Any:
    return await anypoll.connect_tcp("127.0.0.1", server.port, ssl_context=context)


class Watchers:
    """Threads that look, again and again, until they are told to stop."""

    def __init__(self, *looks: Callable[[], object]) -> None:
        self.stopped = False
        self.failures: list[BaseException] = []
        self.rounds = [0] * len(looks)
        self.threads = [
            threading.Thread(target=self.watch, args=(index, look))
            for index, look in enumerate(looks)
        ]

    def watch(self, index: int, look: Callable[[], object]) -> None:
        try:
            while not self.stopped:
                look()
                self.rounds[index] += 1
        except BaseException as exc:  # noqa: BLE001 -- for the test
            self.failures.append(exc)

    async def __aenter__(self) -> None:
        for thread in self.threads:
            thread.start()

    async def __aexit__(self, *_: object) -> None:
        self.stopped = True
        for thread in self.threads:
            thread.join()
        assert not self.failures
        assert all(self.rounds)


class Monitor:
    """Looks at one server as an exporter does; what it reads must be of one moment."""

    def __init__(self, server: anypoll.Server) -> None:
        self.server = server
        self.last = server.statistics()

    def counters(self) -> None:
        now, before = self.server.statistics(), self.last
        assert now.accepted == now.active + sum(now.closed.values())
        for name in ("accepted", "bytes_received", "bytes_sent"):
            assert getattr(now, name) >= getattr(before, name), name
        self.last = now

    def connections(self) -> None:
        for conn in self.server.connections:
            assert conn.statistics().bytes_received >= 0
            assert conn.remote_address[0] == "127.0.0.1"
            assert conn.is_active in (True, False)
            assert repr(conn)

    def pollers(self) -> None:
        for poller in anypoll.statistics().pollers:
            assert poller.connections >= 0


@plain_or_tls
@pytest.mark.usefixtures("often")
async def test_looking_while_connections_come_and_go(tls_way: str, tls_contexts: Any) -> None:
    """Pollers, too."""
    rounds, clients = (10, 8) if tls_way == "plain" else (4, 4)

    async def echo(conn: Any) -> None:
        async for chunk in conn:
            await conn.send(chunk)

    async def talk(server: anypoll.Server) -> None:
        for _ in range(rounds):
            async with await dial(server, client_context) as conn:
                await conn.send(b"x" * 100)
                assert await conn.receive() == b"x" * 100

    server_context, client_context = (None, None) if tls_way == "plain" else tls_contexts
    try:
        async with local(echo, ssl_context=server_context) as server:
            first, second = Monitor(server), Monitor(server)
            looks = first.counters, second.counters, first.connections, first.pollers
            async with Watchers(*looks), anyio.create_task_group() as tg:
                for _ in range(clients):
                    tg.start_soon(talk, server)
                for number in range(20):
                    anypoll.configure(pollers=1 + number % 3)
                    await anyio.sleep(0)
    finally:
        anypoll.configure(pollers=1)
    statistics = server.statistics()
    assert (statistics.accepted, statistics.active) == (rounds * clients, 0)
    assert sum(statistics.closed.values()) == rounds * clients


async def waits_to_read(conn: Any) -> None:
    await conn.receive()


async def waits_to_write(conn: Any) -> None:
    await conn.send(bytes(16 * 1024 * KIB))


@plain_or_tls
@pytest.mark.parametrize("does", [waits_to_read, waits_to_write])
async def test_abort(tls_way: str, does: Any, tls_contexts: Any) -> None:
    """The handler is told, wherever it waits; but not in the middle of what it is doing."""
    begun, told = anyio.Event(), anyio.Event()

    async def handler(conn: Any) -> None:
        begun.set()
        with pytest.raises(ClosedResourceError):
            await does(conn)
        told.set()

    server_context, client_context = (None, None) if tls_way == "plain" else tls_contexts
    async with (
        local(handler, ssl_context=server_context) as server,
        await dial(server, client_context),
    ):
        await begun.wait()
        await settle()
        [conn] = server.connections
        for _ in range(2):
            thread = threading.Thread(target=conn.abort)
            thread.start()
            thread.join()  # the event loop may have been anywhere
            assert conn.is_active
        await within(told.wait())
        await holds(lambda: not server.connections)
        conn.abort()
        assert server.statistics().closed == {"done": 1}

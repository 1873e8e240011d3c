"""References: what a request takes it gives back. Counted over many, so that one in a thousand
that is not given back shows.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
import sys
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import BusyResourceError
from peers import holds, is_waiting, opened, read_all, reset, send_all, settle, within
from serving import connected

import anypoll
from anypoll import Connection, _native
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio

REQUESTS = 100_000
ROUND = 64  # connections, each with a request
SIZE = 8
#: What may have grown for other reasons. Each thing that is done is done far more often.
FEW = 200


# --- what handlers do -----------------------------------------------------------------------------


class Kinds:
    """What a connection's handler does for each of its requests, by the order of connecting."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.scopes: set[anyio.CancelScope] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.events: set[anyio.Event] = set()
        self.connections: list[Connection] = []
        self.late = False

    async def reader(self, conn: Connection) -> None:
        conn.writer.write(await conn.next(SIZE))

    async def stream(self, conn: Connection) -> None:
        await conn.send(await conn.receive())

    async def large_stream(self, conn: Connection) -> None:
        await conn.send(await conn.receive(1 << 20))

    async def flushes(self, conn: Connection) -> None:
        await conn.peek(SIZE)
        await conn.skip(1)
        conn.writer.write(b"".join(await conn.reader.next_parts(SIZE - 1)) + b"!")
        await conn.writer.flush()

    async def finds(self, conn: Connection) -> None:
        conn.writer.write(await conn.until(b"."))

    async def times_out(self, conn: Connection) -> None:
        if self.late:
            conn.read_timeout = 1e-6
            try:
                await conn.next(2 * SIZE)
            except anypoll.ReadTimeout:
                self.told["timeouts"] += 1
            conn.read_timeout = None
        await self.reader(conn)

    async def is_cancelled(self, conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            self.scopes.add(scope)
            await conn.next(2 * SIZE)
        self.scopes.discard(scope)
        self.told["cancellations"] += scope.cancelled_caught
        await self.reader(conn)

    async def is_cancelled_natively(self, conn: Connection) -> None:
        task: Any = asyncio.current_task()
        try:
            self.tasks.add(task)
            await conn.next(2 * SIZE)
        except asyncio.CancelledError:
            task.uncancel()
            self.told["cancellations"] += 1
        await self.reader(conn)

    async def cancels_itself(self, conn: Connection) -> None:
        await conn.peek(1)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.send(b"never")
        self.told["cancellations"] += scope.cancelled_caught
        await self.reader(conn)

    async def sleeps(self, conn: Connection) -> None:
        await conn.peek(1)
        await anyio.sleep(0)
        await self.stream(conn)

    async def waits_for_an_event(self, conn: Connection) -> None:
        event = anyio.Event()
        self.events.add(event)
        await event.wait()
        await self.reader(conn)

    async def has_a_group(self, conn: Connection) -> None:
        await conn.peek(1)
        async with anyio.create_task_group() as group:
            group.start_soon(self.reader, conn)

    async def is_refused(self, conn: Connection) -> None:
        """By another one's connection, which somebody reads."""
        await conn.peek(1)
        for other in self.connections:
            if is_waiting(other):
                with pytest.raises(BusyResourceError):
                    await other.next(1)
                self.told["refusals"] += 1
                break
        await self.reader(conn)

    def of(self, number: int, *, on_trio: bool) -> Callable[[Connection], Awaitable[None]]:
        kinds = [
            *(self.reader, self.stream, self.large_stream, self.flushes, self.finds),
            *(self.times_out, self.is_cancelled, self.cancels_itself, self.sleeps),
            *(self.waits_for_an_event, self.has_a_group, self.is_refused),
        ]
        if not on_trio:
            kinds.append(self.is_cancelled_natively)
        return kinds[number % len(kinds)]

    def go_on(self) -> None:
        """Those that do not only wait for input."""
        for scope in self.scopes:
            scope.cancel()
        for task in self.tasks:
            task.cancel()
        for event in self.events:
            event.set()
        self.scopes.clear()
        self.tasks.clear()
        self.events.clear()


# --- counting -------------------------------------------------------------------------------------


class Count:
    """Of all there is, by type; and of who refers to what lives long."""

    def __init__(self) -> None:
        gc.collect()
        self.blocks = sys.getallocatedblocks()
        self.references: int = getattr(sys, "gettotalrefcount", int)()
        self.types = Counter(f"{type(o).__module__}.{type(o).__name__}" for o in gc.get_objects())
        self.held: dict[str, int] = {}

    def hold(self, hub: Any) -> Count:
        singletons = {name: getattr(hub, name, None) for name in ("_value", "_shielded", "_queue")}
        natives = {name: value for name, value in vars(_native).items() if isinstance(value, type)}
        objects = {"hub": hub, "no bytes": b"", "Ellipsis": ..., **singletons, **natives}
        self.held = {name: sys.getrefcount(value) for name, value in objects.items()}
        return self

    def grown(self, before: Count) -> dict[str, int]:
        """What is more than a few, and of our own types whatever is."""
        more = self.types - before.types
        grown = {name: n for name, n in more.items() if n > FEW or name.startswith("anypoll")}
        more = Counter(self.held) - Counter(before.held)
        grown.update({f"refers to {name}": n for name, n in more.items() if n > FEW})
        if self.blocks - before.blocks > 2 * FEW:
            grown["allocated blocks"] = self.blocks - before.blocks
        if self.references - before.references > 10 * FEW:
            grown["references"] = self.references - before.references
        return grown


async def serve_rounds(kinds: Kinds, socks: list[socket.socket], rounds: int) -> None:
    """Without a scope for each: Trio keeps those that have a deadline for a while."""
    for number in range(rounds):
        kinds.late = number % 16 == 0
        for sock in socks:
            sock.send(b"request.")
        for sock in socks:
            left = SIZE
            while left:
                try:
                    left -= len(sock.recv(left))
                except BlockingIOError:
                    kinds.go_on()
                    await anyio.lowlevel.checkpoint()


@pytest.mark.slow
async def test_nothing_is_left_of_many_requests(anyio_backend: Any) -> None:
    kinds = Kinds()

    async def handler(conn: Connection) -> None:
        number = len(kinds.connections)
        kinds.connections.append(conn)
        serve = kinds.of(number, on_trio=anyio_backend[0] == "trio")
        while True:
            await serve(conn)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        socks = [connected(server) for _ in range(ROUND)]
        await holds(lambda: len(kinds.connections) == ROUND)
        await within(serve_rounds(kinds, socks, 100), 600)
        hub: Any = _runtime.current_hub()
        before = Count().hold(hub)
        done = kinds.told.copy()
        await within(serve_rounds(kinds, socks, REQUESTS // ROUND + 1), 600)
        grown = Count().hold(hub).grown(before)
        for sock in socks:
            sock.close()
    assert grown == {}
    done = kinds.told - done
    assert done["cancellations"] > 5 * FEW
    assert done["refusals"] > 5 * FEW
    assert done["timeouts"] > FEW
    assert set(done) == {"cancellations", "refusals", "timeouts"}


# --- garbage --------------------------------------------------------------------------------------


@contextmanager
def garbage() -> Iterator[list[Any]]:
    """Within, nothing is collected; behind, the list has what would have been."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


OURS = str(Path(anypoll.__file__).parent)


def is_ours(thing: Any) -> bool:
    """An object of one of our types, or a frame or a coroutine of our functions, or of this
    file's.
    """
    code = getattr(thing, "cr_code", None) or getattr(thing, "f_code", None)
    file: str = getattr(code, "co_filename", "")
    return type(thing).__module__.startswith("anypoll") or file.startswith((OURS, __file__))


class Ends:
    """How a handler ends, after its first request."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[Any] | None = None
        self.conn: weakref.ref[Connection] | None = None

    async def at_once(self, conn: Connection) -> None:
        pass

    async def with_its_peer(self, conn: Connection) -> None:
        await conn.next(1)

    async def in_a_stream(self, conn: Connection) -> None:
        async for chunk in conn:
            await conn.send(chunk)

    async def with_pending_output(self, conn: Connection) -> None:
        conn.writer.write(b"pending")
        await conn.next(1)

    async def in_a_group(self, conn: Connection) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(conn.aclose)

    async def by_a_deadline(self, conn: Connection) -> None:
        with anyio.move_on_after(0.001):
            await conn.next(1)

    async def by_a_timeout(self, conn: Connection) -> None:
        conn.read_timeout = 0.001
        await conn.next(1)

    async def cancelled(self, conn: Connection) -> None:
        with self.scope:
            await conn.next(1)

    async def cancelled_in_a_foreign_wait(self, conn: Connection) -> None:
        with self.scope:
            await anyio.sleep_forever()

    async def cancelled_natively(self, conn: Connection) -> None:
        self.task = task = asyncio.current_task()
        assert task is not None
        try:
            await conn.next(1)
        except asyncio.CancelledError:
            task.uncancel()

    async def closed_by_somebody(self, conn: Connection) -> None:
        with self.scope:
            self.conn = weakref.ref(conn)
            await conn.next(1)

    async def while_it_rests(self, conn: Connection) -> None:
        await anyio.sleep(0)
        await conn.send(b"x")
        conn.abort()
        await conn.send(b"y")

    async def with_callbacks(self, conn: Connection) -> None:
        conn.add_close_callback(lambda: None)
        conn.add_close_callback(anyio.lowlevel.checkpoint)
        conn.add_close_callback(Connection.abort)
        conn.state = self
        await conn.next(1)

    def disturb(self) -> None:
        """Ends those that do not end with their peer."""
        self.scope.cancel()
        if self.task is not None:
            self.task.cancel()
        conn = self.conn and self.conn()
        if conn is not None:
            conn.abort()


KINDS = [name for name, kind in vars(Ends).items() if inspect.iscoroutinefunction(kind)]


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_are_no_garbage(kind: str, anyio_backend: Any) -> None:
    """What has been served needs no collector: no cycle goes through anything of ours."""
    if kind == "cancelled_natively" and anyio_backend[0] == "trio":
        pytest.skip("Trio's tasks are not cancelled one by one")
    ends: list[Ends] = []
    gone: list[weakref.ref[Any]] = []

    async def handler(conn: Connection) -> None:
        gone.extend([weakref.ref(conn), weakref.ref(conn._core)])
        ends.append(Ends())
        await conn.send(await conn.receive())
        await getattr(ends[-1], kind)(conn)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        for _ in range(2):  # the first time may leave what is made once
            with garbage() as found:
                for number in range(20):
                    with connected(server) as sock:
                        await send_all(sock, b"x")
                        assert await read_all(sock, 1) == b"x"
                        await settle()
                        ends[-1].disturb()
                        if number % 3 == 2:
                            reset(sock)
                    await holds(lambda: not server.connections)
                ends.clear()
                await settle()
                assert [ref() for ref in gone if ref() is not None] == []
    assert [thing for thing in found if is_ours(thing)] == []
    assert len(gone) == 80


@pytest.mark.parametrize("ends", ["with its peer", "cancelled", "while it waits"])
async def test_connections_without_a_server_are_no_garbage(ends: str) -> None:
    gone: list[weakref.ref[Any]] = []

    async def read(scope: anyio.CancelScope) -> None:
        async with opened() as (conn, peer):
            gone.extend([weakref.ref(conn), weakref.ref(conn._core)])
            conn.writer.write(b"x")
            peer.send(b"x")
            await conn.next(1)
            async with anyio.create_task_group() as group:
                if ends == "with its peer":
                    peer.shutdown(socket.SHUT_WR)
                elif ends == "while it waits":
                    group.start_soon(conn.aclose)
                with scope, suppress(anyio.EndOfStream, anyio.ClosedResourceError):
                    await conn.next(1)

    for _ in range(2):  # the first time may leave what is made once
        with garbage() as found:
            for _ in range(20):
                async with anyio.create_task_group() as group:
                    scope = anyio.CancelScope()
                    group.start_soon(read, scope)
                    await settle()
                    scope.cancel()
            await settle()
            assert [ref() for ref in gone if ref() is not None] == []
    assert [thing for thing in found if is_ours(thing)] == []
    assert len(gone) == 80

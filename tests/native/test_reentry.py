"""Handlers that have to do with one another, while the hub is resuming one of them.

Handler A runs within the hub's callback, and handler B is parked, woken or listed meanwhile. What A
does to B is done, but B does not run before A waits.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from anyio import BusyResourceError, ClosedResourceError, EndOfStream
from peers import MIB, holds, is_waiting, read_all, send_all
from serving import connected

import anypoll
from anypoll import Connection

pytestmark = pytest.mark.anyio

Handler = Callable[[Connection], Awaitable[None]]


@pytest.fixture(params=[True, False], ids=["directly", "by its task"], autouse=True)
def direct(request: pytest.FixtureRequest) -> Any:
    """Each test holds for both ways."""
    anypoll.configure(direct_resume=request.param)
    yield request.param
    anypoll.configure(direct_resume=True)


class Served:
    """A server's connections, in their order."""

    def __init__(self, server: anypoll.Server) -> None:
        self.server = server
        self.conns: list[Connection] = []
        self.socks: list[socket.socket] = []
        self.ended = 0


@asynccontextmanager
async def served(*handlers: Handler) -> AsyncIterator[Served]:
    """A client for each of the handlers, all of which are waiting for input when the block begins,
    and have ended without an error behind it.
    """

    async def handler(conn: Connection) -> None:
        this = handlers[len(all_.conns)]
        all_.conns.append(conn)
        with suppress(EndOfStream):
            await this(conn)
        all_.ended += 1

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        all_ = Served(server)
        for number in range(len(handlers)):
            all_.socks.append(connected(server))
            await holds(lambda: len(all_.conns) > number and is_waiting(all_.conns[-1]))  # noqa: B023
        yield all_
        for sock in all_.socks:
            sock.close()
        await holds(lambda: not server.connections)
        assert all_.ended == len(handlers)
        assert not server.statistics().handler_errors


def task_of() -> Any:
    if anyio.get_current_task() is None:
        return None
    with suppress(RuntimeError):
        return asyncio.current_task()
    return trio.lowlevel.current_task()


async def answers(conn: Connection) -> None:
    """What a B does that nothing happens to."""
    async for chunk in conn:
        await conn.send(chunk)


# --- A calls B's connection -----------------------------------------------------------------------

READS: dict[str, Callable[[Connection], Awaitable[Any]]] = {
    "next": lambda conn: conn.next(1),
    "receive": lambda conn: conn.receive(),
    "skip": lambda conn: conn.skip(1),
    "until": lambda conn: conn.until(b"x"),
    "next_parts": lambda conn: conn.reader.next_parts(1),
    "read_bytes": lambda conn: conn.reader.read_bytes(1),
}


@pytest.mark.parametrize("call", READS)
async def test_one_is_refused_where_another_reads(call: str) -> None:
    """And disturbs nobody."""
    refused: list[str] = []

    async def a(conn: Connection) -> None:
        for _ in range(3):
            await conn.next(1)
            with pytest.raises(BusyResourceError):
                await READS[call](both.conns[1])
            with pytest.raises(BusyResourceError):
                both.conns[1].reader.next_nowait(1)
            refused.append(call)

    async with served(a, answers) as both:
        for n in range(3):
            await send_all(both.socks[0], b"x")
            await holds(lambda: len(refused) > n)  # noqa: B023
            await send_all(both.socks[1], b"yz")
            assert await read_all(both.socks[1], 2) == b"yz"


@pytest.mark.parametrize("call", ["send", "flush", "send and wait"])
async def test_one_writes_where_another_reads(call: str) -> None:
    """With what the other had pending, and the other reads on."""
    size = 4 * MIB if call == "send and wait" else 1

    async def a(conn: Connection) -> None:
        await conn.next(1)
        other = both.conns[1]
        if call == "flush":
            other.writer.write(b"a")
            await other.writer.flush()
        else:
            await other.send(b"a" * size)
        await conn.send(b"!")

    async with served(a, answers) as both:
        await send_all(both.socks[0], b"x")
        assert await read_all(both.socks[1], size) == b"a" * size
        assert await read_all(both.socks[0], 1) == b"!"
        await send_all(both.socks[1], b"y")
        assert await read_all(both.socks[1], 1) == b"y"


async def test_one_is_refused_where_another_sends() -> None:
    async def a(conn: Connection) -> None:
        await conn.next(1)
        with pytest.raises(BusyResourceError):
            await both.conns[1].send(b"a")
        with pytest.raises(BusyResourceError):
            await both.conns[1].writer.flush()
        await conn.send(b"!")

    async def b(conn: Connection) -> None:
        await conn.next(1)
        await conn.send(b"b" * 8 * MIB)

    async with served(a, b) as both:
        await send_all(both.socks[1], b"y")
        await holds(lambda: both.conns[1]._core.number in both.conns[1]._core.hub.writers)
        await send_all(both.socks[0], b"x")
        assert await read_all(both.socks[0], 1) == b"!"
        assert await read_all(both.socks[1], 8 * MIB) == b"b" * 8 * MIB


async def test_one_reads_where_another_does_not() -> None:
    """And is resumed by input of a connection that is not its own, then by its own."""
    release = anyio.Event()

    async def a(conn: Connection) -> None:
        for _ in range(20):
            first = await conn.next(1)
            second = await both.conns[1].next(1)
            await conn.send(bytes(first) + bytes(second))
        release.set()

    async def b(conn: Connection) -> None:
        await conn.next(1)
        await release.wait()
        await conn.send(await conn.next(1))

    async with served(a, b) as both:
        await send_all(both.socks[1], b"!")
        await holds(lambda: not is_waiting(both.conns[1]))
        for n in range(20):
            await send_all(both.socks[0], bytes([n]))
            await holds(lambda: is_waiting(both.conns[1]))
            await send_all(both.socks[1], bytes([n + 100]))
            assert await read_all(both.socks[0], 2) == bytes([n, n + 100])
        await send_all(both.socks[1], b"y")
        assert await read_all(both.socks[1], 1) == b"y"


async def test_each_reads_the_others() -> None:
    """From the first bytes on."""
    count = 50

    def reads(mine: int) -> Handler:
        async def handler(conn: Connection) -> None:
            await conn.next(1)
            await meet()
            for _ in range(count):
                await conn.send(await both.conns[1 - mine].next(1))
            await meet()

        return handler

    met = 0

    async def meet() -> None:
        nonlocal met
        met += 1
        goal = met + met % 2
        while met < goal:
            await anyio.sleep(0)

    async with served(reads(0), reads(1)) as both:
        for sock in both.socks:
            await send_all(sock, b"!")
        for n in range(count):
            for sock in both.socks:
                await send_all(sock, bytes([n]))
            for sock in both.socks:
                assert await read_all(sock, 1) == bytes([n])


# --- A closes B's connection ----------------------------------------------------------------------

CLOSES: dict[str, Callable[[Connection], Any]] = {
    "abort": lambda conn: conn.abort(),
    "aclose": lambda conn: conn.aclose(),
    "closed twice": lambda conn: [conn.abort(), conn.abort()][0],
}


@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("where", ["in a read", "woken", "in a send", "elsewhere"])
async def test_one_closes_anothers(how: str, where: str) -> None:
    """The other learns of it when the first waits, not before. Its input is lost with it."""
    order: list[str] = []

    async def a(conn: Connection) -> None:
        await conn.next(1)
        closing = CLOSES[how](both.conns[1])
        order.append("closed")
        if closing is not None:
            await closing
        await conn.send(b"!")

    async def b(conn: Connection) -> None:
        try:
            if where == "elsewhere":
                await conn.next(1)
                await gate.wait()
            if where == "in a send":
                await conn.next(1)
                await conn.send(bytes(8 * MIB))
            await conn.next(2)
            order.append("read")
        except ClosedResourceError:
            order.append("learned")

    gate = anyio.Event()
    async with served(a, b) as both:
        if where in ("elsewhere", "in a send"):
            await send_all(both.socks[1], b"y")
            await holds(lambda: not is_waiting(both.conns[1]))
        both.socks[0].send(b"x")
        if where == "woken":  # in the same batch, or in the next one, or before
            both.socks[1].send(b"yz")
        assert await read_all(both.socks[0], 1) == b"!"
        gate.set()
        await holds(lambda: both.ended)
    assert order in (
        [["closed", "learned"]] if where != "woken" else [["closed", "learned"], ["read", "closed"]]
    )


@pytest.mark.parametrize("call", ["send", "receive"])
async def test_one_closes_anothers_that_rests(call: str) -> None:
    """A `send()` has written; a `receive()` has nothing to return any more. Trio mixes the order
    within a round, so the other may have gone on already.
    """
    ends: list[str] = []
    resting = anyio.Event()

    async def a(conn: Connection) -> None:
        await conn.next(1)
        await resting.wait()
        both.conns[1].abort()

    async def b(conn: Connection) -> None:
        await conn.next(1)
        resting.set()
        try:
            await (conn.send(b"!") if call == "send" else conn.receive(1))
            ends.append("returned")
            await conn.next(3)
        except ClosedResourceError:
            ends.append("closed")

    async with served(a, b) as both:
        await send_all(both.socks[0], b"x")
        await send_all(both.socks[1], b"yz")
        await holds(lambda: both.ended == 2)
    assert ends in [["returned", "closed"]] + [["closed"]] * (call == "receive")


@pytest.mark.parametrize("then", ["reads", "sends", "rests", "returns", "sleeps"])
async def test_one_closes_its_own(then: str) -> None:
    ends: list[str] = []

    async def a(conn: Connection) -> None:
        await conn.next(1)
        if then == "rests":
            await conn.send(b"!")
        conn.abort()
        try:
            if then == "reads":
                await conn.next(1)
            elif then in ("sends", "rests"):
                await conn.send(b"!")
            elif then == "sleeps":
                await anyio.sleep(0)
            ends.append("went on")
        except ClosedResourceError:
            ends.append("closed")

    async with served(a, answers) as both:
        await send_all(both.socks[0], b"xx")
        await holds(lambda: both.ended)
        await send_all(both.socks[1], b"y")
        assert await read_all(both.socks[1], 1) == b"y"
    assert ends == ["went on" if then in ("returns", "sleeps") else "closed"]


async def test_one_is_closed_by_a_task_of_its_own() -> None:
    """While it is parked, under a task group."""
    ends: list[str] = []

    async def a(conn: Connection) -> None:
        await conn.next(1)

        async def close() -> None:
            await holds(lambda: is_waiting(conn))
            conn.abort()

        async with anyio.create_task_group() as group:
            group.start_soon(close)
            try:
                await conn.next(1)
            except ClosedResourceError:
                ends.append("closed")

    async with served(a) as one:
        await send_all(one.socks[0], b"x")
        await holds(lambda: one.ended)
    assert ends == ["closed"]


# --- A cancels B ----------------------------------------------------------------------------------


@pytest.mark.parametrize("woken", [False, True])
@pytest.mark.parametrize("how", ["scope", "task", "both", "and closes"])
async def test_one_cancels_another(anyio_backend: Any, how: str, woken: bool) -> None:
    """Which goes on when the first waits, and has read nothing."""
    if how in ("task", "both") and anyio_backend[0] == "trio":
        pytest.skip("Trio's tasks are not cancelled one by one")
    order: list[str] = []
    scope = anyio.CancelScope()
    tasks: list[Any] = []

    async def a(conn: Connection) -> None:
        await conn.next(1)
        if how in ("task", "both") and not order:
            tasks[0].cancel()
        if how != "task":
            scope.cancel()
        if how == "and closes":
            both.conns[1].abort()
        order.append("cancelled")
        await conn.send(b"!")

    async def b(conn: Connection) -> None:
        tasks.append(task_of())
        with scope:
            try:
                await conn.next(2)
                order.append("read")
            except anyio.get_cancelled_exc_class():
                order.append("learned")
                if how not in ("task", "both"):
                    raise
                tasks[0].uncancel()
            except ClosedResourceError:
                order.append("learned")
        if order[-1] == "learned" and how != "and closes":
            again.append(bytes(await conn.next(2)))

    again: list[bytes] = []
    async with served(a, b) as both:
        if woken:
            both.socks[1].send(b"yz")
        both.socks[0].send(b"x")
        assert await read_all(both.socks[0], 1) == b"!"
        if how != "and closes" and not woken:
            await send_all(both.socks[1], b"yz")
        await holds(lambda: both.ended == 2)
    allowed = [["cancelled", "learned"]]
    if woken:
        allowed.append(["read", "cancelled"])
    if woken and anyio_backend[0] == "trio":  # a task that was rescheduled is not cancelled
        allowed.append(["cancelled", "read"])
    assert order in allowed
    assert again == [b"yz"] * ("learned" in order and how != "and closes")


async def test_many_that_cancel_and_close_the_next() -> None:
    """All have input at once: half of them are cancelled or closed while they are in the batch."""
    number = 30
    scopes = [anyio.CancelScope() for _ in range(number)]
    ends: dict[int, str] = {}

    def handler(n: int) -> Handler:
        async def handle(conn: Connection) -> None:
            try:
                with scopes[n]:
                    await conn.next(1)
                    ends[n] = "read"
                    if n + 1 < number and n % 3 == 0:
                        scopes[n + 1].cancel()
                    elif n + 1 < number and n % 3 == 1:
                        all_.conns[n + 1].abort()
            except ClosedResourceError:
                ends[n] = "closed"
            if n not in ends:
                ends[n] = "cancelled"
                assert await conn.next(1) == bytes([n])

        return handle

    async with served(*map(handler, range(number))) as all_:
        for n, sock in enumerate(all_.socks):
            sock.send(bytes([n]))
        await holds(lambda: all_.ended == number)
    for n in range(number):
        allowed = {"read"}
        if n and n % 3 == 1 and ends[n - 1] == "read":
            allowed.add("cancelled")
        if n and n % 3 == 2 and ends[n - 1] == "read":
            allowed.add("closed")
        assert ends[n] in allowed


# --- A ends more than itself ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["shutdown", "at once", "scope"])
async def test_one_ends_the_server(how: str) -> None:
    """From within the hub's callback. It is cancelled with the others."""
    ends: list[str] = []
    conns: list[Connection] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        try:
            await conn.next(1)
            if how == "scope":
                scope.cancel()
            else:
                await server.shutdown(0 if how == "at once" else 0.05)
            await conn.next(1)
        except BaseException as exc:
            ends.append(type(exc).__name__)
            raise

    with anyio.CancelScope() as scope:
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            socks = [connected(server) for _ in range(5)]
            await holds(lambda: len(conns) == 5 and all(map(is_waiting, conns)))
            socks[0].send(b"x")
            await holds(lambda: len(ends) == 5)
    for sock in socks:
        sock.close()
    cancelled = {"Cancelled", "CancelledError"}
    assert len(cancelled & set(ends)) == 1
    assert set(ends) <= cancelled | {"EndOfStream"}
    assert server.connections == ()


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_one_ends_the_program(run: Callable[[Any], Any], end: type[BaseException]) -> None:
    """By an exception, while others are parked: these are cancelled."""
    ends: list[str] = []
    conns: list[Connection] = []
    socks: list[socket.socket] = []

    async def handler(conn: Connection) -> None:
        conns.append(conn)
        try:
            if await conn.next(1) == b"x":
                raise end
        except BaseException as exc:
            ends.append(type(exc).__name__)
            raise

    async def main() -> None:
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            socks.extend(connected(server) for _ in range(5))
            await holds(lambda: len(conns) == 5 and all(map(is_waiting, conns)))
            socks[0].send(b"x")
            await anyio.sleep_forever()

    try:
        run(main)
    except BaseException as exc:  # noqa: BLE001 -- in a group, perhaps
        left = exc
        while isinstance(left, BaseExceptionGroup):
            [left] = left.exceptions
        assert type(left) is end
    else:
        pytest.fail("the program went on")
    for sock in socks:
        sock.close()
    assert ends[0] == end.__name__
    assert len(ends) == 5
    assert not any(conn.is_active for conn in conns)
    conns.clear()


# --- nested dispatch ------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_threads")  # so that a poller puts into the mailbox what is dispatched
@pytest.mark.parametrize("by", ["hub", "task"])
async def test_one_dispatches(anyio_backend: Any, by: str) -> None:
    """As a loop within the loop would. On asyncio no task can run within another, so those that it
    wakes have their turn later. The handler remains who it is.
    """
    seen: list[bool] = []
    inside = False
    answered = nested = 0

    async def a(conn: Connection) -> None:
        nonlocal inside
        await conn.next(1)
        task = task_of()
        for n in range(20):
            await holds(lambda: is_waiting(both.conns[1]))
            if by == "hub":  # which resumes it for this
                await conn.next(1)
            got = both.conns[1].statistics().bytes_received
            both.socks[1].send(bytes([n]))
            while both.conns[1].statistics().bytes_received == got:
                pass
            inside = True
            while is_waiting(both.conns[1]) and answered == n:
                conn._core.hub.dispatch()
            inside = False
            seen.append(task_of() is task)
            await conn.send(bytes([n]))
            seen.append(task_of() is task)

    async def b(conn: Connection) -> None:
        nonlocal answered, nested
        while True:
            view = await conn.next(1)
            answered += 1
            nested += inside
            conn.writer.write(view)

    async with served(a, b) as both:
        await send_all(both.socks[0], b"x")
        for n in range(20):
            if by == "hub":
                await holds(lambda: is_waiting(both.conns[0]))
                await send_all(both.socks[0], b"x")
            assert await read_all(both.socks[0], 1) == bytes([n])
        assert await read_all(both.socks[1], 20) == bytes(range(20))
    assert seen == [True] * 40
    assert not nested or anyio_backend[0] == "trio"

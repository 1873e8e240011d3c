"""Handlers that the hub resumes directly, in a Trio run that is the guest of another loop.

Trio's steps are callbacks of the host then, and a thread waits for Trio's events meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import trio
import trio.testing
from peers import holds, opened, read_all, send_all, within
from serving import connected

import anypoll
from anypoll import Connection
from anypoll._loop import trio_hub

Main = Callable[[], Awaitable[Any]]
#: Starts the run as a guest, and returns when it has ended, with what the main function returns.
Host = Callable[[Main], Any]


def hosted_by_a_queue(main: Main) -> Any:
    """The least that can be a host."""
    calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
    outcomes: list[Any] = []
    trio.lowlevel.start_guest_run(
        main, run_sync_soon_threadsafe=calls.put, done_callback=outcomes.append
    )
    while not outcomes:
        calls.get(timeout=60)()
    return outcomes[0].unwrap()


async def as_guest(main: Main) -> Any:
    """In asyncio's loop, whichever it is."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[Any] = loop.create_future()
    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        run_sync_soon_not_threadsafe=loop.call_soon,
        done_callback=over.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    return (await over).unwrap()


def run_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    return pytest.importorskip("uvloop").run(main)


def hosted_by_asyncio(main: Main) -> Any:
    return asyncio.run(as_guest(main))


def hosted_by_uvloop(main: Main) -> Any:
    return run_uvloop(as_guest(main))


@pytest.fixture(params=[hosted_by_a_queue, hosted_by_asyncio, hosted_by_uvloop])
def host(request: pytest.FixtureRequest) -> Host:
    chosen: Host = request.param
    return chosen


in_asyncio = pytest.mark.parametrize("run", [asyncio.run, run_uvloop], ids=["asyncio", "uvloop"])


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


async def ask(server: anypoll.Server, requests: int) -> None:
    """Several clients, each one request after another; then they leave."""
    socks = [connected(server) for _ in range(3)]
    for n in range(requests):
        for sock in socks:
            await send_all(sock, bytes([n % 256]))
        for sock in socks:
            assert await read_all(sock, 1) == bytes([n % 256])
    for sock in socks:
        sock.close()


def is_resumed_by_the_hub() -> bool:
    """Whether one of the hub's own tasks is below the caller."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != trio_hub.__file__:
        frame = frame.f_back
    return frame is not None


@pytest.mark.parametrize("answer", ["by send()", "by the writer"])
def test_requests_are_answered(host: Host, answer: str) -> None:
    """By handlers that rest, and by handlers that only wait; each runs as its own task."""
    direct: list[bool] = []

    async def handler(conn: Connection) -> None:
        task = trio.lowlevel.current_task()
        while True:
            view = await conn.next(1)
            assert trio.lowlevel.current_task() is task
            direct.append(is_resumed_by_the_hub())
            if answer == "by send()":
                await conn.send(view)
                assert trio.lowlevel.current_task() is task
            else:
                conn.writer.write(view)

    async def main() -> str:
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            await ask(server, 20)
            await holds(lambda: not server.connections)
            assert not server.statistics().handler_errors
        return "done"

    assert host(main) == "done"
    assert len(direct) == 60
    assert sum(direct) > 30  # not if the request comes before it is waited for


def test_a_handler_awaits_what_is_trios(host: Host) -> None:
    async def handler(conn: Connection) -> None:
        send, receive = trio.open_memory_channel[bytes](0)
        async for chunk in conn:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send.send, chunk)
                same = await receive.receive()
            await trio.to_thread.run_sync(abs, -1)
            with trio.testing.assert_checkpoints():
                await conn.send(same)

    async def main() -> None:
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            await ask(server, 20)

    host(main)


def test_cancellations_and_deadlines(host: Host) -> None:
    """Of handlers that wait, or are about to."""
    scopes: list[trio.CancelScope] = []

    async def handler(conn: Connection) -> None:
        with trio.move_on_after(0.001) as scope:
            await conn.next(2)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await conn.next(2)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await conn.send(b"never")
        assert scope.cancelled_caught
        await conn.send(await conn.next(1))

    async def main() -> None:
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            with connected(server) as sock:
                await send_all(sock, b"x")
                await holds(lambda: scopes)
                scopes[0].cancel()
                assert await read_all(sock, 1) == b"x"
            await holds(lambda: not server.connections)
            assert not server.statistics().handler_errors

    host(main)


@pytest.mark.parametrize("waits", ["in a read", "elsewhere", "in the next round"])
def test_the_host_ends_the_run(host: Host, waits: str) -> None:
    """While handlers are wherever they may be: they are cancelled, and nothing is left."""
    ends: list[str] = []
    served: list[Connection] = []

    async def handler(conn: Connection) -> None:
        served.append(conn)
        try:
            await conn.next(1)
            if waits == "in a read":
                await conn.next(1)
            elif waits == "elsewhere":
                await trio.sleep_forever()
            while True:
                await conn.send(b"x")
        except trio.Cancelled:
            ends.append("cancelled")
            raise

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:
            async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
                socks = [connected(server) for _ in range(5)]
                for sock in socks:
                    await send_all(sock, b"a")
                await holds(lambda: len(served) == 5)
                await trio.to_thread.run_sync(token.run_sync_soon, scope.cancel)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        for sock in socks:
            sock.close()

    host(main)
    assert ends == ["cancelled"] * 5
    assert not any(conn.is_active for conn in served)


def test_what_outlives_the_run(host: Host) -> None:
    """A connection is closed with it, though the host's loop goes on."""
    left: list[Connection] = []

    async def main() -> None:
        first, second = anypoll.socketpair()
        left.extend([first, second])
        await first.send(b"x")

    host(main)
    assert [conn.fileno() for conn in left] == [-1, -1]


# --- a host with handlers of its own --------------------------------------------------------------


@in_asyncio
def test_a_host_and_a_guest_that_both_serve(run: Callable[[Any], Any]) -> None:
    """Two hubs in one thread, each with handlers that it resumes."""

    async def serve() -> None:
        async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
            await ask(server, 100)
            await holds(lambda: not server.connections)

    async def both(main: Main) -> None:
        await asyncio.gather(serve(), as_guest(main))

    run(both(serve))


@in_asyncio
@pytest.mark.parametrize("whose", ["the host's", "the guest's"])
def test_a_connection_of_the_other_loop(run: Callable[[Any], Any], whose: str) -> None:
    """Handlers get an exception, and both loops go on."""
    others: list[Connection] = []
    refusals: list[str] = []

    async def handler(conn: Connection) -> None:
        await conn.next(1)
        for call in (others[0].next, others[0].receive):
            try:
                await call(1)
            except (RuntimeError, TypeError) as exc:
                refusals.append(type(exc).__name__)
        await conn.send(await conn.next(1))

    async def has_one(over: Callable[[], object]) -> None:
        async with opened() as (conn, peer):
            others.append(conn)
            await holds(over)
            await send_all(peer, b"!")
            assert await within(conn.next(1)) == b"!"

    done: list[bool] = []

    async def serves() -> None:
        await holds(lambda: others)
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            with connected(server) as sock:
                await send_all(sock, b"xy")
                assert await read_all(sock, 1) == b"y"
        done.append(True)

    async def owns() -> None:
        await has_one(lambda: done)

    async def both(own: Main, guest: Main) -> None:
        await asyncio.gather(own(), as_guest(guest))

    run(both(owns, serves) if whose == "the host's" else both(serves, owns))
    assert len(refusals) == 2

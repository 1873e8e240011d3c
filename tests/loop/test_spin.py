"""An event loop that drives its poller looks for more before it goes on, unless others wait."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from peers import settle, within
from serving import connected

import anypoll
from anypoll import Connection
from anypoll._loop import runtime as _runtime

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("by_loops")]

Handler = Callable[[Connection], Awaitable[None]]
ROUNDS = 50


@pytest.fixture(autouse=True)
def _long_spins() -> Iterator[None]:
    """A turn is not over before a busy machine has come to the look."""
    usual = _runtime.settings().spin
    anypoll.configure(spin=1000)
    yield
    anypoll.configure(spin=usual)


def looks() -> int:
    return sum(poller.looks for poller in anypoll.statistics().pollers)


def converse(sock: socket.socket, rounds: int) -> None:
    """In a thread of its own, so that the loop has nothing to do but the handler."""
    sock.settimeout(60)
    for _ in range(rounds):
        sock.sendall(b"?")
        assert sock.recv(1) == b"!"


@asynccontextmanager
async def client_of(handler: Handler) -> AsyncIterator[socket.socket]:
    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with connected(server) as sock:
            yield sock
            await within(server.shutdown(0))


async def looks_with(handler: Handler) -> int:
    """How often the loop looks during a conversation with that handler."""
    async with client_of(handler) as sock:
        # The handler has begun, in a task, and what that has caused is over.
        await anyio.to_thread.run_sync(converse, sock, 1)
        await settle()
        before = looks()
        await anyio.to_thread.run_sync(converse, sock, ROUNDS)
        return looks() - before


async def answer(conn: Connection) -> None:
    while True:
        await conn.next(1)
        conn.writer.write(b"!")


async def test_it_looks_after_a_request() -> None:
    assert await looks_with(answer) > 0
    [poller] = anypoll.statistics().pollers
    assert poller.hits <= poller.looks
    assert poller.spins <= poller.looks


@pytest.mark.loops("asyncio", "uvloop")
async def test_it_looks_for_any_task_that_waits_again() -> None:
    anypoll.configure(direct_resume=False)
    try:
        assert await looks_with(answer) > 0
    finally:
        anypoll.configure(direct_resume=True)


async def test_it_does_not_if_that_is_switched_off() -> None:
    anypoll.configure(spin=0)
    assert await looks_with(answer) == 0


async def test_it_does_not_with_threads_that_drive() -> None:
    anypoll.configure(driver="thread")
    try:
        assert await looks_with(answer) == 0
    finally:
        anypoll.configure(driver="auto")


async def test_it_does_not_while_a_handler_waits_for_something_else() -> None:
    async def handler(conn: Connection) -> None:
        while True:
            await conn.next(1)
            await anyio.sleep(0)
            conn.writer.write(b"!")

    assert await looks_with(handler) == 0


@pytest.mark.loops("asyncio", "trio")  # uvloop hides its queue
async def test_it_does_not_while_another_task_is_to_run() -> None:
    wake, woken = anyio.Event(), 0

    async def count() -> None:
        nonlocal wake, woken
        while True:
            await wake.wait()
            wake = anyio.Event()
            woken += 1

    async def handler(conn: Connection) -> None:
        while True:
            await conn.next(1)
            wake.set()
            conn.writer.write(b"!")

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        await anyio.wait_all_tasks_blocked()
        assert await looks_with(handler) == 0
        group.cancel_scope.cancel()
    assert woken > 0


async def test_all_is_served_when_the_thread_of_python_is_wanted_by_others() -> None:
    """The loop releases the GIL while it spins, and gets it back late."""
    over = False

    def compute() -> None:
        while not over:
            pass

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, compute)
        await looks_with(answer)
        over = True


@pytest.mark.parametrize("spin", [-1, 1001, 1.5, "20"])
def test_limits(spin: Any) -> None:
    usual = _runtime.settings().spin
    with pytest.raises((TypeError, ValueError), match="spin must be"):
        anypoll.configure(spin=spin)
    assert _runtime.settings().spin == usual

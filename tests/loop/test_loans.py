"""Who drives a poller: the event loop that has it to itself, else its thread. And what must happen
while that loop does not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import select
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream, WouldBlock
from peers import MIB, blocked, holds, opened, pattern, settle, stalled
from programs import LOOPS, ON_LOOP, run_to_end

import anypoll
from anypoll import IdleTimeout, ReadTimeout, _epoll
from anypoll._loop import runtime as _runtime

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("by_loops")]

Main = Callable[[], Awaitable[Any]]


def drives() -> bool:
    """Whether the running event loop drives its poller."""
    return _runtime.current_hub().loan is not None


def wakeups() -> int:
    return sum(poller.wakeups for poller in anypoll.statistics().pollers)


async def talk(conn: anypoll.Connection, peer: socket.socket, times: int = 10) -> None:
    for _ in range(times):
        async with blocked(lambda: conn.receive(8)) as outcome:
            peer.send(b"request")
        assert outcome == [b"request"]
        await conn.send(b"reply")
        await anyio.wait_readable(peer)
        assert peer.recv(8) == b"reply"


# --- who drives ----------------------------------------------------------------------------------


async def test_a_loop_that_drives_is_not_woken_by_a_thread() -> None:
    async with opened() as (conn, peer):
        assert drives()
        await talk(conn, peer)
        before = wakeups()
        await talk(conn, peer, 100)
        assert wakeups() <= before + 1  # a timer may have come


async def test_the_driver_may_be_changed() -> None:
    """At any time, in both directions; what is open goes on. The way back takes something new."""
    async with opened() as (conn, peer):
        for _ in range(10):
            anypoll.configure(driver="thread")
            assert not drives()
            await talk(conn, peer)
            anypoll.configure(driver="auto")
            await talk(conn, peer)
            async with opened("tcp") as (other, its_peer):
                assert drives()
                await talk(conn, peer)
                await talk(other, its_peer)


@pytest.mark.parametrize("driver", ["loop", "", 1])
def test_a_driver_that_there_is_not(driver: Any) -> None:
    with pytest.raises(ValueError, match="driver must be 'auto' or 'thread'"):
        anypoll.configure(driver=driver)
    assert _runtime.settings().driver == "auto"


async def test_several_pollers_are_driven_by_their_threads() -> None:
    async with opened() as (conn, peer):
        anypoll.configure(pollers=2)
        try:
            assert not drives()
            async with opened() as (other, its_peer):
                assert not drives()
                await talk(conn, peer)
                await talk(other, its_peer)
        finally:
            anypoll.configure(pollers=1)
        async with opened() as (other, its_peer):
            assert drives()
            await talk(conn, peer)


def test_several_loops_share_a_thread(run: Callable[[Main], Any]) -> None:
    """The first gives the poller back, and gets it again when the other has ended."""
    begun, over = threading.Event(), threading.Event()

    async def second() -> None:
        async with opened() as (conn, peer):
            assert not drives()
            begun.set()
            while not over.is_set():
                await talk(conn, peer)

    async def first() -> None:
        thread = threading.Thread(target=run, args=(second,))
        async with opened() as (conn, peer):
            assert drives()
            thread.start()
            try:
                await anyio.to_thread.run_sync(begun.wait)
                assert not drives()
                await talk(conn, peer, 100)
                async with opened() as (other, its_peer):
                    assert not drives()
                    await talk(other, its_peer)
            finally:
                over.set()
                await anyio.to_thread.run_sync(thread.join)
            async with opened() as (other, its_peer):
                assert drives()
                await talk(other, its_peer)
            await talk(conn, peer)

    run(first)


def test_loops_one_after_another(run: Callable[[Main], Any]) -> None:
    async def main() -> None:
        async with opened() as (conn, peer):
            assert drives()
            await talk(conn, peer)

    for _ in range(5):
        run(main)
    poller = _runtime.pick_poller()
    assert _epoll.poller_ended(poller) is None


async def test_a_loop_that_cannot_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread drives on, and the next attempt succeeds."""

    def refuse(_loan: Any) -> None:
        raise OSError(28, "No space left on device")

    hub = _runtime.current_hub()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_watch", refuse)
        async with opened() as (conn, peer):
            assert not drives()
            await talk(conn, peer)
    async with opened() as (conn, peer):
        assert drives()
        await talk(conn, peer)


async def test_a_poller_that_fails_under_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Its connections end, the loop lets go of it, and drives the next one."""
    async with opened() as (conn, _peer):
        assert drives()
        async with blocked(conn.receive) as outcome:
            _epoll.set_fault("EPOLL_WAIT", 9)
            await holds(lambda: (_runtime.nudge(), outcome)[1])
    assert isinstance(outcome[0], BrokenResourceError)
    assert len(caplog.records) == 1
    caplog.clear()
    _epoll.clear_faults()
    async with opened() as (conn, peer):
        assert drives()
        await talk(conn, peer)


async def test_a_poller_that_fails_for_a_moment() -> None:
    """Its thread drives on; the loop, again with the next connection."""
    async with opened() as (conn, peer):
        _epoll.set_fault("EPOLL_WAIT", 12, times=2)
        await talk(conn, peer)
        await holds(lambda: (_runtime.nudge(), _epoll.fault_hits("EPOLL_WAIT") == 2)[1])
        _epoll.clear_faults()
        await talk(conn, peer)
        await holds(lambda: not drives())
        async with opened() as (other, its_peer):
            assert drives()
            await talk(conn, peer)
            await talk(other, its_peer)


async def test_a_loan_that_ends_in_the_loops_own_step() -> None:
    """It need not be told by the poller's descriptor, whose event the thread may have taken."""
    async with opened() as (conn, peer):
        hub: Any = _runtime.current_hub()
        try:
            _epoll.set_fault("EPOLL_WAIT", 12, times=-1)
            for _ in range(1000):
                hub.drive(hub.loan)
                if not drives():
                    break
                time.sleep(0.001)  # the guard was in the middle of a step of its own
            assert not drives()
        finally:
            _epoll.clear_faults()
        await talk(conn, peer)
        async with opened() as (other, its_peer):
            assert drives()
            await talk(other, its_peer)


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_loop_that_is_closed_in_another_thread(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    """Its hub gives the poller back, and this loop gets it."""
    factory = anyio_backend[1].get("loop_factory", asyncio.new_event_loop)
    hubs: list[Any] = []

    def in_thread() -> None:
        loop = factory()
        peers: list[Any] = []

        async def main() -> None:
            conn, peer = anypoll.socketpair()
            peers.extend((conn, peer))
            hubs.append(_runtime.current_hub())
            await asyncio.sleep(0)
            conn.abort()
            peer.abort()

        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=in_thread)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    gc.collect()
    assert hubs.pop().loan is None
    async with opened() as (conn, peer):
        assert drives()
        await talk(conn, peer)


# --- what must not wait for the loop -------------------------------------------------------------
# The test is what keeps the loop busy: it blocks the loop's thread until the peer has seen it.


def blocking(peer: socket.socket) -> socket.socket:
    peer.settimeout(60)
    return peer


def received(peer: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = blocking(peer).recv(size - len(got))
        assert piece
        got += piece
    return bytes(got)


def wait_for_token() -> None:
    """Until somebody has told the loop something."""
    fd = _epoll.hub_fd(_runtime.current_hub().handle)
    assert select.select([fd], [], [], 60)[0]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_idle_timeouts_while_python_is_busy(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        assert drives()
        conn.idle_timeout = 0.02
        assert blocking(peer).recv(1) == b""
        with pytest.raises(IdleTimeout):
            await conn.receive()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_deadlines_while_python_is_busy(kind: str) -> None:
    async with opened(kind) as (conn, _peer):
        assert drives()
        conn.read_timeout = 0.02
        async with blocked(conn.receive) as outcome:
            wait_for_token()
        assert isinstance(outcome[0], ReadTimeout)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_what_came_in_time_is_read_in_time(kind: str) -> None:
    """Although nobody could look before the deadline had passed."""
    async with opened(kind) as (conn, peer):
        assert drives()
        conn.read_timeout = 0.2
        async with blocked(lambda: conn.next(8)) as outcome:
            peer.send(b"in time.")
            wait_for_token()
            threading.Event().wait(0.3)
        assert outcome == [b"in time."]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_stalled_output_while_python_is_busy(kind: str) -> None:
    data = pattern(8 * MIB)
    async with opened(kind) as (conn, peer):
        assert drives()
        async with blocked(lambda: conn.send(data)) as outcome:
            await stalled(conn)
            assert received(peer, len(data)) == data
        assert outcome == [None]


@pytest.mark.loops("asyncio", "uvloop")  # a Trio run cannot be left
def test_stalled_output_of_a_loop_that_never_comes_back(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    """It was left without being closed."""
    loop = anyio_backend[1].get("loop_factory", asyncio.new_event_loop)()
    data = pattern(8 * MIB)
    ours, peer = socket.socketpair()

    async def leave() -> anypoll.Connection:
        conn = await anypoll.Connection.from_socket(ours)
        task = asyncio.create_task(conn.send(data))
        await settle()
        assert not task.done()
        task.add_done_callback(lambda _: None)
        loop.stop()
        return conn

    with peer:
        conn = loop.run_until_complete(leave())
        assert received(peer, len(data)) == data
        conn.abort()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, anyio.ClosedResourceError):
                loop.run_until_complete(task)
        loop.close()


# --- what is asked for without yielding ----------------------------------------------------------


def arrived(conn: anypoll.Connection) -> None:
    """Until the kernel has input for it."""
    assert select.select([conn.fileno()], [], [], 60)[0]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_queries_are_up_to_date(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        assert drives()
        peer.send(b"12345678")
        arrived(conn)
        assert len(conn.reader) == 8
        peer.send(b"9")
        arrived(conn)
        assert conn.statistics().bytes_received == 9
        assert bytes(conn.reader.next_nowait(9)) == b"123456789"
        with pytest.raises(WouldBlock):
            conn.reader.next_nowait(1)
        peer.send(b"10")
        arrived(conn)
        assert bytes(conn.reader.next_nowait(2)) == b"10"
        peer.close()
        arrived(conn)
        assert conn.at_eof
        with pytest.raises(EndOfStream):
            await conn.receive()


# --- the process ---------------------------------------------------------------------------------

BUSY_EXIT = """
import socket, threading
import anypoll

ready = threading.Event()

async def main():
    a, b = anypoll.socketpair()
    sock, other = socket.socketpair()
    conn = await anypoll.Connection.from_socket(sock)
    conn.writer.write(bytes(8 << 20))
    async with anyio.create_task_group() as group:
        group.start_soon(conn.writer.flush)
        while True:
            await a.send(b"ping")
            await b.receive()
            ready.set()

threading.Thread(target=run, args=(main,), daemon=True).start()
ready.wait()
print("ends")
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("loop", LOOPS)
def test_exit_while_a_loop_drives(loop: str) -> None:
    """In a daemon thread, with output under way."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
        if hasattr(sys, "gettotalrefcount"):  # PyGILState_Ensure() asserts, and uvloop calls it
            pytest.skip("uvloop in a daemon thread does not survive the exit of a debug build")
    for _ in range(3):
        code = textwrap.dedent(ON_LOOP + BUSY_EXIT)
        done = run_to_end([sys.executable, "-c", code, loop])
        assert (done.stdout, done.stderr, done.returncode) == ("ends\n", "", 0)


FORK = """
import os, socket
import anypoll
from anypoll._loop import runtime

async def echoes(rounds):
    a, b = anypoll.socketpair()
    async with a, b:
        for _ in range(rounds):
            await a.send(b"ping")
            assert await b.receive() == b"ping"
        assert runtime.current_hub().loan is not None

def child():
    run(echoes, 100)

async def main():
    a, b = anypoll.socketpair()
    async with a, b:
        await a.send(b"before")
        assert await b.receive() == b"before"
        assert runtime.current_hub().loan is not None
        pid = os.fork()
        if pid == 0:
            import threading
            thread = threading.Thread(target=child)
            thread.start()
            thread.join()
            os._exit(0)
        await a.send(b"after")
        assert await b.receive() == b"after"
        assert os.waitpid(pid, 0)[1] == 0
        await a.send(b"at last")
        assert await b.receive() == b"at last"
    print("whole")

run(main)
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("loop", LOOPS)
def test_fork_while_a_loop_drives(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    done = run_to_end([sys.executable, "-W", "ignore", "-c", ON_LOOP + FORK, loop])
    assert (done.stdout, done.stderr, done.returncode) == ("whole\n", "", 0)

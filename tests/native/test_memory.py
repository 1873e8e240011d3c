"""The native types and the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import weakref
from typing import Any

import pytest
from anyio import ClosedResourceError
from peers import arrive, at_once, opened
from programs import run_to_end

import anypoll
from anypoll import Connection
from anypoll.nocopy import Reader


def test_a_forgotten_loop_is_collected_with_its_waiting_tasks() -> None:
    """The hub holds who waits, and these hold the loop: so the loop alone may hold the hub."""
    loop = asyncio.new_event_loop()
    gone: list[weakref.ref[Any]] = [weakref.ref(loop)]
    ours, peer = socket.socketpair()

    async def handler(conn: Connection) -> None:
        await conn.next(1)

    async def main() -> None:
        conn = await Connection.from_socket(ours.detach())
        hub = conn._core.hub
        for call in (conn.next(1), conn.send(bytes(8 << 20))):
            task = asyncio.ensure_future(call)
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            gone.append(weakref.ref(task))
        while not hub.waits(conn._core.number) or not hub.writers:
            await asyncio.sleep(0)
        gone.extend([weakref.ref(conn._core), weakref.ref(hub)])

    with peer:
        loop.run_until_complete(main())
        with pytest.warns(ResourceWarning):  # noqa: PT031 -- they go together
            del loop
            gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
        peer.settimeout(30)
        while peer.recv(1 << 20):
            pass


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["awaited", "failed", "closed"])
async def test_a_call_that_is_kept_may_be_part_of_a_cycle(how: str) -> None:
    """Even if it never waited: the collector knows only of calls that did, or that are kept."""

    class Number:
        call: Any

        def __index__(self) -> int:
            return 2 if how == "awaited" else -1

    async with opened() as (conn, peer):
        await arrive(conn, peer, b"ab")
        number = Number()
        number.call = conn.next(number)
        if how == "awaited":
            assert await number.call == b"ab"
        elif how == "failed":
            with pytest.raises(ValueError, match="-1"):
                await number.call
        else:
            number.call.close()
        gone = weakref.ref(number)
        del number
        gc.collect()
        assert gone() is None


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["takes a view", "looks at the window", "closes"])
async def test_a_collection_in_the_middle_of_making_a_view(how: str) -> None:
    """CPython 3.11 may begin one at each allocation, and any finaliser may run in it."""
    data = bytes(range(200))
    runs = 0
    kept: list[Any] = []

    def meddle(phase: str, _info: Any) -> None:
        nonlocal runs
        if phase != "start" or not gc.isenabled():
            return
        gc.disable()
        runs += 1
        if how == "closes":
            conn.abort()
            kept.extend(bytes([0xEE]) * size for size in range(100))  # where the block's object was
        elif how == "takes a view":
            kept.append(at_once(conn.peek(3)))
        else:
            kept.append(conn.reader._view)

    for before in range(30):
        async with opened() as (conn, peer):
            await arrive(conn, peer, data)
            assert await conn.next(10) == data[:10]
            thresholds = gc.get_threshold()
            call: Any = conn.next(50)
            send = call.send
            view = None
            gc.collect()
            gc.callbacks.append(meddle)
            gc.set_threshold(20)
            try:
                allocated = [[] for _ in range(before)]  # type: ignore[var-annotated]
                send(None)
            except ClosedResourceError:
                pass
            except StopIteration as stop:
                view = stop.value
            finally:
                gc.collect()  # one that comes later does no harm
                gc.callbacks.remove(meddle)
                gc.set_threshold(*thresholds)
                gc.enable()
            del allocated
            if view is None:
                assert how == "closes"
            else:
                assert view == data[10:60]
            if how != "closes":
                assert await conn.next(20) == data[60:80]
            if how == "takes a view":
                assert kept.pop() in (data[10:13], data[60:63])
            elif how == "looks at the window":
                assert data in bytes(kept.pop())
            kept.clear()
    assert runs == 30


CLEARED = """
import asyncio, gc, sys, weakref
import anypoll
from anypoll._loop import asyncio_hub, runtime

gone = []

async def main():
    gone.append(weakref.ref(runtime.current_hub()))
    gc.collect()
    gc.freeze()  # so that the collector comes to the hub last
    conn, peer = anypoll.socketpair()
    core = conn._core
    for cls in (type(core), asyncio_hub._Drain):
        cls.__del__ = lambda self: None
    task = asyncio.ensure_future(conn.next(1))
    task._log_destroy_pending = False
    while not core.hub.waits(core.number):
        await asyncio.sleep(0)
    gone.append(weakref.ref(core))
    gc.collect()
    gc.unfreeze()

asyncio.new_event_loop().run_until_complete(main())
gc.collect()
print([ref() for ref in gone])
"""


def test_they_are_cleared_in_any_order() -> None:
    """Without the finalisers of Python, which end each wait before."""
    end = run_to_end([sys.executable, "-c", CLEARED])
    assert (end.returncode, end.stdout.strip()) == (0, "[None, None]"), end.stderr


def test_objects_that_were_never_initialised() -> None:
    """They answer with exceptions."""
    bare: Any = Connection.__new__(Connection)
    for call in (
        lambda: bare.peek(1),
        lambda: bare.until(b"x"),
        lambda: Reader.__new__(Reader).next(1),
        lambda: anypoll._native.Core().fill(1),
    ):
        with pytest.raises(AttributeError):
            call().send(None)

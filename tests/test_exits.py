"""What is to end the program does so, wherever it is raised: it is neither logged nor lost."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from peers import holds, opened, reset
from serving import client, local

import anypoll
from anypoll._loop.runtime import current_hub
from anypoll.mux import ShardQueue
from anypoll.nocopy import wrap_writer

Place = Callable[[Callable[..., None]], Awaitable[None]]


class Stop(BaseException):
    """One that no event loop knows."""


def asynchronous(leave: Callable[..., None]) -> Callable[..., Awaitable[None]]:
    async def function(*_: object) -> None:
        await anyio.sleep(0)
        leave()

    return function


# --- nobody waits for it -------------------------------------------------------------------------


async def async_callback(leave: Callable[..., None]) -> None:
    async with opened() as (conn, _peer):
        conn.add_close_callback(asynchronous(leave))
        conn.abort()
        await anyio.sleep_forever()


async def late_callback(leave: Callable[..., None]) -> None:
    async with opened() as (conn, _peer):
        await conn.aclose()
        conn.add_close_callback(asynchronous(leave))
        await anyio.sleep_forever()


async def callbacks_of_idle_ends(leave: Callable[..., None]) -> None:
    """Of both in one go; each has its turn."""
    turns: list[int] = []

    def callback() -> None:
        turns.append(1)
        if len(turns) == 2:
            leave()

    async with opened() as (first, _), opened() as (second, _):
        for conn in first, second:
            conn.add_close_callback(callback)
            conn.idle_timeout = 0.001
        await anyio.sleep_forever()


async def callback_of_another_threads_abort(leave: Callable[..., None]) -> None:
    async with opened() as (conn, _peer):
        conn.add_close_callback(leave)
        threading.Thread(target=conn.abort).start()
        await anyio.sleep_forever()


async def request_of_a_dialled_one(leave: Callable[..., None]) -> None:
    async with opened() as (conn, peer):
        conn.set_on_request(asynchronous(leave))
        peer.send(b"x")
        await anyio.sleep_forever()


async def send_of_a_wrapped_stream(leave: Callable[..., None]) -> None:
    class Stream(anyio.abc.ByteSendStream):
        async def send(self, item: bytes) -> None:
            leave()

        async def aclose(self) -> None:
            await anyio.lowlevel.checkpoint()

    async with ShardQueue(wrap_writer(Stream())) as queue:
        await queue.add(b"x")
        await holds(lambda: queue._closed)
        with pytest.raises(anyio.BrokenResourceError) as caught:
            await queue.add(b"y")
        assert isinstance(caught.value.__cause__, (SystemExit, KeyboardInterrupt))


# --- somebody does -------------------------------------------------------------------------------


async def callback_of_aclose(leave: Callable[..., None]) -> None:
    async with opened() as (conn, _peer):
        conn.add_close_callback(asynchronous(leave))
        await conn.aclose()
        await anyio.sleep_forever()


async def serving(how: Any, **options: Any) -> None:
    async with local(how, **options) as server, client(server) as sock:
        sock.send(b"x")
        await anyio.sleep_forever()


async def closes(conn: anypoll.Connection) -> None:
    await conn.receive()


async def fails(conn: anypoll.Connection) -> None:
    raise ValueError


async def handler(leave: Callable[..., None]) -> None:
    await serving(asynchronous(leave))


async def on_request(leave: Callable[..., None]) -> None:
    await serving(None, on_request=asynchronous(leave))


async def on_request_before(leave: Callable[..., None]) -> None:
    await serving(None, on_request=closes, on_connect=asynchronous(leave))


async def on_prepare(leave: Callable[..., None]) -> None:
    await serving(closes, on_prepare=leave)


async def on_connect(leave: Callable[..., None]) -> None:
    await serving(closes, on_connect=asynchronous(leave))


async def on_disconnect(leave: Callable[..., None]) -> None:
    async with local(closes, on_disconnect=asynchronous(leave)) as server, client(server) as sock:
        reset(sock)
        await anyio.sleep_forever()


async def on_error(leave: Callable[..., None]) -> None:
    await serving(fails, on_error=asynchronous(leave))


async def callback_of_a_handler(leave: Callable[..., None]) -> None:
    async def handler(conn: anypoll.Connection) -> None:
        conn.add_close_callback(asynchronous(leave))
        conn.abort()  # no end is waited for

    await serving(handler)


UNAWAITED: list[Place] = [
    async_callback,
    late_callback,
    callbacks_of_idle_ends,
    callback_of_another_threads_abort,
    request_of_a_dialled_one,
    send_of_a_wrapped_stream,
]
AWAITED: list[Place] = [
    callback_of_aclose,
    handler,
    on_request,
    on_request_before,
    on_prepare,
    on_connect,
    on_disconnect,
    on_error,
    callback_of_a_handler,
]


#: asyncio lets no task that nobody waits for end it by a `Stop`.
CASES = [(place, end) for place in UNAWAITED for end in (SystemExit(3), KeyboardInterrupt())]
CASES += [(place, end) for place in AWAITED for end in (SystemExit(3), Stop())]


def leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for one in exc.exceptions for leaf in leaves(one)]
    return [exc]


def named(value: Any) -> str:
    return value.__name__ if callable(value) else type(value).__name__


# asyncio.run() cancels tasks that have not begun, such as the end that follows upon on_prepare.
@pytest.mark.filterwarnings("ignore:coroutine 'Lifecycle._end' was never awaited")
@pytest.mark.parametrize(("place", "end"), CASES, ids=named)
def test_it_ends(
    place: Place,
    end: BaseException,
    anyio_backend: tuple[str, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, options = anyio_backend

    def leave(*_: object) -> None:
        raise end

    async def main() -> None:
        with anyio.fail_after(60):
            await place(leave)

    try:
        anyio.run(main, backend=name, backend_options=options)
    except BaseException as exc:  # noqa: BLE001
        caught = exc
    assert leaves(caught) == [end]
    if place in UNAWAITED:
        assert caught is end
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("anypoll")]
    assert ["has failed" in message for message in logged] == [True] * (place is on_error)
    caplog.clear()  # records hold connections
    end.__traceback__ = end.__context__ = None


def test_a_deadline_of_the_main_task_expires_with_it() -> None:
    """It is in the midst of a step that its coroutine of before takes, whichever goes first."""
    end = KeyboardInterrupt()

    async def main() -> None:
        deadline = trio.current_time() + 0.01

        async def leave() -> None:
            await trio.sleep_until(deadline)
            raise end

        assert current_hub().spawn(leave)
        await trio.sleep_until(deadline)
        await trio.sleep_forever()

    for _ in range(20):  # Trio chooses who goes first
        with pytest.raises(KeyboardInterrupt) as caught:
            trio.run(main)
        assert caught.value is end
        end.__traceback__ = end.__context__ = end.__cause__ = None

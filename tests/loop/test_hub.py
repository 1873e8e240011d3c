"""Event loops that come and go: however one ends, nothing of ours is left, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import trio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from peers import arrive, given_up, holds, opened, read_all, settle, within

import anypoll
from anypoll import Connection, _epoll
from anypoll._loop import runtime as _runtime
from anypoll._loop.hub import Hub

try:
    import uvloop
except ImportError:  # there is none yet for this interpreter
    uvloop = None  # type: ignore[assignment]

Main = Callable[[], Coroutine[Any, Any, Any]]


def run_uvloop(main: Main) -> Any:
    if uvloop is None:
        pytest.skip("uvloop is missing")
    return uvloop.run(main())


RUNNERS: dict[str, Callable[[Main], Any]] = {
    "asyncio.run": lambda main: asyncio.run(main()),
    "uvloop.run": run_uvloop,
    "trio.run": trio.run,
    "anyio.run": anyio.run,
    "anyio.run trio": lambda main: anyio.run(main, backend="trio"),
}


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    if request.param == "asyncio":
        return asyncio.new_event_loop
    if uvloop is None:
        pytest.skip("uvloop is missing")
    return uvloop.new_event_loop  # type: ignore[no-any-return]


async def talk() -> None:
    """Both directions of a pair, and a server with a client."""
    first, second = anypoll.socketpair()
    async with first, second:
        await first.send(b"there")
        assert await second.next(5) == b"there"
        await second.send(b"back")
        assert await first.receive() == b"back"

    async def echo(conn: Connection) -> None:
        async for piece in conn:
            await conn.send(piece)

    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        client = await anypoll.connect_tcp("127.0.0.1", server.port)
        async with client:
            await client.send(b"ping")
            assert await client.next(4) == b"ping"


def closed(peer: socket.socket) -> bool:
    """Whether the connection at the other end of the plain socket was closed."""
    peer.settimeout(30)
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


# --- ways to run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNERS)
def test_one_loop_after_another(name: str) -> None:
    for _ in range(2):
        RUNNERS[name](talk)


def test_trio_guest_mode() -> None:
    """Trio inside of a loop that is not its own."""
    results: list[Any] = []

    async def host() -> None:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def ended(outcome: Any) -> None:
            results.append(outcome)
            done.set()

        trio.lowlevel.start_guest_run(
            talk,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended,
            host_uses_signal_set_wakeup_fd=True,
        )
        await asyncio.gather(talk(), asyncio.wait_for(done.wait(), 30))

    asyncio.run(host())
    results[0].unwrap()


# --- a loop that ends with things open -----------------------------------------------------------


def test_what_outlives_its_loop(run: Callable[[Main], Any]) -> None:
    """Connections, sockets and listeners are closed; views stay what they are."""
    left: dict[str, Any] = {}
    ours, peer = socket.socketpair()

    async def main() -> None:
        conn = left["conn"] = await Connection.from_socket(ours)
        left["socket"] = conn.extra(SocketAttribute.raw_socket)
        left["listener"] = multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
        left["address"] = multi.extra(SocketAttribute.local_address)
        await conn.send(b"x")
        peer.send(b"viewed")
        left["view"] = await conn.next(6)

    with peer:
        run(main)
        gc.collect()
        assert peer.recv(1) == b"x"
        assert closed(peer)
    conn = left["conn"]
    assert conn.fileno() == left["socket"].fileno() == -1
    assert not conn.is_active
    assert "closed" in repr(conn)
    assert conn.statistics().bytes_sent == 1
    with pytest.raises(ClosedResourceError):
        conn.writer.write(b"x")
    conn.abort()
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(left["address"])

    async def afterwards() -> None:
        [listener] = left["listener"].listeners
        for call in (conn.receive, lambda: conn.send(b"x"), lambda: conn.next(1), listener.accept):
            with pytest.raises(ClosedResourceError):
                await call()
        await conn.aclose()
        await listener.aclose()
        await talk()

    run(afterwards)
    assert left["view"] == b"viewed"


@pytest.mark.parametrize("does", ["reads", "writes"])
def test_a_loop_that_is_closed_while_a_task_waits(
    new_loop: Callable[[], asyncio.AbstractEventLoop], does: str
) -> None:
    """`loop.close()` drops the tasks where they stand."""
    loop = new_loop()
    ours, peer = socket.socketpair()

    async def main() -> asyncio.Task[Any]:
        conn = await Connection.from_socket(ours.detach())
        call = conn.receive() if does == "reads" else conn.send(bytes(8 << 20))
        task = asyncio.ensure_future(call)
        hub, number = conn._core.hub, conn._core.number
        while not (hub.waits(number) if does == "reads" else number in hub.writers):
            await asyncio.sleep(0)
        return task

    with peer:
        task = loop.run_until_complete(main())
        loop.close()
        gc.collect()
        peer.settimeout(30)
        while peer.recv(1 << 20):
            pass
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        gc.collect()


def test_a_loop_that_is_never_closed_but_collected() -> None:
    loop = asyncio.new_event_loop()
    ours, peer = socket.socketpair()
    conns: list[Any] = []

    async def main() -> None:
        conns.append(await Connection.from_socket(ours.detach()))

    with peer:
        loop.run_until_complete(main())
        gone = weakref.ref(loop)
        with pytest.warns(ResourceWarning):  # noqa: PT031 -- they go together
            del loop
            gc.collect()
        assert gone() is None
        assert closed(peer)
    assert conns[0].fileno() == -1


def test_a_loop_that_stops_and_goes_on(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """What comes while it stands still is there afterwards."""
    loop = new_loop()
    ours, peer = socket.socketpair()
    with peer:
        conn = loop.run_until_complete(Connection.from_socket(ours))
        peer.send(b"meanwhile")
        assert loop.run_until_complete(conn.next(9)) == b"meanwhile"
        loop.run_until_complete(conn.aclose())
    loop.close()


def test_a_forgotten_connection_of_a_loop_that_has_ended(run: Callable[[Main], Any]) -> None:
    """The loop's end has closed it: there is nothing to warn of."""
    left: list[Connection] = []

    async def main() -> None:
        left.extend(anypoll.socketpair())

    run(main)
    gc.collect()
    left.clear()
    gc.collect()


# --- the end of a Trio run -----------------------------------------------------------------------


def test_a_system_task_after_the_main_task() -> None:
    """System tasks are cancelled when main has ended, and may use a connection then."""
    seen: list[Any] = []

    async def main() -> None:
        first, second = anypoll.socketpair()

        async def system() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    for conn in (first, second):
                        try:
                            await conn.send(b"x")
                        except ClosedResourceError:
                            seen.append("closed")
                        else:
                            seen.append("sent")
                        await conn.aclose()

        trio.lowlevel.spawn_system_task(system)
        await trio.lowlevel.checkpoint()

    trio.run(main)
    assert len(seen) == 2


def test_a_task_that_waits_when_main_fails() -> None:
    async def main() -> None:
        first, second = anypoll.socketpair()
        async with first, second, trio.open_nursery() as nursery:
            nursery.start_soon(first.receive)
            nursery.start_soon(second.send, bytes(8 << 20))
            await trio.lowlevel.checkpoint()
            raise KeyError("the body's own")

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    assert [type(exc) for exc in caught.value.exceptions] == [KeyError]


def test_a_fault_of_ours_does_not_end_the_run(
    caplog: pytest.LogCaptureFixture, run: Callable[[Main], Any]
) -> None:
    """An exception in the hub's callback would be a TrioInternalError, or end up in asyncio's
    exception handler; it is logged instead.
    """

    async def main() -> None:
        first, second = anypoll.socketpair()
        async with first, second:
            hub = first._core.hub

            class Addressee:
                def on_token(self, *_: Any) -> None:
                    raise AssertionError("a fault of ours")

            addressee = Addressee()
            hub.addressees[first._core.number] = lambda: addressee  # type: ignore[assignment]
            hub.dispatch_one(first._core.number, _epoll.MAIL_TRIM, 0)
            del hub.addressees[first._core.number]
            await first.send(b"x")
            assert await second.receive() == b"x"

    run(main)
    assert [record.name for record in caplog.records] == ["anypoll.hub"]
    caplog.clear()  # its traceback holds the frames


# --- async generators ----------------------------------------------------------------------------


def test_an_async_generators_finaliser_uses_a_connection(run: Callable[[Main], Any]) -> None:
    """The loop ends them last; the connection works or is closed, and nothing hangs."""
    seen: list[str] = []
    ours, peer = socket.socketpair()
    peer.settimeout(30)

    async def lines(conn: Connection) -> AsyncIterator[bytes]:
        try:
            while True:
                yield await conn.receive()
        finally:
            try:
                await conn.send(b"bye")
                seen.append("sent")
            except ClosedResourceError:
                seen.append("closed")
            except BaseException as exc:
                seen.append(type(exc).__name__)
                raise
            finally:
                conn.abort()

    async def main() -> None:
        conn = await Connection.from_socket(ours.detach())
        peer.send(b"hello")
        generator = lines(conn)
        async for piece in generator:
            assert piece == b"hello"
            break
        generators.append(generator)

    generators: list[Any] = []
    with peer:
        run(main)
        generators.clear()
        gc.collect()
        assert len(seen) == 1
        assert seen[0] in {"sent", "closed", "Cancelled", "CancelledError"}
        while peer.recv(100):
            pass


# --- the wrong loop ------------------------------------------------------------------------------


Stay = Callable[[], Awaitable[None]]


@contextmanager
def elsewhere(main: Callable[[Stay], Awaitable[None]]) -> Iterator[None]:
    """Runs the function in an event loop of another thread. The block begins when it calls what it
    is given, and that returns when the block has ended.
    """
    ready, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    async def stay() -> None:
        ready.set()
        while not done.is_set():
            await anyio.sleep(0.001)

    def work() -> None:
        try:
            anyio.run(main, stay)
        except BaseException as exc:  # noqa: BLE001 -- for the test's thread
            failures.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(30), failures
        yield
    finally:
        done.set()
        thread.join(30)
    assert not failures
    assert not thread.is_alive()


def test_objects_of_another_loop(run: Callable[[Main], Any]) -> None:
    """While its own loop lives, another one must not touch a connection, a listener or a server;
    nobody waits for ever for what cannot be seen there.
    """
    shared: list[Any] = []

    async def hang_up(conn: Connection) -> None:
        await conn.send(b"x")

    async def owner(stay: Stay) -> None:
        first, second = anypoll.socketpair()
        multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
        server = anypoll.serve(hang_up, host="127.0.0.1", port=0)
        async with first, second, multi, server as serving:
            shared.extend([first, multi.listeners[0], serving])
            await stay()
            await second.send(b"x")
            assert await first.receive() == b"x"  # it was not disturbed
            assert not serving.shutting_down
            async with await anypoll.connect_tcp("127.0.0.1", serving.port) as conn:
                assert await conn.receive() == b"x"

    async def intruder() -> None:
        conn, listener, server = shared
        for call in (
            conn.receive,
            lambda: conn.send(b"x"),
            conn.send_eof,
            conn.aclose,
            conn.wait_writable,
            lambda: conn.next(1),
            lambda: conn.until(b"\n"),
            lambda: conn.skip(1),
            listener.accept,
            server.shutdown,
            lambda: server.shutdown(0),
            server.wait_shutting_down,
        ):
            with pytest.raises(RuntimeError, match="event loop"), anyio.fail_after(30):
                await call()
        for function in (conn.detach, lambda: conn.add_close_callback(print)):
            with pytest.raises(RuntimeError, match="event loop"):
                function()
        assert server.statistics().active == 0  # to look is allowed

    with elsewhere(owner):
        run(intruder)


def test_outside_of_any_loop() -> None:
    with pytest.raises(RuntimeError):
        anypoll.socketpair()


# --- the hub itself ------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_one_hub_for_a_loop() -> None:
    async with opened() as (a, _), opened() as (b, _):
        assert a._core.hub is b._core.hub is _runtime.current_hub()


@pytest.mark.anyio
async def test_a_hub_forgets_closed_connections() -> None:
    hub = _runtime.current_hub()
    for _ in range(3):
        async with opened() as (conn, _):
            number = conn._core.number
            assert hub._core(number) is conn._core
            async with anyio.create_task_group() as group:
                group.start_soon(conn.receive)
                await holds(lambda: hub.waits(number))  # noqa: B023
                group.cancel_scope.cancel()
            await given_up(conn, conn.send, bytes(4 << 20))
            assert number in hub.outputs
        assert hub._core(number) is None
        assert (hub.readers, hub.writers, hub.outputs) == ({}, {}, {})


@pytest.mark.anyio
async def test_more_tokens_than_fit_at_once() -> None:
    """A mailbox with more than the array holds is emptied all the same."""
    pairs = [anypoll.socketpair() for _ in range(400)]
    got: list[bytes] = []

    async def read(conn: Connection) -> None:
        got.append(await conn.receive())

    async with anyio.create_task_group() as group:
        for first, _ in pairs:
            group.start_soon(read, first)
        await settle()
        for _, second in pairs:
            os.write(second.fileno(), b"x")
        await holds(lambda: len(got) == len(pairs))
    for first, second in pairs:
        first.abort()
        second.abort()


@pytest.mark.anyio
async def test_wake_ups_for_nobody_are_harmless() -> None:
    hub = _runtime.current_hub()
    hub.wake_reader(12345)
    hub.wake_writers(12345)
    hub.dispatch()
    hub.dispatch_one(12345, 0xFF, 0)


def wait_for_news(hub: Hub) -> None:
    """Until a poller has told the hub something; the event loop does not run meanwhile."""
    assert select.select([_epoll.hub_fd(hub.handle)], [], [], 30)[0]


@pytest.mark.anyio
async def test_a_callback_uses_a_connection_of_which_news_is_under_way() -> None:
    """The news of one connection may run close callbacks. That another one's output was sent
    tells nothing about what a callback sends then: its memory must be kept.
    """
    async with opened() as (ending, _), opened() as (conn, peer):
        core = conn._core
        data = bytes(4 * 1024 * 1024)
        peer.setblocking(True)
        await given_up(conn, conn.send, data)
        rest = len(data)
        ending.add_close_callback(lambda: core._send([data]))
        ending.idle_timeout = 0
        wait_for_news(core.hub)
        while _epoll.conn_queued(core.handle) > 0:
            rest -= len(peer.recv(rest))
        core.hub.dispatch()
        assert core.number in core.hub.outputs
        assert _epoll.conn_queued(core.handle) > 0
        conn.abort()


@pytest.mark.anyio
async def test_a_release_between_a_wake_up_and_its_task() -> None:
    """The end of the window that the wake-up brings is of no use then."""
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"x")
        await conn.reader.skip(1)
        await arrive(conn, peer, b"x")
        assert await conn.reader.next(1) == b"x"
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await conn.reader.next(4)))

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await holds(lambda: conn._core.hub.waits(conn._core.number))
            peer.send(b"abcdefgh")
            wait_for_news(conn._core.hub)
            conn._core.hub.dispatch()
            conn.reader.release()
            high = conn._core.limits.write_high_water
            conn.writer.write(bytes(high))  # closes the window too
            group.start_soon(read_all, peer, high)
        assert got == [b"abcd"]
        assert await conn.reader.next(4) == b"efgh"


@pytest.mark.anyio
async def test_a_release_during_the_checkpoint_of_a_receive() -> None:
    async with opened() as (conn, peer):
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await conn.receive(4))

        async def release() -> None:
            conn.reader.release()

        for _ in range(20):  # trio chooses who comes first
            await arrive(conn, peer, b"0123456789")
            async with anyio.create_task_group() as group:
                group.start_soon(receive)
                group.start_soon(release)
            assert got.pop() == b"0123"
            assert await conn.reader.next(6) == b"456789"


@pytest.mark.anyio
async def test_a_wake_up_without_news_is_a_hint() -> None:
    """The task looks, finds nothing, and waits on."""
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await conn.receive())

        group.start_soon(read)
        for _ in range(5):
            await settle()
            conn._core.hub.wake_reader(conn._core.number)
        await settle()
        assert got == []
        peer.send(b"x")
        await holds(lambda: got)
    assert got == [b"x"]


def test_a_dead_hub_is_replaced() -> None:
    hubs: list[Hub] = []

    async def main() -> None:
        hubs.append(_runtime.current_hub())

    for _ in range(2):
        asyncio.run(main())
        gc.collect()
    assert hubs[0].dead
    assert hubs[1].dead
    assert hubs[0] is not hubs[1]
    hubs[0].end()
    hubs.clear()


# --- peers that go while nobody looks ------------------------------------------------------------


@pytest.mark.anyio
async def test_the_loop_may_be_busy_for_long() -> None:
    """Pollers read on meanwhile; what has come is there, and the end too."""
    async with opened("tcp") as (conn, peer):
        peer.sendall(b"a" * 50_000)
        peer.close()
        while conn.statistics().bytes_received < 50_000:  # the loop stands still
            pass
        assert len(await within(conn.next(50_000))) == 50_000
        with pytest.raises((EndOfStream, BrokenResourceError)):
            await within(conn.receive())

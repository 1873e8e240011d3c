"""Event loops that come and go: however one ends, nothing of ours is left, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest
import trio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from peers import arrive, given_up, holds, opened, read_all, settle, within
from programs import output_at_end, run_to_end

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


@pytest.fixture(params=RUNNERS)
def run(request: pytest.FixtureRequest) -> Callable[[Main], Any]:
    """Runs a main function to its end, in one of the ways there are."""
    return RUNNERS[request.param]


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


def test_one_loop_after_another(run: Callable[[Main], Any]) -> None:
    for _ in range(3):
        run(talk)


def test_all_kinds_of_loops_in_turn() -> None:
    for _ in range(2):
        for name, run in RUNNERS.items():
            if name != "uvloop.run" or uvloop is not None:
                run(talk)


def test_loops_in_several_threads_at_once() -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def work(run: Callable[[Main], Any]) -> None:
        try:
            start.wait(30)
            for _ in range(5):
                run(talk)
        except BaseException as exc:  # noqa: BLE001 -- the test looks at it
            errors.append(exc)

    chosen = [RUNNERS[name] for name in ("asyncio.run", "trio.run", "anyio.run")] * 2
    threads = [threading.Thread(target=work, args=(run,)) for run in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


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


def test_a_connection_that_outlives_its_loop(run: Callable[[Main], Any]) -> None:
    left: list[Connection] = []
    ours, peer = socket.socketpair()

    async def main() -> None:
        left.append(await Connection.from_socket(ours.detach()))
        await left[0].send(b"x")

    with peer:
        run(main)
        gc.collect()
        assert peer.recv(1) == b"x"
        assert closed(peer)
    [conn] = left
    assert conn.fileno() == -1
    assert not conn.is_active
    assert "closed" in repr(conn)
    assert conn.statistics().bytes_sent == 1
    with pytest.raises(ClosedResourceError):
        conn.writer.write(b"x")
    conn.abort()

    async def afterwards() -> None:
        for call in (conn.receive, lambda: conn.send(b"x"), lambda: conn.next(1)):
            with pytest.raises(ClosedResourceError):
                await call()
        await conn.aclose()

    run(afterwards)


def test_a_raw_socket_that_outlives_its_loop(run: Callable[[Main], Any]) -> None:
    left: list[Any] = []
    ours, peer = socket.socketpair()

    async def main() -> None:
        conn = await Connection.from_socket(ours)
        left.extend([conn, conn.extra(SocketAttribute.raw_socket)])

    with peer:
        run(main)
        gc.collect()
        assert closed(peer)
    assert left[1].fileno() == -1


def test_a_listener_that_outlives_its_loop(run: Callable[[Main], Any]) -> None:
    left: list[Any] = []

    async def main() -> None:
        left.append(await anypoll.create_tcp_listener(local_host="127.0.0.1"))
        left.append(left[0].extra(SocketAttribute.local_address))

    run(main)
    gc.collect()
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(left[1])

    async def afterwards() -> None:
        [listener] = left[0].listeners
        with pytest.raises(ClosedResourceError):
            await listener.accept()
        await listener.aclose()

    run(afterwards)


def test_views_outlive_the_loop(run: Callable[[Main], Any]) -> None:
    views: list[memoryview] = []

    async def main() -> None:
        first, second = anypoll.socketpair()
        async with first, second:
            for n in range(100):
                await first.send(bytes([n]) * 1000)
                views.append(await second.next(1000))

    run(main)
    gc.collect()
    run(talk)
    assert views == [bytes([n]) * 1000 for n in range(100)]


def test_a_loop_that_is_closed_while_tasks_wait(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """`loop.close()` drops the tasks where they stand."""
    loop = new_loop()
    ours, peer = socket.socketpair()

    async def main() -> asyncio.Task[bytes]:
        conn = await Connection.from_socket(ours.detach())

        async def read() -> bytes:
            return await conn.receive()

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        return task

    with peer:
        task = loop.run_until_complete(main())
        loop.close()
        gc.collect()
        assert closed(peer)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        gc.collect()


def test_a_loop_that_is_closed_while_output_is_stalled(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = new_loop()
    ours, peer = socket.socketpair()

    async def main() -> asyncio.Task[None]:
        conn = await Connection.from_socket(ours.detach())
        task = asyncio.ensure_future(conn.send(bytes(8 << 20)))
        while not conn.statistics().buffered_output:
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
            hub._dispatch_one(first._core.number, _epoll.MAIL_TRIM, 0)
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


def test_objects_of_another_loop(run: Callable[[Main], Any]) -> None:
    """While its own loop lives, another one must not touch a connection."""
    message = "event loop"
    ready, done = threading.Event(), threading.Event()
    shared: list[Any] = []

    async def owner() -> None:
        first, second = anypoll.socketpair()
        multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
        async with first, second, multi:
            shared.extend([first, multi.listeners[0]])
            ready.set()
            while not done.is_set():
                await anyio.sleep(0.001)
            await second.send(b"x")
            assert await first.receive() == b"x"  # it was not disturbed

    async def intruder() -> None:
        conn, listener = shared
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
        ):
            with pytest.raises(RuntimeError, match=message):
                await call()
        with pytest.raises(RuntimeError, match=message):
            conn.detach()

    thread = threading.Thread(target=lambda: RUNNERS["asyncio.run"](owner))
    thread.start()
    try:
        assert ready.wait(30)
        run(intruder)
    finally:
        done.set()
        thread.join(30)
    assert not thread.is_alive()


def test_a_server_of_another_loop(run: Callable[[Main], Any]) -> None:
    """It is not ended from there, and nobody waits for ever for what cannot be seen there."""
    started, done = threading.Event(), threading.Event()
    servers: list[anypoll.Server] = []

    async def hang_up(conn: Connection) -> None:
        await conn.send(b"x")

    async def owner() -> None:
        async with anypoll.serve(hang_up, host="127.0.0.1", port=0) as server:
            servers.append(server)
            started.set()
            while not done.is_set():
                await anyio.sleep(0.001)
            assert not server.shutting_down
            async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
                assert await conn.receive() == b"x"

    async def intruder() -> None:
        [server] = servers
        with anyio.fail_after(30):
            for call in (server.shutdown, lambda: server.shutdown(0), server.wait_shutting_down):
                with pytest.raises(RuntimeError, match="event loop"):
                    await call()
        assert server.statistics().active == 0  # to look is allowed

    failed: list[BaseException] = []

    def owning() -> None:
        try:
            RUNNERS["trio.run"](owner)
        except BaseException as exc:  # noqa: BLE001 -- for the test's thread
            failed.append(exc)

    thread = threading.Thread(target=owning)
    thread.start()
    try:
        assert started.wait(30)
        run(intruder)
    finally:
        done.set()
        thread.join(30)
    assert not failed
    assert not thread.is_alive()


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
            assert number in hub.addressees
            async with anyio.create_task_group() as group:
                group.start_soon(conn.receive)
                await holds(lambda: number in hub.readers)  # noqa: B023
                group.cancel_scope.cancel()
            await given_up(conn, conn.send, bytes(4 << 20))
            assert number in hub.outputs
        assert number not in hub.addressees
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
    hub._dispatch_one(12345, 0xFF, 0)


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
            await holds(lambda: conn._core.number in conn._core.hub.readers)
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
            for _ in range(5):
                await anyio.sleep(0)
            conn._core.hub.wake_reader(conn._core.number)
        for _ in range(5):
            await anyio.sleep(0)
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


# --- the process ---------------------------------------------------------------------------------


def python(code: str) -> str:
    done = run_to_end(
        # as `-X dev`, but for asyncio's debug mode, which complains of steps that take long
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", code],
        env={"PYTHONMALLOC": "debug", **os.environ},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_starts_no_thread() -> None:
    """L34."""
    python(
        "import os\n"
        "import anypoll\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "assert anypoll.statistics().pollers == ()\n"
    )


@pytest.mark.unsanitized
@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_interpreter_exit_with_open_connections(library: str) -> None:
    """L34. Open in a module's global, with a view, stalled output, a listener: a clean exit."""
    out = python(
        f"import {library}, anypoll\n"
        "async def main():\n"
        "    global first, second, listener, view\n"
        "    first, second = anypoll.socketpair()\n"
        "    listener = await anypoll.create_tcp_listener(local_host='127.0.0.1')\n"
        "    await second.send(b'hello')\n"
        "    view = await first.next(5)\n"
        "    first.writer.write(bytes(8 << 20))\n"
        "    import anyio\n"
        "    with anyio.move_on_after(0.01):\n"
        "        await first.writer.flush()\n"
        "    assert first.writer.buffered > 0\n"
        f"{library}.run({'main()' if library == 'asyncio' else 'main'})\n"
        "print(bytes(view))\n"
    )
    assert out == "b'hello'\n"


@pytest.mark.unsanitized
def test_interpreter_exit_while_a_loop_is_running_elsewhere() -> None:
    """A daemon thread with a loop, pollers at work: the exit neither hangs nor crashes."""
    python(
        "import asyncio, threading, anypoll, time\n"
        "going = threading.Event()\n"
        "async def main():\n"
        "    a, b = anypoll.socketpair()\n"
        "    while True:\n"
        "        await a.send(b'x')\n"
        "        await b.receive()\n"
        "        going.set()\n"
        "threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()\n"
        "assert going.wait(30)\n"
    )


EXIT_INSIDE = """
import asyncio, sys, anypoll
async def main():
    a, b = anypoll.socketpair()
    asyncio.ensure_future(a.receive())
    await asyncio.sleep(0)
    sys.exit(7)
asyncio.run(main())
"""


@pytest.mark.unsanitized
def test_interpreter_exit_inside_the_loop() -> None:
    done = run_to_end([sys.executable, "-c", EXIT_INSIDE])
    assert done.returncode == 7
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import asyncio, anypoll
async def main():
    a, b = anypoll.socketpair()
    async with a, b:
        print("ready", flush=True)
        await a.receive()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signals_reach_the_main_thread() -> None:
    """Pollers block them: Ctrl-C interrupts a loop that waits for a connection."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            INTERRUPTED,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert output_at_end(process)[0] == "interrupted\n"
    assert process.returncode == 0


# --- fork ----------------------------------------------------------------------------------------


FORK = """
import gc, os, socket, sys, warnings
import anyio, anypoll
from anyio import ClosedResourceError
from anyio.abc import SocketAttribute

warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
backend = sys.argv[1]

def targets():
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink("/proc/self/fd/" + name))
        except OSError:
            pass
    return names

def target(thing):
    return os.readlink("/proc/self/fd/%d" % thing.fileno())

async def in_child(inherited):
    for conn in inherited:
        for call in (conn.receive, lambda: conn.send(b"intruder"), lambda: conn.next(1)):
            try:
                await call()
            except ClosedResourceError:
                pass
            else:
                raise AssertionError("an inherited connection was used")
        assert conn.fileno() == -1, conn.fileno()
        assert not conn.is_active
        conn.abort()
        await conn.aclose()
    assert anypoll.statistics().pollers == ()

    async def echo(conn):
        async for piece in conn:
            await conn.send(piece)

    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as client:
            await client.send(b"of its own")
            assert await client.next(10) == b"of its own"
    assert len(anypoll.statistics().pollers) == 1

async def main():
    first, second = anypoll.socketpair()
    third, fourth = anypoll.socketpair()
    raw = third.extra(SocketAttribute.raw_socket)
    listener = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    async with first, second, third, fourth, listener:
        await first.send(b"unread")
        async with anyio.create_task_group() as group:
            group.start_soon(third.send, bytes(4 << 20))
            while third._core.number not in third._core.hub.writers:  # until it is stalled
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        ours = [target(each) for each in (first, second, third, fourth)]
        ours.append(target(listener.extra(SocketAttribute.raw_socket)))
        assert len(set(ours) & set(targets())) == 5
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                assert not set(ours) & set(targets()), targets()
                assert raw.fileno() == -1
                import threading
                errors = []
                def work():
                    try:
                        anyio.run(in_child, [first, second, third, fourth], backend=backend)
                    except BaseException as exc:
                        errors.append(exc)
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                if errors:
                    raise errors[0]
                gc.collect()
                code = 0
            finally:
                if code:
                    import traceback
                    traceback.print_exc()
                    sys.stderr.flush()
                os._exit(code)
        # the parent goes on at once, while the child closes what it has inherited
        for n in range(200):
            message = b"%d" % n
            await second.send(message)
            assert await first.receive() == message
        status = await anyio.to_thread.run_sync(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status[1]) == 0
        assert await second.receive() == b"unread"
        got = 0
        while got < 4 << 20:
            got += len(await fourth.receive())
        async with await anypoll.connect_tcp(
            "127.0.0.1", listener.extra(SocketAttribute.local_port)
        ) as client:
            async with await listener.listeners[0].accept() as accepted:
                await client.send(b"x")
                assert await accepted.receive() == b"x"
    print("undisturbed")

anyio.run(main, backend=backend)
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_fork(backend: str) -> None:
    done = run_to_end([sys.executable, "-c", FORK, backend])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "undisturbed\n"
    assert done.stderr == ""


@pytest.mark.unsanitized
def test_fork_before_first_use() -> None:
    out = python(
        "import os, anyio, anypoll\n"
        "pid = os.fork()\n"
        "async def main():\n"
        "    a, b = anypoll.socketpair()\n"
        "    async with a, b:\n"
        "        await a.send(b'x')\n"
        "        assert await b.receive() == b'x'\n"
        "anyio.run(main)\n"
        "if pid:\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    print('both')\n"
    )
    assert out == "both\n"


@pytest.mark.unsanitized
def test_subprocesses_inherit_nothing() -> None:
    """O20."""
    out = python(
        "import anyio, anypoll, os, subprocess, sys\n"
        "async def main():\n"
        "    a, b = anypoll.socketpair()\n"
        "    listener = await anypoll.create_tcp_listener(local_host='127.0.0.1')\n"
        "    async with a, b, listener:\n"
        "        done = subprocess.run([sys.executable, '-c', 'import os; print(len(os.listdir('\n"
        "            '\"/proc/self/fd\")))'], close_fds=False, capture_output=True, text=True,\n"
        "            check=True)\n"
        "        print(done.stdout.strip())\n"
        "anyio.run(main)\n"
    )
    assert int(out) == 4  # the three standard ones, and that of the listing


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

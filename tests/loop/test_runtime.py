"""The life of the process: forks, and exits with whatever is open and running."""

from __future__ import annotations

import sys
import textwrap

import pytest
from programs import run_to_end

BACKENDS = ["asyncio", "uvloop", "trio"]

PRELUDE = """
import os, signal, socket, sys, threading, warnings
import anyio, anypoll
from anyio import ClosedResourceError
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
name = sys.argv[1]

def run(function, *args):
    options = {}
    if name == "uvloop":
        import uvloop
        options["loop_factory"] = uvloop.new_event_loop
    backend = "trio" if name == "trio" else "asyncio"
    return anyio.run(function, *args, backend=backend, backend_options=options)

async def echo(conn):
    async for piece in conn:
        await conn.send(piece)

async def works(pairs, rounds=1):
    for n in range(rounds):
        for one, other in pairs:
            message = b"%08d" % n
            await one.send(message)
            assert await other.next(8) == message

async def on_its_own(inherited):
    \"\"\"What a child does: nothing with what it has inherited, and everything by itself.\"\"\"
    for pair in inherited:
        for conn in pair:
            for call in (conn.receive, lambda: conn.send(b"intruder")):
                try:
                    await call()
                except ClosedResourceError:
                    pass
                else:
                    raise AssertionError("an inherited connection was used")
    assert anypoll.statistics().pollers == ()
    assert anypoll.statistics().memory.bytes_in_use == 0
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as client:
            await client.send(b"of its own")
            assert await client.next(10) == b"of its own"

def in_child(function, *args):
    \"\"\"In a thread of its own: that of the fork may run a loop already.\"\"\"
    failures = []
    def work():
        try:
            run(function, *args)
        except BaseException as exc:
            failures.append(exc)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def python(code: str, backend: str, *, status: int = 0) -> tuple[str, str]:
    """What the program prints, and what it says of errors."""
    code = PRELUDE + textwrap.dedent(code)
    if backend == "uvloop":
        pytest.importorskip("uvloop")
    done = run_to_end([sys.executable, "-c", code, backend])
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


# --- fork ----------------------------------------------------------------------------------------


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_with_many_pollers(backend: str) -> None:
    """Some of which drain; the child has the settings, and the parent goes on byte for byte."""
    out = python(
        """
        async def main():
            anypoll.configure(pollers=4)
            pairs = [anypoll.socketpair() for _ in range(4)]
            anypoll.configure(pollers=2)
            await works(pairs)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    in_child(on_its_own, pairs)
                    assert len(anypoll.statistics().pollers) == 2
                    code = 0
                except BaseException as exc:
                    sys.excepthook(type(exc), exc, exc.__traceback__)
                    sys.stderr.flush()
                os._exit(code)
            await works(pairs, 100)
            await anyio.to_thread.run_sync(ended, pid)
            await works(pairs, 10)
            assert [p.connections for p in anypoll.statistics().pollers] == [2, 2, 2, 2]
            for pair in pairs:
                for conn in pair:
                    await conn.aclose()
            while len(anypoll.statistics().pollers) > 2:
                await anyio.sleep(0)
            print("undisturbed")

        run(main)
        """,
        backend,
    )
    assert out == ("undisturbed\n", "")


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_child_exits_through_the_front_door(backend: str) -> None:
    """sys.exit() and atexit, with what it inherited and what it opened itself; a grandchild too."""
    out = python(
        """
        import atexit

        async def main():
            anypoll.configure(pollers=2)
            pair = anypoll.socketpair()
            await works([pair])
            return pair

        async def forks_again():
            await on_its_own([kept])
            global own
            own = anypoll.socketpair()
            await works([own])

        kept = run(main)
        pid = os.fork()
        if pid == 0:
            run(forks_again)
            atexit.register(lambda: print("child", flush=True))
            pid = os.fork()
            if pid == 0:
                run(on_its_own, [kept, own])
                atexit.unregister(print)
                sys.exit(0)
            ended(pid)
            sys.exit(0)
        ended(pid)
        print("parent")
        """,
        backend,
    )
    assert out == ("child\nchild\nparent\n", "")  # the grandchild has inherited the callback


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_in_a_thread_while_pollers_work(backend: str) -> None:
    """Whatever is locked at that moment; again and again."""
    out = python(
        """
        def fork_often(pairs):
            for _ in range(10):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        in_child(on_its_own, pairs)
                        code = 0
                    except BaseException as exc:
                        sys.excepthook(type(exc), exc, exc.__traceback__)
                        sys.stderr.flush()
                    os._exit(code)
                ended(pid)

        async def main():
            anypoll.configure(pollers=2)
            pairs = [anypoll.socketpair() for _ in range(4)]
            over = False

            async def keep_busy(pair):
                while not over:
                    await works([pair])

            async with anyio.create_task_group() as group:
                for pair in pairs:
                    group.start_soon(keep_busy, pair)
                await anyio.to_thread.run_sync(fork_often, pairs)
                over = True
            await works(pairs)
            print("undisturbed")

        run(main)
        """,
        backend,
    )
    assert out == ("undisturbed\n", "")


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_multiprocessing_with_fork(backend: str) -> None:
    """Its children end by os._exit() after their own clean-up, and serve meanwhile."""
    out = python(
        """
        import multiprocessing

        def child(queue):
            run(on_its_own, [])
            queue.put(os.getpid())

        async def main():
            pair = anypoll.socketpair()
            await works([pair])
            return pair

        kept = run(main)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=child, args=(queue,)) for _ in range(3)]
        for each in children:
            each.start()
        pids = {queue.get() for _ in children}
        for each in children:
            each.join()
        assert [each.exitcode for each in children] == [0, 0, 0]
        assert pids == {each.pid for each in children}
        run(main)
        print("parent")
        """,
        backend,
    )
    assert out == ("parent\n", "")


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_after_a_poller_has_failed(backend: str) -> None:
    """Noticed by the parent or not: the child starts afresh."""
    out = python(
        """
        import logging
        logging.getLogger("anypoll").addHandler(logging.NullHandler())
        from anypoll import _epoll
        from anypoll._loop import runtime as _runtime

        async def main():
            pair = anypoll.socketpair()
            poller = pair[0]._core.poller
            _epoll.set_fault("EPOLL_WAIT", 9)
            _runtime.nudge()
            while _epoll.poller_ended(poller) is None:
                await anyio.sleep(0)
            return pair

        kept = run(main)
        pid = os.fork()
        run(on_its_own if pid == 0 else works, [kept] if pid == 0 else [])
        if pid == 0:
            sys.exit(0)
        ended(pid)
        print("parent")
        """,
        backend,
    )
    assert out == ("parent\n", "")


# --- exit ----------------------------------------------------------------------------------------

OPEN = """

async def opens():
    \"\"\"Connections with all that may be under way, and a listener.\"\"\"
    global kept
    anypoll.configure(pollers=3)
    kept = [anypoll.socketpair() for _ in range(3)]
    kept.append(await anypoll.create_tcp_listener(local_host="127.0.0.1"))
    await works(kept[:3])
    await kept[0][0].send(b"unread")
    kept[1][0].writer.write(bytes(100_000))
    with anyio.move_on_after(0.01):
        await kept[2][0].send(bytes(8 << 20))  # stalled
    print("open", flush=True)
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("run(opens)", 0, ""),
        ("run(opens); sys.exit(3)", 3, ""),
        ("run(opens); raise RuntimeError('at the end')", 1, "RuntimeError: at the end"),
        ("anypoll.configure(pollers=3); run(opens); anypoll.configure(pollers=1)", 0, ""),
    ],
    ids=["end", "exit", "exception", "draining"],
)
def test_exit_behind_the_event_loop(backend: str, how: str, status: int, says: str) -> None:
    out, err = python(OPEN + how, backend, status=status)
    assert out == "open\n"
    assert err.rstrip().endswith(says)
    assert says or not err


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
        ("raise RuntimeError('in a task')", 1, "RuntimeError: in a task"),
    ],
    ids=["exit", "interrupt", "exception"],
)
def test_exit_out_of_the_event_loop(backend: str, how: str, status: int, says: str) -> None:
    """While handlers wait for their peers."""
    code = (
        OPEN
        + f"""
async def main():
    await opens()
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        global client
        client = socket.create_connection(("127.0.0.1", server.port))
        while server.statistics().active < 1:
            await anyio.sleep(0)
        {how}

try:
    run(main)
except BaseExceptionGroup as group:
    while hasattr(group, "exceptions"):
        [group] = group.exceptions
    raise group from None
"""
    )
    out, err = python(code, backend, status=status)
    assert out == "open\n"
    assert says in err


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_with_event_loops_in_daemon_threads(backend: str) -> None:
    """Which are in the middle of everything, and never come to an end."""
    out, err = python(
        """
        ready = threading.Semaphore(0)

        async def client(port):
            async with await anypoll.connect_tcp("127.0.0.1", port) as conn:
                ready.release()
                while True:
                    await conn.send(bytes(10_000))
                    await conn.next(10_000)

        async def main():
            async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
                async with anyio.create_task_group() as group:
                    for _ in range(3):
                        group.start_soon(client, server.port)

        anypoll.configure(pollers=2)
        for _ in range(2):
            threading.Thread(target=run, args=[main], daemon=True).start()
        for _ in range(6):
            ready.acquire()
        print("end", flush=True)
        """,
        backend,
    )
    assert (out, err) == ("end\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_while_a_handler_blocks(backend: str) -> None:
    """In a daemon thread whose loop stands still; its input goes on arriving."""
    out, err = python(
        """
        blocked = threading.Event()

        async def handler(conn):
            await conn.receive()
            blocked.set()
            threading.Event().wait()

        async def main():
            async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
                global client
                client = socket.create_connection(("127.0.0.1", server.port))
                client.sendall(bytes(100_000))
                await anyio.sleep_forever()

        threading.Thread(target=run, args=[main], daemon=True).start()
        blocked.wait()
        print("end", flush=True)
        """,
        backend,
    )
    assert (out, err) == ("end\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noticed", [True, False])
def test_exit_with_a_poller_that_has_failed(backend: str, noticed: bool) -> None:
    out, err = python(
        OPEN
        + f"""
import logging
from anypoll import _epoll
from anypoll._loop import runtime as _runtime
logging.getLogger("anypoll").addHandler(logging.NullHandler())

async def main():
    await opens()
    pollers = [conn._core.poller for pair in kept[:3] for conn in pair]
    _epoll.set_fault("EPOLL_WAIT", 9)  # for whichever comes first
    _runtime.nudge()
    while all(_epoll.poller_ended(poller) is None for poller in pollers):
        pass
    if {noticed}:
        anypoll.statistics()

run(main)
""",
        backend,
    )
    assert (out, err) == ("open\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_handlers_that_open_connections(backend: str) -> None:
    """Those that are registered after the import work; those before it are refused, and do not hang
    on a poller that has been stopped.
    """
    out, err = python(
        """
        import atexit
        from anypoll._loop import runtime as _runtime

        async def main():
            one, other = anypoll.socketpair()
            async with one, other, anyio.create_task_group() as group:
                group.start_soon(echo, other)
                await one.send(b"moved")
                print(str(await one.next(5), "ascii"), flush=True)
                await one.send_eof()

        def before_the_import():
            anypoll.configure(pollers=3)
            threads = len(os.listdir("/proc/self/task"))
            try:
                run(main)
            except RuntimeError:
                print("refused", flush=True)
            assert len(os.listdir("/proc/self/task")) == threads

        atexit.unregister(_runtime.stop_pollers)
        atexit.register(before_the_import)
        atexit.register(_runtime.stop_pollers)
        atexit.register(lambda: run(main))
        run(main)
        """,
        backend,
    )
    assert (out, err) == ("moved\nmoved\nrefused\n", "")

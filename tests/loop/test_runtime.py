"""The life of the process: its start, forks, and exits with whatever is open and running."""

from __future__ import annotations

import sys
import textwrap

import pytest
from programs import LOOPS, ON_LOOP, run_to_end

BACKENDS = ["asyncio", "trio"]

PRELUDE = (
    ON_LOOP
    + """
import os, signal, socket, threading, warnings
import anypoll
from anyio import ClosedResourceError
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
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
            for call in (conn.receive, lambda: conn.send(b"intruder"), lambda: conn.next(1)):
                try:
                    await call()
                except ClosedResourceError:
                    pass
                else:
                    raise AssertionError("an inherited connection was used")
            assert (conn.fileno(), conn.is_active) == (-1, False)
            conn.abort()
            await conn.aclose()
    assert anypoll.statistics().pollers == ()
    assert anypoll.statistics().memory.bytes_in_use == 0
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as client:
            await client.send(b"of its own")
            assert await client.next(10) == b"of its own"

def in_thread(function, *args):
    \"\"\"That of the fork may run a loop already.\"\"\"
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

def forked(function, *args):
    \"\"\"The pid of a child that calls the function and ends.\"\"\"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)
    return pid

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
)


def python(code: str, backend: str = "asyncio", *, status: int = 0) -> tuple[str, str]:
    """What the program prints, and what it says of errors."""
    if backend == "uvloop":
        pytest.importorskip("uvloop")
    done = run_to_end([sys.executable, "-c", textwrap.dedent(code), backend])
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


# --- start ---------------------------------------------------------------------------------------


@pytest.mark.unsanitized
def test_importing_starts_nothing() -> None:
    """L34. Before first use configure() only records, and statistics() is empty."""
    out = python(
        """
        import os, sys

        def own():
            return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")]

        before = own()
        import anypoll, anypoll.mux, anypoll.nocopy, anypoll.streams, anypoll.integrations
        print(anypoll.statistics().pollers, anypoll.statistics().memory.bytes_in_use)
        anypoll.configure(pollers=3, load_balance="least_connections")
        try:
            anypoll.configure(pollers=0)
        except ValueError:
            print("refused")
        print(anypoll.statistics().pollers)
        assert own() == before and before[0] == 1
        assert not {"trio", "uvloop"} & set(sys.modules)

        import anyio

        async def main():
            a, b = anypoll.socketpair()
            async with a, b:
                print([p.connections for p in anypoll.statistics().pollers], own()[0])

        anyio.run(main)
        """
    )
    assert out == ("() 0\nrefused\n()\n[1, 1, 0] 4\n", "")


# --- fork ----------------------------------------------------------------------------------------


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", LOOPS)
def test_fork(backend: str) -> None:
    """The child has the settings and none of what is open here: some pollers drain, bytes are
    unread, output is stalled. The parent goes on byte for byte.
    """
    out = python(
        PRELUDE
        + """
from anyio.abc import SocketAttribute

def targets():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return {os.path.basename(os.path.realpath(link)) for link in links}

def child(pairs, open_here):
    assert not open_here & targets()
    in_thread(on_its_own, pairs)
    assert len(anypoll.statistics().pollers) == 2
    assert not closed

async def main():
    before = targets()
    anypoll.configure(pollers=4)
    pairs = [anypoll.socketpair() for _ in range(4)]
    raw = pairs[0][0].extra(SocketAttribute.raw_socket)
    pairs[0][0].add_close_callback(lambda: closed.append(1))
    listener = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    anypoll.configure(pollers=2)
    await works(pairs)
    await pairs[0][1].send(b"unread")
    reads, stalls = pairs[1]
    async with anyio.create_task_group() as group:
        group.start_soon(stalls.send, bytes(4 << 20))
        while stalls._core.number not in stalls._core.hub.writers:
            await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    open_here = {name for name in targets() - before if name.startswith("socket:")}
    assert len(open_here) >= 9
    pid = forked(child, pairs, open_here)
    await works(pairs, 100)  # while the child closes what it has inherited
    await anyio.to_thread.run_sync(ended, pid)
    await works(pairs, 10)
    assert await pairs[0][0].receive() == b"unread"
    got = 0
    while got < 4 << 20:
        got += len(await reads.receive())
    port = listener.extra(SocketAttribute.local_port)
    async with await anypoll.connect_tcp("127.0.0.1", port) as client:
        async with await listener.listeners[0].accept() as accepted:
            await works([(client, accepted)])
    await listener.aclose()
    assert [p.connections for p in anypoll.statistics().pollers] == [2, 2, 2, 2]
    for pair in pairs:
        for conn in pair:
            await conn.aclose()
    assert closed == [1]
    while len(anypoll.statistics().pollers) > 2:
        await anyio.sleep(0)
    print("undisturbed")

closed = []
run(main)
""",
        backend,
    )
    assert out == ("undisturbed\n", "")


FORKS = {
    "before first use": """
async def main():
    await works([anypoll.socketpair()])

pid = os.fork()
run(main)
if pid:
    ended(pid)
    print("parent")
""",
    # sys.exit() and atexit, with what was inherited and what was opened; a grandchild too, which
    # has inherited the callback
    "out of the front door": """
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
        sys.exit(0)
    ended(pid)
    sys.exit(0)
ended(pid)
print("parent")
""",
    # whatever is locked at that moment
    "in a thread while pollers work": """
def fork_often(pairs):
    for _ in range(5):
        ended(forked(in_thread, on_its_own, pairs))

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
    print("parent")

run(main)
""",
    # which the parent has not noticed
    "after a poller has failed": """
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
ended(forked(run, on_its_own, [kept]))
print("parent")
""",
}


@pytest.mark.unsanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", FORKS)
def test_forks(how: str, backend: str) -> None:
    out, err = python(PRELUDE + FORKS[how], backend)
    assert out.removeprefix("child\nchild\n" if "door" in how else "") == "parent\n"
    assert err == ""


# --- exit ----------------------------------------------------------------------------------------

OPEN = (
    PRELUDE
    + """
async def opens():
    \"\"\"Connections with all that may be under way, a listener and a view.\"\"\"
    global kept, view
    anypoll.configure(pollers=3)
    kept = [anypoll.socketpair() for _ in range(3)]
    kept.append(await anypoll.create_tcp_listener(local_host="127.0.0.1"))
    await works(kept[:3])
    await kept[0][0].send(b"unread")
    view = await kept[0][1].next(2)
    kept[1][0].writer.write(bytes(100_000))
    with anyio.move_on_after(0.01):
        await kept[2][0].send(bytes(8 << 20))  # stalled
    print("open", flush=True)

async def serves(leave):
    \"\"\"Handlers wait for their peers meanwhile.\"\"\"
    await opens()
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        global client
        client = socket.create_connection(("127.0.0.1", server.port))
        while server.statistics().active < 1:
            await anyio.sleep(0)
        leave()

def interrupt():
    raise KeyboardInterrupt

def fail():
    raise RuntimeError("at the end")

def run_serving(leave):
    try:
        run(serves, leave)
    except BaseExceptionGroup as group:
        while hasattr(group, "exceptions"):
            [group] = group.exceptions
        raise group from None
"""
)


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        pytest.param("run(opens)", 0, "", id="end"),
        pytest.param("run(opens); sys.exit(3)", 3, "", id="exit"),
        pytest.param("run(opens); fail()", 1, "RuntimeError: at the end\n", id="exception"),
        pytest.param(
            "anypoll.configure(pollers=3); run(opens); anypoll.configure(pollers=1)",
            *(0, ""),
            id="draining",
        ),
        pytest.param("run_serving(lambda: sys.exit(3))", 3, "", id="exit inside"),
        pytest.param("run_serving(interrupt)", -2, "KeyboardInterrupt\n", id="interrupt inside"),
        pytest.param("run_serving(fail)", 1, "RuntimeError: at the end\n", id="exception inside"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_with_all_open(backend: str, how: str, status: int, says: str) -> None:
    """L34: inside of the event loop and behind it."""
    out, err = python(OPEN + how, backend, status=status)
    assert out == "open\n"
    assert err.endswith(says)
    assert says or not err


EXITS = {
    # which are in the middle of everything, and never come to an end
    "with event loops in daemon threads": """
ready = threading.Semaphore(0)

async def talk(port):
    async with await anypoll.connect_tcp("127.0.0.1", port) as conn:
        ready.release()
        while True:
            await conn.send(bytes(10_000))
            await conn.next(10_000)

async def main():
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(talk, server.port)

anypoll.configure(pollers=2)
for _ in range(2):
    threading.Thread(target=run, args=[main], daemon=True).start()
for _ in range(6):
    ready.acquire()
print("open", flush=True)
""",
    # its loop stands still; its input goes on arriving
    "while a handler blocks": """
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
print("open", flush=True)
""",
    "with a poller that has failed": """
import logging
logging.getLogger("anypoll").addHandler(logging.NullHandler())
from anypoll import _epoll
from anypoll._loop import runtime as _runtime

async def main():
    await opens()
    pollers = [conn._core.poller for pair in kept[:3] for conn in pair]
    _epoll.set_fault("EPOLL_WAIT", 9)  # for whichever comes first
    _runtime.nudge()
    while all(_epoll.poller_ended(poller) is None for poller in pollers):
        pass

run(main)
""",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", EXITS)
def test_exit(how: str, backend: str) -> None:
    assert python(OPEN + EXITS[how], backend) == ("open\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_handlers_that_open_connections(backend: str) -> None:
    """Those that are registered after the import work; those before it are refused, and do not hang
    on a poller that has been stopped.
    """
    out = python(
        PRELUDE
        + """
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
    assert out == ("moved\nmoved\nrefused\n", "")

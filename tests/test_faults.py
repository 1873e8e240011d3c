"""Every system call of the core fails, and every allocation, with the package on top of it: what
comes of it is an exception with a cause or a retry, never a crash, a hang or a leak; and the server
goes on. csrc/faults.c has the seam, tests/c/test_faults.c the same without Python.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, IncompleteRead
from anyio.abc import SocketAttribute
from peers import (
    KIB,
    MIB,
    holds,
    opened,
    pattern,
    read_all,
    send_all,
    settle,
    socket_pair,
    within,
)
from programs import LOOPS, python

import anypoll
from anypoll import _epoll

pytestmark = pytest.mark.anyio

#: What the man pages list, as far as it is not our own misuse; tests/c/test_faults.c has more.
SITES: dict[str, tuple[int, ...]] = {
    "READ": (errno.EINTR, errno.ECONNRESET, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOBUFS),
    "WRITE": (errno.EINTR, errno.EPIPE, errno.ECONNRESET, errno.ENOBUFS, errno.EMSGSIZE),
    "ACCEPT": (errno.EINTR, errno.ECONNABORTED, errno.EMFILE, errno.EPROTO, errno.ENOBUFS),
    "EPOLL_CTL": (errno.EINTR, errno.ENOMEM, errno.ENOSPC, errno.EEXIST),
    "EPOLL_WAIT": (errno.EINTR,),
    "ALLOC": (errno.ENOMEM,),
    "MAP": (errno.ENOMEM,),
    "SIGNAL": (errno.EINTR, errno.EAGAIN),
    "DRAIN": (errno.EINTR, errno.EAGAIN),
    "SHUTDOWN": (errno.EINTR, errno.ENOTCONN),
    "IOCTL": (errno.EINTR, errno.EINVAL),
    "SOCKOPT": (errno.EINTR, errno.ENOMEM),
    "CLOSE": (errno.EINTR, errno.EIO),
    "UNMAP": (errno.ENOMEM,),
}

LINE = b"\r\n-- behind this line --\r\n"


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def faults_end() -> Iterator[None]:
    yield
    _epoll.clear_faults()


@pytest.fixture(autouse=True)
def no_internal_error(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Faults may be logged as what they are, but not as faults of ours."""
    caplog.set_level(logging.INFO, "anypoll")
    yield
    texts = [r.getMessage() for r in caplog.get_records("call") if r.name == "anypoll.hub"]
    caplog.clear()  # records hold connections
    caplog.get_records("call").clear()
    assert texts == []


async def mirror(conn: anypoll.Connection) -> None:
    """Answers each line with itself; what the handler leaves unread makes its end a lingering."""
    while (line := await conn.until(LINE, max_bytes=1 << 20)) != b"end" + LINE:
        conn.writer.write(line)


async def exchange(server: anypoll.Server) -> None:
    """Small and large, with a delimiter and without, to the end of both sides."""
    line = pattern(200 * KIB, 1) + LINE
    for unread in (b"", b"unread"):
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
            for data in (LINE, line, line[-5000:]):
                await conn.send(data)
                assert await conn.next(len(data)) == data
            await conn.send(b"end" + LINE + unread)
            with pytest.raises(EndOfStream):
                await conn.receive()
            await conn.send_eof()


async def pass_descriptors() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        with open(os.devnull) as file:
            await first.send_fds(b"message", [file])
        data, fds = await second.receive_fds(100, 2)
        for fd in fds:
            os.close(fd)
        assert b"message".startswith(data)
        first.abort()


#: What a fault may become: these, if they say why.
OUTCOMES = (OSError, BrokenResourceError, ClosedResourceError, EndOfStream, MemoryError)


def explained(exc: BaseException) -> bool:
    """Whether an exception tells what has happened."""
    if isinstance(exc, BrokenResourceError):
        return isinstance(exc.__cause__, OSError)
    return isinstance(exc, (EndOfStream, IncompleteRead, ClosedResourceError)) or bool(str(exc))


async def outcome(step: Callable[[], Awaitable[None]]) -> None:
    """Runs the step, which works or fails as it may, and ends."""
    try:
        with anyio.fail_after(30):
            await step()
    except TimeoutError as exc:
        if exc.errno is None:  # not the socket's
            raise AssertionError("it hangs") from None
    except (*OUTCOMES, IncompleteRead) as exc:
        if not explained(exc):
            pytest.fail(f"{exc!r} does not say what has happened")


def serving() -> anypoll.serve:
    return anypoll.serve(mirror, host="127.0.0.1", port=0, shutdown_timeout=5)


async def all_goes_well(server: anypoll.Server) -> None:
    with anyio.fail_after(30):
        await exchange(server)
        await pass_descriptors()


@pytest.mark.parametrize("call", SITES)
async def test_each_call_fails(call: str) -> None:
    reached = 0
    async with serving() as server:
        for code in SITES[call]:
            for skip, times in ((0, 1), (1, 1), (3, 2), (8, 1)):
                _epoll.set_fault(call, code, skip=skip, times=times)
                await outcome(lambda: exchange(server))
                await outcome(pass_descriptors)
                reached += _epoll.fault_hits(call)
                _epoll.clear_faults()
                await all_goes_well(server)
    anypoll._loop.runtime.nudge()
    if call not in {"SOCKOPT", "UNMAP", "MAP", "ALLOC"}:  # rare, or satisfied from a cache
        assert reached > 0


@pytest.mark.parametrize("call", [call for call, codes in SITES.items() if errno.EINTR in codes])
async def test_storms_of_interruptions(call: str) -> None:
    """L21."""
    async with serving() as server:
        _epoll.set_fault(call, errno.EINTR, times=1000)
        await all_goes_well(server)
        _epoll.clear_faults()


@pytest.mark.parametrize("call", ["READ", "WRITE"])
@pytest.mark.parametrize("limit", [1, 100])
async def test_short_transfers(call: str, limit: int) -> None:
    async with serving() as server:
        for skip in (0, 3):
            _epoll.set_fault(call, limit=limit, skip=skip, times=1000)
            await all_goes_well(server)
            _epoll.clear_faults()


@pytest.mark.parametrize("times", [1, -1], ids=["one", "all that follow"])
@pytest.mark.parametrize("call", ["ALLOC", "MAP"])
async def test_no_memory_at_each_allocation(call: str, times: int) -> None:
    """The first allocation fails, then the second, ..., until all goes well."""
    for skip in range(500):

        async def whole() -> None:
            async with serving() as server:
                await outcome(pass_descriptors)
                if times > 0:  # else it would wait to be accepted until there is memory
                    await outcome(lambda: exchange(server))
                _epoll.clear_faults()
                await all_goes_well(server)

        _epoll.set_fault(call, errno.ENOMEM, skip=skip, times=times)
        await outcome(whole)
        hits = _epoll.fault_hits(call)
        _epoll.clear_faults()
        if not hits:
            break
    else:
        pytest.fail("there is no end to it")


# --- what becomes of a fault ---------------------------------------------------------------------


async def test_reads_that_find_nothing(kind: str) -> None:
    """O17. As when somebody else has read the socket: the next event finds the bytes."""
    async with opened(kind) as (conn, peer):
        _epoll.set_fault("READ", errno.EAGAIN, times=3)
        sent = bytearray()
        while _epoll.fault_hits("READ") < 3:
            sent.append(len(sent) % 256)
            await send_all(peer, sent[-1:])
            await anyio.sleep(0.001)
        await send_all(peer, b"the next event")
        assert await within(conn.next(len(sent) + 14)) == sent + b"the next event"


async def test_writes_that_find_no_room(kind: str) -> None:
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        _epoll.set_fault("WRITE", errno.EAGAIN, times=1)
        data = pattern(300 * KIB)
        group.start_soon(within, conn.send(data))
        await settle()
        await send_all(peer, b"an event, which says that there is room too")
        assert await read_all(peer, len(data)) == data


@pytest.mark.parametrize(
    ("code", "cause"),
    [(errno.ECONNRESET, ConnectionResetError), (errno.ETIMEDOUT, TimeoutError)],
)
async def test_a_failing_read_breaks_the_connection(
    kind: str, code: int, cause: type[OSError]
) -> None:
    """A time-out of the kernel's is not the read timeout."""
    async with opened(kind) as (conn, peer):
        conn.read_timeout = 30
        await send_all(peer, b"before")
        assert await conn.next(6) == b"before"
        _epoll.set_fault("READ", code)
        await send_all(peer, b"lost")
        for _ in range(2):
            with pytest.raises(BrokenResourceError) as caught:
                await within(conn.receive())
            assert isinstance(caught.value.__cause__, cause)
        assert not conn.is_active


@pytest.mark.parametrize("code", [errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT])
async def test_a_failing_write_breaks_the_connection(kind: str, code: int) -> None:
    async with opened(kind) as (conn, peer):
        await send_all(peer, b"before")
        await holds(lambda: len(conn.reader) == 6)
        _epoll.set_fault("WRITE", code)
        with pytest.raises(BrokenResourceError) as caught:
            await within(conn.send(b"x"))
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == code
        assert not conn.is_active
        with pytest.raises(BrokenResourceError):
            await conn.send(b"x")
        assert await conn.receive() == b"before"


async def test_a_poller_that_fails_to_write_tells_who_waits(kind: str) -> None:
    """The first part goes out from the task, the rest fails in the poller."""
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        errors: list[BaseException] = []

        async def send() -> None:
            try:
                await conn.send(bytes(8 * MIB))
            except BrokenResourceError as exc:
                errors.append(exc)

        group.start_soon(send)
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        _epoll.set_fault("WRITE", errno.ECONNRESET)
        while not errors:
            with contextlib.suppress(BlockingIOError):
                peer.recv(256 * KIB)
            await anyio.sleep(0.001)
        assert isinstance(errors[0].__cause__, ConnectionResetError)


async def test_what_cannot_be_opened() -> None:
    """A descriptor that was given is closed; the first connection of a loop makes its hub."""

    async def adopt() -> None:
        first, second = socket_pair("unix")
        with second:
            try:
                await anypoll.Connection.from_socket(first)
            finally:
                assert first.fileno() == -1
                assert second.recv(1) == b""

    async def listen() -> None:
        await anypoll.create_tcp_listener(local_host="127.0.0.1")

    async def pair() -> None:
        anypoll.socketpair()

    for step, call, code, skip in (
        (pair, "EVENTFD", errno.EMFILE, 0),
        (pair, "ALLOC", errno.ENOMEM, 0),
        (pair, "EPOLL_CTL", errno.ENOSPC, 1),
        (adopt, "EPOLL_CTL", errno.ENOSPC, 0),
        (listen, "EPOLL_CTL", errno.ENOSPC, 0),
        (listen, "ALLOC", errno.ENOMEM, 0),
    ):
        _epoll.set_fault(call, code, skip=skip)
        with pytest.raises(OSError, match=r"\w") as caught:
            await within(step())
        assert caught.value.errno == code, (step, call)
    await pass_descriptors()


@pytest.mark.parametrize(
    ("codes", "lines"),
    [
        ([errno.EINTR, errno.ECONNABORTED, errno.EPERM, errno.ECONNRESET], 0),
        ([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], 1),
    ],
    ids=["one connection", "no resources"],
)
async def test_accepting_goes_on(
    codes: list[int], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    """O5. For lack of resources it pauses, and says so once, however many pauses it takes."""
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        address = listener.extra(SocketAttribute.local_address)
        for code in codes:
            _epoll.set_fault("ACCEPT", code, times=2)
            with socket.create_connection(address):
                async with await within(listener.accept()):
                    pass
            said = [(r.name, r.levelno) for r in caplog.records]
            assert said == [("anypoll.server", logging.WARNING)] * lines, code
            caplog.clear()


async def test_an_accept_that_fails_for_good() -> None:
    """The error of one call; the next one tries again."""
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        _epoll.set_fault("ACCEPT", errno.EINVAL)
        with socket.create_connection(listener.extra(SocketAttribute.local_address)):
            with pytest.raises(BrokenResourceError) as caught:
                await within(listener.accept())
            assert isinstance(caught.value.__cause__, OSError)
            async with await within(listener.accept()):
                pass


async def test_no_memory_for_input(kind: str) -> None:
    """What cannot be stored is not lost silently: the connection ends."""
    data, views = pattern(8 * MIB), []
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:

        async def send() -> None:
            with contextlib.suppress(OSError):
                await send_all(peer, data)

        async def receive() -> None:
            while True:  # the views hold what memory the pool still has
                views.append(await conn.reader.next(KIB))

        _epoll.set_fault("ALLOC", 1, times=-1)
        _epoll.set_fault("MAP", 1, times=-1)
        group.start_soon(send)
        with pytest.raises((MemoryError, BrokenResourceError)):
            await within(receive())
        group.cancel_scope.cancel()
        assert data.startswith(b"".join(views))
        _epoll.clear_faults()


async def test_a_listener_of_a_server_that_fails_for_good(caplog: pytest.LogCaptureFixture) -> None:
    """It is closed, so that nobody waits in its backlog."""
    async with serving() as server:
        _epoll.set_fault("ACCEPT", errno.EINVAL)
        with pytest.raises((OSError, BrokenResourceError, EndOfStream)), anyio.fail_after(30):
            await exchange(server)
        with pytest.raises(OSError, match="failed"):
            await anypoll.connect_tcp("127.0.0.1", server.port)
    assert [r.getMessage() for r in caplog.records] == [
        "A listener has failed: [Errno 22] Invalid argument"
    ]


# --- in processes of their own, where the pollers do not run yet ----------------------------------


POOL = """
import os, threading, time
import anypoll
from anypoll import _epoll

def threads_are(number):
    end = time.monotonic() + 60  # one that was joined may be listed a little longer
    while len(os.listdir("/proc/self/task")) != number and time.monotonic() < end:
        time.sleep(0.001)
    return len(os.listdir("/proc/self/task")) == number

async def main():
    anypoll.configure(pollers=3)
    thread = threading.Thread(target=int)  # with the first one a sanitizer starts one of its own
    thread.start()
    thread.join()
    time.sleep(0.1)
    threads = len(os.listdir("/proc/self/task"))
    calls = {"ATFORK": (12, 1), "ALLOC": (12, 9), "EPOLL_CREATE": (24, 3), "EVENTFD": (24, 3),
             "THREAD": (11, 3), "EPOLL_CTL": (28, 3)}
    for call, (code, how_often) in calls.items():
        for skip in range(how_often):
            _epoll.set_fault(call, code, skip=skip)
            try:
                anypoll.socketpair()
            except OSError as exc:
                assert exc.errno == code, (call, skip, exc)
                assert not anypoll.statistics().pollers, (call, skip)
                # no poller still runs, on memory that is not its own
                assert threads_are(threads), (call, skip)
            else:
                raise AssertionError((call, skip))
    _epoll.clear_faults()
    a, b = anypoll.socketpair()
    async with a, b:
        await a.send(b"at last")
        print(await b.receive())

run(main)
"""


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_pool_of_several_that_cannot_be_started(loop: str) -> None:
    """L26. Those that run already end with it."""
    assert python(POOL, loop) == "b'at last'\n"


LIMITS = """
import logging, os, resource, signal
import anypoll

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
HOST = "127.0.0.1"

def opened():
    with os.scandir("/proc/self/fd") as entries:
        return sorted(int(entry.name) for entry in entries)[:-1]

def allow(more):
    # the limit is one on numbers: `more` are free below it
    used, number = set(opened()), 0
    while more or number in used:
        more -= number not in used
        number += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, HARD[1]))

def allow_all():
    resource.setrlimit(resource.RLIMIT_NOFILE, HARD)

class Paused(logging.Handler):
    # a server that says that it has no descriptors left gets some
    def emit(self, record):
        assert "paused" in record.getMessage(), record.getMessage()
        allow_all()

async def echo(conn):
    while True:
        await conn.send(await conn.receive())

async def pass_descriptors():
    a, b = anypoll.socketpair()
    async with a, b:
        with open(os.devnull) as file:
            await a.send_fds(b"two", [file, file])
        data, fds = await b.receive_fds(10, 5)
        assert data == b"two" and len(fds) <= 2, (data, fds)
        for fd in fds:
            os.fstat(fd)
            os.close(fd)
        return len(fds)

async def serve_one():
    async with anypoll.serve(echo, host=HOST, port=0) as server:
        conn = await anypoll.connect_tcp(HOST, server.port)
        async with conn:
            await conn.send(b"hello")
            assert await conn.receive() == b"hello"

async def accept_one():
    async with await anypoll.create_tcp_listener(local_host=HOST) as multi:
        [listener] = multi.listeners
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        client = await anypoll.connect_tcp(HOST, port)
        async with client, await listener.accept() as conn:
            await client.send(b"x")
            assert await conn.receive() == b"x"

async def attempt(step):
    try:
        with anyio.fail_after(30):
            await step()
    except OSError as exc:
        if isinstance(exc, TimeoutError):
            raise
        while exc.errno is None and exc.__cause__ is not None:
            exc = exc.__cause__
        assert exc.errno in (24, 12), repr(exc)
        return False
    return True

async def main(more):
    before = len(opened())
    for step in (pass_descriptors, serve_one, accept_one):
        allow(more)
        await attempt(step)
        allow_all()
    for step in (pass_descriptors, serve_one, accept_one):
        assert await attempt(step)
    assert await pass_descriptors() == 2
    for _ in range(3000):
        if len(opened()) <= before + 4:  # the pool's and the hub's
            return
        await anyio.sleep(0.01)
    raise AssertionError(f"{before} descriptors before, now {opened()}")

def child(more):
    logging.getLogger("anypoll").addHandler(Paused())
    signal.alarm(60)
    run(main, more)

for more in range(13):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(more)
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, more
print("whole")
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("loop", LOOPS)
def test_few_descriptors_at_each_step(loop: str) -> None:
    """L26: RLIMIT_NOFILE leaves 0, 1, 2, ... descriptors for each step; the pool, the hub, sockets,
    listeners, accepted connections and received descriptors all meet the limit.
    """
    assert python(LIMITS, loop) == "whole\n"

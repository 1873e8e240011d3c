"""What went wrong in netpoll, tried on anypoll. The numbers are explained in
docs/internals/netpoll-lessons.md, which also names the tests in other files.

Storms take their choices from a `random.Random` with a seed. They are as long as it takes to find
what they are about, with room to spare; `make soak` is for more.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import inspect
import mmap
import os
import random
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    IncompleteRead,
)
from peers import (
    KIB,
    MIB,
    arrive,
    holds,
    opened,
    pattern,
    read_to_end,
    reset,
    send_all,
    settle,
    socket_pair,
    within,
)
from programs import LOOPS, python
from serving import HOST, all_is_accounted_for, connected, local  # noqa: F401 -- a fixture

import anypoll
from anypoll import Connection, ConnectTimeout, ReadTimeout
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def served_at(
    handler: Callable[[Connection], Awaitable[Any]], kind: str
) -> AsyncIterator[anypoll.Server]:
    with tempfile.TemporaryDirectory(prefix="anypoll") as directory:
        where: Any = {"path": f"{directory}/s"} if kind == "unix" else {"host": HOST, "port": 0}
        async with anypoll.serve(handler, **where) as server:
            yield server


async def connect(address: Any, **options: Any) -> Connection:
    if isinstance(address, str):
        return await anypoll.connect_unix(address, **options)
    conn: Connection = await anypoll.connect_tcp(*address, **options)
    return conn


async def all_at_once(workers: int, work: Callable[[int], Awaitable[Any]]) -> None:
    with anyio.fail_after(240):
        async with anyio.create_task_group() as group:
            for number in range(workers):
                group.start_soon(work, number)


async def echo(conn: Connection) -> None:
    async for data in conn:
        await conn.send(data)


async def ask(conn: Connection, question: bytes) -> None:
    await conn.send(question)
    assert await within(conn.reader.read_bytes(len(question))) == question


# --- peers that send and close -------------------------------------------------------------------


async def test_peers_that_send_and_close_at_once(kind: str) -> None:
    """L10: from one byte to 4 MiB, however the handler reads. All bytes, then the end, once."""
    random_ = random.Random(0)
    ends: list[int] = []

    async def handler(conn: Connection) -> None:
        number, size = int(await conn.reader.read_bytes(4)), int(await conn.reader.read_bytes(8))
        got = bytearray()
        step = [0, 1 + size // 3, size, size + 1][number % 4]
        if number % 3 == 0:
            await anyio.sleep(0)  # the end may be here before the first read
        try:
            while len(got) < size or step == 0:
                got += await (conn.receive() if step == 0 else conn.next(step))
        except EndOfStream:
            pass
        except IncompleteRead:
            got += await conn.reader.read_bytes(len(conn.reader))
        assert got == pattern(size, number)
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await conn.receive()
        ends.append(number)

    async def worker(first: int) -> None:
        for number in range(first, count, 8):
            size = int(2 ** random_.uniform(0, 22.0001))
            with connected(server) as sock:
                await send_all(sock, b"%4d%8d" % (number, size) + pattern(size, number))

    count = 64
    async with served_at(handler, kind) as server:
        await all_at_once(8, worker)
        await holds(lambda: len(ends) == count)
        await holds(lambda: server.statistics().active == 0)
    assert sorted(ends) == list(range(count))
    assert server.statistics().closed == {"done": count}


async def test_an_end_alone_is_told_once_and_then_costs_nothing(kind: str) -> None:
    """L08: no spin: what the pollers do afterwards does not grow with the ended connections."""
    count = 20
    ends = []
    first, second = anypoll.socketpair()

    async def wait(conn: Connection) -> None:
        with pytest.raises(EndOfStream):
            await conn.receive()
        ends.append(conn)

    async with first, second, anyio.create_task_group() as group:
        pairs = [socket_pair(kind) for _ in range(count)]
        conns = [await Connection.from_socket(ours) for ours, _ in pairs]
        for conn in conns:
            group.start_soon(wait, conn)
        await settle()
        before = events()
        for _, peer in pairs:
            peer.shutdown(socket.SHUT_WR)
        await holds(lambda: len(ends) == count)
        assert events() - before <= 2 * count
        before, polls = events(), sum(p.polls for p in anypoll.statistics().pollers)
        for _ in range(50):
            await ask_each_other(first, second)
        assert events() - before <= 4 * 50
        assert sum(p.polls for p in anypoll.statistics().pollers) - polls <= 10 * 50
        for conn, (_, peer) in zip(conns, pairs, strict=True):
            assert conn.statistics().wakeups == 1
            await conn.aclose()
            peer.close()


def events() -> int:
    return sum(p.events for p in anypoll.statistics().pollers)


async def ask_each_other(first: Connection, second: Connection) -> None:
    await first.send(b"x")
    assert await within(second.receive()) == b"x"
    await second.send(b"y")
    assert await within(first.receive()) == b"y"


async def test_a_ping_over_unix_and_an_immediate_close() -> None:
    """L32: the peer goes in the very moment in which the handler has answered."""
    pings, count = 0, 160

    async def handler(conn: Connection) -> None:
        nonlocal pings
        conn.writer.write(await conn.next(4))
        await conn.writer.flush()
        pings += 1

    async def worker(_: int) -> None:
        for number in range(count // 8):
            with connected(server) as sock:
                sock.send(b"ping")
                if number % 4:  # else it does not even wait for the answer
                    await anyio.wait_readable(sock)

    async with served_at(handler, "unix") as server:
        await all_at_once(8, worker)
        await holds(lambda: server.statistics().accepted == count)
        await holds(lambda: not server.connections)
    statistics = server.statistics()
    assert statistics.active == statistics.handler_errors == 0
    assert set(statistics.closed) <= {"done", "broken"}
    assert sum(statistics.closed.values()) == count
    assert pings >= count * 2 // 3


# --- storms --------------------------------------------------------------------------------------


async def end(conn: Connection, random_: random.Random) -> None:
    """One of the ways in which an own end may come, at a random moment."""
    for _ in range(random_.randrange(4)):
        await anyio.sleep(0)
    how = random_.randrange(5)
    try:
        if how == 0:
            conn.abort()
        elif how == 1:
            await conn.send_eof()
        elif how == 2:
            conn.writer.write(b"last words")
        elif how == 3:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await conn.aclose()
    except (BrokenResourceError, ClosedResourceError):
        pass
    await conn.aclose()


async def test_both_ends_close_at_once(kind: str) -> None:
    """L13, L17, L23, L30: again and again, and each new connection, most of them with a number
    that has just become free, works; nobody is told of it in a log.
    """
    random_ = random.Random(0)

    async def handler(conn: Connection) -> None:
        question = await conn.reader.read_bytes(8)
        await conn.send(question)
        if random_.random() < 0.5:
            async with anyio.create_task_group() as group:
                group.start_soon(end, conn, random_)
                await ended(conn)
        else:
            await end(conn, random_)

    async def ended(conn: Connection) -> None:
        with suppress(EndOfStream, BrokenResourceError, ClosedResourceError):
            while True:
                await conn.receive()

    async def worker(number: int) -> None:
        for round_ in range(rounds):
            conn = await connect(server.addresses[0])
            async with anyio.create_task_group() as group:
                await ask(conn, b"%4d%4d" % (number, round_))
                if random_.random() < 0.5:
                    group.start_soon(ended, conn)
                await end(conn, random_)
            assert conn.fileno() == -1

    rounds, workers = 30, 8
    async with served_at(handler, kind) as server:
        await all_at_once(workers, worker)
        await holds(lambda: not server.connections)
    statistics = server.statistics()
    assert statistics.accepted == rounds * workers
    assert statistics.handler_errors == statistics.active == 0


async def test_no_byte_of_another_connection(kind: str) -> None:
    """L14: clients of two servers, each with its own pattern, many of which go in the middle of
    it; views are kept beyond the end of their connection, and looked at in the end.
    """
    random_, size = random.Random(0), 60 * KIB
    stream = functools.lru_cache(maxsize=None)(functools.partial(pattern, size))
    kept: list[tuple[int, int, memoryview]] = []

    async def handler(conn: Connection) -> None:
        number, place = int(await conn.reader.read_bytes(4)), 0
        answer = conn.writer.malloc(100)
        answer[:] = stream(number)[:-101:-1]
        while True:
            n = random_.randint(1, 3000)
            try:
                view = await conn.next(n)
            except IncompleteRead:
                view = await conn.next(len(conn.reader))
            assert view == stream(number)[place : place + len(view)]
            if random_.random() < 0.05:
                kept.append((number, place, view))
            place += len(view)
            if random_.random() < 0.01:
                return

    async def worker(first: int) -> None:
        for number in range(first, 160, 20):
            data = b"%4d" % number + stream(number)
            part = random_.choice([len(data), random_.randrange(5, len(data))])
            with (
                connected((one, other)[number % 2]) as sock,
                suppress(BrokenPipeError, ConnectionResetError),
            ):
                await send_all(sock, data[:part])
                if random_.random() < 0.5:
                    sock.shutdown(socket.SHUT_WR)
                    got = await read_to_end(sock)
                    assert got == stream(number)[:-101:-1][: len(got)]

    async with served_at(handler, kind) as one, served_at(handler, kind) as other:
        await all_at_once(20, worker)
        await holds(lambda: not one.connections + other.connections)
    assert one.statistics().handler_errors == other.statistics().handler_errors == 0
    assert len(kept) > 20
    for number, place, view in kept:
        assert view == stream(number)[place : place + len(view)]
    kept.clear()


async def test_reading_and_releasing_beside_a_steady_writer(kind: str) -> None:
    """L03: the reader lets go after each message while the poller appends behind it. Messages are
    of every size, from 4 MiB down to a byte, and then of any.
    """
    random_ = random.Random(3)
    sizes = [2**power for power in range(22, -1, -1)]
    sizes += random_.choices([1, 30, 900, 5000], k=500)
    data = pattern(sizes[0])

    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        stream = b"".join(size.to_bytes(4, "big") + data[:size] for size in sizes)
        group.start_soon(send_all, peer, stream)
        for expected in sizes:
            size = int.from_bytes(await within(conn.next(4)), "big")
            assert size == expected
            assert await within(conn.next(size)) == memoryview(data)[:size]
            conn.reader.release()


# --- connecting ----------------------------------------------------------------------------------


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, int]]:
    """An address at which a connection is neither made nor refused: its backlog is full."""
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket())
        sock.bind((HOST, 0))
        sock.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())
        yield sock.getsockname()


async def test_connects_that_are_given_up_at_any_moment() -> None:
    """L18: with timeouts of up to a millisecond, or cancelled; to an address that answers, one that
    refuses and one that is silent. There is a connection, or the right error, or nothing.
    """
    random_ = random.Random(0)
    workers, rounds = 12, 25
    outcomes: list[str] = []

    async def attempt(address: Any, scope: anyio.CancelScope) -> str:
        timeout = random_.choice([None, 0, random_.uniform(0, 0.001)])
        with scope:
            try:
                conn = await connect(address, timeout=timeout)
            except ConnectTimeout:
                return "timeout"
            except OSError as exc:
                if address == refusing and isinstance(exc.__cause__, ConnectionRefusedError):
                    return "refused"
                raise
            async with conn:
                assert address not in {refusing, dead}
                await ask(conn, b"hello")
            return "connected"
        return "cancelled"

    async def worker(number: int) -> None:
        address = [*live.addresses, *unix.addresses, refusing, dead][number % 4]

        async def run(scope: anyio.CancelScope) -> None:
            outcomes.append(await attempt(address, scope))

        for _ in range(rounds):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(run, scope)
                for _ in range(random_.randrange(12)):
                    await anyio.sleep(0)
                if address == dead or random_.random() < 0.6:
                    scope.cancel()

    with socket.socket() as sock:
        sock.bind((HOST, 0))
        refusing = sock.getsockname()
        async with (
            served_at(echo, "tcp") as live,
            served_at(echo, "unix") as unix,
            silent() as dead,
        ):
            await all_at_once(workers, worker)
            await holds(lambda: not live.connections)
    assert len(outcomes) == workers * rounds
    assert set(outcomes) == {"connected", "refused", "timeout", "cancelled"}


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_peer_that_closes_what_it_accepts(how: str) -> None:
    """O2: the connect succeeds; the end, or the reset, is what the first read tells."""
    with socket.create_server((HOST, 0)) as listening:
        for _ in range(5):
            conn = await anypoll.connect_tcp(*listening.getsockname())
            peer, _ = listening.accept()
            if how == "reset":
                reset(peer)
            else:
                peer.close()
            expected: Any = BrokenResourceError if how == "reset" else EndOfStream
            async with conn:
                with pytest.raises(expected):
                    await within(conn.receive())


async def test_a_name_with_an_ipv6_address_alone(names: dict[str, Any]) -> None:
    """L43."""
    names["six.example"] = [("::1", 0)]
    async with (
        anypoll.serve(echo, host="::1", port=0) as server,
        await anypoll.connect_tcp("six.example", server.port) as conn,
    ):
        assert conn.remote_address == ("::1", server.port)
        await ask(conn, b"hello")


# --- descriptors ---------------------------------------------------------------------------------


def watched() -> set[int]:
    """The descriptors in all epoll sets of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                text = Path(f"/proc/self/fdinfo/{name}").read_text()
                found |= {int(n) for n in re.findall(r"tfd:\s*(\d+)", text)}
        except FileNotFoundError:  # that of the listing
            continue
    return found


@pytest.mark.parametrize("how", ["aclose", "abort", "detach", "forgotten", "after the peer"])
async def test_the_epoll_set_follows_the_connections(how: str) -> None:
    """L17: also while somebody else has the same socket open, so that the kernel alone would not
    forget it; and when garbage collection ends the connection and its socket object in any order.
    """
    pairs = [socket_pair("unix") for _ in range(20)]
    copies = [ours.dup() for ours, _ in pairs]
    conns = [await Connection.from_socket(ours.detach()) for ours, _ in pairs]
    fds = {conn.fileno() for conn in conns}
    assert fds <= watched()
    if how == "forgotten":
        with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- they go together
            conns.clear()
            gc.collect()
    for conn, (_, peer) in zip(conns, pairs, strict=False):
        if how == "abort":
            conn.abort()
        elif how == "detach":
            conn.detach()[0].close()
        else:
            if how == "after the peer":
                peer.shutdown(socket.SHUT_WR)
                with pytest.raises(EndOfStream):
                    await within(conn.receive())
            await conn.aclose()
    assert not fds & watched()
    for sock in (*copies, *(peer for _, peer in pairs)):
        sock.close()


async def test_a_reused_descriptor_gets_its_own_events_only(kind: str) -> None:
    """L17, L23: what happens at the socket of a closed connection, which somebody else still has
    open, is not taken for news of the connection that has the number now.
    """
    for _ in range(10):
        ours, peer = socket_pair(kind)
        other, other_peer = socket_pair(kind)
        with peer, other_peer, ours.dup() as copy:
            conn = await Connection.from_socket(ours.detach())
            number = conn.fileno()
            await conn.aclose()
            os.dup2(other.fileno(), number, inheritable=False)
            other.close()
            async with await Connection.from_socket(number) as second:
                assert second.fileno() == number
                peer.send(b"for the first")
                peer.shutdown(socket.SHUT_WR)
                async with anyio.create_task_group() as group:
                    group.start_soon(within, second.reader.peek(1))
                    await anyio.sleep(0)
                    other_peer.send(b"x")
                assert await second.receive() == b"x"
                assert second.statistics().bytes_received == 1
                assert not second.at_eof
            assert copy.recv(100) == b"for the first"


@contextmanager
def taken(number: int) -> Iterator[None]:
    """Something of others has the number, which was free, and keeps it."""
    copy = os.dup(0)
    if copy != number:
        os.dup2(copy, number, inheritable=False)
        os.close(copy)
    try:
        yield
        gc.collect()
        os.fstat(number)
    finally:
        os.close(number)


async def test_closing_again_spares_who_has_the_number_now(kind: str) -> None:
    """O4, O8: every verb that ends a connection or a listener, again, after its end."""
    ours, peer = socket_pair(kind)
    with peer:
        conn = await Connection.from_socket(ours.detach())
        number = conn.fileno()
        conn.writer.write(b"x")
        await conn.aclose()
        with taken(number):
            conn.abort()
            await conn.aclose()
            conn.reader.release()
            with pytest.raises(ClosedResourceError):
                conn.detach()
            for call in (conn.send_eof, conn.wait_writable, conn.writer.flush):
                with pytest.raises(ClosedResourceError):
                    await call()
            assert (conn.statistics().buffered_output, conn.fileno(), conn.is_active) == (0, -1, 0)
            del conn
    async with opened(kind):  # the loop's hub stays
        multi = await anypoll.create_tcp_listener(local_host=HOST)
        raw = multi.listeners[0].extra(anyio.abc.SocketAttribute.raw_socket)
        number = raw.fileno()
        await multi.aclose()
        with taken(number):
            await multi.aclose()
            await multi.listeners[0].aclose()
            raw.close()
            del multi, raw


async def test_every_descriptor_is_closed_on_exec(kind: str) -> None:
    """O20: of pollers, hubs, listeners, accepted and connected sockets."""
    inherited = {int(name) for name in os.listdir("/proc/self/fd")}
    first, second = anypoll.socketpair()
    async with first, second, served_at(echo, kind) as server:
        conn = await connect(server.addresses[0])
        await ask(conn, b"hello")
        flags = {}
        for fd in {int(name) for name in os.listdir("/proc/self/fd")} - inherited:
            with suppress(FileNotFoundError):  # that of the listing itself
                target = os.readlink(f"/proc/self/fd/{fd}")
                flags[fd, target] = fcntl.fcntl(fd, fcntl.F_GETFD)
        await conn.aclose()
        assert len(flags) >= 5
        assert [which for which, flag in flags.items() if not flag & fcntl.FD_CLOEXEC] == []


FIRST_THREE = """
import os
import anypoll

async def echo(conn):
    async for data in conn:
        await conn.send(data)

async def main():
    async with anypoll.serve(echo, host="127.0.0.1", port=0) as server:
        said = os.dup(1)
        for fd in (0, 1, 2):
            os.close(fd)
        async with await anypoll.connect_tcp("127.0.0.1", server.port) as conn:
            a, b = anypoll.socketpair()
            async with a, b:
                numbers = sorted([conn.fileno(), a.fileno(), b.fileno()])
                for text in (b"one", b"two"):
                    await conn.send(text)
                    assert await conn.reader.read_bytes(3) == text
                    await a.send(text)
                    assert await b.receive() == text
        with anyio.fail_after(30):
            while server.connections:
                await anyio.sleep(0.001)
        free = [fd for fd in (0, 1, 2) if not os.path.exists(f"/proc/self/fd/{fd}")]
        for fd in (0, 1, 2):
            os.dup2(said, fd)
    os.write(said, b"%r %r" % (numbers, free))

run(main)
"""


@pytest.mark.parametrize("loop", LOOPS)
def test_the_first_three_descriptors(loop: str) -> None:
    """L24: 0, 1 and 2 may be sockets like others, and are closed like others."""
    numbers, free = python(FIRST_THREE, loop).split("] ")
    assert "0" in numbers
    assert free == "[0, 1, 2]"


# --- memory and sizes ----------------------------------------------------------------------------


def in_use() -> int:
    _runtime.nudge()
    return sum(p.bytes_in_use for p in anypoll.statistics().pollers)


@pytest.mark.parametrize("how", ["aclose", "abort", "after the peer"])
async def test_a_close_with_reads_across_blocks_outstanding(how: str) -> None:
    """L11: merged and scattered views are held, and bytes are unread: nothing stays of them."""
    before, data = in_use(), pattern(300 * KIB)
    for _ in range(5):
        async with opened() as (conn, peer):
            for place in range(0, 40_000, 8000):
                await arrive(conn, peer, data[place : place + 8000])
            whole = await conn.reader.peek(35_000)
            parts = await conn.reader.next_parts(30_000)
            merged = await conn.reader.next(9000)
            await arrive(conn, peer, data[:5000])
            if how == "abort":
                conn.abort()
            elif how == "after the peer":
                peer.close()
        assert whole == data[:35_000]
        assert b"".join(parts) == data[:30_000]
        assert merged == data[30_000:39_000]
        del whole, parts, merged
    gc.collect()
    await holds(lambda: in_use() <= before)


async def test_a_large_request_that_comes_in_small_segments() -> None:
    """The memory of a request of 1 MiB does not depend on its segments."""
    before, most, data = in_use(), 0, pattern(MIB)
    async with opened() as (conn, peer), anyio.create_task_group() as group:
        got: list[memoryview] = []

        async def ask() -> None:
            got.append(await conn.next(MIB))

        group.start_soon(ask)
        await settle()
        for place in range(0, MIB, KIB):
            await arrive(conn, peer, data[place : place + KIB])
            if place % (32 * KIB) == 0:
                most = max(most, in_use() - before)
        await holds(lambda: got)
        assert got.pop() == data
        assert most <= 4 * MIB


async def test_thousands_of_lines_and_a_rest(kind: str) -> None:
    """The rest without a delimiter stays readable behind the end."""
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        lines = [pattern(500, n % 50).replace(b"\n", b".") + b"\n" for n in range(50)]

        async def send() -> None:
            for _ in range(20):
                await send_all(peer, b"".join(lines))
            await send_all(peer, bytes(100))
            peer.shutdown(socket.SHUT_WR)

        group.start_soon(send)
        for number in range(1000):
            assert await within(conn.until(b"\n")) == lines[number % 50]
        with pytest.raises(IncompleteRead):
            await within(conn.until(b"\n"))
        assert await conn.next(100) == bytes(100)
        with pytest.raises(EndOfStream):
            await conn.until(b"\n")


@pytest.mark.slow
@pytest.mark.loops("asyncio")
async def test_more_than_two_gib_in_one_send() -> None:
    """L20: no length is cut to 31 or 32 bits on its way."""
    size = 2**31 + 100
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as zeros:
        first, second = anypoll.socketpair()
        async with first, second:
            room, got = bytearray(4 * MIB), 0
            with memoryview(zeros) as view, anyio.fail_after(240):
                async with anyio.create_task_group() as group:
                    group.start_soon(first.send, view)
                    while got < size:
                        got += await second.reader.readinto(room)
            assert got == size
            assert first.statistics().bytes_sent == second.statistics().bytes_received == size


async def test_the_first_read_takes_what_is_there() -> None:
    """L45: in one system call, 60 KB as well as 60 bytes."""
    for size in (60, 8192, 60_000):
        ours, peer = socket_pair("unix")
        with peer:
            peer.sendall(pattern(size))
            async with await Connection.from_socket(ours) as conn:
                assert await within(conn.next(size)) == pattern(size)
                assert conn.statistics().reads == 1


# --- the rest ------------------------------------------------------------------------------------


async def test_a_server_that_nobody_refers_to() -> None:
    """L01: it lives in its task. Collections close neither its listener nor its connections, nor
    the listener that a task accepts from.
    """

    async def serve(*, task_status: anyio.abc.TaskStatus[int]) -> None:
        async with local(echo) as server:
            task_status.started(server.port)
            del server
            await anyio.sleep_forever()

    async def echo_and_close(conn: Connection) -> None:
        async with conn:
            await echo(conn)

    async def accepting(listener: Any) -> None:
        async with listener:
            await listener.serve(echo_and_close)

    async with anyio.create_task_group() as group:
        port = await group.start(serve)
        other = await anypoll.create_tcp_listener(local_host=HOST)
        other_port = other.extra(anyio.abc.SocketAttribute.local_port)
        group.start_soon(accepting, other)
        await settle()
        del other
        for _ in range(3):
            gc.collect()
            conns = [await anypoll.connect_tcp(HOST, p) for p in (port, other_port, port)]
            for _ in range(3):
                gc.collect()
                for conn in conns:
                    await ask(conn, b"hello")
            for conn in conns:
                await conn.aclose()
        group.cancel_scope.cancel()


async def test_the_server_speaks_first(kind: str) -> None:
    async def greet(conn: Connection) -> None:
        await conn.send(b"hello")
        assert await conn.reader.read_bytes(3) == b"you"

    async with served_at(greet, kind) as server:
        async with await connect(server.addresses[0]) as conn:
            assert await within(conn.reader.read_bytes(5)) == b"hello"
            await conn.send(b"you")
        await holds(lambda: server.statistics().closed == {"done": 1})


WRITES: list[Callable[[Any], Any]] = [
    lambda conn: conn.writer.write(b"x"),
    lambda conn: conn.writer.write(bytes(10_000)),
    lambda conn: conn.writer.write_str("x"),
    lambda conn: conn.writer.write_byte(1),
    lambda conn: conn.writer.malloc(1),
    lambda conn: conn.writer.malloc_ack(0),
    lambda conn: conn.writer.flush(),
    lambda conn: conn.send(b"x"),
    lambda conn: conn.send(b""),
    lambda conn: conn.send_eof(),
    lambda conn: conn.wait_writable(),
]


async def refused(conn: Connection, error: type[Exception]) -> None:
    """All of them, and again."""

    async def call(write: Callable[[Any], Any]) -> None:
        result = write(conn)
        if inspect.isawaitable(result):
            await within(result)

    for write in WRITES * 2:
        with pytest.raises(error):
            await call(write)


async def test_writing_while_the_connection_closes() -> None:
    """L04: `aclose()` is draining, and nothing may be added to that."""
    async with opened() as (conn, _), anyio.create_task_group() as group:
        conn.writer.write(bytes(8 * MIB))
        group.start_soon(conn.aclose)
        await settle()
        assert conn.fileno() == -1 or conn._core.closed
        await refused(conn, ClosedResourceError)
        group.cancel_scope.cancel()
    await refused(conn, ClosedResourceError)


async def test_writing_to_a_peer_that_has_closed(kind: str) -> None:
    """L04: sooner or later it is told, and then every time; and no call is a crash."""
    async with opened(kind) as (conn, peer):
        peer.close()
        with pytest.raises((EndOfStream, BrokenResourceError)):
            await within(conn.receive())
        with suppress(BrokenResourceError):
            while True:  # TCP learns of it with the answer to the first bytes
                await within(conn.send(b"x"))
        await refused(conn, BrokenResourceError)


async def test_a_timeout_on_a_socket_without_a_name() -> None:
    """O9: neither end of a socketpair has an address."""
    async with opened() as (conn, _):
        conn.read_timeout = 0.001
        with pytest.raises(ReadTimeout):
            await within(conn.receive())
        assert conn.remote_address == conn.local_address == ""


@pytest.mark.unsanitized
def test_waiting_takes_no_processor_time() -> None:
    """O15: no thread spins, whatever is waited for: all of them sleep in the kernel. A thread that
    spins would do it for ever; the program ends with the first half second of rest.
    """
    out = python(
        """
        import anyio, anypoll, os

        def count():
            return sum(p.polls for p in anypoll.statistics().pollers)

        async def main():
            anypoll.configure(pollers=3)
            async with anypoll.serve(lambda conn: conn.next(1), host="127.0.0.1", port=0) as server:
                pairs = [anypoll.socketpair() for _ in range(20)]
                async with anyio.create_task_group() as group:
                    conn = await anypoll.connect_tcp("127.0.0.1", server.port)
                    group.start_soon(conn.receive)
                    for one, other in pairs:
                        group.start_soon(one.receive)
                        group.start_soon(other.send, bytes(8 << 20))
                        group.start_soon(other.receive)
                    rests = False
                    while not rests:  # at first there are things to do
                        polls, seconds = count(), sum(os.times()[:2])
                        await anyio.sleep(0.5)
                        rests = count() - polls < 100 and sum(os.times()[:2]) - seconds < 0.3
                    group.cancel_scope.cancel()
                for pair in pairs:
                    for one in pair:
                        one.abort()
                conn.abort()
            print("rests")

        anyio.run(main)
        """
    )
    assert out == "rests\n"


# --- the document --------------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "internals" / "netpoll-lessons.md"
NAME = r"`([\w/]+\.(?:py|c))::(\w+)`"


@functools.cache
def texts_of(name: str) -> dict[str, str]:
    """The functions and classes of a file, in C with the comments in front of them."""
    text = (ROOT / "tests" / name).read_text()
    head = r"\w*TEST\((\w+)[,)]" if name.endswith(".c") else r"(?:async def|def|class) (\w+)[(:]"
    starts = list(re.finditer(rf"^{head}", text, re.MULTILINE))
    before = [0, *(text.find("\n}\n", m.start()) for m in starts[:-1])]
    if name.endswith(".py"):  # there the comment is within the function
        before = [m.start() for m in starts]
    stops = [*before[1:], len(text)]
    return {m[1]: text[i:j] for m, i, j in zip(starts, before, stops, strict=True)}


def test_every_lesson_is_accounted_for() -> None:
    """Each has a row, in order; and a row names a test, or says what there is instead."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if re.match(r"\| [LO]\d+ \|", line)
    ]
    assert [row[0] for row in rows] == [
        *(f"L{n:02}" for n in range(1, 49)),
        *(f"O{n}" for n in range(1, 29)),
    ]
    for number, wrong, prevented, proof in rows:
        assert wrong, number
        assert prevented or proof.startswith("open: "), number
        assert re.search(NAME, proof) or proof.startswith(("by construction", "open: ")), number


def test_the_tests_that_the_document_names_exist() -> None:
    named = re.findall(NAME, DOCUMENT.read_text())
    assert len(named) > 150
    assert [f"{name}::{test}" for name, test in named if test not in texts_of(name)] == []


def test_a_lesson_is_named_at_its_test() -> None:
    """Whoever changes a test that is in the table of lessons sees that it proves one."""
    for line in DOCUMENT.read_text().splitlines():
        if match := re.match(r"\| ([LO]\d+) \|.*\|([^|]*)\|$", line):
            for name, test in re.findall(NAME, match[2]):
                text = texts_of(name)[test]
                assert re.search(rf"\b{match[1]}\b", text), f"{test} does not name {match[1]}"

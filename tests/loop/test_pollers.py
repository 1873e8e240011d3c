"""configure(), statistics() and the pool at run time: who gets the next connection, how pollers
end, and how they fail.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
import leaks
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from peers import (
    KIB,
    MIB,
    arrive,
    at_once,
    holds,
    opened,
    pattern,
    reset,
    suspends,
    within,
)

import anypoll
from anypoll import AnypollAttribute, _epoll
from anypoll._loop import pollers as _pollers, runtime as _runtime

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _one_poller() -> Iterator[None]:
    """Each test begins and ends with one poller."""
    _runtime.pick_poller()
    _await_pollers(1)
    yield
    _epoll.clear_faults()
    anypoll.configure(pollers=1, load_balance="round_robin", block_size=2048, checkpoint_budget=64)


def _await_pollers(number: int) -> None:
    """What others have left behind ends by itself, once it is collected."""
    while len(anypoll.statistics().pollers) > number:
        gc.collect()


def counts() -> list[int]:
    """The connections and listeners of each poller."""
    return [p.connections for p in anypoll.statistics().pollers]


threads = leaks.native_threads
Pair = tuple[anypoll.Connection, anypoll.Connection]


async def works(pairs: Sequence[Pair]) -> None:
    for one, other in pairs:
        await one.send(b"ping")
        assert await within(other.next(4)) == b"ping"


async def close(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        for conn in pair:
            await conn.aclose()


# --- growing and shrinking -----------------------------------------------------------------------


async def test_pollers_end_with_their_last_connection() -> None:
    """O18. And so do their threads; no connection is orphaned."""
    before = threads()
    anypoll.configure(pollers=3)
    pairs = [anypoll.socketpair() for _ in range(3)]
    assert counts() == [2, 2, 2]
    assert len(threads() - before) == 2
    anypoll.configure(pollers=1)
    more = [anypoll.socketpair() for _ in range(2)]
    assert counts() == [6, 2, 2]
    await works(pairs + more)
    await close(pairs)
    await holds(lambda: counts() == [4])
    await holds(lambda: threads() <= before)
    await works(more)
    await close(more)


async def test_threads_end_although_nobody_asks() -> None:
    """The last close is enough; no call of configure() or statistics()."""
    before = threads()
    anypoll.configure(pollers=2, load_balance=lambda _: 1)
    pair = anypoll.socketpair()
    anypoll.configure(pollers=1)
    await works([pair])
    assert len(threads() - before) == 1
    await close([pair])
    await holds(lambda: threads() <= before)


async def test_growing_again_keeps_those_that_drain() -> None:
    """And starts others for those that had ended at once, without connections."""
    before = threads()
    anypoll.configure(pollers=3)
    pairs = [anypoll.socketpair() for _ in range(3)]
    mine = threads() - before
    anypoll.configure(pollers=8)
    assert counts() == [2, 2, 2, 0, 0, 0, 0, 0]
    anypoll.configure(pollers=1)
    await holds(lambda: counts() == [2, 2, 2])
    await holds(lambda: threads() - before == mine)
    anypoll.configure(pollers=4)
    assert mine < threads() - before
    assert len(threads() - before) == 3
    pairs += [anypoll.socketpair() for _ in range(4)]
    assert sum(counts()) == 14
    assert min(counts()) >= 1
    await works(pairs)
    await close(pairs)
    assert counts() == [0, 0, 0, 0]  # they stay


async def test_a_hundred_pollers_and_back() -> None:
    """While many threads pick."""
    before = threads()
    picked: list[Any] = []

    def pick_often() -> None:
        picked.extend(_runtime.pick_poller() for _ in range(100))

    pickers = [threading.Thread(target=pick_often) for _ in range(32)]
    for each in pickers:
        each.start()
    anypoll.configure(pollers=100)
    for each in pickers:
        each.join()
    pairs = [anypoll.socketpair() for _ in range(50)]
    assert counts() == [1] * 100
    await works(pairs)
    await close(pairs)
    assert len(picked) == 3200
    anypoll.configure(pollers=1)
    await holds(lambda: counts() == [0])
    await holds(lambda: threads() <= before)


async def test_shrinking_and_growing_over_and_over() -> None:
    """No connection is orphaned, whatever is open meanwhile."""
    pairs: list[Pair] = []
    for number in [3, 1, 2, 1, 4, 2, 1, 3, 1]:
        anypoll.configure(pollers=number)
        pairs.append(anypoll.socketpair())
        await works(pairs)
        if len(pairs) > 3:
            await close([pairs.pop(0)])
    await close(pairs)
    anypoll.configure(pollers=1)
    await holds(lambda: counts() == [0])


async def test_a_listener_keeps_its_poller() -> None:
    """What it accepts goes to those that get connections."""
    before = threads()
    anypoll.configure(pollers=2, load_balance=lambda _: 1)
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    anypoll.configure(pollers=1, load_balance="round_robin")
    assert counts() == [0, 1]
    port = multi.extra(SocketAttribute.local_port)
    for _ in range(3):
        client = await anypoll.connect_tcp("127.0.0.1", port)
        server = await within(multi.listeners[0].accept())
        assert isinstance(server, anypoll.Connection)
        assert server.extra(AnypollAttribute.poller) == 0
        await client.send(b"x")
        assert await within(server.next(1)) == b"x"
        assert counts() == [2, 1]
        await client.aclose()
        await server.aclose()
    assert len(threads() - before) == 1
    await multi.aclose()
    await holds(lambda: counts() == [0])
    await holds(lambda: threads() <= before)


async def test_the_index_of_a_poller() -> None:
    """Those that get connections keep theirs; one that has ended has none."""
    anypoll.configure(pollers=3)
    pairs = [anypoll.socketpair() for _ in range(3)]
    conns = [conn for pair in pairs for conn in pair]
    indexes = [conn.extra(AnypollAttribute.poller) for conn in conns]
    assert sorted(indexes) == [0, 0, 1, 1, 2, 2]
    last = conns[indexes.index(2)]._core.poller
    anypoll.configure(pollers=1)
    assert [conn.extra(AnypollAttribute.poller) for conn in conns] == indexes
    await close(pairs)
    await holds(lambda: counts() == [0])
    assert _runtime.poller_index(last) == -1


async def test_a_loop_that_ends_lets_pollers_end() -> None:
    """Connections that nobody has closed are closed with it."""

    left: list[Any] = []
    before = threads()
    anypoll.configure(pollers=2, load_balance=lambda _: 1)

    async def leaves() -> None:
        left.extend(anypoll.socketpair())

    def run() -> None:
        anyio.run(leaves)

    await anyio.to_thread.run_sync(run)
    anypoll.configure(pollers=1)
    await holds(lambda: threads() <= before)
    assert counts() == [0]
    assert not any(conn.is_active for conn in left)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("THREAD", errno.EAGAIN),
        ("EPOLL_CREATE", errno.EMFILE),
        ("EVENTFD", errno.EMFILE),
    ],
)
async def test_pollers_that_cannot_be_added_change_nothing(call: str, error: int) -> None:
    """L26."""
    anypoll.configure(pollers=2)
    before = threads()
    _epoll.set_fault(call, error, skip=2)
    with pytest.raises(OSError, match=r"unavailable|Too many") as caught:
        anypoll.configure(pollers=6)
    assert caught.value.errno == error
    assert _runtime.settings().pollers == 2
    await holds(lambda: counts() == [0, 0])
    await holds(lambda: threads() <= before)
    pairs = [anypoll.socketpair() for _ in range(2)]
    assert counts() == [2, 2]
    await close(pairs)


# --- who gets the next one -----------------------------------------------------------------------


async def test_listeners_and_dialers_are_spread() -> None:
    """O19. Round robin over all that is opened."""
    anypoll.configure(pollers=4)
    multis = [await anypoll.create_tcp_listener(local_host="127.0.0.1") for _ in range(4)]
    assert counts() == [1, 1, 1, 1]
    conns: list[anypoll.Connection] = [
        await anypoll.connect_tcp("127.0.0.1", multi.extra(SocketAttribute.local_port))
        for multi in multis
    ]
    assert counts() == [2, 2, 2, 2]
    for multi in multis:
        accepted = await within(multi.listeners[0].accept())
        assert isinstance(accepted, anypoll.Connection)
        conns.append(accepted)
    assert counts() == [3, 3, 3, 3]
    for conn in conns:
        await conn.aclose()
    for multi in multis:
        await multi.aclose()
    assert counts() == [0, 0, 0, 0]


async def test_least_connections() -> None:
    pairs = [anypoll.socketpair() for _ in range(3)]  # all on the first
    anypoll.configure(pollers=2, load_balance="least_connections")
    pairs += [anypoll.socketpair() for _ in range(2)]
    assert counts() == [6, 4]
    pairs += [anypoll.socketpair() for _ in range(3)]
    assert counts() == [8, 8]
    await close(pairs)


async def test_least_connections_of_a_burst() -> None:
    """A server's batch is opened before any of it is watched, and yet counted."""
    anypoll.configure(pollers=4, load_balance="least_connections")
    seen: list[int] = []
    done = anyio.Event()

    async def handler(conn: anypoll.Connection) -> None:
        seen.append(conn.extra(AnypollAttribute.poller))
        await done.wait()

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(39)]
        await holds(lambda: len(seen) == 39)
        assert counts() == [10, 10, 10, 10]  # the listener is one too
        done.set()
        for client in clients:
            client.close()


async def test_random_choice() -> None:
    anypoll.configure(pollers=2, load_balance="random")
    pairs = [anypoll.socketpair() for _ in range(50)]
    assert all(counts())  # but once in 2**99
    assert sum(counts()) == 100
    await close(pairs)


async def test_own_choice() -> None:
    seen: list[Sequence[anypoll.PollerStatistics]] = []

    def second(pollers: Sequence[anypoll.PollerStatistics]) -> int:
        seen.append(pollers)
        return 1

    anypoll.configure(pollers=2, load_balance=second)
    pairs = [anypoll.socketpair() for _ in range(3)]
    assert counts() == [0, 6]
    assert [[p.connections for p in pollers] for pollers in seen] == [[0, n] for n in range(6)]
    await close(pairs)


async def test_own_choice_may_use_anypoll() -> None:
    """It is called without a lock, and may even change its own pool."""
    asked: list[int] = []

    def choice(pollers: Sequence[anypoll.PollerStatistics]) -> int:
        asked.append(len(pollers))
        assert len(anypoll.statistics().pollers) >= len(pollers)
        anypoll.configure(checkpoint_budget=64)
        other = threading.Thread(target=anypoll.statistics)  # whoever holds a lock stops this one
        other.start()
        other.join(30)
        assert not other.is_alive()
        return len(pollers) - 1

    anypoll.configure(pollers=3, load_balance=choice)
    pair = anypoll.socketpair()
    assert asked == [3, 3]
    assert counts() == [0, 0, 2]
    await works([pair])
    await close([pair])


async def test_own_choice_that_shrinks_the_pool() -> None:
    """What it has chosen gets no connection any more."""

    def choice(pollers: Sequence[anypoll.PollerStatistics]) -> int:
        anypoll.configure(pollers=2)
        return 3

    anypoll.configure(pollers=4, load_balance=choice)
    async with opened():
        assert sorted(counts()[:2]) == [0, 1]


def fails(_: Sequence[anypoll.PollerStatistics]) -> int:
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda _: 2, "returned 2"),
        (lambda _: -1, "returned -1"),
        (lambda _: 10**5000, "returned an integer of"),
        (lambda _: None, "load_balance failed"),
        (lambda _: "1", "load_balance failed"),
        (lambda _: 0.5, "load_balance failed"),
        (lambda: 0, "load_balance failed"),
        (fails, "load_balance failed"),
    ],
    ids=["2", "-1", "huge", "None", "str", "float", "signature", "fails"],
)
async def test_each_wrong_choice_is_logged_once(
    wrong: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And round robin chooses, for that one."""
    anypoll.configure(pollers=2, load_balance=wrong)
    pairs = [anypoll.socketpair() for _ in range(2)]
    assert counts() == [2, 2]
    assert [(r.name, r.levelname) for r in caplog.records] == [("anypoll.pollers", "ERROR")] * 4
    assert all(said in r.getMessage() for r in caplog.records)
    caplog.clear()  # records hold frames, and those hold connections
    await close(pairs)


@pytest.mark.parametrize("asks", [anypoll.statistics, lambda: anypoll.configure(pollers=2)])
async def test_a_signal_handler_may_ask(asks: Any) -> None:
    """Python runs it between any two instructions of the main thread, also under the lock."""
    before = signal.signal(signal.SIGUSR1, lambda *_: asks())
    try:
        with _runtime._lock:
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_a_pool_that_keeps_failing() -> None:
    """An error, not a spin."""
    tries = []

    def open_on(poller: Any) -> None:
        tries.append(poller)
        raise _epoll.PollerEndedError

    with pytest.raises(OSError, match="as soon as they are started"):
        _runtime.on_poller(_runtime.current_hub(), open_on)
    assert 1 < len(tries) < 100


# --- threads and signals -------------------------------------------------------------------------


async def test_pollers_block_all_signals() -> None:
    """So Python's main thread gets each of them."""
    before = threads()
    anypoll.configure(pollers=4)
    mine = threads() - before
    assert len(mine) == 3
    for number in mine:
        with open(f"/proc/self/task/{number}/status") as status:
            [blocked] = [line.split()[1] for line in status if line.startswith("SigBlk:")]
        unblocked = ~int(blocked, 16) & (1 << 64) - 1
        names = {n for n in range(1, signal.NSIG) if unblocked >> (n - 1) & 1}
        # what cannot be blocked, and two that the C library keeps for itself
        assert names <= {signal.SIGKILL, signal.SIGSTOP, 32, 33}
    got: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda *_: got.append(threading.get_ident()))
    try:
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGUSR1)
        await holds(lambda: got)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert set(got) == {threading.main_thread().ident}


async def _echo(conn: anypoll.Connection) -> None:
    async for piece in conn:
        await conn.send(piece)


async def _exchange(port: int, seed: int) -> None:
    """Byte-exact, there and back."""
    data = pattern(300 * KIB, seed)
    async with await anypoll.connect_tcp("127.0.0.1", port) as conn:
        async with anyio.create_task_group() as group:
            group.start_soon(conn.send, data)
            assert await within(conn.next(len(data))) == data
        await conn.send_eof()
        with pytest.raises(EndOfStream):
            await conn.receive()


def _loops() -> list[tuple[str, dict[str, Any]]]:
    loops: list[tuple[str, dict[str, Any]]] = [("asyncio", {}), ("trio", {})]
    try:
        import uvloop
    except ImportError:
        return loops
    return [*loops, ("asyncio", {"loop_factory": uvloop.new_event_loop})]


@pytest.mark.parametrize("pollers", [1, 2])
def test_event_loops_share_the_pollers(pollers: int) -> None:
    """One of each kind at the same time, all to all; then others in the same threads."""
    anypoll.configure(pollers=pollers)
    loops = _loops()
    barrier = threading.Barrier(len(loops))
    ports: list[int] = []
    failures: list[BaseException] = []

    async def main() -> None:
        async with anypoll.serve(_echo, host="127.0.0.1", port=0) as server:
            ports.append(server.port)
            await anyio.to_thread.run_sync(barrier.wait, 60)
            async with anyio.create_task_group() as group:
                for seed, port in enumerate(ports[-len(loops) :] * 2):
                    group.start_soon(_exchange, port, seed)
            await anyio.to_thread.run_sync(barrier.wait, 60)  # their clients may be here

    def work(backend: str, options: dict[str, Any]) -> None:
        try:
            for _ in range(2):
                anyio.run(main, backend=backend, backend_options=options)
                barrier.wait(60)
        except BaseException as exc:  # noqa: BLE001 -- the test looks at it
            failures.append(exc)
            barrier.abort()

    threads = [threading.Thread(target=work, args=loop) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    statistics = anypoll.statistics().pollers
    assert len(statistics) == pollers
    assert all(p.connections == 0 and p.bytes_received > 0 for p in statistics)


# --- a poller that fails -------------------------------------------------------------------------


def break_down(error: int, times: int = 1) -> None:
    """The next wait of the one poller fails."""
    _epoll.set_fault("EPOLL_WAIT", error, times=times)
    while not _epoll.fault_hits("EPOLL_WAIT"):  # a wait that had begun before does not fail
        _runtime.nudge()


def is_broken(exc: BaseException, error: int) -> bool:
    cause = exc.__cause__
    return (
        isinstance(exc, BrokenResourceError)
        and isinstance(cause, OSError)
        and cause.errno == error
        and "poller" in str(cause)
    )


async def breaks(error: int, call: Any, *args: Any) -> None:
    with pytest.raises(BrokenResourceError) as caught:
        await within(call(*args))
    assert is_broken(caught.value, error)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "anypoll.pollers" and record.levelno == logging.ERROR
    ]


async def _collect(failures: list[BaseException], call: Any, *args: Any) -> None:
    try:
        await call(*args)
    except (BrokenResourceError, ClosedResourceError) as exc:
        failures.append(exc)


@pytest.mark.parametrize(
    ("error", "times"),
    [(errno.EBADF, 1), (errno.EINVAL, 1), (errno.EIO, 1), (errno.ENOMEM, 20)],
    ids=["EBADF", "EINVAL", "EIO", "ENOMEM"],
)
async def test_a_failing_poller_breaks_its_connections(
    error: int, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """O18: whoever waits is told, with the cause; one line in the log; another one goes on."""
    failures: list[BaseException] = []
    before = threads()
    reads, peer = anypoll.socketpair()
    writes, stuck = anypoll.socketpair()
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    async with anyio.create_task_group() as group:
        group.start_soon(_collect, failures, reads.next, 5)
        group.start_soon(_collect, failures, writes.send, bytes(8 * MIB))
        group.start_soon(_collect, failures, multi.listeners[0].accept)
        await holds(lambda: stuck.statistics().buffered_input >= 256 * KIB)
        await anyio.wait_all_tasks_blocked()
        break_down(error, times)
    assert len(failures) == 3
    assert all(is_broken(exc, error) for exc in failures), failures
    for conn in (reads, peer, writes, stuck):
        await breaks(error, conn.send, b"x")
        assert not conn.is_active
    await breaks(error, peer.receive)
    for _ in range(2):  # and again
        await breaks(error, multi.listeners[0].accept)
    pairs = [anypoll.socketpair()]
    await works(pairs)
    assert counts() == [2]
    assert _runtime.poller_index(reads._core.poller) == -1
    await close([*pairs, (reads, peer), (writes, stuck)])
    await multi.aclose()
    assert len(errors(caplog)) == 1
    assert os.strerror(error) in errors(caplog)[0]
    await holds(lambda: len(threads() - before) == 1)  # another one, in its place
    caplog.clear()


async def test_bytes_that_had_come_stay_readable() -> None:
    async with opened("tcp") as (conn, peer):
        await arrive(conn, peer, b"received before")
        break_down(errno.EBADF)
        await holds(lambda: not conn.is_active)
        assert await conn.next(8) == b"received"
        assert await conn.receive() == b" before"
        await breaks(errno.EBADF, conn.receive)


async def test_waits_that_fail_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """Tried again: nobody notices."""
    pair = anypoll.socketpair()
    for error in (errno.ENOMEM, errno.EINTR):
        break_down(error, 10)
        await works([pair] * 3)
    await close([pair])
    assert errors(caplog) == []


async def test_others_are_not_disturbed(caplog: pytest.LogCaptureFixture) -> None:
    """And keep their places: the new one takes that of the old one."""
    anypoll.configure(pollers=3)
    pairs = [anypoll.socketpair() for _ in range(3)]
    conns = [conn for pair in pairs for conn in pair]
    before = [conn.extra(AnypollAttribute.poller) for conn in conns]
    break_down(errno.EBADF)  # whoever waits first
    await holds(lambda: len(errors(caplog)) == 1)
    [failed] = [i for i, count in enumerate(counts()) if not count]
    assert sorted(counts()) == [0, 2, 2]
    for conn, index in zip(conns, before, strict=True):
        assert conn.is_active == (index != failed)
        assert conn.extra(AnypollAttribute.poller) == (index if index != failed else -1)
    await close(pairs)


async def test_a_replacement_that_cannot_be_started(caplog: pytest.LogCaptureFixture) -> None:
    """A failure without connections is noticed by whoever comes next: they get an error, as long as
    it lasts, and then another poller.
    """
    poller = _runtime.pick_poller()
    break_down(errno.EBADF)
    await holds(lambda: _epoll.poller_ended(poller) is not None)
    _epoll.set_fault("THREAD", errno.EAGAIN, times=-1)
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(OSError, match="unavailable"):
            await anypoll.Connection.from_socket(ours)
    assert anypoll.statistics().pollers == ()
    _epoll.clear_faults()
    pair = anypoll.socketpair()
    assert counts() == [2]
    await works([pair])
    await close([pair])
    assert len(errors(caplog)) == 1


async def test_a_server_goes_on_when_its_poller_has_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its handlers end as if their peers had gone, and another poller accepts; time and again."""
    ended: list[BaseException] = []

    async def handler(conn: anypoll.Connection) -> None:
        try:
            await conn.receive()
        except BrokenResourceError as exc:
            ended.append(exc)
            raise

    async with anypoll.serve(handler, host="127.0.0.1", port=0, max_connections=1) as server:
        listeners = server.listeners
        for number in range(1, 4):
            client = socket.create_connection(("127.0.0.1", server.port))
            await holds(lambda: server.statistics().active == 1)
            second = socket.create_connection(("127.0.0.1", server.port))  # in the backlog
            break_down(errno.EBADF)
            await holds(lambda n=number: sum(is_broken(e, errno.EBADF) for e in ended) == n)
            await holds(lambda n=number: server.statistics().accepted == 2 * n)
            assert counts() == [2]
            reset(client)
            reset(second)
            await holds(lambda: server.statistics().active == 0)
        assert server.listeners == listeners
    assert len(errors(caplog)) == 3
    ended.clear()
    caplog.clear()


@pytest.mark.parametrize("how", ["all others fail, too", "there is no other"])
async def test_a_server_gives_up_its_listener(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """After some failed pollers nothing spins, nobody waits in the backlog, and it can end."""

    async def handler(conn: anypoll.Connection) -> None:
        pytest.fail(f"{conn} was accepted")

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        [listener] = server.listeners
        if how == "there is no other":
            _epoll.set_fault("THREAD", errno.EAGAIN, times=-1)
        break_down(errno.EBADF, -1)
        await holds(lambda: "closed" in repr(listener))
        _epoll.clear_faults()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
    assert any("A listener has failed" in r.getMessage() for r in caplog.records)
    assert len(caplog.records) < 100
    caplog.clear()


async def test_a_failing_poller_leaves_the_loop_alone() -> None:
    """A log handler that uses anypoll, and closes what has just failed."""
    pair = anypoll.socketpair()
    seen: list[int] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(len(anypoll.statistics().pollers))
            for conn in pair:
                conn.abort()

    handler = Handler()
    _pollers.logger.addHandler(handler)
    try:
        async with anyio.create_task_group() as group:
            failures: list[BaseException] = []
            group.start_soon(_collect, failures, pair[0].receive)
            await anyio.wait_all_tasks_blocked()
            break_down(errno.EBADF)
    finally:
        _pollers.logger.removeHandler(handler)
    await holds(lambda: seen)
    assert seen == [1]
    assert len(failures) == 1


# --- settings and counters -----------------------------------------------------------------------


async def test_none_leaves_an_option_as_it_is() -> None:
    anypoll.configure(checkpoint_budget=3)
    anypoll.configure(load_balance="random")
    anypoll.configure()
    anypoll.configure(pollers=None, load_balance=None, block_size=None, checkpoint_budget=None)
    async with opened() as (conn, peer):
        await arrive(conn, peer, bytes(9))
        for _ in range(3):
            at_once(conn.reader.next(1))
        assert suspends(conn.reader.next(1))


async def test_counters_of_a_poller() -> None:
    async with opened() as (conn, peer):
        before = anypoll.statistics().pollers[0]
        await arrive(conn, peer, b"hello")
        await conn.send(b"world!")
        after = anypoll.statistics().pollers[0]
    assert after.bytes_received - before.bytes_received == 5
    assert after.bytes_sent - before.bytes_sent == 6
    assert after.reads > before.reads
    assert after.writes == before.writes + 1
    assert after.connections == before.connections


# --- memory --------------------------------------------------------------------------------------


def in_use() -> int:
    _runtime.nudge()
    return anypoll.statistics().memory.bytes_in_use


@pytest.mark.parametrize(
    ("asked", "block"), [(2048, 2 * KIB), (5000, 8 * KIB), (64 * KIB, 64 * KIB), (MIB, 256 * KIB)]
)
async def test_the_size_of_the_first_block(asked: int, block: int) -> None:
    """And of later ones, although each message is a byte."""
    anypoll.configure(block_size=asked)
    before = in_use()
    async with opened() as (conn, peer):
        anypoll.configure(block_size=2048)  # does not hold for this one any more
        assert in_use() == before
        for _ in range(20):
            await arrive(conn, peer, b"x")
            assert in_use() == before + block
            assert await conn.next(1) == b"x"


async def test_blocks_grow_from_the_first_one() -> None:
    anypoll.configure(block_size=4096)
    async with opened("tcp") as (conn, peer):
        before = in_use()
        await arrive(conn, peer, bytes(60_000))
        assert in_use() - before >= 60_000
        assert len(await conn.next(60_000)) == 60_000


async def test_memory_that_a_small_view_keeps() -> None:
    """Also of a block that the loop has made, and after the connection's end."""
    pinned = anypoll.statistics().memory.bytes_pinned
    async with opened("tcp") as (conn, peer):
        await arrive(conn, peer, bytes(100 * KIB))
        await arrive(conn, peer, bytes(100 * KIB))
        view = (await conn.reader.next(200 * KIB))[:10]  # merged: a block of the loop's
    assert anypoll.statistics().memory.bytes_pinned - pinned >= 200 * KIB
    assert sum(p.bytes_pinned for p in anypoll.statistics().pollers) <= pinned
    del view
    gc.collect()
    assert anypoll.statistics().memory.bytes_pinned == pinned


async def test_memory_of_a_poller_that_has_ended() -> None:
    anypoll.configure(pollers=2, load_balance=lambda _: 1)
    before = in_use()
    async with opened("tcp") as (conn, peer):
        await arrive(conn, peer, bytes(200 * KIB))
        parts = await conn.reader.next_parts(200 * KIB)
    anypoll.configure(pollers=1)
    await holds(lambda: counts() == [0])
    assert in_use() - before >= 200 * KIB
    del parts
    await holds(lambda: (gc.collect(), in_use() <= before)[1])

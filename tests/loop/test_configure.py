"""configure() and statistics(): what holds for the whole process."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from peers import arrive, at_once, holds, opened, suspends
from programs import run_to_end

import anypoll
from anypoll._loop import runtime as _runtime

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The pollers that a test starts end with its connections."""
    yield
    anypoll.configure(pollers=1, load_balance="round_robin", block_size=2048, checkpoint_budget=64)


def run(code: str) -> str:
    """What the program prints in a process of its own, which says nothing else."""
    done = run_to_end([sys.executable, "-W", "error", "-c", textwrap.dedent(code)])
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


# --- validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pollers": 0}, ValueError),
        ({"pollers": -1}, ValueError),
        ({"pollers": 100_000}, ValueError),
        ({"pollers": 1.5}, TypeError),
        ({"pollers": "2"}, TypeError),
        ({"load_balance": "best"}, ValueError),
        ({"load_balance": ""}, ValueError),
        ({"load_balance": 5}, ValueError),
        ({"load_balance": ["round_robin"]}, ValueError),
        ({"block_size": 0}, ValueError),
        ({"block_size": 2047}, ValueError),
        ({"block_size": 2**20 + 1}, ValueError),
        ({"block_size": "4096"}, TypeError),
        ({"checkpoint_budget": 0}, ValueError),
        ({"checkpoint_budget": -5}, ValueError),
        ({"checkpoint_budget": "64"}, TypeError),
        ({"checkpoint_budget": 1.0}, TypeError),
        ({"pollers": 2, "checkpoint_budget": 0}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
)
async def test_nonsense_changes_nothing(options: dict[str, Any], error: type[Exception]) -> None:
    before, pollers = _runtime.settings(), len(anypoll.statistics().pollers)
    with pytest.raises(error):
        anypoll.configure(**options)
    assert _runtime.settings() == before
    assert len(anypoll.statistics().pollers) == pollers


def test_options_are_named() -> None:
    with pytest.raises(TypeError):
        anypoll.configure(2)  # type: ignore[misc]


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


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"idle": 0}, ValueError),
        ({"interval": -1}, ValueError),
        ({"count": 0}, ValueError),
        ({"count": 1000}, ValueError),
        ({"idle": 10**6}, ValueError),
        ({"idle": 1.5}, TypeError),
        ({"interval": "5"}, TypeError),
    ],
)
def test_keepalive_times_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        anypoll.Keepalive(**options)


def test_keepalive_is_a_value() -> None:
    assert anypoll.Keepalive(1, 2, 3) == anypoll.Keepalive(idle=1, interval=2, count=3)
    with pytest.raises(AttributeError):
        anypoll.Keepalive().idle = 5  # type: ignore[misc]


# --- before first use ----------------------------------------------------------------------------


@pytest.mark.unsanitized
def test_importing_starts_nothing() -> None:
    """L34. Before first use configure() only records, and statistics() is empty."""
    assert (
        run(
            """
        import os
        import anypoll

        def threads():
            return len(os.listdir("/proc/self/task"))

        before, fds = threads(), len(os.listdir("/proc/self/fd"))
        print(anypoll.statistics().pollers, anypoll.statistics().memory.bytes_in_use)
        anypoll.configure(pollers=3, load_balance="random")
        try:
            anypoll.configure(pollers=0)
        except ValueError:
            print("refused")
        print(anypoll.statistics().pollers)
        assert threads() == before == 1
        assert len(os.listdir("/proc/self/fd")) == fds

        import anyio

        async def main():
            a, b = anypoll.socketpair()
            async with a, b:
                print(len(anypoll.statistics().pollers), threads() - before)

        anyio.run(main)
        """
        )
        == "() 0\nrefused\n()\n3 3\n"
    )


def test_the_process_ends_with_connections_open() -> None:
    """Quickly, without a word from the threads."""
    assert (
        run(
            """
        import anyio, anypoll

        async def main():
            global kept
            kept = anypoll.socketpair()
            await kept[0].send(b"x" * 1000)
            await kept[1].next(5)
            print("end")

        anyio.run(main)
        """
        )
        == "end\n"
    )


# --- pollers at run time -------------------------------------------------------------------------


class Spread:
    """Opens and closes pairs, and tells which pollers they went to."""

    def __init__(self) -> None:
        self.pairs: list[tuple[anypoll.Connection, anypoll.Connection]] = []
        self.before = self.now()

    @staticmethod
    def now() -> list[int]:
        return [p.connections for p in anypoll.statistics().pollers]

    def open(self, pairs: int) -> list[int]:
        self.before = self.now()
        self.pairs += [anypoll.socketpair() for _ in range(pairs)]
        return [b - a for a, b in zip(self.before, self.now(), strict=True)]

    async def works(self) -> None:
        for one, other in self.pairs:
            await one.send(b"ping")
            assert await other.next(4) == b"ping"

    async def close(self) -> None:
        for pair in self.pairs:
            for conn in pair:
                await conn.aclose()


@pytest.fixture
async def spread() -> Any:
    spread = Spread()
    yield spread
    await spread.close()


async def test_the_number_of_pollers_may_grow_and_shrink(spread: Spread) -> None:
    """O18: no connection is orphaned."""
    spread.open(2)
    most = len(anypoll.statistics().pollers)
    anypoll.configure(pollers=most + 1)
    assert len(anypoll.statistics().pollers) == most + 1  # at once
    added = spread.open(most + 1)
    assert added == [2] * (most + 1)
    await spread.works()
    anypoll.configure(pollers=1)
    added = spread.open(2)
    assert added == [4] + [0] * most
    await spread.works()  # also those on pollers that get no more
    await spread.close()
    await holds(lambda: sum(Spread.now()) == 0)


async def test_least_connections(spread: Spread) -> None:
    anypoll.configure(pollers=2)
    spread.open(1)
    anypoll.configure(pollers=1)
    spread.open(4)  # all on the first
    anypoll.configure(pollers=2, load_balance="least_connections")
    await holds(lambda: sum(Spread.now()) == 10)
    added = spread.open(4)
    assert added[:2] == [0, 8]
    added = spread.open(3)
    assert abs(Spread.now()[0] - Spread.now()[1]) <= 1
    await spread.works()


async def test_random_choice(spread: Spread) -> None:
    anypoll.configure(pollers=2, load_balance="random")
    added = spread.open(50)
    assert all(count > 0 for count in added[:2])  # 2 in 2**100
    assert sum(added[:2]) == 100
    await spread.works()


async def test_own_choice(spread: Spread) -> None:
    seen: list[Sequence[anypoll.PollerStatistics]] = []

    def second(pollers: Sequence[anypoll.PollerStatistics]) -> int:
        seen.append(pollers)
        return 1

    anypoll.configure(pollers=2, load_balance=second)
    added = spread.open(3)
    assert added[:2] == [0, 6]
    assert len(seen) == 6
    for pollers in seen:
        assert len(pollers) == 2
        assert all(isinstance(p, anypoll.PollerStatistics) for p in pollers)
    assert [p[1].connections - seen[0][1].connections for p in seen] == [0, 1, 2, 3, 4, 5]


def raises(_: Sequence[anypoll.PollerStatistics]) -> int:
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda _: 2,
        lambda _: -1,
        lambda _: 10**30,
        lambda _: None,
        lambda _: "1",
        lambda _: 0.5,
        lambda: 0,
        raises,
    ],
    ids=["2", "-1", "huge", "None", "str", "float", "signature", "raises"],
)
async def test_a_wrong_choice_is_logged(
    wrong: Callable[..., Any], spread: Spread, caplog: pytest.LogCaptureFixture
) -> None:
    """And round robin chooses, for that one."""
    anypoll.configure(pollers=2, load_balance=wrong)
    added = spread.open(2)
    assert added[:2] == [2, 2]
    anypoll.configure(load_balance="round_robin")
    names = [r.name.split(".")[0] for r in caplog.records if r.levelno >= logging.ERROR]
    caplog.clear()  # records hold frames, and those hold connections
    caplog.get_records("call").clear()
    assert names == ["anypoll"] * 4
    await spread.works()


COUNTERS = """
    connections waits events reads writes bytes_received bytes_sent wakeups wakeups_coalesced
    stale_tokens stalls timeouts blocks_in_use blocks_free bytes_in_use bytes_free bytes_pinned
"""


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
        with pytest.raises(AttributeError):
            after.reads = 0  # type: ignore[misc]
        with pytest.raises(AttributeError):
            anypoll.statistics().pollers = ()  # type: ignore[misc]
    for name in COUNTERS.split():
        assert isinstance(getattr(after, name), int)
        assert getattr(after, name) >= 0

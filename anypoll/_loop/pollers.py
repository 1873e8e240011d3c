"""The poller pool: load balancing of connections, draining, and replacement of failed pollers.

The pollers that get connections come first, ``settings.pollers`` of them. Behind them are those
that drain: they end, with their threads, when their last connection or listener has gone. C does
that (csrc/ending.c), and nobody waits for it; the next call here finds that they have ended, and
joins their threads. A failed poller is found the same way, and replaced.
"""

from __future__ import annotations

import itertools
import logging
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._buffers.arguments import BLOCK_SIZE, MIB, count_field, flag, shown
from .._epoll import (
    PollerStatistics,
    drain_poller,
    keep_poller,
    nudge_poller,
    open_poller,
    poller_ended,
    poller_statistics,
    stop_poller,
)

if TYPE_CHECKING:
    from .._epoll import Poller

logger = logging.getLogger("anypoll.pollers")

#: Microseconds for which an event loop waits without sleeping: initially, and at most.
SPIN = 20
SPIN_MOST = 1000

LoadBalance = str | Callable[[Sequence[PollerStatistics]], int]


@dataclass(frozen=True, slots=True)
class Settings:
    """The process-wide settings of :func:`anypoll.configure`."""

    pollers: int = 1
    load_balance: LoadBalance = "round_robin"
    block_size: int = BLOCK_SIZE
    checkpoint_budget: int = 64
    direct_resume: bool = True
    driver: str = "auto"
    spin: int = SPIN

    def __post_init__(self) -> None:
        count_field(self, "pollers", least=1, most=256)
        count_field(self, "block_size", least=BLOCK_SIZE, most=MIB)
        count_field(self, "checkpoint_budget", least=1)
        flag(self.direct_resume, "direct_resume")
        count_field(self, "spin", least=0, most=SPIN_MOST)
        if self.driver not in {"auto", "thread"}:
            raise ValueError(f"driver must be 'auto' or 'thread', not {self.driver!r}")
        balance: Any = self.load_balance
        names = ("round_robin", "random", "least_connections")
        if not callable(balance) and balance not in names:
            raise ValueError(
                f"load_balance must be one of {', '.join(names)}, or a callable, not {balance!r}"
            )


class Pool:
    """Pollers with running threads.

    The caller ensures that only one thread at a time is in here. That thread may enter twice,
    because the garbage collector and signal handlers may run user code anywhere.
    """

    def __init__(self, settings: Settings) -> None:
        self._pollers: list[Poller] = []
        self._active = 0
        self._settings = settings
        try:
            self._resize(settings.pollers)
        except BaseException:
            self.stop()  # or a thread would outlive its poller
            raise
        self.turn = itertools.count(1).__next__

    def configure(self, settings: Settings) -> None:
        """Changes the settings. The pool grows at once, starting with the pollers that drain. When
        it shrinks, the surplus pollers get no more connections, and end with their last.

        :raises OSError: if a poller cannot be started; nothing has changed then
        """
        self._resize(settings.pollers)
        self._settings = settings

    def _resize(self, number: int) -> None:
        while self._active > number:
            self._active -= 1
            drain_poller(self._pollers[self._active])
        before = self._active
        try:
            while self._active < number:
                self._grow()
        except OSError:
            self._resize(before)
            raise

    def _grow(self) -> None:
        """Adds a poller that gets connections."""
        while self._active < len(self._pollers):
            if keep_poller(self._pollers[self._active]):
                self._active += 1
                return
            stop_poller(self._pollers.pop(self._active))
        self._pollers.insert(self._active, open_poller())
        self._active += 1

    @property
    def draining(self) -> bool:
        """Whether any pollers are to end with their last connection."""
        return len(self._pollers) > self._active

    def active(self) -> list[Poller]:
        """The pollers that get connections."""
        return self._pollers[: self._active]

    def bury(self) -> list[int]:
        """Removes the pollers that have ended. Each failed one is replaced if another can be
        started; if not, :meth:`refill` tries again. Returns the errnos of the failed pollers.
        """
        failed = []
        for poller in list(self._pollers):
            error = poller_ended(poller)
            if error is not None and poller in self._pollers:
                self._take_out(poller)
                stop_poller(poller)
                if error:
                    failed.append(error)
        return failed

    def _take_out(self, poller: Poller) -> None:
        place = self._pollers.index(poller)
        if place < self._active:
            try:
                self._pollers[place] = open_poller()
                return
            except OSError:
                self._active -= 1
        del self._pollers[place]

    def refill(self) -> None:
        """Starts the missing pollers, or as many of them as possible.

        :raises OSError: if there are none, and none can be started
        """
        try:
            self._resize(self._settings.pollers)
        except OSError:
            if not self._active:
                raise

    def index(self, poller: Poller) -> int:
        """The poller's index in :meth:`statistics`; -1 if it has ended."""
        return self._pollers.index(poller) if poller in self._pollers else -1

    def statistics(self) -> tuple[PollerStatistics, ...]:
        """The statistics of each poller; those that get connections come first."""
        return tuple(poller_statistics(poller) for poller in list(self._pollers))

    def nudge(self) -> None:
        """Makes every poller recycle what it can."""
        for poller in list(self._pollers):
            nudge_poller(poller)

    def stop(self) -> None:
        """Ends and joins all threads."""
        for poller in list(self._pollers):
            stop_poller(poller)


def choose(pollers: Sequence[Poller], balance: LoadBalance, turn: Callable[[], int]) -> Poller:
    """The poller for a new connection. May run user code; errors in that are logged."""
    if balance == "random":
        return random.choice(pollers)  # noqa: S311 -- spreads load, guards nothing
    if balance != "round_robin":
        statistics = [poller_statistics(poller) for poller in pollers]
        try:
            index = operator.index(balance(statistics) if callable(balance) else _least(statistics))
            if 0 <= index < len(pollers):
                return pollers[index]
            logger.error("load_balance returned %s for %d pollers", shown(index), len(pollers))
        except Exception:
            logger.exception("load_balance failed")
    return pollers[turn() % len(pollers)]


def _least(statistics: Sequence[PollerStatistics]) -> int:
    return min(range(len(statistics)), key=lambda i: statistics[i].connections)

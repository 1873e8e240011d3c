"""The pool of pollers, and which of them gets the next connection."""

from __future__ import annotations

import logging
import operator
import random
from typing import TYPE_CHECKING

from ._epoll import nudge_poller, open_poller, poller_statistics, stop_poller

if TYPE_CHECKING:
    from ._config import Settings
    from ._epoll import Poller, PollerStatistics

logger = logging.getLogger("anypoll.pollers")


class Pool:
    """Pollers with running threads.

    The caller sees to it that only one thread at a time is in here.
    """

    def __init__(self, settings: Settings) -> None:
        self._pollers: list[Poller] = []
        self._next = 0
        try:
            self.configure(settings)
        except BaseException:
            self.stop()  # those that run already
            raise

    def configure(self, settings: Settings) -> None:
        """Grows at once. After a decrease the pollers beyond the new number get no connection
        any more, and serve the ones that they have.

        :raises OSError: if a poller cannot be started; those there were stay
        """
        self._settings = settings
        while len(self._pollers) < settings.pollers:
            self._pollers.append(open_poller())

    def pick(self) -> Poller:
        """The poller for a new connection."""
        active = self._pollers[: self._settings.pollers]
        if len(active) == 1:
            return active[0]
        return active[self._index(active)]

    def _index(self, active: list[Poller]) -> int:
        balance = self._settings.load_balance
        if balance == "random":
            return random.randrange(len(active))  # noqa: S311 -- spreads load, guards nothing
        if balance != "round_robin":
            statistics = [poller_statistics(poller) for poller in active]
            try:
                index = operator.index(
                    balance(statistics) if callable(balance) else _least(statistics)
                )
                if 0 <= index < len(active):
                    return index
                logger.error("load_balance returned %r for %d pollers", index, len(active))
            except Exception:
                logger.exception("load_balance failed")
        self._next += 1
        return self._next % len(active)

    def index(self, poller: Poller) -> int:
        """Where the poller is in :meth:`statistics`."""
        return self._pollers.index(poller)

    def statistics(self) -> tuple[PollerStatistics, ...]:
        """Of each poller, in the order in which they were started."""
        return tuple(poller_statistics(poller) for poller in self._pollers)

    def nudge(self) -> None:
        """Makes every poller recycle what it can."""
        for poller in self._pollers:
            nudge_poller(poller)

    def stop(self) -> None:
        """Ends and joins all threads."""
        for poller in self._pollers:
            stop_poller(poller)


def _least(statistics: list[PollerStatistics]) -> int:
    return min(range(len(statistics)), key=lambda i: statistics[i].connections)

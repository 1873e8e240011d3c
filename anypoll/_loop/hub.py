"""The hub: wakes the tasks of one event loop, whichever kind of loop that is.

Pollers put slots into the C hub's mailbox and make its descriptor readable; the loop then calls
:meth:`Hub.dispatch`, which takes the whole mailbox and wakes the waiters. A wake-up is only a hint:
the woken task looks at the connection again. So a wake-up that comes late, twice, or to a cancelled
task does no harm.

An event loop that has the poller to itself *borrows* it (:meth:`Hub.borrow`): it watches the
poller's descriptor as well, and calls ``drive()``, which does the poller's work and takes what came
of it. The poller's thread then only guards (csrc/guard.c). ``runtime`` decides who borrows.

The registries:
  - ``readers`` and ``writers`` hold the waiters (futures or tasks) strongly while they wait; a
    suspended task's frame holds its connection, so a connection that a task waits on stays alive.
  - ``addressees`` holds listeners weakly, by the number that tokens carry. Connections are found
    by the index of their slot, in an array of the native base class.
  - Connections in request mode that are idle are in a list of the native base class, which holds
    them strongly: no task does.
  - ``outputs`` holds the objects whose memory a poller is still sending. It is a plain registry,
    not an attribute of the connection: objects in a garbage cycle are freed in arbitrary order,
    and the memory must outlive the C side's use of it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from .. import _epoll, _native
from .._epoll import (
    MAIL_FAILED,
    MAIL_IDLE,
    MAIL_READ,
    MAIL_STARVED,
    MAIL_WRITE,
)
from .tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context

    from anyio.abc import TaskGroup

    from .._buffers.chain import Piece
    from .._epoll import Hub as HubHandle, Poller

logger = logging.getLogger("anypoll.hub")

#: Events that may run user code: close callbacks, log handlers.
_MAIL_LAST = MAIL_IDLE | MAIL_STARVED | MAIL_FAILED


class Addressee(Protocol):
    """The target of a token: a connection or a listener."""

    def on_token(self, bits: int, value: int) -> None:
        """An event other than the end of a wait."""

    def on_hub_end(self) -> None:
        """The event loop has ended, and the C side has closed the descriptor."""


class Loan:
    """A poller that an event loop drives.

    It holds the poller, and so the descriptor, for as long as the loop watches that.
    """

    __slots__ = ("address", "fd", "poller")

    poller: Poller
    address: int
    """the poller's, for the native types"""
    fd: int

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.fd = _epoll.poller_fd(poller)
        self.address = _epoll.address(poller)


class Hub(_native.Hub, ABC):
    """An event loop's side of its dealings with the pollers; see the module."""

    handle: HubHandle
    loan: Loan | None
    """the poller that the event loop drives"""

    def __init__(self) -> None:
        self._owner = _epoll.open_hub()
        self.handle = _epoll.bare(self._owner)
        self._attach(_epoll.address(self.handle))
        self.loan = None
        self._watched: Loan | None = None  # the loop's thread only; may outlive the loan
        self.readers: dict[int, Any] = {}
        self.writers: dict[int, list[Any]] = {}
        self.addressees: dict[int, Callable[[], Addressee | None]] = {}  # weak references
        self.outputs: dict[int, list[Piece]] = {}
        self.unserved: Any = None

    @abstractmethod
    def check(self) -> None:
        """Checks that the caller runs in this hub's event loop.

        :raises RuntimeError: if it does not
        """

    @abstractmethod
    def is_here(self) -> bool:
        """Whether the caller runs in this hub's event loop. Any thread."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the event loop is running, in this thread or another. Any thread."""

    @property
    def can_resume_directly(self) -> bool:
        """Whether handlers can be resumed directly."""
        return True

    @abstractmethod
    def current_task(self) -> object:
        """The current task, in any event loop of this kind; ``None`` if there is none."""

    @abstractmethod
    def wait_read(self, number: int) -> Awaitable[int | None]:
        """Suspends until :meth:`wake_reader`, or until :meth:`dispatch` for the connection.

        The result may be the window's new end (``ap_token.value``); if it is absent or gets lost,
        C is asked. If awaiting raises, the caller removes the entry in ``readers``.
        """

    @abstractmethod
    async def wait_write(self, number: int) -> None:
        """Suspends until :meth:`wake_writers`. Several tasks may wait."""

    @abstractmethod
    async def checkpoint(self) -> None:
        """Yields to the scheduler once; raises if the task has been cancelled."""

    @abstractmethod
    def wake(self, waiter: Any) -> None:
        """Resumes a waiter registered by :meth:`wait_read` or :meth:`wait_write`."""

    @abstractmethod
    def spawn(
        self, function: Callable[[], Coroutine[Any, Any, None]], *, stoppable: bool = False
    ) -> bool:
        """Runs the function in a background task of its own, with the context variables of the
        caller. It starts even if the loop is ending, and not before this call has returned. Any
        exception is logged. Any thread.

        :param stoppable: on asyncio, a cancellation before the start reaches the function where it
            first suspends, instead of never

        Returns False, and runs nothing, if the event loop has ended.
        """

    def tasks_in(self, group: TaskGroup, context: Context) -> Tasks:
        """What starts many tasks in the group at little cost. Call it in the group's block."""
        return Tasks(group.start_soon, context)

    @abstractmethod
    def _watch(self, loan: Loan) -> None:
        """Has the loop call ``drive(loan)`` whenever the loan's descriptor is readable. Call it in
        the loop.

        :raises OSError: if the loop cannot watch it
        """

    @abstractmethod
    def _unwatch(self, loan: Loan) -> None:
        """Undoes :meth:`_watch`. Call it in the loop's thread."""

    @abstractmethod
    def _call_soon(self, function: Callable[..., None], *args: Any) -> None:
        """Calls the function in the event loop, unless that has ended. Any thread."""

    # --- driving a poller ------------------------------------------------------------------------

    def borrow(self, poller: Poller) -> None:
        """Has this event loop drive the poller. If it cannot, the poller's thread goes on. Call it
        in the loop.
        """
        self._stop_watching(self._watched)
        loan = Loan(poller)
        try:
            self._watch(loan)
        except OSError:
            return
        self.loan = self._watched = loan
        _epoll.lend_poller(poller, self.handle)

    def give_back(self) -> None:
        """Has the poller driven by its thread again, at once. Any thread."""
        loan, self.loan = self.loan, None
        if loan is not None:
            _epoll.lend_poller(loan.poller, None)
            self._call_soon(self._stop_watching, loan)

    def _stop_watching(self, loan: Loan | None) -> None:
        if loan is not None and self._watched is loan:
            self._watched = None
            self._unwatch(loan)

    def _loan_is_over(self, loan: Loan) -> None:
        self._stop_watching(loan)
        if self.loan is loan:
            self.loan = None

    # --- waking ----------------------------------------------------------------------------------

    def forget(self, number: int) -> None:
        """``number`` has ended: its tokens go to nobody from now on."""
        self._remove_core(number)
        self.addressees.pop(number, None)

    def part_from(self, number: int) -> None:
        """The connection ``number`` is closed: whoever waits for it natively has been woken; now
        the others are.
        """
        if self.outputs:
            self.outputs.pop(number, None)
        if self.readers and (waiter := self.readers.pop(number, None)) is not None:
            self.wake(waiter)
        if self.writers:
            self.wake_writers(number)

    def waits(self, number: int) -> bool:
        """Whether a reader call waits, or a task in :meth:`wait_read`."""
        return super().waits(number) or number in self.readers

    def wake_reader(self, number: int) -> None:
        """Resumes the task whose reader call waits, or that waits in :meth:`wait_read`."""
        if self._wake_waiting(number):
            return
        waiter = self.readers.pop(number, None)
        if waiter is not None:
            self.wake(waiter)

    def wake_writers(self, number: int) -> None:
        """Resumes all tasks waiting in :meth:`wait_write`."""
        for waiter in self.writers.pop(number, ()):
            self.wake(waiter)

    def _read_over(self, number: int) -> None:
        waiter = self.readers.pop(number, None)
        if waiter is not None:
            self.wake(waiter)

    def dispatch_one(self, number: int, bits: int, value: int) -> None:
        if bits & MAIL_READ:
            self._read_over(number)
        if bits & MAIL_WRITE:
            self.wake_writers(number)
        if news := bits & ~(MAIL_READ | MAIL_WRITE | _MAIL_LAST):
            self._tell(number, news, value)

    def _tell_last(self, number: int, bits: int, value: int) -> None:
        self._tell(number, bits, value)

    def _raise_first(self, left: list[BaseException]) -> NoReturn:
        _raise_first(left)
        raise AssertionError

    def _tell(self, number: int, news: int, value: int) -> None:
        found = self.addressees.get(number)
        addressee = self._core(number) if found is None else found()
        if addressee is not None:
            try:
                addressee.on_token(news, value)
            except Exception:  # a fault of ours must not end the user's event loop
                logger.exception("Internal error in a hub")

    def end(self) -> None:
        """Ends the hub with its event loop: closes all that is open. Idempotent. Any thread."""
        if self.dead:
            return
        self.dead = True
        loan, self.loan = self.loan, None
        if loan is not None:  # the loop has dropped its watch
            _epoll.lend_poller(loan.poller, None)
        _epoll.hub_kill(self.handle)
        left: list[BaseException] = []
        open_now = [found() for found in list(self.addressees.values())]
        for addressee in [*open_now, *self._cores()]:
            if addressee is not None:
                try:
                    addressee.on_hub_end()
                except BaseException as exc:  # noqa: BLE001 -- of a close callback
                    left.append(exc)
        self.addressees.clear()
        self._clear_waiting()
        self.readers.clear()
        self.writers.clear()
        self.outputs.clear()  # last: the C side no longer refers to anything
        _raise_first(left)


def _raise_first(left: list[BaseException]) -> None:
    """Raises the first of the exceptions that end the program; logs the others."""
    for exc in left[1:]:
        logger.error("Another one has ended the program already", exc_info=exc)
    if left:
        raise left[0]

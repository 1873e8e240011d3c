"""The hub: wakes the tasks of one event loop, whichever kind of loop that is.

Pollers put slots into the C hub's mailbox and make its descriptor readable; the loop then calls
:meth:`Hub.dispatch`, which takes the whole mailbox and wakes the waiters. A wake-up is a hint:
nothing travels with it, and the task that is woken looks at the connection again. So a wake-up
that comes too late, twice, or to a task that has been cancelled does no harm.

What is where:
  - ``readers`` and ``writers`` hold the waiters (a future or a task) strongly while they wait; a
    suspended task's frame holds its connection, so a connection that is waited for stays alive.
  - ``addressees`` holds connections and listeners weakly, by the number that tokens carry.
  - ``requests`` holds the idle connections in request mode, strongly: no task has them.
  - ``outputs`` holds the objects whose memory the poller is still sending. It is a plain registry,
    not an attribute of the connection: in a garbage cycle the order of freeing is arbitrary, and
    the memory must outlive the C side's use of it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

from .. import _epoll
from .._epoll import (
    MAIL_FAILED,
    MAIL_IDLE,
    MAIL_READ,
    MAIL_SENT,
    MAIL_STARVED,
    MAIL_TRIM,
    MAIL_WRITE,
    hub_take,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from .._buffers.chain import Piece
    from .._epoll import Hub as HubHandle, View

logger = logging.getLogger("anypoll.hub")

_TOKEN = Struct(_epoll.TOKEN_FORMAT)
_TOKENS_AT_ONCE = 256
#: News upon which code of the user's may run: close callbacks, a handler of the log.
_MAIL_LAST = MAIL_IDLE | MAIL_STARVED | MAIL_FAILED


class Addressee(Protocol):
    """What a token may be for: a connection or a listener."""

    def on_token(self, bits: int, value: int) -> None:
        """News beyond the end of a wait."""

    def on_hub_end(self) -> None:
        """The event loop has ended, and the C side has closed the descriptor."""


class Request(Protocol):
    """What an idle connection in request mode waits with."""

    def on_input(self) -> None:
        """The wait is over. Must not run the user's code."""


class Hub(ABC):
    """What an event loop has to do with the pollers; see the module."""

    handle: HubHandle
    view: View
    """room for the answer of ``show_block``"""
    dead: bool
    """the event loop has ended"""

    def __init__(self) -> None:
        self._owner = _epoll.open_hub()
        self.handle = _epoll.bare(self._owner)
        self.view = _epoll.new_view()
        self.dead = False
        self.readers: dict[int, Any] = {}
        self.writers: dict[int, list[Any]] = {}
        self.addressees: dict[int, Callable[[], Addressee | None]] = {}  # weak references
        self.outputs: dict[int, list[Piece]] = {}
        self.requests: dict[int, Request] = {}
        self.unserved: Any = None
        self._tokens = _epoll.Tokens(_TOKENS_AT_ONCE)

    @abstractmethod
    def check(self) -> None:
        """Makes sure that the caller runs in this hub's event loop.

        :raises RuntimeError: if it does not
        """

    @abstractmethod
    def is_here(self) -> bool:
        """Whether the caller runs in this hub's event loop. Any thread."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the event loop is at work, here or in another thread. Any thread."""

    @abstractmethod
    def current_task(self) -> object:
        """The task that runs, of any event loop of this kind; ``None`` if none does."""

    @abstractmethod
    def wait_read(self, number: int) -> Awaitable[int | None]:
        """Suspends until :meth:`wake_reader`, or :meth:`dispatch` for the connection.

        The result may say where the window ends now (``ap_token.value``); if it does not, or if it
        gets lost, C is asked. Whoever awaits it removes the entry in ``readers`` when that raises.
        """

    @abstractmethod
    async def wait_write(self, number: int) -> None:
        """The same for :meth:`wake_writers`. Several tasks may wait."""

    @abstractmethod
    async def checkpoint(self) -> None:
        """One round of the scheduler; raises if the task has been cancelled."""

    @abstractmethod
    def wake(self, waiter: Any) -> None:
        """Resumes a waiter that :meth:`wait_read` or :meth:`wait_write` has filed."""

    @abstractmethod
    def spawn(
        self, function: Callable[[], Coroutine[Any, Any, None]], *, stoppable: bool = False
    ) -> bool:
        """Runs the function in a task of its own, in the background, with the context variables of
        the caller. It begins even if the loop is ending, and not before this has returned. What it
        raises is logged. Any thread.

        :param stoppable: on asyncio, a cancellation that comes before it has begun reaches it
            where it first suspends, instead of never

        Returns False, and runs nothing, if the event loop has ended.
        """

    def forget(self, number: int) -> None:
        """``number`` has ended: no token is for anybody from now on."""
        self.addressees.pop(number, None)

    def wake_reader(self, number: int) -> None:
        """Resumes the task that waits in :meth:`wait_read`, if there is one."""
        waiter = self.readers.pop(number, None)
        if waiter is not None:
            self.wake(waiter)

    def wake_writers(self, number: int) -> None:
        """Resumes all tasks that wait in :meth:`wait_write`."""
        for waiter in self.writers.pop(number, ()):
            self.wake(waiter)

    def dispatch(self) -> None:
        """Takes the mailbox and wakes whom it names. To be called in the loop's thread.

        What the user's code may do comes last: the other tokens tell how things were when they were
        taken, and it may use their connections. What it raises to end the program leaves this when
        everybody has been told.
        """
        tokens = self._tokens
        left: list[BaseException] = []
        n = tokens.max
        trim = 0
        while n == tokens.max:
            n = hub_take(self.handle, tokens.array, n)
            readable, last = [], []
            for token in _TOKEN.iter_unpack(tokens.memory[: n * _TOKEN.size]):
                if token[1] == MAIL_READ:
                    readable.append(token)
                else:
                    trim |= token[1] & MAIL_TRIM
                    self._dispatch_one(*token)
                    if token[1] & _MAIL_LAST:
                        last.append(token)
            self._wake_readers(readable)
            for number, bits, value in last:
                try:
                    self._tell(number, bits & _MAIL_LAST, value)
                except BaseException as exc:  # noqa: BLE001
                    left.append(exc)
        if trim:  # now that the wrappers of the blocks are gone
            _epoll.hub_trim(self.handle)
        _raise_first(left)

    def _wake_readers(self, tokens: Iterable[tuple[int, int, int]]) -> None:
        """Of tokens that say nothing but that a read wait is over."""
        for token in tokens:
            self._read_over(token[0])

    def _read_over(self, number: int) -> None:
        waiter = self.readers.pop(number, None)
        if waiter is not None:
            self.wake(waiter)
        elif (request := self.requests.pop(number, None)) is not None:
            request.on_input()

    def _dispatch_one(self, number: int, bits: int, value: int) -> None:
        if bits & MAIL_READ:
            self._read_over(number)
        if bits & MAIL_SENT:
            self.outputs.pop(number, None)
        if bits & MAIL_WRITE:
            self.wake_writers(number)
        if news := bits & ~(MAIL_READ | MAIL_WRITE | MAIL_SENT | _MAIL_LAST):
            self._tell(number, news, value)

    def _tell(self, number: int, news: int, value: int) -> None:
        found = self.addressees.get(number)
        addressee = found() if found is not None else None
        if addressee is not None:
            try:
                addressee.on_token(news, value)
            except Exception:  # a fault of ours must not end the user's event loop
                logger.exception("Internal error in a hub")

    def end(self) -> None:
        """The event loop has ended: closes what is open. Idempotent, any thread."""
        if self.dead:
            return
        self.dead = True
        _epoll.hub_kill(self.handle)
        left: list[BaseException] = []
        for found in list(self.addressees.values()):
            addressee = found()
            if addressee is not None:
                try:
                    addressee.on_hub_end()
                except BaseException as exc:  # noqa: BLE001 -- of a close callback
                    left.append(exc)
        self.addressees.clear()
        self.requests.clear()
        self.readers.clear()
        self.writers.clear()
        self.outputs.clear()  # last: the C side refers to nothing any more
        _raise_first(left)


def _raise_first(left: list[BaseException]) -> None:
    """What is to end the program does so once; the others are logged."""
    for exc in left[1:]:
        logger.error("Another one has ended the program already", exc_info=exc)
    if left:
        raise left[0]

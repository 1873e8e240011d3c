"""The session that the core has: its reader and writer are native, and carry plaintext.

While a core has a session, everything that reads or writes there reads or writes plaintext
(csrc/tls.c). So the parts of a connection change their places when the session begins:

============================ ========================= ===========================================
                             before, and after         meanwhile
============================ ========================= ===========================================
the core's reader and writer the connection's own      the TLS connection's
the connection's own         over the core             over :class:`Parked`, which refuses all use
the TLS connection's         before: there are none    over the core
                             after: over :class:`Left`
============================ ========================= ===========================================

Nothing else is in the way of a call: deadlines, wake-ups, request mode, output that is abandoned,
all is as for a connection without TLS. What only a session has is here: the handshake, its end, and
its errors.
"""

from __future__ import annotations

import ssl
from errno import EBUSY
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream

from .. import _epoll
from .._buffers.chain import EMPTY
from .._buffers.errors import ReadTimeout, stream_error
from .._buffers.reader import SCATTER, SHUT, Reader
from .._buffers.writer import Writer
from .._connection.endpoint import AGAIN, deadline_after
from .._epoll import (
    ECUT,
    EEOF,
    ELATE,
    ETLS,
    IS_EOF,
    IS_SHUT,
    TLS_RAGGED,
    TLS_SERVER,
    conn_buffered,
    conn_queued,
    conn_read,
    conn_say_goodbye,
    conn_shake,
)
from .held import HeldSSLObject
from .openssl import ssl_error
from .session import (
    CLOSE_MOST,
    NO_HANDSHAKE,
    TLSHandshake,
    closing_time,
    cut_off,
    reads_to_close,
    within,
)
from .standins import Left, Parked

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._connection.core import Core
    from .._connection.stream import Connection
    from .._epoll import Conn, TLSStatus


class NativeSession:
    """The session of one connection; see the module, and ``Session``.

    :param pointer: the address of the ``SSL`` behind ``ssl_object``
    """

    __slots__ = (
        "_connection",
        "_core",
        "_encryption",
        "_flags",
        "_pointer",
        "handshake",
        "reader",
        "ssl",
        "writer",
    )

    native = True

    def __init__(
        self,
        connection: Connection,
        ssl_object: ssl.SSLObject,
        pointer: int,
        *,
        standard_compatible: bool,
    ) -> None:
        core = connection._core
        self._connection = connection
        self._core = core
        self._pointer = pointer
        self._flags = TLS_SERVER if ssl_object.server_side else 0
        if not standard_compatible:
            self._flags |= TLS_RAGGED
        self._encryption = CoreEncryption(core.handle, ssl_object, standard_compatible)
        self.ssl: ssl.SSLObject = HeldSSLObject(ssl_object, core)
        self.reader = Reader(core)
        self.writer = Writer(core)

    # --- beginning -------------------------------------------------------------------------------

    async def shake_hands(self, timeout: float | None) -> None:
        """See ``Session``."""
        core = self._core
        deadline = deadline_after(timeout)
        if core.writer._size or core.queued():
            await within(core, timeout, core.flush_all, ReadTimeout, NO_HANDSHAKE)
        self._begin()
        try:
            code = await _asked(
                core, lambda: conn_shake(core.handle, core.draining, deadline), self._check_ending
            )
            if code == ELATE:
                raise core._own(ReadTimeout(f"{NO_HANDSHAKE} within {timeout} s"))
            if code < 0:
                raise self._failed(code)
            status = self._encryption.status
            self.handshake = TLSHandshake(status.lasted / 1e9, bool(status.resumed))
        except BaseException:
            self._change_back()
            raise
        finally:
            core._reading = core._writing = False

    def _begin(self) -> None:
        core = self._core
        if core._reading:
            raise BusyResourceError("reading from")
        if core._writing:
            raise BusyResourceError("writing to")
        core._check_usable()
        code = _epoll.conn_start_tls(core.handle, core.reader._start, self._pointer, self._flags)
        if code == -EBUSY:
            raise BusyResourceError("encrypting")
        if code < 0:
            raise core._own(stream_error(code))
        core._reading = core._writing = True
        core.session = self._encryption
        parked = Parked(core)
        reader, writer = core.reader, core.writer
        reader._close()
        reader._core = parked
        writer._shut = True
        writer._core = parked
        core.reader, core.writer = self.reader, self.writer

    def _failed(self, code: int) -> Exception:
        core = self._core
        if code == ETLS:
            error = self._encryption.reason
            if not isinstance(error, ssl.SSLEOFError):
                return core._own(error)
        if code == EEOF and self._flags & TLS_RAGGED:
            return core._own(EndOfStream())
        return core._read_error(ECUT if code == EEOF else code)

    def _check_ending(self) -> None:
        """The server may be ending: it waits for what has begun."""
        if self._core.draining and not self._encryption.has_begun:
            raise self._core._own(EndOfStream())

    def _change_back(self) -> None:
        """The connection's reader and writer are the core's again."""
        core, connection = self._core, self._connection
        reader, writer = connection._reader, connection._writer
        reader._core = core
        reader._view = EMPTY
        reader._start = 0
        reader._end = SHUT if core.closed else 0
        writer._core = core
        writer._shut = core.closed or bool(core.failure)
        core.reader, core.writer = reader, writer

    # --- the connection's ------------------------------------------------------------------------

    @property
    def _source(self) -> Any:
        """The core; after the end of the session, what is left."""
        return self.reader._core

    @property
    def read_timeout(self) -> float | None:
        """Seconds for one reader call in all."""
        return self._source.read_timeout  # type: ignore[no-any-return]

    @read_timeout.setter
    def read_timeout(self, value: float | None) -> None:
        self._source.read_timeout = value

    @property
    def write_timeout(self) -> float | None:
        """Seconds for one ``send()`` or ``flush()``."""
        return self._source.write_timeout  # type: ignore[no-any-return]

    @write_timeout.setter
    def write_timeout(self, value: float | None) -> None:
        self._source.write_timeout = value

    @property
    def closed(self) -> bool:
        """See ``Session``."""
        return self._source.closed  # type: ignore[no-any-return]

    @property
    def is_reading(self) -> bool:
        """See ``Session``."""
        return self._source._reading  # type: ignore[no-any-return]

    @property
    def is_broken(self) -> bool:
        """See ``Session``."""
        return bool(self._core.failure)

    @property
    def has_ended(self) -> bool:
        """See ``Session``."""
        return self._has_parted or bool(self._core.status() & IS_EOF)

    @property
    def _has_parted(self) -> bool:
        return self._source is not self._core

    # --- end -------------------------------------------------------------------------------------

    async def send_eof(self) -> None:
        """See ``Session``."""
        core = self._core
        if self._has_parted:
            await core.hub.checkpoint()
            return
        core._enter_writing()
        try:
            await core.hub.checkpoint()
            if core.closed:
                raise core._own(ClosedResourceError())
            if not core.status() & IS_SHUT:
                await self._end_side()
            await core._drain(deadline_after(core.write_timeout))
        finally:
            core._writing = False

    async def _end_side(self) -> None:
        core, writer = self._core, self.writer
        if writer._shut:
            raise core.why_unwritable()
        await core.flush_claimed()
        while writer._size:  # another task has written meanwhile
            await core.flush_claimed()
        while (code := conn_say_goodbye(core.handle)) == -EBUSY:  # a thread asks the SSL object
            await core.hub.checkpoint()
        if code < 0:
            raise core._write_error(code)
        writer._shut = True

    async def to_the_end(self) -> None:
        """See ``Session``."""
        core, handle, reader = self._core, self._core.handle, self.reader
        if self._has_parted:
            return
        core._enter_reading()
        try:
            while True:
                unread = core.buffered()
                core.check_request(unread)
                pos = reader._start
                ask = partial(conn_read, handle, pos, unread + 1, SCATTER, 0, b"", 0)
                code = await _asked(core, ask)
                if code == EEOF:
                    return
                if code < 0:
                    raise core._read_error(code)
        finally:
            core._reading = False

    async def part(self) -> bytes:
        """See ``Session``."""
        core = self._core
        if not self._has_parted:
            unread = core.take_parts(core.buffered())
            core.consume(0)  # the core is to know where that has ended
            Left(self._connection, self.reader, self.writer, unread)
        if core.session is not self._encryption:
            return b""
        while (code := _epoll.conn_end_tls(core.handle, 0)) == -EBUSY:  # as in _end_side()
            await core.hub.checkpoint()
        if code < 0:
            raise core._read_error(code)
        core.session = None
        self._change_back()
        return b"".join(core.take_parts(core.buffered()))

    async def close(self, *, wait: bool) -> None:
        """See ``Session``."""
        await self._encryption.close(self._core, wait=wait)

    async def finish(self, timeout: float) -> None:
        """See ``Session``."""
        await self._core.finish(timeout)

    def shut(self) -> None:
        """See ``Session``. The end of the core has shut what belongs to that."""
        if self._has_parted:
            self._source.shut(self.writer)


async def _asked(
    core: Core, question: Callable[[], int], before_waiting: Callable[[], None] | None = None
) -> int:
    """Asks the core until it need not wait any more; returns its answer."""
    while (code := question()) == AGAIN:
        core.reader._end = SHUT
        try:
            if before_waiting is not None:
                before_waiting()
            await core.hub.wait_read(core.number)
        except BaseException:
            core._stop_waiting()
            raise
    return code


# --- for the core --------------------------------------------------------------------------------


class CoreEncryption:
    """A session as its core sees it; see ``Encryption`` in ``_connection/endpoint.py``. It has no
    reference to the core, which refers to it.

    It holds the ``SSLObject``, and with that what its context has set up in OpenSSL: the core keeps
    it for as long as a thread may be inside of OpenSSL.
    """

    __slots__ = ("_compatible", "_handle", "_reason", "_ssl_object")

    def __init__(self, handle: Conn, ssl_object: ssl.SSLObject, standard_compatible: bool) -> None:
        self._handle = handle
        self._ssl_object = ssl_object
        self._compatible = standard_compatible
        self._reason: ssl.SSLError | None = None

    @property
    def status(self) -> TLSStatus:
        """What the core knows of it."""
        return _epoll.tls_status(self._handle)

    @property
    def has_begun(self) -> bool:
        """Whether part of a record has come."""
        return bool(self.status.begun)

    @property
    def reason(self) -> ssl.SSLError:
        """Why the session has failed; always the same object."""
        if self._reason is None:
            status = self.status
            self._reason = ssl_error(
                status.kind,
                status.code,
                _epoll.text_of(status.reason) or None,
                status.verify,
                _epoll.text_of(status.certificate),
                self._ssl_object.server_hostname,
            )
        return self._reason

    def broken(self, code: int) -> Exception:
        """The exception for ``ETLS`` and ``ECUT``."""
        if code == ECUT:
            self._reason = self._reason or cut_off()
        error = BrokenResourceError()
        error.__cause__ = self.reason
        return error

    # --- end -------------------------------------------------------------------------------------

    async def say_goodbye(self, core: Core, deadline: int) -> bool:
        """Sends pending output, and a ``close_notify``. Returns whether the kernel has it all."""
        if not await core._drained(deadline):
            return False
        return conn_say_goodbye(self._handle) >= 0 and await core._drained(deadline)

    async def close(self, core: Core, *, wait: bool | None = None) -> None:
        """Marks the core closed, and performs the closing handshake; see ``Session``."""
        wait = self._compatible if wait is None else wait
        if core._writing or self._has_given_up(core):
            return
        deadline = deadline_after(closing_time(core.write_timeout))
        core._begin_closing()
        try:
            with reads_to_close(core):
                while core._reading:  # until it has found the core closed
                    await core.hub.checkpoint()
                if await self.say_goodbye(core, deadline) and wait:
                    await self._discard(core, deadline)
        finally:
            core._flushing = False

    def _has_given_up(self, core: Core) -> bool:
        """Whether nobody waits for what is being sent."""
        awaited = core._own_queued()  # asked first, for it may all be sent meanwhile
        return not awaited and not core.writer._size and conn_queued(self._handle) > 0

    async def _discard(self, core: Core, deadline: int) -> None:
        """Awaits the peer's ``close_notify``."""
        handle, reader = self._handle, core.reader
        before, _ = core._traffic()
        while True:
            pos = reader._start
            code = await _asked(core, partial(conn_read, handle, pos, 1, SCATTER, deadline, b"", 0))
            if code < 0:
                return
            core.consume(conn_buffered(handle, reader._start))
            if core._traffic()[0] - before > CLOSE_MOST:
                return

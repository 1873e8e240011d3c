"""The hooks of a server: their order, how often they run, what they may do, and what a peer or a
cancellation can do to them.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import logging
import os
import re
import socket
import sys
import termios
import textwrap
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio import BrokenResourceError, EndOfStream
from certificates import client_context, server_context
from peers import KIB, holds, pattern, read_to_end, reset, send_all, within
from programs import run_to_end
from serving import (
    FOR_EVER,
    HOST,
    MODES,
    all_is_accounted_for,  # noqa: F401
    client,
    connected,
    ends,
    errors,
    faults_are_undone,  # noqa: F401
    gone,
    is_served,
    local,
    no_event_comes,  # noqa: F401
    once,
    stubborn,
    turned_away,
)

import anypoll
from anypoll import Connection, IdleTimeout, TLSConnection, _epoll
from anypoll.mux import ShardQueue

pytestmark = pytest.mark.anyio

ENDS: dict[str, Callable[[socket.socket], None]] = {"FIN": socket.socket.close, "RST": reset}


class Unrelated(Exception):
    pass


class Story:
    """All hooks of a server: what was called, in which order, all for one connection.

    :param at: called, and awaited if need be, in the hook of that name
    """

    def __init__(self, mode: str = "handler", **at: Callable[[Connection], Any]) -> None:
        self.mode = mode
        self.at = at
        self.told: list[str] = []
        self.failures: list[Exception] = []
        self.disconnected = anyio.Event()
        self.over = anyio.Event()
        self.conn: Connection | None = None

    def options(self, *left_out: str) -> dict[str, Any]:
        """The hooks, as arguments of ``serve()``."""
        every = {
            "on_prepare": self.on_prepare,
            "on_connect": self.on_connect,
            self.mode: partial(self._async, self.mode),
            "on_disconnect": self.on_disconnect,
            "on_error": self.on_error,
        }
        return {name: hook for name, hook in every.items() if name not in left_out}

    def _tell(self, name: str, conn: Connection) -> None:
        self.told.append(name)
        assert self.conn in (None, conn)
        self.conn = conn
        server = conn.server
        assert server is not None
        assert server.statistics().active == len(server.connections) == 1
        assert server.connections == (conn,)

    async def _async(self, name: str, conn: Connection) -> None:
        self._tell(name, conn)
        if name in self.at:
            await self.at[name](conn)

    def on_prepare(self, conn: Connection) -> None:
        self._tell("on_prepare", conn)
        conn.add_close_callback(self.on_close)
        if "on_prepare" in self.at:
            self.at["on_prepare"](conn)

    async def on_connect(self, conn: Connection) -> None:
        await self._async("on_connect", conn)

    async def on_disconnect(self, conn: Connection) -> None:
        try:
            await self._async("on_disconnect", conn)
        finally:
            self.disconnected.set()

    async def on_error(self, conn: Connection, exc: Exception) -> None:
        self.failures.append(exc)
        await self._async("on_error", conn)

    async def on_close(self, conn: Connection) -> None:
        try:
            await self._async("on_close", conn)
        finally:
            self.over.set()

    async def ends(self, server: anypoll.Server, errors: int = 0) -> str:
        """Until it is over; no more than so many errors were counted. Returns the reason."""
        await within(self.over.wait())
        await holds(lambda: not server.connections)
        statistics = server.statistics()
        assert (statistics.accepted, statistics.active) == (1, 0)
        assert statistics.handler_errors == errors
        assert len(self.told) == len(set(self.told))
        assert self.told[-1] == "on_close"
        [(reason, times)] = statistics.closed.items()
        assert times == 1
        return reason

    def forget(self) -> None:
        """Lets go of everything that the test of leaks would find."""
        self.conn = None
        self.at = {}
        for exc in self.failures:
            exc.__traceback__ = None


def raising(_conn: Connection) -> Any:
    raise Unrelated("no good")


async def consume(conn: Connection) -> None:
    await conn.receive()


async def next_byte(conn: Connection) -> None:
    await conn.next(1)


async def known_gone(conn: Connection) -> None:
    await holds(lambda: gone(conn))


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mode", MODES)
async def test_they_run_in_order_and_once(mode: str, end: str) -> None:
    async def work(conn: Connection) -> None:
        assert bytes(await conn.next(1)) == b"x"
        if mode == "handler":
            await within(story.disconnected.wait())

    story = Story(mode, **{mode: work})
    async with local(**story.options()) as server:
        with connected(server) as peer:
            await send_all(peer, b"x")
            await holds(lambda: mode in story.told)
            assert story.conn is not None
            await holds(lambda: not len(story.conn.reader))  # type: ignore[union-attr]
            ENDS[end](peer)
        await story.ends(server)
    assert story.told == ["on_prepare", "on_connect", mode, "on_disconnect", "on_close"]
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_nothing_is_read_before_on_prepare_has_returned(mode: str) -> None:
    """No poller watches the descriptor yet, and the input lies in the kernel."""

    def watched() -> set[int]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                    text = Path(f"/proc/self/fdinfo/{name}").read_text()
                    found |= {int(n) for n in re.findall(r"tfd:\s*(\d+)", text)}
            except FileNotFoundError:  # that of the listing
                continue
        return found

    seen: list[Any] = []

    def prepare(conn: Connection) -> None:
        seen.append(in_the_kernel(conn))
        seen.append(conn.fileno() in watched())
        conn.read_timeout = 25
        conn.state = "prepared"

    async def work(conn: Connection) -> None:
        seen.extend([bytes(await conn.next(5)), conn.read_timeout, conn.state])

    async with local(**{mode: work}, on_prepare=prepare) as server:  # type: ignore[arg-type]
        with connected(server) as peer:
            assert peer.send(b"hello") == 5
            await holds(lambda: len(seen) == 5)
    assert seen == [5, False, b"hello", 25, "prepared"]


@pytest.mark.parametrize("mode", MODES)
async def test_the_handler_waits_for_on_connect(mode: str) -> None:
    """L33: and so do the requests; a hook's result is there for all that come after it."""
    go_on = anyio.Event()

    async def connect(conn: Connection) -> None:
        await go_on.wait()
        conn.state = "made by on_connect"

    async def work(conn: Connection) -> None:
        assert conn.state == "made by on_connect"
        await conn.next(5)
        if mode == "handler":
            await within(story.disconnected.wait())

    async def disconnect(conn: Connection) -> None:
        assert conn.state == "made by on_connect"

    story = Story(mode, on_connect=connect, **{mode: work}, on_disconnect=disconnect)
    async with local(**story.options()) as server:
        with connected(server) as peer:
            await send_all(peer, b"hello")
        await holds(lambda: story.told == ["on_prepare", "on_connect"])
        assert story.conn is not None
        await known_gone(story.conn)
        await anyio.wait_all_tasks_blocked()
        assert story.told == ["on_prepare", "on_connect"]
        go_on.set()
        await within(story.over.wait())
    assert story.told[0:2] == ["on_prepare", "on_connect"]
    assert sorted(story.told[2:4]) == sorted([mode, "on_disconnect"])
    assert story.told[4:] == ["on_close"]
    assert server.statistics().handler_errors == 0
    story.forget()


# --- exceptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_prepare", "on_connect", "work", "on_disconnect"])
@pytest.mark.parametrize("mode", MODES)
async def test_an_exception_is_one_of_the_handler(
    mode: str, hook: str, log: pytest.LogCaptureFixture
) -> None:
    """Logged once, counted, told to ``on_error``; the connection is closed, the callbacks run."""

    async def work(conn: Connection) -> None:
        if hook == "work":
            raise Unrelated("no good")
        await conn.next(1)
        if mode == "handler":
            await within(story.disconnected.wait())

    story = Story(mode, **{mode: work, hook: work if hook == "work" else raising})
    async with local(**story.options()) as server:
        with connected(server) as peer:
            await send_all(peer, b"x")
            if hook == "on_disconnect":
                await holds(lambda: mode in story.told)
                peer.shutdown(socket.SHUT_WR)
            assert await turned_away(peer)
        reason = await story.ends(server, errors=1)
        assert hook == "on_disconnect" or reason == "error"
    [record] = errors(log)
    assert (record.name, record.levelname) == ("anypoll.server", "ERROR")
    text = logging.Formatter().format(record)
    assert "Traceback" in text
    assert "Unrelated: no good" in text
    [failure] = story.failures
    assert type(failure) is Unrelated
    story.forget()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("mode", MODES)
async def test_an_exception_in_on_error_is_only_logged(
    mode: str, plain: bool, log: pytest.LogCaptureFixture
) -> None:
    """It may be a plain function as well."""
    told: list[tuple[Connection, str]] = []

    async def failing(_conn: Connection) -> None:
        raise Unrelated("no good")

    def on_error(conn: Connection, exc: Exception) -> None:
        told.append((conn, repr(exc)))
        raise ZeroDivisionError("neither")

    story = Story(mode, on_connect=failing, on_error=failing)
    options = story.options() | ({"on_error": on_error} if plain else {})
    async with local(**options) as server:
        for n in (1, 2):
            async with client(server) as peer:
                assert await read_to_end(peer) == b""
            await ends(server, error=n)
            assert not plain or told.pop() == (story.conn, "Unrelated('no good')")
            story.conn = None
        assert server.statistics().handler_errors == 2
    texts = [record.getMessage() for record in errors(log)]
    assert [text.startswith("on_error has failed for") for text in texts] == [False, True] * 2
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_what_a_peer_can_cause_in_a_hook_is_only_counted(mode: str) -> None:
    story = Story(mode, on_connect=next_byte, on_disconnect=next_byte)  # the end of the stream
    async with local(**story.options()) as server:
        async with client(server):
            pass
        assert await story.ends(server) == "eof"
    assert story.told == ["on_prepare", "on_connect", "on_disconnect", "on_close"]
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_on_prepare_must_be_a_plain_function(
    mode: str, log: pytest.LogCaptureFixture
) -> None:
    """It cannot always be seen beforehand. What a plain one returns is nobody's affair."""

    async def prepare(conn: Connection) -> None:
        pytest.fail("it was awaited")

    def innocent(conn: Connection) -> Any:
        return prepare(conn)

    async with local(**{mode: consume}, on_prepare=innocent) as server:  # type: ignore[arg-type]
        async with client(server) as peer:
            assert await read_to_end(peer) == b""
        await ends(server, error=1)
    [record] = errors(log)
    assert "must be a plain function" in logging.Formatter().format(record)
    async with (
        local(**{mode: consume}, on_prepare=lambda conn: True) as server,  # type: ignore[arg-type, return-value]
        client(server) as peer,
    ):
        await send_all(peer, b"x")
        peer.shutdown(socket.SHUT_WR)
        assert await read_to_end(peer) == b""
    assert server.statistics().handler_errors == 0


# --- the peer goes -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("at", ["on_prepare", "on_connect", "work", "on_disconnect", "on_close"])
@pytest.mark.parametrize("mode", MODES)
async def test_a_peer_that_goes_at_any_time(mode: str, at: str, end: str) -> None:
    """L33: whatever runs then ends first, and nothing is called twice or left out."""
    peer: socket.socket

    def prepare(_conn: Connection) -> None:
        if at == "on_prepare":
            ENDS[end](peer)

    async def go(stage: str, conn: Connection) -> None:
        if at == stage:
            ENDS[end](peer)
            if stage != "on_close":
                await known_gone(conn)

    async def work(conn: Connection) -> None:
        await conn.skip(len(conn.reader))
        await go("work", conn)
        if at == "on_close":
            await conn.aclose()
            return
        if at == "on_disconnect":
            peer.shutdown(socket.SHUT_WR)
        if mode == "handler":
            await within(story.disconnected.wait())

    stages = {name: partial(go, name) for name in ("on_connect", "on_disconnect", "on_close")}
    story = Story(mode, on_prepare=prepare, **stages, **{mode: work})
    async with local(**story.options()) as server:
        peer = connected(server)
        await send_all(peer, b"x")
        await story.ends(server)
        peer.close()
    told = story.told
    assert told[:2] == ["on_prepare", "on_connect"]
    assert told.count("on_disconnect") == (at != "on_close")
    if end == "FIN" or at not in ("on_prepare", "on_connect"):
        assert mode in told
    story.forget()


# --- whoever learns it ---------------------------------------------------------------------------


async def raises(conn: Any, _disconnected: anyio.Event) -> None:
    await conn.send(b"y")


async def returns(_conn: Any, _disconnected: anyio.Event) -> None:
    pass


async def goes_on(_conn: Any, disconnected: anyio.Event) -> None:
    await within(disconnected.wait())


async def is_cancelled(conn: Any, _disconnected: anyio.Event) -> None:
    await stubborn(conn)


async def reads_on(conn: Any, _disconnected: anyio.Event) -> None:
    await conn.receive()


async def queues(conn: Any, _disconnected: anyio.Event) -> None:
    async with ShardQueue(conn) as queue:
        await queue.add(b"y")


#: What a handler does after it was told, and the reasons that its end may have.
AFTERWARDS: dict[Callable[[Any, anyio.Event], Awaitable[None]], set[str]] = {
    raises: {"broken"},
    returns: {"done"},
    goes_on: {"done"},
    is_cancelled: {"disconnected"},
    reads_on: {"broken", "eof"},  # "eof": the server is ending
    queues: {"broken"},
}


@pytest.mark.parametrize(
    ("learned", "afterwards"),
    [
        *itertools.product(["tcp-written", "tls-written"], AFTERWARDS),
        *itertools.product(["unix-written", "tcp-read"], [raises, goes_on]),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("mode", MODES)
async def test_an_end_is_told_whoever_learns_it(
    mode: str,
    afterwards: Callable[[Any, anyio.Event], Awaitable[None]],
    learned: str,
    deaf: Callable[[], Awaitable[None]],
    tmp_path: Path,
) -> None:
    """Once, and to everybody: also if the loop has taken the socket's error with a write, and the
    handler ends before any poller has heard of the end.
    """
    kind, _, way = learned.partition("-")
    disconnected, lost = anyio.Event(), anyio.Event()
    told = 0
    peer: Connection | TLSConnection

    async def handle(conn: Any) -> None:
        await conn.until(b"\n")
        if way == "written":
            await deaf()
        (peer.connection if isinstance(peer, TLSConnection) else peer).abort()
        try:
            with pytest.raises(BrokenResourceError):  # or it is cancelled, if it waits
                await (conn.send(b"x") if way == "written" else conn.receive())
            assert not conn.is_active
        finally:
            lost.set()
        await afterwards(conn, disconnected)

    async def disconnect(_conn: Any) -> None:
        nonlocal told
        told += 1
        disconnected.set()

    options: dict[str, Any] = {mode: handle, "on_disconnect": disconnect}
    if kind == "unix":
        options["path"] = tmp_path / "socket"
    else:
        options.update(host=HOST, port=0)
    if kind == "tls":
        options["ssl_context"] = server_context()
    cancel = afterwards is is_cancelled
    async with anypoll.serve(**options, cancel_on_disconnect=cancel) as server:
        if kind == "unix":
            peer = await anypoll.connect_unix(options["path"])
        elif kind == "tls":
            context = client_context()
            peer = await anypoll.connect_tcp(
                HOST, server.port, tls=True, ssl_context=context, tls_hostname="anypoll.test"
            )
        else:
            peer = await anypoll.connect_tcp(HOST, server.port)
        await peer.send(b"x\n")
        await within(lost.wait())
        if afterwards is not reads_on:  # the end of the server is told to whoever reads
            await within(disconnected.wait())
            if mode == "handler":
                await holds(lambda: not server.connections)
            _epoll.clear_faults()
            await holds(lambda: not server.connections)
    assert told == 1
    [reason] = server.statistics().closed
    graceful = AFTERWARDS[afterwards] == {"done"} and mode == "on_request"
    assert reason in ({"broken", "eof"} if graceful else AFTERWARDS[afterwards])
    await peer.aclose()


def in_the_kernel(conn: Connection) -> int:
    """How many bytes have arrived that no poller has read."""
    unread = fcntl.ioctl(conn.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(unread, sys.byteorder)


@pytest.mark.parametrize("kind", ["unread", "paused"])
async def test_an_end_behind_unread_input(kind: str) -> None:
    """On_disconnect is not for later: the handler does something else, and nobody reads."""
    data = pattern(2 * KIB if kind == "unread" else 192 * KIB)

    def prepare(conn: Connection) -> None:  # the FIN comes only if all that is before it fits
        raw = conn.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * len(data))

    async def work(conn: Connection) -> None:
        await within(story.disconnected.wait())
        assert bytes(await conn.reader.read_bytes(len(data))) == data
        with pytest.raises(EndOfStream):
            await conn.next(1)
        assert conn.at_eof

    async def disconnect(conn: Connection) -> None:
        assert conn.is_active
        assert (in_the_kernel(conn) > 0) == (kind == "paused")
        assert bytes(await conn.peek(100)) == data[:100]

    story = Story(on_prepare=prepare, handler=work, on_disconnect=disconnect)
    async with local(**story.options(), read_high_water=4 * KIB) as server:
        with connected(server) as peer:
            await within(send_all(peer, data))
            peer.shutdown(socket.SHUT_WR)
            assert await story.ends(server) == "done"
    assert story.told == ["on_prepare", "on_connect", "handler", "on_disconnect", "on_close"]
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_a_peer_that_has_ended_its_side_is_answered(mode: str) -> None:
    """Also behind the end of the handler."""

    async def goodbye(conn: Connection) -> None:
        assert conn.is_active
        await conn.send(b"good")
        conn.writer.write(b"bye")

    async def work(conn: Connection) -> None:
        await conn.next(1)
        await known_gone(conn)

    story = Story(mode, **{mode: work}, on_disconnect=goodbye)
    async with local(**story.options()) as server:
        async with client(server) as peer:
            await send_all(peer, b"x")
            peer.shutdown(socket.SHUT_WR)
            assert await read_to_end(peer) == b"goodbye"
        assert await story.ends(server) in {"done", "eof"}
    story.forget()


@pytest.mark.parametrize("hooks", [False, True])
async def test_a_fin_alone_closes_nothing(hooks: bool) -> None:
    """In handler mode. The handler may go on sending for as long as it likes."""
    go_on = anyio.Event()

    async def work(conn: Connection) -> None:
        await go_on.wait()
        for _ in range(100):
            await conn.send(bytes(KIB))

    story = Story(handler=work)
    options = story.options(*([] if hooks else ["on_disconnect"]))
    async with local(**options) as server, client(server) as peer:
        peer.shutdown(socket.SHUT_WR)
        await holds(lambda: "handler" in story.told)
        assert story.conn is not None
        await known_gone(story.conn)
        if hooks:
            await within(story.disconnected.wait())
        await anyio.wait_all_tasks_blocked()
        assert story.conn.is_active
        assert server.statistics().closed == {}
        go_on.set()
        assert await read_to_end(peer) == bytes(100 * KIB)
    assert server.statistics().closed == {"done": 1}
    story.forget()


async def own_aclose(conn: Connection) -> None:
    await conn.aclose()


async def own_abort(conn: Connection) -> None:
    conn.abort()


async def own_return(conn: Connection) -> None:
    conn.writer.write(b"that was it")


async def own_eof(conn: Connection) -> None:
    await conn.send_eof()


async def own_cancellation(conn: Connection) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await conn.next(1)


async def own_detach(conn: Connection) -> None:
    conn.detach()[0].close()


async def own_timeout(conn: Connection) -> None:
    conn.idle_timeout = 0.01
    with pytest.raises(IdleTimeout):
        await conn.next(1)


OWN = [own_aclose, own_abort, own_return, own_eof, own_cancellation, own_detach, own_timeout]


@pytest.mark.parametrize("end", OWN)
@pytest.mark.parametrize("mode", MODES)
async def test_an_own_end_is_no_disconnect(
    mode: str, end: Callable[[Connection], Awaitable[None]]
) -> None:
    """Nor is what the peer does about it."""

    async def work(conn: Connection) -> None:
        await conn.next(1)
        await end(conn)
        assert not gone(conn)
        if mode == "on_request":
            await conn.aclose()

    story = Story(mode, **{mode: work})
    async with local(**story.options()) as server:
        async with client(server) as peer:
            await send_all(peer, b"x")
            try:
                await read_to_end(peer)
            except ConnectionResetError:
                assert end is own_abort
        await story.ends(server)
    assert story.told == ["on_prepare", "on_connect", mode, "on_close"]
    story.forget()


async def test_an_idle_end_is_no_disconnect() -> None:
    """Of a connection that nobody looks at, too."""
    story = Story("on_request")
    async with local(**story.options(), idle_timeout=0.02) as server, client(server) as peer:
        assert await read_to_end(peer) == b""
        await story.ends(server)
    assert "on_disconnect" not in story.told
    story.forget()


# --- refusing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "detach"])
@pytest.mark.parametrize("mode", MODES)
async def test_on_prepare_may_refuse(mode: str, how: str) -> None:
    """Nothing else is called but the close callbacks; the others are served."""
    refuse = True

    def prepare(conn: Connection) -> None:
        if refuse:
            conn.abort() if how == "abort" else conn.detach()[0].close()

    story = Story(mode, on_prepare=prepare, **{mode: consume})
    async with local(**story.options()) as server:
        async with client(server) as peer:
            if how == "abort":
                with pytest.raises(ConnectionResetError):
                    await read_to_end(peer)
            else:
                assert await read_to_end(peer) == b""
        assert await story.ends(server) == "refused"
        assert story.told == ["on_prepare", "on_close"]
        refuse = False
        story.conn = None
        async with client(server) as peer:
            await send_all(peer, b"x")
            peer.shutdown(socket.SHUT_WR)
            assert await read_to_end(peer) == b""
    assert server.statistics().handler_errors == 0
    story.forget()


@pytest.mark.parametrize("how", [own_aclose, own_abort])
@pytest.mark.parametrize("mode", MODES)
async def test_on_connect_may_refuse(
    mode: str, how: Callable[[Connection], Awaitable[None]]
) -> None:
    story = Story(mode, on_connect=how)
    async with local(**story.options()) as server:
        async with client(server) as peer:
            assert await turned_away(peer)
        await story.ends(server)
    assert story.told == ["on_prepare", "on_connect", "on_close"]
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_on_prepare_may_end_everything(mode: str) -> None:
    """By what is no `Exception`. What was accepted with that connection ends with it."""

    class Stop(BaseException):
        pass

    calls = 0

    def prepare(conn: Connection) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    with anyio.fail_after(30), pytest.raises(BaseException) as caught:  # noqa: PT012
        async with local(**{mode: consume}, on_prepare=prepare) as server:  # type: ignore[arg-type]
            socks = [connected(server) for _ in range(10)]
            await anyio.sleep_forever()
    assert "Stop()" in repr(caught.value)
    for sock in socks:
        assert await turned_away(sock)
        sock.close()
    statistics = server.statistics()
    assert server.connections == ()
    assert (statistics.accepted, statistics.active) == (3, 0)
    assert sum(statistics.closed.values()) == 3


# --- cancel_on_disconnect ------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("end", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("mode", MODES)
async def test_the_handler_is_cancelled_when_the_peer_goes(mode: str, end: str, hook: bool) -> None:
    """And nothing is drained then."""

    async def work(conn: Connection) -> None:
        conn.writer.write(b"for nobody")
        try:
            await stubborn(conn)
        finally:
            story.told.append("cancelled")

    story = Story(mode, **{mode: work})
    options = story.options(*([] if hook else ["on_disconnect"]))
    async with local(**options, cancel_on_disconnect=True) as server:
        with connected(server) as peer:
            await send_all(peer, b"x")
            await holds(lambda: mode in story.told)
            if end == "half-close":
                peer.shutdown(socket.SHUT_WR)
                assert await turned_away(peer)
            else:
                ENDS[end](peer)
            assert await story.ends(server) == "disconnected"
    rest = [name for name in story.told if name != "on_disconnect"]
    assert rest == ["on_prepare", "on_connect", mode, "cancelled", "on_close"]
    assert story.told.count("on_disconnect") == hook
    story.forget()


@pytest.mark.parametrize("mode", MODES)
async def test_on_connect_is_not_cancelled(mode: str) -> None:
    """L33: what comes behind it relies on what it has done. The handler then begins cancelled."""

    async def connect(conn: Connection) -> None:
        await known_gone(conn)
        await anyio.sleep(0)
        conn.state = "whole"

    async def disconnect(conn: Connection) -> None:
        assert conn.state == "whole"

    story = Story(mode, on_connect=connect, **{mode: stubborn}, on_disconnect=disconnect)
    async with local(**story.options(), cancel_on_disconnect=True) as server:
        with connected(server) as peer:
            await send_all(peer, b"x")
        assert await story.ends(server) == "disconnected"
    assert sorted(story.told) == sorted(
        ["on_prepare", "on_connect", mode, "on_disconnect", "on_close"]
    )
    story.forget()


async def test_a_cancelled_handler_may_still_fail_or_return(
    log: pytest.LogCaptureFixture,
) -> None:
    """What it does about it counts as from any handler."""

    async def fail(conn: Connection) -> None:
        try:
            await stubborn(conn)
        finally:
            raise Unrelated

    async def shielded(conn: Connection) -> None:
        with anyio.CancelScope(shield=True):
            await known_gone(conn)

    for handler, reason, failures in ((fail, "error", 1), (shielded, "done", 0)):
        story = Story(handler=handler)
        async with local(**story.options(), cancel_on_disconnect=True) as server:
            with connected(server):
                await holds(lambda: "handler" in story.told)  # noqa: B023
            assert await story.ends(server, failures) == reason
        assert len(errors(log)) == failures
        story.forget()


# --- ends by force -------------------------------------------------------------------------------

STUCK = ["on_connect", "work", "on_disconnect", "on_disconnect behind", "on_error", "on_close"]


def stuck_story(mode: str, where: str, stuck: anyio.Event) -> Story:
    """A server's hooks, one of which never ends by itself."""

    async def never(conn: Connection) -> None:
        stuck.set()
        await stubborn(conn)

    async def work(conn: Connection) -> None:
        await consume(conn)
        if where == "work":
            await never(conn)
        elif where == "on_disconnect":
            await stubborn(conn)
        elif where == "on_disconnect behind":
            await known_gone(conn)
        elif where == "on_error":
            raise Unrelated
        elif where == "on_close":
            await conn.aclose()

    name = where.split(maxsplit=1)[0]
    return Story(mode, **{mode: work} | ({} if where == "work" else {name: never}))


def ended_by_force(story: Story, server: anypoll.Server) -> None:
    assert server.connections == ()
    assert server.shutting_down
    assert story.told.count("on_close") == 1
    assert len(story.told) == len(set(story.told))
    statistics = server.statistics()
    assert (statistics.accepted, statistics.active) == (1, 0)
    assert sum(statistics.closed.values()) == 1
    story.forget()


@pytest.mark.parametrize("how", ["exception", "cancelled", "timeout"])
@pytest.mark.parametrize("where", STUCK)
@pytest.mark.parametrize("mode", MODES)
async def test_an_end_by_force_during_each_of_them(
    mode: str, where: str, how: str, log: pytest.LogCaptureFixture
) -> None:
    """Everything has ended when the block has, without grace but for the timeout; its own exception
    leaves unchanged. To the handler it is no disconnect.
    """
    stuck = anyio.Event()
    story = stuck_story(mode, where, stuck)
    mine = Unrelated("mine")
    caught: BaseException | None = None
    options: dict[str, Any] = {"shutdown_timeout": 0.05}
    at_once = where == "work" and how != "timeout"
    if at_once:
        options = {"shutdown_timeout": FOR_EVER, "cancel_on_disconnect": True}
    with anyio.fail_after(30), anyio.CancelScope() as scope:
        try:
            async with local(**story.options(), **options) as server:
                with connected(server) as peer:
                    await send_all(peer, b"x")
                    if "disconnect" in where:
                        peer.shutdown(socket.SHUT_WR)
                    await within(stuck.wait())
                    if how == "exception":
                        raise mine
                    if how == "cancelled":
                        scope.cancel()
                        await anyio.sleep_forever()
        except Unrelated as exc:
            caught = exc
    assert caught is (mine if how == "exception" else None)
    assert scope.cancelled_caught == (how == "cancelled")
    if at_once:
        assert story.told == ["on_prepare", "on_connect", mode, "on_close"]
        assert server.statistics().closed == {"cancelled": 1}
    assert len(errors(log)) == (where in ("on_error", "on_close"))
    mine.__traceback__ = None
    del caught
    ended_by_force(story, server)


async def test_a_refusal_and_the_end_of_the_server_at_once(log: pytest.LogCaptureFixture) -> None:
    """A connection that never got so far ends once, also in request mode."""
    for hook in (raising, lambda conn: conn.abort()):
        stuck = anyio.Event()

        async def never(conn: Connection, stuck: anyio.Event = stuck) -> None:
            stuck.set()
            await stubborn(conn)

        story = Story("on_request", on_prepare=hook, on_error=never, on_close=never)
        with pytest.raises(Unrelated, match="mine"):  # noqa: PT012
            async with local(**story.options(), shutdown_timeout=0.05) as server, client(server):
                await within(stuck.wait())
                raise Unrelated("mine")
        ended_by_force(story, server)
    errors(log)


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("where", STUCK)
async def test_a_native_cancel_during_each_of_them(
    where: str, log: pytest.LogCaptureFixture
) -> None:
    """Of the task that serves, by asyncio's own `Task.cancel()`."""
    stuck = anyio.Event()
    story = stuck_story("handler", where, stuck)
    servers: list[anypoll.Server] = []

    async def serve() -> None:
        async with local(**story.options(), shutdown_timeout=0.05) as server:
            servers.append(server)
            await asyncio.sleep(1e6)

    task = asyncio.ensure_future(serve())
    await holds(lambda: servers)
    with connected(servers[0]) as peer:
        await send_all(peer, b"x")
        if "disconnect" in where:
            peer.shutdown(socket.SHUT_WR)
        await within(stuck.wait())
        task.cancel()
        with anyio.fail_after(30), pytest.raises(asyncio.CancelledError):
            await task
    errors(log)
    ended_by_force(story, servers[0])


TEARDOWN = """
import asyncio, socket
import anypoll

async def never(conn):
    await asyncio.sleep(1e6)

async def main():
    ready = asyncio.get_running_loop().create_future()

    async def serve():
        async with anypoll.serve(never, host="127.0.0.1", port=0, on_disconnect=never) as server:
            ready.set_result(server)
            await asyncio.sleep(1e6)

    task = asyncio.create_task(serve())
    server = await ready
    peer = socket.create_connection(("127.0.0.1", server.port))
    while not server.connections:
        await asyncio.sleep(0.001)
    [conn] = server.connections
    for _ in range(10):
        await asyncio.sleep(0)
    # as the hub does; in the loop's last round, so the task for the hook does not begin any more
    asyncio.current_task().add_done_callback(lambda _: conn._core.watcher())
    return task, peer

asyncio.run(main())[1].close()
print("over")
"""


def test_a_hook_that_has_not_begun_when_the_loop_is_torn_down(
    foreign_env: dict[str, str],
) -> None:
    """`asyncio.run()` cancels all tasks at its end, and one that has not begun never does: nobody
    may wait for it.
    """
    never_begun = "ignore:coroutine 'DisconnectHook._run':RuntimeWarning"  # of AnyIO's task group
    done = run_to_end(
        [sys.executable, "-W", "error", "-W", never_begun, "-c", textwrap.dedent(TEARDOWN)]
    )
    assert (done.stdout, done.stderr, done.returncode) == ("over\n", "", 0)


@pytest.mark.parametrize("mode", MODES)
def test_under_the_run_function_of_each_loop(
    mode: str, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Not `anyio.run()`, which tells everybody in which event loop they are. Tasks begin from its
    callbacks, too.
    """

    async def work(conn: Connection) -> None:
        await once(conn)
        if mode == "handler":
            await within(story.disconnected.wait())

    async def main() -> None:
        nonlocal story
        story = Story(mode, **{mode: work})
        async with local(**story.options()) as server:
            with connected(server) as peer:
                await holds(lambda: mode == "on_request" or mode in story.told)
                await anyio.wait_all_tasks_blocked()
                await is_served(peer)
            await story.ends(server)

    story: Story
    name, options = anyio_backend
    if name == "trio":
        trio.run(main)
    else:
        with asyncio.Runner(**options) as runner:  # which is what their run functions use
            runner.run(main())
    assert story.told == ["on_prepare", "on_connect", mode, "on_disconnect", "on_close"]
    story.forget()

"""Connections and listeners as Trio's, under plain ``trio.run``: Trio's own conformance suite, what
it leaves out, and what Trio builds on streams.
"""

from __future__ import annotations

import errno
import functools
import inspect
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute
from anyio.streams.stapled import MultiListener
from peers import (
    KIB,
    MIB,
    arrive,
    holds,
    opened,
    pattern,
    read_all,
    reset,
    socket_pair,
    within,
)

import anypoll
from anypoll import _epoll
from anypoll.integrations.trio import (
    TrioListener,
    TrioStream,
    open_tcp_listeners,
    open_tcp_stream,
    open_unix_socket,
    serve_tcp,
)

trustme = pytest.importorskip("trustme")

pytestmark = pytest.mark.trio

Pair = tuple[TrioStream, TrioStream]
Maker = Callable[[], Awaitable[Pair]]

kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


@pytest.fixture
def fault() -> Iterator[Callable[..., None]]:
    """`set_fault`, undone after the test."""
    yield _epoll.set_fault
    _epoll.clear_faults()


async def pair(kind: str) -> Pair:
    """Two streams, connected, with small buffers in the kernel."""
    sockets = socket_pair(kind)
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * KIB)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * KIB)
    first, second = [TrioStream(await anypoll.Connection.from_socket(s)) for s in sockets]
    return first, second


async def clog(stream: TrioStream) -> None:
    """Gives up a send of more than the kernel and the peer's read-ahead take: its rest is in the
    way of what is sent next.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(2 * MIB))
        await holds(lambda: stream.connection.statistics().bytes_sent)
        nursery.cancel_scope.cancel()
    assert stream.connection.statistics().buffered_output


async def clogged_pair(kind: str) -> Pair:
    first, second = await pair(kind)
    await clog(first)
    await clog(second)
    return first, second


def address(listener: TrioListener) -> Any:
    return listener.listener.extra(SocketAttribute.local_address)


# --- Trio's conformance suite --------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "check",
    [
        trio.testing.check_one_way_stream,
        trio.testing.check_two_way_stream,
        trio.testing.check_half_closeable_stream,
    ],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("clogged", [False, True], ids=["clear", "clogged"])
async def test_conformance(check: Any, kind: str, clogged: bool) -> None:
    clogged_maker = functools.partial(clogged_pair, kind) if clogged else None
    await within(check(functools.partial(pair, kind), clogged_maker), 50)


# --- streams -------------------------------------------------------------------------------------


async def test_a_stream_is_over_a_connection() -> None:
    with pytest.raises(TypeError, match=r"expected an anypoll\.Connection, got object"):
        TrioStream(object())  # type: ignore[arg-type]


async def test_a_stream_says_what_it_is_over() -> None:
    async with opened() as (conn, _):
        assert repr(TrioStream(conn)) == f"<anypoll.integrations.trio.TrioStream over {conn!r}>"


@kinds
async def test_every_call_is_a_checkpoint(kind: str) -> None:
    """Also when nothing has to be waited for, nothing is to be done, or it was done before."""
    first, second = await pair(kind)

    async def checkpointed(call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        with trio.testing.assert_checkpoints():
            return await call(*arguments)

    async with first, second:
        await checkpointed(first.send_all, b"")
        await checkpointed(first.send_all, b"xyz")
        await checkpointed(first.wait_send_all_might_not_block)
        await holds(lambda: second.connection.reader.buffered == 3)
        assert await checkpointed(second.receive_some, 1) == b"x"
        assert await checkpointed(second.receive_some) == b"yz"
        await checkpointed(first.send_eof)
        await checkpointed(first.send_eof)
        await holds(lambda: second.connection.at_eof)
        assert await checkpointed(second.receive_some) == b""
        assert await checkpointed(second.receive_some) == b""
        await checkpointed(first.aclose)
        await checkpointed(first.aclose)


@kinds
async def test_a_cancelled_call_has_done_nothing(kind: str) -> None:
    first, second = await pair(kind)

    async def cancelled(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await call(*arguments)
        assert scope.cancelled_caught

    async with first, second:
        await first.send_all(b"first")
        await holds(lambda: second.connection.reader.buffered == 5)
        await cancelled(second.receive_some)
        await cancelled(first.send_all, b"lost")
        await cancelled(first.send_all, b"")
        await cancelled(first.wait_send_all_might_not_block)
        await cancelled(first.send_eof)
        await first.send_all(b" second")
        await first.send_eof()
        assert b"".join([piece async for piece in second]) == b"first second"
        await cancelled(second.receive_some)


async def test_a_cancelled_close_has_closed() -> None:
    first, second = await pair("unix")
    async with second:
        fd = first.connection.fileno()
        with trio.CancelScope() as scope:
            scope.cancel()
            await first.aclose()
        assert scope.cancelled_caught
        assert first.connection.fileno() == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            socket.socket(fileno=fd)
        assert await second.receive_some() == b""


@kinds
async def test_the_end_comes_after_the_data_and_stays(kind: str) -> None:
    async with opened(kind) as (conn, peer):
        stream = TrioStream(conn)
        peer.send(b"last words")
        peer.shutdown(socket.SHUT_WR)
        await holds(lambda: conn.reader.buffered == 10)
        assert await stream.receive_some(4) == b"last"
        assert await stream.receive_some() == b" words"
        assert await stream.receive_some() == b""
        assert await stream.receive_some(1) == b""
        await stream.send_all(b"still there")  # half-closed is not closed
        assert await read_all(peer, 11) == b"still there"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (-(1 << 70), ValueError),
        (1.5, TypeError),
        ("1", TypeError),
        (b"1", TypeError),
    ],
)
async def test_a_wrong_max_bytes_is_refused(wrong: Any, error: type[Exception]) -> None:
    async with opened() as (conn, peer):
        await arrive(conn, peer, b"intact")
        with pytest.raises(error):
            await TrioStream(conn).receive_some(wrong)
        assert await TrioStream(conn).receive_some(1 << 70) == b"intact"


@pytest.mark.parametrize("wrong", ["text", 3, None, [1, 2]])
async def test_only_bytes_are_sent(wrong: Any) -> None:
    async with opened() as (conn, peer):
        with pytest.raises(TypeError):
            await TrioStream(conn).send_all(wrong)
        await TrioStream(conn).send_all(memoryview(b"-fine-")[1:5])
        assert peer.recv(100) == b"fine"


@kinds
async def test_data_may_be_changed_after_send_all(kind: str) -> None:
    first, second = await pair(kind)
    sent = pattern(1 * MIB)
    data = bytearray(sent)

    async def send() -> None:
        await first.send_all(data)
        data.clear()
        await first.send_eof()

    async with first, second, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert b"".join([piece async for piece in second]) == sent


@kinds
async def test_the_rest_of_a_cancelled_send_keeps_its_bytes(kind: str) -> None:
    """Any prefix may have been sent, says Trio: here it is all of it, as it was."""
    first, second = await pair(kind)
    sent = pattern(1 * MIB)
    data = bytearray(sent)
    async with first, second:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.send_all, data)
            await holds(lambda: first.connection.statistics().bytes_sent)
            nursery.cancel_scope.cancel()
        data.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.send_eof)
            assert b"".join([piece async for piece in second]) == sent


async def test_the_writer_and_the_stream_share_the_output() -> None:
    first, second = await pair("unix")
    async with first, second:
        first.connection.writer.write(b"header ")
        await first.send_all(b"body")
        first.connection.writer.write(b" trailer")
        await first.send_eof()
        assert bytes(await second.connection.next(7)) == b"header "
        assert b"".join([piece async for piece in second]) == b"body trailer"


# --- their exceptions ----------------------------------------------------------------------------


async def test_a_reset_is_a_broken_resource() -> None:
    """With the error of the socket as its cause, as Trio's own stream has it."""
    async with opened("tcp") as (conn, peer):
        stream = TrioStream(conn)
        reset(peer)
        await holds(lambda: not conn.is_active)
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="reset by peer") as caught:
                await stream.receive_some()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
            with pytest.raises(trio.BrokenResourceError, match=r"\w") as caught:
                await stream.send_all(b"x")
            assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_eof()
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()


async def test_a_peer_that_is_gone_breaks_what_is_sent() -> None:
    async with opened() as (conn, peer):
        peer.close()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await TrioStream(conn).send_all(b"x")
        assert isinstance(caught.value.__cause__, OSError)


@kinds
async def test_a_reset_wakes_who_waits(kind: str) -> None:
    first, second = await clogged_pair(kind)

    async def sees_it(call: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await call()

    async with first, second, trio.open_nursery() as nursery:
        nursery.start_soon(sees_it, first.wait_send_all_might_not_block)
        await trio.testing.wait_all_tasks_blocked()
        second.connection.abort()


@kinds
async def test_closing_wakes_who_waits(kind: str) -> None:
    first, second = await pair(kind)
    await clog(first)

    async def sees_it(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call(*arguments)

    async with first, second, trio.open_nursery() as nursery:
        nursery.start_soon(sees_it, first.receive_some)
        nursery.start_soon(sees_it, first.send_all, b"x")
        await trio.testing.wait_all_tasks_blocked()
        await first.aclose()


async def test_two_at_once_are_told_so() -> None:
    first, second = await clogged_pair("unix")
    third, fourth = await pair("unix")

    async def conflicts(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        with pytest.raises(trio.BusyResourceError, match="nother task") as caught:
            await call(*arguments)
        assert isinstance(caught.value.__cause__, anyio.BusyResourceError)

    async with first, second, third, fourth, trio.open_nursery() as nursery:
        nursery.start_soon(third.receive_some)
        nursery.start_soon(first.send_all, b"x")
        await trio.testing.wait_all_tasks_blocked()
        await conflicts(third.receive_some)
        await conflicts(first.send_all, b"")
        await conflicts(first.send_all, b"y")
        await conflicts(first.send_eof)
        await conflicts(first.wait_send_all_might_not_block)
        await third.send_all(b"duplex")
        assert await fourth.receive_some() == b"duplex"
        nursery.cancel_scope.cancel()


async def test_nothing_is_sent_after_the_end() -> None:
    first, second = await pair("unix")
    async with first, second:
        await first.send_eof()
        for data in (b"x", b""):
            with pytest.raises(trio.ClosedResourceError):
                await first.send_all(data)
        await second.send_all(b"but received")
        assert await first.receive_some() == b"but received"


async def test_all_calls_but_aclose_fail_after_the_close() -> None:
    first, second = await pair("unix")
    async with second:
        await first.aclose()
        for call in (
            first.receive_some,
            first.wait_send_all_might_not_block,
            first.send_eof,
            functools.partial(first.send_all, b"x"),
            functools.partial(first.send_all, b""),
        ):
            with pytest.raises(trio.ClosedResourceError) as caught:
                await call()
            assert isinstance(caught.value.__cause__, anyio.ClosedResourceError)


async def test_an_idle_end_is_a_broken_resource() -> None:
    async with opened() as (conn, _):
        stream = TrioStream(conn)
        _epoll.conn_set_idle(conn._core.handle, 1_000_000)
        with pytest.raises(trio.BrokenResourceError, match="idle") as caught:
            await within(stream.receive_some())
        assert isinstance(caught.value.__cause__, anypoll.IdleTimeout)
        with pytest.raises(trio.BrokenResourceError, match="idle"):
            await stream.send_all(b"x")


async def test_the_connections_timeouts_leave_the_stream_usable() -> None:
    first, second = await pair("unix")
    async with first, second:
        first.connection.read_timeout = first.connection.write_timeout = 0.01
        with pytest.raises(anypoll.ReadTimeout):
            await first.receive_some()
        with pytest.raises(anypoll.WriteTimeout):
            await first.send_all(bytes(2 * MIB))
        await second.send_all(b"x")
        await holds(lambda: first.connection.reader.buffered)
        assert await first.receive_some() == b"x"


# --- listeners -----------------------------------------------------------------------------------


async def tcp_listener() -> anypoll.SocketListener:
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    [listener] = multi.listeners
    assert isinstance(listener, anypoll.SocketListener)
    return listener


async def unix_listener(directory: Path) -> anypoll.SocketListener:
    return await anypoll.create_unix_listener(directory / "socket")


async def listener_of(form: str, directory: Path) -> TrioListener:
    if form == "tcp":
        return TrioListener(await tcp_listener())
    if form == "unix":
        return TrioListener(await unix_listener(directory))
    nested = MultiListener([await tcp_listener()])
    return TrioListener(MultiListener([nested, await unix_listener(directory)]))


forms = pytest.mark.parametrize("form", ["tcp", "unix", "several"])


def connected(listener: Any) -> socket.socket:
    """A client's socket; the listener need not have accepted it yet."""
    sock = socket.socket(listener.extra(SocketAttribute.family))
    sock.connect(listener.extra(SocketAttribute.local_address))
    return sock


def sockets_of(listener: TrioListener) -> list[anypoll.SocketListener]:
    return list(listener._listeners)


@pytest.mark.parametrize("wrong", [None, 3, "127.0.0.1", MultiListener([None])])  # type: ignore[list-item]
async def test_a_listener_is_over_anypolls(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected an anypoll\.SocketListener"):
        TrioListener(wrong)


async def test_a_listener_is_over_at_least_one() -> None:
    with pytest.raises(ValueError, match="without any listener"):
        TrioListener(MultiListener([]))


async def test_a_listener_says_what_it_is_over() -> None:
    async with TrioListener(await tcp_listener()) as listener:
        assert repr(listener.listener) in repr(listener)


@forms
async def test_accept(form: str, tmp_path: Path) -> None:
    async with await listener_of(form, tmp_path) as listener:
        for socket_listener in sockets_of(listener):
            for wait_first in (False, True):
                with connected(socket_listener) as client:
                    if wait_first:
                        await trio.testing.wait_all_tasks_blocked()
                    with trio.testing.assert_checkpoints():
                        stream = await within(listener.accept())
                    async with stream:
                        assert isinstance(stream, TrioStream)
                        client.sendall(b"hello")
                        assert await stream.receive_some() == b"hello"


@forms
async def test_a_cancelled_accept_loses_no_connection(form: str, tmp_path: Path) -> None:
    """Cancelled before it began, while it waits, and at any moment of taking what has come."""
    streams: list[TrioStream] = []
    async with await listener_of(form, tmp_path) as listener:
        below = sockets_of(listener)

        async def accept() -> None:
            streams.append(await listener.accept())

        clients = []
        for moment in range(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                if moment % 3 == 0:
                    await trio.testing.wait_all_tasks_blocked()
                clients.append(connected(below[moment % len(below)]))
                for _ in range(moment // 2):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        while len(streams) < len(clients):
            await within(accept())
        for stream in streams:
            await stream.aclose()
        for client in clients:
            assert client.recv(1) == b""
            client.close()


@pytest.fixture
def accepts_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accept of two listeners at once returns both connections in the same moment."""
    accept = anypoll.SocketListener.accept
    came: list[anypoll.Connection] = []

    async def together(self: anypoll.SocketListener) -> anypoll.Connection:
        connection = await accept(self)
        came.append(connection)
        with trio.CancelScope(shield=True):
            await holds(lambda: len(came) == 2)
        return connection

    monkeypatch.setattr(anypoll.SocketListener, "accept", together)


async def several(directory: Path) -> tuple[TrioListener, list[socket.socket]]:
    """A listener over two, with a client for each."""
    listener = await listener_of("several", directory)
    clients = [connected(below) for below in sockets_of(listener)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    return listener, clients


@pytest.mark.usefixtures("accepts_end_together")
async def test_connections_that_come_at_once_are_accepted_in_turn(tmp_path: Path) -> None:
    listener, clients = await several(tmp_path)
    async with listener:
        got = set()
        for _ in clients:
            with trio.testing.assert_checkpoints():
                stream = await within(listener.accept())
            async with stream:
                got.add(await stream.receive_some())
        assert got == {b"0", b"1"}
    for client in clients:
        client.close()


@pytest.mark.usefixtures("accepts_end_together")
async def test_what_was_accepted_and_not_taken_is_reset(tmp_path: Path) -> None:
    listener, clients = await several(tmp_path)
    async with listener:
        with trio.CancelScope() as scope:
            await trio.lowlevel.checkpoint()
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
    with pytest.raises(ConnectionResetError):
        clients[0].recv(1)
    for client in clients:
        client.close()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


@forms
async def test_one_task_accepts_at_a_time(form: str, tmp_path: Path) -> None:
    async with await listener_of(form, tmp_path) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="another task"):
            await listener.accept()
        nursery.cancel_scope.cancel()


async def test_one_task_accepts_at_a_time_also_below() -> None:
    below = await tcp_listener()
    async with TrioListener(below) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(below.accept)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await listener.accept()
        nursery.cancel_scope.cancel()


@forms
async def test_closing_a_listener(form: str, tmp_path: Path) -> None:
    listener = await listener_of(form, tmp_path)

    async def sees_it() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sees_it)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await listener.aclose()
    await sees_it()
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.aclose()
    assert scope.cancelled_caught


@forms
async def test_a_cancelled_close_has_closed_every_listener(form: str, tmp_path: Path) -> None:
    listener = await listener_of(form, tmp_path)
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.aclose()
    assert scope.cancelled_caught
    for below in sockets_of(listener):
        assert below.extra(SocketAttribute.raw_socket).fileno() == -1


@forms
async def test_a_listener_that_has_failed_raises_the_error(
    form: str, tmp_path: Path, fault: Callable[..., None]
) -> None:
    """Trio's listeners know no BrokenResourceError."""
    async with await listener_of(form, tmp_path) as listener:
        fault("ACCEPT", errno.EINVAL)
        with connected(sockets_of(listener)[0]):
            with pytest.raises(OSError, match="Invalid argument") as caught:
                await within(listener.accept())
            assert caught.value.errno == errno.EINVAL
            await (await within(listener.accept())).aclose()


# --- what Trio builds on streams and listeners ---------------------------------------------------


async def echo(stream: trio.abc.Stream) -> None:
    async for piece in stream:
        await stream.send_all(piece)


async def echoes(stream: trio.abc.Stream, data: bytes) -> None:
    """Sends and receives at the same time."""
    received = bytearray()

    async def receive() -> None:
        while len(received) < len(data):
            piece = await stream.receive_some()
            assert piece
            received.extend(piece)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await stream.send_all(data)
    assert received == data


@forms
async def test_serve_listeners(form: str, tmp_path: Path) -> None:
    """Every stream ends with its handler, everything with the nursery."""
    listener = await listener_of(form, tmp_path)
    streams: list[TrioStream] = []

    async def handler(stream: TrioStream) -> None:
        streams.append(stream)
        await echo(stream)
        if len(streams) % 2:
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        assert await nursery.start(trio.serve_listeners, handler, [listener]) == [listener]
        for below in sockets_of(listener) * 2:
            client = await anypoll.Connection.from_socket(connected(below))
            async with TrioStream(client) as stream:
                await echoes(stream, pattern(300 * KIB))
                await stream.send_eof()
                assert await stream.receive_some() == b""
        left = await anypoll.Connection.from_socket(connected(sockets_of(listener)[0]))
        await echoes(TrioStream(left), b"the last one")
        nursery.cancel_scope.cancel()
    assert [s.connection.fileno() for s in streams] == [-1] * (2 * len(sockets_of(listener)) + 1)
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
    await left.aclose()


async def test_an_exception_of_a_handler_ends_serve_listeners() -> None:
    """That is Trio's rule; nothing is left of the server then."""
    listener = TrioListener(await tcp_listener())
    waiting = trio.Event()

    async def handler(stream: TrioStream) -> None:
        if waiting.is_set():
            raise ZeroDivisionError
        waiting.set()
        await stream.receive_some()

    with connected(listener.listener) as first:
        with pytest.RaisesGroup(pytest.RaisesGroup(ZeroDivisionError)):
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, handler, [listener])
                await within(waiting.wait())
                with connected(listener.listener):
                    await trio.sleep_forever()
        assert first.recv(1) == b""
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_a_lack_of_resources_is_the_pollers_affair(
    code: int, fault: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The pause, and the line in the log, are those of the listener below; Trio's own are not
    needed, and accepting goes on.
    """
    listener = TrioListener(await tcp_listener())
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [listener])
        fault("ACCEPT", code, times=2)
        client = await anypoll.Connection.from_socket(connected(listener.listener))
        async with TrioStream(client) as stream:
            await within(echoes(stream, b"at last"))
        nursery.cancel_scope.cancel()
    assert [(r.name, r.levelno) for r in caplog.records] == [("anypoll.server", logging.WARNING)]


async def test_a_connection_that_cannot_be_opened_is_retried_by_trio(
    fault: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Here the error comes out of `accept()`, and Trio takes its pause."""
    listener = TrioListener(await tcp_listener())
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [listener])
        await trio.testing.wait_all_tasks_blocked()
        with connected(listener.listener) as unlucky:
            fault("EPOLL_CTL", errno.ENOMEM)
            unlucky.settimeout(30)
            assert await trio.to_thread.run_sync(unlucky.recv, 1) == b""
        client = await anypoll.Connection.from_socket(connected(listener.listener))
        async with TrioStream(client) as stream:
            await within(echoes(stream, b"at last"))
        nursery.cancel_scope.cancel()
    logged = [(record.name, record.levelno) for record in caplog.records]
    caplog.clear()  # the traceback there holds the connection
    assert logged == [("trio.serve_listeners", logging.ERROR)]


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a client and of a server that the client trusts."""
    authority = trustme.CA()
    client = ssl.create_default_context()
    authority.configure_trust(client)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("example.org").configure_cert(server)
    # a ticket that nobody reads would make the close of a TCP socket a RST
    server.num_tickets = 0
    return client, server


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
TLSPair = tuple["trio.SSLStream[TrioStream]", "trio.SSLStream[TrioStream]"]


async def tls_pair(kind: str, contexts: Contexts) -> TLSPair:
    first, second = await pair(kind)
    client = trio.SSLStream(first, contexts[0], server_hostname="example.org")
    server = trio.SSLStream(second, contexts[1], server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


@kinds
async def test_conformance_of_tls(kind: str, contexts: Contexts) -> None:
    await within(trio.testing.check_two_way_stream(lambda: tls_pair(kind, contexts), None), 50)


@kinds
async def test_tls_both_ways(kind: str, contexts: Contexts) -> None:
    client, server = await tls_pair(kind, contexts)
    async with client, server, trio.open_nursery() as nursery:
        nursery.start_soon(echo, server)
        await echoes(client, pattern(1 * MIB))
        await client.aclose()  # the close_notify is the echo's end
    assert client.transport_stream.connection.fileno() == -1
    assert server.transport_stream.connection.fileno() == -1


@kinds
async def test_tls_is_unwrapped_and_the_stream_goes_on(kind: str, contexts: Contexts) -> None:
    client, server = await tls_pair(kind, contexts)
    ends: dict[str, Any] = {}

    async def unwrap(name: str, stream: trio.SSLStream[TrioStream]) -> None:
        ends[name] = await stream.unwrap()

    await client.send_all(b"secret")
    assert await server.receive_some() == b"secret"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(unwrap, "client", client)
        nursery.start_soon(unwrap, "server", server)
    assert [trailing for _, trailing in ends.values()] == [b"", b""]
    first, second = ends["client"][0], ends["server"][0]
    async with first, second:
        assert isinstance(first, TrioStream)
        await first.send_all(b"in the clear")
        assert bytes(await second.connection.next(12)) == b"in the clear"


async def test_tls_that_is_cut_off_is_broken(contexts: Contexts) -> None:
    client, server = await tls_pair("tcp", contexts)
    async with server:
        await client.transport_stream.aclose()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, ssl.SSLEOFError)


async def test_a_peer_without_the_right_certificate_is_refused(contexts: Contexts) -> None:
    first, second = await pair("tcp")
    client = trio.SSLStream(first, contexts[0], server_hostname="example.com")
    server = trio.SSLStream(second, contexts[1], server_side=True)

    async def refused(stream: trio.SSLStream[TrioStream]) -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.do_handshake()
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, client)
        nursery.start_soon(refused, server)


async def test_serve_listeners_over_tls(contexts: Contexts) -> None:
    listener = TrioListener(await tcp_listener())
    tls: trio.SSLListener[TrioStream] = trio.SSLListener(listener, contexts[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [tls])
        plain = await open_tcp_stream("127.0.0.1", address(listener)[1])
        async with trio.SSLStream(plain, contexts[0], server_hostname="example.org") as stream:
            await echoes(stream, pattern(200 * KIB))
        nursery.cancel_scope.cancel()


async def test_tls_over_a_connection_of_a_server(contexts: Contexts) -> None:
    """A handler of `anypoll.serve` that hands its connection to Trio's TLS."""

    async def handler(conn: anypoll.Connection) -> None:
        async with trio.SSLStream(TrioStream(conn), contexts[1], server_side=True) as stream:
            await echo(stream)

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        plain = await open_tcp_stream("127.0.0.1", server.port)
        async with trio.SSLStream(plain, contexts[0], server_hostname="example.org") as stream:
            await echoes(stream, pattern(200 * KIB))


async def test_a_peer_that_goes_is_no_error_of_a_servers_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Or peers could fill the log of `anypoll.serve` whose handlers speak Trio."""

    async def reading(conn: anypoll.Connection) -> None:
        await TrioStream(conn).receive_some()

    async def reading_after_the_close(conn: anypoll.Connection) -> None:
        await conn.aclose()
        await TrioStream(conn).receive_some()

    for handler, reason in ((reading, "broken"), (reading_after_the_close, "closed")):
        async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                await holds(lambda: server.statistics().accepted)
                reset(client)
                await holds(lambda: server.statistics().closed)
        assert server.statistics().closed == {reason: 1}
        assert server.statistics().handler_errors == 0
    assert caplog.records == []


async def test_the_end_of_another_stream_is_an_error_of_the_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(conn: anypoll.Connection) -> None:
        async with opened("tcp") as (other, peer):
            reset(peer)
            await TrioStream(other).receive_some()

    async with anypoll.serve(handler, host="127.0.0.1", port=0) as server:
        with socket.create_connection(("127.0.0.1", server.port)):
            await holds(lambda: server.statistics().closed)
        assert server.statistics().handler_errors == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    caplog.clear()  # the traceback there holds the connection


# --- opening -------------------------------------------------------------------------------------


async def test_the_names_and_parameters_are_trios() -> None:
    for ours in (open_tcp_stream, open_unix_socket, open_tcp_listeners, serve_tcp):
        theirs = getattr(trio, ours.__name__)
        expected = inspect.signature(theirs).parameters.values()
        actual = inspect.signature(ours).parameters.values()
        assert [(p.name, p.kind) for p in actual] == [(p.name, p.kind) for p in expected]
        assert [p.default for p in actual] == [p.default for p in expected]


@pytest.mark.parametrize("host", ["127.0.0.1", b"127.0.0.1", "::1"])
async def test_open_tcp(host: Any) -> None:
    [listener] = await open_tcp_listeners(0, host=host)
    async with listener:
        port = address(listener)[1]
        async with (
            await open_tcp_stream(host, port, happy_eyeballs_delay=None) as client,
            await within(listener.accept()) as stream,
        ):
            await client.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            assert stream.connection.local_address == client.connection.remote_address


async def test_open_tcp_stream_from_an_address() -> None:
    [listener] = await open_tcp_listeners(0, host="127.0.0.1", backlog=5)
    async with listener:
        port = address(listener)[1]
        async with await open_tcp_stream("127.0.0.1", port, local_address="127.0.0.9") as client:
            assert client.connection.local_address[0] == "127.0.0.9"


async def test_one_listener_for_both_families() -> None:
    [listener] = await open_tcp_listeners(0)
    async with listener:
        for host in ("127.0.0.1", "::1"):
            async with (
                await open_tcp_stream(host, address(listener)[1]),
                await within(listener.accept()),
            ):
                pass


async def test_open_unix_socket(tmp_path: Path) -> None:
    async with TrioListener(await unix_listener(tmp_path)) as listener:
        for name in (tmp_path / "socket", str(tmp_path / "socket"), bytes(tmp_path / "socket")):
            async with await open_unix_socket(name) as client, await listener.accept() as stream:
                assert isinstance(stream.connection, anypoll.UNIXConnection)
                await client.send_all(b"hello")
                assert await stream.receive_some() == b"hello"


async def test_nobody_listens(tmp_path: Path) -> None:
    [listener] = await open_tcp_listeners(0, host="127.0.0.1")
    port = address(listener)[1]
    await listener.aclose()
    with pytest.raises(OSError, match="attempts failed") as caught:
        await open_tcp_stream("127.0.0.1", port)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    with pytest.raises(FileNotFoundError):
        await open_unix_socket(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: open_tcp_stream(None, 80), ValueError),  # type: ignore[arg-type]
        (lambda: open_tcp_stream("127.0.0.1", "80"), TypeError),  # type: ignore[arg-type]
        (lambda: open_tcp_listeners("80"), TypeError),  # type: ignore[arg-type]
        (lambda: open_tcp_listeners(-1), ValueError),
        (lambda: open_tcp_listeners(65536), ValueError),
        (lambda: open_tcp_listeners(0, host="127.0.0.1", backlog=1.5), TypeError),  # type: ignore[arg-type]
    ],
)
async def test_nonsense_is_refused(
    call: Callable[[], Awaitable[Any]], error: type[Exception]
) -> None:
    with pytest.raises(error, match="must be"):
        await call()


@pytest.mark.parametrize("host", ["é..b".encode(), b"::1%\xff", b"127.0.0.1\0", "\ud800"])
async def test_text_that_is_no_host(host: str | bytes) -> None:
    for call in (open_tcp_stream(host, 1), open_tcp_listeners(0, host=host)):
        with pytest.raises(socket.gaierror):
            await call


async def test_serve_tcp() -> None:
    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_tcp, echo, 0, host="127.0.0.1", handler_nursery=nursery)
        [listener] = await nursery.start(serve)
        async with await open_tcp_stream("127.0.0.1", address(listener)[1]) as stream:
            await echoes(stream, pattern(200 * KIB))
        nursery.cancel_scope.cancel()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_a_connection_with_messages_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = await anypoll.create_unix_listener(path, kind=socket.SOCK_SEQPACKET)
    async with listener, await anypoll.connect_unix(path, kind=socket.SOCK_SEQPACKET) as conn:
        with pytest.raises(ValueError, match="not a socket with messages"):
            TrioStream(conn)

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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute
from anyio.streams.stapled import MultiListener
from certificates import client_context, server_context
from peers import KIB, MIB, arrive, holds, opened, pattern, read_all, reset, socket_pair, within
from serving import ends, faults_are_undone, local  # noqa: F401

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

pytestmark = pytest.mark.trio

Pair = tuple[TrioStream, TrioStream]
Maker = Callable[[], Awaitable[Pair]]

kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


async def pair(kind: str) -> Pair:
    """Two streams, connected, with small buffers in the kernel."""
    sockets = socket_pair(kind)
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * KIB)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * KIB)
    first, second = [TrioStream(await anypoll.Connection.from_socket(s)) for s in sockets]
    return first, second


@asynccontextmanager
async def paired(kind: str = "unix") -> AsyncIterator[Pair]:
    first, second = await pair(kind)
    async with first, second:
        yield first, second


async def read_on(stream: trio.abc.ReceiveStream) -> bytes:
    """All up to the end."""
    return b"".join([piece async for piece in stream])


async def arrived(stream: TrioStream, size: int) -> None:
    await holds(lambda: stream.connection.reader.buffered == size)


async def cancelled(call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    """Calls it in a scope that is cancelled already."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await call(*arguments)
    assert scope.cancelled_caught


async def raises(error: Any, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """The cause of what the call raises."""
    with pytest.raises(error) as caught:
        await call(*arguments)
    return caught.value.__cause__


async def clog(stream: TrioStream, data: bytes | bytearray = bytes(2 * MIB)) -> None:
    """Gives up a send of more than the kernel and the peer's read-ahead take: its rest is in the
    way of what is sent next.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
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
    async with opened() as (conn, _):
        assert repr(TrioStream(conn)) == f"<anypoll.integrations.trio.TrioStream over {conn!r}>"


async def test_a_connection_with_messages_is_no_stream(tmp_path: Path) -> None:
    path, kind = tmp_path / "s", socket.SOCK_SEQPACKET
    listener = await anypoll.create_unix_listener(path, kind=kind)
    async with listener, await anypoll.connect_unix(path, kind=kind) as conn:
        with pytest.raises(ValueError, match="not a socket with messages"):
            TrioStream(conn)


@kinds
async def test_every_call_is_a_checkpoint(kind: str) -> None:
    """Also when nothing has to be waited for, nothing is to be done, or it was done before."""

    async def checkpointed(call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        with trio.testing.assert_checkpoints():
            return await call(*arguments)

    async with paired(kind) as (first, second):
        await checkpointed(first.send_all, b"")
        await checkpointed(first.send_all, b"xyz")
        await checkpointed(first.wait_send_all_might_not_block)
        await arrived(second, 3)
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
    async with paired(kind) as (first, second):
        await first.send_all(b"first")
        await arrived(second, 5)
        await cancelled(second.receive_some)
        await cancelled(first.send_all, b"lost")
        await cancelled(first.send_all, b"")
        await cancelled(first.wait_send_all_might_not_block)
        await cancelled(first.send_eof)
        await first.send_all(b" second")
        await first.send_eof()
        assert await read_on(second) == b"first second"
        await cancelled(second.receive_some)


async def test_a_cancelled_close_has_closed() -> None:
    async with paired() as (first, second):
        fd = first.connection.fileno()
        await cancelled(first.aclose)
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
        await arrived(stream, 10)
        assert await stream.receive_some(4) == b"last"
        assert await stream.receive_some() == b" words"
        assert await stream.receive_some() == b""
        assert await stream.receive_some(1) == b""
        await stream.send_all(b"still there")  # half-closed is not closed
        assert await read_all(peer, 11) == b"still there"


async def test_any_number_and_any_bytes() -> None:
    async with opened() as (conn, peer):
        stream = TrioStream(conn)
        await arrive(conn, peer, b"intact")
        assert await stream.receive_some(1 << 70) == b"intact"
        await stream.send_all(memoryview(b"-fine-")[1:5])
        assert peer.recv(100) == b"fine"


@kinds
async def test_data_may_be_changed_after_send_all(kind: str) -> None:
    sent = pattern(1 * MIB)
    data = bytearray(sent)

    async def send() -> None:
        await first.send_all(data)
        data.clear()
        await first.send_eof()

    async with paired(kind) as (first, second), trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await read_on(second) == sent


@kinds
async def test_the_rest_of_a_cancelled_send_keeps_its_bytes(kind: str) -> None:
    """Any prefix may have been sent, says Trio: here it is all of it, as it was."""
    sent = pattern(1 * MIB)
    data = bytearray(sent)
    async with paired(kind) as (first, second):
        await clog(first, data)
        data.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.send_eof)
            assert await read_on(second) == sent


async def test_the_writer_and_the_stream_share_the_output() -> None:
    async with paired() as (first, second):
        first.connection.writer.write(b"header ")
        await first.send_all(b"body")
        first.connection.writer.write(b" trailer")
        await first.send_eof()
        assert bytes(await second.connection.next(7)) == b"header "
        assert await read_on(second) == b"body trailer"


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
            cause = await raises(trio.BrokenResourceError, stream.send_all, b"x")
            assert isinstance(cause, OSError)
        await raises(trio.BrokenResourceError, stream.send_eof)
        await stream.aclose()
        await raises(trio.ClosedResourceError, stream.receive_some)


async def test_a_peer_that_is_gone_breaks_what_is_sent() -> None:
    async with opened() as (conn, peer):
        peer.close()
        cause = await raises(trio.BrokenResourceError, TrioStream(conn).send_all, b"x")
        assert isinstance(cause, OSError)


@kinds
async def test_an_end_wakes_who_waits(kind: str) -> None:
    """A reset, and the own close."""
    first, second = await clogged_pair(kind)
    async with first, second, trio.open_nursery() as nursery:
        wait = first.wait_send_all_might_not_block
        nursery.start_soon(raises, trio.BrokenResourceError, wait)
        await trio.testing.wait_all_tasks_blocked()
        second.connection.abort()
    async with paired(kind) as (first, second):
        await clog(first)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raises, trio.ClosedResourceError, first.receive_some)
            nursery.start_soon(raises, trio.ClosedResourceError, first.send_all, b"x")
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


async def test_calls_after_the_end() -> None:
    """Nothing is sent behind send_eof(), and nothing but aclose() works behind that."""
    async with paired() as (first, second):
        await first.send_eof()
        for data in (b"x", b""):
            await raises(trio.ClosedResourceError, first.send_all, data)
        await second.send_all(b"but received")
        assert await first.receive_some() == b"but received"
        await second.aclose()
        for call in (
            second.receive_some,
            second.wait_send_all_might_not_block,
            second.send_eof,
            functools.partial(second.send_all, b"x"),
            functools.partial(second.send_all, b""),
        ):
            cause = await raises(trio.ClosedResourceError, call)
            assert isinstance(cause, anyio.ClosedResourceError)


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
    async with paired() as (first, second):
        first.connection.read_timeout = first.connection.write_timeout = 0.01
        await raises(anypoll.ReadTimeout, first.receive_some)
        await raises(anypoll.WriteTimeout, first.send_all, bytes(2 * MIB))
        await second.send_all(b"x")
        await arrived(first, 1)
        assert await first.receive_some() == b"x"


# --- listeners -----------------------------------------------------------------------------------


async def tcp_listener() -> anypoll.SocketListener:
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    [listener] = multi.listeners
    assert isinstance(listener, anypoll.SocketListener)
    return listener


async def listener_of(form: str, directory: Path) -> TrioListener:
    if form == "tcp":
        return TrioListener(await tcp_listener())
    unix = await anypoll.create_unix_listener(directory / "socket")
    if form == "unix":
        return TrioListener(unix)
    return TrioListener(MultiListener([MultiListener([await tcp_listener()]), unix]))


forms = pytest.mark.parametrize("form", ["tcp", "unix", "several"])


def connected(listener: Any) -> socket.socket:
    """A client's socket; the listener need not have accepted it yet."""
    sock = socket.socket(listener.extra(SocketAttribute.family))
    sock.connect(listener.extra(SocketAttribute.local_address))
    return sock


async def client_of(listener: Any) -> TrioStream:
    return TrioStream(await anypoll.Connection.from_socket(connected(listener)))


def sockets_of(listener: TrioListener) -> list[anypoll.SocketListener]:
    return list(listener._listeners)


async def test_what_a_listener_is_over() -> None:
    with pytest.raises(ValueError, match="without any listener"):
        TrioListener(MultiListener([]))
    with pytest.raises(TypeError, match=r"expected an anypoll\.SocketListener"):
        TrioListener(MultiListener([None]))  # type: ignore[list-item]
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


async def test_connections_that_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are accepted in turn; what nobody has taken is reset when the listener closes."""
    accept = anypoll.SocketListener.accept
    came: list[anypoll.Connection] = []

    async def together(self: anypoll.SocketListener) -> anypoll.Connection:
        connection = await accept(self)
        came.append(connection)
        with trio.CancelScope(shield=True):
            await holds(lambda: len(came) % 2 == 0)
        return connection

    monkeypatch.setattr(anypoll.SocketListener, "accept", together)
    listener = TrioListener(MultiListener([await tcp_listener(), await tcp_listener()]))
    clients = [connected(below) for below in sockets_of(listener) * 2]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    got = []
    for _ in range(3):
        with trio.testing.assert_checkpoints():
            stream = await within(listener.accept())
        async with stream:
            got.append(await stream.receive_some())
    await listener.aclose()
    assert sorted(got[:2]) == [b"0", b"1"]
    [left] = {b"2", b"3"} - {*got}
    with pytest.raises(ConnectionResetError):
        clients[int(left)].recv(1)
    for client in clients:
        client.close()
    await raises(trio.ClosedResourceError, listener.accept)


@pytest.mark.parametrize("form", ["tcp", "unix", "several", "below"])
async def test_one_task_accepts_at_a_time(form: str, tmp_path: Path) -> None:
    """Also if the other one accepts from the listener below."""
    below = form == "below"
    listener = await listener_of("tcp" if below else form, tmp_path)
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(sockets_of(listener)[0].accept if below else listener.accept)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="nother task"):
            await listener.accept()
        nursery.cancel_scope.cancel()


@forms
@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_closing_a_listener(form: str, how: str, tmp_path: Path) -> None:
    """Its descriptors are closed also if the call is cancelled."""
    listener = await listener_of(form, tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raises, trio.ClosedResourceError, listener.accept)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            if how == "cancelled":
                await cancelled(listener.aclose)
            else:
                with trio.testing.assert_checkpoints():
                    await listener.aclose()
    await raises(trio.ClosedResourceError, listener.accept)
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
            async with await client_of(below) as stream:
                await echoes(stream, pattern(300 * KIB))
                await stream.send_eof()
                assert await stream.receive_some() == b""
        left = await client_of(sockets_of(listener)[0])
        await echoes(left, b"the last one")
        nursery.cancel_scope.cancel()
    assert [s.connection.fileno() for s in streams] == [-1] * (2 * len(sockets_of(listener)) + 1)
    await raises(trio.ClosedResourceError, listener.accept)
    await left.aclose()


async def test_a_lack_of_resources_is_the_pollers_affair(
    fault: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The pause, and the line in the log, are those of the listener below; Trio's own are not
    needed, and accepting goes on.
    """
    listener = TrioListener(await tcp_listener())
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [listener])
        fault("ACCEPT", errno.EMFILE, times=2)
        async with await client_of(listener.listener) as stream:
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
        async with await client_of(listener.listener) as stream:
            await within(echoes(stream, b"at last"))
        nursery.cancel_scope.cancel()
    logged = [(record.name, record.levelno) for record in caplog.records]
    caplog.clear()  # the traceback there holds the connection
    assert logged == [("trio.serve_listeners", logging.ERROR)]


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a client and of a server that the client trusts."""
    server = server_context(lenient=False)
    # a ticket that nobody reads would make the close of a TCP socket a RST
    server.num_tickets = 0
    return client_context(), server


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
TLSPair = tuple["trio.SSLStream[TrioStream]", "trio.SSLStream[TrioStream]"]


async def tls_pair(kind: str, contexts: Contexts) -> TLSPair:
    first, second = await pair(kind)
    client = trio.SSLStream(first, contexts[0], server_hostname="anypoll.test")
    server = trio.SSLStream(second, contexts[1], server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


@kinds
async def test_conformance_of_tls(kind: str, contexts: Contexts) -> None:
    await within(trio.testing.check_two_way_stream(lambda: tls_pair(kind, contexts), None), 50)


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
        cause = await raises(trio.BrokenResourceError, server.receive_some)
        assert isinstance(cause, ssl.SSLEOFError)


@pytest.mark.parametrize("of", ["trio.serve_listeners", "anypoll.serve"])
async def test_a_server_with_trios_tls(of: str, contexts: Contexts) -> None:
    async def handler(conn: anypoll.Connection) -> None:
        async with trio.SSLStream(TrioStream(conn), contexts[1], server_side=True) as stream:
            await echo(stream)

    async def talk(port: int) -> None:
        plain = await open_tcp_stream("127.0.0.1", port)
        async with trio.SSLStream(plain, contexts[0], server_hostname="anypoll.test") as stream:
            await echoes(stream, pattern(200 * KIB))

    if of == "anypoll.serve":
        async with local(handler) as server:
            await talk(server.port)
        return
    listener = TrioListener(await tcp_listener())
    tls: trio.SSLListener[TrioStream] = trio.SSLListener(listener, contexts[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [tls])
        await talk(address(listener)[1])
        nursery.cancel_scope.cancel()


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
        async with local(handler) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                await holds(lambda: server.statistics().accepted)
                reset(client)
                await ends(server, **{reason: 1})
        assert server.statistics().handler_errors == 0
    assert caplog.records == []


async def test_the_end_of_another_stream_is_an_error_of_the_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(conn: anypoll.Connection) -> None:
        async with opened("tcp") as (other, peer):
            reset(peer)
            await TrioStream(other).receive_some()

    async with local(handler) as server:
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


@pytest.mark.parametrize("host", ["127.0.0.1", b"127.0.0.1", "::1", None])
async def test_open_tcp(host: Any) -> None:
    """Without a host, one listener for both families."""
    [listener] = await open_tcp_listeners(0, host=host)
    async with listener:
        port = address(listener)[1]
        for each in ("127.0.0.1", "::1") if host is None else (host,):
            async with (
                await open_tcp_stream(each, port, happy_eyeballs_delay=None) as client,
                await within(listener.accept()) as stream,
            ):
                await client.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                assert stream.connection.local_address[1] == port


async def test_open_tcp_stream_from_an_address() -> None:
    [listener] = await open_tcp_listeners(0, host="127.0.0.1", backlog=5)
    async with listener:
        port = address(listener)[1]
        async with await open_tcp_stream("127.0.0.1", port, local_address="127.0.0.9") as client:
            assert client.connection.local_address[0] == "127.0.0.9"
    cause = await raises(OSError, open_tcp_stream, "127.0.0.1", port)
    assert isinstance(cause, ConnectionRefusedError)


async def test_open_unix_socket(tmp_path: Path) -> None:
    await raises(FileNotFoundError, open_unix_socket, tmp_path / "socket")
    async with await listener_of("unix", tmp_path) as listener:
        for name in (tmp_path / "socket", str(tmp_path / "socket"), bytes(tmp_path / "socket")):
            async with await open_unix_socket(name) as client, await listener.accept() as stream:
                assert isinstance(stream.connection, anypoll.UNIXConnection)
                await client.send_all(b"hello")
                assert await stream.receive_some() == b"hello"


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
    await raises(trio.ClosedResourceError, listener.accept)

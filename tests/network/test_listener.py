"""Listeners as AnyIO's: accepting, what happens when it is given up or fails, and sockets of all
kinds to listen on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import gc
import logging
import os
import random
import resource
import select
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio import BusyResourceError, ClosedResourceError
from anyio.abc import SocketAttribute
from anyio.streams.stapled import MultiListener
from peers import blocked, holds, pollers_have_looked, settle, within

import anypoll
from anypoll import Connection, SocketListener, UNIXConnection
from anypoll._network import binding

pytestmark = pytest.mark.anyio

ACCEPTING = "Another task is already accepting connections from this resource"


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def tcp(host: str | None = "127.0.0.1", **options: Any) -> AsyncIterator[SocketListener]:
    """The only listener of that host."""
    async with await anypoll.create_tcp_listener(local_host=host, **options) as multi:
        [made] = multi.listeners
        assert isinstance(made, SocketListener)
        yield made


@pytest.fixture
async def listener(kind: str, tmp_path: Path) -> AsyncIterator[SocketListener]:
    made: Any = tcp() if kind == "tcp" else await anypoll.create_unix_listener(tmp_path / "socket")
    async with made as listening:
        yield listening


def client_of(listener: Any) -> socket.socket:
    """A plain socket, connected to it (it waits in the kernel's backlog)."""
    raw = raw_of(listener)
    client = socket.socket(raw.family)
    client.settimeout(30)
    client.connect(raw.getsockname())
    return client


def take_from_backlog(listener: SocketListener) -> None:
    """Past the poller."""
    raw = raw_of(listener)
    assert select.select([raw], [], [], 30)[0]
    raw.accept()[0].close()


async def ping(client: socket.socket, conn: Connection) -> None:
    """Proves that the two are connected to each other."""
    token = random.randbytes(8)
    client.sendall(token)
    assert await within(conn.next(8)) == token


@asynccontextmanager
async def accepted(listener: SocketListener) -> AsyncIterator[tuple[socket.socket, Connection]]:
    """A client, and the connection to it."""
    with client_of(listener) as client:
        async with await within(listener.accept()) as conn:
            yield client, conn


async def accepts(listener: SocketListener) -> None:
    async with accepted(listener) as (client, conn):
        await ping(client, conn)


async def cancelled(call: Callable[[], Awaitable[Any]]) -> None:
    """Calls it in a scope that is cancelled already."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call()
    assert scope.cancelled_caught


def raw_of(listener: Any) -> socket.socket:
    return listener.extra(SocketAttribute.raw_socket)  # type: ignore[no-any-return]


def address_of(listener: Any) -> Any:
    return listener.extra(SocketAttribute.local_address)


# --- accept --------------------------------------------------------------------------------------


async def test_accept(listener: SocketListener, kind: str) -> None:
    async with accepted(listener) as (client, conn):
        assert type(conn) is (Connection if kind == "tcp" else UNIXConnection)
        raw = raw_of(conn)
        assert raw.gettimeout() == 0
        assert not os.get_inheritable(raw.fileno())
        if kind == "tcp":
            assert conn.remote_address == client.getsockname()
            assert conn.local_address == client.getpeername()
        assert conn.server is None
        await listener.aclose()  # which the connection outlives
        await ping(client, conn)


async def test_accept_waits(listener: SocketListener) -> None:
    """One at a time."""
    async with blocked(listener.accept) as outcome:
        with pytest.raises(BusyResourceError, match=f"^{ACCEPTING}$"):
            await listener.accept()
        client = client_of(listener)
    with client:
        async with outcome[0] as conn:
            await ping(client, conn)


async def test_accepts_in_order(listener: SocketListener) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(client_of(listener)) for _ in range(20)]
        for client in clients:
            async with await within(listener.accept()) as conn:
                await ping(client, conn)


async def test_accept_takes_no_more_than_is_asked_for(listener: SocketListener) -> None:
    """The others stay in the kernel's backlog, where another process could accept them."""
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(client_of(listener))
        async with await within(listener.accept()):
            await settle()
            assert listener._ready == type(listener._ready)()
            for _ in range(4):
                take_from_backlog(listener)
            with pytest.raises(BlockingIOError):
                raw_of(listener).accept()


@pytest.mark.parametrize("waits", ["in accept()", "for the raw socket"])
async def test_closing_wakes_who_waits(listener: SocketListener, waits: str) -> None:
    raw = raw_of(listener)
    wait = listener.accept if "accept" in waits else functools.partial(anyio.wait_readable, raw)
    async with blocked(wait) as outcome:
        await within(listener.aclose())
        assert raw.fileno() == -1
    assert type(outcome[0]) is ClosedResourceError
    for _ in range(2):
        with pytest.raises(ClosedResourceError):
            await listener.accept()


async def test_accept_is_a_checkpoint(listener: SocketListener) -> None:
    with client_of(listener), client_of(listener):
        for _ in range(3):
            await cancelled(listener.accept)
        for _ in range(2):
            async with await within(listener.accept()):
                pass


@pytest.mark.parametrize("seed", range(3))
async def test_cancellation_races_of_accept(listener: SocketListener, seed: int) -> None:
    """Accepts are cancelled at random moments around a connection's arrival. Every connection is
    accepted by somebody.
    """
    random_ = random.Random(seed)
    conns: list[Connection] = []

    async def accept(scope: anyio.CancelScope) -> None:
        with scope:
            conns.append(await listener.accept())

    with ExitStack() as stack:
        clients = []
        for _ in range(40):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                group.start_soon(accept, scope)
                for _ in range(random_.randrange(4)):
                    await anyio.sleep(0)
                if random_.random() < 0.7:
                    clients.append(stack.enter_context(client_of(listener)))
                for _ in range(random_.randrange(4)):
                    await anyio.sleep(0)
                scope.cancel()
        while len(conns) < len(clients):
            conns.append(await within(listener.accept()))
        for client, conn in zip(clients, conns, strict=True):
            await ping(client, conn)
            await conn.aclose()


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_native_cancel_after_the_wake_up_loses_no_connection(
    listener: SocketListener,
) -> None:
    for _ in range(10):
        task = asyncio.ensure_future(listener.accept())
        while not listener._hub.waits(listener._number):
            await asyncio.sleep(0)
        with client_of(listener) as client:
            while listener._hub.waits(listener._number):
                await asyncio.sleep(0)
            task.cancel()
            try:
                conn = await task
            except asyncio.CancelledError:
                conn = await within(listener.accept())
            await ping(client, conn)
            await conn.aclose()


async def test_a_credit_of_a_cancelled_accept_is_taken_back(listener: SocketListener) -> None:
    """Nothing is accepted for an accept() that is over: the backlog keeps it."""
    async with anyio.create_task_group() as group:
        group.start_soon(listener.accept)
        await settle()
        group.cancel_scope.cancel()
    with client_of(listener):
        await pollers_have_looked()
        take_from_backlog(listener)


async def test_a_peer_that_has_gone_before_it_is_accepted(listener: SocketListener) -> None:
    client = client_of(listener)
    client.sendall(b"hello and goodbye")
    client.close()
    async with await within(listener.accept()) as conn:
        assert b"".join([piece async for piece in conn]) == b"hello and goodbye"


# --- closing -------------------------------------------------------------------------------------


async def test_aclose(listener: SocketListener) -> None:
    raw = raw_of(listener)
    assert type(raw) is socket.socket
    assert raw.gettimeout() == 0
    assert raw is raw_of(listener)
    name = raw.getsockname()
    assert f"fd={raw.fileno()}" in repr(listener)
    await listener.aclose()
    assert raw.fileno() == -1
    assert raw_of(listener) is raw
    assert "closed" in repr(listener)
    await listener.aclose()
    with socket.socket(raw.family) as client, pytest.raises(ConnectionRefusedError):
        client.connect(name)


async def test_aclose_in_a_cancelled_scope(listener: SocketListener) -> None:
    for _ in range(2):
        await cancelled(listener.aclose)
        assert raw_of(listener).fileno() == -1


async def test_several_listeners_are_closed_in_a_cancelled_scope() -> None:
    """AnyIO's own MultiListener stops behind the first."""
    made = [await anypoll.create_tcp_listener(local_host="127.0.0.1") for _ in range(2)]
    several = made[0]
    several.listeners = [each for multi in made for each in multi.listeners]
    raws = [raw_of(each) for each in several.listeners]
    await cancelled(several.aclose)
    assert [raw.fileno() for raw in raws] == [-1, -1]


async def test_closing_drops_who_was_not_accepted(listener: SocketListener) -> None:
    with client_of(listener) as client:
        await listener.aclose()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


async def test_a_connection_that_cannot_be_set_up_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error goes to whoever accepts; the peer is told."""

    def refuse(_fd: int) -> None:
        raise OSError(errno.ENOBUFS, "no buffers")

    async with tcp() as listener:
        with client_of(listener) as client:
            monkeypatch.setattr("anypoll._network.listener.nodelay_fd", refuse)
            with pytest.raises(OSError, match="no buffers"):
                await within(listener.accept())
            assert client.recv(1) == b""


async def test_a_forgotten_listener_is_closed() -> None:
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")
    address = multi.extra(SocketAttribute.local_address)
    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 -- the two go together
        del multi
        gc.collect()
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(address)


# --- attributes ----------------------------------------------------------------------------------


async def test_attributes_are_anyios(listener: SocketListener, kind: str) -> None:
    theirs = anyio.abc.SocketListener.extra_attributes.fget(listener)  # type: ignore[attr-defined]
    ours = listener.extra_attributes
    assert set(ours) == set(theirs)
    assert {k: v() for k, v in ours.items()} == {k: v() for k, v in theirs.items()}
    if kind == "tcp":
        assert listener.extra(SocketAttribute.local_port) > 0
        assert address_of(listener)[0] == "127.0.0.1"
    assert listener.extra(SocketAttribute.remote_address, None) is None


# --- serve(), which is AnyIO's -------------------------------------------------------------------


async def echo(conn: Any) -> None:
    async with conn:
        async for piece in conn:
            await conn.send(piece)


async def test_serve(listener: SocketListener, kind: str) -> None:
    """To plain sockets, and to AnyIO's client."""
    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        with client_of(listener) as client:
            client.setblocking(False)
            client.send(b"hello")
            await within(anyio.wait_readable(client))
            assert client.recv(100) == b"hello"
        stream: Any
        if kind == "tcp":
            stream = await anyio.connect_tcp(*address_of(listener))
        else:
            stream = await anyio.connect_unix(address_of(listener))
        async with stream:
            await stream.send(b"x" * 100_000)
            await stream.send_eof()
            assert sum([len(piece) async for piece in stream]) == 100_000
        group.cancel_scope.cancel()


async def test_closing_ends_serve_the_way_it_does_in_anyio() -> None:
    """ClosedResourceError, in exactly three groups: MultiListener's, the listener's, the test's."""
    multi = await anypoll.create_tcp_listener(local_host="127.0.0.1")

    async def serve_and_close() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(multi.serve, echo)
            await settle()
            await multi.aclose()

    with pytest.raises(BaseExceptionGroup) as caught:
        await serve_and_close()
    exc: Any = caught.value
    for _ in range(3):
        [exc] = exc.exceptions
    assert type(exc) is ClosedResourceError


async def test_a_multi_listener_serves_all(tmp_path: Path) -> None:
    """With a task group of somebody else for the handlers."""
    served: list[Connection] = []

    async def handler(conn: Any) -> None:
        async with conn:
            served.append(conn)

    unix = await anypoll.create_unix_listener(tmp_path / "socket")
    async with (
        tcp() as one,
        MultiListener([one, unix]) as multi,
        anyio.create_task_group() as handlers,
        anyio.create_task_group() as group,
    ):
        group.start_soon(multi.serve, handler, handlers)
        with client_of(one), client_of(unix):
            await holds(lambda: len(served) == 2)
        group.cancel_scope.cancel()
    assert {type(conn) for conn in served} == {Connection, UNIXConnection}


# --- create_tcp_listener -------------------------------------------------------------------------


async def test_the_same_ephemeral_port_on_all_addresses() -> None:
    async with await anypoll.create_tcp_listener(local_host="localhost") as multi:
        ports = {address_of(each)[1] for each in multi.listeners}
        assert len(ports) == 1
        assert ports != {0}
        for each in multi.listeners:
            client_of(each).close()


async def test_all_interfaces_are_one_dual_stack_socket() -> None:
    async with tcp(None) as listener:
        port = listener.extra(SocketAttribute.local_port)
        assert listener.extra(SocketAttribute.family) == socket.AF_INET6
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)) as client:
                async with await within(listener.accept()) as conn:
                    remote = conn.remote_address
                    assert remote[1] == client.getsockname()[1]
                    assert remote[0] in {host, f"::ffff:{host}"}


@pytest.mark.parametrize(
    ("host", "family", "address"),
    [
        ("::1", socket.AF_UNSPEC, "::1"),
        (None, socket.AF_INET, "0.0.0.0"),
        (None, socket.AF_INET6, "::"),
        ("localhost", socket.AF_INET, "127.0.0.1"),
    ],
)
async def test_one_family(host: Any, family: Any, address: str) -> None:
    async with tcp(host, family=family) as listener:
        raw = raw_of(listener)
        assert address_of(listener) == (address, raw.getsockname()[1])
        if raw.family == socket.AF_INET6:
            assert raw.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        async with accepted(listener) as (client, conn):
            assert conn.remote_address == client.getsockname()[:2]


async def test_the_port_is_free_again_at_once() -> None:
    port = 0
    for _ in range(3):
        async with tcp(local_port=port) as listener:
            _, port = address_of(listener)
            await accepts(listener)


async def test_a_port_that_is_taken() -> None:
    async with tcp() as listener:
        _, port = address_of(listener)
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: .* in use$") as caught:
            await anypoll.create_tcp_listener(local_host="127.0.0.1", local_port=port)
        assert caught.value.errno == errno.EADDRINUSE


async def test_reuse_port() -> None:
    async with tcp(reuse_port=True) as first:
        _, port = address_of(first)
        async with tcp(reuse_port=True, local_port=port) as second:
            assert address_of(second) == address_of(first)
            for listener in (first, second):
                assert raw_of(listener).getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
async def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(OSError, match=r"\w"):
        await anypoll.create_tcp_listener(local_host=host)


async def test_a_large_backlog_is_cut() -> None:
    async with tcp(backlog=1_000_000) as listener:
        client_of(listener).close()


# --- create_unix_listener ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [str, Path, os.fsencode, lambda path: os.fsencode(path) + b"\xff\xfe"],
    ids=["str", "Path", "bytes", "not UTF-8"],
)
async def test_paths_of_all_types(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    path = make(tmp_path / "socket")
    async with await anypoll.create_unix_listener(path) as listener:
        assert os.fsencode(address_of(listener)) == os.fsencode(path)
        client = await anypoll.connect_unix(path)
        async with client, await within(listener.accept()) as conn:
            await client.send(b"x")
            assert await conn.receive() == b"x"


@pytest.mark.parametrize("as_bytes", [False, True])
async def test_abstract_names(as_bytes: bool) -> None:
    name: Any = f"\0anypoll-{os.getpid()}-{random.random()}"
    path = os.fsencode(name) if as_bytes else name
    async with await anypoll.create_unix_listener(path) as listener:
        assert os.fsencode(address_of(listener)) == os.fsencode(name)
        async with await anypoll.connect_unix(path) as client, await within(listener.accept()):
            assert client.remote_address == os.fsencode(name)  # as AnyIO gives it
        with pytest.raises(OSError, match="in use: ") as caught:
            await anypoll.create_unix_listener(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EADDRINUSE, name)
    with pytest.raises(ConnectionRefusedError):
        await anypoll.connect_unix(path)


async def test_the_mode_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with await anypoll.create_unix_listener(path, mode=0o640):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


Create = Callable[[Path], Awaitable[Any]]


async def listen_and_close(path: Path, kind: int = socket.SOCK_STREAM) -> None:
    async with await anypoll.create_unix_listener(path, kind=kind):  # type: ignore[arg-type]
        pass


async def serve_and_close(path: Path) -> None:
    async def ignore(_conn: Connection) -> None: ...

    async with anypoll.serve(ignore, path=path):
        pass


CREATE: list[Create] = [
    listen_and_close,
    functools.partial(listen_and_close, kind=socket.SOCK_SEQPACKET),
    serve_and_close,
]


def unix_socket(kind: int, path: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(30)
    sock.bind(str(path))
    return sock


@pytest.mark.parametrize("kind_", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("create", CREATE)
async def test_a_dead_socket_is_replaced(create: Create, kind_: int, tmp_path: Path) -> None:
    """Also while a connection of it, here its peer's end, is still open."""
    path = tmp_path / "socket"
    with unix_socket(kind_, path) as dead, ExitStack() as accepted:
        if kind_ != socket.SOCK_DGRAM:
            dead.listen()
            client = accepted.enter_context(socket.socket(socket.AF_UNIX, kind_))
            client.connect(str(path))
            accepted.enter_context(dead.accept()[0])
        dead.close()
        before = path.stat().st_mtime_ns
        for _ in range(2):  # ours is such a one too when it is closed
            await create(path)
            assert path.is_socket()
            assert path.stat().st_mtime_ns > before
            before = path.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("kind_", "backlog"),
    [
        (socket.SOCK_STREAM, 5),
        (socket.SOCK_STREAM, 0),
        (socket.SOCK_SEQPACKET, 5),
        (socket.SOCK_SEQPACKET, 0),
        (socket.SOCK_STREAM, None),  # between bind() and listen()
        (socket.SOCK_DGRAM, None),
    ],
)
@pytest.mark.parametrize("create", CREATE)
async def test_a_socket_in_use_is_left_alone(
    create: Create, kind_: int, backlog: int | None, tmp_path: Path
) -> None:
    """With a backlog of 0, a full one. And it has nothing to accept of those that look."""
    path = tmp_path / "socket"
    with unix_socket(kind_, path) as alive, socket.socket(socket.AF_UNIX, kind_) as client:
        if backlog is not None:
            alive.listen(backlog)
        if backlog == 0:
            client.connect(str(path))
        with pytest.raises(OSError, match="in use: ") as caught:
            await create(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EADDRINUSE, str(path))
        if backlog is not None:
            assert bool(select.select([alive], [], [], 0)[0]) == (backlog == 0)
        if backlog != 0 and alive.type != socket.SOCK_DGRAM:
            alive.listen()
        if backlog != 0:  # it is the one that the path still leads to
            client.connect(str(path))


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOMEM])
async def test_a_socket_that_nothing_is_known_about_is_left_alone(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(socket.socket):
        def connect(self, _address: Any) -> None:
            raise OSError(code, os.strerror(code))

    path = tmp_path / "socket"
    unix_socket(socket.SOCK_STREAM, path).close()
    inode = path.stat().st_ino
    monkeypatch.setattr(socket, "socket", Unable)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        await anypoll.create_unix_listener(path)
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.stat().st_ino == inode


async def test_of_two_servers_at_once_one_gets_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts when the first has found a dead socket, and is about to remove it."""
    path = tmp_path / "socket"
    unix_socket(socket.SOCK_STREAM, path).close()
    refused = threading.Event()  # the second has ended, or sees that it must wait
    outcome: list[OSError | socket.socket] = []

    def second() -> None:
        try:
            listening = binding.unix_listening(path, mode=None, backlog=5)
            outcome.append(asyncio.run(listening))
        except OSError as exc:
            outcome.append(exc)
        refused.set()

    unlink, flock = os.unlink, fcntl.flock
    thread = threading.Thread(target=second)

    def start_second(name: Any) -> None:
        monkeypatch.setattr(os, "unlink", unlink)
        thread.start()
        assert refused.wait(120)
        unlink(name)

    def watched(fd: int, operation: int) -> None:
        try:
            flock(fd, operation)
        except BlockingIOError:
            refused.set()
            raise

    monkeypatch.setattr(os, "unlink", start_second)
    monkeypatch.setattr(fcntl, "flock", watched)
    async with await anypoll.create_unix_listener(path) as listener:
        await holds(lambda: outcome)
        thread.join()
        [error] = outcome
        assert isinstance(error, OSError)
        assert error.errno == errno.EADDRINUSE
        client_of(listener).close()


async def test_a_directory_that_somebody_keeps_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for it can be cancelled, and has an end."""
    path = tmp_path / "socket"
    unix_socket(socket.SOCK_STREAM, path).close()
    inode = path.stat().st_ino
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(binding, "_LOCK_TRIES", 1 << 62)
        with anyio.move_on_after(0.01) as scope:
            await anypoll.create_unix_listener(path)
        assert scope.cancelled_caught
        assert path.stat().st_ino == inode
        monkeypatch.setattr(binding, "_LOCK_TRIES", 3)
        await listen_and_close(path)
    finally:
        os.close(lock)


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)
    with pytest.raises(OSError, match="too long") as caught:
        await anypoll.create_unix_listener(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENAMETOOLONG, str(path))


@pytest.mark.parametrize("what", ["file", "directory", "link"])
async def test_any_other_file_is_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / "precious"
    if what == "directory":
        path.mkdir()
    else:
        path.write_text("precious")
    taken = path
    if what == "link":
        taken = tmp_path / "link"
        taken.symlink_to(path)
    with pytest.raises(OSError, match="in use"):
        await anypoll.create_unix_listener(taken)
    assert taken.is_symlink() == (what == "link")
    assert path.is_dir() if what == "directory" else path.read_text() == "precious"


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await anypoll.create_unix_listener(tmp_path / "no" / "socket")


# --- from_socket ---------------------------------------------------------------------------------


def bound(kind: str, path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if kind == "tcp" else str(path))
    return sock


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("as_fd", [False, True])
async def test_from_socket(kind: str, as_fd: bool, listening: bool, tmp_path: Path) -> None:
    """Connections that were there before are accepted."""
    sock = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / "socket"))
    with socket.socket(sock.family) as early:
        if listening:
            sock.listen(5)
            early.connect(sock.getsockname())
        async with await SocketListener.from_socket(sock.detach() if as_fd else sock) as listener:
            raw = raw_of(listener)
            assert raw.gettimeout() == 0
            assert as_fd or raw is sock
            if listening:
                async with await within(listener.accept()) as conn:
                    await ping(early, conn)
            await accepts(listener)
        assert raw.fileno() == -1


# --- lack of descriptors -------------------------------------------------------------------------


async def test_out_of_descriptors(
    listener: SocketListener, caplog: pytest.LogCaptureFixture
) -> None:
    """L35. Accepting pauses, says so once, and goes on when there are some again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [client_of(listener) for _ in range(3)]
    conns: list[Connection] = [await within(listener.accept())]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        with contextlib.suppress(OSError):  # too many open files
            while True:
                fillers.append(os.dup(0))
        async with anyio.create_task_group() as group:

            async def accept() -> None:
                conns.append(await listener.accept())

            group.start_soon(accept)
            await holds(lambda: caplog.records)
            await anyio.sleep(0.25)  # two pauses more: one line all the same
            assert len(conns) == 1
            while fillers:
                os.close(fillers.pop())
            await holds(lambda: len(conns) == 2)
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    conns.append(await within(listener.accept()))
    assert [(r.name, r.levelno) for r in caplog.records] == [("anypoll.server", logging.WARNING)]
    assert "Too many open files" in caplog.records[0].getMessage()
    for client, conn in zip(clients, conns, strict=True):
        await ping(client, conn)
        await conn.aclose()
        client.close()

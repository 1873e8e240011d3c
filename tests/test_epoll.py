"""The compiled core as Python sees it: its stub tells the truth, and streams survive what system
calls can do to them.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import logging
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError
from peers import KIB, MIB, holds, opened, pattern, read_all, send_all, settle, within
from programs import run_to_end

import anypoll
from anypoll import _epoll
from anypoll._epoll import ffi, lib

STUB = ast.parse((Path(_epoll.__file__).parent / "_loop" / "_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def functions() -> list[Any]:
    found = [
        pytest.param(node, id=node.name)
        for node in CLASSES["Lib"].body
        if isinstance(node, ast.FunctionDef)
    ]
    assert found
    return found


def constants(name: str) -> list[str]:
    return [
        node.target.id
        for node in CLASSES[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


# --- the stub ------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", functions())
def test_the_stub_has_the_arguments_of_the_function(node: ast.FunctionDef) -> None:
    real = ffi.typeof(getattr(lib, node.name))
    assert node.args.args == node.args.kwonlyargs == []
    parameters = node.args.posonlyargs[1:]
    assert len(parameters) == len(real.args)
    for parameter, ctype in zip(parameters, real.args, strict=True):
        assert parameter.annotation is not None
        integer = ast.unparse(parameter.annotation) == "int"
        assert integer == (ctype.kind == "primitive"), f"{parameter.arg}: {ctype.cname}"
    assert node.returns is not None
    assert (ast.unparse(node.returns) == "None") == (real.result.kind == "void")


def test_the_stub_has_every_function_and_no_other() -> None:
    real = {name for name in dir(lib) if name.startswith("ap_")}
    assert {param.values[0].name for param in functions()} == real  # type: ignore[attr-defined]


def test_the_stub_has_the_constants() -> None:
    names = constants("Lib")
    assert names
    for name in names:
        assert type(getattr(lib, name)) is int
    real = {name for name in dir(lib) if name.startswith("AP_")} - {"AP_CALLS"}
    assert set(names) == real


@pytest.mark.parametrize(
    ("name", "struct_name"), [("View", "ap_view"), ("Accepted", "ap_accepted")]
)
def test_the_stub_has_the_fields(name: str, struct_name: str) -> None:
    assert constants(name) == [field for field, _ in ffi.typeof(struct_name).fields]


@pytest.mark.parametrize(
    ("ours", "struct_name"),
    [
        (anypoll.PollerStatistics, "ap_poller_stats"),
        (anypoll.ConnectionStatistics, "ap_conn_stats"),
    ],
)
def test_statistics_have_every_field(ours: Any, struct_name: str) -> None:
    fields = {field for field, _ in ffi.typeof(struct_name).fields}
    assert set(ours.__dataclass_fields__) == fields


def test_layouts_that_python_unpacks() -> None:
    token = ffi.typeof("ap_token")
    assert ffi.sizeof(token) == _epoll.TOKEN_SIZE == struct.calcsize(_epoll.TOKEN_FORMAT)
    assert [(name, field.offset) for name, field in token.fields] == [
        ("id", 0),
        ("bits", 8),
        ("value", 12),
    ]
    accepted = ffi.typeof("ap_accepted")
    assert ffi.sizeof(accepted) == _epoll._ACCEPTED.size
    assert [(name, field.offset) for name, field in accepted.fields] == [
        ("fd", 0),
        ("family", 4),
        ("port", 6),
        ("scope", 8),
        ("address", 12),
    ]


def test_codes_of_our_own_lie_below_every_errno() -> None:
    codes = [_epoll.EEOF, _epoll.EQUEUED, _epoll.EDELIM, _epoll.EIDLE]
    assert len(set(codes)) == len(codes)
    assert max(codes) < -max(errno.errorcode)


def test_names_that_are_handed_on_are_the_cores() -> None:
    for name in dir(_epoll):
        if name.startswith(("conn_", "hub_", "listener_")) and hasattr(lib, f"ap_{name}"):
            assert getattr(_epoll, name) is getattr(lib, f"ap_{name}") or callable(
                getattr(_epoll, name)
            )


def test_check() -> None:
    assert _epoll.check(0) == 0
    assert _epoll.check(7) == 7
    with pytest.raises(OSError, match="Too many open files") as caught:
        _epoll.check(-errno.EMFILE)
    assert caught.value.errno == errno.EMFILE
    with pytest.raises(ConnectionResetError):
        _epoll.check(-errno.ECONNRESET)


@pytest.mark.parametrize(
    ("record", "address"),
    [
        (struct.pack("=iHHI16s", 3, socket.AF_INET, 80, 0, b"\x7f\0\0\1"), ("127.0.0.1", 80)),
        (struct.pack("=iHHI16s", 3, socket.AF_INET6, 80, 0, b"\0" * 15 + b"\1"), ("::1", 80)),
        (
            struct.pack("=iHHI16s", 3, socket.AF_INET6, 80, 2, b"\xfe\x80" + b"\0" * 13 + b"\1"),
            ("fe80::1%2", 80),
        ),
        (struct.pack("=iHHI16s", 3, socket.AF_UNIX, 0, 0, b""), ""),
        (struct.pack("=iHHI16s", 3, socket.AF_UNIX, 1, 0, b""), None),  # it has a name: ask
    ],
)
def test_peer_address(record: bytes, address: Any) -> None:
    assert _epoll.peer_address(record) == address


def test_a_fault_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AttributeError):
        _epoll.set_fault("NAP")


# --- faults --------------------------------------------------------------------------------------


@pytest.fixture
def fault() -> Iterator[Callable[..., None]]:
    """`set_fault`, undone after the test."""
    yield _epoll.set_fault
    _epoll.clear_faults()


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


loops = pytest.mark.anyio


async def exchange(conn: anypoll.Connection, peer: socket.socket, size: int = 200 * KIB) -> None:
    """Bytes in both directions at once, compared."""
    there, back = pattern(size, 1), pattern(size, 2)
    got = bytearray()

    async def receive() -> None:
        while len(got) < size:
            got.extend(await conn.receive())

    async def collect() -> None:
        assert await read_all(peer, size) == there

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            group.start_soon(collect)
            group.start_soon(send_all, peer, back)
            await conn.send(there)
    assert got == back


@loops
@pytest.mark.parametrize("call", ["READ", "WRITE", "EPOLL_WAIT", "EPOLL_CTL"])
async def test_interrupted_calls_are_repeated(
    fault: Callable[..., None], kind: str, call: str
) -> None:
    """L21."""
    async with opened(kind) as (conn, peer):
        fault(call, errno.EINTR, times=50)
        await exchange(conn, peer)


@loops
async def test_interrupted_accepts_are_repeated(fault: Callable[..., None]) -> None:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        fault("ACCEPT", errno.EINTR, times=20)
        with socket.create_connection(listener.extra(anyio.abc.SocketAttribute.local_address)):
            async with await within(listener.accept()):
                pass


@loops
@pytest.mark.parametrize("limit", [1, 7, 4096])
@pytest.mark.parametrize("call", ["READ", "WRITE"])
async def test_short_transfers(
    fault: Callable[..., None], kind: str, call: str, limit: int
) -> None:
    async with opened(kind) as (conn, peer):
        fault(call, limit=limit, times=3000)
        await exchange(conn, peer)
        assert conn.statistics().bytes_sent == conn.statistics().bytes_received == 200 * KIB


@loops
async def test_short_transfers_at_random_places(fault: Callable[..., None], kind: str) -> None:
    async with opened(kind) as (conn, peer):
        for n in range(20):
            fault("READ", limit=n * 37 + 1, skip=n % 3, times=2)
            fault("WRITE", limit=n * 91 + 1, skip=n % 2, times=2)
            await exchange(conn, peer, 10 * KIB + n)


@loops
async def test_reads_that_find_nothing(fault: Callable[..., None], kind: str) -> None:
    """O17. As when somebody else has read the socket: the next event finds the bytes."""
    async with opened(kind) as (conn, peer):
        fault("READ", errno.EAGAIN, times=3)
        got = bytearray()

        async def receive() -> None:
            while len(got) < 64:
                got.extend(await conn.receive())

        async with anyio.create_task_group() as group:
            group.start_soon(within, receive())
            sent = 0
            while len(got) < 64:
                if sent < 64:
                    await send_all(peer, bytes([sent]))
                    sent += 1
                await anyio.sleep(0.001)
        assert got == bytes(range(64))


@loops
async def test_writes_that_find_no_room(fault: Callable[..., None], kind: str) -> None:
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        fault("WRITE", errno.EAGAIN, times=1)
        data = pattern(300 * KIB)
        group.start_soon(within, conn.send(data))
        await settle()
        await send_all(peer, b"an event, which says that there is room too")
        assert await read_all(peer, len(data)) == data


@loops
async def test_a_failing_read_breaks_the_connection(fault: Callable[..., None], kind: str) -> None:
    async with opened(kind) as (conn, peer):
        await send_all(peer, b"before")
        assert await conn.next(6) == b"before"
        fault("READ", errno.ECONNRESET)
        await send_all(peer, b"lost")
        for _ in range(2):
            with pytest.raises(BrokenResourceError) as caught:
                await within(conn.receive())
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert not conn.is_active


@loops
async def test_a_time_out_of_the_kernel_is_not_the_read_timeout(
    fault: Callable[..., None], kind: str
) -> None:
    async with opened(kind) as (conn, peer):
        conn.read_timeout = 30
        fault("READ", errno.ETIMEDOUT)
        await send_all(peer, b"lost")
        with pytest.raises(BrokenResourceError) as caught:
            await within(conn.receive())
        assert isinstance(caught.value.__cause__, TimeoutError)
        assert not conn.is_active


@loops
@pytest.mark.parametrize("code", [errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT])
async def test_a_failing_write_breaks_the_connection(
    fault: Callable[..., None], kind: str, code: int
) -> None:
    async with opened(kind) as (conn, peer):
        await send_all(peer, b"before")
        await holds(lambda: len(conn.reader) == 6)
        fault("WRITE", code)
        with pytest.raises(BrokenResourceError) as caught:
            await within(conn.send(b"x"))
        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == code
        assert not conn.is_active
        with pytest.raises(BrokenResourceError):
            await conn.send(b"x")
        assert await conn.receive() == b"before"


@loops
async def test_a_poller_that_fails_to_write_tells_who_waits(
    fault: Callable[..., None], kind: str
) -> None:
    """The first part goes out from the task, the rest fails in the poller."""
    async with opened(kind) as (conn, peer), anyio.create_task_group() as group:
        errors: list[BaseException] = []

        async def send() -> None:
            try:
                await conn.send(bytes(8 * MIB))
            except BrokenResourceError as exc:
                errors.append(exc)

        group.start_soon(send)
        await holds(lambda: conn._core.number in conn._core.hub.writers)
        fault("WRITE", errno.ECONNRESET)
        while not errors:
            with contextlib.suppress(BlockingIOError):
                peer.recv(256 * KIB)
            await anyio.sleep(0.001)
        assert isinstance(errors[0].__cause__, ConnectionResetError)


async def fails_to_open(opening: Callable[[], Awaitable[anypoll.Connection]], code: int) -> None:
    with pytest.raises(OSError) as caught:
        await within(opening())
    assert caught.value.errno == code


@loops
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
async def test_a_connection_that_cannot_be_watched(
    fault: Callable[..., None], kind: str, code: int
) -> None:
    from peers import socket_pair

    first, second = socket_pair(kind)
    with second:
        fault("EPOLL_CTL", code)
        await fails_to_open(lambda: anypoll.Connection.from_socket(first), code)
        assert first.fileno() == -1
        assert second.recv(1) == b""
    fault("EPOLL_CTL", code, skip=1)
    with pytest.raises(OSError, match=r"\w"):
        anypoll.socketpair()
    async with opened(kind) as (conn, peer):
        await exchange(conn, peer, 1000)


@loops
async def test_a_listener_that_cannot_be_watched(fault: Callable[..., None]) -> None:
    fault("EPOLL_CTL", errno.ENOSPC)
    with pytest.raises(OSError, match=r"No space left|out of") as caught:
        await anypoll.create_tcp_listener(local_host="127.0.0.1")
    assert caught.value.errno == errno.ENOSPC


@loops
async def test_no_memory_for_a_listener(fault: Callable[..., None]) -> None:
    fault("ALLOC", 1)
    with pytest.raises(OSError, match="memory"):
        await anypoll.create_tcp_listener(local_host="127.0.0.1")


@loops
async def test_a_loop_whose_hub_cannot_be_made(fault: Callable[..., None]) -> None:
    """The first connection of a loop makes its hub. The next attempt starts afresh."""
    for call, code in (("EVENTFD", errno.EMFILE), ("ALLOC", errno.ENOMEM)):
        fault(call, errno.EMFILE)
        with pytest.raises(OSError, match=r"\w") as caught:
            anypoll.socketpair()
        assert caught.value.errno == code
    a, b = anypoll.socketpair()
    async with a, b:
        await a.send(b"x")
        assert await b.receive() == b"x"


@loops
@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPERM, errno.ECONNRESET])
async def test_accepts_that_fail_for_one_connection_are_ignored(
    fault: Callable[..., None], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        fault("ACCEPT", code, times=3)
        with socket.create_connection(listener.extra(anyio.abc.SocketAttribute.local_address)):
            async with await within(listener.accept()):
                pass
    assert caplog.records == []


@loops
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_accepting_pauses_for_lack_of_resources(
    fault: Callable[..., None], code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """O5. One line an episode, however many pauses it takes; then it goes on."""
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        address = listener.extra(anyio.abc.SocketAttribute.local_address)
        for _ in range(2):
            fault("ACCEPT", code, times=2)
            with socket.create_connection(address):
                async with await within(listener.accept()):
                    pass
    assert [(r.name, r.levelno) for r in caplog.records] == [
        ("anypoll.server", logging.WARNING)
    ] * 2


@loops
async def test_an_accept_that_fails_for_good(fault: Callable[..., None]) -> None:
    async with await anypoll.create_tcp_listener(local_host="127.0.0.1") as multi:
        [listener] = multi.listeners
        fault("ACCEPT", errno.EINVAL)
        with socket.create_connection(listener.extra(anyio.abc.SocketAttribute.local_address)):
            with pytest.raises(BrokenResourceError) as caught:
                await within(listener.accept())
            assert isinstance(caught.value.__cause__, OSError)
            async with await within(listener.accept()):
                pass


@loops
async def test_no_memory_for_input(fault: Callable[..., None], kind: str) -> None:
    """What cannot be stored is not lost silently: the connection ends."""
    async with opened(kind) as (conn, peer):
        fault("ALLOC", 1, times=-1)
        fault("MAP", 1, times=-1)
        data = pattern(200 * KIB)
        async with anyio.create_task_group() as group:

            async def send() -> None:
                try:
                    await send_all(peer, data)
                except OSError:
                    return

            async def receive() -> None:
                while True:
                    got.extend(await conn.receive())

            group.start_soon(send)
            got = bytearray()
            with pytest.raises((MemoryError, BrokenResourceError)):
                await within(receive())
            group.cancel_scope.cancel()
        assert data.startswith(got)
        _epoll.clear_faults()
    gc.collect()


SUBPROCESS = """
import anyio, anypoll
from anypoll import _epoll

async def main():
    for call in {calls!r}:
        _epoll.set_fault(call, 24)
        try:
            anypoll.socketpair()
        except OSError as exc:
            print(call, type(exc).__name__, len(anypoll.statistics().pollers))
        _epoll.clear_faults()
    a, b = anypoll.socketpair()
    async with a, b:
        await a.send(b"at last")
        print(await b.receive())

anyio.run(main, backend={backend!r})
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_pool_that_cannot_be_started(backend: str) -> None:
    """L26."""
    calls = ["EPOLL_CREATE", "EVENTFD", "THREAD", "ALLOC"]
    code = SUBPROCESS.format(calls=calls, backend=backend)
    done = run_to_end([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:-1] == [f"{call} OSError 0" for call in calls]
    assert lines[-1] == "b'at last'"
    assert done.stderr == ""

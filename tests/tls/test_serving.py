"""TLS in a server: what handlers, hooks and requests see of it, and what becomes of those who
cannot do it.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from certificates import client_context, server_context
from peers import KIB, MIB, holds, pattern, send_all, stalled, within
from serving import HOST, all_is_accounted_for, client, connected, errors  # noqa: F401
from tls_peers import NAME

import anypoll
from anypoll import TLSConnection

pytestmark = pytest.mark.anyio


def local(handler: Any = None, **options: Any) -> anypoll.serve:
    return anypoll.serve(handler, host=HOST, port=0, ssl_context=server_context(), **options)


async def connect(server: anypoll.Server, context: ssl.SSLContext | None = None) -> TLSConnection:
    stream: Any = await anypoll.connect_tcp(
        HOST, server.port, tls=True, ssl_context=context or client_context(), tls_hostname=NAME
    )
    return stream  # type: ignore[no-any-return]


async def answer(conn: TLSConnection) -> None:
    """One request: a byte that says how many follow, and these come back."""
    n = await conn.reader.read_byte()
    conn.writer.write(bytes(await conn.next(n)))


async def answers(conn: TLSConnection) -> None:
    while True:
        await answer(conn)


BOTH = pytest.mark.parametrize(
    "mode", [{"handler": answers}, {"on_request": answer}], ids=["handler", "requests"]
)


# --- in both modes -------------------------------------------------------------------------------


@BOTH
async def test_requests_are_answered(mode: dict[str, Any]) -> None:
    async with local(**mode) as server, await connect(server) as stream:
        for text in (b"a", b"bcd", bytes(255)):
            await stream.send(bytes([len(text)]) + text)
            assert await stream.next(len(text)) == text
        [conn] = server.connections
        assert type(conn) is TLSConnection
        assert conn.server is server


@BOTH
async def test_requests_may_lie_in_records_as_they_like(mode: dict[str, Any]) -> None:
    """Many in one record, and one over many records; byte by byte."""
    async with local(**mode) as server, await connect(server) as stream:
        await stream.send(b"\3abc\2de\0\1f")
        assert await stream.next(6) == b"abcdef"
        for byte in b"\4ghij":
            await stream.send(bytes([byte]))
        assert await stream.next(4) == b"ghij"
        await stream.send(b"\1k\5lm")
        assert await stream.next(1) == b"k"
        await stream.send(b"nop")
        assert await stream.next(5) == b"lmnop"


@BOTH
async def test_what_comes_with_the_end_is_answered(mode: dict[str, Any]) -> None:
    async with local(**mode) as server:
        async with await connect(server) as stream:
            await stream.send(b"\3abc")
            await stream.send(b"\2de")
            await stream.send_eof()
            assert await stream.next(5) == b"abcde"
            with pytest.raises(EndOfStream):
                await stream.receive()
        await holds(lambda: not server.connections)
        assert server.statistics().closed == {"eof": 1}


@BOTH
@pytest.mark.parametrize("how", ["cut off", "reset", "half a request"])
async def test_ends_that_a_peer_can_cause(mode: dict[str, Any], how: str) -> None:
    """They are counted, and nothing is logged."""
    async with local(**mode) as server:
        stream = await connect(server)
        await stream.send(b"\1a")
        assert await stream.next(1) == b"a"
        if how == "half a request":
            await stream.send(b"\3ab")
            await stream.send_eof()
            with pytest.raises(EndOfStream):
                await stream.receive()
        elif how == "reset":
            stream.abort()
        else:
            await stream.connection.send_eof()  # a FIN without a close_notify
        await holds(lambda: not server.connections)
        [(reason, count)] = server.statistics().closed.items()
        assert count == 1
        assert reason in ({"incomplete"} if how == "half a request" else {"broken"})
        stream.abort()


@BOTH
async def test_an_error_of_the_user(mode: dict[str, Any], log: pytest.LogCaptureFixture) -> None:
    told: list[Any] = []

    async def fail(conn: TLSConnection) -> None:
        await conn.next(1)
        raise ValueError("mine")

    options = dict.fromkeys(mode, fail)
    async with local(
        **options, on_error=lambda conn, exc: told.append((type(conn), exc))
    ) as server:
        async with await connect(server) as stream:
            await stream.send(b"x")
            with pytest.raises((EndOfStream, BrokenResourceError)):
                await stream.receive()
        await holds(lambda: not server.connections)
    [record] = errors(log)
    assert "mine" in str(record.exc_info)
    [(kind, exc)] = told
    assert kind is TLSConnection
    assert isinstance(exc, ValueError)
    assert server.statistics().closed == {"error": 1}


@BOTH
async def test_hooks_get_the_decrypted_connection(mode: dict[str, Any]) -> None:
    seen: list[tuple[str, type]] = []

    def note(name: str) -> Callable[[Any], None]:
        return lambda conn: seen.append((name, type(conn)))

    async def note_async(name: str, conn: Any) -> None:
        seen.append((name, type(conn)))
        if name == "connect":
            conn.state = "greeted"
            conn.add_close_callback(note("callback"))
            await conn.send(b"hello")

    async with local(
        **mode,
        on_prepare=note("prepare"),
        on_connect=functools.partial(note_async, "connect"),
        on_disconnect=functools.partial(note_async, "disconnect"),
    ) as server:
        async with await connect(server) as stream:
            assert await stream.next(5) == b"hello"
            assert server.connections[0].state == "greeted"
        await holds(lambda: not server.connections)
    assert seen == [
        ("prepare", anypoll.Connection),
        ("connect", TLSConnection),
        ("disconnect", TLSConnection),
        ("callback", TLSConnection),
    ]


@BOTH
async def test_idle_connections_end_with_the_server(mode: dict[str, Any]) -> None:
    async with local(**mode) as server:
        streams = [await connect(server) for _ in range(5)]
        for stream in streams:
            await stream.send(b"\1x")
            assert await stream.next(1) == b"x"
        await within(server.shutdown())
    for stream in streams:
        with pytest.raises(EndOfStream):
            await stream.receive()
        await stream.aclose()
    assert server.statistics().closed == {"eof": 5}


@BOTH
async def test_the_last_bytes_of_a_busy_one_arrive(mode: dict[str, Any]) -> None:
    begun, go_on = anyio.Event(), anyio.Event()
    data = pattern(MIB)

    async def slow(conn: TLSConnection) -> None:
        await conn.next(1)
        begun.set()
        await go_on.wait()
        conn.writer.write(data)
        if "handler" in mode:
            return
        await conn.writer.flush()

    async with local(**dict.fromkeys(mode, slow)) as server:
        stream = await connect(server)
        await stream.send(b"x")
        await within(begun.wait())
        async with anyio.create_task_group() as tg:
            tg.start_soon(server.shutdown)
            await holds(lambda: server.shutting_down)
            go_on.set()
            assert b"".join(await stream.reader.next_parts(len(data))) == data
            await stream.aclose()


@BOTH
async def test_over_a_unix_socket(mode: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with anypoll.serve(**mode, path=path, ssl_context=server_context()):
        plain = await anypoll.connect_unix(path)
        async with await TLSConnection.wrap(
            plain, hostname=NAME, ssl_context=client_context()
        ) as stream:
            await stream.send(b"\2hi")
            assert await stream.next(2) == b"hi"


@BOTH
async def test_a_peer_that_never_reads(mode: dict[str, Any]) -> None:
    """What it has asked for is bounded; the others are served."""

    async def flood(conn: TLSConnection) -> None:
        while True:
            await conn.next(1)
            conn.writer.write(bytes(64 * KIB))
            if "on_request" in mode:
                return

    async def other(server: anypoll.Server) -> None:
        async with await connect(server) as stream:
            await stream.send(b"x")
            parts = await within(stream.reader.next_parts(64 * KIB))
            assert sum(map(len, parts)) == 64 * KIB

    async with local(**dict.fromkeys(mode, flood), write_high_water=256 * KIB) as server:
        greedy = await connect(server)
        async with anyio.create_task_group() as tg:
            tg.start_soon(greedy.send, bytes(64 * KIB))
            await holds(lambda: [c for c in server.connections if isinstance(c, TLSConnection)])
            [conn] = server.connections
            await stalled(conn.connection)
            await other(server)
            assert 0 < len(conn.writer) < 2 * MIB
            greedy.abort()
            tg.cancel_scope.cancel()
        await holds(lambda: not server.connections)


# --- request mode --------------------------------------------------------------------------------


async def test_requests_that_come_with_the_handshake() -> None:
    """They lie in OpenSSL's hands, and no input will tell of them."""
    async with local(on_request=answer) as server:
        plain = await anypoll.connect_tcp(HOST, server.port)
        stream = await TLSConnection.wrap(plain, hostname=NAME, ssl_context=client_context())
        stream.writer.write(b"\2ab")
        await stream.writer.flush()
        assert await within(stream.next(2)) == b"ab"
        await stream.aclose()


async def test_a_call_that_consumes_nothing_is_made_again_only_for_more() -> None:
    calls: list[int] = []

    async def look(conn: TLSConnection) -> None:
        calls.append(len(conn.reader))
        if len(conn.reader) >= 3:
            conn.writer.write(bytes(await conn.next(3)))

    async with local(on_request=look) as server, await connect(server) as stream:
        await stream.send(b"a")
        await holds(lambda: calls == [1])
        await stream.send(b"b")
        await holds(lambda: calls == [1, 2])
        await stream.send(b"c")
        assert await stream.next(3) == b"abc"
        assert calls == [1, 2, 3]


# --- who cannot do it ----------------------------------------------------------------------------


async def never(_conn: Any) -> None:
    raise AssertionError("it was called")


@pytest.mark.parametrize("option", ["handler", "on_request"])
@pytest.mark.parametrize("how", ["no TLS", "leaves", "is silent", "distrusts"])
async def test_a_handshake_that_fails_is_counted(option: str, how: str) -> None:
    options: dict[str, Any] = {option: never, "on_connect": never, "on_disconnect": None}
    if how == "is silent":
        options["tls_handshake_timeout"] = 0.01
    async with local(**options) as server:
        if how == "distrusts":
            with pytest.raises((ssl.SSLError, BrokenResourceError)):
                await connect(server, ssl.create_default_context(cadata=None))
        else:
            async with client(server) as sock:
                if how == "no TLS":
                    await send_all(sock, b"GET / HTTP/1.1\r\n\r\n")
                if how != "leaves":
                    await holds(lambda: server.statistics().closed)
        await holds(lambda: not server.connections and server.statistics().closed)
    assert server.statistics().closed == {"tls_handshake": 1}
    assert server.statistics().handler_errors == 0


async def test_the_end_of_the_server_during_a_handshake() -> None:
    for _ in range(2):
        async with local(never, shutdown_timeout=240) as server:
            sock = connected(server)
            await holds(lambda: server.connections)
            await within(server.shutdown())
        sock.close()


async def test_a_forced_end_during_a_handshake() -> None:
    with anyio.CancelScope() as scope:
        async with local(never) as server:
            sock = connected(server)
            await holds(lambda: server.connections)
            scope.cancel()
            await anyio.sleep_forever()
    sock.close()
    assert not server.connections


async def test_a_kept_stream_is_closed_behind_its_handler() -> None:
    kept: list[TLSConnection] = []

    async def keep(conn: TLSConnection) -> None:
        kept.append(conn)

    async with local(keep) as server:
        async with await connect(server) as stream:
            with pytest.raises(EndOfStream):
                await stream.receive()
        await holds(lambda: not server.connections)
        with pytest.raises(ClosedResourceError):
            await kept[0].receive()
        with pytest.raises(ClosedResourceError):
            await kept[0].send(b"x")


async def test_timeouts_of_serve() -> None:
    seen: list[tuple[float | None, float | None, float | None]] = []

    async def note(conn: TLSConnection) -> None:
        seen.append((conn.read_timeout, conn.write_timeout, conn.idle_timeout))
        await conn.next(1)

    async with local(note, read_timeout=0.02, write_timeout=7, idle_timeout=50) as server:
        async with await connect(server) as stream:
            with pytest.raises((EndOfStream, BrokenResourceError)):
                await stream.receive()
        await holds(lambda: not server.connections)
    assert seen == [(0.02, 7, 50)]
    assert server.statistics().closed == {"read_timeout": 1}


async def test_the_handler_is_cancelled_when_the_peer_goes() -> None:
    begun = anyio.Event()
    ended: list[str] = []

    async def wait(_conn: TLSConnection) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    async with local(wait, cancel_on_disconnect=True) as server:
        stream = await connect(server)
        await within(begun.wait())
        stream.abort()
        await holds(lambda: not server.connections)
        assert ended == ["cancelled"]
        assert server.statistics().closed == {"disconnected": 1}

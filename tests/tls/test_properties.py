"""A TLS connection against a model of plain bytes, and a peer that puts its records on the wire in
any pieces: random reads, sends, flushes, cancellations, timeouts and ends. Nothing is lost,
repeated, moved or torn, and no view changes.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from certificates import server_context
from hypothesis import HealthCheck, given, settings, strategies as st
from peers import opened, send_all
from tls_peers import Peer, accepted, both

from anypoll import ReadTimeout, TLSConnection, WriteTimeout

quick = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

STREAM = bytes(random.Random(0).choices(b"ab", k=3_000_000))
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([3000, 16_384, 16_385, 60_000]))
ENDINGS = st.sampled_from(["done", "cancel", "timeout"])
READS = ["peek", "next", "skip", "next_parts", "receive", "until"]
STEPS = st.one_of(
    st.tuples(st.just("encrypt"), SIZES, st.just("")),
    st.tuples(st.just("wire"), SIZES, st.just("")),
    st.tuples(st.sampled_from(READS), SIZES, ENDINGS),
    st.tuples(st.sampled_from(["send", "flush"]), SIZES | st.just(300_000), ENDINGS),
    st.tuples(st.just("write"), SIZES | st.just(0), st.just("")),
    st.tuples(st.just("drain"), SIZES, st.just("")),
)


class Model:
    """What was sent and read, both ways; the peer does not read unless it is said."""

    def __init__(self, tls: TLSConnection, peer: Peer) -> None:
        self.tls, self.peer = tls, peer
        self.taken = self.fed = 0
        self.wire = b""
        self.views: list[tuple[int, memoryview]] = []
        self.sent: list[tuple[bytes, bool]] = []  # and whether it must arrive
        self.got = bytearray()

    # --- from the peer ---------------------------------------------------------------------------

    def encrypt(self, n: int) -> None:
        n = min(n, 150_000 - self.fed + self.taken)  # within high water, so that nobody waits
        if n > 0:
            self.wire += self.peer.encrypted(STREAM[self.fed : self.fed + n])
            self.fed += n

    async def send_wire(self, n: int) -> None:
        piece, self.wire = self.wire[:n], self.wire[n:]
        await send_all(self.peer.sock, piece)

    async def read(self, method: str, n: int) -> None:
        tls, place = self.tls, self.taken
        if method == "until":
            result: Any = await tls.until(b"ab")
            n = STREAM.index(b"ab", place) + 2 - place
        elif method == "receive":
            result = await tls.receive(n)
            n = len(result)
        else:
            result = await getattr(tls.reader, method)(n)
        if method != "peek":
            self.taken += n
        parts = result if method == "next_parts" else [] if method == "skip" else [result]
        assert method == "skip" or b"".join(parts) == STREAM[place : place + n]
        for part in parts:
            self.views.append((place, part))
            place += len(part)

    # --- to the peer -----------------------------------------------------------------------------

    async def drain(self, size: int) -> None:
        """Decrypts until there is so much more, or the end."""
        size += len(self.got)
        while len(self.got) < size:
            try:
                data = await self.peer.call(self.peer.ssl.read, 1 << 20)
            except ssl.SSLZeroReturnError:
                return
            if not data:
                return
            self.got += data

    async def drain_and_end(self) -> None:
        await self.drain(1 << 40)
        await send_all(self.peer.sock, self.peer.close_notify())

    def frame(self, size: int) -> bytes:
        data = random.Random(len(self.sent)).randbytes(size)
        return b"%8d%8d" % (len(self.sent), size) + data

    # --- steps -----------------------------------------------------------------------------------

    async def ended(self, how: str, call: Callable[[], Awaitable[None]]) -> bool:
        """Whether the call was not given up. The peer reads if it is to be done."""
        async with anyio.create_task_group() as tasks:
            if how == "done":
                tasks.start_soon(self.drain, 1 << 40)
                await call()
            elif how == "timeout":
                self.tls.read_timeout = self.tls.write_timeout = 0.001
                try:
                    await call()
                except (ReadTimeout, WriteTimeout):
                    return False
                finally:
                    self.tls.read_timeout = self.tls.write_timeout = None
            else:
                done = False

                async def run() -> None:
                    nonlocal done
                    await call()
                    done = True

                tasks.start_soon(run)
                for _ in range(3):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            tasks.cancel_scope.cancel()
        return how != "cancel" or done

    async def step(self, method: str, n: int, how: str) -> None:
        if method == "encrypt":
            self.encrypt(n)
        elif method == "wire":
            await self.send_wire(n)
        elif method == "drain":
            with anyio.move_on_after(0.001):
                await self.drain(n)
        elif method in READS:
            if how == "done":
                self.encrypt(n + 100 - self.fed + self.taken)
                await self.send_wire(len(self.wire))
            await self.ended(how, lambda: self.read(method, n))
        else:
            frame = self.frame(n)
            buffer = bytearray(frame)
            done = True
            if method == "send":
                done = await self.ended(how, lambda: self.tls.send(buffer))
            else:
                self.tls.writer.write(buffer)
                if method == "flush":
                    await self.ended(how, self.tls.writer.flush)
            buffer[:] = bytes(len(buffer))  # it is the caller's again
            self.sent.append((frame, done or method != "send"))

    async def finish(self, how: str) -> None:
        await self.step("write", 1, "")  # or the rest of a send that was given up may be left out
        await self.send_wire(len(self.wire))
        await self.ended("done", lambda: self.read("next_parts", self.fed - self.taken))
        if how == "send_eof":
            await both(self.tls.send_eof, self.drain_and_end)
            with pytest.raises(EndOfStream):
                await self.tls.receive()
        else:
            await both(self.tls.aclose, self.drain_and_end)
        position = 0
        for frame, must in self.sent:
            if self.got.startswith(frame, position):
                position += len(frame)
            else:
                assert not must
        assert position == len(self.got)
        for place, view in self.views:
            assert view == STREAM[place : place + len(view)]


@quick
@given(
    steps=st.lists(STEPS, max_size=30),
    end=st.sampled_from(["aclose", "send_eof"]),
    version=st.sampled_from(["TLSv1_2", "TLSv1_3"]),
)
def test_a_session(
    anyio_backend: tuple[str, dict[str, Any]],
    steps: list[tuple[str, int, str]],
    end: str,
    version: str,
) -> None:
    async def main() -> None:
        async with opened() as (conn, sock):
            context = server_context()
            context.maximum_version = getattr(ssl.TLSVersion, version)
            peer = Peer(sock)
            try:
                with anyio.fail_after(60):
                    model = Model(await accepted(conn, peer, context), peer)
                    for step in steps:
                        await model.step(*step)
                    await model.finish("aclose" if version == "TLSv1_2" else end)
            finally:
                conn.abort()  # a close would wait for the peer

    backend, options = anyio_backend
    anyio.run(main, backend=backend, backend_options=options)

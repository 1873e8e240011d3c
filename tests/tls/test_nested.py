"""TLS in TLS: AnyIO's session over one of ours."""

from __future__ import annotations

import ssl
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from anyio.streams.tls import TLSStream
from certificates import client_context, server_context
from peers import MIB, pattern, within
from tls_peers import NAME, both

import anypoll
from anypoll import TLSConnection

pytestmark = pytest.mark.anyio

SERVER: dict[str, Any] = {"server_side": True}
CLIENT: dict[str, Any] = {"hostname": NAME}


async def wrapped(wrap: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
    """A session between the two."""
    made: dict[int, Any] = {}

    async def shake_hands(which: int, context: ssl.SSLContext, **options: Any) -> None:
        made[which] = await wrap(ends[which], ssl_context=context, **options)

    await both(
        partial(shake_hands, 0, server_context(), **SERVER),
        partial(shake_hands, 1, client_context(), **CLIENT),
    )
    return made[0], made[1]


async def receive_all(stream: Any, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        got += await stream.receive()
    return bytes(got)


async def test_there_and_back_and_out_of_it_again() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        outer = await wrapped(TLSConnection.wrap, (first, second))
        server, client = await wrapped(TLSStream.wrap, outer)
        there, back = pattern(MIB), pattern(MIB, seed=1)

        async def read(stream: Any, data: bytes) -> None:
            assert await receive_all(stream, len(data)) == data

        await both(
            partial(client.send, there),
            partial(read, server, there),
            partial(server.send, back),
            partial(read, client, back),
        )
        await both(server.unwrap, client.unwrap)
        await within(outer[1].send(b"only the outer one"))
        assert await within(outer[0].receive()) == b"only the outer one"
        await both(outer[0].unwrap, outer[1].unwrap)
        await first.send(b"plain")
        assert await within(second.receive()) == b"plain"


async def test_the_end_of_the_inner_one() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        outer = await wrapped(TLSConnection.wrap, (first, second))
        server, client = await wrapped(TLSStream.wrap, outer)

        async def to_the_end() -> None:
            with pytest.raises(EndOfStream):
                await server.receive()
            await server.aclose()

        await both(client.aclose, to_the_end)
        for stream in outer:
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()


async def test_ours_does_not_lie_over_another() -> None:
    first, second = anypoll.socketpair()
    async with first, second:
        outer: Any = await wrapped(TLSConnection.wrap, (first, second))
        with pytest.raises(TypeError, match=r"not TLSConnection; .*TLSStream\.wrap"):
            await TLSConnection.wrap(outer[0], ssl_context=server_context(), server_side=True)
        for stream in outer:
            stream.abort()

"""A benchmark server on AnyIO's own streams: rpc buffered with one send per reply, plain echo."""

from __future__ import annotations

import argparse
from typing import Any

import anyio
from _launch import BACKLOG, HEADER_SIZE, HOST, announce, launch, tls_context
from anyio.abc import ByteStream, Listener, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

# What a client that closes, also in the middle of a frame or with a reset, ends a handler with.
DISCONNECTED = (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError)


async def handle_rpc(stream: ByteStream) -> None:
    reader = BufferedByteReceiveStream(stream)
    async with stream:
        try:
            while True:
                header = await reader.receive_exactly(HEADER_SIZE)
                payload = await reader.receive_exactly(int.from_bytes(header, "big"))
                await stream.send(header + payload)
        except DISCONNECTED:
            pass


async def handle_echo(stream: ByteStream) -> None:
    async with stream:
        try:
            async for chunk in stream:
                await stream.send(chunk)
        except DISCONNECTED:
            pass


async def serve(options: argparse.Namespace) -> None:
    handler = handle_rpc if options.workload == "rpc" else handle_echo
    listener: Listener[Any] = await anyio.create_tcp_listener(
        local_host=HOST, local_port=0, backlog=BACKLOG
    )
    port = listener.extra(SocketAttribute.local_port)
    if context := tls_context(options):
        listener = TLSListener(listener, context, standard_compatible=False)
    async with listener:
        announce(port)
        await listener.serve(handler)


if __name__ == "__main__":
    launch(serve)

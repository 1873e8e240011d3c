"""A benchmark server on Trio's own streams: frames split by hand, one send_all per batch."""

from __future__ import annotations

import argparse

import trio
from _frames import Splitter
from _launch import BACKLOG, HOST, READ_SIZE, announce, launch, tls_context

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


async def handle_rpc(stream: Stream) -> None:
    splitter = Splitter()
    try:
        while data := await stream.receive_some(READ_SIZE):
            if replies := splitter.answer(data):
                await stream.send_all(replies)
    except trio.BrokenResourceError:
        pass


async def handle_echo(stream: Stream) -> None:
    try:
        while data := await stream.receive_some(READ_SIZE):
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass


async def serve(options: argparse.Namespace) -> None:
    handler = handle_rpc if options.workload == "rpc" else handle_echo
    listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=BACKLOG)
    announce(listeners[0].socket.getsockname()[1])
    if context := tls_context(options):
        secured = [trio.SSLListener(listener, context) for listener in listeners]
        await trio.serve_listeners(handler, secured)
    else:
        await trio.serve_listeners(handler, listeners)


if __name__ == "__main__":
    launch(serve)

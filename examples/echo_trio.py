"""The same echo server in a plain Trio program: a nursery, Trio's scopes, no AnyIO in sight.

Run it with `python examples/echo_trio.py [PORT]`. Ctrl-C or SIGTERM stops it gracefully.
"""

from __future__ import annotations

import functools
import signal
import sys

import trio

import anypoll


async def handler(conn: anypoll.Connection) -> None:
    """Sends back what comes in; gives up on a peer that says nothing for a minute."""
    with trio.move_on_after(60) as scope:
        async for data in conn:
            await conn.send(data)
            scope.deadline = trio.current_time() + 60


async def main(port: int) -> None:
    serve = functools.partial(anypoll.serve_forever, handler, host="127.0.0.1", port=port)
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            server: anypoll.Server = await nursery.start(serve)
            print(f"Listening on port {server.port}", flush=True)
            async for _ in signals:
                break
        await server.shutdown(timeout=5)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)

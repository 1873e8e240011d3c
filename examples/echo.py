"""An echo server: one task per connection, beside whatever else the task group does.

Run it with `python examples/echo.py [PORT]`, or let the command do all but the handler:
`anypoll serve examples/echo.py:handler --port 8000`. Ctrl-C or SIGTERM stops it gracefully: who is
being answered gets the rest of the answer.
"""

from __future__ import annotations

import functools
import signal
import sys

import anyio

import anypoll


async def handler(conn: anypoll.Connection) -> None:
    """Sends back what comes in. At the end of the peer's input it returns, and that closes the
    connection, when everything is sent.
    """
    async for data in conn:
        await conn.send(data)


async def main(port: int) -> None:
    serve = functools.partial(
        anypoll.serve_forever, handler, host="127.0.0.1", port=port, idle_timeout=60
    )
    async with anyio.create_task_group() as tg:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            server: anypoll.Server = await tg.start(serve)
            print(f"Listening on port {server.port}", flush=True)
            async for _ in signals:
                break
        await server.shutdown(timeout=5)
        tg.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)

"""A server in request mode: for many clients that are silent most of the time, such as devices.

No task exists for a connection that waits: `on_request` is called when input has come. What a
client has said before lies in `conn.state`. The protocol: a line with a number is added to the
client's sum, and the sum is the answer.

Run it with `python examples/request_mode.py [PORT]`, or let the command do the rest:
`anypoll serve examples/request_mode.py:on_request --request-mode --port 8000`.
"""

from __future__ import annotations

import signal
import sys

import anyio

import anypoll


def on_prepare(conn: anypoll.Connection) -> None:
    """Nothing has been read yet. A silent client costs little, but not nothing."""
    conn.idle_timeout = 3600


async def on_request(conn: anypoll.Connection) -> None:
    """One request. If more lines are there already it is called again, and all the answers go out
    together; if a line is not whole yet it waits for the rest, and only this client is affected.
    """
    line = await conn.until(b"\n", max_bytes=100)
    try:
        conn.state = (conn.state or 0) + int(bytes(line))
    except ValueError:
        conn.writer.write(b"a number, please\n")
    else:
        conn.writer.write(b"%d\n" % conn.state)


async def main(port: int) -> None:
    async with anypoll.serve(
        on_request=on_request, on_prepare=on_prepare, host="127.0.0.1", port=port
    ) as server:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(f"Listening on port {server.port}", flush=True)
            async for _ in signals:
                break


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)

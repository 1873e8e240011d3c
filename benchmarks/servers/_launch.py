"""The launcher shared by the benchmark servers: options, event loop, and readiness message.

Every program takes the same options, listens on an ephemeral port of 127.0.0.1, says ``PORT n`` on
its standard output as soon as it accepts, and serves until it is killed.
"""

from __future__ import annotations

import argparse
import signal
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOST = "127.0.0.1"
BACKLOG = 4096
HEADER_SIZE = 4

_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def launch(serve: Callable[[str], Awaitable[None]], loops: tuple[str, ...]) -> None:
    """Run ``serve(workload)`` on the loop that the command line names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--loop", choices=loops, required=True)
    parser.add_argument("--workload", choices=("rpc", "echo"), required=True)
    parser.add_argument(
        "--lifetime", type=int, default=0, help="seconds after which SIGALRM ends the process"
    )
    options = parser.parse_args()
    signal.alarm(options.lifetime)
    backend, backend_options = _BACKENDS[options.loop]
    anyio.run(serve, options.workload, backend=backend, backend_options=backend_options)


def announce(port: int) -> None:
    print(f"PORT {port}", flush=True)

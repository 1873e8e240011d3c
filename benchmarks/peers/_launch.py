"""The launcher shared by the benchmark programs: options, event loop, and readiness message.

Every server takes the same options, listens on an ephemeral port of 127.0.0.1, says ``PORT n`` on
its standard output as soon as it accepts, and serves until it is killed. One that watches for
stalls says how long the longest was since the last time, in ms, for each line of its input.
"""

from __future__ import annotations

import argparse
import ast
import signal
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOST = "127.0.0.1"
BACKLOG = 4096
HEADER_SIZE = 4
READ_SIZE = 65536

_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def server_parser() -> argparse.ArgumentParser:
    parser = loop_parser()
    parser.add_argument("--workload", choices=("rpc", "echo"), required=True)
    parser.add_argument("--busy", action="store_true", help="another thread computes all the time")
    parser.add_argument("--certificate", help="a file with its key: serve over TLS")
    parser.add_argument("--watch-stalls", action="store_true")
    return parser


def loop_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--loop", choices=tuple(_BACKENDS), required=True)
    parser.add_argument(
        "--lifetime", type=int, default=0, help="seconds after which SIGALRM ends the process"
    )
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """For what runs on anypoll: ``options.configure`` is what to call ``configure`` with."""
    parser.add_argument("--configure", type=_setting, action="append", default=[])


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``; a value that is no literal of Python's is a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def launch(
    main: Callable[[argparse.Namespace], Awaitable[None]],
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """Run ``main(options)`` on the loop that the command line names."""
    options = (parser or server_parser()).parse_args()
    signal.alarm(options.lifetime)
    if getattr(options, "busy", False):
        threading.Thread(target=_compute, daemon=True).start()
    if getattr(options, "watch_stalls", False):
        main = _watched(main)
    backend, backend_options = _BACKENDS[options.loop]
    anyio.run(main, options, backend=backend, backend_options=backend_options)


def announce(port: int) -> None:
    print(f"PORT {port}", flush=True)


def tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """For a server that has a certificate."""
    if options.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options.certificate)
    return context


class StallWatch:
    """How much too late the loop resumes a task that sleeps for a millisecond, at the worst."""

    _PERIOD = 0.001

    def __init__(self) -> None:
        self._longest = 0.0

    async def run(self) -> NoReturn:
        before = time.perf_counter()
        while True:
            await anyio.sleep(self._PERIOD)
            now = time.perf_counter()
            self._longest = max(self._longest, now - before - self._PERIOD)
            before = now

    def take(self) -> float:
        """In seconds, since the last time."""
        longest, self._longest = self._longest, 0.0
        return longest


def _watched(
    main: Callable[[argparse.Namespace], Awaitable[None]],
) -> Callable[[argparse.Namespace], Awaitable[None]]:
    watch = StallWatch()

    def answer() -> None:
        for _ in sys.stdin:
            print(1e3 * watch.take(), flush=True)

    async def run(options: argparse.Namespace) -> None:
        threading.Thread(target=answer, daemon=True).start()
        async with anyio.create_task_group() as group:
            group.start_soon(watch.run)
            await main(options)

    return run


def _compute() -> NoReturn:
    # The kernel's name of the thread, so that its CPU time can be told from the server's.
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("busy", "ascii")
    number = 1
    while True:
        number = (number * 1103515245 + 12345) % 2147483648

"""The launcher shared by the benchmark programs: options, event loop, and readiness message.

Every server takes the same options, listens on an ephemeral port of 127.0.0.1, says ``PORT n`` on
its standard output as soon as it accepts, and serves until it is killed.
"""

from __future__ import annotations

import argparse
import ast
import signal
import threading
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
    backend, backend_options = _BACKENDS[options.loop]
    anyio.run(main, options, backend=backend, backend_options=backend_options)


def announce(port: int) -> None:
    print(f"PORT {port}", flush=True)


def _compute() -> NoReturn:
    # The kernel's name of the thread, so that its CPU time can be told from the server's.
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("busy", "ascii")
    number = 1
    while True:
        number = (number * 1103515245 + 12345) % 2147483648

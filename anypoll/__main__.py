"""The command line: ``anypoll serve`` runs a handler without a program around it.

`anypoll serve TARGET` prints the addresses it listens on, and calls TARGET for each connection.
SIGINT or SIGTERM stops it gracefully, a second one at once. The exit status is 0 after a stop, 1 if
it cannot listen, and 2 after a usage error; an error is one line on stderr.

Socket-activated by systemd, or by anything else that follows the sd_listen_fds(3) protocol, it
serves the sockets it was passed. An address as well is an error: one of the two would be silently
ignored, and clients of a socket that nobody serves wait forever.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import logging
import operator
import os
import signal
import stat
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any

import anyio

import anypoll

_GRACE = 0.8  # seconds; with the time that closing takes, a stop is over within about one

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START

_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

_TARGET = "MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE"

_Handler = Callable[[anypoll.Connection], Awaitable[Any]]


class _UsageError(Exception):
    """A usage error; the message explains it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        endpoint = _endpoint(options, _passed_sockets())  # before a child could inherit them
        backend, backend_options = _backend(options.backend)
        _set_pollers(options.pollers)
        what = "on_request" if options.request_mode else "handler"
        arguments = {what: _load_handler(options.target), **endpoint, **_limits(options)}
    except _UsageError as error:
        return _fail(2, error)
    return anyio.run(_serve, arguments, backend=backend, backend_options=backend_options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="anypoll", description="Serve connections with anypoll.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="call a coroutine function for each connection",
        description="Call a coroutine function, with an anypoll.Connection, for each connection.",
        epilog="SIGINT or SIGTERM closes idle connections at once and gives the others"
        f" {_GRACE} seconds; a second one ends at once. The exit status is 0 then."
        " Sockets that were passed by systemd (LISTEN_FDS, see sd_listen_fds(3)) are served instead"
        " of an address.",
    )
    serve.add_argument("target", metavar="TARGET", help=_TARGET)
    serve.add_argument("--host", help="default 127.0.0.1; empty for all interfaces")
    serve.add_argument("--port", type=int, help="default 0: any free port")
    serve.add_argument("--path", help="listen on a UNIX socket instead")
    serve.add_argument(
        "--backend", choices=_BACKENDS, default="asyncio", help="default %(default)s"
    )
    serve.add_argument("--pollers", type=int, metavar="N", help="threads that watch sockets")
    serve.add_argument(
        "--request-mode",
        action="store_true",
        help="call TARGET whenever input has come, instead of once for each connection",
    )
    serve.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="accept no more than so many at a time; the others wait",
    )
    return parser


def _passed_sockets() -> list[int]:
    """The descriptors passed to this process, as sd_listen_fds(3) finds them. Children get neither
    these nor the variables that describe them.
    """
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, _ = (os.environ.pop(name, None) for name in names)
    if pid is None or count is None or pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()):
        raise _UsageError(f"LISTEN_FDS must be a number of sockets, not {count!r}")
    passed = range(_FIRST_PASSED, _FIRST_PASSED + int(count))
    for fd in passed:
        try:
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except (OSError, OverflowError):
            raise _UsageError(f"LISTEN_FDS is {count}, but descriptor {fd} is not open") from None
        if not is_socket:
            raise _UsageError(f"LISTEN_FDS is {count}, but descriptor {fd} is not a socket")
        os.set_inheritable(fd, False)
    return [*passed]


def _endpoint(options: argparse.Namespace, passed: list[int]) -> dict[str, Any]:
    """Where to listen, as arguments for `anypoll.serve`."""
    tcp = options.host is not None or options.port is not None
    if passed:
        if tcp or options.path is not None:
            raise _UsageError("--host, --port and --path exclude the sockets of LISTEN_FDS")
        return {"sock": passed}
    if options.path is None:
        host = "127.0.0.1" if options.host is None else options.host
        port = options.port or 0
        if not 0 <= port < 1 << 16:
            raise _UsageError(f"--port must be between 0 and 65535, not {port}")
        return {"host": host or None, "port": port}
    if tcp:
        raise _UsageError("--path excludes --host and --port")
    return {"path": options.path}


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    """The limits, as arguments for `anypoll.serve`."""
    most = options.max_connections
    if most is not None and most < 1:
        raise _UsageError(f"--max-connections must be at least 1, not {most}")
    return {"max_connections": most}


def _backend(name: str) -> tuple[str, dict[str, Any]]:
    """The backend and its options, as arguments for `anyio.run`."""
    if name != "asyncio" and importlib.util.find_spec(name) is None:
        raise _UsageError(f"--backend {name}: {name} is not installed")
    return _BACKENDS[name]


def _set_pollers(pollers: int | None) -> None:
    if pollers is None:
        return
    try:
        anypoll.configure(pollers=pollers)
    except ValueError as error:
        raise _UsageError(f"--pollers {pollers}: {error}") from None


def _load_handler(target: str) -> _Handler:
    """The coroutine function that the target names."""
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise _UsageError(f"{target!r} is not of the form {_TARGET}")
    try:
        module = _load_file(source) if source.endswith(".py") else _load_module(source)
    except _UsageError:
        raise
    except Exception as error:  # the module's own code may raise anything
        raise _UsageError(f"cannot import {source!r}: {_describe(error)}") from error
    try:
        handler = operator.attrgetter(name)(module)
    except AttributeError:
        raise _UsageError(f"{source!r} has no attribute {name!r}") from None
    if not _is_coroutine_function(handler):
        raise _UsageError(f"{name!r} in {source!r} is not a coroutine function")
    return handler  # type: ignore[no-any-return]


def _is_coroutine_function(handler: Any) -> bool:
    """Whether a call returns a coroutine: covers functions, decorated ones, and `__call__`."""
    call = type(handler).__call__ if callable(handler) else None
    return any(map(inspect.iscoroutinefunction, (inspect.unwrap(handler), call)))


def _load_module(name: str) -> ModuleType:
    """Imports a module; the current directory comes first, as with `python -m`."""
    sys.path.insert(0, "")
    return importlib.import_module(name)


def _load_file(path: str) -> ModuleType:
    """Imports a file; its directory comes first, as with `python FILE`."""
    if not os.path.isfile(path):
        raise _UsageError(f"there is no file {path!r}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("__anypoll_main__", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _describe(error: Exception) -> str:
    """One line that says what a module raised, and where."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, (ImportError, SyntaxError)):  # these say where
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({frame.filename}:{frame.lineno})"


async def _serve(arguments: dict[str, Any]) -> int:
    """Serves until a signal arrives; returns the exit status."""
    async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        stack.callback(tasks.cancel_scope.cancel)
        signals = stack.enter_context(anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
        serving = anypoll.serve(**arguments, shutdown_timeout=_GRACE)
        try:
            server = await stack.enter_async_context(serving)
        except (OSError, ValueError) as error:
            endpoint = _show_endpoint(arguments)
            why = getattr(error, "strerror", None) or str(error)
            named = why.startswith(f"{endpoint}: ")  # an error of binding names the address itself
            return _fail(1, f"cannot listen on {why if named else f'{endpoint}: {why}'}")
        for address in server.addresses:
            print(f"listening on {_show(address)}", flush=True)
        await anext(signals)
        tasks.start_soon(_cancel_at_next, signals, tasks.cancel_scope)
    return 0


async def _cancel_at_next(signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()


def _show_endpoint(arguments: dict[str, Any]) -> str:
    """The requested endpoint, in its usual notation."""
    if "sock" in arguments:
        return "the sockets of LISTEN_FDS"
    return arguments.get("path") or _show((arguments["host"] or "*", arguments["port"]))


def _show(address: Any) -> str:
    """An address in its usual notation; the name of an abstract UNIX socket begins with `@`."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return os.fsdecode(address).replace("\0", "@")


def _fail(status: int, message: object) -> int:
    print(f"anypoll: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

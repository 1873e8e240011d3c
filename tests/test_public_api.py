"""The names users import: complete, each in one place, and with the parameters as promised."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from anyio.streams.tls import TLSStream
from programs import run_to_end

import anypoll
import anypoll.integrations.trio
import anypoll.mux
import anypoll.nocopy
import anypoll.streams

MODULES = [
    anypoll,
    anypoll.streams,
    anypoll.nocopy,
    anypoll.mux,
    anypoll.integrations.trio,
]
INTEGRATIONS = sorted((Path(anypoll.__file__).parent / "integrations").glob("*.py"))


def public_names(module: Any) -> set[str]:
    """What somebody who looks into the module takes for public."""
    return {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(thing)
        and name != "annotations"
        and str(getattr(thing, "__module__", "anypoll")).startswith("anypoll")
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_names_exist(module: Any) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_all_has_every_public_name_of_the_package() -> None:
    aliases = {"LoadBalance"}  # of types: those do not say where they are from
    assert public_names(anypoll) == set(anypoll.__all__) - aliases


@pytest.mark.parametrize("module", MODULES[1:], ids=lambda module: module.__name__)
def test_what_a_module_defines_is_public_or_private(module: Any) -> None:
    """A function or class that lies in a public module and is not in `__all__` may only be there
    for the package itself, whose modules import it by name.
    """
    defined = {
        name
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and name[0] != "_"
    }
    assert defined <= set(module.__all__) | set(anypoll.__all__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_each_name_says_where_it_is_public(module: Any) -> None:
    for name in module.__all__:
        thing = getattr(module, name)
        home = getattr(thing, "__module__", None)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert home is not None
            assert not any(part.startswith("_") for part in home.split(".")), f"{name}: {home}"
            assert getattr(sys.modules[home], name) is thing


def test_one_thing_has_one_home() -> None:
    homes: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            assert homes.setdefault(name, getattr(module, name)) is getattr(module, name)


def test_the_streams_are_importable_from_both_modules() -> None:
    assert anypoll.streams.Connection is anypoll.Connection
    assert anypoll.streams.UNIXConnection is anypoll.UNIXConnection
    assert anypoll.streams.SocketListener is anypoll.SocketListener
    assert anypoll.streams.TLSConnection is anypoll.TLSConnection


def test_star_import() -> None:
    names: dict[str, Any] = {}
    exec("from anypoll import *", names)
    assert set(anypoll.__all__) <= set(names)


def words(text: str) -> list[str]:
    return text.split()


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("connect_tcp", ["timeout", "read_timeout", "write_timeout", "keepalive"]),
        ("connect_unix", ["timeout", "read_timeout", "write_timeout", "keepalive"]),
        ("create_tcp_listener", []),
        ("create_unix_listener", []),
    ],
)
def test_parameters_are_those_of_anyio(name: str, added: list[str]) -> None:
    theirs = inspect.signature(getattr(anyio, name)).parameters
    ours = inspect.signature(getattr(anypoll, name)).parameters
    assert [n for n in theirs if n not in ours] == []
    assert [n for n in ours if n not in theirs] == [n for n in added if n in ours]
    assert [n for n in added if n not in ours] == []
    for n, parameter in theirs.items():
        if n != "kind":  # ours is keyword-only
            assert ours[n].kind == parameter.kind
        assert ours[n].default == parameter.default


def test_serve_and_serve_forever_take_the_same_options() -> None:
    promised = words(
        "handler host port path path_mode sock listeners backlog reuse_port read_timeout "
        "write_timeout idle_timeout keepalive nodelay shutdown_timeout "
        "read_high_water write_high_water read_limit on_request on_prepare on_connect "
        "on_disconnect on_error cancel_on_disconnect max_connections max_connections_per_peer"
    )
    assert set(promised) <= set(parameters(anypoll.serve))
    assert "task_status" in parameters(anypoll.serve_forever)


def test_classes_are_anyios() -> None:
    assert issubclass(anypoll.Connection, anyio.abc.SocketStream)
    assert issubclass(anypoll.UNIXConnection, anypoll.Connection)
    assert issubclass(anypoll.UNIXConnection, anyio.abc.UNIXSocketStream)
    assert issubclass(anypoll.SocketListener, anyio.abc.SocketListener)


@pytest.mark.parametrize("name", ["ReadTimeout", "WriteTimeout", "ConnectTimeout", "IdleTimeout"])
def test_timeouts_are_timeout_errors(name: str) -> None:
    assert issubclass(getattr(anypoll, name), TimeoutError)


def test_message_too_large_is_a_value_error() -> None:
    assert issubclass(anypoll.MessageTooLarge, ValueError)


COROUTINES = words("receive send send_eof aclose peek next skip until wait_writable")
PLAIN = words("abort add_close_callback detach fileno statistics set_keepalive set_nodelay")
ATTRIBUTES = words(
    "reader writer read_timeout write_timeout idle_timeout is_active at_eof server "
    "remote_address local_address"
)


def test_members_of_a_connection() -> None:
    for name in COROUTINES + PLAIN:
        assert callable(getattr(anypoll.Connection, name))
    for name in PLAIN:
        assert not inspect.iscoroutinefunction(getattr(anypoll.Connection, name))
    for name in ATTRIBUTES:
        assert isinstance(inspect.getattr_static(anypoll.Connection, name), property)
    assert not inspect.iscoroutinefunction(anypoll.socketpair)
    for name in ("send_fds", "receive_fds"):
        assert inspect.iscoroutinefunction(getattr(anypoll.UNIXConnection, name))


def test_members_of_a_tls_connection() -> None:
    added = words("connection reader writer peek next skip until read_timeout write_timeout")
    assert issubclass(anypoll.TLSConnection, TLSStream)
    for name in [*added, "idle_timeout", "state", "server", "is_active", "at_eof", "statistics"]:
        assert hasattr(anypoll.TLSConnection, name)
    for name in ("abort", "add_close_callback"):
        assert not inspect.iscoroutinefunction(getattr(anypoll.TLSConnection, name))
    theirs = inspect.signature(TLSStream.wrap).parameters
    ours = inspect.signature(anypoll.TLSConnection.wrap).parameters
    assert list(ours) == list(theirs)
    for n, parameter in theirs.items():
        assert (ours[n].kind, ours[n].default) == (parameter.kind, parameter.default)


def test_members_of_reader_and_writer() -> None:
    reader = words(
        "peek next skip until next_parts read_bytes read_str read_byte readinto peek_nowait "
        "next_nowait skip_nowait until_nowait release buffered __len__"
    )
    writer = "malloc malloc_ack malloc_len write write_str write_byte flush buffered __len__"
    assert [name for name in reader if not hasattr(anypoll.nocopy.Reader, name)] == []
    assert [name for name in writer.split() if not hasattr(anypoll.nocopy.Writer, name)] == []


def test_members_of_a_queue() -> None:
    queue = anypoll.mux.ShardQueue
    assert parameters(queue) == ["conn", "shards"]
    assert inspect.signature(queue).parameters["shards"].kind is inspect.Parameter.KEYWORD_ONLY
    for name in ("add", "aclose", "__aenter__", "__aexit__"):
        assert inspect.iscoroutinefunction(getattr(queue, name))
    assert isinstance(inspect.getattr_static(queue, "buffered"), property)


def test_server_members() -> None:
    names = (
        "listeners addresses port connections shutting_down wait_shutting_down statistics shutdown"
    )
    assert [name for name in names.split() if not hasattr(anypoll.Server, name)] == []


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (
            anypoll.MemoryStatistics,
            "blocks_in_use blocks_free bytes_in_use bytes_free bytes_pinned",
        ),
        (
            anypoll.PollerStatistics,
            (
                "connections waits events reads writes bytes_received bytes_sent wakeups "
                "wakeups_coalesced stale_tokens stalls timeouts blocks_in_use blocks_free "
                "bytes_in_use bytes_free bytes_pinned"
            ),
        ),
        (
            anypoll.ConnectionStatistics,
            (
                "bytes_received bytes_sent reads writes wakeups buffered_input buffered_output "
                "pinned created_at last_activity"
            ),
        ),
        (
            anypoll.ServerStatistics,
            "accepted active rejected handler_errors closed bytes_received bytes_sent",
        ),
        (anypoll.Statistics, "pollers"),
        (anypoll.Keepalive, "idle interval count"),
    ],
)
def test_statistics_are_frozen_dataclasses(cls: Any, fields: str) -> None:
    assert set(fields.split()) <= {field.name for field in dataclasses.fields(cls)}
    assert cls.__dataclass_params__.frozen


def test_configure_takes_keywords_only() -> None:
    kinds = {p.kind for p in inspect.signature(anypoll.configure).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    assert {"pollers", "load_balance", "block_size", "checkpoint_budget"} <= set(
        parameters(anypoll.configure)
    )
    assert anypoll.configure() is None


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"pollers": 0}, ValueError),
        ({"pollers": 1.5}, TypeError),
        ({"load_balance": "fair"}, ValueError),
        ({"checkpoint_budget": 0}, ValueError),
        ({"nonsense": 1}, TypeError),
    ],
)
def test_configure_refuses_nonsense(option: dict[str, Any], error: type[Exception]) -> None:
    before = len(anypoll.statistics().pollers)
    with pytest.raises(error):
        anypoll.configure(**option)
    assert len(anypoll.statistics().pollers) == before


def test_keepalive_refuses_nonsense() -> None:
    for wrong in ({"idle": 0}, {"interval": 0}, {"count": 0}, {"count": 1000}):
        with pytest.raises(ValueError, match="must be"):
            anypoll.Keepalive(**wrong)


OWN = ("self", "cls", "super()")
FOREIGN = {"_read_bio"}  # of AnyIO's TLSStream, which has no public way to ask


def private_uses(source: str) -> list[str]:
    """Where something of anypoll's is used that is not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module)[:7] == "anypoll"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OWN:
            names = [node.attr] if node.attr not in FOREIGN else []
        found += [f"{node.lineno}: {n}" for n in names if n[:1] == "_" and n[:2] != "__"]
    return found


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_integrations_use_the_public_api(path: Path) -> None:
    assert private_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "from anypoll import _epoll",
        "from anypoll._buffers.errors import ReadTimeout",
        "from .. import _epoll",
        "import anypoll._buffers.errors",
        "conn._core",
        "self.conn._core",
    ],
)
def test_the_check_of_integrations_sees_what_is_private(source: str) -> None:
    assert private_uses(source) != []
    assert private_uses("from __future__ import annotations\nself._own, cls.__name__") == []


def test_every_public_thing_has_a_docstring() -> None:
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), name


def run(code: str) -> str:
    done = run_to_end([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_starts_nothing_and_statistics_are_empty_then() -> None:
    out = run(
        "import os, sys, threading\n"
        "before = len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))\n"
        "import anypoll, anypoll.mux, anypoll.nocopy, anypoll.streams, anypoll.integrations\n"
        "anypoll.configure(pollers=3)\n"
        "after = len(os.listdir('/proc/self/task')), len(os.listdir('/proc/self/fd'))\n"
        "assert before == after, (before, after)\n"
        "assert threading.active_count() == 1\n"
        "assert anypoll.statistics().pollers == ()\n"
        "assert 'trio' not in sys.modules and 'uvloop' not in sys.modules\n"
        "print('fine')\n"
    )
    assert out == "fine\n"


def test_configured_pollers_start_with_the_first_connection() -> None:
    out = run(
        "import anyio, anypoll\n"
        "anypoll.configure(pollers=3, load_balance='least_connections')\n"
        "async def main():\n"
        "    a, b = anypoll.socketpair()\n"
        "    async with a, b:\n"
        "        print([p.connections for p in anypoll.statistics().pollers])\n"
        "        anypoll.configure(pollers=4)\n"
        "        print(len(anypoll.statistics().pollers))\n"
        "anyio.run(main)\n"
    )
    assert out == "[1, 1, 0]\n4\n"

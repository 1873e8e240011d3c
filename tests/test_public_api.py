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


every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


@every_module
def test_all_names_exist_and_say_where_they_are_public(module: Any) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            home = thing.__module__
            assert not any(part.startswith("_") for part in home.split(".")), f"{name}: {home}"
            assert getattr(sys.modules[home], name) is thing
            assert inspect.getdoc(thing), name


def test_all_has_every_public_name_of_the_package() -> None:
    aliases = {"LoadBalance"}  # of types: those do not say where they are from
    assert public_names(anypoll) == set(anypoll.__all__) - aliases


@every_module
def test_what_a_module_defines_is_public_or_private(module: Any) -> None:
    """A class that lies in a public module and is not in `__all__` may only be there for the
    package itself, whose modules import it by name.
    """
    defined = {
        name
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and name[0] != "_"
    }
    assert defined <= set(module.__all__) | set(anypoll.__all__)


def test_one_thing_has_one_home() -> None:
    homes: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            assert homes.setdefault(name, getattr(module, name)) is getattr(module, name)


def test_the_streams_are_importable_from_both_modules() -> None:
    streams = {"Connection", "UNIXConnection", "SocketListener", "TLSConnection"}
    assert streams <= set(anypoll.streams.__all__) & set(anypoll.__all__)


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


DIALING = ["timeout", "read_timeout", "write_timeout", "keepalive"]


@pytest.mark.parametrize(
    ("theirs", "ours", "added"),
    [
        (anyio.connect_tcp, anypoll.connect_tcp, DIALING),
        (anyio.connect_unix, anypoll.connect_unix, DIALING),
        (anyio.create_tcp_listener, anypoll.create_tcp_listener, []),
        (anyio.create_unix_listener, anypoll.create_unix_listener, []),
        (TLSStream.wrap, anypoll.TLSConnection.wrap, []),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_parameters_are_those_of_anyio(theirs: Any, ours: Any, added: list[str]) -> None:
    expected, found = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
    assert sorted(found) == sorted({*expected, *added, *({"kind"} & set(found))})
    for name, parameter in expected.items():
        if name != "kind":  # ours is keyword-only
            assert found[name].kind == parameter.kind
        assert found[name].default == parameter.default


@pytest.mark.parametrize(
    ("function", "promised"),
    [
        (
            anypoll.serve,
            (
                "handler host port path path_mode sock listeners backlog reuse_port read_timeout "
                "write_timeout idle_timeout keepalive nodelay shutdown_timeout read_high_water "
                "write_high_water read_limit on_request on_prepare on_connect on_disconnect "
                "on_error cancel_on_disconnect max_connections max_connections_per_peer"
            ),
        ),
        (anypoll.serve_forever, "handler task_status"),
        (anypoll.configure, "pollers load_balance block_size checkpoint_budget driver spin"),
        (anypoll.mux.ShardQueue, "conn shards"),
    ],
)
def test_parameters_are_as_promised(function: Any, promised: str) -> None:
    assert set(promised.split()) <= set(parameters(function))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (anypoll.configure, "pollers load_balance block_size checkpoint_budget driver spin"),
        (anypoll.mux.ShardQueue, "shards"),
    ],
)
def test_options_are_named(function: Any, names: str) -> None:
    found = inspect.signature(function).parameters
    assert {found[name].kind for name in names.split()} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (anypoll.Connection, anyio.abc.SocketStream),
        (anypoll.UNIXConnection, anypoll.Connection),
        (anypoll.UNIXConnection, anyio.abc.UNIXSocketStream),
        (anypoll.SocketListener, anyio.abc.SocketListener),
        (anypoll.TLSConnection, TLSStream),
        (anypoll.ReadTimeout, TimeoutError),
        (anypoll.WriteTimeout, TimeoutError),
        (anypoll.ConnectTimeout, TimeoutError),
        (anypoll.IdleTimeout, TimeoutError),
        (anypoll.MessageTooLarge, ValueError),
    ],
    ids=lambda cls: cls.__name__,
)
def test_classes_are_what_others_expect(cls: type, base: type) -> None:
    assert issubclass(cls, base)


READS = "peek next skip until"
TIMEOUTS = "read_timeout write_timeout idle_timeout"
#: Of each class: what is awaited, what is called at once, and properties.
MEMBERS: dict[type, tuple[str, str, str]] = {
    anypoll.Connection: (
        f"receive send send_eof aclose wait_writable {READS}",
        "abort add_close_callback detach fileno statistics set_keepalive set_nodelay",
        f"reader writer {TIMEOUTS} is_active at_eof server remote_address local_address",
    ),
    anypoll.UNIXConnection: ("send_fds receive_fds", "", ""),
    anypoll.TLSConnection: (
        READS,
        "abort add_close_callback statistics",
        f"connection reader writer {TIMEOUTS} state server is_active at_eof",
    ),
    anypoll.nocopy.Reader: (
        f"{READS} next_parts read_bytes read_str read_byte readinto",
        "peek_nowait next_nowait skip_nowait until_nowait release __len__",
        "buffered",
    ),
    anypoll.nocopy.Writer: (
        "flush",
        "malloc malloc_ack write write_str write_byte __len__",
        "malloc_len buffered",
    ),
    anypoll.mux.ShardQueue: ("add aclose __aenter__ __aexit__", "", "buffered"),
    anypoll.Server: (
        "wait_shutting_down shutdown",
        "statistics",
        "listeners addresses port connections shutting_down",
    ),
}


@pytest.mark.parametrize("cls", MEMBERS, ids=lambda cls: cls.__name__)
def test_members(cls: type) -> None:
    awaited, called, properties = (names.split() for names in MEMBERS[cls])
    for name in awaited + called:
        assert callable(getattr(cls, name))
        if name in called:
            assert not inspect.iscoroutinefunction(getattr(cls, name)), name
    for name in properties:
        assert not callable(inspect.getattr_static(cls, name)), name


BLOCKS = "blocks_in_use blocks_free bytes_in_use bytes_free bytes_pinned"
TRAFFIC = "bytes_received bytes_sent reads writes wakeups"


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (anypoll.MemoryStatistics, BLOCKS),
        (
            anypoll.PollerStatistics,
            f"connections waits events {TRAFFIC} wakeups_coalesced stale_tokens stalls timeouts "
            "looks spins hits " + BLOCKS,
        ),
        (
            anypoll.ConnectionStatistics,
            f"{TRAFFIC} buffered_input buffered_output pinned created_at last_activity",
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

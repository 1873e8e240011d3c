"""Shared pytest configuration: the event loops, and where the foreign programs are."""

from __future__ import annotations

import gc
import importlib
import os
import re
import shutil
import socket
import ssl
import sys
import zlib
from collections.abc import Awaitable, Callable, Generator, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import certificates
import leaks
import pytest

import anypoll
from anypoll._loop import runtime as _runtime
from anypoll._tls import openssl

ROOT = Path(__file__).parent.parent
LOOPS = ("asyncio", "uvloop", "trio")
Main = Callable[[], Awaitable[Any]]

# Python programs that tests start show the stacks of their threads when they are killed by SIGABRT,
# which is what programs.py does to one that does not end.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")

# A debug build of CPython has no warning filters of its own. Those programs are to print what they
# print elsewhere; the last entry comes first.
if hasattr(sys, "gettotalrefcount"):
    os.environ.setdefault(
        "PYTHONWARNINGS",
        "ignore::ResourceWarning,ignore::ImportWarning,ignore::PendingDeprecationWarning,"
        "ignore::DeprecationWarning,default::DeprecationWarning:__main__",
    )

try:
    import uvloop
except ImportError:  # there is none yet for this interpreter
    _uvloop = pytest.param(None, id="uvloop", marks=pytest.mark.skip(reason="uvloop is missing"))
else:
    _uvloop = pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop")

try:
    from hypothesis import settings
    from hypothesis.database import DirectoryBasedExampleDatabase
except ImportError:
    pass
else:
    # Deadlines measure the machine; the examples that failed stay inside build/.
    settings.register_profile(
        "anypoll",
        deadline=None,
        database=DirectoryBasedExampleDatabase(ROOT / "build" / "cache" / "hypothesis"),
    )
    settings.load_profile("anypoll")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        _uvloop,
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """One run of the test on each loop: `pytestmark = pytest.mark.anyio` in the module."""
    return request.param


@pytest.fixture
def run(anyio_backend: tuple[str, dict[str, Any]]) -> Callable[[Main], Any]:
    """Runs a main function on an event loop of its own, which ends with it."""
    backend, options = anyio_backend
    return lambda main: anyio.run(main, backend=backend, backend_options=options)


@pytest.fixture(params=["memory", "native"])
def tls_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kind of session behind each TLS connection that the test makes: from Python, over memory,
    or of the core. No other is made, unless the core cannot have the context
    (tests/tls/test_native.py is about when that is). With ``plain_or_tls`` also none at all.
    """
    way: str = request.param
    why_not = openssl.why_not
    if way == "memory":
        monkeypatch.setattr("anypoll._tls.openssl.why_not", lambda _: "the test wants it so")
    elif way == "native" and (reason := why_not(certificates.server_context())):
        pytest.skip(f"the core cannot have sessions: {reason}")
    made: set[bool] = set()
    init = anypoll.TLSConnection.__init__

    def noting(self: anypoll.TLSConnection, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if why_not(self._ssl_object.context) is None:
            made.add(self.extra(anypoll.AnypollAttribute.tls_native))

    monkeypatch.setattr(anypoll.TLSConnection, "__init__", noting)
    yield way
    assert made <= ({way == "native"} if way != "plain" else set())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-loop",
        action="store_true",
        help="run each test on one event loop, chosen by its name, instead of on all three",
    )
    parser.addoption(
        "--driver",
        choices=("auto", "thread"),
        default="auto",
        help="who drives the pollers in this process, as for anypoll.configure()",
    )


def pytest_configure(config: pytest.Config) -> None:
    anypoll.configure(driver=config.getoption("--driver"))


@pytest.fixture
def by_threads() -> Iterator[None]:
    """The pollers are driven by their threads, whatever the rest of this run does."""
    before: Any = _runtime.settings().driver
    anypoll.configure(driver="thread")
    yield
    anypoll.configure(driver=before)


@pytest.fixture
def by_loops() -> Iterator[None]:
    """An event loop that has its poller to itself drives it."""
    gc.collect()  # loops that earlier tests have left without an end count as well
    before: Any = _runtime.settings().driver
    anypoll.configure(driver="auto")
    yield
    anypoll.configure(driver=before)


def _loop_of(item: pytest.Item) -> str | None:
    """The loop in a test's name, `test_x[trio-tcp]`; None if it does not run once on each."""
    return next((word for word in re.split(r"[\[\]-]", item.name) if word in LOOPS), None)


def _unwanted_loops(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """All but one of those that differ by their loop alone. A checksum of the name chooses, so a
    test always runs on the same loop, and all loops have their share of any file.
    """
    groups: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        if loop := _loop_of(item):
            name = re.sub(rf"(?<=[\[-]){loop}(?=[\]-])", "*", item.nodeid, count=1)
            groups.setdefault(name, {})[loop] = item
    for name, by_loop in groups.items():
        loops = sorted(by_loop)
        chosen = loops[zlib.crc32(name.encode()) % len(loops)]
        yield from (item for loop, item in by_loop.items() if loop != chosen)


def _excluded(item: pytest.Item) -> bool:
    """By `@pytest.mark.loops("asyncio", "uvloop")`: what it tests is there on these alone."""
    marker = item.get_closest_marker("loops")
    return marker is not None and _loop_of(item) not in marker.args


def _takes_any_loop(item: pytest.Item) -> bool:
    """By `@pytest.mark.any_loop`."""
    return item.get_closest_marker("any_loop") is not None


@pytest.hookimpl(trylast=True)  # behind -m and -k: a group is what would run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = {item for item in items if _excluded(item)}
    every = config.getoption("--one-loop")
    out.update(
        _unwanted_loops(
            [item for item in items if item not in out and (every or _takes_any_loop(item))]
        )
    )
    if out:
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, int]]]:
    """Names that resolve to the addresses that a test gives them; a port 0 of those stands for the
    port that is asked for.
    """
    known: dict[str, list[tuple[str, int]]] = {}
    real = anyio.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        if host not in known:
            return await real(host, port, **options)
        await anyio.lowlevel.checkpoint()
        wanted = options.get("family", socket.AF_UNSPEC)
        found = []
        for address in known[host]:
            six = ip_address(address[0]).version == 6
            family = socket.AF_INET6 if six else socket.AF_INET
            if wanted in {socket.AF_UNSPEC, family}:
                found.append((family, socket.SOCK_STREAM, 6, "", (address[0], address[1] or port)))
        return found

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    return known


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test after which a descriptor, a connection, a block or a thread is left.

    Not under a sanitizer: a full collection after each test takes seconds there, and the plain run
    has looked.
    """
    if "san" in os.environ.get("LD_PRELOAD", ""):
        yield
        return
    leaks.start()
    before = leaks.Snapshot.take()
    yield
    request.node.funcargs.clear()  # or pytest would hold what the fixtures gave a little longer
    if not request.node.stash.get(_failed, False):  # the traceback of a failure holds its objects
        left = leaks.leaks_since(before)
        if left:
            pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def sanitized() -> bool:
    """Whether a sanitizer watches this run: things take longer then."""
    return "san" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="session")
def foreign_env() -> dict[str, str]:
    """The environment for programs that are not ours: no sanitizer is preloaded there."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@pytest.fixture(scope="session")
def anypoll_command() -> list[str]:
    """The installed `anypoll`, as its users start it, whatever the environment is called."""
    return [sys.executable, "-m", "anypoll"]


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: redis-tools)")
    return path


@pytest.fixture(scope="session")
def redis_cli() -> str:
    """The path of redis-cli; the test is skipped where there is none."""
    return _program("redis-cli")


@pytest.fixture(scope="session")
def redis_benchmark() -> str:
    """The path of redis-benchmark; the test is skipped where there is none."""
    return _program("redis-benchmark")


@pytest.fixture(scope="session")
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context, with a certificate for anypoll.test and 127.0.0.1, and a client's that
    trusts it.
    """
    return certificates.server_context(), certificates.client_context()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an example by its name, afresh, as another program in its directory would."""
    folder = str(ROOT / "examples")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(folder):
            del sys.modules[name]

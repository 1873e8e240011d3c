"""The documentation: its programs run and print what it says they print, its commands exist."""

from __future__ import annotations

import builtins
import configparser
import importlib
import importlib.metadata
import inspect
import logging
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import anyio
import certificates
import pytest
from doc_blocks import (
    ROOT,
    Block,
    Program,
    blocks,
    is_whole,
    programs,
    run_pieces,
    same_output,
)
from programs import output_at_end

import anypoll
import anypoll.integrations.httpcore
import anypoll.integrations.trio
from anypoll import __main__ as _cli, integrations, mux
from anypoll._buffers import errors
from anypoll._connection import core as _connection
from anypoll._loop import hub as _hub
from anypoll.nocopy import LinkBuffer, Reader, Writer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INTERNALS = sorted((ROOT / "docs" / "internals").glob("*.md"))
PROGRAMS = [program for page in PAGES for program in programs(page)]

_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)

#: Commands of the systems that a page is about.
FOREIGN = {"systemctl", "journalctl", "redis-cli", "nc", "ss", "ulimit", "sysctl"}


def _params(kind: str) -> list[Any]:
    return [pytest.param(p, id=p.name) for p in PROGRAMS if _kind(p) == kind]


def _kind(program: Program) -> str:
    """How it has to be run."""
    if not is_whole(program.source):
        return "pieces"
    if "os.fork(" in program.source:
        return "forks"
    names_its_loop = any(s in program.source for s in ("backend=", "trio.run(", "asyncio.run("))
    return "with its loop" if names_its_loop else "on any loop"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are that programs about TLS read."""
    path = tmp_path_factory.mktemp("docs")
    certificates.certificate().private_key_and_cert_chain_pem.write_to_path(path / "server.pem")
    certificates.authority().cert_pem.write_to_path(path / "ca.pem")
    return path


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """What a program says about logging holds for itself only."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    yield
    for logger, level, disabled in before:
        logger.setLevel(level)
        logger.disabled = disabled


@pytest.fixture(autouse=True)
def there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)


# --- programs ------------------------------------------------------------------------------------


@pytest.mark.unsanitized  # their timeouts are written for readers
@pytest.mark.parametrize("program", _params("with its loop"))
def test_programs_with_a_loop_run(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_whole(program, monkeypatch)
    _check_output(program, capsys.readouterr().out)


@pytest.mark.unsanitized
@pytest.mark.parametrize("program", _params("on any loop"))
def test_programs_run(
    program: Program,
    anyio_backend: tuple[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend, options = anyio_backend
    monkeypatch.setattr(anyio, "run", partial(anyio.run, backend=backend, backend_options=options))
    test_programs_with_a_loop_run(program, monkeypatch, capsys)


def _run_whole(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with these exceptions: its server gets a free port; where it would serve for
    ever, what its handler says is an echo is tried, and it ends; where it waits for signals, they
    come.
    """
    servers: list[anypoll.Server] = []
    real_receiver = anyio.open_signal_receiver

    class ServeOnFreePort(anypoll.serve):
        def __init__(self, handler: Any = None, **options: Any) -> None:
            super().__init__(handler, **{**options, "port": 0} if "port" in options else options)

        async def __aenter__(self) -> anypoll.Server:
            servers.append(await super().__aenter__())
            return servers[-1]

    async def instead_of_for_ever() -> None:
        await _try_echo(servers[-1].port)

    @contextmanager
    def signals_that_come(*signals: signal.Signals) -> Iterator[Any]:
        with real_receiver(*signals) as received:
            os.kill(os.getpid(), signals[-1])
            yield received

    monkeypatch.setattr(anypoll, "serve", ServeOnFreePort)
    monkeypatch.setattr(anyio, "sleep_forever", instead_of_for_ever)
    monkeypatch.setattr(anyio, "open_signal_receiver", signals_that_come)
    [block] = program.blocks
    exec(compile(block.padded(), str(block.text), "exec"), {"__name__": "__main__"})
    servers.clear()


@pytest.mark.anyio
@pytest.mark.unsanitized
@pytest.mark.parametrize("program", _params("pieces"))
async def test_pieces_run(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    with anyio.fail_after(30):
        await run_pieces(program)
    _check_output(program, capsys.readouterr().out)


@pytest.mark.unsanitized
@pytest.mark.parametrize("program", _params("forks"))
def test_programs_that_fork_run(program: Program, tmp_path: Path) -> None:
    """In a process of their own: their echo is tried on the port that they print, then SIGTERM ends
    them.
    """
    file = tmp_path / "program.py"
    file.write_text(program.source)
    with subprocess.Popen(
        [sys.executable, "-u", str(file)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            anyio.run(_try_echo, int(re.findall(r"\d+", line)[-1]))
            process.send_signal(signal.SIGTERM)
            rest, _ = output_at_end(process)
            assert process.returncode == 0
        finally:
            process.kill()
    _check_output(program, line + rest)


async def _try_echo(port: int) -> None:
    with anyio.fail_after(30):
        async with await anyio.connect_tcp("127.0.0.1", port) as client:
            await client.send(b"to and fro")
            received = b""
            while received != b"to and fro":
                received += await client.receive()


def _check_output(program: Program, printed: str) -> None:
    if program.blocks[0].text.name == "README.md" and not program.output:
        return  # it shows none
    if not same_output(program.output, printed):
        pytest.fail(f"{program.name} prints\n{printed}\nand should print\n{program.output}")


# --- commands ------------------------------------------------------------------------------------


def _commands() -> Iterator[tuple[Block, str]]:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                for line in block.source.replace("\\\n", " ").splitlines():
                    yield block, line
            elif block.language == "ini":
                unit = configparser.ConfigParser(interpolation=None, strict=False)
                unit.optionxform = str  # type: ignore[assignment, method-assign]
                unit.read_string(block.source)
                for section in unit.values():
                    if "ExecStart" in section:
                        program, *arguments = shlex.split(section["ExecStart"])
                        yield block, shlex.join([os.path.basename(program), *arguments])


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=f"{block.where}-{line}") for block, line in _commands()]
)
def test_commands_exist(line: str) -> None:
    command, *arguments = shlex.split(line, comments=True)
    if command == "anypoll":
        _cli._parser().parse_args(arguments)
    elif command == "pip":
        assert arguments[0] == "install"
        extras = set(importlib.metadata.metadata("anypoll").get_all("Provides-Extra") or ())
        for name in arguments[1:]:
            match = re.fullmatch(r"anypoll(?:\[(\w+)\])?", name)
            assert match, name
            assert match[1] is None or match[1] in extras
    elif command == "python":
        assert (ROOT / arguments[0]).exists()
    else:
        assert command in FOREIGN | {"make"}  # the targets of make are looked up in test_readme.py


# --- why connections have ended ------------------------------------------------------------------


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _reasons(page: Path) -> set[str]:
    """What is named in the columns of that heading."""
    found: set[str] = set()
    column: int | None = None
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = _cells(line).index("reason") if "reason" in _cells(line) else -1
        elif column >= 0:
            found |= set(_CODE.findall(_cells(line)[column]))
    return found


@pytest.mark.parametrize(
    ("page", "reasons"),
    [
        ("deployment.md", get_args(errors.Reason)),
        ("internals/lifecycle.md", get_args(errors.Reason)),
        ("errors.md", {*errors._OWN.values(), "error"}),
    ],
)
def test_reasons_are_those_of_the_code(page: str, reasons: set[str]) -> None:
    assert _reasons(ROOT / "docs" / page) == set(reasons)


# --- names ---------------------------------------------------------------------------------------

_MODULES = [anypoll, anypoll.streams, anypoll.nocopy, mux, integrations.trio, integrations.httpcore]
_PUBLIC: dict[str, Any] = {name: getattr(m, name) for m in _MODULES for name in m.__all__}
_CLASSES = {name: thing for name, thing in _PUBLIC.items() if inspect.isclass(thing)}

_INSIDE: dict[str, tuple[type, ...]] = {"Core": (_connection.Core,), "Hub": (_hub.Hub,)}

#: What the texts call our objects.
_KINDS: dict[str, tuple[type, ...]] = {
    "conn": (anypoll.Connection, anypoll.UNIXConnection),
    "reader": (Reader,),
    "writer": (Writer,),
    "server": (anypoll.Server,),
    "tls": (anypoll.TLSConnection,),
    "listener": (anypoll.SocketListener,),
    "stream": (anypoll.Connection, integrations.trio.TrioStream),
    "buffer": (LinkBuffer,),
    "queue": (mux.ShardQueue,),
    **_INSIDE,
    **{name: (cls,) for name, cls in _CLASSES.items()},
}
_STATISTICS = {
    "conn": anypoll.ConnectionStatistics,
    "server": anypoll.ServerStatistics,
    "anypoll": anypoll.Statistics,
}

_DOTTED = re.compile(rf"(?<![\w./])(anypoll|{'|'.join(_KINDS)})((?:\.\w+)+)")
_COUNTED = re.compile(rf"({'|'.join(_STATISTICS)})\.statistics\(\)\.(\w+)")
_CALLED = re.compile(r"(?<![\w.])([a-z_]\w*)\(")
_KEYWORD = re.compile(r"(?<![\w.\-/])([a-z_]\w*)=(?!=)")
_WORD = re.compile(r"[a-z]+(?:_[a-z]+)+")

#: Loggers, files, hosts, and what is another library's.
_OTHERS = {
    *("anypoll.server", "anypoll.connection", "anypoll.pollers"),
    *("server.pem", "anypoll.test", "ShardQueue.Add", "ShardQueue.Close"),
    *("backend", "main", "fork", "fail_after", "move_on_after", "wait_all_tasks_blocked"),
    *("start", "stop", "run_sync_soon", "serve_listeners"),
    *("autojump_threshold", "close_notify", "raw_socket", "receive_until"),
    *("anypoll.tls", "sni_callback", "keylog_filename", "getpeercert"),
}


def _own(cls: type) -> dict[str, Any]:
    """What is public of a class, but for what it has from another library's, or from a public one;
    with the docstring.
    """
    above = [c for c in _CLASSES.values() if c is not cls and issubclass(cls, c)]
    members: dict[str, Any] = {}
    for home in reversed(cls.__mro__):
        if home.__module__.startswith("anypoll") and not any(issubclass(c, home) for c in above):
            members |= dict.fromkeys(inspect.get_annotations(home), home)
            members |= vars(home)
    return {name: inspect.getdoc(thing) for name, thing in members.items() if name[0] != "_"}


def _parameters(thing: Any) -> list[str]:
    try:
        return [name for name in inspect.signature(thing).parameters if name[0] != "_"]
    except (TypeError, ValueError):
        return []


_PARAMETERS = {
    name
    for thing in _PUBLIC.values()
    for function in [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
    for name in _parameters(getattr(function, "__func__", function))
}
_MEMBERS = {name for cls in _CLASSES.values() for name in dir(cls)} | {
    name for cls in _CLASSES.values() for name in _own(cls)
}
_KNOWN = _MEMBERS | _PARAMETERS | set(_PUBLIC) | set(get_args(errors.Reason)) | _OTHERS


def _is_there(root: str, attributes: str) -> bool:
    """Of objects only the first attribute is looked at: what it gives is known at run time."""
    if root in _KINDS:
        name = attributes.split(".")[1]
        return any(
            hasattr(cls, name)
            or name in _own(cls)
            or (root in _INSIDE and f"self.{name}" in inspect.getsource(cls))
            for cls in _KINDS[root]
        )
    try:
        pkgutil.resolve_name(root + attributes)
    except (ImportError, AttributeError):
        return False
    return True


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def _options() -> set[str]:
    """Of `anypoll serve`."""
    [commands] = (a for a in _cli._parser()._actions if isinstance(a.choices, dict))
    return {option for a in commands.choices["serve"]._actions for option in a.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    missing: set[str] = set()
    for code in _CODE.findall(_prose(page)):
        missing |= {a + b for a, b in _DOTTED.findall(code) if not _is_there(a, b)}
        for root, name in _COUNTED.findall(code):
            if name not in _own(_STATISTICS[root]):
                missing.add(code)
        called = {name for name in _CALLED.findall(code) if not hasattr(builtins, name)}
        words = {code} if _WORD.fullmatch(code) else set()
        missing |= (called | words | set(_KEYWORD.findall(code))) - _KNOWN
        missing |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - _options()
    assert missing - _OTHERS == set()


@pytest.mark.parametrize("page", INTERNALS, ids=lambda page: page.name)
def test_names_of_the_inside_exist(page: Path) -> None:
    named = [name for code in _CODE.findall(_prose(page)) for name in _DOTTED.findall(code)]
    assert [a + b for a, b in named if b not in (".h", ".c", ".py") and not _is_there(a, b)] == []


def test_the_map_has_every_file() -> None:
    """Of the wings; and no other. Beside the first name of a row the wing is left out."""
    package = Path(anypoll.__file__).parent
    text = (ROOT / "docs" / "internals" / "README.md").read_text()
    rows = re.findall(r"(?m)^\| `(_\w+)/(.*?) \|", text)
    named = {f"{wing}/{name}" for wing, row in rows for name in re.findall(r"(\w+\.py)`", row)}
    there = {f"{path.parent.name}/{path.name}" for path in package.glob("_*/[!_]*.py")}
    assert named == there


def test_the_tables_of_options_are_complete() -> None:
    """What to listen on, and all else but the handler: of `serve()`."""
    named: list[str] = []
    for heading in ("## Where to listen", "## Options"):
        section = _prose(ROOT / "docs" / "serving.md").split(heading)[1].split("\n## ")[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            for code in _CODE.findall(row):
                named += [code] if code.isidentifier() else _KEYWORD.findall(code)
    assert {*named, "path_mode"} == set(_parameters(anypoll.serve)) - {"handler"}


def test_the_table_of_statistics_names_fields() -> None:
    section = _prose(ROOT / "docs" / "deployment.md").split("## Monitoring")[1]
    rows = dict(re.findall(r"^\| `(\w+)\.statistics\(\)` \| (.*) \|$", section, re.MULTILINE))
    assert set(rows) == {"server", "conn"}
    for root, row in rows.items():
        assert set(_CODE.findall(row)) <= set(_own(_STATISTICS[root]))


# --- everything is said --------------------------------------------------------------------------

_DIRECTIVE = re.compile(r"^( *)\.\. (\w+):: (\S+)\n((?:\1   :.*\n)*)", re.MULTILINE)


def _in_reference() -> tuple[set[Any], set[tuple[str, str]]]:
    """The things that autodoc lists, and the members of classes among them."""
    things: set[Any] = set()
    members: set[tuple[str, str]] = set()
    for page in (ROOT / "docs" / "reference").glob("*.rst"):
        module = outer = ""
        for _, kind, name, options in _DIRECTIVE.findall(page.read_text("utf-8") + "\n"):
            listed = [name]
            if kind in ("module", "currentmodule", "automodule"):
                module = name
                listed = list(importlib.import_module(name).__all__) if kind == "automodule" else []
                if ":no-members:" in options:
                    continue
            elif kind == "automethod":
                members.add((outer, name))
                continue
            elif not kind.startswith(("auto", "data")):
                continue
            outer = name
            for each in listed:
                thing = pkgutil.resolve_name(f"{module}.{each}")
                things.add(each)
                if inspect.isclass(thing) and ":no-members:" not in options:
                    members |= {(each, n) for n in _shown(thing, options)}
    return things, members


def _shown(cls: type, options: str) -> set[str]:
    """What autodoc shows of a class, or is told to leave out since it is for the package alone."""
    excluded = re.findall(r":exclude-members: (.*)", options)
    shown = {name.strip() for names in excluded for name in names.split(",")}
    for name, text in _own(cls).items():
        own = name in vars(cls) or name in inspect.get_annotations(cls)
        if (own or ":inherited-members:" in options) and (text or ":undoc-members:" in options):
            shown.add(name)
    return shown


def test_everything_public_is_documented() -> None:
    """In prose, or in the reference; a parameter also where the docstring that is shown says what
    it is.
    """
    texts = [page.read_text("utf-8") for page in PAGES]
    code = [c for text in texts for c in [*_CODE.findall(text), *_FENCED.findall(text)]]
    words = set(re.findall(r"\w+", " ".join(code)))
    things, members = _in_reference()
    missing = [name for name in _PUBLIC if name not in things and name not in words]
    for name, thing in _PUBLIC.items():
        if inspect.isclass(thing):
            missing += [
                f"{name}.{member}"
                for member in _own(thing)
                if member not in words and (name, member) not in members
            ]
        if inspect.isfunction(thing) or thing is anypoll.serve:
            explained = re.findall(r":param (\w+):", inspect.getdoc(thing) or "")
            told = words | (set(explained) if name in things else set())
            missing += [f"{name}({n}=)" for n in _parameters(thing) if n not in told]
    assert missing == []

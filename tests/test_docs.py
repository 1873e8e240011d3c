"""The documentation: its programs run and print what it says they print, its commands exist."""

from __future__ import annotations

import configparser
import importlib.metadata
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

import anypoll
from anypoll import _cli, _ends
from anypoll.nocopy import Reader, Writer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [program for page in PAGES for program in programs(page)]

_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

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
    real_run, (backend, options) = anyio.run, anyio_backend

    def run(function: Any, *args: Any) -> Any:
        return real_run(function, *args, backend=backend, backend_options=options)

    monkeypatch.setattr(anyio, "run", run)
    _run_whole(program, monkeypatch)
    _check_output(program, capsys.readouterr().out)


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
            port = int(re.findall(r"\d+", line)[-1])
            anyio.run(_try_echo, port)
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            assert process.wait(30) == 0
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
        ("deployment.md", get_args(_ends.Reason)),
        ("internals/lifecycle.md", get_args(_ends.Reason)),
        ("errors.md", {*_ends._OWN.values(), "error"}),
    ],
)
def test_reasons_are_those_of_the_code(page: str, reasons: set[str]) -> None:
    assert _reasons(ROOT / "docs" / page) == set(reasons)


# --- names ---------------------------------------------------------------------------------------

_NAME = re.compile(r"(?<![\w./])(anypoll|conn|reader|writer|server)((?:\.\w+)+)")
_OTHERS = {  # loggers, a file, a host
    *("anypoll.server", "anypoll.connection", "anypoll.pollers"),
    *("server.pem", "anypoll.test"),
}
_KINDS: dict[str, type] = {
    "conn": anypoll.Connection,
    "reader": Reader,
    "writer": Writer,
    "server": anypoll.Server,
}


def _is_there(root: str, attributes: str) -> bool:
    """Of objects only the first attribute is looked at: what it gives is known at run time."""
    if root in _KINDS:
        return hasattr(_KINDS[root], attributes.split(".")[1])
    try:
        pkgutil.resolve_name(root + attributes)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    code = " ".join(_CODE.findall(prose))
    missing = [
        root + attributes
        for root, attributes in _NAME.findall(code)
        if root + attributes not in _OTHERS and not _is_there(root, attributes)
    ]
    assert missing == []

"""A runner for the code blocks in the documentation.

A Python block that starts an event loop itself is a whole program. All others under one heading are
one program in pieces: they may `await`, and have `conn` and `peer`, the two ends of a new TCP
connection. A `text` block that follows is what is printed; `...` stands for anything.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

import anypoll

ROOT = Path(__file__).parent.parent

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_RUNNERS = ("anyio", "trio", "asyncio")


@dataclass(frozen=True)
class Block:
    text: Path
    line: int  # of its first line
    language: str
    source: str
    heading: str

    @property
    def where(self) -> str:
        return f"{self.text.relative_to(ROOT)}:{self.line}"

    def padded(self) -> str:
        """The source, where tracebacks find it."""
        return "\n" * (self.line - 1) + self.source


@dataclass
class Program:
    blocks: list[Block] = field(default_factory=list)
    output: str = ""

    @property
    def name(self) -> str:
        return self.blocks[0].where

    @property
    def source(self) -> str:
        return "".join(block.source for block in self.blocks)


def blocks(text: Path) -> Iterator[Block]:
    content = text.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(content):
        above = content[: fence.start()]
        without_code = _FENCE.sub("", above)
        headings = _HEADING.findall(without_code)
        line = content.count("\n", 0, fence.start(2)) + 1
        yield Block(text, line, fence[1], fence[2], headings[-1] if headings else "")


def is_whole(source: str) -> bool:
    """Whether a block starts an event loop."""
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "run"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in _RUNNERS
        for call in ast.walk(ast.parse(source))
    )


def programs(text: Path) -> list[Program]:
    """Of one text; what its `text` blocks claim is the output of the program above them."""
    found: list[Program] = []
    pieces: dict[str, Program] = {}
    last: Program | None = None
    for block in blocks(text):
        if block.language == "text":
            assert last is not None, f"{block.where} is the output of nothing"
            last.output += block.source
        elif block.language == "python":
            if is_whole(block.source):
                last = Program()
                found.append(last)
            elif block.heading in pieces:
                last = pieces[block.heading]
            else:
                last = pieces[block.heading] = Program()
                found.append(last)
            last.blocks.append(block)
    return found


def same_output(expected: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)


async def run_pieces(program: Program) -> None:
    """The pieces in one coroutine, between a new connection's ends."""
    accepted: list[anypoll.Connection] = []
    ready, done = anyio.Event(), anyio.Event()

    async def lend(conn: anypoll.Connection) -> None:
        accepted.append(conn)
        ready.set()
        await done.wait()

    async with (
        anypoll.serve(lend, host="127.0.0.1", port=0) as server,
        await anypoll.connect_tcp("127.0.0.1", server.port) as peer,
    ):
        await ready.wait()
        names: dict[str, Any] = {"__name__": "docs", "anyio": anyio, "anypoll": anypoll}
        names |= {"conn": accepted.pop(), "peer": peer}
        try:
            for block in program.blocks:
                await _execute(block, names)
        finally:
            done.set()
            names.clear()


async def _execute(block: Block, names: dict[str, Any]) -> None:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(block.padded(), str(block.text), "exec", flags=flags)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        await result

"""Valgrind's callgrind: it counts the instructions that a program executes, in user mode only.

The program starts with the counting switched off, and is then several times slower than by itself;
while it is on, some fifty times. A thread of the program has to run to obey what it is told from
outside, so ``vgdb`` wakes one up if all of them wait in a system call.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from processes import CellError

NO_NAME = "(no name)"

_OBEY_LIMIT = 60.0  # seconds
_COST = re.compile(r"[+\-*\d]")
_NAME = re.compile(r"\((\d+)\)(?: (.+))?")


class Function(NamedTuple):
    file: str
    """The program or the library that it is in, without a folder."""
    name: str


@dataclass(frozen=True)
class Profile:
    instructions: int
    functions: Mapping[Function, int]
    """Instructions of each function itself, without those of what it calls."""


def is_installed() -> bool:
    return all(shutil.which(program) for program in ("valgrind", "vgdb"))


def version() -> str:
    command = ["valgrind", "--version"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@dataclass(frozen=True)
class Callgrind:
    """How one program is run and told what to do."""

    folder: Path
    """Of its own; for the pipes, and for what callgrind writes."""

    def command(self, program: Sequence[str]) -> list[str]:
        return [
            "valgrind",
            "-q",
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={self._output}",
            f"--vgdb-prefix={self._pipes}",
            *program,
        ]

    def start(self, pid: int) -> None:
        """From now on instructions are counted."""
        self._tell(pid, "instrumentation on")

    def take(self, pid: int) -> Profile:
        """What was counted since ``start``, or since the last time."""
        self._tell(pid, "dump")
        number = len(list(self.folder.glob(f"{self._output.name}.*")))
        try:
            text = self._output.with_suffix(f".{number}").read_text("utf-8", "replace")
            return parse(text)
        except (OSError, ValueError) as error:
            raise CellError(f"callgrind's output: {error}") from None

    @property
    def _output(self) -> Path:
        return self.folder / "out"

    @property
    def _pipes(self) -> Path:
        return self.folder / "vgdb"

    def _tell(self, pid: int, order: str) -> None:
        command = ["vgdb", f"--vgdb-prefix={self._pipes}", f"--pid={pid}", *order.split()]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=_OBEY_LIMIT
            )
        except subprocess.TimeoutExpired:
            raise CellError(f"valgrind has not obeyed {order!r} in {_OBEY_LIMIT:.0f} s") from None
        if done.returncode != 0:
            raise CellError(f"valgrind has not obeyed {order!r}: {done.stderr.strip()}")


def parse(text: str) -> Profile:
    """Read callgrind's own format, with one position and one event to a line of costs.

    :raises ValueError: if the functions together have not what the whole program has
    """
    functions: Counter[Function] = Counter()
    names: dict[str, dict[str, str]] = {"ob": {}, "fn": {}}
    current = {"ob": "", "fn": ""}
    total = 0
    is_of_a_call = False
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if _COST.match(line):
            # Behind a line for calls: what the called functions have used, which they have too.
            if not is_of_a_call:
                function = Function(_file_name(current["ob"]), _function_name(current["fn"]))
                functions[function] += int(line.split()[1])
            is_of_a_call = False
        elif line.startswith("totals:"):
            total = int(line.split()[1])
        elif key == "calls":
            is_of_a_call = True
        elif equals and key.removeprefix("c") in names:
            kind = key.removeprefix("c")
            name = _resolve(names[kind], value)
            if key == kind:
                current[kind] = name
    if total != functions.total():
        raise ValueError(f"{functions.total()} instructions in functions, of {total}")
    return Profile(total, dict(functions))


def _resolve(known: dict[str, str], text: str) -> str:
    """A name is written out once, with a number; afterwards the number stands for it."""
    match = _NAME.fullmatch(text)
    if match is None:
        return text
    number, name = match.groups()
    return known.setdefault(number, name) if name else known[number]


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _function_name(name: str) -> str:
    """Without the depth of a recursion; an address where no symbol is known says nothing."""
    return NO_NAME if name.startswith("0x") else re.sub(r"'\d+$", "", name)

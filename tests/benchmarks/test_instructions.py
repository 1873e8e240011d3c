"""benchmarks/instructions.py, counting.py, count_report.py: instructions per request."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import count_report
import counting
import instructions
import programs
import pytest
from callgrind import Function, Profile
from catalog import HERE, LOOPS, WORKLOADS, Cell, find_cells, find_peer
from counting import LEAST_PARTS, MOST_PARTS, Count
from processes import CellError
from rounds import Key

PYTHON = Function("libpython.so", "eval")
CORE = Function("_core.so", "ap_conn_write")


def profile(core: int, python: int = 0) -> Profile:
    return Profile(core + python, {CORE: core, PYTHON: python})


def count(per_request: float, *, certain: bool = True) -> Count:
    lowest = round(100 * per_request)
    return Count(100, [profile(lowest), profile(lowest if certain else 2 * lowest)])


def cell(server: str, loop: str = "uvloop") -> Key:
    return Key("rpc100", server, loop)


# ---- parts ----


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ([], True),
        ([1000], True),
        ([1000] * (LEAST_PARTS - 1), True),
        ([1000, 1010, 5000], False),
        ([1000, 1011, 1012, 1013], True),
        ([1000] + [1011] * (MOST_PARTS - 1), False),
    ],
)
def test_parts_are_taken_until_the_lowest_two_agree(sizes: Sequence[int], more: bool) -> None:
    assert counting.needs_more([profile(size) for size in sizes]) == more


def test_the_lowest_part_counts() -> None:
    found = Count(10, [profile(70, 30), profile(120), profile(900)])
    assert found.per_request == 10
    assert found.hottest() == [(CORE, 7), (PYTHON, 3)]
    assert not found.is_certain


def test_what_cannot_be_counted_is_not_offered() -> None:
    assert {"rpc1", "pipe", "bulk", "connect"} <= set(instructions.COUNTED)
    assert set(WORKLOADS) - set(instructions.COUNTED) == {
        "idle",
        "trickle",
        "busy100",
        "client",
        "tls_stall",
        "tls_idle",
    }


# ---- the run ----


def test_a_failed_cell_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def count_cell(cell: Cell) -> Count:
        if cell.key.loop == "uvloop":
            raise CellError("closed by the server")
        return count(5)

    monkeypatch.setattr(instructions, "count", count_cell)
    saved = []
    cells = list(find_cells(["rpc1"], [find_peer("anypoll")], LOOPS))
    outcome = instructions.run(cells, lambda outcome: saved.append(len(outcome.counts)))
    assert [key.loop for key in outcome.counts] == ["asyncio", "trio"]
    assert outcome.failures == ["rpc1 anypoll on uvloop: closed by the server"]
    assert saved == [1, 1, 2]
    assert not outcome.interrupted


def test_an_interrupted_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def count_cell(cell: Cell) -> Count:
        if cell.key.loop == "trio":
            raise KeyboardInterrupt
        return count(5)

    monkeypatch.setattr(instructions, "count", count_cell)
    cells = list(find_cells(["rpc1"], [find_peer("anypoll")], LOOPS))
    outcome = instructions.run(cells, lambda _: None)
    assert outcome.interrupted
    assert [key.loop for key in outcome.counts] == ["asyncio", "uvloop"]


def test_another_number_of_requests() -> None:
    cells = list(find_cells(["rpc1", "pipe"], [find_peer("epoll")], []))
    as_they_are = instructions.with_requests(cells, None)
    assert list(as_they_are) == cells
    assert [c.workload.counted for c in instructions.with_requests(cells, 7)] == [7, 7]


# ---- the report ----

COUNTS = {
    cell("anypoll", "asyncio"): count(11000),
    cell("anypoll", "trio"): count(12000, certain=False),
    cell("anypoll@abc", "asyncio"): count(10000),
    cell("anypoll@abc", "trio"): count(16000),
    cell("anypoll/pollers=2", "trio"): count(8000),
    cell("anypoll/pollers=2@abc", "trio"): count(8000),
    cell("epoll", "-"): count(120),
}


def test_the_table_has_servers_and_loops() -> None:
    title, _, *rows = count_report.format_counts(COUNTS).splitlines()
    assert title == "rpc100: rpc, 100 connections, 64 B, 1 outstanding"
    assert [row.split() for row in rows[:3]] == [
        ["server", "asyncio", "trio", "-"],
        ["anypoll", "11,000", "~12,000"],
        ["anypoll@abc", "10,000", "16,000"],
    ]
    assert rows[-1].split() == ["epoll", "120"]
    assert len({len(row) for row in (rows[0], rows[-1])}) == 1  # its figure is in the last column


def test_another_checkout_is_compared_with() -> None:
    rows = {
        line.split()[0]: line.split()[1:]
        for line in count_report.format_counts(COUNTS, before="abc").splitlines()[2:]
    }
    assert rows["server"][-6:] == ["asyncio", "x", "abc", "trio", "x", "abc"]
    assert rows["anypoll"] == ["11,000", "~12,000", "1.100", "0.750"]
    assert rows["anypoll/pollers=2"] == ["8,000", "1.000"]
    assert rows["anypoll/pollers=2@abc"] == ["8,000"]  # the reference has none itself


def test_the_hottest_functions_of_each_cell() -> None:
    counts = {cell("anypoll"): Count(10, [profile(70, 30), profile(70, 30)])}
    title, _, header, *rows = count_report.format_functions(counts, 1).splitlines()
    assert title == "rpc100 anypoll on uvloop: 10 instructions a request"
    assert header.split() == ["function", "of", "instructions", "share"]
    assert [row.split() for row in rows] == [["ap_conn_write", "_core.so", "7", "70.0%"]]


def test_the_file() -> None:
    counts = {cell("anypoll"): Count(10, [profile(96, 4), profile(111)])}
    document = json.loads(count_report.dump({"cpus": 2}, counts))
    assert document == {
        "machine": {"cpus": 2},
        "cells": [
            {
                "workload": "rpc100",
                "server": "anypoll",
                "loop": "uvloop",
                "requests": 10,
                "instructions": 10.0,
                "parts": [100, 111],
                "functions": [{"file": "_core.so", "name": "ap_conn_write", "instructions": 9.6}],
            }
        ],
    }


# ---- the command ----

COMMAND = [sys.executable, str(HERE / "instructions.py")]


@pytest.mark.unsanitized
def test_without_valgrind_it_says_what_to_install() -> None:
    done = programs.run_to_end(COMMAND, env={**os.environ, "PATH": ""})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "benchmarks: valgrind is needed (Debian: apt install valgrind)\n"


@pytest.mark.unsanitized
@pytest.mark.skipif(shutil.which("vgdb") is None, reason="valgrind is not installed")
def test_the_requests_of_a_server_are_counted(tmp_path: Path) -> None:
    """Of the server in C: it starts at once, and what it does can be foreseen."""
    file = tmp_path / "counts.json"
    options = ["--workloads=rpc1", "--servers=epoll", "--requests=500", f"--json={file}"]
    done = programs.run_to_end([*COMMAND, *options, "--functions=3"])
    assert done.returncode == 0, done.stderr
    [found] = json.loads(file.read_text())["cells"]
    assert (found["server"], found["requests"]) == ("epoll", 500)
    assert 50 < found["instructions"] < 1000
    assert {"recv", "send"} <= {function["name"] for function in found["functions"]}
    assert "rpc1 epoll: " in done.stdout

"""benchmarks/pages.py and results.py: what the documentation says is what was measured."""

from __future__ import annotations

import pages
import pytest
import results
from catalog import PEERS, VARIANTS, WORKLOADS
from results import Results
from rounds import Key, Rounds

MACHINE = {
    "cpu": "Some CPU",
    "cpus": 2,
    "kernel": "6.1",
    "python": "3.11.7",
    "packages": {"anypoll": "0.1.0"},
    "go": "",
    "commit": "abc",
}
ROUNDS = Rounds(
    {
        Key("rpc100", "epoll", "-"): [{"cpu_us": 5.0, "rps": 300000.0}],
        Key("rpc100", "protocol", "uvloop"): [{"cpu_us": 10.0, "rps": 100000.0}],
        Key("rpc100", "anypoll", "uvloop"): [{"cpu_us": 9.0, "rps": 120000.0}],
        Key("rpc100", "anypoll", "trio"): [{"cpu_us": 12.0, "rps": 90000.0}],
    }
)
MEASURED = Results(MACHINE, 1.5, 0.3, 7, ROUNDS)


def test_the_file_can_be_read_back() -> None:
    assert Results.load(MEASURED.dump()) == MEASURED


def test_a_table_has_servers_and_loops() -> None:
    page = "before\n<!-- table rpc100 -->\nold\n<!-- end -->\nafter\n"
    assert pages.update(page, MEASURED).splitlines() == [
        "before",
        "<!-- table rpc100 -->",
        "| | asyncio | uvloop | trio | no loop |",
        "|---|---:|---:|---:|---:|",
        "| anypoll | | 9.00 (120,000) | 12.00 (90,000) | |",
        "| `Protocol` (callbacks) | | 10.00 (100,000) | | |",
        "| C, bare epoll | | | | 5.00 (300,000) |",
        "<!-- end -->",
        "after",
    ]


def test_goals_that_are_met_are_bold() -> None:
    page = "<!-- table goals -->\n<!-- end -->"
    assert pages.update(page, MEASURED).splitlines()[3:5] == [
        "| rpc100 `anypoll`: CPU per request <= 0.95x protocol on uvloop | | **0.90x** | 1.20x |",
        "| rpc100 `anypoll`: requests/s >= 1.05x protocol on uvloop | | **1.20x** | 0.90x |",
    ]


def test_the_machine_is_named() -> None:
    page = "<!-- table machine -->\n<!-- end -->"
    [line] = pages.update(page, MEASURED).splitlines()[1:-1]
    assert line.startswith("Some CPU, 2 CPUs, Linux 6.1; CPython 3.11.7, anypoll 0.1.0; commit abc")
    assert line.endswith("; one round of 1.5 s per cell.")


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        pages.update("<!-- table nothing -->\n<!-- end -->", MEASURED)


def test_every_server_has_a_label_and_every_workload_a_table() -> None:
    assert set(pages.LABELS) == {*PEERS, *VARIANTS}
    assert {table.workload for table in pages.TABLES.values()} == set(WORKLOADS)


def test_the_page_shows_the_committed_results() -> None:
    measured = Results.load(results.FILE.read_text("utf-8"))
    page = pages.PAGE.read_text("utf-8")
    assert pages.update(page, measured) == page, "run make charts"


def test_the_page_has_every_table() -> None:
    page = pages.PAGE.read_text("utf-8")
    measured = Results.load(results.FILE.read_text("utf-8")).rounds.workloads()
    tables = {name for name, table in pages.TABLES.items() if table.workload in measured}
    wanted = {*tables, *pages.RENDERERS} - {"echo1"}  # much the same as rpc1
    assert [name for name in wanted if f"<!-- table {name} -->" not in page] == []

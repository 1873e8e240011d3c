"""benchmarks/report.py: the tables that a run prints."""

from __future__ import annotations

import report
from cells import Result
from rounds import Key, Rounds


def cell(server: str, loop: str = "uvloop") -> Key:
    return Key("rpc100", server, loop)


ROUNDS = Rounds(
    {
        cell("anypoll"): [{"rps": 200.0, "cpu_us": 5.0}, {"rps": 300.0, "cpu_us": 5.0}],
        cell("anypoll@abc"): [{"rps": 100.0, "cpu_us": 10.0}, {"rps": 100.0, "cpu_us": 10.0}],
        cell("anypoll/pollers=2"): [{"rps": 100.0, "cpu_us": 8.0}, {"rps": 100.0, "cpu_us": 8.0}],
        cell("protocol"): [{"rps": 400.0, "cpu_us": 4.0}, {"rps": 400.0, "cpu_us": 4.0}],
        cell("anyio", "trio"): [None, None],
    }
)


def test_medians_spreads_and_ratios() -> None:
    title, _, header, ours, *_ = report.format_tables(ROUNDS).splitlines()
    assert title == "rpc100: rpc, 100 connections, 64 B, 1 outstanding"
    columns = ["req/s", "spread", "cpu us/req", "spread", "req/s x Protocol", "cpu x Protocol"]
    assert " ".join(header.split()) == "server loop " + " ".join(columns)
    assert ours.split() == ["anypoll", "uvloop", "250", "40%", "5.00", "0%", "0.62", "1.25"]


def test_a_cell_without_a_result_has_no_row() -> None:
    assert "anyio" not in report.format_tables(ROUNDS)


def test_another_checkout_is_compared_with() -> None:
    rows = {
        line.split()[0]: line.split()
        for line in report.format_tables(ROUNDS, before="abc").splitlines()[3:]
    }
    assert rows["anypoll"][-2:] == ["2.50", "0.50"]
    assert rows["anypoll/pollers=2"][-2:] == ["1.00", "0.80"]  # the other has no such row
    assert rows["protocol"][-2:] == ["1.00", "1.00"]  # to itself: there are no other ratios


def test_threads() -> None:
    results = {
        cell("anypoll"): [
            Result({}, {"loop": (2.0, 1.0), "poller": (0.5, 3.0), "(ended)": (0.0, 0.001)}),
            Result({}, {"loop": (3.0, 1.0), "poller": (0.5, 4.0)}),
            None,
        ]
    }
    lines = report.format_threads(results).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["rpc100", "anypoll", "uvloop", "loop", "3.50", "2.50", "1.00"],
        ["rpc100", "anypoll", "uvloop", "poller", "4.00", "0.50", "3.50"],
    ]


def tls(server: str) -> Key:
    return Key("tls_stall", server, "uvloop")


def test_tls_is_compared_with_aiofastnet_too() -> None:
    rounds = Rounds(
        {
            tls("anypoll"): [{"rps": 100.0, "cpu_us": 300.0, "stall_ms": 7.25}],
            tls("aiofastnet"): [{"rps": 50.0, "cpu_us": 400.0, "stall_ms": 900.0}],
        }
    )
    title, _, header, ours, *_ = report.format_tables(rounds).splitlines()
    assert title == "tls_stall: rpc over TLS, 1000 connections, 64 B, 1 request each, then silence"
    assert " ".join(header.split()).endswith("stall ms req/s x aiofastnet cpu x aiofastnet")
    assert ours.split()[-3:] == ["7.2", "2.00", "0.75"]

"""benchmarks/runner.py, choices.py, machine.py: what is measured, what is left out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import choices
import machine
import pytest
import runner
from catalog import GROUPS, LOOPS, Cell, find_cells, find_peer
from cells import Result
from machine import Interpreter
from processes import CellError
from runner import Outcome, Plan

CELLS = list(find_cells(["rpc1", "rpc100"], [find_peer("anypoll"), find_peer("anyio")], LOOPS))


def plan(seed: int, rounds: int = 3) -> Plan:
    return Plan(CELLS, rounds, seconds=1.0, warmup=0.5, seed=seed)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells in the order in which they are measured; AnyIO on trio fails."""
    seen: list[str] = []

    def measure(cell: Cell, *, seconds: float, warmup: float) -> Result:
        seen.append(str(cell.key))
        if cell.key == ("rpc1", "anyio", "trio"):
            raise CellError("closed by the server")
        return Result({"rps": float(len(seen))})

    monkeypatch.setattr(runner, "measure", measure)
    return seen


def test_each_round_has_all_cells_in_an_order_of_its_own(order: list[str]) -> None:
    runner.run(plan(seed=1))
    rounds = [order[start : start + len(CELLS)] for start in range(0, len(order), len(CELLS))]
    assert [sorted(cells) for cells in rounds] == [sorted(str(c.key) for c in CELLS)] * 3
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_seed_repeats_the_order(order: list[str]) -> None:
    runner.run(plan(seed=1))
    first = order.copy()
    order.clear()
    runner.run(plan(seed=1))
    assert order == first
    order.clear()
    runner.run(plan(seed=2))
    assert order != first


@pytest.mark.usefixtures("order")
def test_a_failed_cell_keeps_its_place_among_the_rounds() -> None:
    outcome = runner.run(plan(seed=1))
    [key] = [cell.key for cell in CELLS if cell.key == ("rpc1", "anyio", "trio")]
    assert outcome.results[key] == [None] * 3
    assert outcome.failures == ["rpc1 anyio on trio: closed by the server"] * 3
    assert {len(results) for results in outcome.results.values()} == {3}


@pytest.mark.usefixtures("order")
def test_results_are_there_after_each_round() -> None:
    counts = []

    def look(outcome: Outcome) -> None:
        counts.append({len(results) for results in outcome.results.values()})

    runner.run(plan(seed=1), look)
    assert counts == [{1}, {2}, {3}]


def test_an_interrupted_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(cell: Cell, *, seconds: float, warmup: float) -> Result:
        if cell.key == CELLS[0].key:
            raise KeyboardInterrupt
        return Result({"rps": 1.0})

    monkeypatch.setattr(runner, "measure", measure)
    outcome = runner.run(plan(seed=1))
    assert outcome.interrupted
    assert outcome.results[CELLS[0].key] == []
    assert any(outcome.results.values())


def test_duration_counts_what_takes_longer() -> None:
    def duration(workload: str, seconds: float) -> float:
        [cell] = find_cells([workload], [find_peer("epoll")], [])
        return Plan([cell], 2, seconds, warmup=0.2, seed=0).duration()

    assert duration("rpc1", 2.0) - duration("rpc1", 1.0) == pytest.approx(2)
    assert duration("trickle", 0.1) == duration("trickle", 1.0) > duration("rpc1", 1.0)


def test_against_measures_ours_twice() -> None:
    options = argparse.Namespace(
        servers=[find_peer("anypoll"), find_peer("anypoll/pollers=2"), find_peer("epoll")],
        workloads=["rpc1"],
        loops=["uvloop"],
        against=Path("/before"),
        before="abc",
    )
    cells = choices.choose_cells(options)
    assert [cell.key.server for cell in cells] == [
        "anypoll",
        "anypoll@abc",
        "anypoll/pollers=2",
        "anypoll/pollers=2@abc",
        "epoll",
    ]
    programs = [cell.peer.command(cell.workload, "uvloop", 1)[:2] for cell in cells[:2]]
    assert [python for python, _ in programs] == [sys.executable, "/before/.venv/bin/python"]
    assert programs[0][1] == programs[1][1]  # the same program: only anypoll differs


@pytest.mark.parametrize(
    ("server", "loop", "reason"),
    [
        ("anypoll", "asyncio", None),
        ("anypoll/pollers=2", "asyncio", None),
        ("anypoll/pollers=2+driver=thread", "asyncio", "this anypoll has no option 'driver'"),
        ("anyio", "trio", "the package trio is not installed"),
        ("aiofastnet", "asyncio", "the package aiofastnet is not installed"),
    ],
)
def test_what_is_not_there_is_left_out(
    server: str, loop: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Interpreter("3.11.7", {"anypoll": "0.1.0", "anyio": "4.16"}, ["pollers"])
    monkeypatch.setattr(machine, "probe", lambda _: installed)
    [cell] = find_cells(["rpc1"], [find_peer(server)], [loop])
    assert machine.reason_to_skip(cell) == (reason and f"{server}: {reason}")


def chosen(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return choices.choose_cells(choices.parse(choices.choice_parser("", "anypoll,epoll")))


def test_a_workload_may_say_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = chosen("--workloads=rpc1,tls_idle", "--loops=trio", monkeypatch=monkeypatch)
    assert [cell.key for cell in cells] == [
        ("rpc1", "anypoll", "trio"),
        ("rpc1", "epoll", "-"),
        ("tls_idle", "anypoll", "trio"),
        ("tls_idle", "anyio", "trio"),
    ]


def test_what_the_command_line_says_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--workloads=tls_idle", "--servers=protocol", "--loops=uvloop"]
    cells = chosen(*arguments, monkeypatch=monkeypatch)
    assert [cell.key for cell in cells] == [("tls_idle", "protocol", "uvloop")]


def test_a_group_stands_for_its_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--workloads=tls50,tls", "--servers=anypoll", "--loops=trio"]
    cells = chosen(*arguments, monkeypatch=monkeypatch)
    assert sorted(cell.key.workload for cell in cells) == sorted(GROUPS["tls"])


def test_of_a_group_there_is_what_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = choices.choice_parser("", "anypoll", ["rpc1", "tls1"])
    monkeypatch.setattr(sys, "argv", ["run.py", "--workloads=tls"])
    assert choices.parse(parser).workloads == ("tls1",)
    monkeypatch.setattr(sys, "argv", ["run.py", "--workloads=tls50"])
    with pytest.raises(SystemExit):
        choices.parse(parser)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "TLS: OpenSSL's headers are needed (Debian: apt install libssl-dev)"),
        (["load_tls"], "TLS: the package trustme is not installed"),
        (["load_tls", "certificate.pem"], None),
    ],
)
def test_what_tls_needs(
    files: list[str], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LOAD_TLS", tmp_path / "load_tls")
    monkeypatch.setattr(machine, "CERTIFICATE", tmp_path / "certificate.pem")
    for file in files:
        (tmp_path / file).touch()
    [cell] = find_cells(["tls1"], [find_peer("anypoll")], ["asyncio"])
    assert machine.reason_to_skip(cell) == reason


def test_the_options_of_configure_are_found() -> None:
    assert {"pollers", "block_size"} <= set(machine.probe(sys.executable).options)

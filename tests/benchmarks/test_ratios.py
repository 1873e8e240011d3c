"""benchmarks/ratios.py and check.py: what is held, and what is not."""

from __future__ import annotations

import check
import pytest
import ratios
from cells import Result
from ratios import Ratio
from rounds import FIGURES, Key, Rounds
from runner import Outcome

OURS = Key("rpc100", "anypoll", "trio")
THEIRS = Key("rpc100", "protocol", "uvloop")
CPU = Ratio(OURS, "cpu_us", THEIRS, 1.0)
RPS = Ratio(OURS, "rps", THEIRS, 1.0)


def measured(figure: str, ours: float, theirs: float) -> Rounds:
    return Rounds({OURS: [{figure: ours}], THEIRS: [{figure: theirs}]})


@pytest.mark.parametrize(("ours", "is_held"), [(2.0, True), (12.5, True), (12.6, False)])
def test_less_is_better(ours: float, is_held: bool) -> None:
    assert CPU.limit == 1.25
    assert (ratios.missed([CPU], measured("cpu_us", ours, 10.0)) == []) is is_held


@pytest.mark.parametrize(("ours", "is_held"), [(20.0, True), (8.0, True), (7.9, False)])
def test_more_is_better(ours: float, is_held: bool) -> None:
    assert RPS.limit == 0.8
    assert (ratios.missed([RPS], measured("rps", ours, 10.0)) == []) is is_held


def test_what_was_not_measured_is_not_missed_and_not_held() -> None:
    rounds = Rounds({OURS: [{"cpu_us": 1.0}], THEIRS: [None]})
    assert ratios.missed([CPU], rounds) == []
    assert ratios.table([CPU], rounds)[1][-1] == "not measured"


def test_the_file_can_be_read_back() -> None:
    assert ratios.load(ratios.dump([CPU, RPS])) == [CPU, RPS]


def test_refresh() -> None:
    fresh = ratios.refresh([CPU, RPS], measured("cpu_us", 5.0, 10.0))
    assert [ratio.committed for ratio in fresh] == [0.5, 1.0]
    assert [ratio.key for ratio in fresh] == [OURS, OURS]


def test_the_committed_ratios_are_those_of_cells_that_exist() -> None:
    committed = ratios.load(ratios.FILE.read_text("utf-8"))
    assert committed
    assert len({(r.key, r.figure, r.reference) for r in committed}) == len(committed)
    keys = ratios.needed(committed)
    assert {cell.key for cell in check.find(keys)} == keys
    assert {ratio.figure for ratio in committed} <= set(FIGURES)


def outcome(cpu_us: float) -> Outcome:
    return Outcome({OURS: [Result({"cpu_us": cpu_us})], THEIRS: [Result({"cpu_us": 10.0})]})


def test_the_status_says_whether_all_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.report([CPU], outcome(12.0)) == 0
    assert "1.20  held" in capsys.readouterr().out
    assert check.report([CPU], outcome(13.0)) == 1
    assert "1.30  MISSED" in capsys.readouterr().out


def test_a_cell_that_failed_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    broken = outcome(1.0)
    broken.failures.append("rpc100 anypoll on trio: closed by the server")
    assert check.report([CPU], broken) == 1
    assert "closed by the server" in capsys.readouterr().err


def test_more_rounds_of_some_cells_count_with_the_first() -> None:
    both = outcome(30.0)
    both.extend(outcome(10.0))
    both.extend(outcome(10.0))
    assert both.rounds().ratio(OURS, THEIRS, "cpu_us") == 1

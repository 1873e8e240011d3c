"""benchmarks/rounds.py: medians, spreads and ratios, and that JSON keeps them."""

from __future__ import annotations

import json

import pytest
from rounds import FIGURES, Key, Rounds, format_figure, spread

OURS = Key("rpc100", "anypoll", "uvloop")
THEIRS = Key("rpc100", "anyio", "uvloop")


def test_median_and_spread() -> None:
    rounds = Rounds({OURS: [{"rps": 100.0}, {"rps": 130.0}, {"rps": 110.0}]})
    assert rounds.median(OURS, "rps") == 110
    assert rounds.spread(OURS, "rps") == pytest.approx(30 / 110)


def test_nothing_measured() -> None:
    rounds = Rounds({OURS: [None, {"rps": 1.0}]})
    assert rounds.median(OURS, "kib") is None
    assert rounds.spread(OURS, "kib") is None
    assert rounds.median(THEIRS, "rps") is None
    assert rounds.ratio(OURS, THEIRS, "rps") is None
    assert spread([0.0, 0.0]) == 0


def test_a_ratio_compares_within_a_round() -> None:
    """The second round was disturbed: the ratio of the medians would be 3."""
    rounds = Rounds(
        {
            OURS: [{"rps": 200.0}, {"rps": 20.0}, {"rps": 300.0}],
            THEIRS: [{"rps": 100.0}, {"rps": 10.0}, {"rps": 50.0}],
        }
    )
    assert rounds.ratio(OURS, THEIRS, "rps") == 2


def test_a_ratio_leaves_out_rounds_that_failed() -> None:
    rounds = Rounds(
        {
            OURS: [{"rps": 200.0}, None, {"rps": 400.0}, {"rps": 1.0}],
            THEIRS: [None, {"rps": 10.0}, {"rps": 100.0}, {"rps": 0.0}],
        }
    )
    assert rounds.ratio(OURS, THEIRS, "rps") == 4


def test_only_cells_with_a_result_are_listed() -> None:
    rounds = Rounds({OURS: [None], THEIRS: [None, {"rps": 1.0}]})
    assert rounds.workloads() == ["rpc100"]
    assert rounds.keys("rpc100") == [THEIRS]


def test_json_keeps_all_and_the_order_of_rounds() -> None:
    rounds = Rounds(
        {
            OURS: [{"rps": 100.0, "cpu_us": 6.71}, None, {"rps": 90.0, "cpu_us": 7.0}],
            THEIRS: [{"rps": 1.0}, {"rps": 2.0, "kib": 9.5}, {"rps": 3.0}],
            Key("idle", "epoll", "-"): [None, None, None],
        }
    )
    again = Rounds.from_json(json.loads(json.dumps(rounds.to_json())))
    assert list(again.cells) == list(rounds.cells)
    for key in (OURS, THEIRS):
        assert again.cells[key] == rounds.cells[key]
    assert again.keys("idle") == []


def test_json_has_no_needless_digits() -> None:
    [cell] = Rounds({OURS: [{"cpu_us": 1 / 3}]}).to_json()
    assert cell["figures"] == {"cpu_us": [0.333]}


def test_format() -> None:
    assert format_figure("rps", 123456.7) == "123,457"
    assert format_figure("cpu_us", 6.707) == "6.71"
    assert format_figure("rps", None) == ""
    assert [name for name in FIGURES if FIGURES[name].more_is_better] == ["rps"]


def test_names_of_cells() -> None:
    assert str(OURS) == "rpc100 anypoll on uvloop"
    assert str(Key("idle", "epoll", "-")) == "idle epoll"

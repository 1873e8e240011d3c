"""benchmarks/goals.py: which goals are met, and which cannot be judged."""

from __future__ import annotations

import pytest
from catalog import WORKLOADS, find_cells, find_peer
from goals import ANYIO, GOALS, PROTOCOL, Goal, evaluate, reference_of
from rounds import FIGURES, Key, Rounds

ANYPOLL = Key("rpc100", "anypoll", "trio")
CPU = Goal("rpc100", "anypoll", "cpu_us", 0.95, PROTOCOL)
RPS = Goal("rpc100", "anypoll", "rps", 3.2, ANYIO)


def measured(**figures: tuple[float, float, float]) -> Rounds:
    """What ours, uvloop's Protocol and AnyIO on the same loop have."""
    keys = (ANYPOLL, reference_of(ANYPOLL, PROTOCOL), reference_of(ANYPOLL, ANYIO))
    return Rounds(
        {
            key: [{name: values[index] for name, values in figures.items()}]
            for index, key in enumerate(keys)
        }
    )


def test_references() -> None:
    assert reference_of(ANYPOLL, PROTOCOL) == Key("rpc100", "protocol", "uvloop")
    assert reference_of(ANYPOLL, ANYIO) == Key("rpc100", "anyio", "trio")


@pytest.mark.parametrize(("ours", "is_met"), [(9.0, True), (9.5, True), (9.6, False)])
def test_less_is_better(ours: float, is_met: bool) -> None:
    [verdict] = CPU.evaluate(measured(cpu_us=(ours, 10.0, 30.0)))
    assert verdict.is_met is is_met
    assert verdict.key == ANYPOLL


@pytest.mark.parametrize(("ours", "is_met"), [(400.0, True), (320.0, True), (310.0, False)])
def test_more_is_better(ours: float, is_met: bool) -> None:
    [verdict] = RPS.evaluate(measured(rps=(ours, 1.0, 100.0)))
    assert verdict.is_met is is_met


def test_absolute_goal() -> None:
    goal = Goal("rpc100", "anypoll", "kib", 5.0)
    [verdict] = goal.evaluate(measured(kib=(5.5, 1.0, 10.0)))
    assert not verdict.is_met
    assert str(verdict) == (
        "goal: rpc100 anypoll on trio: memory per connection <= 5 KiB: 5.50 MISSED"
    )


def test_lines_name_the_figure_and_the_reference() -> None:
    lines = [str(verdict) for verdict in evaluate(measured(cpu_us=(9, 10, 1), rps=(1, 2, 3)))]
    assert lines == [
        "goal: rpc100 anypoll on trio: CPU per request <= 0.95x protocol on uvloop: 0.90x met",
        "goal: rpc100 anypoll on trio: requests/s >= 1.05x protocol on uvloop: 0.50x MISSED",
        "goal: rpc100 anypoll on trio: requests/s >= 3.2x anyio: 0.33x MISSED",
    ]


def test_without_its_reference_a_goal_says_nothing() -> None:
    assert list(CPU.evaluate(Rounds({ANYPOLL: [{"cpu_us": 1.0}]}))) == []
    assert evaluate(Rounds({})) == []


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.workload}-{goal.server}")
def test_every_goal_can_be_measured(goal: Goal) -> None:
    assert goal.figure in FIGURES
    for loop in goal.loops:
        key = Key(goal.workload, goal.server, loop)
        wanted = {key} | ({reference_of(key, goal.reference)} if goal.reference else set())
        peers = [find_peer(key.server) for key in wanted]
        cells = find_cells([goal.workload], peers, ("asyncio", "uvloop", "trio"))
        assert wanted <= {cell.key for cell in cells}
    workload = WORKLOADS[goal.workload]
    assert goal.figure != "kib" or workload.idle
    assert goal.figure != "stall_ms" or workload.stalls
    if workload.servers:
        wanted = {goal.server} | ({goal.reference[0]} if goal.reference else set())
        assert wanted <= set(workload.servers)

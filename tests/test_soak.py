"""The program behind `make soak`: it runs, it fails when something is wrong, and a seed tells what
it does. Not what it is for: that takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from programs import run_to_end
from soak_scenarios import SCENARIOS

# Churn of three loops, as hard as it can: alone, or it disturbs whatever runs beside it.
pytestmark = [pytest.mark.unsanitized, pytest.mark.alone]

HERE = Path(__file__).parent


def soak(*arguments: str, program: str = "") -> tuple[int, str]:
    """The exit status, and all it says."""
    start = ["-c", textwrap.dedent(program)] if program else [str(HERE / "soak.py")]
    done = run_to_end(
        [sys.executable, *start, "--idle", "30", "--workers", "4", *arguments],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def test_a_short_soak_on_each_loop() -> None:
    pytest.importorskip("uvloop")
    slow = {"never_reads", "never_speaks"}  # they wait for the idle timeout
    quick = ",".join(name for name in SCENARIOS if name not in slow)
    status, output = soak("--seconds", "3", "--seed", "7", "--only", quick)
    assert status == 0, output
    assert output.startswith("soak: seed 7\n")
    assert output.endswith("soak: all went well, nothing is left\n")
    for loop in ("asyncio", "uvloop", "trio"):
        assert f"soak on {loop}: seed 7\n{loop}" in output  # and progress


FAILING = """
import os, leaks, soak, soak_scenarios

leaks.leaks_since.__kwdefaults__["within"] = 0.1

@soak_scenarios.scenario(1)
async def fails(soak, rng):
    {what}

raise SystemExit(soak.main())
"""


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("raise AssertionError('two bytes differ')", "fails, worker 0, operation 0"),
        ("os.pipe() if not soak.done else None", "left behind: descriptor"),
        ("__import__('logging').getLogger('anypoll.x').warning('odd')", "logged: odd"),
        ("soak_scenarios.anypoll.socketpair()", "unclosed connection"),
    ],
)
def test_what_is_wrong_fails_it(what: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    program = FAILING.format(what=what)
    status, output = soak(
        "--seconds", "0.2", "--loop", "asyncio", "--only", "fails", program=program
    )
    assert status == 1, output
    assert found in output


DECISIONS = """
import soak, soak_scenarios

@soak_scenarios.scenario(1)
async def decides(soak, rng):
    print("decision", soak.done, rng.random())

raise SystemExit(soak.main())
"""


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def decisions(seed: int) -> list[str]:
        arguments = ("--seconds", "0.5", "--loop", "trio", "--only", "decides", "--workers", "1")
        _, output = soak(*arguments, "--seed", str(seed), program=DECISIONS)
        return [line for line in output.splitlines() if line.startswith("decision")][:5]

    assert len(decisions(1)) == 5
    assert decisions(1) == decisions(1) != decisions(2)

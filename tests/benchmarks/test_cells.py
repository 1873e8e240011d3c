"""benchmarks/cells.py: a cell of TLS from the programs that are started to the figures."""

from __future__ import annotations

import shutil
from dataclasses import replace

import cells
import pytest
from catalog import Cell, find_cells, find_peer
from machine import reason_to_skip

pytestmark = pytest.mark.unsanitized


def measure(workload: str, server: str, loop: str) -> dict[str, float]:
    """With few connections and requests, so that no time is waited for."""
    [cell] = find_cells([workload], [find_peer(server)], [loop])
    few = replace(cell.workload, connections=4, requests=5)
    return dict(cells.measure(Cell(cell.key, few, cell.peer), seconds=60, warmup=0).figures)


# One test: the programs that it builds are those of every other process here.
@pytest.mark.skipif(shutil.which(cells.COMPILE[0]) is None, reason="there is no C compiler")
def test_cells_of_tls() -> None:
    cells.build(["tls1"])
    [ours] = find_cells(["tls1"], [find_peer("anypoll")], ["trio"])
    if reason := reason_to_skip(ours):
        pytest.skip(reason)
    for server, loop in (
        ("anypoll", "uvloop"),
        ("anypoll-streams", "trio"),
        ("anypoll-buffered", "asyncio"),
        ("anypoll-request", "trio"),
        ("anyio", "trio"),
        ("trio", "trio"),
        ("asyncio-streams", "asyncio"),
        ("protocol", "asyncio"),
        ("protocol", "uvloop"),
    ):
        assert measure("tls1", server, loop).keys() >= {"cpu_us", "loop_us", "p50_us"}
    assert "stall_ms" in measure("tls_stall", "anyio", "asyncio")

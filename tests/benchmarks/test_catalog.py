"""benchmarks/catalog.py: names of servers, and the cells they make."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from catalog import (
    CERTIFICATE,
    GROUPS,
    HERE,
    LOOPS,
    PEERS,
    VARIANTS,
    WORKLOADS,
    find_cells,
    find_peer,
)
from rounds import Key


def test_settings_are_part_of_the_name() -> None:
    peer = find_peer("anypoll/pollers=2+driver=thread")
    assert peer.name == "anypoll/pollers=2+driver=thread"
    command = peer.command(WORKLOADS["rpc1"], "trio", 30)
    assert command[0] == sys.executable
    assert {"--configure=pollers=2", "--configure=driver=thread"} <= set(command)


@pytest.mark.parametrize(
    "name", ["nobody", "anypoll/", "anypoll/pollers", "anypoll/=2", "anyio/pollers=2", ""]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError):
        find_peer(name)


@pytest.mark.parametrize("name", [*PEERS, *VARIANTS])
def test_programs_exist(name: str) -> None:
    peer = find_peer(name)
    scripts = [program for program, *_ in peer.programs.values() if program.endswith(".py")]
    assert bool(scripts) == (peer.python is not None)
    assert [script for script in scripts if not Path(HERE, "peers", script).exists()] == []


def test_cells_are_what_a_server_can_do() -> None:
    peers = [find_peer(name) for name in ("anypoll-streams", "trio", "protocol", "epoll")]
    cells = {cell.key for cell in find_cells(["rpc1", "echo1", "busy100"], peers, LOOPS)}
    assert Key("rpc1", "anypoll-streams", "asyncio") in cells
    assert Key("echo1", "anypoll-streams", "asyncio") not in cells  # anypoll's echo is that
    assert Key("rpc1", "trio", "uvloop") not in cells
    assert Key("rpc1", "epoll", "-") in cells
    assert Key("busy100", "epoll", "-") not in cells  # there is no Python to be busy
    assert Key("busy100", "protocol", "uvloop") in cells


def test_only_the_loops_asked_for() -> None:
    cells = find_cells(["rpc1"], [find_peer("anypoll"), find_peer("epoll")], ["trio"])
    assert [cell.key.loop for cell in cells] == ["trio", "-"]


def test_busy_servers_are_told_so() -> None:
    peer = find_peer("anypoll")
    assert "--busy" in peer.command(WORKLOADS["busy100"], "trio", 30)
    assert "--busy" not in peer.command(WORKLOADS["rpc100"], "trio", 30)


def test_servers_of_tls_have_a_certificate_and_answer_frames() -> None:
    command = find_peer("protocol").command(WORKLOADS["handshake"], "uvloop", 30)
    assert command[command.index("--workload") + 1] == "rpc"
    assert command[command.index("--certificate") + 1] == str(CERTIFICATE)
    assert "--certificate" not in find_peer("protocol").command(WORKLOADS["rpc1"], "uvloop", 30)


def test_servers_watch_for_stalls_where_these_are_taken() -> None:
    peer = find_peer("anypoll")
    watching = {n for n, w in WORKLOADS.items() if "--watch-stalls" in peer.command(w, "trio", 1)}
    assert watching == {"tls_stall"}


def test_clients_are_told_nothing_of_servers() -> None:
    command = find_peer("anypoll").command(WORKLOADS["client"], "trio", 30)
    assert "--workload" not in command


def test_a_group_has_every_workload_of_its_kind() -> None:
    assert set(GROUPS["tls"]) == {name for name, w in WORKLOADS.items() if w.kind == "tls"}
    assert not {*GROUPS} & {*WORKLOADS}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_servers_of_a_workload_can_do_it(name: str) -> None:
    for server in WORKLOADS[name].servers:
        assert find_peer(server).serves(WORKLOADS[name])

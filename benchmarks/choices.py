"""What a command line chooses of the catalogue, and another checkout to compare with."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from catalog import LOOPS, PEERS, VARIANTS, WORKLOADS, Cell, Peer, find_cells, find_peer
from machine import commit, probe

DEFAULT_WORKLOADS = "rpc1,rpc100,pipe,echo100"
ALL = "all"


def choice_parser(
    description: str, servers: str, workloads: Collection[str] = tuple(WORKLOADS)
) -> argparse.ArgumentParser:
    """:param servers: what is measured if nothing is said
    :param workloads: those that there are
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"workloads: {', '.join(workloads)}. servers: {', '.join(PEERS)}; one of anypoll "
        "may have settings: anypoll/pollers=2+block_size=4096. Each of these may be 'all'.",
    )
    parser.add_argument("--workloads", type=_names(workloads), default=DEFAULT_WORKLOADS)
    parser.add_argument("--servers", type=_peers, default=servers)
    parser.add_argument("--loops", type=_names(LOOPS), default=LOOPS)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another checkout with its own .venv, whose anypoll is measured in the same run",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """``before`` is the name of the other checkout, or empty."""
    options = parser.parse_args()
    options.before = ""
    if options.against:
        options.before = commit(options.against)
        try:
            probe(_interpreter(options.against))
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"--against: {error}")
    return options


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    chosen: list[Peer] = []
    for peer in options.servers:
        chosen.append(peer)
        if options.against and peer.is_ours:
            name = f"{peer.name}@{options.before}"
            chosen.append(replace(peer, name=name, python=_interpreter(options.against)))
    return list(find_cells(options.workloads, chosen, options.loops))


def _interpreter(checkout: Path) -> str:
    return str(checkout.resolve() / ".venv" / "bin" / "python")


def _names(known: Collection[str]) -> Any:
    def parse_names(text: str) -> tuple[str, ...]:
        given = tuple(known) if text == ALL else tuple(text.split(","))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return given

    return parse_names


def _peers(text: str) -> list[Peer]:
    given = [*PEERS, *VARIANTS] if text == ALL else text.split(",")
    try:
        return [find_peer(name) for name in given]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

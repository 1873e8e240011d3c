"""The catalogue: the workloads, and the programs that are measured with them.

To add a program, write it (README.md says what it must do) and give it a line in PEERS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rounds import NO_LOOP, Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
CERTIFICATE = BUILD / "certificate.pem"
"""With its key: that of all servers."""
LOAD, LOAD_TLS = BUILD / "load", BUILD / "load_tls"

LOOPS = ("asyncio", "uvloop", "trio")
ASYNCIO_LOOPS = ("asyncio", "uvloop")


@dataclass(frozen=True)
class Workload:
    name: str
    kind: str
    """What the program does: as a server rpc, echo, or tls, which is rpc over TLS; or client."""
    connections: int
    size: int
    outstanding: int = 1
    requests: int = 0
    """Per connection; 0 = as many as the time allows."""
    reconnect: bool = False
    resume: bool = False
    """Each new connection resumes the TLS session of the one before."""
    rate: float = 0.0
    """Requests a second at fixed times; 0 = each as soon as the one before is answered."""
    busy: bool = False
    """Another Python thread of the server computes all the time."""
    idle: float = 0.0
    """Seconds of silence after the requests, in which memory and wake-ups are taken."""
    stalls: bool = False
    """The longest stall of the server's loop is taken."""
    at_least: float = 0.0
    """Seconds of measuring, whatever is asked for."""
    settle: float = 0.0
    """The same for the warm-up."""
    counted: int = 0
    """Requests over which instructions are counted; 0 = they cannot be, or say nothing."""
    servers: tuple[str, ...] = ()
    """What is measured if nothing is said; none: what the command says."""

    @property
    def is_tls(self) -> bool:
        return self.kind == "tls"

    def server_options(self) -> list[str]:
        """What a server is told of it."""
        if self.is_tls:
            options = ["--workload", "rpc", "--certificate", str(CERTIFICATE)]
        else:
            options = ["--workload", self.kind]
        if self.busy:
            options.append("--busy")
        if self.stalls:
            options.append("--watch-stalls")
        return options

    def duration(self, seconds: float, warmup: float) -> float:
        """About how many seconds are measured or waited for, if so many are asked for."""
        if self.idle or self.stalls:
            # What each connection asks for is answered at once, or after a handshake.
            return self.idle + (self.connections / 1000 if self.is_tls else 0.5)
        return max(seconds, self.at_least) + max(warmup, self.settle)

    def describe(self) -> str:
        connections = "1 connection" if self.connections == 1 else f"{self.connections} connections"
        if self.kind == "client":
            return f"a client with {connections} to the C server, {self.size} B"
        kind = "rpc over TLS" if self.is_tls else self.kind
        text = f"{kind}, {connections}, {self.size} B"
        if self.requests:
            text += f", {self.requests} request each, then "
            again = "a new connection" + (" that resumes the session" if self.resume else "")
            return text + (again if self.reconnect else "silence")
        if self.rate:
            return f"{text}, {self.rate:g} requests a second"
        text += f", {self.outstanding} outstanding"
        return text + (", another thread computes" if self.busy else "")


_TLS_SERVERS = ("anypoll", "anypoll-streams", "anyio", "protocol", "aiofastnet")
_HANDSHAKE_SERVERS = ("anypoll", "anypoll/pollers=2", "anyio", "protocol", "aiofastnet")

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("rpc1", "rpc", 1, 64, counted=500),
        Workload("rpc100", "rpc", 100, 64, counted=2000),
        Workload("rpc1000", "rpc", 1000, 64, counted=5000),
        Workload("rpc100_16k", "rpc", 100, 16 << 10, counted=1000),
        Workload("pipe", "rpc", 100, 64, outstanding=16, counted=10000),
        Workload("echo1", "echo", 1, 64, counted=500),
        Workload("echo100", "echo", 100, 64, counted=2000),
        Workload("bulk", "echo", 4, 256 << 10, counted=200),
        Workload("connect", "rpc", 50, 64, requests=1, reconnect=True, counted=200),
        Workload("idle", "rpc", 5000, 64, requests=1, idle=4, at_least=10),
        Workload("trickle", "rpc", 1, 64, outstanding=16, rate=10, at_least=4, settle=0.5),
        Workload("busy100", "rpc", 100, 64, busy=True, at_least=3, settle=3),
        Workload("client", "client", 1, 64),
        Workload("tls1", "tls", 1, 64, counted=500, servers=_TLS_SERVERS),
        Workload("tls50", "tls", 50, 64, counted=1000, servers=_TLS_SERVERS),
        Workload("tls50_16k", "tls", 50, 16 << 10, counted=500, servers=_TLS_SERVERS),
        Workload(
            "handshake",
            "tls",
            50,
            64,
            requests=1,
            reconnect=True,
            counted=100,
            servers=_HANDSHAKE_SERVERS,
        ),
        Workload(
            "handshake_resumed",
            "tls",
            50,
            64,
            requests=1,
            reconnect=True,
            resume=True,
            counted=100,
            servers=_HANDSHAKE_SERVERS,
        ),
        Workload(
            "tls_stall",
            "tls",
            1000,
            64,
            requests=1,
            stalls=True,
            at_least=60,
            servers=("anypoll", "anypoll/driver=thread", "anyio", "protocol"),
        ),
        Workload(
            "tls_idle",
            "tls",
            2000,
            64,
            requests=1,
            idle=4,
            at_least=60,
            servers=("anypoll", "anyio"),
        ),
    )
}

GROUPS = {"tls": tuple(workload.name for workload in WORKLOADS.values() if workload.is_tls)}
"""Names that stand for several workloads."""


@dataclass(frozen=True)
class Peer:
    name: str
    loops: tuple[str, ...]
    programs: Mapping[str, tuple[str, ...]]
    """What to start for a kind of workload, with its own options."""
    packages: tuple[str, ...] = ()
    """Those it needs besides that of its loop."""
    python: str | None = sys.executable
    """The interpreter; None for what is a program by itself."""
    is_ours: bool = False
    settings: tuple[str, ...] = ()
    """For ``anypoll.configure``, each ``name=value``."""

    def command(self, workload: Workload, loop: str, lifetime: int) -> list[str]:
        program, *options = self.programs[workload.kind]
        start = [program] if self.python is None else [self.python, str(HERE / "peers" / program)]
        settings = [f"--configure={setting}" for setting in self.settings]
        told = [] if workload.kind == "client" else workload.server_options()
        return [*start, *options, *settings, *told, "--loop", loop, "--lifetime", str(lifetime)]

    def serves(self, workload: Workload) -> bool:
        return workload.kind in self.programs and not (workload.busy and self.python is None)


def _python(script: str, *options: str, kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(kinds, (script, *options))


_SERVER = ("rpc", "echo")
_TLS_TOO = (*_SERVER, "tls")


def _ours(way: str, *kinds: str) -> dict[str, tuple[str, ...]]:
    server = _python("anypoll_server.py", "--way", way, kinds=set(_TLS_TOO).intersection(kinds))
    client = _python("anypoll_client.py", "--way", way, kinds={"client"}.intersection(kinds))
    return server | client


EPOLL_SERVER = str(BUILD / "epoll_server")
GO_SERVER = str(BUILD / "go_server")

PEERS = {
    peer.name: peer
    for peer in (
        Peer("anypoll", LOOPS, _ours("reader", *_TLS_TOO, "client"), is_ours=True),
        Peer("anypoll-streams", LOOPS, _ours("streams", "rpc", "tls", "client"), is_ours=True),
        Peer("anypoll-buffered", LOOPS, _ours("buffered", "rpc", "tls", "client"), is_ours=True),
        Peer("anypoll-request", LOOPS, _ours("request", *_TLS_TOO), is_ours=True),
        Peer(
            "anyio",
            LOOPS,
            _python("anyio_server.py", kinds=_TLS_TOO)
            | _python("anyio_client.py", kinds=("client",)),
        ),
        Peer("trio", ("trio",), _python("trio_server.py", kinds=_TLS_TOO)),
        Peer("asyncio-streams", ASYNCIO_LOOPS, _python("asyncio_server.py", kinds=_TLS_TOO)),
        Peer(
            "protocol",
            ASYNCIO_LOOPS,
            _python("protocol_server.py", kinds=_TLS_TOO)
            | _python("protocol_client.py", kinds=("client",)),
        ),
        Peer(
            "aiofastnet",
            ASYNCIO_LOOPS,
            _python("protocol_server.py", "--aiofastnet", kinds=_TLS_TOO),
            packages=("aiofastnet",),
        ),
        Peer("epoll", (NO_LOOP,), dict.fromkeys(_SERVER, (EPOLL_SERVER,)), python=None),
        Peer("go", (NO_LOOP,), dict.fromkeys(_SERVER, (GO_SERVER,)), python=None),
    )
}

VARIANTS = ("anypoll/pollers=2", "anypoll/driver=thread")
"""Of which ``all`` consists, besides PEERS."""


def find_peer(name: str) -> Peer:
    """The peer of that name, or one of ours with settings: ``anypoll/pollers=2+block_size=4096``.

    :raises ValueError: if there is none
    """
    base, slash, settings = name.partition("/")
    peer = PEERS.get(base)
    if peer is None:
        raise ValueError(f"{base!r} is none of {', '.join(PEERS)}")
    if not slash:
        return peer
    given = tuple(settings.split("+"))
    if not peer.is_ours or not all(name and value for name, _, value in map(_split, given)):
        raise ValueError(f"{name!r}: settings are for anypoll, and each is name=value")
    return replace(peer, name=name, settings=given)


def _split(setting: str) -> tuple[str, str, str]:
    return setting.partition("=")


@dataclass(frozen=True)
class Cell:
    key: Key
    workload: Workload = field(repr=False)
    peer: Peer = field(repr=False)


def find_cells(
    workloads: Iterable[str], peers: Iterable[Peer], loops: Iterable[str]
) -> Iterator[Cell]:
    """All combinations that exist, in the order of a report."""
    peers, wanted = list(peers), (*loops, NO_LOOP)
    for name in workloads:
        for peer in peers:
            if peer.serves(WORKLOADS[name]):
                for loop in (loop for loop in wanted if loop in peer.loops):
                    yield Cell(Key(name, peer.name, loop), WORKLOADS[name], peer)

"""Server statistics: an immutable snapshot of the counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ("ServerStatistics",)


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Counters of a server since its start."""

    accepted: int
    active: int
    """connections that have not ended yet: ``len(server.connections)``"""
    rejected: int
    """closed at once because of ``max_connections_per_peer``; not counted as accepted"""
    handler_errors: int
    """exceptions from handlers, request calls and hooks that no peer can cause"""
    closed: Mapping[str, int]
    """how many connections ended for each reason; :doc:`/deployment` lists the reasons"""
    bytes_received: int
    bytes_sent: int
    tls_handshakes: int
    """done with success, for ``ssl_context``"""
    tls_resumed: int
    """how many of them resumed an earlier session, which takes little time"""
    tls_failed: int
    """failed or not done in time, by the fault of the peer"""
    tls_handshake_seconds: float
    """how long those took that were done, in all, with the time that the peers took"""

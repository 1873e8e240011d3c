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
    """closed at once for ``max_connections_per_peer``; not among the accepted"""
    handler_errors: int
    """exceptions of handlers, request calls and hooks that no peer can cause"""
    closed: Mapping[str, int]
    """how often connections ended for which reason; :doc:`/deployment` lists them"""
    bytes_received: int
    bytes_sent: int

"""Server options: the settings that all of a server's connections share."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._buffers.arguments import Limits
from .._connection.requests import Function
from .._connection.sockets import Keepalive

Hook = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Options:
    """The settings that all of a server's connections share."""

    limits: Limits
    keepalive: bool | Keepalive
    nodelay: bool
    shutdown_timeout: float
    handler: Function | None = None
    on_request: Function | None = None
    on_prepare: Hook | None = None
    on_connect: Function | None = None
    on_disconnect: Function | None = None
    on_error: Callable[[Any, Exception], Any] | None = None
    cancel_on_disconnect: bool = False
    ssl_context: ssl.SSLContext | None = None
    tls_handshake_timeout: float = 30.0
    max_connections: int | None = None
    max_connections_per_peer: int | None = None

"""Connections and listeners as AnyIO's stream classes."""

from __future__ import annotations

from ._connection.stream import Connection, UNIXConnection, socketpair
from ._network.listener import SocketListener
from ._tls.connection import TLSConnection

__all__ = ("Connection", "SocketListener", "TLSConnection", "UNIXConnection", "socketpair")

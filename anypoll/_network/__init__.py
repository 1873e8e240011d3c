"""The network: address parsing, listening sockets, listeners, a Happy Eyeballs dialer.

This wing imports ``_tls``, ``_connection`` and what lies below them. The server imports it.
"""

"""Sockets, listening and dialling: addresses, listening sockets, listeners that turn what is
accepted into connections, and connecting with a deadline and fallback.

It imports ``_tls``, ``_connection`` and what lies below them. The server imports it.
"""

"""TLS: the OpenSSL engine, a nocopy reader and writer over plaintext, AnyIO's ``TLSStream``.

For servers it adds handshakes with untrusted peers, request mode, and per-connection sessions.

This wing imports ``_connection`` and what lies below it. The dialer and the server import it.
"""

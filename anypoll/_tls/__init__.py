"""TLS over a connection: OpenSSL between two buffers, the reader and the writer over plaintext, the
stream that is AnyIO's ``TLSStream``; and what a server needs beside it: handshakes with anybody,
request mode, the sessions of its connections.

It imports ``_connection`` and what lies below that. The dialer and the server import it.
"""

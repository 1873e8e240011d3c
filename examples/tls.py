"""A TLS server that answers lines, and a client for it.

  - The handshake is the server's affair: the handler gets a connection that is decrypted already,
    and clients that cannot do TLS never reach it.
  - `read_timeout` is for one whole line, whatever TLS does below.

Run it with `python examples/tls.py serve CERTIFICATE.pem KEY.pem [PORT]`, and then
`python examples/tls.py ask AUTHORITY.pem PORT [NAME]`. For a try, this makes a certificate that is
its own authority:

    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 7 \\
        -subj /CN=localhost -addext subjectAltName=DNS:localhost
"""

from __future__ import annotations

import signal
import ssl
import sys

import anyio

import anypoll


async def handler(conn: anypoll.TLSConnection) -> None:
    """The end of the client's stream ends it, and so does a line that does not come."""
    conn.read_timeout = 60
    while True:
        line = await conn.until(b"\n", max_bytes=1000)
        conn.writer.write(bytes(line).upper())


async def serve(certificate: str, key: str, port: int) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with anypoll.serve(
        handler, host="127.0.0.1", port=port, ssl_context=context, tls_handshake_timeout=10
    ) as server:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(f"Listening on port {server.port}", flush=True)
            async for _ in signals:
                break


async def ask(authority: str, port: int, name: str) -> None:
    context = ssl.create_default_context(cafile=authority)
    async with await anypoll.connect_tcp(
        "127.0.0.1", port, tls=True, ssl_context=context, tls_hostname=name, timeout=10
    ) as conn:
        for word in ("hello", "world"):
            await conn.send(f"{word}\n".encode())
            print(bytes(await conn.until(b"\n")).decode(), end="", flush=True)


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    if what == "serve":
        anyio.run(serve, file, rest[0], int(rest[1]) if len(rest) > 1 else 8443)
    else:
        anyio.run(ask, file, int(rest[0]), rest[1] if len(rest) > 1 else "localhost")

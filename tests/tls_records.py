"""A record layer for hostile peers: it seals what OpenSSL would never send.

OpenSSL makes the handshake, and tells the secrets as it does for a debugger. From then on the test
makes the records itself.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import Any

from certificates import client_context, server_context
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from peers import send_all
from tls_peers import Peer

# types of records
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, DATA, HEARTBEAT = range(20, 25)

# messages of the handshake
HELLO_REQUEST, CLIENT_HELLO, SERVER_HELLO, TICKET, END_OF_EARLY_DATA = 0, 1, 2, 4, 5
FINISHED, KEY_UPDATE = 20, 24

# alerts: how bad, and what
CLOSE_NOTIFY, USER_CANCELED = b"\1\0", b"\1\x5a"
INTERNAL_ERROR = b"\2\x50"


def plain(content: bytes, kind: int = HANDSHAKE, version: int = 0x0303) -> bytes:
    """A record that nothing protects."""
    return bytes([kind]) + version.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def message(kind: int, body: bytes = b"") -> bytes:
    """A message of the handshake."""
    return bytes([kind]) + len(body).to_bytes(3, "big") + body


def key_update(*, requested: bool) -> bytes:
    return message(KEY_UPDATE, bytes([requested]))


def ticket(size: int, nonce: int = 0) -> bytes:
    """A ``NewSessionTicket`` of TLS 1.3, for two hours."""
    fixed = (7200).to_bytes(4, "big") + bytes(4) + b"\4" + nonce.to_bytes(4, "big")
    return message(TICKET, fixed + size.to_bytes(2, "big") + os.urandom(size) + b"\0\0")


def split(stream: bytes) -> list[bytes]:
    """The records of a stream."""
    found = []
    while stream:
        end = 5 + int.from_bytes(stream[3:5], "big")
        found.append(stream[:end])
        stream = stream[end:]
    return found


class Sealer:
    """One direction of a session of TLS 1.3."""

    def __init__(self, algorithm: HashAlgorithm, key_size: int, secret: bytes) -> None:
        self._hash = algorithm
        self._size = key_size
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(self._derive(b"key", self._size))
        self._iv = int.from_bytes(self._derive(b"iv", 12), "big")
        self._sequence = 0

    def _derive(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label (RFC 8446, section 7.1)."""
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return nonce

    def seal(self, content: bytes, kind: int = DATA, *, padding: int = 0) -> bytes:
        """The next record."""
        return self.seal_inner(content + bytes([kind]) + bytes(padding))

    def seal_inner(self, inner: bytes) -> bytes:
        """The same, where the test has the type, too."""
        header = b"\x17\3\3" + (len(inner) + 16).to_bytes(2, "big")
        return header + self._aead.encrypt(self._nonce(), inner, header)

    def open(self, record: bytes) -> bytes:
        """The inner plaintext of the other's next record."""
        return self._aead.decrypt(self._nonce(), record[5:], record[:5])

    def update(self) -> None:
        """Changes the key, as it is behind a ``KeyUpdate``."""
        self._use(self._derive(b"traffic upd", self._hash.digest_size))


class OldSealer:
    """What a client sends in a session of TLS 1.2, behind its ``Finished``."""

    def __init__(
        self, algorithm: HashAlgorithm, key_size: int, secret: bytes, randoms: bytes
    ) -> None:
        seed = b"key expansion" + randoms
        block, step = b"", seed
        while len(block) < 2 * key_size + 8:
            step = _hmac(algorithm, secret, step)
            block += _hmac(algorithm, secret, step + seed)
        self._aead = AESGCM(block[:key_size])
        self._iv = block[2 * key_size :][:4]
        self._sequence = 1

    def seal(self, content: bytes, kind: int = DATA) -> bytes:
        """The next record."""
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        header = bytes([kind]) + b"\3\3"
        extra = sequence + header + len(content).to_bytes(2, "big")
        sealed = sequence + self._aead.encrypt(self._iv + sequence, content, extra)
        return header + len(sealed).to_bytes(2, "big") + sealed


def _hmac(algorithm: HashAlgorithm, key: bytes, data: bytes) -> bytes:
    made = HMAC(key, algorithm)
    made.update(data)
    return made.finalize()


class Forger(Peer):
    """A peer with the keys of its session. As a server it gives no tickets by itself."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        *,
        server_side: bool = False,
        version: str = "TLSv1_3",
    ) -> None:
        context = context or (server_context() if server_side else client_context())
        context.maximum_version = getattr(ssl.TLSVersion, version)
        context.set_ciphers("ECDHE+AESGCM")  # TLS 1.3 has its own, of which it prefers AES-GCM
        if server_side:
            context.num_tickets = 0
        self._keys = os.memfd_create("keys")
        try:
            context.keylog_filename = f"/proc/self/fd/{self._keys}"
            super().__init__(sock, context, server_side=server_side)
        except BaseException:
            os.close(self._keys)
            raise
        self.heard = bytearray()  # the first flight of the other

    async def more(self) -> None:
        before = self.incoming.pending
        await super().more()
        if len(self.heard) < 100:
            data = self.incoming.read()
            self.incoming.write(data)
            self.heard += data[before:]

    def secrets(self) -> dict[str, tuple[bytes, bytes]]:
        """By label: the client's random bytes, and the secret."""
        found = {}
        for line in os.pread(self._keys, 1 << 16, 0).decode().splitlines():
            if line.startswith("#"):
                continue
            label, random, secret = line.split()
            found[label] = bytes.fromhex(random), bytes.fromhex(secret)
        return found

    async def shake_hands(self) -> None:
        try:
            await super().shake_hands()
            self.known = self.secrets()
        finally:
            self.context.keylog_filename = None  # type: ignore[assignment]  # typeshed: a path only
            os.close(self._keys)
        self.sealer: Any = self.sealer_for()

    def sealer_for(self, label: str | None = None) -> Any:
        """By default the one for what this end sends."""
        cipher = self.ssl.cipher()
        assert cipher is not None
        name = cipher[0].replace("-", "_")
        algorithm = SHA384() if name.endswith("SHA384") else SHA256()
        key_size = 32 if "256_GCM" in name or "AES256" in name else 16
        if self.ssl.version() == "TLSv1.2":
            random, secret = self.known["CLIENT_RANDOM"]
            return OldSealer(algorithm, key_size, secret, bytes(self.heard[11:43]) + random)
        label = label or f"{'SERVER' if self.ssl.server_side else 'CLIENT'}_TRAFFIC_SECRET_0"
        return Sealer(algorithm, key_size, self.known[label][1])

    async def forge(self, content: bytes, kind: int = DATA) -> None:
        """Sends a record of its own."""
        await send_all(self.sock, self.sealer.seal(content, kind))

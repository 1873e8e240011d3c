"""A test certificate authority, and TLS contexts that trust it or are certified by it."""

from __future__ import annotations

import functools
import ssl

import trustme

#: What the servers' certificate is for.
NAMES = ("127.0.0.1", "anypoll.test")

IGNORE_EOF = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # since OpenSSL 3


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def certificate() -> trustme.LeafCert:
    return authority().issue_cert(*NAMES)


def server_context(*, lenient: bool = True) -> ssl.SSLContext:
    """:param lenient: OpenSSL takes an end without close_notify for one; so do some Pythons"""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate().configure_cert(context)
    context.options &= ~IGNORE_EOF
    if lenient:
        context.options |= IGNORE_EOF
    return context


def client_context() -> ssl.SSLContext:
    # with an authority given, those of the system are not loaded, which takes long
    context = ssl.create_default_context(cadata=authority().cert_pem.bytes().decode())
    context.options &= ~IGNORE_EOF
    return context

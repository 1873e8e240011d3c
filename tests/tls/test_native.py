"""Which contexts the core can have, where their objects lie, and OpenSSL's errors as exceptions."""

from __future__ import annotations

import _ssl
import ctypes
import errno
import gc
import logging
import ssl
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import trustme
from certificates import authority, client_context, server_context

from anypoll import _epoll
from anypoll._tls import openssl
from anypoll._tls.openssl import ssl_error, ssl_pointer, why_not

NAME = "anypoll.test"


@pytest.fixture(autouse=True)
def _as_if_first() -> Iterator[None]:
    """What is found out once is found out again, also after the test."""
    yield
    for function in (openssl._layout, openssl._why_not_here, openssl._tables):
        function.cache_clear()


def forget() -> None:
    openssl._layout.cache_clear()
    openssl._why_not_here.cache_clear()


def made_by(context: ssl.SSLContext) -> ssl.SSLObject:
    server = context.protocol == ssl.PROTOCOL_TLS_SERVER
    name = None if server else NAME
    return context.wrap_bio(
        ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=server, server_hostname=name
    )


# --- contexts ------------------------------------------------------------------------------------


class Named(ssl.SSLContext):
    """A subclass that only adds."""

    name = "a name"


class Wrapping(ssl.SSLContext):
    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return super().wrap_bio(*args, **kwargs)


class Hiding(ssl.SSLContext):
    """Says that there is no callback."""

    sni_callback = None
    keylog_filename = None


class Object(ssl.SSLObject):
    pass


class Special(ssl.SSLContext):
    sslobject_class = Object


def optional() -> ssl.SSLContext:
    context = server_context()
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def older() -> ssl.SSLContext:
    context = client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET
    context.set_alpn_protocols(["h2"])
    context.keylog_filename = context._msg_callback = None
    return context


@pytest.mark.parametrize(
    "make",
    [
        client_context,
        server_context,
        optional,
        older,
        ssl._create_unverified_context,
        lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        lambda: Named(ssl.PROTOCOL_TLS_CLIENT),
    ],
    ids=["client", "server", "optional", "older", "unverified", "plain", "subclass"],
)
def test_an_ordinary_context_is_for_the_core(
    make: Callable[[], ssl.SSLContext], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "anypoll.tls"):
        context = make()
        assert why_not(context) is None
        assert why_not(context) is None
        made = made_by(context)
        pointer = ssl_pointer(made)
    assert pointer != 0
    assert pointer == ssl_pointer(made)
    assert pointer != ssl_pointer(made_by(context))
    assert not caplog.records


def callback(*args: Any) -> None:
    return None


def set_psk_client(context: ssl.SSLContext) -> None:
    context.set_psk_client_callback(lambda hint: (None, b""))


def set_psk_server(context: ssl.SSLContext) -> None:
    context.set_psk_server_callback(lambda name: b"")


def drop_psk(context: ssl.SSLContext) -> None:
    context.set_psk_client_callback(None)


def set_keylog(context: ssl.SSLContext) -> None:
    context.keylog_filename = "/dev/null"


def set_sni(context: ssl.SSLContext) -> None:
    context.sni_callback = callback


def set_message(context: ssl.SSLContext) -> None:
    context._msg_callback = callback


def set_wrap_bio(context: ssl.SSLContext) -> None:
    context.wrap_bio = context.wrap_bio


def set_class(context: ssl.SSLContext) -> None:
    context.sslobject_class = Object


needs_psk = pytest.mark.skipif(not getattr(ssl, "HAS_PSK", False), reason="since CPython 3.13")


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (server_context, set_sni, "sni_callback is set"),
        (client_context, set_message, "_msg_callback is set"),
        (server_context, set_keylog, "keylog_filename is set"),
        (lambda: Hiding(ssl.PROTOCOL_TLS_SERVER), set_message, "_msg_callback is set"),
        pytest.param(client_context, set_psk_client, "pre-shared", marks=needs_psk),
        pytest.param(server_context, set_psk_server, "pre-shared", marks=needs_psk),
        (client_context, set_wrap_bio, "wrap_bio"),
        (client_context, set_class, "class of its own"),
    ],
    ids=["sni", "message", "keylog", "hidden", "psk-client", "psk-server", "wrap_bio", "class"],
)
def test_what_is_set_later_is_noticed_and_recorded_once(
    make: Callable[[], ssl.SSLContext],
    change: Callable[[ssl.SSLContext], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = make()
    assert why_not(context) is None
    change(context)
    with caplog.at_level(logging.DEBUG, "anypoll.tls"):
        assert reason in str(why_not(context))
        assert reason in str(why_not(context))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert reason in caplog.text


def test_a_hidden_callback_is_found() -> None:
    context = Hiding(ssl.PROTOCOL_TLS_SERVER)
    ssl.SSLContext.sni_callback.__set__(context, callback)
    assert why_not(context) == "sni_callback is set"


@needs_psk
def test_a_callback_that_is_gone_does_not_matter() -> None:
    context = client_context()
    set_psk_client(context)
    drop_psk(context)
    assert why_not(context) is None


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (Wrapping(ssl.PROTOCOL_TLS_CLIENT), "wrap_bio() is not that of ssl"),
        (Special(ssl.PROTOCOL_TLS_CLIENT), "class of its own"),
        (SimpleNamespace(wrap_bio=None), "not one of ssl's"),
    ],
    ids=["wrap_bio", "objects", "foreign"],
)
def test_other_classes_are_not_for_the_core(context: Any, reason: str) -> None:
    assert reason in str(why_not(context))


def test_a_key_log_of_the_environment_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert why_not(client_context()) == "keylog_filename is set"


def test_contexts_are_remembered_weakly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openssl, "_told", {})
    with caplog.at_level(logging.DEBUG, "anypoll.tls"):
        for _ in range(3):
            assert why_not(Wrapping(ssl.PROTOCOL_TLS_CLIENT))
            gc.collect()
    assert len(caplog.records) == 3
    assert openssl._told == {}


# --- interpreters --------------------------------------------------------------------------------


def test_an_unknown_interpreter_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(openssl._LAYOUTS, sys.version_info[:2])
    monkeypatch.setattr(openssl, "words", None)  # nothing is read
    forget()
    assert "not known" in str(why_not(client_context()))


def test_a_build_with_larger_objects_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openssl, "struct", SimpleNamespace(calcsize=lambda _: 4))
    monkeypatch.setattr(openssl, "words", None)
    forget()
    assert "larger objects" in str(why_not(client_context()))


def test_without_openssls_functions_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openssl, "tls_load", lambda path, version: -errno.EPROTO)
    monkeypatch.setattr(openssl, "words", None)
    forget()
    assert ssl.OPENSSL_VERSION in str(why_not(client_context()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"socket": 3},
        {"ssl": 2},
        {"context": 3},
        {"context": 5},
        {"hostname": 6},
        {"hostname": 1000},
        pytest.param({"psk": (8, 9)}, marks=needs_psk),
        pytest.param({"psk": (13, 12)}, marks=needs_psk),
    ],
    ids=str,
)
def test_another_layout_is_noticed(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    version = sys.version_info[:2]
    layout = openssl._LAYOUTS[version]
    monkeypatch.setitem(openssl._LAYOUTS, version, layout._replace(**wrong))
    forget()
    assert "not as expected" in str(why_not(client_context()))


def test_an_attribute_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(ssl.SSLContext):
        def wrap_bio(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace()

    monkeypatch.setattr(openssl, "_PURE", Bare)
    forget()
    assert "not as expected" in str(openssl._why_not_here())


class Forged:
    """As large as the real one, and with other contents."""

    __slots__ = ("w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9")


@pytest.mark.parametrize("words", [(), ("w2",), ("w3",), ("w3", "w4"), ("w2", "w3", "w4")], ids=str)
def test_a_forged_object_is_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    context = client_context()
    assert why_not(context) is None
    forged = Forged()
    for word in words:
        setattr(forged, word, object())
    around: Any = SimpleNamespace(_sslobj=forged, context=context)
    assert ssl_pointer(around) == 0  # for its type
    monkeypatch.setattr(openssl, "_SOCKET", Forged)
    with caplog.at_level(logging.DEBUG, "anypoll.tls"):
        assert ssl_pointer(around) == 0  # for what it holds


def test_an_object_of_another_context_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    one, other = client_context(), client_context()
    assert why_not(one) is why_not(other) is None
    around: Any = SimpleNamespace(_sslobj=made_by(one)._sslobj, context=other)
    with caplog.at_level(logging.DEBUG, "anypoll.tls"):
        assert ssl_pointer(around) == 0
        assert ssl_pointer(around) == 0
    assert len(caplog.records) == 1


def test_an_object_with_a_socket_is_refused() -> None:
    import socket

    one, other = socket.socketpair()
    context = client_context()
    with one, other:
        wrapped = context.wrap_socket(one, do_handshake_on_connect=False, server_hostname=NAME)
        with wrapped:
            around: Any = SimpleNamespace(_sslobj=wrapped._sslobj, context=context)
            assert around._sslobj is None or ssl_pointer(around) == 0


def test_only_an_objects_own_memory_is_read() -> None:
    size = object.__basicsize__ // struct.calcsize("P")
    assert _epoll.words(object(), size)[1] == id(object)
    with pytest.raises(ValueError, match="no 3 words"):
        _epoll.words(object(), size + 1)


# --- errors --------------------------------------------------------------------------------------


class OpenSSL:
    """What the core calls, called by the test."""

    def __init__(self) -> None:
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        self.handshake = library.SSL_do_handshake
        self.handshake.argtypes = [ctypes.c_void_p]
        self.read = library.SSL_read
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        self.get_error = library.SSL_get_error
        self.get_error.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self.verify_result = library.SSL_get_verify_result
        self.verify_result.argtypes = [ctypes.c_void_p]
        self.verify_result.restype = ctypes.c_long
        self.verify_text = library.X509_verify_cert_error_string
        self.verify_text.argtypes = [ctypes.c_long]
        self.verify_text.restype = ctypes.c_char_p
        self.clear = library.ERR_clear_error
        self.peek = library.ERR_peek_last_error
        self.peek.restype = ctypes.c_ulong
        self.reason = library.ERR_reason_error_string
        self.reason.argtypes = [ctypes.c_ulong]
        self.reason.restype = ctypes.c_char_p

    def call(self, made: ssl.SSLObject, reading: bool) -> ssl.SSLError | None:
        """Raises the exception for a failure."""
        pointer = ssl_pointer(made)
        assert pointer
        self.clear()
        room = ctypes.create_string_buffer(100)
        result = self.read(pointer, room, 100) if reading else self.handshake(pointer)
        kind, code = self.get_error(pointer, result), self.peek()
        reason, verify = self.reason(code), self.verify_result(pointer)
        self.clear()
        if kind in (0, ssl.SSL_ERROR_WANT_READ, ssl.SSL_ERROR_WANT_WRITE):
            if kind:
                raise ssl.SSLWantReadError
            return None
        text = self.verify_text(verify).decode()
        hostname = made.server_hostname
        raise ssl_error(kind, code, reason and reason.decode(), verify, text, hostname)


class Side(NamedTuple):
    made: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


Call = Callable[[ssl.SSLObject, bool], Any]


def by_ssl(made: ssl.SSLObject, reading: bool) -> Any:
    return made.read(100) if reading else made.do_handshake()


def side(context: ssl.SSLContext, name: str | None) -> Side:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    made = context.wrap_bio(incoming, outgoing, server_side=name is None, server_hostname=name)
    return Side(made, incoming, outgoing)


def advance(one: Side, call: Call, reading: bool) -> ssl.SSLError | bool:
    """False: it needs input; True: it is done; or how it has failed."""
    try:
        call(one.made, reading)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError as exc:
        return exc
    return True


def failures(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str, call: Call
) -> list[ssl.SSLError | bool]:
    """How both ends of a handshake fare."""
    ends = side(client, name), side(server, None)
    results: list[ssl.SSLError | bool] = [False, False]
    for _ in range(10):
        for i, (one, other) in enumerate((ends, ends[::-1])):
            if not results[i]:
                results[i] = advance(one, call, False)
            elif results[i] is True:  # the client of TLS 1.3 is done before the server has looked
                outcome = advance(one, call, True)
                results[i] = outcome if isinstance(outcome, ssl.SSLError) else True
            other.incoming.write(one.outgoing.read())
    return results


def connected(call: Call) -> tuple[Side, Side]:
    client, server = client_context(), server_context(lenient=False)
    ends = side(client, NAME), side(server, None)
    for _ in range(3):
        for one, other in (ends, ends[::-1]):
            advance(one, call, False)
            other.incoming.write(one.outgoing.read())
    assert ends[0].made.version() == ends[1].made.version() == "TLSv1.3"
    return ends


def fields(exc: ssl.SSLError | bool) -> Any:
    if isinstance(exc, bool):
        return exc
    text = str(exc).partition(" (_ssl.c:")[0]
    verify = [getattr(exc, name, "none") for name in ("verify_code", "verify_message")]
    args = (exc.args[0], exc.args[1].partition(" (_ssl.c:")[0])
    return type(exc), args, exc.errno, text, exc.library, exc.reason, *verify


def certified_by(leaf: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    return context


def unknown_ca() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    return client_context(), certified_by(trustme.CA().issue_cert(NAME)), NAME


def self_signed(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    alone = trustme.CA()
    alone.cert_pem.write_to_path(tmp_path / "certificate")
    alone.private_key_pem.write_to_path(tmp_path / "key")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    return client_context(), server, NAME


def expired() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    past = datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 2, 1, tzinfo=UTC)
    leaf = authority().issue_cert(NAME, not_before=past[0], not_after=past[1])
    return client_context(), certified_by(leaf), NAME


def hostname_mismatch() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    return client_context(), server_context(), "other.test"


def address_mismatch() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    return client_context(), server_context(), "192.0.2.1"


def other_version() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    client, server = client_context(), server_context()
    client.minimum_version = ssl.TLSVersion.TLSv1_3
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    return client, server, NAME


def no_shared_cipher() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    client, server = client_context(), server_context()
    client.maximum_version = server.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256")
    server.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384")
    return client, server, NAME


def no_certificate() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    server = server_context()
    server.load_verify_locations(cadata=authority().cert_pem.bytes().decode())
    server.verify_mode = ssl.CERT_REQUIRED
    return client_context(), server, NAME


def untrusted_client() -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    client, server, name = no_certificate()
    trustme.CA().issue_cert("someone.test").configure_cert(client)
    return client, server, name


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (unknown_ca, ("CERTIFICATE_VERIFY_FAILED", "TLSV1_ALERT_UNKNOWN_CA")),
        (self_signed, ("CERTIFICATE_VERIFY_FAILED", "TLSV1_ALERT_UNKNOWN_CA")),
        (expired, ("CERTIFICATE_VERIFY_FAILED", "SSLV3_ALERT_CERTIFICATE_EXPIRED")),
        (hostname_mismatch, ("CERTIFICATE_VERIFY_FAILED", "SSLV3_ALERT_BAD_CERTIFICATE")),
        (address_mismatch, ("CERTIFICATE_VERIFY_FAILED", "SSLV3_ALERT_BAD_CERTIFICATE")),
        (other_version, ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL")),
        (no_shared_cipher, ("SSLV3_ALERT_HANDSHAKE_FAILURE", "NO_SHARED_CIPHER")),
        (
            no_certificate,
            ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ),
        (untrusted_client, ("TLSV1_ALERT_UNKNOWN_CA", "CERTIFICATE_VERIFY_FAILED")),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_errors_of_handshakes_are_those_of_ssl(
    make: Callable[..., Any], reasons: tuple[str, str], tmp_path: Path
) -> None:
    contexts = make(tmp_path) if make is self_signed else make()
    theirs = failures(*contexts, by_ssl)
    ours = failures(*contexts, OpenSSL().call)
    assert [fields(exc) for exc in ours] == [fields(exc) for exc in theirs]
    assert tuple(getattr(exc, "reason", None) for exc in ours) == reasons


def test_errors_name_whom_a_certificate_is_not_for() -> None:
    client, _server = failures(*hostname_mismatch(), OpenSSL().call)
    assert isinstance(client, ssl.SSLCertVerificationError)
    assert str(client) == (
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
        "Hostname mismatch, certificate is not valid for 'other.test'."
    )
    client, _server = failures(*address_mismatch(), OpenSSL().call)
    assert "IP address mismatch" in str(client)
    assert "'192.0.2.1'" in str(client)


def end(one: Side, other: Side) -> None:
    one.incoming.write_eof()


def flip(one: Side, other: Side) -> None:
    other.made.write(b"x" * 50)
    record = bytearray(other.outgoing.read())
    record[-1] ^= 1
    one.incoming.write(record)


def garbage(one: Side, other: Side) -> None:
    one.incoming.write(b"GET / HTTP/1.1\r\nHost: example.test\r\n\r\n")


def two_goodbyes(one: Side, other: Side) -> None:
    with pytest.raises(ssl.SSLWantReadError):
        one.made.unwrap()
    other.incoming.write(one.outgoing.read())
    other.made.unwrap()
    one.incoming.write(other.outgoing.read())


@pytest.mark.parametrize("prepare", [end, flip, garbage, two_goodbyes])
def test_errors_of_reads_are_those_of_ssl(prepare: Callable[[Side, Side], None]) -> None:
    found = []
    for call in (by_ssl, OpenSSL().call):
        client, server = connected(call)
        advance(client, call, True)  # the tickets
        prepare(client, server)
        found.append(fields(advance(client, call, True)))
    assert found[0] == found[1]
    assert not isinstance(found[0], bool)


@pytest.mark.parametrize("prepare", [end, garbage])
@pytest.mark.parametrize("server", [False, True])
def test_errors_of_first_bytes_are_those_of_ssl(
    server: bool, prepare: Callable[[Side, Side], None]
) -> None:
    found = []
    for call in (by_ssl, OpenSSL().call):
        one = side(server_context(lenient=False), None) if server else side(client_context(), NAME)
        assert advance(one, call, False) is False
        prepare(one, one)
        found.append(fields(advance(one, call, False)))
    assert found[0] == found[1]
    assert not isinstance(found[0], bool)


def test_errors_without_a_code_are_told_apart() -> None:
    exc = ssl_error(ssl.SSL_ERROR_SYSCALL, 0, None, 0, "ok", None)
    assert fields(exc)[:3] == (
        ssl.SSLEOFError,
        (ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol"),
        ssl.SSL_ERROR_EOF,
    )
    exc = ssl_error(ssl.SSL_ERROR_SSL, 0, None, 0, "ok", None)
    assert str(exc) == "A failure in the SSL library occurred"
    exc = ssl_error(ssl.SSL_ERROR_ZERO_RETURN, 0, None, 0, "ok", None)
    assert type(exc) is ssl.SSLZeroReturnError
    assert ssl_error(99, 0, None, 0, "ok", None).errno == ssl.SSL_ERROR_INVALID_ERROR_CODE


def test_an_error_that_has_no_name_has_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shift = 24 if ssl.OPENSSL_VERSION_INFO < (3,) else 23
    exc = ssl_error(ssl.SSL_ERROR_SSL, 20 << shift | 4000, None, 0, "ok", None)
    assert (str(exc), exc.library, exc.reason) == ("[SSL] unknown error", "SSL", None)

    monkeypatch.setattr(openssl.gc, "get_referents", lambda *_: [])
    openssl._tables.cache_clear()
    exc = ssl_error(
        ssl.SSL_ERROR_SSL, 20 << shift | 134, "certificate verify failed", 20, "?", None
    )
    assert type(exc) is ssl.SSLCertVerificationError
    assert (str(exc), exc.library) == ("certificate verify failed", None)

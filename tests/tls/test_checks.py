"""What is checked in a handshake is what ``ssl`` checks: for each case, two ends of ``ssl`` alone
tell how it ends, and why. Then one end after the other is ours.
"""

from __future__ import annotations

import functools
import re
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from anyio import BrokenResourceError
from anyio.streams.tls import TLSAttribute
from peers import within
from tls_authorities import CLIENT, DAY, SERVER, Certified, issue, root
from tls_peers import Peer, both

from anypoll import AnypollAttribute, Connection, TLSConnection

pytestmark = [pytest.mark.anyio, pytest.mark.any_loop]

NAME = "a.test"
VERSIONS = ["TLSv1_2", "TLSv1_3"]
OLD, NEW = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@functools.cache
def top() -> Certified:
    return root()


@functools.cache
def leaf() -> Certified:
    return issue(top(), NAME)


class Contexts:
    """A client's and a server's, which a case changes, and the name that the client wants."""

    def __init__(self) -> None:
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.client.load_verify_locations(cadata=top().pem)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.name: str | None = NAME

    def ask(self, mode: ssl.VerifyMode = ssl.CERT_REQUIRED) -> None:
        """The server wants to know who the client is."""
        self.server.verify_mode = mode
        self.server.load_verify_locations(cadata=top().pem)


Case = Callable[[Contexts], None]
BAD_CHAINS: dict[str, Case] = {}
GOOD_CHAINS: dict[str, Case] = {}
SETTINGS: dict[str, Case] = {}


def bad(case: Case) -> None:
    BAD_CHAINS[case.__name__.replace("_", " ")] = case


def good(case: Case) -> None:
    GOOD_CHAINS[case.__name__.replace("_", " ")] = case


def setting(case: Case) -> None:
    SETTINGS[case.__name__.replace("_", " ")] = case


def why(exc: BaseException) -> Any:
    """All that an error of ``ssl`` tells."""
    assert isinstance(exc, ssl.SSLError)
    text = re.sub(r" \(_ssl\.c:\d+\)", "", str(exc))
    verified = [getattr(exc, name, None) for name in ("verify_code", "verify_message")]
    return type(exc), exc.errno, exc.library, exc.reason, text, *verified


def facts(session: Any) -> Any:
    """What both ends have agreed upon."""
    return (
        session.version(),
        session.cipher(),
        session.selected_alpn_protocol(),
        session.getpeercert(),
        session.getpeercert(True),
        session.server_hostname,
        session.session_reused,
        session.compression(),
    )


def advance(session: ssl.SSLObject) -> Any:
    """What is known of the handshake now."""
    try:
        session.do_handshake()
    except ssl.SSLWantReadError:
        return None
    except ssl.SSLError as exc:
        return why(exc)
    return facts(session)


def by_ssl(contexts: Contexts) -> tuple[Any, Any]:
    """How it ends for the client, and for the server."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts.client.wrap_bio(down, up, server_hostname=contexts.name)
    server = contexts.server.wrap_bio(up, down, server_side=True)
    first = second = None
    for _ in range(6):
        first = advance(client) if first is None else first
        second = advance(server) if second is None else second
    assert first is not None
    assert second is not None
    return first, second


REFUSED = "refused"


async def ending(wrapping: Any) -> Any:
    try:
        tls = await wrapping
    except ssl.SSLError as exc:
        return why(exc)
    try:
        result = facts(tls.extra(TLSAttribute.ssl_object))
    except ValueError:  # the peer has refused us since, and ssl tells nothing more
        assert tls.extra(AnypollAttribute.tls_native)
        assert not tls.is_active
        result = REFUSED
    tls.abort()
    return result


async def by_us(contexts: Contexts, *, server_side: bool) -> Any:
    """The same for one end that is ours."""
    ours, theirs = socket.socketpair()
    result: list[Any] = []
    with theirs:
        async with await Connection.from_socket(ours) as conn:
            context = contexts.client if server_side else contexts.server
            peer = Peer(theirs, context, server_side=not server_side, name=contexts.name)

            async def wrap() -> None:
                hostname = None if server_side else contexts.name
                context = contexts.server if server_side else contexts.client
                wrapping = TLSConnection.wrap(
                    conn, server_side=server_side, hostname=hostname, ssl_context=context
                )
                result.append(await ending(wrapping))
                conn.abort()

            async def answer() -> None:
                with suppress(ssl.SSLError, ConnectionError):
                    await peer.shake_hands()

            await both(wrap, answer)
    return result[0]


async def compare(contexts: Contexts) -> tuple[Any, Any]:
    """Returns how it ends."""
    expected = by_ssl(contexts)
    ours = await by_us(contexts, server_side=False)
    if ours is REFUSED:  # of what TLS 1.3 is done with, before the server has looked
        assert isinstance(expected[1][0], type)
    else:
        assert ours == expected[0]
    assert await by_us(contexts, server_side=True) == expected[1]
    return expected


def failed(ending: Any) -> bool:
    return isinstance(ending[0], type)


# --- names ---------------------------------------------------------------------------------------

#: Names in a certificate, the name that is wanted, and whether that will do.
NAMES = [
    (["a.test"], "a.test", True),
    (["a.test"], "A.Test", True),
    (["A.TEST"], "a.test", True),
    (["b.test", "a.test"], "a.test", True),
    (["a.test"], "b.test", False),
    (["a.test"], "sub.a.test", False),
    (["sub.a.test"], "a.test", False),
    (["a.test"], "a.test.evil.test", False),
    (["*.a.test"], "x.a.test", True),
    (["*.a.test"], "x.y.a.test", False),
    (["*.a.test"], "a.test", False),
    (["*.test"], "a.test", False),
    (["*"], "a", False),
    (["f*.a.test"], "foo.a.test", False),
    (["*o.a.test"], "foo.a.test", False),
    (["x.*.test"], "x.a.test", False),
    (["*.*.test"], "x.a.test", False),
    (["xn--bcher-kva.test"], "bücher.test", True),
    (["xn--bcher-kva.test"], "xn--bcher-kva.test", True),
    (["*.a.test"], "bücher.a.test", True),
    (["xn--*.a.test"], "bücher.a.test", False),
    (["127.0.0.1"], "127.0.0.1", True),
    (["127.0.0.1"], "127.0.0.2", False),
    (["dns:127.0.0.1"], "127.0.0.1", False),
    (["::1"], "::1", True),
    (["::1"], "0:0:0:0:0:0:0:1", True),
    (["::1"], "::2", False),
    (["::ffff:127.0.0.1"], "127.0.0.1", False),
    (["127.0.0.1"], "a.test", False),
    (["a.test"], "127.0.0.1", False),
]


@pytest.mark.parametrize(("names", "wanted", "fits"), NAMES)
async def test_names(names: list[str], wanted: str, fits: bool) -> None:
    contexts = Contexts()
    issue(top(), *names).configure(contexts.server)
    contexts.name = wanted
    ending, _ = await compare(contexts)
    assert failed(ending) is not fits
    contexts.client.check_hostname = False
    ending, _ = await compare(contexts)
    assert not failed(ending)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("names", [[], ["b.test"]])
async def test_a_common_name(names: list[str], checked: bool) -> None:
    contexts = Contexts()
    issue(top(), *names, common_name=NAME).configure(contexts.server)
    contexts.client.hostname_checks_common_name = checked
    ending, _ = await compare(contexts)
    assert failed(ending) is (bool(names) or not checked)


# --- chains --------------------------------------------------------------------------------------


def between(path_length: int | None = None, **options: Any) -> Certified:
    return issue(top(), common_name="middle", authority=True, path_length=path_length, **options)


@bad
def expired(c: Contexts) -> None:
    issue(top(), NAME, valid=(-2 * DAY, -DAY)).configure(c.server)


@bad
def not_yet_valid(c: Contexts) -> None:
    issue(top(), NAME, valid=(DAY, 2 * DAY)).configure(c.server)


@bad
def another_purpose(c: Contexts) -> None:
    issue(top(), NAME, purposes=[CLIENT]).configure(c.server)


@bad
def unknown_authority(c: Contexts) -> None:
    issue(root("another"), NAME).configure(c.server)


@bad
def an_impostor(c: Contexts) -> None:
    issue(root(), NAME, identified=False).configure(c.server)


@bad
def self_signed(c: Contexts) -> None:
    issue(None, NAME).configure(c.server)


@bad
def a_link_is_missing(c: Contexts) -> None:
    issue(between(), NAME).configure(c.server, alone=True)


@bad
def too_deep(c: Contexts) -> None:
    low = issue(between(0), common_name="low", authority=True)
    issue(low, NAME).configure(c.server)


@bad
def no_authority(c: Contexts) -> None:
    issue(issue(top(), common_name="middle"), NAME).configure(c.server)


@bad
def an_expired_link(c: Contexts) -> None:
    issue(between(valid=(-2 * DAY, -DAY)), NAME).configure(c.server)


@bad
def no_key_identifier(c: Contexts) -> None:
    c.client.verify_flags |= ssl.VERIFY_X509_STRICT
    issue(top(), NAME, identified=False).configure(c.server)


@bad
def no_revocation_list(c: Contexts) -> None:
    c.client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    leaf().configure(c.server)


@bad
def only_a_link_is_trusted(c: Contexts) -> None:
    middle = between()
    c.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.client.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    c.client.load_verify_locations(cadata=middle.pem)
    issue(middle, NAME).configure(c.server)


@good
def no_purpose(c: Contexts) -> None:
    issue(top(), NAME, purposes=[]).configure(c.server)


@good
def a_link(c: Contexts) -> None:
    issue(between(0), NAME).configure(c.server)


@good
def a_key_identifier(c: Contexts) -> None:
    c.client.verify_flags |= ssl.VERIFY_X509_STRICT
    leaf().configure(c.server)


@good
def a_trusted_link(c: Contexts) -> None:
    middle = between()
    c.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    c.client.load_verify_locations(cadata=middle.pem)
    issue(middle, NAME).configure(c.server)


@good
def nothing_is_checked(c: Contexts) -> None:
    c.client.check_hostname = False
    c.client.verify_mode = ssl.CERT_NONE
    issue(None, valid=(-2 * DAY, -DAY)).configure(c.server)


@good
def no_name(c: Contexts) -> None:
    c.client.check_hostname = False
    c.name = None
    leaf().configure(c.server)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", BAD_CHAINS)
async def test_a_chain_that_does_not_hold(case: str, version: str) -> None:
    contexts = Contexts()
    BAD_CHAINS[case](contexts)
    contexts.server.maximum_version = getattr(ssl.TLSVersion, version)
    ending, _ = await compare(contexts)
    assert ending[0] is ssl.SSLCertVerificationError
    assert ending[3] == "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize("case", GOOD_CHAINS)
async def test_a_chain_that_holds(case: str) -> None:
    contexts = Contexts()
    GOOD_CHAINS[case](contexts)
    assert not any(map(failed, await compare(contexts)))


# --- certificates of clients ---------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", [ssl.CERT_NONE, ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED])
@pytest.mark.parametrize("who", ["nobody", "known", "unknown", "expired", "a server"])
async def test_certificates_of_clients(who: str, mode: ssl.VerifyMode, version: str) -> None:
    contexts = Contexts()
    contexts.server.maximum_version = getattr(ssl.TLSVersion, version)
    leaf().configure(contexts.server)
    contexts.ask(mode)
    if who == "known":
        issue(top()).configure(contexts.client)
    elif who == "unknown":
        issue(root("another")).configure(contexts.client)
    elif who == "expired":
        issue(top(), valid=(-2 * DAY, -DAY)).configure(contexts.client)
    elif who == "a server":
        issue(top(), purposes=[SERVER]).configure(contexts.client)
    _, ending = await compare(contexts)
    refused = mode != ssl.CERT_NONE and who not in {"known", "nobody"}
    assert failed(ending) is (refused or (mode == ssl.CERT_REQUIRED and who == "nobody"))


async def test_a_client_is_told_later_in_tls_1_3() -> None:
    """Its handshake is done when the server refuses it."""
    contexts = Contexts()
    leaf().configure(contexts.server)
    contexts.ask()
    ours, theirs = socket.socketpair()
    with theirs:
        peer = Peer(theirs, contexts.server, server_side=True)

        async def refuse() -> None:
            with pytest.raises(ssl.SSLError):
                await peer.shake_hands()

        async def dial() -> None:
            conn = await Connection.from_socket(ours)
            tls = await TLSConnection.wrap(conn, hostname=NAME, ssl_context=contexts.client)
            with pytest.raises(BrokenResourceError) as caught:
                await tls.receive()
            assert why(caught.value.__cause__)[3] == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
            tls.abort()

        await both(refuse, dial)


# --- what both must agree upon -------------------------------------------------------------------


@setting
def an_old_server(c: Contexts) -> None:
    c.client.minimum_version, c.server.maximum_version = NEW, OLD


@setting
def an_old_client(c: Contexts) -> None:
    c.client.maximum_version, c.server.minimum_version = OLD, NEW


@setting
def both_are_old(c: Contexts) -> None:
    c.client.maximum_version = c.server.maximum_version = OLD


@setting
def no_common_cipher(c: Contexts) -> None:
    c.server.maximum_version = OLD
    c.client.set_ciphers("ECDHE+AES256")
    c.server.set_ciphers("ECDHE+CHACHA20")


@setting
def a_common_cipher(c: Contexts) -> None:
    c.server.maximum_version = OLD
    c.client.set_ciphers("ECDHE-ECDSA-AES128-SHA256")


@setting
def no_fitting_certificate(c: Contexts) -> None:
    c.server.maximum_version = OLD
    c.server.set_ciphers("aRSA")


@setting
def no_certificate(c: Contexts) -> None:
    c.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


@setting
def a_curve(c: Contexts) -> None:  # which costs one more round
    c.server.set_ecdh_curve("secp521r1")


@setting
def protocols(c: Contexts) -> None:
    c.client.set_alpn_protocols(["x", "b", "a"])
    c.server.set_alpn_protocols(["a", "b"])


@setting
def no_common_protocol(c: Contexts) -> None:
    c.client.set_alpn_protocols(["x"])
    c.server.set_alpn_protocols(["a", "b"])


@setting
def protocols_of_one(c: Contexts) -> None:
    c.client.set_alpn_protocols(["x"])


@setting
def a_name_that_is_refused(c: Contexts) -> None:
    c.server.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


@setting
def a_name_with_a_context_of_its_own(c: Contexts) -> None:
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issue(top(), NAME, common_name="other").configure(other)

    def choose(session: Any, name: str, _context: ssl.SSLContext) -> None:
        assert name == NAME
        session.context = other

    c.server.sni_callback = choose


@setting
def a_name_that_no_address_is(c: Contexts) -> None:
    c.name = "127.0.0.1"
    c.client.check_hostname = False

    def note(_session: Any, name: str | None, _context: ssl.SSLContext) -> Any:
        return None if name is None else ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

    c.server.sni_callback = note


FAILING = {
    "an old server",
    "an old client",
    "no common cipher",
    "no fitting certificate",
    "no certificate",
    "a name that is refused",
}


@pytest.mark.parametrize("case", SETTINGS)
async def test_settings(case: str) -> None:
    contexts = Contexts()
    leaf().configure(contexts.server)
    SETTINGS[case](contexts)
    assert [failed(ending) for ending in await compare(contexts)] == [case in FAILING] * 2


async def test_a_callback_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer gets an alert, and the program is told in the way of ``ssl``."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_type))
    contexts = Contexts()
    leaf().configure(contexts.server)

    def fail(*_: Any) -> None:
        raise LookupError

    contexts.server.sni_callback = fail
    assert all(map(failed, await compare(contexts)))
    assert told == [LookupError] * 3


@pytest.mark.parametrize("server_side", [True, False])
async def test_keys_are_told_to_a_debugger(server_side: bool, tmp_path: Path) -> None:
    contexts = Contexts()
    leaf().configure(contexts.server)
    contexts.client.keylog_filename = str(tmp_path / "client")
    contexts.server.keylog_filename = str(tmp_path / "server")
    await by_us(contexts, server_side=server_side)
    told = [(tmp_path / name).read_text().splitlines() for name in ("client", "server")]
    assert len(told[0]) >= 4
    assert set(told[0]) == set(told[1])


# --- sessions ------------------------------------------------------------------------------------


class Resuming(ssl.SSLContext):
    """Every session of its clients resumes this one."""

    resumed: ssl.SSLSession | None = None

    def wrap_bio(self, incoming: Any, outgoing: Any, *args: Any, **options: Any) -> ssl.SSLObject:
        server_side, server_hostname, _ = (*args, *[None] * 3)[:3]
        server_side = options.get("server_side", server_side)
        server_hostname = options.get("server_hostname", server_hostname)
        return super().wrap_bio(
            incoming, outgoing, bool(server_side), server_hostname, self.resumed
        )


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_session_is_resumed(version: str, role: str) -> None:
    """And binds channels, in the version that has this."""
    contexts = Contexts()
    contexts.client = client = Resuming(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=top().pem)
    client.maximum_version = getattr(ssl.TLSVersion, version)
    leaf().configure(contexts.server)
    made: list[TLSConnection] = []
    for number in range(3):
        ours, theirs = socket.socketpair()
        with theirs:
            conn = await Connection.from_socket(ours)
            if role == "client":
                peer = Peer(theirs, contexts.server, server_side=True)
            else:
                peer = Peer(theirs, client, name=NAME)

            async def wrap() -> None:
                context = client if role == "client" else contexts.server
                made.append(
                    await TLSConnection.wrap(
                        conn,  # noqa: B023
                        server_side=role == "server",
                        hostname=NAME if role == "client" else None,
                        ssl_context=context,
                    )
                )

            await both(wrap, peer.shake_hands)
            tls = made.pop()
            session = tls.extra(TLSAttribute.ssl_object)
            if role == "client":
                await peer.send(b"x")
                assert await within(tls.receive()) == b"x"
                client.resumed = session.session
            else:
                await tls.send(b"x")
                assert await peer.receive(1) == b"x"
                client.resumed = peer.ssl.session
            assert session.session_reused is peer.ssl.session_reused is (number > 0)
            assert session.session is not None
            assert session.get_channel_binding("tls-unique") == (
                peer.ssl.get_channel_binding("tls-unique")
            )
            tls.abort()


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("role", ["client", "server"])
async def test_a_client_that_is_asked_later(role: str, able: bool) -> None:
    contexts = Contexts()
    leaf().configure(contexts.server)
    issue(top(), common_name="me").configure(contexts.client)
    contexts.client.post_handshake_auth = able
    contexts.server.post_handshake_auth = True
    contexts.ask(ssl.CERT_OPTIONAL)
    ours, theirs = socket.socketpair()
    with theirs:
        conn = await Connection.from_socket(ours)
        server_side = role == "server"
        peer = Peer(
            theirs,
            contexts.client if server_side else contexts.server,
            server_side=not server_side,
            name=NAME,
        )
        made: list[TLSConnection] = []

        async def wrap() -> None:
            made.append(
                await TLSConnection.wrap(
                    conn,
                    server_side=server_side,
                    hostname=None if server_side else NAME,
                    ssl_context=contexts.server if server_side else contexts.client,
                )
            )

        await both(wrap, peer.shake_hands)
        [tls] = made
        asking = tls.extra(TLSAttribute.ssl_object) if server_side else peer.ssl
        assert not asking.getpeercert()
        if not able:
            with pytest.raises(ssl.SSLError, match="EXTENSION_NOT_RECEIVED"):
                asking.verify_client_post_handshake()
            tls.abort()
            return
        asking.verify_client_post_handshake()
        if server_side:
            await tls.send(b"who?")
            assert await peer.receive(4) == b"who?"
            await peer.send(b"me")
            assert await within(tls.next(2)) == b"me"
        else:
            await peer.send(b"who?")
            assert await within(tls.next(4)) == b"who?"
            await tls.send(b"me")
            assert await peer.receive(2) == b"me"
        assert asking.getpeercert()["subject"] == ((("commonName", "me"),),)
        tls.abort()

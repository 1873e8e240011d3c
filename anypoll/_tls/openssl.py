"""Whether the core can use the OpenSSL objects behind Python's, and OpenSSL's errors as exceptions.

The core calls the ``SSL`` object that ``ssl`` has made, in any thread, and without the GIL. ``ssl``
does not hand it out, so it is read from the memory of the ``_ssl._SSLSocket``. That is done only
where the layout is known, and only after a trial: an object is made of which enough is known to
recognise it in memory. Nothing outside of an object's own memory is read, and what is taken for a
pointer to an ``SSL`` is followed only if the word behind it is the address of the right context.

What ``_ssl.c`` installs in OpenSSL must be able to run in a poller's thread. These run Python code,
or write to what is Python's, after ``PyGILState_Ensure`` and through ``SSL_get_app_data``, a bare
pointer to the ``_SSLSocket``, so a context with one of them is not for the core:

===================== ============================== =============================================
callback              installed by                   how it is noticed
===================== ============================== =============================================
servername            ``sni_callback``               by the attribute
message               ``_msg_callback``              by the attribute
key log               ``keylog_filename``            by the attribute; ``create_default_context()``
                                                     sets it if SSLKEYLOGFILE is set
PSK client, server    ``set_psk_client_callback()``, in memory: there is no attribute (3.13)
                      ``set_psk_server_callback()``
===================== ============================== =============================================

Others are harmless. That for passwords is there while ``load_cert_chain()`` runs. That for ALPN, of
a server, is plain C over memory of the ``_SSLContext``: therefore whoever lets the core have an
``SSL`` keeps the ``SSLObject``, and with it the context, for as long as the core may call OpenSSL.
The verification of certificates has none.

A context is asked about for each connection, because a callback may have been set meanwhile. Where
the attributes are concerned, it is ``_ssl``'s own that are looked at, not those of a subclass. The
first ``SSL`` of a context is looked at with OpenSSL's own functions; they say the same of the next.
"""

from __future__ import annotations

import _ssl
import functools
import gc
import logging
import os
import ssl
import struct
import sys
import weakref
from typing import Any, NamedTuple

from .._epoll import tls_check, tls_load, words

logger = logging.getLogger("anypoll.tls")

# --- what is known of _ssl.c ---------------------------------------------------------------------


class _Layout(NamedTuple):
    """Places in the memory of an object, in words."""

    ctx: int
    """of an ``_SSLContext``: the ``SSL_CTX *``"""
    psk: tuple[int, ...]
    """of the same: the callbacks for pre-shared keys"""
    socket: int
    """of an ``_SSLSocket``: a weak reference to the socket, NULL over memory buffers"""
    ssl: int
    context: int
    """of the same: the ``_SSLContext``"""
    hostname: int


_PLAIN = _Layout(ctx=2, psk=(), socket=2, ssl=3, context=4, hostname=7)
_LAYOUTS = {
    (3, 11): _PLAIN,
    (3, 12): _PLAIN,
    (3, 13): _PLAIN._replace(psk=(12, 13)),
    (3, 14): _PLAIN._replace(psk=(12, 13)),
}

_PURE = next(c for c in ssl.SSLContext.__mro__ if _ssl._SSLContext in c.__bases__)
"""``ssl.SSLContext``, unless another package has put a subclass in its place"""
_SOCKET: type = _ssl._SSLSocket  # type: ignore[attr-defined]
_RAW: dict[str, Any] = dict(vars(_ssl._SSLContext))
_CALLBACKS = tuple(
    (name, _RAW[name].__get__) for name in ("sni_callback", "_msg_callback", "keylog_filename")
)
_WRAPPING = tuple((name, getattr(_PURE, name)) for name in ("wrap_bio", "_wrap_bio"))
_VERIFY = {ssl.CERT_NONE: 0, ssl.CERT_OPTIONAL: 1, ssl.CERT_REQUIRED: 3}  # as OpenSSL's two bits


def _attribute(context: ssl.SSLContext, name: str) -> Any:
    """The attribute as ``_ssl`` has it."""
    return _RAW[name].__get__(context)


# --- contexts ------------------------------------------------------------------------------------

_told: dict[int, weakref.ref[ssl.SSLContext]] = {}  # the contexts that a record was made for
_known: dict[int, weakref.ref[ssl.SSLContext]] = {}  # and those whose first SSL was as it should be


def why_not(context: ssl.SSLContext) -> str | None:
    """Why the core cannot have the SSL objects of that context; None: it can."""
    reason = _why_not_here() or _why_not_this_class(context) or _why_not_as_set(context)
    if reason is not None:
        _tell(context, reason)
    return reason


def _tell(context: ssl.SSLContext, reason: str) -> None:
    if id(context) in _told:
        return
    try:
        _remember(_told, context)
    except TypeError:  # nothing of ssl's: it will fail anyway
        return
    logger.debug("%s is used through memory buffers: %s", repr(context), reason)


def _remember(where: dict[int, weakref.ref[ssl.SSLContext]], context: ssl.SSLContext) -> None:
    key = id(context)
    where[key] = weakref.ref(context, lambda _: where.pop(key, None))


def _why_not_this_class(context: ssl.SSLContext) -> str | None:
    if not isinstance(context, _PURE):
        return "it is not one of ssl's"
    for name, own in _WRAPPING:
        if getattr(type(context), name) is not own or name in context.__dict__:
            return f"its {name}() is not that of ssl"
    if context.sslobject_class is not ssl.SSLObject:
        return "it makes objects of a class of its own"
    return None


def _why_not_as_set(context: ssl.SSLContext) -> str | None:
    for name, get in _CALLBACKS:
        if get(context) is not None:
            return f"{name} is set"
    psk = _layout().psk
    if psk:
        memory = words(context, psk[-1] + 1)
        if any(memory[word] for word in psk):
            return "a callback for pre-shared keys is set"
    return None


# --- this process --------------------------------------------------------------------------------


@functools.cache
def _layout() -> _Layout:
    layout = _LAYOUTS[sys.version_info[:2]]
    return layout if getattr(ssl, "HAS_PSK", False) else layout._replace(psk=())


@functools.cache
def _why_not_here() -> str | None:
    """Why not in this process, whatever the context."""
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in _LAYOUTS:
        return "the inside of this interpreter's ssl is not known"
    if object.__basicsize__ != 2 * struct.calcsize("P"):
        return "this build of the interpreter has larger objects"
    path = getattr(_ssl, "__file__", None)
    code = tls_load(path and os.fsencode(path), ssl.OPENSSL_VERSION_NUMBER)
    if code != 0:
        return f"the functions of {ssl.OPENSSL_VERSION} cannot be had ({os.strerror(-code)})"
    if not _trial():
        return "the inside of this interpreter's ssl is not as expected"
    return None


def _trial() -> bool:
    """Whether objects lie in memory as the layout says: two are made for that."""
    try:
        layout = _layout()
        client, server = _PURE(ssl.PROTOCOL_TLS_CLIENT), _PURE(ssl.PROTOCOL_TLS_SERVER)
        made = client.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="anypoll.test")
        inner = made._sslobj
        if words(inner, layout.hostname + 1)[layout.hostname] != id(inner.server_hostname):
            return False
        if layout.psk:
            client.set_psk_client_callback(_key)
            server.set_psk_server_callback(_key)
            for context, word in zip((client, server), layout.psk, strict=True):
                if words(context, word + 1)[word] != id(_key):
                    return False
        return _pointer(made) != 0
    except (AttributeError, ValueError):  # a name, or a word, is missing
        return False


def _key(*_: object) -> bytes:
    """A callback that is set, never called, and looked for in memory."""
    return b""


# --- SSL objects ---------------------------------------------------------------------------------


def ssl_pointer(ssl_object: ssl.SSLObject) -> int:
    """The address of the ``SSL`` behind an object of a context that the core can have; 0: it is not
    where it should be.
    """
    pointer = _pointer(ssl_object)
    if not pointer:
        _tell(ssl_object.context, "an object of it is not as expected")
    return pointer


def _pointer(ssl_object: ssl.SSLObject) -> int:
    layout = _layout()
    inner, context = ssl_object._sslobj, ssl_object.context  # type: ignore[attr-defined]
    if type(inner) is not _SOCKET:
        return 0
    memory = words(inner, layout.context + 1)
    if memory[layout.socket] != 0 or memory[layout.context] != id(context):
        return 0
    pointer = memory[layout.ssl]
    if id(context) in _known:
        return pointer
    ctx = words(context, layout.ctx + 1)[layout.ctx]
    options, verify = _attribute(context, "options"), _attribute(context, "verify_mode")
    if not (pointer and ctx and tls_check(pointer, ctx, options, _VERIFY[verify])):
        return 0
    _remember(_known, context)
    return pointer


# --- errors --------------------------------------------------------------------------------------

_LIB_SSL, _LIB_SYSTEM = 20, 2
_CERTIFICATE_VERIFY_FAILED = _LIB_SSL, 134
_UNEXPECTED_EOF = _LIB_SSL, 294
_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH = 62, 64  # X509_V_ERR_*
_EOF_TEXT = "EOF occurred in violation of protocol"


def ssl_error(
    kind: int, code: int, reason: str | None, verify: int, verify_text: str, hostname: str | None
) -> ssl.SSLError:
    """The exception that ``ssl`` would have raised, without the line of its source.

    :param kind: of ``SSL_get_error()``
    :param code: of ``ERR_peek_last_error()``, 0 for none
    :param reason: what OpenSSL says about the code, if anything
    :param verify: of ``SSL_get_verify_result()``
    :param verify_text: what OpenSSL says about that
    """
    where = _unpack(code)
    cls, number, text = _classify(kind, where)
    text = text or (reason if where else None) or "unknown error"
    library, name = _names(where)
    verify_message = None
    if cls is ssl.SSLCertVerificationError:
        verify_message = _verify_message(verify, verify_text, hostname)
    if library and name:
        text = f"[{library}: {name}] {text}" + (f": {verify_message}" if verify_message else "")
    elif library:
        text = f"[{library}] {text}"
    error = cls(number, text)
    error.library, error.reason = library, name  # type: ignore[assignment]
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_code, error.verify_message = verify, verify_message or ""
    return error


def _classify(
    kind: int, where: tuple[int, int] | None
) -> tuple[type[ssl.SSLError], int, str | None]:
    """The class, its number, and the text, if that is not OpenSSL's."""
    cls = ssl.SSLCertVerificationError if where == _CERTIFICATE_VERIFY_FAILED else ssl.SSLError
    if kind == ssl.SSL_ERROR_SSL:
        if where == _UNEXPECTED_EOF:
            return ssl.SSLEOFError, ssl.SSL_ERROR_EOF, _EOF_TEXT
        return cls, kind, None if where else "A failure in the SSL library occurred"
    if kind == ssl.SSL_ERROR_SYSCALL:
        # the core's own input has no errors of the system's: it has ended
        return (cls, kind, None) if where else (ssl.SSLEOFError, ssl.SSL_ERROR_EOF, _EOF_TEXT)
    if kind == ssl.SSL_ERROR_ZERO_RETURN:
        return ssl.SSLZeroReturnError, kind, "TLS/SSL connection has been closed (EOF)"
    return ssl.SSLError, ssl.SSL_ERROR_INVALID_ERROR_CODE, "Invalid error code"


def _verify_message(verify: int, verify_text: str, hostname: str | None) -> str:
    if verify == _HOSTNAME_MISMATCH:
        return f"Hostname mismatch, certificate is not valid for '{hostname}'."
    if verify == _ADDRESS_MISMATCH:
        return f"IP address mismatch, certificate is not valid for '{hostname}'."
    return verify_text


def _unpack(code: int) -> tuple[int, int] | None:
    """The library and the reason that OpenSSL has packed into an error code."""
    if not code:
        return None
    if ssl.OPENSSL_VERSION_INFO < (3,):
        return code >> 24 & 0xFF, code & 0xFFF
    if code & 0x80000000:
        return _LIB_SYSTEM, code & 0x7FFFFFFF
    return code >> 23 & 0xFF, code & 0x7FFFFF


def _names(where: tuple[int, int] | None) -> tuple[str | None, str | None]:
    """Names of the library and the reason, as far as ``_ssl`` has any."""
    libraries, reasons = _tables()
    return (libraries.get(where[0]), reasons.get(where)) if where else (None, None)


@functools.cache
def _tables() -> tuple[dict[int, str], dict[tuple[int, int], str]]:
    """``_ssl``'s names by code. Its module has no attributes for them since 3.12, but refers to
    them, as the garbage collector can tell.
    """
    found: list[dict[Any, str]] = [{}, {}]
    for table in gc.get_referents(_ssl):
        if type(table) is dict:
            for place, key in enumerate((_LIB_SSL, _CERTIFICATE_VERIFY_FAILED)):
                if key in table:
                    found[place] = table
    return found[0], found[1]

"""What callers give for bytes, checked: buffers, delimiters, encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def _memory(data: Buffer, name: str) -> memoryview:
    try:
        return memoryview(data)
    except TypeError:
        raise TypeError(f"{name} must be bytes-like, not {type(data).__name__}") from None


def as_bytes(data: Buffer, name: str = "data") -> bytes:
    """``data`` itself if it is ``bytes``, else a copy.

    :raises TypeError: if it is not bytes-like
    """
    if type(data) is bytes:
        return data
    # not bytes(data) of just anything: that would take a number for a size
    return data.tobytes() if type(data) is memoryview else bytes(_memory(data, name))


def flat_view(data: Buffer, name: str) -> memoryview:
    """A view of the bytes of ``data``, as writable as that is.

    :raises TypeError: if it is not bytes-like
    :raises ValueError: if its bytes do not lie side by side
    """
    view = _memory(data, name)
    if not view.c_contiguous:
        raise ValueError(f"the bytes of {name} must lie side by side to be referenced")
    return view.cast("B")


def as_view(data: Buffer, name: str = "data") -> memoryview:
    """A read-only view of the bytes of ``data``.

    :raises TypeError: if it is not bytes-like
    :raises ValueError: if its bytes do not lie side by side
    """
    return flat_view(data, name).toreadonly()


def room_in(buffer: Buffer) -> memoryview:
    """A view of the bytes of a buffer that ``readinto()`` is to fill.

    :raises TypeError: if it is not bytes-like, or not writable
    :raises ValueError: if its bytes do not lie side by side
    """
    into = flat_view(buffer, "buffer")
    if into.readonly:
        raise TypeError("readinto() needs a writable buffer")
    return into


def text_encoding(encoding: str) -> str:
    """``encoding``, if there is such a one.

    :raises TypeError: if it is not a ``str``
    :raises ValueError: if it names no text encoding
    """
    if not isinstance(encoding, str):
        raise TypeError(f"encoding must be a str, not {type(encoding).__name__}")
    try:
        b"a".decode(encoding)  # some codecs are not for text, and only this tells
    except UnicodeDecodeError:
        return encoding  # one with several bytes to a character
    except (LookupError, ValueError):
        raise ValueError(
            f"encoding must be the name of a text encoding, not {encoding!r}"
        ) from None
    return encoding


def delimiter_bytes(delimiter: object) -> bytes:
    """``delimiter`` as ``bytes``.

    :raises TypeError, ValueError: if it is not bytes-like, or empty
    """
    if not isinstance(delimiter, (bytes, bytearray, memoryview)):
        raise TypeError(f"delimiter must be bytes, not {type(delimiter).__name__}")
    if not len(delimiter):
        raise ValueError("delimiter must not be empty")
    return bytes(delimiter)

"""Nocopy reading and writing: views into received blocks, and output that is sent in one call.

A :class:`Reader` hands out read-only memoryviews of exactly the bytes that were asked for. A view
stays valid and unchanged for as long as it is held; the block it lies in is recycled when the last
view of it is gone. A small view keeps its whole block alive: copy with ``bytes()`` what is to be
kept for long.

A :class:`Writer` gathers output; ``flush()`` sends it in as few system calls as it takes.

Every connection has both. A :class:`LinkBuffer` is both by itself, without any I/O. And both can be
put on any AnyIO byte stream (a ``TLSStream``, say) with :func:`wrap_reader` and
:func:`wrap_writer`, or be turned into one with :func:`as_receive_stream` and
:func:`as_send_stream`.
"""

from __future__ import annotations

from ._buffers.adapters import (
    as_raw_io,
    as_receive_stream,
    as_send_stream,
)
from ._buffers.linkbuffer import LinkBuffer
from ._buffers.reader import Reader
from ._buffers.writer import Writer
from ._connection.wrapped import wrap_reader, wrap_writer

__all__ = (
    "LinkBuffer",
    "Reader",
    "Writer",
    "as_raw_io",
    "as_receive_stream",
    "as_send_stream",
    "wrap_reader",
    "wrap_writer",
)

for _name in __all__:
    globals()[_name].__module__ = "anypoll.nocopy"
del _name

"""The compiled core: what cffi makes of ``csrc/anypoll.h``, and the native types of the hot path.

Both are in one shared object, because they share the core's state: ``_core`` is cffi's module,
which only ``_epoll`` uses, and ``_types`` is a second module in the same file (PEP 489, "Multiple
modules in one library"). Whoever needs a native type imports it from here. Imports nothing of
anypoll; everything else may import it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

if sys.implementation.name != "cpython":
    raise ImportError(f"anypoll needs CPython; this is {sys.implementation.name}")

from . import _core

_NAME = f"{__name__}._types"
_spec = spec_from_file_location(_NAME, loader=ExtensionFileLoader(_NAME, _core.__file__))
assert _spec is not None
_types = module_from_spec(_spec)
_spec.loader.exec_module(_types)

Block = _types.Block
Core = _types.Core
Drive = _types.Drive
EMPTY = _types.EMPTY
Hub = _types.Hub
Operation = _types.Operation
Reader = _types.Reader
Requests = _types.Requests
Stream = _types.Stream
Workers = _types.Workers
Writer = _types.Writer
gather = _types.gather
register = _types.register

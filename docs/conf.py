"""Sphinx: what is in docs/ becomes build/docs; `make docs` calls it.

Markdown by MyST; docstrings are reStructuredText, so the reference pages are that too. Nothing is
fetched: AnyIO's names become links by a rule, those of other libraries no links at all.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import anyio
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

import anypoll

project = "anypoll"
author = "anypoll contributors"
project_copyright = author
release = importlib.metadata.version("anypoll")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"anypoll {release}"
html_show_sphinx = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(trio|httpcore2?|collections|typing|typing_extensions|socket|ssl|os|io)(\..*)?"),
    (r"py:class", r"Buffer|HasFileno|IPv[46]Address|PathLike"),  # in annotations, unqualified
    (r"py:class", r"Address|anypoll\.mux\._HasWriter"),  # private, in annotations
]

ANYIO = "https://anyio.readthedocs.io/en/stable/api.html#anyio."


def anyio_reference(
    _app: Sphinx, _env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.reference | None:
    """The link for a name that is no other's: `EndOfStream`, `anyio.abc.SocketStream`."""
    name = node["reftarget"].removeprefix("anyio.")
    found: Any = anyio
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None or node["refdomain"] != "py":
        return None
    return nodes.reference("", "", text, internal=False, refuri=ANYIO + name)


def is_public(base: type) -> bool:
    module = sys.modules[base.__module__]
    return base.__name__ in getattr(module, "__all__", [base.__name__])


def show_public_bases(
    _app: Sphinx, _name: str, _object: Any, _options: Any, bases: list[type]
) -> None:
    """Where a base is a private class, what that one is derived from."""
    shown: list[type] = []
    for base in bases:
        hidden = isinstance(base, type) and (
            base.__module__.startswith("anypoll._") or not is_public(base)
        )
        shown += [b for b in base.__bases__ if b is not object] if hidden else [base]
    bases[:] = dict.fromkeys(shown)


#: What users get and never make.
NOT_CALLED = {
    *("anypoll.Server", "anypoll.ServerStatistics", "anypoll.SocketListener"),
    *("anypoll.Connection", "anypoll.UNIXConnection", "anypoll.ConnectionStatistics"),
    *("anypoll.Statistics", "anypoll.PollerStatistics", "anypoll.AnypollAttribute"),
    *(
        "anypoll.MemoryStatistics",
        "anypoll.TLSConnection",
        "anypoll.nocopy.Reader",
        "anypoll.nocopy.Writer",
    ),
}


def hide_constructors(
    _app: Sphinx, what: str, name: str, _object: Any, _options: Any, _signature: Any, _returns: Any
) -> tuple[str, None] | None:
    return ("", None) if what == "class" and name in NOT_CALLED else None


def read_private_modules() -> None:
    """Classes say that they are of their public module, so there Sphinx looks for the order of
    their members, and for what is written below their fields.
    """
    for home in ("anypoll", "anypoll.nocopy"):
        public = ModuleAnalyzer.for_module(home)
        public.analyze()
        package = Path(anypoll.__file__).parent
        for path in [package / "_epoll.py", *package.glob("_*/*.py")]:
            private = ModuleAnalyzer.for_file(str(path), path.stem)
            private.analyze()
            public.attr_docs.update(private.attr_docs)
            public.tagorder.update(private.tagorder)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", anyio_reference)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("autodoc-process-signature", hide_constructors)
    read_private_modules()

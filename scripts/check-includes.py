"""An include-layer linter: csrc/ files include each other only as docs/internals/README.md allows.

usage: check-includes.py

A file, x.c and x.h together, stands on one line of the table there, and includes only files on
lines below. So there is no circle. Besides:

  - x.c includes x.h first. A file without a header offers only what anypoll.h declares, and
    includes that first;
  - who names a function includes the header of the file that defines it (but for the ground,
    which everybody has), so that no call goes around the table by way of anypoll.h.

The native types, csrc/python/, have a table of their own there, without an order. They include
native.h, which includes types.h, which includes anypoll.h; nothing else of the core, and the core
nothing of theirs.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = "docs/internals/README.md"
CORE, NATIVE = "## The C files\n", "## The native types\n"  # its headings
PUBLIC = "anypoll.h"  # declares what Python may call, whichever file defines it
GROUND = "anypoll", "common"


def levels(heading: str) -> dict[str, int]:
    """The files of the table below that heading, those on the lowest line having 0."""
    section = (ROOT / README).read_text().partition(heading)[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {file: i for i, line in enumerate(lines[::-1]) for file in re.findall(r"\w+", line)}


def read(folder: str) -> dict[str, str]:
    """The texts of the C files in that folder, without comments."""
    return {
        path.name: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for path in sorted((ROOT / folder).glob("*.[ch]"))
    }


def unlisted(folder: str, sources: dict[str, str], level: dict[str, int]) -> list[str]:
    """What the table lacks, and what it has too much."""
    files = {name[:-2] for name in sources}
    return [f"{file}: in one of {folder}/ and {README} only" for file in sorted(files ^ set(level))]


def check_native() -> list[str]:
    """What is wrong with the native types."""
    sources = read("csrc/python")
    wrong = unlisted("csrc/python", sources, levels(NATIVE))
    for name, text in sources.items():
        right = {"types.h": "anypoll.h", "native.h": "types.h"}.get(name, "native.h")
        included = re.findall(r'^#include "(.*)"', text, re.MULTILINE)
        if included != [right]:
            wrong.append(f"python/{name} includes {included}, and not {right} alone")
    return wrong


def main() -> None:
    level = levels(CORE)
    sources = read("csrc")
    wrong = unlisted("csrc", sources, level) + check_native()

    home = {}  # of each function, the file that defines it, or declares it in its own header
    for name, text in sources.items():
        if name != PUBLIC:
            ending = r"\)\n\{" if name.endswith(".c") else r"\)[;\n]"
            head = rf"^(?!typedef)\w.*?\b(ap_\w+)\([^;{{}}]*?{ending}"
            home |= dict.fromkeys(re.findall(head, text, re.MULTILINE), name[:-2])

    for name, text in sources.items():
        if re.search(r"^#include .*(Python\.h|python/|native\.h)", text, re.MULTILINE):
            wrong.append(f"{name} belongs to the core, and includes something of Python's")
        file = name[:-2]
        own = f"{file}.h" if f"{file}.h" in sources else PUBLIC
        included = re.findall(r'^#include "(.*)\.h"', text, re.MULTILINE)
        if name.endswith(".c") and included[:1] != [own[:-2]]:
            wrong.append(f"{name} does not include {own} first")
        wrong += [
            f"{name} includes {other}.h, which does not stand below it"
            for other in included
            if other != own[:-2] and level.get(other, 0) >= level.get(file, 0)
        ]
        wrong += [
            f"{name} uses {function} without {home[function]}.h"
            for function in sorted(set(re.findall(r"\bap_\w+", text)) & set(home))
            if name != PUBLIC and home[function] not in (file, *GROUND, *included)
        ]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

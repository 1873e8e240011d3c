"""An include-layer linter: csrc/ files include each other only as docs/internals/README.md allows.

usage: check-includes.py

A file, x.c and x.h together, stands on one line of the table there, and includes only files on
lines below. So there is no circle. Besides:

  - x.c includes x.h first. A file without a header offers only what anypoll.h declares, and
    includes that first;
  - who names a function includes the header of the file that defines it (but for the ground,
    which everybody has), so that no call goes around the table by way of anypoll.h.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = "docs/internals/README.md", "## The C files\n"
PUBLIC = "anypoll.h"  # declares what Python may call, whichever file defines it
GROUND = "anypoll", "common"


def levels() -> dict[str, int]:
    """The files of the table, those on the lowest line having 0."""
    name, heading = TABLE
    section = (ROOT / name).read_text().partition(heading)[2].partition("\n## ")[0]
    lines = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {file: i for i, line in enumerate(lines[::-1]) for file in re.findall(r"\w+", line)}


def main() -> None:
    level = levels()
    sources = {
        path.name: re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for path in sorted((ROOT / "csrc").glob("*.[ch]"))
    }
    files = {name[:-2] for name in sources}
    wrong = [f"{file}: in one of csrc/ and {TABLE[0]} only" for file in sorted(files ^ set(level))]

    home = {}  # of each function, the file that defines it, or declares it in its own header
    for name, text in sources.items():
        if name != PUBLIC:
            ending = r"\)\n\{" if name.endswith(".c") else r"\)[;\n]"
            head = rf"^(?!typedef)\w.*?\b(ap_\w+)\([^;{{}}]*?{ending}"
            home |= dict.fromkeys(re.findall(head, text, re.MULTILINE), name[:-2])

    for name, text in sources.items():
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

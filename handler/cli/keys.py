"""Finds the tokens of the server that runs on this machine."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

KEY_FILE = "key_file.json"


def find_key(kind: str) -> str | None:
    """Returns the newest token of a kind, or None if no key file has one.

    Looks into the first of these files that exists and can be read: $VIVIT_KEY_FILE, ./key_file.json,
    ./.server/key_file.json and, newest first, those in the state directory of `vivit serve`.

    Args:
        kind: `inference`, `management` or `API`, as TorchServe names them.
    """
    for path in _key_files():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            key = json.loads(path.read_text())[kind]["key"]
            if isinstance(key, str):
                return key
    return None


def state_directory() -> Path:
    """The directory below which `vivit serve` keeps the state of its servers, one directory per server."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "vivit"


def _key_files() -> Iterator[Path]:
    if named := os.environ.get("VIVIT_KEY_FILE"):
        yield Path(named)
    yield Path(KEY_FILE)
    yield Path(".server", KEY_FILE)
    yield from sorted(state_directory().glob(f"*/{KEY_FILE}"), key=_modified_s, reverse=True)


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

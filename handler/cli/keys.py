"""Finds the key (token) of a running server in the key files on this machine."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

KEY_FILE = "key_file.json"  # TorchServe writes its tokens to it, in its working directory


def find_key(kind: str, *, is_local: bool = True) -> str | None:
    """Returns the token of a kind from the first key file that has one, or None if there is no such file.

    $VIVIT_KEY_FILE comes first, then the newest of ./key_file.json, ./.server/key_file.json and those in the state
    directory of `vivit serve`: the server that started last is most likely the one that runs.

    Args:
        kind: `inference`, `management` or `API`, as TorchServe names them.
        is_local: whether the server runs on this machine. For others only $VIVIT_KEY_FILE counts, because they must
            not receive this machine's tokens.
    """
    for path in _key_files(is_local=is_local):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            key = json.loads(path.read_text())[kind]["key"]
            if isinstance(key, str):
                return key
    return None


def state_directory() -> Path:
    """The directory below which `vivit serve` keeps the state of its servers, one directory per server."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "vivit"


def _key_files(*, is_local: bool) -> Iterator[Path]:
    if named := os.environ.get("VIVIT_KEY_FILE"):
        yield Path(named)
    if not is_local:
        return
    local = [Path(KEY_FILE), Path(".server", KEY_FILE), *state_directory().glob(f"*/{KEY_FILE}")]
    yield from sorted(local, key=_modified_s, reverse=True)


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

"""What every command does: progress on standard error, and messages instead of tracebacks."""

import logging
import sys
from collections.abc import Callable

from handler.checkpoints.hub import CheckpointError

INTERRUPTED = 130  # exit status after Ctrl-C, as shells use it


class CommandError(Exception):
    """A command cannot continue. The message states why and what to do."""


class BuildError(CommandError):
    """No archive can be built: its name, configuration, labels or checkpoint is invalid."""


def run_command(name: str, action: Callable[[], int]) -> int:
    """Runs a command and prints its progress and its errors to standard error.

    Args:
        name: e.g. `build`; the prefix of error messages.
        action: returns the exit status.

    Returns:
        The exit status: that of `action`, or 1 after an error.
    """
    progress = logging.getLogger("handler.cli")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    progress.addHandler(handler)
    progress.setLevel(logging.INFO)
    try:
        return action()
    except (CommandError, CheckpointError, ValueError, OSError) as error:
        print(f"vivit {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        progress.removeHandler(handler)

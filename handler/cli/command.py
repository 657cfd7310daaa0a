"""What every command does: progress on standard error, and messages instead of tracebacks."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from handler.checkpoints.hub import CheckpointError
from handler.views import SAMPLINGS, parse_grid

if TYPE_CHECKING:
    import torch

VIEW_ARGUMENTS = ("views", "stride_frames", "sampling")

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


def add_view_arguments(parser: argparse.ArgumentParser, *, default: str) -> argparse._ArgumentGroup:
    """Adds VIEW_ARGUMENTS, which are arguments of `ViewDefaults.resolve`, to a parser, and returns their group."""
    views = parser.add_argument_group("views", f"which frames are classified (default: {default})")
    views.add_argument("--views", type=_grid, metavar="TxC", help="clips in time x crops of each, such as 4x3")
    views.add_argument("--sampling", choices=SAMPLINGS, help="how the frames of a clip are chosen")
    views.add_argument(
        "--stride-frames", type=integer(minimum=1), metavar="N", help="distance between frames, for --sampling dense"
    )
    return views


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values of the arguments that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def integer(*, minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}, got {text!r}")
        return value

    return parse


def _grid(text: str) -> str:
    """An argparse type: clips x crops."""
    try:
        parse_grid("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def choose_device(name: str | None) -> torch.device:
    """Returns the device to compute on.

    Args:
        name: cpu, cuda, cuda:1, ... None: a GPU if torch finds one, otherwise the CPU. Each of the processes that
            torchrun started gets a GPU of its own unless `name` has a number.

    Raises:
        CommandError: torch cannot use the device.
    """
    import torch  # not every command needs it

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if chosen == "cuda" else chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"torch cannot use the device {chosen!r}: {str(error).splitlines()[0]}") from error
    return device

"""The command `vivit`: prints the help and the version, and runs the commands.

The module of a command is imported when it runs. So neither `vivit --help` nor the client of a server loads torch.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from handler import __version__

# Each is a module in handler/cli with `main(argv) -> exit status`.
COMMANDS = {
    "build": "build an archive (.mar) from a checkpoint",
    "serve": "serve a checkpoint, an archive or the demo model with TorchServe",
    "classify": "classify videos on a running server, or without one",
    "demo": "serve the demo model and classify the bundled clips",
    "finetune": "train a checkpoint on your own videos",
    "evaluate": "measure the accuracy of a checkpoint on labeled videos",
    "check": "load a checkpoint, run it once, and estimate memory and speed",
    "convert": "convert a checkpoint of the original code (scenic, Flax)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit ARGV`.

    Args:
        argv: without the program's name; sys.argv by default.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        status: int = importlib.import_module(f"handler.cli.{arguments[0]}").main(arguments[1:])
        return status
    parser = argparse.ArgumentParser(
        prog="vivit",
        description="Serve ViViT video classifiers with TorchServe.",
        epilog="commands:\n"
        + "".join(f"  {name:<10}{text}\n" for name, text in COMMANDS.items())
        + "\n`vivit COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS), help="see below")
    parser.parse_args(arguments or ["--help"])  # exits
    return 2


if __name__ == "__main__":
    sys.exit(main())

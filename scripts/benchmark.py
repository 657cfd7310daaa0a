#!/usr/bin/env python3
"""Measures this project beside its peers, side by side in one run.

    scripts/benchmark.py decode                      the wanted frames out of a video file
    scripts/benchmark.py preprocess                  frames to the model's size
    scripts/benchmark.py model                       the forward pass
    scripts/benchmark.py sdpa                        the two tables of the ViViT documentation
    scripts/benchmark.py serve --clients 1 8 32      TorchServe with the archive, under load

Contestants take turns (A B C A B C ...), so that whatever else the machine does hits all of them. Peers are
optional: `pip install -e .[benchmark]` brings them, and one that is missing is named at the end. `--quick`
tries a sub-command in seconds on tiny settings; its numbers mean nothing.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import decode, model, peers, preprocess, sdpa, serve
from benchmarks.report import Report
from handler.checkpoints.hub import CheckpointError
from handler.cli.build import BuildError
from handler.cli.server import ServerError, exit_on_sigterm_or_sighup

# Each has HELP, QUICK (defaults under --quick), add_arguments(parser), run(arguments, report), plot(report).
COMMANDS = {"decode": decode, "preprocess": preprocess, "model": model, "sdpa": sdpa, "serve": serve}


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    exit_on_sigterm_or_sighup()
    if arguments.command == "decode" and peers.can_lend_ffmpeg_to_torchcodec():
        return peers.run_again_with_ffmpeg()
    try:
        run(arguments)
    except (BuildError, CheckpointError, ServerError, OSError, ValueError, RuntimeError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--quick", action="store_true", help="tiny settings, to see that it works")
        command.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
        command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture of it")
        module.add_arguments(command)
        if "--quick" in arguments:
            command.set_defaults(**module.QUICK)
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> Report:
    """Runs one sub-command, prints what it measured and writes what was asked for.

    Raises ValueError for settings that make no sense, and whatever stops all contestants.
    """
    command = COMMANDS[arguments.command]
    if arguments.plot:
        try:  # now, and not after an hour of measuring
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ValueError("--plot needs matplotlib: pip install -e .[benchmark]") from error
    settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "json", "plot")}
    report = Report(arguments.command, settings=settings)
    command.run(arguments, report)
    report.finish()
    if arguments.json:
        report.write_json(arguments.json)
    if arguments.plot:
        command.plot(report).savefig(arguments.plot, dpi=150)
    return report


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compares this project with other libraries, all measured in the same run.

    scripts/benchmark.py decode                      decode selected frames of a video file
    scripts/benchmark.py large                       decode frames of a one-hour file
    scripts/benchmark.py sampling                    ways to choose the frames
    scripts/benchmark.py preprocess                  resize and crop frames to the model's input size
    scripts/benchmark.py model                       the forward pass
    scripts/benchmark.py sdpa                        the two tables of the ViViT documentation
    scripts/benchmark.py serve --clients 1 8 32      TorchServe under load
    scripts/benchmark.py profile                     where the time of a served request goes
    scripts/benchmark.py start                       until a worker is ready, and until the first answer
    scripts/benchmark.py explain                     cost and faithfulness of explanations
    scripts/benchmark.py regularization              the accuracy that regularization in training brings
    scripts/benchmark.py gpu                         alternatives that a GPU offers
    scripts/benchmark.py all --budget-s 480          everything about the model and serving, in limited time

All implementations are timed alternately (A B C A B C ...), so that other activity on the machine affects all of them
equally. The other libraries are optional: `pip install -e '.[benchmark]'` installs them, and the run ends with a note
on each one that is missing. `--quick` runs a sub-command in seconds with tiny settings; its numbers are meaningless.
"""

import _checkout  # noqa: F401, I001  (first: may restart the script with .venv/bin/python)

import argparse
import sys
from pathlib import Path

from benchmarks import all as everything
from benchmarks import (
    decode,
    explain,
    gpu,
    large,
    libraries,
    model,
    preprocess,
    profile,
    regularization,
    sampling,
    sdpa,
    serve,
    start,
)
from benchmarks.report import Report
from handler.checkpoints.hub import CheckpointError
from handler.cli.build import BuildError
from handler.cli.server import ServerError, exit_on_sigterm_or_sighup

# Each module has HELP, QUICK (defaults under --quick), add_arguments(parser), run(arguments, report), plot(report).
COMMANDS = {
    "decode": decode,
    "large": large,
    "sampling": sampling,
    "preprocess": preprocess,
    "model": model,
    "sdpa": sdpa,
    "serve": serve,
    "profile": profile,
    "start": start,
    "explain": explain,
    "regularization": regularization,
    "gpu": gpu,
    "all": everything,
}


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    exit_on_sigterm_or_sighup()
    if arguments.command == "decode" and libraries.can_share_ffmpeg_with_torchcodec():
        return libraries.rerun_with_shared_ffmpeg()
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
        command.add_argument("--quick", action="store_true", help="use tiny settings, to check that the command works")
        json_metavar, plot_metavar = ("DIR", "DIR") if module is everything else ("FILE", "FILE.png")
        command.add_argument("--json", type=Path, metavar=json_metavar, help="write all measurements here")
        command.add_argument("--plot", type=Path, metavar=plot_metavar, help="write a chart here")
        module.add_arguments(command)
        if "--quick" in arguments:
            command.set_defaults(**module.QUICK)
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> Report:
    """Runs one sub-command, prints its tables and writes the requested files.

    Raises:
        ValueError: The settings are invalid.
        RuntimeError: Nothing could be measured.
    """
    command = COMMANDS[arguments.command]
    if arguments.plot:
        try:  # fail now rather than after an hour of measuring
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ValueError("--plot needs matplotlib: pip install -e '.[benchmark]'") from error
    settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "json", "plot")}
    json_path, plot_path = arguments.json, arguments.plot
    if command is everything:  # these are directories
        json_path, plot_path = (make_file(json_path, "all.json"), make_file(plot_path, "all.png"))
    report = Report(arguments.command, settings=settings, json_path=json_path)
    command.run(arguments, report)
    report.finish()
    if plot_path:
        command.plot(report).savefig(plot_path, dpi=150)
    return report


def make_file(folder: Path | None, name: str) -> Path | None:
    """Makes the folder; returns the path of a file in it."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


if __name__ == "__main__":
    sys.exit(main())

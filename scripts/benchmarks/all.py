"""Run all benchmarks of the model and of serving within a time budget, the most important first.

    scripts/benchmark.py all --device cuda --budget-s 480 --json DIR --plot DIR

Each part is a sub-command in a process of its own, which may take up to three times its share of the remaining time. A
part that fails or takes too long does not affect the others: its last lines are in the summary, and its JSON file has
the tables that it had completed. With `--device cuda` the summary ends with the targets for ViViT-B/16x2 on an H100.

--json and --plot name directories, for a file per part and one of the summary, `all.json` and `all.png`.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints, gpu, model
from benchmarks.report import Report
from benchmarks.timing import OURS, Spread
from handler.cli.command import CommandError
from handler.cli.java import find_java_home

HELP = "all benchmarks that have figures for a GPU, within a time budget"
QUICK = {"size": "tiny", "device": "cpu", "budget_s": 300.0}
TABLE, FAILURES, TARGETS_TABLE = "parts", "failures", "targets"
DONE = "done"
COLUMNS = (
    ("part", "{part}"),
    ("result", "{result}"),
    ("s", "{seconds:.0f}"),
    ("limit s", "{limit_s:.0f}"),
)
FAILURE_COLUMNS = (("part", "{part}"), ("last lines of its output", "{line}"))
TARGET_COLUMNS = (("target", "{target}"), ("at least", "{goal:g}"), ("reached", "{reached:.3g}"), ("met", "{met}"))
LAST_LINES = 8
MAX_SHARES = 3  # of the remaining time that a part may take
MIN_PART_S = 5  # a shorter time is not worth starting a process
TERMINATION_S = 15  # to stop TorchServe and write what has been measured
SCRIPT = Path(__file__).resolve().parents[1] / "benchmark.py"


@dataclass(frozen=True)
class Part:
    """A sub-command to run.

    Attributes:
        name: Its name in --only, --skip and file names.
        command: The sub-command with the arguments for all devices.
        seconds: Approximate duration on an H100, which its share of the budget is proportional to.
        on_cuda: Further arguments on a GPU.
        serves: Whether it needs TorchServe and Java.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    on_cuda: tuple[str, ...] = ()
    serves: bool = False


def gpu_part(name: str, seconds: float, *, serves: bool = False) -> Part:
    return Part(name, ("gpu", "--experiments", name), seconds, serves=serves)


# The most important first.
PARTS = (
    Part(
        "model",
        ("model",),
        100,  # the first one also reads libraries from disk
        on_cuda=("--dtypes", "float16", "--batches", "16", "1", "8", "--repetitions", "10"),
    ),
    gpu_part(gpu.ATTENTION, 45),
    gpu_part(gpu.MICRO_BATCHES, 40),
    gpu_part(gpu.COPIES, 35),
    gpu_part(gpu.SERVING, 150, serves=True),
    Part(
        "sdpa",
        ("sdpa",),
        60,
        on_cuda=("--steps", "10", "--training-steps", "20", "--repetitions", "2"),
    ),
    gpu_part(gpu.LAUNCHES, 100),
    gpu_part(gpu.RESIZE, 40),
    gpu_part(gpu.FP8, 80),
    Part(
        "accuracy",
        ("model", "--size", "demo", "--agreement-clips", "108"),
        60,
        on_cuda=("--dtypes", "float16", "--batches", "16", "--repetitions", "5"),
    ),
    Part(
        "dtypes", ("model",), 40, on_cuda=("--dtypes", "bfloat16", "float32", "--batches", "16", "--repetitions", "5")
    ),
    Part(
        "serve",
        ("serve",),
        120,
        on_cuda=("--clients", "32", "--seconds", "8", "--repetitions", "1"),
        serves=True,
    ),
)


@dataclass(frozen=True)
class Target:
    """A value to reach.

    Attributes:
        text: What is measured.
        goal: The smallest value that meets it.
        part: Name of the part that measures it.
        table: Name of its table.
        value: Key of the value in a row; the largest of all rows counts.
        where: What the row must contain.
    """

    text: str
    goal: float
    part: str
    table: str
    value: str
    where: Mapping[str, Any] = field(default_factory=dict)


BATCH_OF_16 = {"model": OURS, "dtype": "float16", "batch": 16}
TARGETS = (
    Target("model, float16, batch 16: clips/s", 350, "model", model.TABLE, "clips_per_s", BATCH_OF_16),
    Target("the same in TFLOP/s", 315, "model", model.TABLE, "tflops_per_s", BATCH_OF_16),
    Target("the same as a share of matmul", 0.4, "model", model.TABLE, "matmul_share", BATCH_OF_16),
    Target("the same, times as fast as transformers sdpa", 1.5, "model", model.TABLE, "sdpa_factor", BATCH_OF_16),
    Target("served, share of min(model, decoding)", 0.9, gpu.SERVING, gpu.SERVING, "limit_share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_arguments(parser)
    checkpoints.add_device_argument(parser)
    parser.add_argument(
        "--budget-s", type=float, default=480, metavar="S", help="time for all parts together (default: 480)"
    )
    names = [part.name for part in PARTS]
    for flag, text in (("--only", "run only these parts"), ("--skip", "leave out these parts")):
        parser.add_argument(
            flag, nargs="+", choices=names, default=[], metavar="PART", help=f"{text}: {' '.join(names)}"
        )


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Runs the parts and reports what became of them, and the targets.

    Raises:
        ValueError: There is no GPU.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    deadline_s = time.monotonic() + arguments.budget_s
    parts = [part for part in PARTS if part.name not in arguments.skip]
    parts = [part for part in parts if part.name in (arguments.only or [part.name])]
    with contextlib.ExitStack() as stack:
        folder = arguments.json
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vivit-benchmarks-")))
        videos = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vivit-videos-")))
        reasons = {part: reason_to_skip(part) for part in parts}
        outcomes = [Outcome(part.name, f"skipped: {reason}") for part, reason in reasons.items() if reason]
        possible = [part for part in parts if not reasons[part]]
        for number, part in enumerate(possible):
            limit_s = time_limit_s(possible[number:], remaining_s=deadline_s - time.monotonic())
            if limit_s < MIN_PART_S:
                outcomes.append(Outcome(part.name, "skipped: no time is left"))
                continue
            report.progress(f"part {part.name}, at most {limit_s:.0f} s")
            command = command_of(part, arguments, folder, videos)
            json_file(folder, part).unlink(missing_ok=True)  # of an earlier run
            outcomes.append(run_part(part.name, command, limit_s=limit_s, on_gpu=arguments.device == "cuda"))
        report_outcomes(outcomes, report)
        if arguments.device == "cuda":
            report.table(TARGETS_TABLE, TARGET_COLUMNS, target_rows(read_tables(folder, parts)))


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        part: Its name.
        result: DONE, or what happened instead.
        seconds: How long it ran.
        limit_s: How long it was allowed to run.
        last_lines: The end of its output.
    """

    part: str
    result: str
    seconds: float | None = None
    limit_s: float | None = None
    last_lines: tuple[str, ...] = ()


def time_limit_s(parts: Sequence[Part], *, remaining_s: float) -> float:
    """Returns the time that the first of the remaining parts may take."""
    share = parts[0].seconds / sum(part.seconds for part in parts)
    return min(remaining_s, MAX_SHARES * share * remaining_s)


def reason_to_skip(part: Part) -> str | None:
    """Returns what a part that serves lacks, or None."""
    if part.serves and importlib.util.find_spec("ts") is None:
        return "torchserve is not installed"
    if part.serves:
        try:
            find_java_home()
        except CommandError as error:
            return str(error).splitlines()[0]
    return None


def command_of(part: Part, arguments: argparse.Namespace, folder: Path, videos: Path) -> list[str]:
    """Returns the command line of a part.

    Args:
        part: The part.
        arguments: Those of this sub-command.
        folder: Where the part writes its JSON file.
        videos: Where parts that serve keep generated videos.
    """
    command = [sys.executable, str(SCRIPT), *part.command, "--json", str(json_file(folder, part))]
    if "--size" not in part.command:
        command += ["--size", arguments.size]
    if part.command[0] != "serve":
        command += ["--device", arguments.device]
    if part.serves:
        command += ["--cache", str(videos)]
    if arguments.plot:
        command += ["--plot", str(arguments.plot / f"{part.name}.png")]
    if arguments.quick:
        return [*command, "--quick"]
    return [*command, *(part.on_cuda if arguments.device == "cuda" else ())]


def json_file(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.json"


def run_part(name: str, command: Sequence[str], *, limit_s: float, on_gpu: bool) -> Outcome:
    """Runs a command, prints its output as it comes, and stops it after `limit_s`."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that it starts
    start_s = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)

    def print_lines() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip():
                lines.append(line.rstrip())

    printer = threading.Thread(target=print_lines, daemon=True)
    printer.start()
    try:
        status = process.wait(timeout=limit_s)
        result = DONE if status == 0 else f"failed: exit status {status}"
    except subprocess.TimeoutExpired:
        result = f"stopped after {limit_s:.0f} s"
    finally:
        stop(process)
    printer.join(timeout=1)
    return Outcome(name, result, time.monotonic() - start_s, limit_s, tuple(lines))


def stop(process: subprocess.Popen) -> None:
    """Stops a process, if it still runs, and the remaining processes of its group."""
    if process.poll() is None:
        process.terminate()  # only the process itself, which stops TorchServe and the processes it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TERMINATION_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report_outcomes(outcomes: Sequence[Outcome], report: Report) -> None:
    """Adds a table of the parts, and one with the last lines of those that failed."""
    rows = [
        {"part": each.part, "result": each.result, "seconds": each.seconds, "limit_s": each.limit_s}
        for each in outcomes
    ]
    report.table(TABLE, COLUMNS, rows)
    failures = [
        {"part": each.part, "line": line} for each in outcomes if each.result != DONE for line in each.last_lines
    ]
    if failures:
        report.table(FAILURES, FAILURE_COLUMNS, failures)


def read_tables(folder: Path, parts: Sequence[Part]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the tables of each part that has written some, also of one that failed later."""
    files = {part.name: json_file(folder, part) for part in parts}
    return {name: json.loads(file.read_text())["tables"] for name, file in files.items() if file.exists()}


def target_rows(tables: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Returns a row per target; `reached` is missing if it was not measured.

    Args:
        tables: Rows by table name, by part.
    """
    rows = []
    for target in TARGETS:
        row: dict[str, Any] = {"target": target.text, "goal": target.goal}
        values = [
            each[target.value]
            for each in tables.get(target.part, {}).get(target.table, [])
            if target.where.items() <= each.items() and each.get(target.value) is not None
        ]
        if values:
            row |= {"reached": max(values), "met": "yes" if max(values) >= target.goal else "no"}
        rows.append(row)
    return rows


def plot(report: Report):
    from benchmarks.plots import panels

    shares = {
        row["target"]: Spread.of([row["reached"] / row["goal"]])
        for row in report.tables.get(TARGETS_TABLE, [])
        if "reached" in row
    }
    groups = {"": shares} if shares else {"no part with a target was measured": {}}
    return panels(groups, title="Reached share of each target (higher is better)", unit="1 = target", reference=1)

"""Measure how long it takes until the demo model can answer.

    python, import torch          what no program with torch can be faster than
    import TorchServe's worker    what no worker can be faster than: it imports torch before it loads a handler
    ... worker ready              from the request for a worker to the front end's report that it is ready
    vivit classify --checkpoint   from the start of the command to its first answer, without a server

`CPU` is user and system time of the process and its child processes until then. It is the number to compare if the
machine is busy. `transformers` is the handler of `benchmark.py serve`, which is made of transformers' parts.

The second table is the latency of the first requests that a new worker gets, one after the other.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks import libraries
from benchmarks.report import Report
from benchmarks.serve import (
    TRANSFORMERS,
    build_transformers_archive,
    call_management_api,
    make_sender,
    make_server,
    register_model,
    scale_workers,
)
from benchmarks.timing import OURS, Spread
from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS
from handler.cli.build import build_archive
from handler.cli.server import Server

HELP = "time until a worker is ready, and until the first answer without a server"
QUICK = {"repetitions": 1, "requests": 2}
TABLE, REQUESTS_TABLE = "start", "requests"
CLIP = DEMO_CLIPS / "moving-left.mp4"
# Each prints a line when it is ready.
COMMANDS = {
    "python": ("-c", "print()"),
    "import torch": ("-c", "import torch; print()"),
    "import TorchServe's worker": ("-c", "import ts.model_service_worker; print()"),
    "vivit classify --checkpoint": ("-m", "handler.cli", "classify", "--checkpoint", str(DEMO_CHECKPOINT), str(CLIP)),
}
COLUMNS = (
    ("until", "{until}"),
    ("s", "{wall_s:.2f}"),
    ("min-max", "{wall_low_s:.2f}-{wall_high_s:.2f}"),
    ("CPU s", "{cpu_s:.2f}"),
    ("min-max", "{cpu_low_s:.2f}-{cpu_high_s:.2f}"),
)
REQUESTS_COLUMNS = (
    ("handler", "{handler}"),
    ("request", "{request}"),
    ("ms", "{latency_ms:.0f}"),
    ("min-max", "{latency_low_ms:.0f}-{latency_high_ms:.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="starts of each (default: 5)")
    parser.add_argument(
        "--requests", type=int, default=10, metavar="N", help="requests to each new worker (default: 10)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    times_s: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}  # (wall, CPU)
    latencies_ms: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="vivit-start-") as temporary:
        folder = Path(temporary)
        report.progress("building the archives")
        build_archive(checkpoint=str(DEMO_CHECKPOINT), name=OURS, version="1.0", export_path=folder)
        names = [OURS]
        if libraries.load("transformers", report):
            build_transformers_archive(DEMO_CHECKPOINT, folder)
            names.append(TRANSFORMERS)
        with make_server(folder) as server:
            for name in names:
                register_model(server, name)
            for repetition in range(1, arguments.repetitions + 1):
                report.progress(f"repetition {repetition}")
                for name, command in COMMANDS.items():
                    times_s[name].append(measure_command(command))
                for name in names:
                    times_s.setdefault(f"{name}: worker ready", []).append(measure_worker(server, name))
                    latencies_ms.setdefault(name, []).append(measure_requests(server, name, count=arguments.requests))
                    scale_workers(server, name, 0)
    rows = []
    for until, pairs in times_s.items():
        walls_s, cpus_s = zip(*pairs)
        rows.append({"until": until, **Spread.of(walls_s).to_row("wall", "s"), **Spread.of(cpus_s).to_row("cpu", "s")})
    report.table(TABLE, COLUMNS, rows)
    report.table(REQUESTS_TABLE, REQUESTS_COLUMNS, request_rows(latencies_ms))


def measure_command(command: Sequence[str]) -> tuple[float, float]:
    """Returns seconds of wall time and of CPU time until a Python program prints its first line.

    Raises:
        RuntimeError: It exits without printing one.
    """
    start_s = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        wall_s, cpu_s = time.perf_counter() - start_s, cpu_time_s(psutil.Process(program.pid))
    if not line:
        raise RuntimeError(f"expected a line from {' '.join(command)}, got exit status {program.returncode}")
    return wall_s, cpu_s


def measure_worker(server: Server, name: str) -> tuple[float, float]:
    """Starts a worker. Returns seconds of wall time and of CPU time until it is ready."""
    start_s = time.perf_counter()
    scale_workers(server, name, 1)
    wall_s = time.perf_counter() - start_s
    (worker,) = call_management_api(server, "GET", f"/models/{name}")[0]["workers"]
    return wall_s, cpu_time_s(psutil.Process(worker["pid"]))


def measure_requests(server: Server, name: str, *, count: int) -> list[float]:
    """Sends requests one after the other and returns their latencies in milliseconds."""
    send = make_sender(server, name, [CLIP])
    latencies_ms = []
    for number in range(count):
        start_s = time.perf_counter()
        error = send(number)
        latencies_ms.append(1e3 * (time.perf_counter() - start_s))
        if error is not None:
            raise RuntimeError(f"{name} answered with {error}")
    return latencies_ms


def cpu_time_s(process: psutil.Process) -> float:
    """User and system time of a process and its living children."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def request_rows(latencies_ms: dict[str, list[list[float]]]) -> list[dict[str, object]]:
    """A row for the first, the second and the last request of each handler, over all of its workers."""
    return [
        {
            "handler": name,
            "request": index + 1,
            **Spread.of(of_worker[index] for of_worker in of_workers).to_row("latency", "ms"),
        }
        for name, of_workers in latencies_ms.items()
        for index in sorted({0, 1, len(of_workers[0]) - 1})
        if index < len(of_workers[0])
    ]


def plot(report: Report):
    from benchmarks.plots import panels

    groups = {
        title: {row["until"]: Spread.from_row(row, key, "s") for row in report.tables[TABLE]}
        for title, key in (("CPU time", "cpu"), ("wall time", "wall"))
    }
    return panels(groups, title="Time until the demo model can answer (lower is better)", unit="seconds")

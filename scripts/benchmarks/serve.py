"""Serve the model with TorchServe under load, and compare with a handler made of transformers' parts.

    ours           an archive built by `vivit build`
    transformers   benchmarks/transformers_handler.py: transformers' image processor and model, decoding as documented

Closed-loop clients on the same machine send video files and wait for each response. Only the measured handler has
workers: each repetition starts them, puts them under load, measures their memory and stops them.

The upper bound is the smaller of two rates: of the model alone, and of decoding with resizing alone. Each is measured
in separate processes on all cores. `of bound` is the share of it that serving reaches. Without a GPU the same cores
decode and run the model, so they cannot reach both rates at once; `of cores` is the share of
1 / (1 / model + 1 / decoding).
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import requests
import torch

from benchmarks import checkpoints, libraries
from benchmarks.load_generator import LoadResult, generate_load, latency_percentiles_ms
from benchmarks.report import Report
from benchmarks.timing import OURS, Spread
from benchmarks.upper_bounds import Workload, measure_decoding, measure_model, shared_cores_bound
from benchmarks.videos import VideoSpec, video_files
from benchmarks.videos import add_arguments as add_video_arguments
from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.cli.build import build_archive, read_options
from handler.cli.client import classify_rest
from handler.cli.properties import default_settings, on_free_ports, read_properties, write_properties
from handler.cli.server import Server, ServerError

HELP = "TorchServe under load"
QUICK = {
    "size": "tiny",
    "heights": [96],
    "seconds_a_clip": 1.5,
    "clients": [2],
    "seconds": 1.0,
    "warm_up_s": 0.2,
    "repetitions": 1,
    "workers": 1,
    "batch_size": 2,
    "max_batch_delay_ms": 10,
}
TRANSFORMERS = "transformers"
TABLE, BOUNDS_TABLE, WORKERS_TABLE = "serve", "limits", "workers"
MODEL_BOUND, DECODE_BOUND = "model alone", "decode and resize alone"
UPPER_BOUND, CORES_BOUND = "upper bound: the smaller", "both on the same cores"
COLUMNS = (
    ("handler", "{handler}"),
    ("clients", "{clients}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("min-max", "{clips_low_per_s:.2f}-{clips_high_per_s:.2f}"),
    ("ours is", "{ours_factor:.2f} x"),
    ("p50 ms", "{p50_ms:.0f}"),
    ("p95 ms", "{p95_ms:.0f}"),
    ("p99 ms", "{p99_ms:.0f}"),
    ("responses", "{answers}"),
    ("errors", "{errors}"),
    ("of bound", "{limit_share:.0%}"),
    ("of cores", "{cores_share:.0%}"),
)
BOUNDS_COLUMNS = (
    ("without serving", "{what}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("min-max", "{clips_low_per_s:.2f}-{clips_high_per_s:.2f}"),
)
WORKERS_COLUMNS = (
    ("handler", "{handler}"),
    ("worker start-up s", "{start_s:.1f}"),
    ("min-max", "{start_low_s:.1f}-{start_high_s:.1f}"),
    ("workers", "{workers}"),
    ("MB per worker", "{resident_mb:.0f}"),
    ("of these decoders", "{decoders_mb:.0f}"),
)
TIMEOUT_S = 900  # per response: many clients may wait for a slow worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = default_settings()
    checkpoints.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="serve this checkpoint instead of --size")
    parser.add_argument(
        "--config",
        type=Path,
        default=MODEL_CONFIG,
        help="our handler's options (default: handler/assets/model-config.yaml)",
    )
    add_video_arguments(parser, heights=[240, 720, 1080], seconds=10)
    for flag, key, text in (
        ("--workers", "minWorkers", "worker processes"),
        ("--batch-size", "batchSize", "maximum requests per batch"),
        ("--max-batch-delay-ms", "maxBatchDelay", "maximum wait for a full batch"),
    ):
        parser.add_argument(
            flag,
            type=int,
            default=defaults[key],
            metavar="N",
            help=f"{text} (default: {defaults[key]}, as in config.properties)",
        )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="numbers of concurrent clients (default: 1 8 32)",
    )
    parser.add_argument(
        "--seconds", type=float, default=20, metavar="S", help="duration of each measurement (default: 20)"
    )
    parser.add_argument(
        "--warm-up-s", type=float, default=3, metavar="S", help="warm-up before each measurement (default: 3)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=2, metavar="N", help="repetitions of all measurements (default: 2)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    specs = [VideoSpec(height, arguments.seconds_a_clip) for height in arguments.heights]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        video_files(arguments, specs, report) as files,
        tempfile.TemporaryDirectory(prefix="vivit-serve-") as temporary,
    ):
        folder = Path(temporary)
        report.progress("building the archives")
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = checkpoints.save_checkpoint(arguments.size, folder / "checkpoint")
        build_archive(checkpoint=str(checkpoint), name=OURS, version="1.0", export_path=folder, config=arguments.config)
        names = [OURS]
        if libraries.load("transformers", report):
            build_transformers_archive(checkpoint, folder)
            names.append(TRANSFORMERS)
        workload = Workload(
            checkpoint=checkpoint,
            options=read_options(arguments.config),
            files=tuple(files),
            batch_clips=arguments.batch_size,
            device=device,
        )
        rates: dict[str, list[float]] = {MODEL_BOUND: [], DECODE_BOUND: []}
        loads: dict[tuple[str, int], list[LoadResult]] = {}
        workers = {name: WorkerStatistics(name) for name in names}
        with make_server(folder) as server:
            for name in names:
                register_model(
                    server, name, batch_size=arguments.batch_size, max_batch_delay_ms=arguments.max_batch_delay_ms
                )
            for repetition in range(1, arguments.repetitions + 1):
                report.progress(f"repetition {repetition}: the model alone, decoding alone")
                half_s = arguments.seconds / 2
                rates[MODEL_BOUND].append(measure_model(workload, workers=arguments.workers, seconds=half_s))
                rates[DECODE_BOUND].append(measure_decoding(workload, seconds=half_s))
                for name in names:
                    report.progress(f"repetition {repetition}: starting the workers of {name}")
                    with workers[name].running(server, arguments.workers):
                        for clients in arguments.clients:
                            report.progress(f"repetition {repetition}: {name}, {clients} clients")
                            load = generate_load(
                                make_sender(server, name, files),
                                clients=clients,
                                seconds=arguments.seconds,
                                warm_up_s=arguments.warm_up_s,
                            )
                            loads.setdefault((name, clients), []).append(load)
    report.table(WORKERS_TABLE, WORKERS_COLUMNS, [workers[name].to_row(arguments.workers) for name in names])
    bounds = bounds_by_name(rates, on_gpu=device == "cuda")
    report.table(
        BOUNDS_TABLE,
        BOUNDS_COLUMNS,
        [{"what": name, **spread.to_row("clips", "per_s")} for name, spread in bounds.items()],
    )
    report_loads(loads, arguments.clients, names, bounds, report)


def build_transformers_archive(checkpoint: Path, folder: Path) -> None:
    """Builds transformers.mar in `folder`."""
    staging = folder / "staging"
    staging.mkdir()
    handler = shutil.copy(Path(__file__).with_name("transformers_handler.py"), staging)
    arguments = {
        "--model-name": TRANSFORMERS,
        "--version": "1.0",
        "--handler": handler,
        "--extra-files": checkpoint,
        "--config-file": MODEL_CONFIG,  # for its timeouts
        "--archive-format": "zip-store",
        "--export-path": folder,
    }
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += [str(word) for pair in arguments.items() for word in pair]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(staging)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"torch-model-archiver failed: {done.stderr.strip() or done.stdout.strip()}")


def make_server(folder: Path) -> Server:
    """Returns a server with the shipped config.properties, but on free ports and without models."""
    properties = on_free_ports(read_properties(SERVER_CONFIG))
    del properties["load_models"], properties["models"]
    properties["enable_model_api"] = "true"
    config = write_properties(folder / "config.properties", properties)
    return Server(config=config, model_store=folder, directory=folder / "run")


class WorkerStatistics:
    """Start-up times and memory of one handler's workers."""

    def __init__(self, name: str):
        self.name = name
        self.starts_s: list[float] = []
        self.memory_mb: list[tuple[float, float]] = []  # per worker: with its decoder processes, and those alone

    @contextlib.contextmanager
    def running(self, server: Server, count: int) -> Iterator[None]:
        """Runs `count` workers; measures their start-up before the body and their memory after it."""
        start_s = time.perf_counter()
        scale_workers(server, self.name, 1)
        self.starts_s.append(time.perf_counter() - start_s)
        if count > 1:
            scale_workers(server, self.name, count)
        yield
        self.memory_mb.append(worker_memory_mb(server, self.name))
        scale_workers(server, self.name, 0)

    def to_row(self, count: int) -> dict[str, Any]:
        total_mb, decoders_mb = zip(*self.memory_mb)
        return {
            "handler": self.name,
            **Spread.of(self.starts_s).to_row("start", "s"),
            "workers": count,
            "resident_mb": max(total_mb),
            "decoders_mb": max(decoders_mb),
        }


def scale_workers(server: Server, name: str, count: int) -> None:
    """Scales the workers of a model and waits until they are ready."""
    call_management_api(server, "PUT", f"/models/{name}", min_worker=count, max_worker=count, synchronous="true")


def register_model(
    server: Server, name: str, *, batch_size: int | None = None, max_batch_delay_ms: int | None = None
) -> None:
    """Registers an archive of the model store, without workers. Batches are as in the shipped config.properties."""
    settings = default_settings()
    call_management_api(
        server,
        "POST",
        "/models",
        url=f"{name}.mar",
        initial_workers=0,
        batch_size=settings["batchSize"] if batch_size is None else batch_size,
        max_batch_delay=settings["maxBatchDelay"] if max_batch_delay_ms is None else max_batch_delay_ms,
    )


def call_management_api(server: Server, method: str, path: str, **parameters: str | int) -> Any:
    """Returns the parsed response of TorchServe's management API.

    Raises:
        ServerError: The response is an error.
    """
    response = requests.request(
        method,
        f"{server.management_url}{path}",
        params=parameters,
        headers=server.headers("management"),
        timeout=TIMEOUT_S,
    )
    if not response.ok:
        raise ServerError(
            f"{method} {path} failed: {response.text.strip()}; the end of the server's log:\n{server.log_tail()}"
        )
    return response.json()


def worker_memory_mb(server: Server, name: str) -> tuple[float, float]:
    """Returns the mean memory per worker: of the worker with its child processes, and of the child processes alone.

    Pages shared by several processes are divided among them if the system reports the proportional set size.
    """
    description = call_management_api(server, "GET", f"/models/{name}")
    workers = [psutil.Process(worker["pid"]) for worker in description[0]["workers"]]
    children = [child for worker in workers for child in worker.children(recursive=True)]
    children_bytes = sum(map(_memory_bytes, children))
    total_bytes = sum(map(_memory_bytes, workers)) + children_bytes
    return total_bytes / len(workers) / 1e6, children_bytes / len(workers) / 1e6


def _memory_bytes(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return getattr(memory, "pss", memory.rss)


def make_sender(server: Server, name: str, files: list[Path]) -> Callable[[int], str | None]:
    """Returns a function that classifies file n modulo their number and returns the error code, None on success."""
    videos = [file.read_bytes() for file in files]
    token = server.token("inference")

    def send(number: int) -> str | None:
        answer = classify_rest(
            videos[number % len(videos)], url=server.inference_url, model=name, token=token, timeout_s=TIMEOUT_S
        )
        if answer.status == 200:  # the body of the transformers handler has no "predictions"
            return None
        return answer.error["code"] if answer.error else f"HTTP {answer.status}"

    return send


def bounds_by_name(rates: dict[str, list[float]], *, on_gpu: bool) -> dict[str, Spread]:
    """Returns the measured rates in clips/s, and the upper bounds that follow from their medians."""
    bounds = {name: Spread.of(values) for name, values in rates.items()}
    model, decode = bounds[MODEL_BOUND].median, bounds[DECODE_BOUND].median
    bounds[UPPER_BOUND] = Spread.of([min(model, decode)])
    if not on_gpu:
        bounds[CORES_BOUND] = Spread.of([shared_cores_bound(model, decode)])
    return bounds


def report_loads(
    loads: dict[tuple[str, int], list[LoadResult]],
    clients: list[int],
    names: list[str],
    bounds: dict[str, Spread],
    report: Report,
) -> None:
    """Adds a row per handler and number of clients, and notes on errors and short measurements."""
    rows = []
    for count in clients:
        ours = Spread.of(load.clips_per_s for load in loads[OURS, count]).median
        for name in names:
            results = loads[name, count]
            spread = Spread.of(load.clips_per_s for load in results)
            latencies_ms = [ms for load in results for ms in load.latencies_ms]
            errors = sum(sum(load.errors.values()) for load in results)
            row = {
                "handler": name,
                "clients": count,
                **spread.to_row("clips", "per_s"),
                "ours_factor": ours / spread.median if spread.median else None,
                **latency_percentiles_ms(latencies_ms),
                "answers": len(latencies_ms),
                "errors": errors,
                "limit_share": spread.median / bounds[UPPER_BOUND].median,
            }
            if CORES_BOUND in bounds:
                row["cores_share"] = spread.median / bounds[CORES_BOUND].median
            rows.append(row)
            if errors:
                report.note(f"{name} with {count} clients: errors {[load.errors for load in results]}")
            if len(latencies_ms) < 2 * count * len(results):
                report.note(
                    f"{name} with {count} clients: fewer than two responses per client in a measurement, so the "
                    "queue was still filling; measure longer with --seconds"
                )
    report.table(TABLE, COLUMNS, rows)


def plot(report: Report):
    from benchmarks.plots import bar_chart

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        group = groups.setdefault(f"{row['clients']} clients", {})
        group[row["handler"]] = Spread.from_row(row, "clips", "per_s")
    bound = next(row["clips_per_s"] for row in report.tables[BOUNDS_TABLE] if row["what"] == UPPER_BOUND)
    title = "Serving (higher is better; dotted: upper bound)"
    return bar_chart(groups, title=title, unit="clips/s", reference=bound)

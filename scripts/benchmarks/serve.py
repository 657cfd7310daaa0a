"""TorchServe with our archive under load, beside a plain handler of transformers' parts, on the same server.

    ours     an archive as scripts/build_archive.py makes it
    plain    benchmarks/plain_handler.py: transformers' image processor and model, decoding as documented

Closed-loop clients send real video files and wait for each answer. They run on the machine that they measure.
Only the handler that is measured has workers: in each repetition they are started, driven, weighed and stopped.
The limit is the smaller of what the model alone and what decoding and resizing alone reach, each on all cores
in processes of its own; `of limit` is the share of it that serving reaches. Where the model runs on the cores
that decode, both cannot be reached at once: `of cores` is the share of what the cores could do if they did
one after the other, 1 / (1 / model + 1 / decoding).
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import requests
import torch

from benchmarks import checkpoints, limits, peers
from benchmarks.clips import ClipSpec, clip_files
from benchmarks.clips import add_arguments as add_clip_arguments
from benchmarks.load import Load, drive
from benchmarks.measuring import OURS, Spread
from benchmarks.report import Report, bars
from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.cli.build import build_archive, read_options
from handler.cli.server import Server, ServerError, on_free_ports, read_properties, write_properties

HELP = "TorchServe with the archive, under load"
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
PLAIN = "plain"
TABLE, LIMITS, WORKERS = "serve", "limits", "workers"
COLUMNS = (
    ("handler", "{handler}"),
    ("clients", "{clients}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("min-max", "{clips_low_per_s:.2f}-{clips_high_per_s:.2f}"),
    ("ours is", "{ours_factor:.2f} x"),
    ("p50 ms", "{p50_ms:.0f}"),
    ("p95 ms", "{p95_ms:.0f}"),
    ("p99 ms", "{p99_ms:.0f}"),
    ("answers", "{answers}"),
    ("errors", "{errors}"),
    ("of limit", "{limit_share:.0%}"),
    ("of cores", "{cores_share:.0%}"),
)
LIMIT_COLUMNS = (
    ("alone", "{what}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("min-max", "{clips_low_per_s:.2f}-{clips_high_per_s:.2f}"),
)
WORKER_COLUMNS = (
    ("handler", "{handler}"),
    ("worker ready after s", "{start_s:.1f}"),
    ("min-max", "{start_low_s:.1f}-{start_high_s:.1f}"),
    ("workers", "{workers}"),
    ("MB a worker", "{resident_mb:.0f}"),
    ("decoders of it", "{decoders_mb:.0f}"),
)
TIMEOUT_S = 900  # for one answer: many clients may wait for a slow worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ours = json.loads(read_properties(SERVER_CONFIG)["models"])["vivit"]["1.0"]
    checkpoints.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="serve this one instead of --size")
    parser.add_argument(
        "--config",
        type=Path,
        default=MODEL_CONFIG,
        help="our deployment's options (default: handler/model-config.yaml)",
    )
    add_clip_arguments(parser, heights=[240, 720, 1080], seconds=10)
    for flag, key, text in (
        ("--workers", "minWorkers", "worker processes"),
        ("--batch-size", "batchSize", "requests a worker takes at once"),
        ("--max-batch-delay-ms", "maxBatchDelay", "how long it waits for as many"),
    ):
        parser.add_argument(
            flag,
            type=int,
            default=ours[key],
            metavar="N",
            help=f"{text} (default: {ours[key]}, as in config.properties)",
        )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="how many ask at the same time (default: 1 8 32)",
    )
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="of each measurement (default: 20)")
    parser.add_argument("--warm-up-s", type=float, default=3, metavar="S", help="before each (default: 3)")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="of everything, in turns (default: 2)")


def run(arguments: argparse.Namespace, report: Report) -> None:
    specs = [ClipSpec(height, arguments.seconds_a_clip) for height in arguments.heights]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        clip_files(arguments, specs, report) as files,
        tempfile.TemporaryDirectory(prefix="vivit-serve-") as folder,
    ):
        folder = Path(folder)
        report.progress("building the archives")
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = checkpoints.save_checkpoint(arguments.size, folder / "checkpoint")
        build_archive(checkpoint=str(checkpoint), name=OURS, version="1.0", export_path=folder, config=arguments.config)
        names = [OURS]
        if peers.load("transformers", report):
            build_plain_archive(checkpoint, folder)
            names.append(PLAIN)
        job = limits.Job(
            checkpoint=checkpoint,
            options=read_options(arguments.config),
            files=tuple(files),
            batch_clips=arguments.batch_size,
            device=device,
        )
        rates = {"model": [], "decode": []}
        loads: dict[tuple[str, int], list[Load]] = {}
        workers = {name: Workers(name) for name in names}
        with start_server(folder) as server:
            for name in names:
                manage(
                    server,
                    "POST",
                    "/models",
                    url=f"{name}.mar",
                    initial_workers=0,
                    batch_size=arguments.batch_size,
                    max_batch_delay=arguments.max_batch_delay_ms,
                )
            for repetition in range(arguments.repetitions):
                report.progress(f"repetition {repetition + 1}: the model alone, decoding alone")
                half_s = arguments.seconds / 2
                rates["model"].append(limits.model_rate(job, workers=arguments.workers, seconds=half_s))
                rates["decode"].append(limits.decode_rate(job, seconds=half_s))
                for name in names:
                    report.progress(f"repetition {repetition + 1}: starting the workers of {name}")
                    with workers[name].started(server, arguments.workers):
                        for clients in arguments.clients:
                            report.progress(f"repetition {repetition + 1}: {name}, {clients} clients")
                            load = drive(
                                sender(server, name, files),
                                clients=clients,
                                seconds=arguments.seconds,
                                warm_up_s=arguments.warm_up_s,
                            )
                            loads.setdefault((name, clients), []).append(load)
    report.table(WORKERS, WORKER_COLUMNS, [workers[name].row(arguments.workers) for name in names])
    report_limits(rates, on_gpu=device == "cuda", report=report)
    report_loads(loads, arguments.clients, names, report)


def build_plain_archive(checkpoint: Path, folder: Path) -> None:
    """PLAIN.mar in `folder`."""
    staging = folder / "staging"
    staging.mkdir()
    handler = shutil.copy(Path(__file__).with_name("plain_handler.py"), staging)
    command = [
        sys.executable,
        "-m",
        "model_archiver.model_packaging",
        "--model-name",
        PLAIN,
        "--version",
        "1.0",
        "--handler",
        handler,
        "--extra-files",
        str(checkpoint),
        "--config-file",
        str(MODEL_CONFIG),  # for its timeouts
        "--archive-format",
        "zip-store",
        "--export-path",
        str(folder),
    ]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(staging)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"torch-model-archiver failed: {done.stderr.strip() or done.stdout.strip()}")


def start_server(folder: Path) -> Server:
    """config.properties as shipped, but on free ports, with nothing loaded and models to be registered."""
    properties = on_free_ports(read_properties(SERVER_CONFIG))
    del properties["load_models"], properties["models"]
    properties["enable_model_api"] = "true"
    config = write_properties(folder / "config.properties", properties)
    return Server(config=config, model_store=folder, directory=folder / "run")


class Workers:
    """The workers of one handler, and what was found of them: seconds until ready, bytes of memory."""

    def __init__(self, name: str):
        self.name = name
        self.starts_s: list[float] = []
        self.resident_mb: list[tuple[float, float]] = []  # of a worker with its decoder processes, and of those

    @contextlib.contextmanager
    def started(self, server: Server, count: int) -> Iterator[None]:
        start_s = time.perf_counter()
        scale(server, self.name, 1)
        self.starts_s.append(time.perf_counter() - start_s)
        if count > 1:
            scale(server, self.name, count)
        yield
        self.resident_mb.append(resident_mb(server, self.name))
        scale(server, self.name, 0)

    def row(self, count: int) -> dict:
        together, decoders = zip(*self.resident_mb)
        return {
            "handler": self.name,
            **Spread.of(self.starts_s).in_row("start", "s"),
            "workers": count,
            "resident_mb": max(together),
            "decoders_mb": max(decoders),
        }


def scale(server: Server, name: str, workers: int) -> None:
    """Returns when so many workers are ready."""
    manage(server, "PUT", f"/models/{name}", min_worker=workers, max_worker=workers, synchronous="true")


def manage(server: Server, method: str, path: str, **parameters):
    answer = requests.request(
        method,
        f"{server.management_url}{path}",
        params=parameters,
        headers=server.headers("management"),
        timeout=TIMEOUT_S,
    )
    if not answer.ok:
        raise ServerError(f"{method} {path}: {answer.text.strip()}; the end of the log:\n{server.log_tail()}")
    return answer.json()


def resident_mb(server: Server, name: str) -> tuple[float, float]:
    """Memory of a worker and its children, and of the children, in the mean over the workers of a model.

    What several processes share, such as the code of a library, is divided among them where the system can say so.
    """
    pids = [worker["pid"] for worker in manage(server, "GET", f"/models/{name}")[0]["workers"]]
    children = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    of_children = sum(map(own_bytes, children))
    of_workers = sum(own_bytes(psutil.Process(pid)) for pid in pids)
    return (of_workers + of_children) / len(pids) / 1e6, of_children / len(pids) / 1e6


def own_bytes(process: psutil.Process) -> int:
    found = process.memory_full_info()
    return getattr(found, "pss", found.rss)


def sender(server: Server, name: str, files: list[Path]) -> Callable[[int], str | None]:
    """A function that posts file number n, modulo how many there are, and returns what was wrong, or None."""
    videos = [file.read_bytes() for file in files]
    headers = {**server.headers("inference"), "Content-Type": "application/octet-stream"}
    url = f"{server.inference_url}/predictions/{name}"

    def send(number):
        try:
            answer = requests.post(url, data=videos[number % len(videos)], headers=headers, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            return type(error).__name__
        return None if answer.ok else f"HTTP {answer.status_code}"

    return send


def report_limits(rates: dict[str, list[float]], *, on_gpu: bool, report: Report) -> None:
    names = {"model": "the model", "decode": "decoding and resizing"}
    spreads = {names[kind]: Spread.of(found) for kind, found in rates.items()}
    model, decode = (spread.median for spread in spreads.values())
    spreads["limit: the smaller"] = Spread.of([min(model, decode)])
    if not on_gpu:
        spreads["both on the same cores"] = Spread.of([shared_limit(model, decode)])
    report.table(
        LIMITS, LIMIT_COLUMNS, [{"what": name, **spread.in_row("clips", "per_s")} for name, spread in spreads.items()]
    )


def shared_limit(model: float, decode: float) -> float:
    """Clips/s of cores that do both for every clip, one after the other."""
    return 1 / (1 / model + 1 / decode)


def report_loads(
    loads: dict[tuple[str, int], list[Load]], clients: list[int], names: list[str], report: Report
) -> None:
    limit = {row["what"]: row["clips_per_s"] for row in report.tables[LIMITS]}
    rows = []
    for count in clients:
        ours = Spread.of(load.clips_per_s for load in loads[OURS, count]).median
        for name in names:
            found = loads[name, count]
            spread = Spread.of(load.clips_per_s for load in found)
            together = Load(spread.median, [ms for load in found for ms in load.latencies_ms], {})
            errors = sum(sum(load.errors.values()) for load in found)
            row = {
                "handler": name,
                "clients": count,
                **spread.in_row("clips", "per_s"),
                "ours_factor": ours / spread.median if spread.median else None,
                **together.percentiles_ms(),
                "answers": len(together.latencies_ms),
                "errors": errors,
                "limit_share": spread.median / limit["limit: the smaller"],
            }
            if "both on the same cores" in limit:
                row["cores_share"] = spread.median / limit["both on the same cores"]
            rows.append(row)
            if errors:
                report.note(f"{name} with {count} clients: errors {[load.errors for load in found]}")
            if len(together.latencies_ms) < 2 * count * len(found):
                report.note(
                    f"{name} with {count} clients: fewer than two answers a client in a measurement: "
                    "these are latencies of a queue that still fills; --seconds makes it longer"
                )
    report.table(TABLE, COLUMNS, rows)


def plot(report: Report):
    groups = {}
    for row in report.tables[TABLE]:
        group = groups.setdefault(f"{row['clients']} clients", {})
        group[row["handler"]] = Spread.from_row(row, "clips", "per_s")
    limit = next(row["clips_per_s"] for row in report.tables[LIMITS] if row["what"].startswith("limit"))
    return bars(
        groups, title="served (dotted: what the machine could do); longer is better", unit="clips/s", reference=limit
    )

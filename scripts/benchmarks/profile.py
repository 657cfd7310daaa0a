"""Where the time of a served request goes, with one client and with several.

Two views of the same requests:

    latency    mean milliseconds from sending a request to receiving its response, divided into steps that follow each
               other. With several clients a request mostly waits for others.
    CPU time   milliseconds per request of the decoder processes, the workers, TorchServe's front end and the clients.
               Other programs on the machine affect it less than the latency.

`of decoding` is the throughput as a share of what the same cores reach if they only decode and resize. The clients
run on these cores, too. `CPU of decoding` is the share of all CPU time that decoding and resizing the same videos
takes without a server, in one thread. It is what throughput can reach when the cores are never idle.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import statistics
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import checkpoints
from benchmarks.load_generator import LoadResult, generate_load
from benchmarks.plots import INK, PALETTE
from benchmarks.report import Report
from benchmarks.serve import make_server, register_model, scale_workers
from benchmarks.timing import OURS
from benchmarks.upper_bounds import Workload, measure_decoding, prepare_decoding
from benchmarks.videos import VideoSpec, video_files
from benchmarks.videos import add_arguments as add_video_arguments
from handler.assets import MODEL_CONFIG
from handler.cli.build import build_archive, read_options
from handler.cli.properties import default_settings
from handler.cli.server import Server

HELP = "where the time of a served request goes"
QUICK = {
    "size": "tiny",
    "heights": [96],
    "seconds_a_clip": 1.5,
    "clients": [1, 2],
    "seconds": 1.0,
    "warm_up_s": 0.2,
    "repetitions": 1,
    "workers": 1,
}
RECORD_VARIABLE = "VIVIT_PROFILE_RECORD"  # read by profiled_handler.py
STEPS_TABLE, CPU_TABLE = "steps", "cpu"
DECODE, MODEL = "decode and resize", "model"
WAITS = ("wait for a worker", "wait for a decoder", "wait for the rest of the batch")
# In the order in which a request passes through them.
STEPS = (
    "client to front end",
    WAITS[0],
    "front end to worker",
    "parse the request",
    WAITS[1],
    "worker to decoder",
    DECODE,
    WAITS[2],
    MODEL,
    "answer and metrics",
    "worker to client",
)
PROCESSES = ("decoders", "workers", "front end", "clients")
STEPS_COLUMNS = (("clients", "{clients}"), ("step", "{step}"), ("ms", "{ms:.1f}"), ("share", "{share:.1%}"))
CPU_COLUMNS = (
    ("clients", "{clients}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("decoding alone", "{decode_per_s:.2f}"),
    ("of decoding", "{decode_share:.0%}"),
    ("CPU ms: decoders", "{decoders_ms:.0f}"),
    ("workers", "{workers_ms:.1f}"),
    ("front end", "{front_end_ms:.1f}"),
    ("clients ", "{clients_ms:.1f}"),
    ("decoding alone ", "{decode_cpu_ms:.0f}"),
    ("CPU of decoding", "{cpu_share:.0%}"),
    ("cores used", "{cores_used:.2f}"),
    ("errors", "{errors}"),
)
_SENDING = re.compile(r"\] (W-\S+) .*Sending response for jobId (\S+)")
_WAITED = re.compile(r"\] (W-\S+) .*Waiting time ns: (\d+)")


@dataclass
class Exchange:
    """A request and its response, as the client sees them; times in seconds of time.perf_counter."""

    request_id: str
    sent_s: float
    received_s: float


@dataclass
class Profile:
    """What was measured with one number of clients.

    Attributes:
        loads: Throughput, per repetition.
        decode_per_s: Clips/s of decoding alone, per repetition.
        steps_ms: Duration of each step of each request.
        cpu_s: CPU seconds by process group, over all repetitions.
        sent: How often each video was sent in this time.
        elapsed_s: Wall time of it.
    """

    loads: list[LoadResult] = field(default_factory=list)
    decode_per_s: list[float] = field(default_factory=list)
    steps_ms: list[dict[str, float]] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PROCESSES, 0.0))
    sent: Counter[int] = field(default_factory=Counter)
    elapsed_s: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_arguments(parser)
    add_video_arguments(parser, heights=[240, 720, 1080], seconds=10)
    parser.set_defaults(size="demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument(
        "--workers",
        type=int,
        default=default_settings()["minWorkers"],
        metavar="N",
        help="worker processes (default: as in config.properties)",
    )
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="of each measurement (default: 20)")
    parser.add_argument("--warm-up-s", type=float, default=5, metavar="S", help="before each measurement (default: 5)")
    parser.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="repetitions of all measurements (default: 3)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    specs = [VideoSpec(height, arguments.seconds_a_clip) for height in arguments.heights]
    with (
        video_files(arguments, specs, report) as files,
        tempfile.TemporaryDirectory(prefix="vivit-profile-") as temporary,
    ):
        folder = Path(temporary)
        checkpoint = checkpoints.save_checkpoint(arguments.size, folder / "checkpoint")
        build_archive(checkpoint=str(checkpoint), name=OURS, version="1.0", export_path=folder, config=MODEL_CONFIG)
        use_profiled_handler(folder / f"{OURS}.mar")
        workload = Workload(
            checkpoint=checkpoint, options=read_options(MODEL_CONFIG), files=tuple(files), batch_clips=1, device="cpu"
        )
        videos = [file.read_bytes() for file in files]
        profiles = {clients: Profile() for clients in arguments.clients}
        decode_cpu_ms = []
        record = folder / "record.jsonl"
        with environment(RECORD_VARIABLE, str(record)), make_server(folder) as server:
            register_model(server, OURS)
            for repetition in range(1, arguments.repetitions + 1):
                report.progress(f"repetition {repetition}: decoding alone")
                decode_cpu_ms.append(measure_decoding_cpu_ms(workload))
                decode_per_s = measure_decoding(workload, seconds=arguments.seconds / 2)
                scale_workers(server, OURS, arguments.workers)
                for clients, profile in profiles.items():
                    report.progress(f"repetition {repetition}: {clients} clients")
                    profile.decode_per_s.append(decode_per_s)
                    exchanges = measure(server, videos, profile, clients=clients, arguments=arguments)
                    batches = [json.loads(line) for line in record.read_text().splitlines()]
                    record.unlink()
                    profile.steps_ms += divide(exchanges, batches, waiting_times_s(server.log_file))
                scale_workers(server, OURS, 0)  # they would compete with the next measurement of decoding alone
    for clients, profile in profiles.items():
        report.table(STEPS_TABLE, STEPS_COLUMNS, step_rows(clients, profile), title=f"{clients} clients: latency")
    medians_ms = [statistics.median(repeated) for repeated in zip(*decode_cpu_ms)]
    report.table(
        CPU_TABLE,
        CPU_COLUMNS,
        [cpu_row(clients, profile, medians_ms) for clients, profile in profiles.items()],
    )
    if any(load.errors for profile in profiles.values() for load in profile.loads):
        report.note("some requests failed; their CPU time is included")


def use_profiled_handler(archive: Path) -> None:
    """Makes ProfiledHandler the handler of an archive."""
    handler = Path(__file__).with_name("profiled_handler.py")
    original = archive.rename(archive.with_suffix(".original"))
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(archive, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content)
                manifest["model"]["handler"] = handler.name
                content = json.dumps(manifest).encode()
            target.writestr(name, content)
        target.write(handler, handler.name)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable in the `with` block, for processes that are started there."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def measure_decoding_cpu_ms(workload: Workload) -> list[float]:
    """Returns the CPU time of decoding and resizing each video in one thread."""
    step, _ = prepare_decoding(workload)
    for _ in workload.files:
        step()
    times_ms = []
    for _ in workload.files:
        start_s = time.process_time()
        step()
        times_ms.append(1e3 * (time.process_time() - start_s))
    return times_ms


def measure(
    server: Server, videos: Sequence[bytes], profile: Profile, *, clients: int, arguments: argparse.Namespace
) -> list[Exchange]:
    """Generates load and adds throughput and CPU time to the profile. Returns the successful requests."""
    address = urlsplit(server.inference_url)
    headers = {**server.headers("inference"), "Content-Type": "application/octet-stream"}
    exchanges: list[Exchange] = []
    sent: list[int] = []

    def send(number: int) -> str | None:
        sent_s = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(address.hostname, address.port)) as connection:
            connection.request("POST", f"/predictions/{OURS}", videos[number % len(videos)], headers)
            response = connection.getresponse()
            response.read()
        sent.append(number % len(videos))
        if response.status != 200:
            return f"HTTP {response.status}"
        exchanges.append(Exchange(response.headers["x-request-id"], sent_s, time.perf_counter()))
        return None

    before, start_s = cpu_seconds(server), time.perf_counter()
    profile.loads.append(generate_load(send, clients=clients, seconds=arguments.seconds, warm_up_s=arguments.warm_up_s))
    after = cpu_seconds(server)
    profile.elapsed_s += time.perf_counter() - start_s
    profile.sent.update(sent)
    for name in PROCESSES:
        profile.cpu_s[name] += after[name] - before[name]
    return exchanges


def cpu_seconds(server: Server) -> dict[str, float]:
    """Returns the CPU time that each group of processes has used so far, with decoder processes that have exited."""
    workers = [worker.cpu_times() for worker in server.workers()]
    decoders = [decoder.cpu_times() for decoder in server.decoders()]
    front_end, clients = server.process.cpu_times(), psutil.Process().cpu_times()
    return {
        "decoders": sum(each.user + each.system for each in decoders)
        + sum(each.children_user + each.children_system for each in workers),
        "workers": sum(each.user + each.system for each in workers),
        "front end": front_end.user + front_end.system,
        "clients": clients.user + clients.system,
    }


def waiting_times_s(log: Path) -> dict[str, float]:
    """Returns how long each request waited for a worker, by request id, from TorchServe's log.

    The waiting time follows the line with the id of the request in the log of the same thread.
    """
    ids: dict[str, str] = {}
    waited = {}
    for line in log.read_text(errors="replace").splitlines():
        if match := _SENDING.search(line):
            ids[match[1]] = match[2]
        elif (match := _WAITED.search(line)) and match[1] in ids:
            waited[ids[match[1]]] = int(match[2]) / 1e9
    return waited


def divide(
    exchanges: Sequence[Exchange], batches: Sequence[Mapping[str, Any]], waited_s: Mapping[str, float]
) -> list[dict[str, float]]:
    """Returns the milliseconds of each step, for each request whose record is complete."""
    records = {
        request_id: (batch, video)
        for batch in batches
        for request_id, video in zip(batch["ids"], batch["videos"])
        if len(video) == 3  # the decoder process neither started nor failed
    }
    rows = []
    for exchange in exchanges:
        if exchange.request_id in records and exchange.request_id in waited_s:
            batch, video = records[exchange.request_id]
            wait_s = min(waited_s[exchange.request_id], batch["received"] - exchange.sent_s)
            sent_s, arrived_s, returned_s = video
            durations_s = (
                batch["received"] - exchange.sent_s - wait_s,
                wait_s,
                batch["preprocess"] - batch["received"],
                batch["load"] - batch["preprocess"],
                sent_s - batch["load"],
                arrived_s - sent_s,
                returned_s - arrived_s,
                batch["loaded"] - returned_s,
                batch["inferred"] - batch["inference"],
                batch["inference"] - batch["loaded"] + batch["responded"] - batch["inferred"],
                exchange.received_s - batch["responded"],
            )
            rows.append({step: 1e3 * duration_s for step, duration_s in zip(STEPS, durations_s)})
    return rows


def step_rows(clients: int, profile: Profile) -> list[dict[str, Any]]:
    """Returns a row per step with its mean duration and its share of the latency."""
    if not profile.steps_ms:
        raise RuntimeError(f"{clients} clients: no request succeeded")
    means_ms = {step: statistics.fmean(row[step] for row in profile.steps_ms) for step in STEPS}
    latency_ms = sum(means_ms.values())
    return [{"clients": clients, "step": step, "ms": ms, "share": ms / latency_ms} for step, ms in means_ms.items()]


def cpu_row(clients: int, profile: Profile, video_cpu_ms: Sequence[float]) -> dict[str, Any]:
    """Returns the row of the CPU table for one number of clients, given the CPU time of decoding each video."""
    requests = profile.sent.total()
    decode_cpu_ms = sum(count * video_cpu_ms[video] for video, count in profile.sent.items()) / requests
    clips_per_s = statistics.median(load.clips_per_s for load in profile.loads)
    decode_per_s = statistics.median(profile.decode_per_s)
    cpu_ms = {name: 1e3 * seconds / requests for name, seconds in profile.cpu_s.items()}
    return {
        "clients": clients,
        "clips_per_s": clips_per_s,
        "decode_per_s": decode_per_s,
        "decode_share": clips_per_s / decode_per_s,
        **{f"{name.replace(' ', '_')}_ms": ms for name, ms in cpu_ms.items()},
        "decode_cpu_ms": decode_cpu_ms,
        "cpu_share": decode_cpu_ms / sum(cpu_ms.values()),
        "cores_used": sum(profile.cpu_s.values()) / profile.elapsed_s,
        "errors": sum(sum(load.errors.values()) for load in profile.loads),
    }


def plot(report: Report):
    """Draws, for each number of clients, a request's latency, a magnified view of its small steps, and its CPU time."""
    from matplotlib.figure import Figure

    cpu_rows = report.tables[CPU_TABLE]
    heights = [1.0, 1.5] * len(cpu_rows) + [0.5 + 0.5 * len(cpu_rows)]
    figure = Figure(figsize=(10, 1.5 + 1.2 * sum(heights)), layout="constrained")
    figure.suptitle("Where the time of a served request goes", fontsize=12)
    axes = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights})
    for row, whole, magnified in zip(cpu_rows, axes[::2], axes[1::2]):
        steps_ms = {
            each["step"]: each["ms"] for each in report.tables[STEPS_TABLE] if each["clients"] == row["clients"]
        }
        _plot_latency(whole, magnified, steps_ms, row)
    _plot_cpu(axes[-1], cpu_rows)
    return figure


def _plot_latency(whole, magnified, steps_ms: Mapping[str, float], row: Mapping[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import ConnectionPatch

    small_ms = {step: ms for step, ms in steps_ms.items() if step not in (DECODE, MODEL, *WAITS)}
    rest_ms = sum(small_ms.values())
    parts_ms = {
        DECODE: steps_ms[DECODE],
        MODEL: steps_ms[MODEL],
        "waiting (worker, decoder, batch)": sum(steps_ms[step] for step in WAITS),
        "everything else": rest_ms,
    }
    latency_ms = sum(parts_ms.values())
    colors = (PALETTE[0], PALETTE[1], "#CCCCCC", PALETTE[5])
    clients = "one client" if row["clients"] == 1 else f"{row['clients']} clients"
    whole.set_title(
        f"{clients}: {latency_ms:.0f} ms from request to response, {row['clips_per_s']:.2f} clips/s, "
        f"{row['decode_share']:.0%} of the rate of decoding alone",
        fontsize=10,
        loc="left",
    )
    _stack(whole, {f"{name} {ms / latency_ms:.1%}": ms for name, ms in parts_ms.items()}, colors)
    whole.set_xlim(0, latency_ms)
    shades = [colormaps["YlOrRd"](0.2 + 0.7 * number / len(small_ms)) for number in range(len(small_ms))]
    _stack(magnified, {f"{step} {ms:.1f} ms": ms for step, ms in small_ms.items()}, shades)
    magnified.set_xlim(0, rest_ms)
    magnified.set_xlabel("milliseconds; everything else in the bar above, magnified", fontsize=8)
    for axes in (whole, magnified):
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "left", "right"]].set_visible(False)
    for x, corner in ((latency_ms - rest_ms, 0), (latency_ms, rest_ms)):
        line = ConnectionPatch((x, -0.4), (corner, 0.4), "data", "data", axesA=whole, axesB=magnified)
        line.set(color=PALETTE[5], linewidth=0.8, linestyle=":", zorder=-1)  # behind the legend
        whole.figure.add_artist(line)


def _plot_cpu(axes, rows: Sequence[Mapping[str, Any]]) -> None:
    keys = [f"{name.replace(' ', '_')}_ms" for name in PROCESSES]
    colors = (PALETTE[0], PALETTE[1], PALETTE[5], PALETTE[3])
    for position, row in enumerate(rows):
        left = 0.0
        for name, key, color in zip(PROCESSES, keys, colors):
            axes.barh(position, row[key], left=left, height=0.7, color=color, label=name if position == 0 else None)
            left += row[key]
        values = ", ".join(f"{name} {row[key]:.0f}" for name, key in zip(PROCESSES, keys))
        axes.text(left, position, f"  {values}", va="center", fontsize=8)
    for position, row in enumerate(rows):
        label = "decoding alone, one thread" if position == 0 else None
        axes.plot([row["decode_cpu_ms"]] * 2, [position - 0.45, position + 0.45], color=INK, linestyle=":", label=label)
    axes.set_yticks(
        range(len(rows)), [f"{row['clients']} client{'s' * (row['clients'] > 1)}" for row in rows], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(sum(row[key] for key in keys) for row in rows))  # with space for the values
    axes.tick_params(labelsize=8)
    axes.set_title("CPU milliseconds per request, by process", fontsize=10, loc="left")
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _stack(axes, widths: Mapping[str, float], colors: Sequence[Any]) -> None:
    """Draws a horizontal stacked bar with a legend below it, which covers the lines to the magnified bar."""
    left = 0.0
    for (label, width), color in zip(widths.items(), colors):
        axes.barh(0, width, left=left, height=0.8, color=color, label=label, edgecolor="white", linewidth=0.5)
        left += width
    box = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), **box)

"""The two tables of the ViViT documentation, for our model: how much faster SDPA is than eager attention, and
how much memory it saves, in inference and in training.

Speed-up is eager's time over SDPA's, less 1; memory saved is eager's peak over SDPA's, less 1: as the
documentation counts. `before` is what was taken before the first forward pass: weights, inputs and, on a CPU,
all of Python and torch. Published: google/vivit-b-16x2-kinetics400 in float32 on an A100-40GB with PyTorch
2.3.0.

On a CPU every measurement has a process of its own, since a process cannot be asked for the peak of a part of
its life; on a GPU torch can.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import checkpoints
from benchmarks.measuring import Spread, first_line
from benchmarks.report import Report, bars
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.threads import available_cores

HELP = "the two tables of the ViViT documentation: SDPA against eager"
QUICK = {
    "size": "tiny",
    "device": "cpu",
    "dtypes": ["float32"],
    "batches": [1],
    "steps": 1,
    "training_steps": 1,
    "threads": 1,
    "repetitions": 1,
}
TABLE = "sdpa"
# (speed-up %, memory saved %); the training row's two memory columns are swapped where it was published.
PUBLISHED = {
    ("inference", 1): (15.422, 125.75),
    ("inference", 2): (17.146, 176.122),
    ("inference", 4): (18.093, 220.6),
    ("inference", 8): (19.284, 253.393),
    ("training", 1): (7.122, 130.364),
}
COLUMNS = (
    ("mode", "{mode}"),
    ("batch", "{batch}"),
    ("dtype", "{dtype}"),
    ("eager ms", "{eager_ms:.1f}"),
    ("min-max", "{eager_low_ms:.1f}-{eager_high_ms:.1f}"),
    ("sdpa ms", "{sdpa_ms:.1f}"),
    ("min-max", "{sdpa_low_ms:.1f}-{sdpa_high_ms:.1f}"),
    ("speed-up %", "{speedup_percent:.1f}"),
    ("published", "{published_speedup_percent:.1f}"),
    ("eager peak MB", "{eager_peak_mb:.0f}"),
    ("sdpa peak MB", "{sdpa_peak_mb:.0f}"),
    ("before MB", "{before_mb:.0f}"),
    ("saved %", "{saved_percent:.1f}"),
    ("published", "{published_saved_percent:.1f}"),
)


@dataclass(frozen=True)
class Task:
    """One measurement: `steps` forward passes, or training steps with AdamW."""

    config: VivitConfig
    mode: str
    attention: str
    batch: int
    dtype: str
    steps: int
    device: str
    threads: int


@dataclass(frozen=True)
class Outcome:
    """Milliseconds of each step, and bytes of memory: before the first one, and at the peak."""

    steps_ms: list[float]
    before_bytes: int
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_arguments(parser)
    checkpoints.add_device_argument(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        metavar="DTYPE",
        help="of inference (default: float32 float16 on a GPU, float32 on a CPU); training is in float32",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help="of inference (default: 1 2 4 8 on a GPU, 1 2 on a CPU)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of inference (default: 20 on a GPU, 2 on a CPU)")
    parser.add_argument(
        "--training-steps", type=int, metavar="N", help="0 leaves training out (default: 100 on a GPU, 2 on a CPU)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        metavar="N",
        help="of torch, on a CPU (default: the available cores)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help="turns of eager and SDPA, of so many steps each (default: 3 on a GPU, 1 on a CPU)",
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    on_gpu = arguments.device == "cuda"
    dtypes = arguments.dtypes or (["float32", "float16"] if on_gpu else ["float32"])
    batches = arguments.batches or ([1, 2, 4, 8] if on_gpu else [1, 2])
    steps = arguments.steps or (20 if on_gpu else 2)
    training_steps = arguments.training_steps
    if training_steps is None:
        training_steps = 100 if on_gpu else 2
    repetitions = arguments.repetitions or (3 if on_gpu else 1)
    report.choose(
        {
            "dtypes": dtypes,
            "batches": batches,
            "steps": steps,
            "training_steps": training_steps,
            "repetitions": repetitions,
        }
    )
    if on_gpu:
        report.note("memory is torch.cuda.max_memory_allocated: weights and inputs are in it")
    else:
        report.note(
            "a CPU: by default fewer batches and steps than published, and no half precision, which "
            "CPUs compute slowly; memory is the peak resident size of a process of its own, all of "
            "Python and torch included"
        )
    config = checkpoints.config_of(arguments.size)
    fixed = {"config": config, "device": arguments.device, "threads": arguments.threads}
    tasks = [
        {"mode": "inference", "batch": batch, "dtype": dtype, "steps": steps, **fixed}
        for dtype in dtypes
        for batch in batches
    ]
    if training_steps:
        tasks.append({"mode": "training", "batch": 1, "dtype": "float32", "steps": training_steps, **fixed})
    measure = measure_task if on_gpu else in_a_process
    for task in tasks:
        report.progress(f"{task['mode']}, batch {task['batch']}, {task['dtype']}")
        row = compare(task, measure, repetitions, report)
        if arguments.size != "base" or task["dtype"] != "float32":
            row = {key: value for key, value in row.items() if not key.startswith("published")}
        report.table(TABLE, COLUMNS, [row], title=f"{task['mode']}, {task['steps']} steps")


def compare(task: dict, measure: Callable[[Task], Outcome], repetitions: int, report: Report) -> dict:
    """A row of the table: eager and SDPA in turns."""
    outcomes = {"eager": [], "sdpa": []}
    for _ in range(repetitions):
        for attention, found in outcomes.items():
            try:
                found.append(measure(Task(attention=attention, **task)))
            except (RuntimeError, BrokenProcessPool, MemoryError) as error:
                where = f"{task['mode']}, batch {task['batch']}, {task['dtype']}"
                report.note(f"{attention} failed (out of memory?): {where}: {first_line(error)}")
    row = {key: task[key] for key in ("mode", "batch", "dtype", "steps")}
    for attention, found in outcomes.items():
        if found:
            spread = Spread.of(ms for outcome in found for ms in outcome.steps_ms)
            row |= spread.in_row(attention, "ms") | {
                f"{attention}_peak_mb": max(outcome.peak_bytes for outcome in found) / 1e6,
                "before_mb": max(outcome.before_bytes for outcome in found) / 1e6,
            }
    if all(outcomes.values()):
        row["speedup_percent"] = saving_percent(row["eager_ms"], row["sdpa_ms"])
        row["saved_percent"] = saving_percent(row["eager_peak_mb"], row["sdpa_peak_mb"])
    published = PUBLISHED.get((task["mode"], task["batch"]))
    if published:
        row["published_speedup_percent"], row["published_saved_percent"] = published
    return row


def saving_percent(eager: float, sdpa: float) -> float:
    """How much more eager takes, in percent of what SDPA takes."""
    return 100 * (eager / sdpa - 1)


def in_a_process(task: Task) -> Outcome:
    # Spawned: a forked one would begin with this process's memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_task, task).result()


def measure_task(task: Task) -> Outcome:
    """Runs `task` in this process, after one step that is not timed; the peak of memory is of all steps."""
    torch.manual_seed(0)
    torch.set_num_threads(task.threads)
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    model = VivitForVideoClassification(task.config, attn_implementation=task.attention).to(device, dtype)
    pixels = torch.from_numpy(checkpoints.draw_clips(task.config, task.batch)).to(device, dtype)
    pixels = pixels.div_(127.5).sub_(1)  # (B, T, C, h, w)
    step = _training_step(model, pixels) if task.mode == "training" else _inference_step(model, pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
    else:
        before_bytes = _peak_resident_bytes()
    steps_ms = []
    for _ in range(1 + task.steps):
        start_s = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps_ms.append(1e3 * (time.perf_counter() - start_s))
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_resident_bytes()
    return Outcome(steps_ms[1:], before_bytes, peak_bytes)


def _inference_step(model, pixels):
    model.eval()
    return torch.inference_mode()(lambda: model(pixels))


def _training_step(model, pixels):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.arange(len(pixels), device=pixels.device) % model.config.num_labels

    def step():
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()

    return step


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts anew for each program; getrusage begins with the parent's size
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot(report: Report):
    groups = {}
    for row in report.tables[TABLE]:
        label = f"{row['mode']}, {row['dtype']}, batch {row['batch']}"
        for attention in ("eager", "sdpa"):
            if f"{attention}_ms" in row:
                spread = Spread.from_row(row, attention, "ms").times(1 / row["batch"])
                groups.setdefault(label, {})[attention] = spread
    return bars(groups, title="eager attention and SDPA; shorter is better", unit="ms a clip")

"""Reproduce the two tables of the ViViT documentation with our model: SDPA compared with eager attention.

One table is for inference, one for training. The speed-up is eager's time over SDPA's, minus 1. The memory saved is
eager's peak over SDPA's, minus 1, as the documentation computes it. `before` is the memory in use before the first
forward pass: weights, inputs and, on a CPU, all of Python and torch. The published figures are for
google/vivit-b-16x2-kinetics400 in float32 on an A100-40GB with PyTorch 2.3.0.

On a CPU every measurement runs in its own process, because the peak memory of a process cannot be reset; on a
GPU torch can reset it.
"""

import argparse
import functools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.report import Report
from benchmarks.timing import Spread, first_line
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification

HELP = "the two tables of the ViViT documentation: SDPA and eager attention"
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
# (speed-up %, memory saved %); the published training row has its two memory columns swapped.
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
    """One measurement.

    Attributes:
        config: The model's configuration.
        mode: "inference": forward passes, or "training": training steps with AdamW.
        batch: Clips per step.
        dtype: Name of the torch dtype.
        steps: Number of timed steps.
        device: "cpu" or "cuda".
        threads: torch threads on a CPU.
        attention: "eager" or "sdpa".
    """

    config: VivitConfig
    mode: str
    batch: int
    dtype: str
    steps: int
    device: str
    threads: int
    attention: str = "sdpa"


@dataclass(frozen=True)
class Measurement:
    """The result of a measurement.

    Attributes:
        steps_ms: Time of each step.
        before_bytes: Memory in use before the first step.
        peak_bytes: Peak memory.
    """

    steps_ms: list[float]
    before_bytes: int
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_model_arguments(parser, batches="1 2 4 8 on a GPU, 1 2 on a CPU")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="forward passes per repetition (default: 20 on a GPU, 2 on a CPU)"
    )
    parser.add_argument(
        "--training-steps",
        type=int,
        metavar="N",
        help="training steps per repetition, in float32; 0 skips training (default: 100 on a GPU, 2 on a CPU)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help="alternations of eager and SDPA (default: 3 on a GPU, 1 on a CPU)",
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
    report.add_settings(
        {
            "dtypes": dtypes,
            "batches": batches,
            "steps": steps,
            "training_steps": training_steps,
            "repetitions": repetitions,
        }
    )
    if on_gpu:
        report.note("memory is torch.cuda.max_memory_allocated, including weights and inputs")
    else:
        report.note(
            "on a CPU there are fewer batches and steps than published by default, and no half precision, which is "
            "slow on CPUs; memory is the peak resident size of a separate process, including Python and torch"
        )
    config = checkpoints.load_config(arguments.size)
    make_task = functools.partial(Task, config, device=arguments.device, threads=arguments.threads)
    tasks = [make_task("inference", batch=batch, dtype=dtype, steps=steps) for dtype in dtypes for batch in batches]
    if training_steps:
        tasks.append(make_task("training", batch=1, dtype="float32", steps=training_steps))
    for task in tasks:
        report.progress(f"{task.mode}, batch {task.batch}, {task.dtype}")
        row = compare(
            task,
            measure=measure_task if on_gpu else measure_in_subprocess,
            repetitions=repetitions,
            with_published=arguments.size == "base" and task.dtype == "float32",
            report=report,
        )
        report.table(TABLE, COLUMNS, [row], title=f"{task.mode}, {task.steps} steps")


def compare(
    task: Task,
    *,
    measure: Callable[[Task], Measurement],
    repetitions: int,
    with_published: bool,
    report: Report,
) -> dict[str, Any]:
    """Measures eager and SDPA attention alternately; returns a row of the table.

    Args:
        task: What to measure; its attention is ignored.
        measure: Runs a task.
        repetitions: Measurements per attention implementation.
        with_published: Whether to add the published figures, if there are any for this batch.
        report: Receives a note on each measurement that fails.
    """
    measurements: dict[str, list[Measurement]] = {"eager": [], "sdpa": []}
    for _ in range(repetitions):
        for attention, found in measurements.items():
            try:
                found.append(measure(replace(task, attention=attention)))
            except (RuntimeError, BrokenProcessPool, MemoryError) as error:
                where = f"{task.mode}, batch {task.batch}, {task.dtype}"
                report.note(f"{attention} failed (out of memory?): {where}: {first_line(error)}")
    row: dict[str, Any] = {"mode": task.mode, "batch": task.batch, "dtype": task.dtype, "steps": task.steps}
    for attention, found in measurements.items():
        if found:
            spread = Spread.of(ms for measurement in found for ms in measurement.steps_ms)
            row |= spread.to_row(attention, "ms") | {
                f"{attention}_peak_mb": max(measurement.peak_bytes for measurement in found) / 1e6,
                "before_mb": max(measurement.before_bytes for measurement in found) / 1e6,
            }
    if all(measurements.values()):
        row["speedup_percent"] = saving_percent(row["eager_ms"], row["sdpa_ms"])
        row["saved_percent"] = saving_percent(row["eager_peak_mb"], row["sdpa_peak_mb"])
    if with_published and (task.mode, task.batch) in PUBLISHED:
        row["published_speedup_percent"], row["published_saved_percent"] = PUBLISHED[task.mode, task.batch]
    return row


def saving_percent(eager: float, sdpa: float) -> float:
    """Returns how much more eager needs than SDPA, in percent of what SDPA needs."""
    return 100 * (eager / sdpa - 1)


def measure_in_subprocess(task: Task) -> Measurement:
    # Spawned, because a forked process would start with the memory of this one.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_task, task).result()


def measure_task(task: Task) -> Measurement:
    """Runs a task in this process, after one untimed step; the peak memory includes that step."""
    torch.manual_seed(0)
    torch.set_num_threads(task.threads)
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    with device:  # a GPU draws random weights faster
        model = VivitForVideoClassification(task.config, attn_implementation=task.attention).to(dtype)
    pixels = torch.from_numpy(checkpoints.draw_input_clips(task.config, task.batch)).to(device, dtype)
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
    return Measurement(steps_ms[1:], before_bytes, peak_bytes)


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
    if status.exists():  # on Linux getrusage starts at the parent's peak; VmHWM starts at 0 for each program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot(report: Report):
    from benchmarks.plots import bar_chart

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        label = f"{row['mode']}, {row['dtype']}, batch {row['batch']}"
        for attention in ("eager", "sdpa"):
            if f"{attention}_ms" in row:
                spread = Spread.from_row(row, attention, "ms").times(1 / row["batch"])
                groups.setdefault(label, {})[attention] = spread
    return bar_chart(groups, title="Eager attention and SDPA (lower is better)", unit="ms per clip")

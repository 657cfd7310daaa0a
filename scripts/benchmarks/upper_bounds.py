"""Upper bounds of serving throughput: the model alone and decoding alone, in separate processes."""

import itertools
import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import first_line
from handler.classifier import VideoClassifier
from handler.clips import load_clip
from handler.options import HandlerOptions
from handler.threads import available_cores

START_TIMEOUT_S = 600  # many processes import torch and load the model at the same time


@dataclass(frozen=True)
class Workload:
    """What is served.

    Attributes:
        checkpoint: A checkpoint's directory.
        options: The deployment's options.
        files: Videos, each sent equally often.
        batch_clips: Clips per forward pass.
        device: The model's device.
    """

    checkpoint: Path
    options: HandlerOptions
    files: tuple[Path, ...]
    batch_clips: int
    device: str


def measure_model(workload: Workload, *, workers: int, seconds: float) -> float:
    """Returns clips/s of the model alone: the better of one process with all cores and `workers` sharing them."""
    cores = available_cores()
    threads_by_processes = {1: cores} if workload.device == "cuda" else {1: cores, workers: max(1, cores // workers)}
    return max(
        measure_throughput(prepare_model, (workload, threads), processes=processes, seconds=seconds)
        for processes, threads in threads_by_processes.items()
    )


def measure_decoding(workload: Workload, *, seconds: float) -> float:
    """Returns clips/s of decoding and resizing alone: one single-threaded process per core."""
    return measure_throughput(prepare_decoding, (workload,), processes=available_cores(), seconds=seconds)


def prepare_model(workload: Workload, threads: int) -> tuple[Callable[[], object], int]:
    """Returns a function to repeat, and the clips it processes per call."""
    torch.set_num_threads(threads)
    classifier = VideoClassifier.from_pretrained(workload.checkpoint, options=workload.options, device=workload.device)
    classifier.warm_up()
    files = itertools.islice(itertools.cycle(workload.files), workload.batch_clips)
    pixels = [classifier.load_clip(file).pixels for file in files]
    return lambda: classifier.logits(pixels), workload.batch_clips


def prepare_decoding(workload: Workload) -> tuple[Callable[[], object], int]:
    """Returns a function to repeat, and the clips it processes per call."""
    torch.set_num_threads(1)
    settings = VideoClassifier.from_pretrained(workload.checkpoint, options=workload.options).clip_settings
    videos = itertools.cycle([file.read_bytes() for file in workload.files])  # bytes, as a server receives them
    return lambda: load_clip(next(videos), settings), 1


def measure_throughput(prepare: Callable, arguments: tuple, *, processes: int, seconds: float) -> float:
    """Returns the clips/s of all processes together.

    Args:
        prepare: Returns a function to repeat and the clips it processes per call; called once in each process.
        arguments: The arguments of `prepare`.
        processes: Number of processes, which start measuring at the same time.
        seconds: Approximate duration of the measurement.

    Raises:
        RuntimeError: A process failed.
    """
    context = multiprocessing.get_context("spawn")  # a forked child cannot use torch's OpenMP threads
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_measure, args=(prepare, arguments, seconds, barrier, results), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        outcomes = [results.get(timeout=START_TIMEOUT_S + 10 * seconds) for _ in workers]
    except queue.Empty:
        raise RuntimeError(f"{prepare.__name__}: a process did not finish") from None
    finally:
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        raise RuntimeError(f"{prepare.__name__}: {errors[0]}")
    return sum(outcomes)


def shared_cores_bound(model_per_s: float, decode_per_s: float) -> float:
    """Returns the clips/s of cores that both decode each clip and run the model on it, one after the other."""
    return 1 / (1 / model_per_s + 1 / decode_per_s)


def _measure(prepare, arguments, seconds, barrier, results):
    try:
        step, clips_per_step = prepare(*arguments)
        step()
        barrier.wait(timeout=START_TIMEOUT_S)
        start_s, clips = time.perf_counter(), 0
        while time.perf_counter() < start_s + seconds:
            step()
            clips += clips_per_step
        results.put(clips / (time.perf_counter() - start_s))
    except Exception as error:
        results.put(first_line(error))
        barrier.abort()

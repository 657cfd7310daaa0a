"""What the machine could do if serving cost nothing: the model alone and decoding alone, in own processes."""

import itertools
import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import first_line
from handler.classifier import VideoClassifier
from handler.clips import load_clip
from handler.options import HandlerOptions
from handler.threads import available_cores

START_TIMEOUT_S = 600  # to import torch and load the model, in many processes at once


@dataclass(frozen=True)
class Job:
    """What is served, and where.

    Attributes:
        checkpoint: a directory.
        options: the deployment's.
        files: videos, all of them sent equally often.
        batch_clips: clips in one call of the model.
        device: of the model.
    """

    checkpoint: Path
    options: HandlerOptions
    files: tuple[Path, ...]
    batch_clips: int
    device: str


def model_rate(job: Job, *, workers: int, seconds: float) -> float:
    """Clips/s of the model alone: the better of one process with all cores, and `workers` that share them."""
    cores = available_cores()
    arrangements = {1: cores} if job.device == "cuda" else {1: cores, workers: max(1, cores // workers)}
    return max(
        rate(repeat_model, (job, threads), processes=processes, seconds=seconds)
        for processes, threads in arrangements.items()
    )


def decode_rate(job: Job, *, seconds: float) -> float:
    """Clips/s of decoding and resizing alone, on all cores: a process for each, with one thread."""
    return rate(repeat_decoding, (job,), processes=available_cores(), seconds=seconds)


def repeat_model(job: Job, threads: int) -> tuple[Callable[[], object], int]:
    """(a function to repeat, how many clips it does)."""
    torch.set_num_threads(threads)
    classifier = VideoClassifier.from_pretrained(job.checkpoint, options=job.options, device=job.device)
    classifier.warm_up()
    files = itertools.islice(itertools.cycle(job.files), job.batch_clips)
    pixels = [classifier.load_clip(file).pixels for file in files]
    return lambda: classifier.logits(pixels), job.batch_clips


def repeat_decoding(job: Job) -> tuple[Callable[[], object], int]:
    """(a function to repeat, how many clips it does)."""
    torch.set_num_threads(1)
    settings = VideoClassifier.from_pretrained(job.checkpoint, options=job.options).clip_settings
    videos = itertools.cycle([file.read_bytes() for file in job.files])  # bytes, as a server gets them
    return lambda: load_clip(next(videos), settings), 1


def rate(prepare: Callable, arguments: tuple, *, processes: int, seconds: float) -> float:
    """Clips/s of all `processes`; each repeats for about `seconds` what `prepare(*arguments)` returns.

    Raises RuntimeError where one of them failed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in a broken state
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_work, args=(prepare, arguments, seconds, barrier, results), daemon=True)
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        rates = [results.get(timeout=START_TIMEOUT_S + 10 * seconds) for _ in workers]
    except queue.Empty:
        raise RuntimeError(f"{prepare.__name__}: a process gave no answer") from None
    finally:
        for worker in workers:
            worker.join(timeout=5)
            worker.kill()
    failed = [each for each in rates if isinstance(each, str)]
    if failed:
        raise RuntimeError(f"{prepare.__name__}: {failed[0]}")
    return sum(rates)


def _work(prepare, arguments, seconds, barrier, results):
    try:
        step, clips = prepare(*arguments)
        step()
        barrier.wait(timeout=START_TIMEOUT_S)  # so that all work at the same time
        start_s, done = time.perf_counter(), 0
        while time.perf_counter() < start_s + seconds:
            step()
            done += clips
        results.put(done / (time.perf_counter() - start_s))
    except Exception as error:
        results.put(first_line(error))
        barrier.abort()

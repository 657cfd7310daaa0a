"""Interleaved timing of several implementations, and statistics of the times.

for each repetition: for each candidate: prepare (not timed), call (timed)
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "ours"  # this project's candidate, which ratios refer to


@dataclass(frozen=True)
class Candidate:
    """An implementation to time.

    Attributes:
        name: Its name in tables.
        call: The function that is timed. It is called with the result of `prepare`, if there is one.
        prepare: Called before each `call`, not timed.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def bind(self) -> Callable[[], Any]:
        """Prepares one call and returns it."""
        if self.prepare is None:
            return self.call
        prepared = self.prepare()
        return lambda: self.call(prepared)


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def from_row(cls, row: dict[str, Any], name: str, unit: str) -> "Spread":
        return cls(row[f"{name}_{unit}"], row[f"{name}_low_{unit}"], row[f"{name}_high_{unit}"])

    def to_row(self, name: str, unit: str) -> dict[str, float]:
        """Returns values of a table row: {"wall_ms": ..., "wall_low_ms": ..., "wall_high_ms": ...}."""
        return {
            f"{name}_{unit}": self.median,
            f"{name}_low_{unit}": self.low,
            f"{name}_high_{unit}": self.high,
        }

    def times(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass
class Timing:
    """Wall-clock time of each repetition, and CPU time of the whole process, in milliseconds."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def time_interleaved(
    candidates: Sequence[Candidate], *, repetitions: int, inspect: Callable[[str, Any], None] | None = None
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Calls every candidate once without timing it, then times all of them alternately.

    Args:
        candidates: A candidate that raises in the untimed call is excluded; the others continue.
        repetitions: Timed calls per candidate.
        inspect: Called with the name and the result of each untimed call, to compare results.

    Returns:
        Timings by name, and the reasons of failures by name.
    """
    timings, failures = {}, {}
    for candidate in candidates:
        try:
            result = candidate.bind()()
            if inspect is not None:
                inspect(candidate.name, result)
            timings[candidate.name] = Timing()
        except Exception as error:  # any exception of a third-party library
            failures[candidate.name] = first_line(error)
        result = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # an out-of-memory failure must not affect the next candidate
    remaining = [candidate for candidate in candidates if candidate.name in timings]
    for _ in range(repetitions):
        for candidate in remaining:
            _time(candidate, timings[candidate.name])
    return timings, failures


def _time(candidate: Candidate, timing: Timing) -> None:
    call = candidate.bind()
    gc.collect()  # so that the garbage of the previous candidate costs this one no time
    _synchronize_gpu()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = call()
    _synchronize_gpu()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    del result  # freeing the result is not timed
    timing.wall_ms.append(1e3 * wall_s)
    timing.cpu_ms.append(1e3 * cpu_s)


def _synchronize_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def ratio_to_ours(median: float, ours: float | None) -> float | None:
    """Returns a time as a multiple of ours; None if ours failed."""
    return median / ours if ours else None


def percentile(values: Iterable[float], percent: int) -> float:
    """Returns the nearest-rank percentile: the smallest value that is >= `percent` % of all values."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, rank - 1)]


@contextlib.contextmanager
def limit_cores(count: int, *, torch_threads: int | None = None) -> Iterator[None]:
    """Pins this thread, and threads it starts, to `count` available cores, and limits torch to as many threads.

    So a library that starts more threads than requested gets no more cores. Without `sched_setaffinity` (outside
    Linux) only torch is limited.

    Args:
        count: Number of cores.
        torch_threads: Threads per caller if several threads call torch concurrently; `count` by default.
    """
    threads_before = torch.get_num_threads()
    # With more threads than cores, OpenMP threads spin while they wait for each other.
    torch.set_num_threads(torch_threads or count)
    can_pin = hasattr(os, "sched_setaffinity")
    cores_before = os.sched_getaffinity(0) if can_pin else None
    if can_pin:
        os.sched_setaffinity(0, sorted(cores_before)[:count])
    try:
        yield
    finally:
        if can_pin:
            os.sched_setaffinity(0, cores_before)
        torch.set_num_threads(threads_before)

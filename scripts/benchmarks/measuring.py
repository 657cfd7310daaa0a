"""Timing contestants in turns, and what is made of the times.

for repetition: for contestant: prepare (not timed), call (timed)
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

OURS = "ours"  # the contestant that ratios refer to


@dataclass(frozen=True)
class Contestant:
    """Something that is timed: `call()`, or `call(prepare())` of which only the call is timed."""

    name: str
    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def ready(self) -> Callable[[], Any]:
        if self.prepare is None:
            return self.call
        prepared = self.prepare()
        return lambda: self.call(prepared)


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of repeated measurements."""

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

    def in_row(self, name: str, unit: str) -> dict[str, float]:
        """Columns of a table: {"wall_ms": ..., "wall_low_ms": ..., "wall_high_ms": ...}."""
        spread = (self.median, self.low, self.high)
        return dict(zip((f"{name}_{unit}", f"{name}_low_{unit}", f"{name}_high_{unit}"), spread))

    def times(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass
class Timing:
    """Milliseconds of each repetition: by the clock, and of processor time, of the whole process."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def take_turns(
    contestants: Sequence[Contestant], *, repetitions: int, inspect: Callable[[str, Any], None] | None = None
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Calls every contestant once untimed, then all of them in turns, `repetitions` times.

    inspect  is given the name and the result of each untimed call: so results can be compared one at a time

    Returns (timings by name, reasons by the name of those that failed). One that fails is out, the others go
    on.
    """
    timings, failures = {}, {}
    for contestant in contestants:
        try:
            result = contestant.ready()()
            if inspect is not None:
                inspect(contestant.name, result)
            timings[contestant.name] = Timing()
        except Exception as error:  # whatever a peer raises on a file or a size that is not for it
            failures[contestant.name] = first_line(error)
        result = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # so that one that ran out of memory does not take the others along
    racing = [contestant for contestant in contestants if contestant.name in timings]
    for _ in range(repetitions):
        for contestant in racing:
            _time(contestant, timings[contestant.name])
    return timings, failures


def _time(contestant: Contestant, timing: Timing) -> None:
    call = contestant.ready()
    gc.collect()  # what the one before left behind is not this one's cost
    _wait_for_gpu()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = call()
    _wait_for_gpu()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    del result  # freeing it is not timed either
    timing.wall_ms.append(1e3 * wall_s)
    timing.cpu_ms.append(1e3 * cpu_s)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def ratio_to_ours(median: float, ours: float | None) -> float | None:
    """How many times as long as ours it took; None where ours failed."""
    return median / ours if ours else None


def percentile(values: Iterable[float], percent: int) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, rank - 1)]


@contextlib.contextmanager
def on_cores(count: int, *, torch_threads: int | None = None) -> Iterator[None]:
    """Keeps this thread, and those that it starts, on `count` of the available cores, and torch on as many.

    So a peer that takes more threads than it is told has no more to run them on. Without Linux only torch is
    kept.

    torch_threads  where several threads call torch, how many each of them may use; default: `count`
    """
    threads_before = torch.get_num_threads()
    # More of them than cores would wait for each other in a busy loop, a quarter of a second at a time.
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

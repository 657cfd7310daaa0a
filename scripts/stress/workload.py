"""Runs a numbered workload in threads."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def run_numbered(
    action: Callable[[int], None], *, count: int, first: int = 0, max_seconds: float = math.inf, threads: int
) -> None:
    """Calls `action` with `count` consecutive numbers in several threads.

    Args:
        action: Called with each number. An exception ends the run and is raised again.
        count: How many numbers.
        first: The first number.
        max_seconds: Stops early after this time.
        threads: Number of threads.
    """
    numbers = _until(iter(range(first, first + count)), time.monotonic() + max_seconds)
    lock = threading.Lock()

    def work() -> None:
        # Each thread takes the next number when it is free; `Executor.map` would ignore the time limit.
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            action(number)

    with ThreadPoolExecutor(threads) as executor:
        for future in [executor.submit(work) for _ in range(threads)]:
            future.result()


def _until(numbers: Iterator[int], end_s: float) -> Iterator[int]:
    for number in numbers:
        if time.monotonic() > end_s:
            return
        yield number

"""Closed-loop load: each client sends its next video as soon as it has received the response to the last one.

    requests   |--a--|-----b-----|--c--|--d--|----e----|      one row per client
    window          ^ first response after the warm-up    ^ first response after the measuring time

Responses arrive in batches. The window starts and ends at a response, so it contains as many batches as intervals
between batches.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.timing import percentile

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        at_s: When it was received, in seconds of time.perf_counter.
        latency_ms: Time from sending the request to receiving the response.
        error: The error; None if the response was successful.
    """

    at_s: float
    latency_ms: float
    error: str | None


@dataclass(frozen=True)
class LoadResult:
    """What was measured within the window.

    Attributes:
        clips_per_s: Rate of successful responses.
        latencies_ms: Latencies of successful responses.
        errors: Number of failed responses by error.
    """

    clips_per_s: float
    latencies_ms: list[float]
    errors: dict[str, int]


def latency_percentiles_ms(latencies_ms: list[float]) -> dict[str, float]:
    """Returns {"p50_ms": ..., "p95_ms": ..., "p99_ms": ...}; empty without latencies."""
    if not latencies_ms:
        return {}
    return {f"p{percent}_ms": percentile(latencies_ms, percent) for percent in PERCENTILES}


def generate_load(send: Callable[[int], str | None], *, clients: int, seconds: float, warm_up_s: float) -> LoadResult:
    """Runs concurrent clients and measures their responses.

    Args:
        send: Sends video number n and waits for the response. Returns None on success, otherwise the error.
        clients: Number of concurrent clients. They count through the videos together, so a slow video is not sent
            less often than a fast one.
        seconds: Approximate length of the window.
        warm_up_s: Time before the window.

    Returns:
        The measurements, once no request is pending.
    """
    numbers = itertools.count()
    responses: list[Response] = []
    received = threading.Condition()
    done = threading.Event()

    def run_client():
        while not done.is_set():
            start_s = time.perf_counter()
            error = send(next(numbers))
            end_s = time.perf_counter()
            with received:
                responses.append(Response(end_s, 1e3 * (end_s - start_s), error))
                received.notify()

    def wait_for_response_after(moment_s):
        with received:
            received.wait_for(lambda: responses and responses[-1].at_s >= moment_s)
            return responses[-1].at_s

    threads = [threading.Thread(target=run_client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        begin_s = wait_for_response_after(time.perf_counter() + warm_up_s)
        end_s = wait_for_response_after(begin_s + seconds)
    finally:
        done.set()
    for thread in threads:  # the next measurement must start with an idle server
        thread.join()
    return summarize(responses, begin_s=begin_s, end_s=end_s)


def summarize(responses: list[Response], *, begin_s: float, end_s: float) -> LoadResult:
    """Summarizes the responses received after `begin_s`, up to and including `end_s`."""
    counted = [response for response in responses if begin_s < response.at_s <= end_s]
    latencies_ms = [response.latency_ms for response in counted if response.error is None]
    errors = Counter(response.error for response in counted if response.error is not None)
    return LoadResult(len(latencies_ms) / (end_s - begin_s), latencies_ms, dict(errors))

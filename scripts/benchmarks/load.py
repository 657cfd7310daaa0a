"""Closed-loop clients: each sends its next video when it has the answer to the last.

    requests   |--a--|-----b-----|--c--|--d--|----e----|      one row a client
    window          ^ the first answer after the warm-up   ^ the first answer when its time is up

A window from answer to answer counts answers that come in batches right: as many whole batches as there are
intervals.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measuring import percentile


@dataclass(frozen=True)
class Load:
    """What was answered within the window.

    Attributes:
        clips_per_s: good answers.
        latencies_ms: of the good answers.
        errors: how often each error came.
    """

    clips_per_s: float
    latencies_ms: list[float]
    errors: dict[str, int]

    def percentiles_ms(self) -> dict[str, float]:
        if not self.latencies_ms:
            return {}
        return {f"p{percent}_ms": percentile(self.latencies_ms, percent) for percent in (50, 95, 99)}


@dataclass(frozen=True)
class Answer:
    """When it came (seconds, perf_counter), how long it took, and what was wrong with it."""

    at_s: float
    latency_ms: float
    error: str | None


def drive(send: Callable[[int], str | None], *, clients: int, seconds: float, warm_up_s: float) -> Load:
    """Lets `clients` call `send(number)` at the same time, again and again, and measures for about `seconds`.

    send  sends one video, the number saying which; returns None for a good answer, else what is wrong with it
    """
    numbers = itertools.count()  # one for all, so that long videos are sent as often as short ones
    answers: list[Answer] = []
    came = threading.Condition()
    done = threading.Event()

    def client():
        while not done.is_set():
            start_s = time.perf_counter()
            error = send(next(numbers))
            end_s = time.perf_counter()
            with came:
                answers.append(Answer(end_s, 1e3 * (end_s - start_s), error))
                came.notify()

    def first_answer_after(moment_s):
        with came:
            came.wait_for(lambda: answers[-1:] and answers[-1].at_s >= moment_s)
            return answers[-1].at_s

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        begin_s = first_answer_after(time.perf_counter() + warm_up_s)
        end_s = first_answer_after(begin_s + seconds)
    finally:
        done.set()
    for thread in threads:  # the next contestant must find an idle server
        thread.join()
    return summarize(answers, begin_s=begin_s, end_s=end_s)


def summarize(answers: list[Answer], *, begin_s: float, end_s: float) -> Load:
    """The answers after `begin_s` until `end_s`."""
    counted = [answer for answer in answers if begin_s < answer.at_s <= end_s]
    good = [answer.latency_ms for answer in counted if answer.error is None]
    errors = Counter(answer.error for answer in counted if answer.error is not None)
    return Load(len(good) / (end_s - begin_s), good, dict(errors))

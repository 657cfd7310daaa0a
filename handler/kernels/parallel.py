"""Parallel tasks in threads that each use a single torch thread.

Torch's own threads synchronize after every operation, thousands of times per clip, and wait for each other in busy
loops, which becomes several times slower as soon as another process uses one of the cores. Here a thread computes a
whole chunk of tokens or a whole attention head before it synchronizes.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import torch

# Starting tasks for fewer tokens takes longer than it saves.
MIN_PARALLEL_TOKENS = 512

_lock = threading.Lock()


def is_plain_inference(x: torch.Tensor) -> bool:
    """Whether `x` is a float32 or half-precision tensor on the CPU, in a plain forward pass.

    Plain means without gradients, autocast, tracing and compiling: their state belongs to the calling thread, and they
    do not see operations that other threads run.
    """
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch lacks annotations
    )


def apply_in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    out_features: int,
    split: Callable[[torch.Tensor], list[torch.Tensor]],
) -> torch.Tensor:
    """Applies `function` to chunks of tokens, in parallel if that is faster and allowed.

    Args:
        function: computes (n, out_features) from (n, D), and (..., out_features) from (..., D).
        x: (..., D).
        split: divides a contiguous tensor of the leading shape of `x` into chunks (n, channels), which are views of it.

    Returns:
        (..., out_features).
    """
    tokens = x.numel() // x.shape[-1]
    run = run_parallel if tokens >= MIN_PARALLEL_TOKENS and is_plain_inference(x) else _run_sequential
    x = x.contiguous()
    chunks = split(x)
    if len(chunks) == 1:
        return function(x)
    output = x.new_empty(*x.shape[:-1], out_features)
    run(lambda source, target: target.copy_(function(source)), zip(chunks, split(output)))
    return output


def run_parallel(function: Callable[..., object], tasks: Iterable[tuple[Any, ...]]) -> None:
    """Calls function(*task) for every task, in as many threads as torch uses in the calling thread.

    Gradients are disabled in these threads, as they must be in the calling one.

    Raises:
        Exception: the first exception that a task raised. The remaining tasks are skipped.
    """
    threads = start_threads()
    pending = deque(tasks)
    if threads is None or len(pending) == 1:
        _run_sequential(function, pending)
        return
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def run_pending() -> None:
        with mode():
            while True:
                try:
                    task = pending.popleft()
                except IndexError:
                    return
                try:
                    function(*task)
                except BaseException:
                    pending.clear()
                    raise

    futures = [threads.submit(run_pending) for _ in range(min(torch.get_num_threads(), len(pending)))]
    wait(futures)
    for future in futures:
        future.result()


def start_threads() -> ThreadPoolExecutor | None:
    """Returns a pool with as many threads as torch uses in the calling thread; None for a single thread.

    A pool is started once for each number of threads. While it starts, torch's global number of threads is 1 for a
    moment, and a thread that runs its first torch operation in that moment would keep this number. Several threads may
    run a prepared model if each of them calls this function before its first torch operation.
    """
    with _lock:
        count = torch.get_num_threads()
        return _start_pool(count) if count > 1 else None


@lru_cache
def _start_pool(count: int) -> ThreadPoolExecutor:
    started = threading.Barrier(count + 1)

    def use_single_torch_thread() -> None:
        torch.get_num_threads()  # the first call in a thread overwrites the number with torch's global one
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="torch", initializer=use_single_torch_thread)
    for _ in range(count):
        pool.submit(int)  # the pool starts a thread per task
    started.wait()
    torch.set_num_threads(count)  # restores the global number, which the pool's threads have set to 1
    return pool


def _run_sequential(function: Callable[..., object], tasks: Iterable[tuple[Any, ...]]) -> None:
    for task in tasks:
        function(*task)


def chunk_count(tokens: int, *, max_tokens: int) -> int:
    """Returns the number of chunks of at most `max_tokens` tokens, as a multiple of the number of torch's threads."""
    threads = torch.get_num_threads()
    return threads * math.ceil(tokens / max_tokens / threads)

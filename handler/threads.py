"""How many cores a process has, how many threads each part of a worker uses, and how they start. Imports no torch.

available_cores            cores that this process may use
count_workers              workers of this TorchServe server
useful_inference_threads   threads that one forward pass can make use of
worker_inference_threads   torch's threads in one worker
decoder_threads_per_file   threads that decode one file of a batch
start_threads              an executor whose threads already run
"""

import contextlib
import math
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")

# About a tenth of a second of work for one core. A clip takes 560 GFLOP in the linear layers of ViViT-B/16x2.
MIN_FLOPS_PER_THREAD = 4 * 10**9

# As many threads decode as resize, each with its own stack and frame buffers. More threads barely reduce the latency.
MAX_DECODER_THREADS_PER_FILE = 16


def available_cores() -> int:
    """Returns the number of cores that this process may use, at least 1.

    The CPU affinity (`taskset`) and the quotas of the process's control groups (containers) can both allow fewer cores
    than the machine has. A fractional quota is rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_quota_cores())))


def count_workers() -> int:
    """Returns the number of workers of this process's TorchServe server, including itself.

    Workers are the children of one parent, TorchServe's front end, that run the same script.
    """
    import psutil

    count = 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with contextlib.suppress(psutil.Error):  # the process has exited in the meantime
                count += sys.argv[0] in process.cmdline()
    return max(1, count)


def useful_inference_threads(*, parameters: int, tokens: int) -> int:
    """Returns the number of threads that a forward pass over one clip can make use of, at least 1.

    Torch synchronizes its threads about ten times per layer. When other processes compete for the cores, every
    synchronization takes milliseconds, which is longer than the whole forward pass of a small model.

    Args:
        parameters: number of parameters of the model.
        tokens: number of tokens of one clip.
    """
    flops = 2 * parameters * tokens
    return max(1, flops // MIN_FLOPS_PER_THREAD)


def worker_inference_threads(*, requested: int, useful: int) -> int | None:
    """Returns the number of threads that torch should use in this worker on a CPU.

    Args:
        requested: the option `inference_threads`. A positive number is returned unchanged. 0 divides the available
            cores equally among the server's workers.
        useful: upper limit of an equal share, see `useful_inference_threads`.

    Returns:
        The number of threads, or None to keep torch's own setting because OMP_NUM_THREADS is set.
    """
    if requested:
        return requested
    if "OMP_NUM_THREADS" in os.environ:
        return None
    if useful == 1:  # a small model: do not list all processes of the system, which takes milliseconds
        return 1
    return max(1, min(useful, available_cores() // count_workers()))


def decoder_threads_per_file(*, threads: int, files: int) -> int:
    """Returns the number of threads that decode each of `files` files at the same time, at least 1.

    A single file gets all `threads`, up to MAX_DECODER_THREADS_PER_FILE, for low latency. Several files share them
    for high throughput.
    """
    return max(1, min(MAX_DECODER_THREADS_PER_FILE, threads // max(1, files)))


def start_threads(count: int) -> ThreadPoolExecutor:
    """Returns an executor whose `count` threads already run.

    By default ThreadPoolExecutor starts threads when they are needed. If little memory is left by then, a new thread
    may exit before it signals its start, and `Thread.start` waits forever.

    Raises:
        RuntimeError: a thread cannot be started.
    """
    executor = ThreadPoolExecutor(count)
    all_running = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            executor.submit(all_running.wait)  # occupies a thread until all run
        all_running.wait()
    except BaseException:
        all_running.abort()
        executor.shutdown()
        raise
    return executor


def _cgroup_quota_cores() -> float:
    """The smallest CPU quota of this process's control groups, in cores; inf if there is none."""
    memberships = CGROUP_MEMBERSHIP.read_text() if CGROUP_MEMBERSHIP.is_file() else ""
    quotas = [math.inf]
    for controllers, group in re.findall(r"^\d+:([^:]*):(.*)$", memberships, re.MULTILINE):
        root = CGROUP_ROOT / controllers if controllers else CGROUP_ROOT  # version 1 has a folder per controller
        folder = root / group.strip("/")
        # The quotas of parent groups apply as well. Inside a container the group's path, as seen from the host, may not
        # exist, and the container's own group is mounted at the root.
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quotas.append(_read_quota_cores(level))
            if level == root:
                break
    return min(quotas)


def _read_quota_cores(folder: Path) -> float:
    """The quota of one control group in cores.

    Raises:
        OSError, ValueError, ZeroDivisionError: the group has no valid quota.
    """
    if (folder / "cpu.max").is_file():  # version 2
        quota, period = (folder / "cpu.max").read_text().split()  # the quota "max" raises ValueError below
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    cores = int(quota) / int(period)
    if cores <= 0:  # -1 means unlimited
        raise ValueError(f"expected a positive quota, got {quota}")
    return cores

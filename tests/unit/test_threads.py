"""How many cores a process has, and how many threads each part of a worker uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler import threads

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """cgroups(content of /proc/self/cgroup, {path in /sys/fs/cgroup: content}) on a machine with eight cores."""
    monkeypatch.setattr(threads, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "CGROUP_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


V1 = "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n"


@pytest.mark.parametrize(
    "membership, files, expected",
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "400000 100000\n"}, 3),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 8),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2),
        (
            V1,
            {f"cpu,cpuacct/docker/ab/cpu.cfs_{name}": text for name, text in (("quota_us", "50"), ("period_us", "10"))},
            5,
        ),
        ("nonsense", {"cpu.max": "1 2 3"}, 8),
        ("0::/\n", {"cpu.max": "100000 0\n"}, 8),
        ("0::/../..\n", {"cpu.max": "200000 100000\n"}, 2),
    ],
)
def test_cgroup_quota_limits_cores(cgroups, membership, files, expected):
    cgroups(membership, files)
    assert threads.available_cores() == expected


def test_all_cores_available_without_cgroups(cgroups):
    assert threads.available_cores() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cpu_affinity_limits_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from handler.threads import available_cores; print(available_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "1\n"


WORKER = """
import subprocess, sys
if len(sys.argv) > 1:
    others = [subprocess.Popen([sys.executable, sys.argv[0]], stdin=subprocess.PIPE) for _ in range(2)]
    others += [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)]
    counting = subprocess.run([sys.executable, sys.argv[0]], input=b"count", stdout=subprocess.PIPE)
    print(counting.stdout.decode())
    for process in others:
        process.communicate(b"exit")
elif sys.stdin.readline() == "count":
    from handler.threads import count_workers
    print(count_workers())
"""


def test_workers_counted_by_script_among_siblings(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, "parent"], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    "requested, useful, workers, omp_num_threads, expected",
    [
        (0, 100, 1, None, 8),
        (0, 100, 3, None, 2),
        (0, 100, 9, None, 1),
        (0, 5, 1, None, 5),
        (0, 100, 1, "3", None),
        (12, 1, 4, None, 12),
        (12, 1, 4, "3", 12),
    ],
)
def test_worker_inference_threads(cgroups, monkeypatch, requested, useful, workers, omp_num_threads, expected):
    cgroups("0::/\n", {})
    monkeypatch.setattr(threads, "count_workers", lambda: workers)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    assert threads.worker_inference_threads(requested=requested, useful=useful) == expected


def test_workers_not_counted_for_small_model(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delattr(threads, "count_workers")
    assert threads.worker_inference_threads(requested=0, useful=1) == 1


def test_useful_threads_grow_with_model_and_clip():
    assert threads.useful_inference_threads(parameters=10**5, tokens=128) == 1
    assert threads.useful_inference_threads(parameters=88 * 10**6, tokens=3137) == 138  # ViViT-B/16x2


@pytest.mark.parametrize("cores, files, expected", [(64, 1, 16), (8, 1, 8), (8, 3, 2), (8, 9, 1), (8, 0, 8)])
def test_files_share_decoder_threads(cores, files, expected):
    assert threads.decoder_threads_per_file(threads=cores, files=files) == expected

"""How many cores a process takes for its own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler import threads as cores

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """cgroups(text of /proc/self/cgroup, {file: its text}) -> makes Linux say so."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def say(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return say


V1 = "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n"


@pytest.mark.parametrize(
    "own, files, expected",
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
def test_a_quota_counts_as_so_many_cores_rounded_up(cgroups, own, files, expected):
    cgroups(own, files)
    assert cores.available_cores() == expected


def test_where_linux_says_nothing_all_cores_that_the_process_may_run_on_count(cgroups):
    assert cores._quota() == math.inf
    assert cores.available_cores() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken from a process here")
def test_cores_that_are_taken_from_a_process_do_not_count():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from handler.threads import *; "
        "print(available_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "1\n"

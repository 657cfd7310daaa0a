"""Sends thousands of valid and invalid uploads to a server and checks its answers and resources.

    scripts/soak.py --requests 20000
    scripts/soak.py --requests 1000000 --seconds 300 --clients 8 --json soak.json

Half of the uploads are intact files in all accepted containers, 40 % are corrupt like the inputs of scripts/fuzz.py,
9 % are not videos, and 1 % are files whose decoding needs much memory. They are sent over REST, over gRPC and as base64
in JSON. Upload N of a seed is always the same.

The exit status is 0 if every intact file gets the same answer as the first time, every other upload gets a prediction
or an error with a code, no worker exits, and at the end the server has no more open descriptors and temporary files
than at the start, and no decoder process keeps more memory than the pool allows. The growth of memory is reported.
"""

import argparse
import contextlib
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from handler.cli.client import Answer
from handler.cli.server import Server, exit_on_sigterm_or_sighup
from stress.inputs import make_files, make_input, make_memory_hungry_files
from stress.memory import check_growth, growth_bytes
from stress.server import DECODER_SETTINGS, clients, demo_server, is_same_answer, judge_answer
from stress.workload import run_numbered

NOT_VIDEOS = (b"", b"\0", b"hello", b"{", b'{"video": 1}', b'{"video": "?"}', b"#EXTM3U\nfile:///etc/hostname\n")
WARM_UP_SHARE = 0.25  # of the requests: allocators and caches grow, and samples do not count for the slope
SAMPLE_INTERVAL_S = 1.0
IDLE_S = 3.0  # until the server has closed the connections of clients that have disconnected


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, sys.argv by default. Returns the exit status."""
    arguments = parse_arguments(argv)
    exit_on_sigterm_or_sighup()
    with demo_server() as server:
        report = soak(
            server,
            requests=arguments.requests,
            max_seconds=arguments.seconds,
            threads=arguments.clients,
            seed=arguments.seed,
        )
    print(format_report(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for complaint in report["complaints"]:
        print(complaint, file=sys.stderr)
    return 1 if report["complaints"] else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line, sys.argv by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, metavar="N", help="number of requests (default: 5000)")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="stop after S seconds")
    parser.add_argument("--clients", type=int, default=8, metavar="C", help="requests in parallel (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="seed of the uploads (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and samples to FILE")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Sample:
    """Resources of the server's processes at one time.

    Attributes:
        requests: Number of requests answered so far.
        rss_bytes: Resident memory by kind of process: `server` (Java), `worker`, `decoders`.
        decoder_growth_bytes: Growth of the address space of the decoder process that has grown most.
        descriptors: Number of open descriptors by kind of process.
        temporary_files: Number of files in the server's temporary directory.
    """

    requests: int
    rss_bytes: dict[str, int]
    decoder_growth_bytes: int
    descriptors: dict[str, int]
    temporary_files: int

    @classmethod
    def take(cls, server: Server, *, requests: int) -> "Sample":
        """Measures a running server. Raises psutil.NoSuchProcess if a process exits at the same time."""
        kinds = {"server": [server.process], "worker": server.workers(), "decoders": server.decoders()}
        return cls(
            requests=requests,
            rss_bytes={kind: sum(each.memory_info().rss for each in processes) for kind, processes in kinds.items()},
            decoder_growth_bytes=max(growth_bytes(decoder, DECODER_SETTINGS) for decoder in kinds["decoders"]),
            descriptors={kind: sum(each.num_fds() for each in processes) for kind, processes in kinds.items()},
            temporary_files=sum(path.is_file() for path in Path(server.temporary or "").rglob("*")),
        )


class Monitor:
    """Samples a server periodically, as a context manager.

    Attributes:
        answered: Number of requests answered so far, updated by the caller.
        samples: All samples.
    """

    def __init__(self, server: Server):
        self.answered = 0
        self.samples: list[Sample] = []
        self._server = server
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):  # a decoder process was just replaced
                self.samples.append(Sample.take(self._server, requests=self.answered))


class Uploads:
    """Sends the uploads of a seed and counts the outcomes. Thread-safe.

    Attributes:
        outcomes: Number of uploads by (kind, outcome).
        complaints: One sentence for each wrong answer.
    """

    def __init__(self, server: Server, *, seed: int):
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.complaints: list[str] = []
        self._clients = clients(server)
        self._seed = seed
        self._files, self._memory_hungry = make_files(), make_memory_hungry_files()
        self._lock = threading.Lock()
        # The answers without concurrent requests; these requests also warm up the server.
        self._expected: dict[tuple[str, str], Answer] = {
            (client, name): ask(data) for client, ask in self._clients.items() for name, data in self._files.items()
        }
        for (client, name), answer in self._expected.items():
            if answer.error:
                self.complaints.append(f"{name} over {client} was rejected at the start: {answer}")

    def send(self, number: int) -> None:
        """Sends upload `number` and checks the answer."""
        rng = random.Random(f"{self._seed} {number}")
        client = rng.choice(list(self._clients))
        kind = rng.choices(("intact", "corrupt", "not a video", "memory-hungry"), (50, 40, 9, 1))[0]
        if kind == "intact":
            name = rng.choice(list(self._files))
            data = self._files[name]
        elif kind == "corrupt":
            name, data = make_input(self._files, seed=self._seed, number=number)
        elif kind == "memory-hungry":
            name, data = rng.choice(list(self._memory_hungry.items()))
        else:
            data = rng.choice(NOT_VIDEOS)
            name = repr(data)
        answer = self._clients[client](data)
        outcome, is_wrong = judge_answer(answer)
        if kind == "intact" and not is_same_answer(answer, self._expected[client, name]):
            is_wrong = True
            outcome = f"wrong answer: {outcome}"
        with self._lock:
            self.outcomes[kind, outcome] += 1
            if is_wrong:
                self.complaints.append(f"upload {number}, {kind}, {name} over {client}: {outcome}: {answer}")


def soak(
    server: Server, *, requests: int, max_seconds: float = math.inf, threads: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Runs the test against a server with one model. Returns all results; `complaints` lists the failed checks."""
    uploads = Uploads(server, seed=seed)
    workers = {worker.pid for worker in server.workers()}
    time.sleep(IDLE_S)
    started_s = time.monotonic()
    with Monitor(server) as monitor:
        before = Sample.take(server, requests=0)

        def send(number: int) -> None:
            uploads.send(number)
            monitor.answered += 1  # not atomic: approximate

        run_numbered(send, count=requests, max_seconds=max_seconds, threads=threads)
    seconds = time.monotonic() - started_s
    time.sleep(IDLE_S)
    after = Sample.take(server, requests=uploads.outcomes.total())
    complaints = uploads.complaints + check_growth(server.decoders(), DECODER_SETTINGS)
    if workers != {worker.pid for worker in server.workers()}:
        complaints.append("a worker has exited")
    for kind, count in after.descriptors.items():
        if count > before.descriptors[kind]:
            complaints.append(f"{kind}: open descriptors grew from {before.descriptors[kind]} to {count}")
    if after.temporary_files > before.temporary_files:
        complaints.append(f"temporary files grew from {before.temporary_files} to {after.temporary_files}")
    warm = [sample for sample in monitor.samples if sample.requests >= WARM_UP_SHARE * after.requests]
    return {
        "seed": seed,
        "clients": threads,
        "requests": after.requests,
        "seconds": seconds,
        "outcomes": [[*key, count] for key, count in sorted(uploads.outcomes.items())],
        "wrong": len(uploads.complaints),
        "slope_kb_per_1000_requests": {
            kind: memory_slope(warm, kind) if len(warm) > 1 else None for kind in after.rss_bytes
        },
        "before": asdict(before),
        "after": asdict(after),
        "samples": [asdict(sample) for sample in monitor.samples],
        "complaints": complaints,
    }


def memory_slope(samples: Sequence[Sample], kind: str) -> float:
    """Returns the growth of resident memory in kB per 1000 requests, by linear regression."""
    thousands = np.array([sample.requests for sample in samples]) / 1000
    slope, _ = np.polyfit(thousands, [sample.rss_bytes[kind] / 1000 for sample in samples], 1)
    return float(slope)


def format_report(report: dict[str, Any]) -> str:
    """Returns the results as a table."""
    rate = report["requests"] / report["seconds"]
    lines = [
        f"{report['requests']} requests, seed {report['seed']}, {report['clients']} clients, {report['seconds']:.0f} s "
        f"({rate:.0f} per second)"
    ]
    lines += [f"{count:8d}  {kind}: {outcome}" for kind, outcome, count in report["outcomes"]]
    lines += [f"{report['wrong']:8d}  wrong answers", ""]
    lines.append(f"{'':10}{'MB before':>10}{'MB after':>10}{'kB/1000 requests':>18}{'descriptors':>14}")
    before, after = report["before"], report["after"]
    for kind, slope in report["slope_kb_per_1000_requests"].items():
        megabytes = "".join(f"{sample['rss_bytes'][kind] / 1e6:10.1f}" for sample in (before, after))
        descriptors = f"{before['descriptors'][kind]} -> {after['descriptors'][kind]}"
        lines.append(f"{kind:10}{megabytes}{'' if slope is None else f'{slope:+.0f}':>18}{descriptors:>14}")
    growth = [sample["decoder_growth_bytes"] / 1e6 for sample in (before, *report["samples"], after)]
    lines.append(
        f"memory that a decoder process keeps or uses, MB: {growth[0]:.0f} before, up to {max(growth):.0f}, "
        f"{growth[-1]:.0f} after; at most {DECODER_SETTINGS.max_growth_bytes / 1e6:.0f} may be kept"
    )
    lines.append(f"temporary files: {before['temporary_files']} -> {after['temporary_files']}")
    return "\n".join(lines)

#!/usr/bin/env python3
"""Sends a server of its own thousands of uploads, good and bad, and says what it holds on to.

    scripts/soak.py --requests 20000
    scripts/soak.py --requests 1000000 --seconds 300 --clients 8 --json soak.json

Half of the uploads are whole files in all containers that are accepted, 4 of 10 are damaged as scripts/fuzz.py
damages them, and 1 of 10 is no video at all; they go over REST, over gRPC and as base64 in JSON. Upload N of a seed is
always the same one.

The exit status is 0 if every whole file was answered as it was the first time, the workers are those of the start, and
the server has no more open descriptors or temporary files than after the warm-up.
"""

import argparse
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import requests

from handler.cli.server import Server, exit_on_sigterm_or_sighup
from stress.fuzz import (
    ask_grpc,
    ask_json,
    ask_rest,
    demo_server,
    in_threads,
    is_same_answer,
    judge_answer,
    make_files,
    make_input,
    numbers,
)

CLIENTS = {"REST": ask_rest, "gRPC": ask_grpc, "JSON": ask_json}
NO_VIDEOS = (b"", b"\0", b"hello", b"{", b'{"video": 1}', b'{"video": "?"}', b"#EXTM3U\nfile:///etc/hostname\n")
WARM_UP_SHARE = 0.25  # of the requests: until then allocators and caches fill, and no slope is taken
SAMPLE_EVERY_S = 1.0
IDLE_S = 3.0  # in which the server closes the connections of clients that are gone


def main() -> int:
    arguments = parse_arguments()
    exit_on_sigterm_or_sighup()
    report = soak(arguments)
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for complaint in report["complaints"]:
        print(complaint, file=sys.stderr)
    return 1 if report["complaints"] else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S", help="stop after S seconds at the latest"
    )
    parser.add_argument("--clients", type=int, default=8, metavar="C", help="requests at the same time (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="other requests for another seed (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go, the samples too")
    return parser.parse_args()


@dataclass(frozen=True)
class Sample:
    """What the server's processes hold at a moment.

    requests        answered until then
    rss_bytes       resident memory by kind of process: `server` (Java), `worker`, `decoders`
    descriptors     open ones, likewise
    temporary_files in the server's folder for them
    """

    requests: int
    rss_bytes: dict[str, int]
    descriptors: dict[str, int]
    temporary_files: int

    @classmethod
    def of(cls, server: Server, *, requests: int) -> "Sample":
        families = {"server": [server.process], "worker": server.workers(), "decoders": server.decoders()}
        return cls(
            requests=requests,
            rss_bytes={kind: sum(each.memory_info().rss for each in family) for kind, family in families.items()},
            descriptors={kind: sum(each.num_fds() for each in family) for kind, family in families.items()},
            temporary_files=sum(path.is_file() for path in Path(server.temporary).rglob("*")),
        )


class Watch:
    """Samples a server until it is closed."""

    def __init__(self, server: Server):
        self.answered = 0  # counted by whoever sends
        self.samples: list[Sample] = []
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample_again_and_again)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _sample_again_and_again(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            try:
                self.samples.append(Sample.of(self._server, requests=self.answered))
            except psutil.NoSuchProcess:  # a decoder that a file has just killed; the next sample has its successor
                pass


class Uploads:
    """Makes the uploads of a seed, sends them, and counts what became of them."""

    def __init__(self, server: Server, *, seed: int):
        self.outcomes = Counter()
        self.wrong: list[str] = []
        self._server = server
        self._seed = seed
        self._files = make_files()
        self._lock = threading.Lock()
        # The first answers, by the only client; they warm the server up as well.
        self._first = {
            (client, name): ask(server, data) for client, ask in CLIENTS.items() for name, data in self._files.items()
        }
        for (client, name), (status, answer) in self._first.items():
            if "predictions" not in answer:
                self.wrong.append(f"{name} over {client} was refused at once: {status} {answer}")

    def send(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        client = rng.choice(list(CLIENTS))
        kind = rng.choices(("whole", "damaged", "no video"), (5, 4, 1))[0]
        if kind == "whole":
            name = rng.choice(list(self._files))
            data = self._files[name]
        elif kind == "damaged":
            name, data = make_input(self._files, seed=self._seed, number=number)
        else:
            name, data = "no video", rng.choice(NO_VIDEOS)
        try:
            status, answer = CLIENTS[client](self._server, data)
            outcome, _ = judge_answer(status, answer)
        except (requests.RequestException, grpc.RpcError) as error:
            status, answer, outcome = None, {}, f"no answer: {type(error).__name__}"
        complaint = None
        if kind == "whole" and (status, answer) != self._first[client, name]:
            if status is None or not is_same_answer(answer, self._first[client, name][1]):
                complaint = f"upload {number}, {name} over {client}: {outcome}: {answer}"
        with self._lock:
            self.outcomes[kind, "wrong answer" if complaint and "predictions" in answer else outcome] += 1
            if complaint:
                self.wrong.append(complaint)


def soak(arguments: argparse.Namespace) -> dict:
    """All figures of a run; `complaints` has a sentence for everything that must not be."""
    with demo_server() as server:
        uploads = Uploads(server, seed=arguments.seed)
        workers = {worker.pid for worker in server.workers()}
        time.sleep(IDLE_S)
        started_s = time.monotonic()
        with Watch(server) as watch:
            before = Sample.of(server, requests=0)

            def one(number: int) -> None:
                uploads.send(number)
                watch.answered += 1  # off by a few where threads meet, of thousands

            in_threads(one, numbers(arguments.requests, seconds=arguments.seconds), threads=arguments.clients)
        seconds = time.monotonic() - started_s
        time.sleep(IDLE_S)
        after = Sample.of(server, requests=watch.answered)
        complaints = list(uploads.wrong)
        if workers != {worker.pid for worker in server.workers()}:
            complaints.append("a worker has died")
    warm = [sample for sample in watch.samples if sample.requests >= WARM_UP_SHARE * after.requests]
    for kind, count in after.descriptors.items():
        if count > before.descriptors[kind]:
            complaints.append(f"{kind}: {before.descriptors[kind]} descriptors became {count}")
    if after.temporary_files > before.temporary_files:
        complaints.append(f"{before.temporary_files} temporary files became {after.temporary_files}")
    return {
        "seed": arguments.seed,
        "clients": arguments.clients,
        "requests": after.requests,
        "seconds": seconds,
        "outcomes": [[*key, count] for key, count in sorted(uploads.outcomes.items())],
        "wrong": len(uploads.wrong),
        "slope_kb_per_1000_requests": {
            kind: slope_kb(warm, kind) if len(warm) > 1 else None for kind in after.rss_bytes
        },
        "before": asdict(before),
        "after": asdict(after),
        "samples": [asdict(sample) for sample in watch.samples],
        "complaints": complaints,
    }


def slope_kb(samples: Iterable[Sample], kind: str) -> float:
    """Growth of resident memory in KB per 1000 requests: the line with the least squares."""
    thousands = np.array([sample.requests for sample in samples]) / 1000
    slope, _ = np.polyfit(thousands, [sample.rss_bytes[kind] / 1000 for sample in samples], 1)
    return float(slope)


def table(report: dict) -> str:
    rate = report["requests"] / report["seconds"]
    lines = [
        f"{report['requests']} requests, seed {report['seed']}, {report['clients']} clients, in "
        f"{report['seconds']:.0f} s ({rate:.0f} a second)"
    ]
    lines += [f"{count:8d}  {kind}: {outcome}" for kind, outcome, count in report["outcomes"]]
    lines += [f"{report['wrong']:8d}  whole files that got another answer than the first", ""]
    lines.append(f"{'':10}{'MB first':>10}{'MB last':>10}{'KB per 1000 requests':>22}{'descriptors':>14}")
    before, after = report["before"], report["after"]
    for kind, slope in report["slope_kb_per_1000_requests"].items():
        megabytes = "".join(f"{moment['rss_bytes'][kind] / 1e6:10.1f}" for moment in (before, after))
        descriptors = f"{before['descriptors'][kind]} -> {after['descriptors'][kind]}"
        lines.append(f"{kind:10}{megabytes}{'' if slope is None else f'{slope:+.0f}':>22}{descriptors:>14}")
    lines.append(f"temporary files {before['temporary_files']} -> {after['temporary_files']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Sends corrupt videos to the decoder processes or to a real server and checks every result.

    scripts/fuzz.py --target decoder --count 20000    the decoder processes, as a worker uses them
    scripts/fuzz.py --target server --count 2000      TorchServe over REST and gRPC

The inputs are small valid files in all accepted containers. Each has 1 to 16 mutations: bits flipped, integers
overwritten, bytes deleted, duplicated, moved, or copied from another file. Half of the mutations hit the first or last
2000 bytes, which hold headers and indexes. Input N of a seed is always the same. Some inputs are valid files that need
much memory instead.

Every input must get a prediction or an error with a code, and intact files in between must get the same result as at
the start. An input with any other result is a crasher. The run writes it to the --crashers directory as
OUTCOME-SEED-NUMBER-FILE. At the end no decoder process may keep more memory than the pool allows. The exit status is 0
without crashers and complaints, otherwise 1.
"""

import argparse
import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from handler.cli.server import exit_on_sigterm_or_sighup
from handler.clips import Clip, ClipSettings
from handler.options import HandlerOptions
from handler.processing.resize import ResizeCrop
from handler.sandbox import DecoderPool, DecoderSettings
from handler.video import VideoError
from stress.inputs import make_files, make_input, make_memory_hungry_files
from stress.memory import check_growth, growth_bytes
from stress.server import (
    DECODER_SETTINGS,
    FAULT_CODES,
    Outcome,
    clients,
    demo_server,
    is_same_answer,
    judge_answer,
    reveals_internals,
)
from stress.workload import run_numbered

CLIP = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))
CLIP_SHAPE = (1, 8, 3, 32, 32)  # (V, T, C, h, w)
# A small file that takes longer reveals an endless loop.
OPTIONS = HandlerOptions(max_decode_s=10, max_decode_memory_bytes=2**30)

INTACT_EVERY = 50  # inputs between two intact files
MEMORY_HUNGRY_EVERY = 100


class Target(NamedTuple):
    """What is tested.

    Attributes:
        decode: Decodes input (number, data).
        check_intact: Decodes the intact file of a given name. Returns a complaint or None.
        decoders: Returns the decoder processes.
        settings: Their settings.
    """

    decode: Callable[[int, bytes], Outcome]
    check_intact: Callable[[str], str | None]
    decoders: Callable[[], list[psutil.Process]]
    settings: DecoderSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, sys.argv by default. Returns the exit status."""
    arguments = parse_arguments(argv)
    exit_on_sigterm_or_sighup()
    files, memory_hungry = make_files(), make_memory_hungry_files()
    arguments.crashers.mkdir(parents=True, exist_ok=True)
    make_target = decoder_target if arguments.target == "decoder" else server_target
    report = Report(seed=arguments.seed, directory=arguments.crashers)
    with make_target(files, jobs=arguments.jobs) as target:

        def fuzz(number: int) -> None:
            if number % MEMORY_HUNGRY_EVERY < len(memory_hungry):
                name, data = list(memory_hungry.items())[number % MEMORY_HUNGRY_EVERY]
            else:
                name, data = make_input(files, seed=arguments.seed, number=number)
            started_s = time.monotonic()
            outcome = target.decode(number, data)
            report.add(outcome, number=number, name=name, data=data, seconds=time.monotonic() - started_s)
            if number % INTACT_EVERY == 0:
                intact = list(files)[number // INTACT_EVERY % len(files)]
                if complaint := target.check_intact(intact):
                    report.complain(f"intact file {intact}: {complaint}")

        run_numbered(
            fuzz,
            count=arguments.count,
            first=arguments.first,
            max_seconds=arguments.seconds,
            threads=arguments.jobs,
        )
        decoders = target.decoders()
        for complaint in check_growth(decoders, target.settings):
            report.complain(complaint)
        largest = max(growth_bytes(decoder, target.settings) for decoder in decoders)
    report.print()
    print(f"memory that decoder processes keep: at most {largest / 1e6:.0f} MB")
    return 1 if report.crashers else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line, sys.argv by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("decoder", "server"), required=True, help="what to test")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="number of inputs (default: 1000)")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="stop after S seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="seed of the inputs (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="inputs in parallel (default: 2)")
    parser.add_argument(
        "--crashers",
        type=Path,
        default=Path("crashers"),
        metavar="DIR",
        help="directory for the inputs that got no proper result (default: crashers)",
    )
    return parser.parse_args(argv)


class Report:
    """Counts outcomes and saves crashers. Thread-safe.

    Attributes:
        crashers: Number of inputs and other checks without a proper result.
    """

    def __init__(self, *, seed: int, directory: Path):
        self.crashers = 0
        self._seed = seed
        self._directory = directory
        self._outcomes: Counter[str] = Counter()
        self._slowest = (0.0, "none")
        self._started_s = time.monotonic()
        self._lock = threading.Lock()

    def add(self, outcome: Outcome, *, number: int, name: str, data: bytes, seconds: float) -> None:
        """Counts the outcome of a corrupt input."""
        with self._lock:
            self._outcomes[outcome.text] += 1
            self._slowest = max(self._slowest, (seconds, f"input {number}, {name}"))
            if outcome.is_defect:
                self.crashers += 1
                kind = outcome.text.split(":")[0].replace(" ", "_")
                path = self._directory / f"{kind}-{self._seed}-{number}-{name}"
                path.write_bytes(data)
                print(f"{path}: {outcome.text}", flush=True)

    def complain(self, complaint: str) -> None:
        """Counts a failed check that is not due to a single input."""
        with self._lock:
            self.crashers += 1
            print(complaint, flush=True)

    def print(self) -> None:
        """Prints the summary."""
        seconds = time.monotonic() - self._started_s
        total = sum(self._outcomes.values())
        print(f"{total} inputs, seed {self._seed}, {seconds:.0f} s ({total / seconds:.0f} per second)")
        for text, count in self._outcomes.most_common():
            print(f"{count:8d}  {text}")
        print(f"slowest: {self._slowest[0]:.1f} s, {self._slowest[1]}")
        print(f"crashers: {self.crashers}")


@contextlib.contextmanager
def decoder_target(files: dict[str, bytes], *, jobs: int) -> Iterator[Target]:
    """Decodes in a decoder pool, every other input with several decoder threads."""
    # Two processes per job: an even input gets all threads, an odd one is sent with empty files that share them.
    settings = DecoderSettings.from_options(OPTIONS, clip=CLIP)
    pool = DecoderPool(settings, processes=2 * jobs)
    expected = {}
    for name, clip in zip(files, pool.load_clips(list(files.values()))):
        if isinstance(clip, Exception):
            raise RuntimeError(f"cannot decode the intact file {name}") from clip
        expected[name] = clip.pixels

    def decode(number: int, data: bytes) -> Outcome:
        neighbors = [b""] * (2 * jobs - 1) if number % 2 else []
        return judge_clip(pool.load_clips([data, *neighbors])[0])

    def check_intact(name: str) -> str | None:
        (clip,) = pool.load_clips([files[name]])
        if isinstance(clip, Exception):
            return f"{type(clip).__name__}: {clip}"
        return None if np.array_equal(clip.pixels, expected[name]) else "different pixels than at the start"

    try:
        yield Target(decode, check_intact, psutil.Process().children, settings)
    finally:
        pool.close()


@contextlib.contextmanager
def server_target(files: dict[str, bytes], *, jobs: int) -> Iterator[Target]:
    """Sends to a server, alternately over REST, over gRPC and as base64 in JSON."""
    with demo_server() as server:
        by_name = clients(server)
        asks = list(by_name.values())
        expected = {name: by_name["REST"](data) for name, data in files.items()}
        for name, answer in expected.items():
            if answer.error:
                raise RuntimeError(f"cannot classify the intact file {name}: {answer.error}")
        pids = {worker.pid for worker in server.workers()}

        def decode(number: int, data: bytes) -> Outcome:
            return judge_answer(asks[number % len(asks)](data))

        def check_intact(name: str) -> str | None:
            if not pids <= {worker.pid for worker in server.workers()}:
                return "a worker has exited"
            answer = by_name["REST"](files[name])
            return None if is_same_answer(answer, expected[name]) else f"expected {expected[name]}, got {answer}"

        yield Target(decode, check_intact, server.decoders, DECODER_SETTINGS)


def judge_clip(clip: Clip | Exception) -> Outcome:
    """Checks that the result of a decoder process is a plausible clip or an error with a code."""
    if isinstance(clip, VideoError):
        return Outcome(clip.code, is_defect=clip.code in FAULT_CODES or reveals_internals(str(clip)))
    if isinstance(clip, Exception):
        last_line = str(clip).strip().rpartition("\n")[2]
        return Outcome(f"exception: {type(clip).__name__}: {last_line}", is_defect=True)
    times = [clip.info.duration_s, clip.info.fps or 0.0, *clip.times_s]
    if clip.pixels.shape != CLIP_SHAPE or not all(math.isfinite(value) and value >= 0 for value in times):
        return Outcome(f"impossible: pixels {clip.pixels.shape}, times {min(times)} to {max(times)}", is_defect=True)
    return Outcome("answered with a warning" if clip.warnings else "answered", is_defect=False)

#!/usr/bin/env python3
"""Feeds damaged videos to the decoder or to a real server, and says what became of them.

    scripts/fuzz.py --target decoder --count 20000          the decoder processes, as a worker uses them
    scripts/fuzz.py --target server --count 2000            TorchServe, over REST and gRPC, good requests in between

Inputs are small valid files in all containers that are accepted, each with a few bytes flipped, overwritten, cut
out, doubled, moved, or taken from another file; half of the changes hit the first and last 2000 bytes, where headers
and indices are. Input N of a seed is always the same one.

Every input must get an answer or a refusal with a code of its own, and whole files in between must come out as
ever. Anything else is a crasher, written to the folder of --crashers as OUTCOME-SEED-NUMBER-FILE. The exit status is
0 if there is none.
"""

import argparse
import base64
import contextlib
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import requests

ROOT = Path(__file__).resolve().parents[2]

from handler.cli.build import build_archive  # noqa: E402
from handler.cli.client import load_proto, open_channel  # noqa: E402
from handler.cli.server import Server, exit_on_sigterm_or_sighup, on_free_ports, read_properties, write_properties  # noqa: E402
from handler.clips import Clip, ClipSettings  # noqa: E402
from handler.processing.resize import ResizeCrop  # noqa: E402
from handler.sandbox import DecoderPool, DecoderSettings  # noqa: E402
from handler.video import VideoError  # noqa: E402
from synthetic import mutated, numbered_frames, write_clip  # noqa: E402

CHECKPOINT = ROOT / "scripts" / "demo" / "checkpoint"
CLIPS = ROOT / "scripts" / "demo" / "clips"
MODEL = "vivit"

GEOMETRY = ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32))
NUM_FRAMES = 8
DECODE_S = 10  # a small file that is not done by then is one that makes the decoder spin
MEMORY_BYTES = 2**30

PROBE_EVERY = 50  # inputs from one whole file to the next
REFUSALS = (400, 413, 415, 422)
# Of the refusals those that tell of a fault in the decoder. A limit of memory that holds is none.
BAD_CODES = ("decoder_crash", "decode_timeout", "internal_error", "out_of_memory")
ANSWER_TIMEOUT_S = 120

# File name -> what write_clip makes of it; every accepted container, and the codecs that are common in it.
FILES = {
    "h264.mp4": {"options": {"bf": "2", "g": "8"}},
    "header_first.mp4": {"container_options": {"movflags": "faststart"}},
    "fragmented.mp4": {"options": {"g": "8"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "with_sound.mp4": {"audio_codec": "aac"},
    "10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "turned.mp4": {"rotation": 90},
    "varying.mp4": {"pts_ms": [40 * i + i * i % 31 for i in range(16)]},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0:pools=1:keyint=8"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "h263.3gp": {"codec": "h263", "size": (144, 176)},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "h264.mkv": {"options": {"bf": "2", "g": "8"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9_alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "utvideo.avi": {"codec": "utvideo", "pix_fmt": "yuv422p"},
    "raw.avi": {"codec": "rawvideo", "pix_fmt": "bgr24", "count": 3},
    "h264.ts": {"options": {"bf": "2", "g": "8"}},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "h264.flv": {"options": {"g": "8"}},
    "sorenson.flv": {"codec": "flv"},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "wmv2.wmv": {"codec": "wmv2"},
    "vp8.ogg": {"codec": "libvpx", "container_format": "ogg"},
}


def main() -> int:
    arguments = parse_arguments()
    exit_on_sigterm_or_sighup()
    files = make_files()
    arguments.crashers.mkdir(parents=True, exist_ok=True)
    target = fuzz_decoder if arguments.target == "decoder" else fuzz_server
    report = Report(arguments, files)
    with target(files, arguments.jobs) as (ask, probe):
        run(ask, probe, report)
    report.print()
    return 1 if report.crashers else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("decoder", "server"), required=True)
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="inputs (default: 1000)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="S", help="stop after S seconds at the latest"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="other inputs for another seed (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first input (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="inputs at the same time (default: 2)")
    parser.add_argument(
        "--crashers",
        type=Path,
        default=Path("crashers"),
        metavar="DIR",
        help="where inputs that got no proper answer are kept (default: crashers)",
    )
    return parser.parse_args()


def make_files() -> dict[str, bytes]:
    """Name -> bytes of the valid files that are damaged."""
    files = {}
    with tempfile.TemporaryDirectory(prefix="vivit-fuzz-") as folder:
        for name, options in FILES.items():
            options = dict(options)
            height, width = options.pop("size", (48, 64))
            frames = numbered_frames(options.pop("count", 16), height=height, width=width)
            files[name] = write_clip(Path(folder) / name, frames, **options).read_bytes()
    return files


def make_input(files: dict[str, bytes], *, seed: int, number: int) -> tuple[str, bytes]:
    """(the name of a file, its bytes with some damage): input `number` of a seed."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(files))
    return name, mutated(files[name], rng, donors=list(files.values()))


class Report:
    """Counts outcomes and keeps the crashers; all inputs of a run come from here."""

    def __init__(self, arguments: argparse.Namespace, files: dict[str, bytes]):
        self.arguments = arguments
        self.outcomes = Counter()
        self.crashers = 0
        self.slowest = (0.0, "none")
        self.started_s = time.monotonic()
        self._files = files
        self._lock = threading.Lock()

    def input(self, number: int) -> tuple[str, bytes]:
        return make_input(self._files, seed=self.arguments.seed, number=number)

    def add(self, number: int, name: str, data: bytes, outcome: str, is_crasher: bool, took_s: float) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            self.slowest = max(self.slowest, (took_s, f"input {number}, {name}"))
            if is_crasher:
                self.crashers += 1
                kind = outcome.split(":")[0].replace(" ", "_")
                path = self.arguments.crashers / f"{kind}-{self.arguments.seed}-{number}-{name}"
                path.write_bytes(data)
                print(f"{path}: {outcome}", flush=True)

    def add_wrong_probe(self, name: str, what: str) -> None:
        with self._lock:
            self.outcomes["whole file: " + what] += 1
            self.crashers += 1
            print(f"the whole file {name}: {what}", flush=True)

    def print(self) -> None:
        seconds = time.monotonic() - self.started_s
        total = sum(self.outcomes.values())
        print(f"{total} inputs, seed {self.arguments.seed}, in {seconds:.0f} s ({total / seconds:.0f} a second)")
        for outcome, count in self.outcomes.most_common():
            print(f"{count:8d}  {outcome}")
        print(f"slowest: {self.slowest[0]:.1f} s, {self.slowest[1]}")
        print(f"crashers: {self.crashers}")


# What a target offers: ask(number, data) -> (outcome, is it a crasher), and probe() -> a complaint or None.
Ask = Callable[[int, bytes], tuple[str, bool]]
Probe = Callable[[str], str | None]


def run(ask: Ask, probe: Probe, report: Report) -> None:
    def one(number: int) -> None:
        name, data = report.input(number)
        started_s = time.monotonic()
        outcome, is_crasher = ask(number, data)
        report.add(number, name, data, outcome, is_crasher, time.monotonic() - started_s)
        if number % PROBE_EVERY == 0:
            whole = list(FILES)[number // PROBE_EVERY % len(FILES)]
            if complaint := probe(whole):
                report.add_wrong_probe(whole, complaint)

    arguments = report.arguments
    in_threads(one, numbers(arguments.count, first=arguments.first, seconds=arguments.seconds), threads=arguments.jobs)


def numbers(count: int, *, first: int = 0, seconds: float = math.inf) -> Iterator[int]:
    """`count` numbers from `first` on; fewer where so many seconds have passed."""
    end_s = time.monotonic() + seconds
    for number in range(first, first + count):
        if time.monotonic() > end_s:
            return
        yield number


def in_threads(one: Callable[[int], None], numbers: Iterator[int], *, threads: int) -> None:
    """Calls `one` with every number, in several threads."""
    lock = threading.Lock()

    def work() -> None:
        # A thread takes its next number when it is free: `map` would take all of them, and no time limit could stop it.
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            one(number)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()


@contextlib.contextmanager
def fuzz_decoder(files: dict[str, bytes], jobs: int) -> Iterator[tuple[Ask, Probe]]:
    """Through the decoder processes, half of the inputs on one decoder thread and half on several."""
    settings = DecoderSettings(
        clip=ClipSettings(num_frames=NUM_FRAMES, resize_crop=GEOMETRY),
        max_decode_s=DECODE_S,
        max_memory_bytes=MEMORY_BYTES,
    )
    # As many again as jobs, since every other input goes together with a second, empty one: that halves its threads.
    pool = DecoderPool(settings, processes=2 * jobs)
    expected = {name: clip.pixels for name, clip in zip(files, pool.load_clips(list(files.values())))}

    def ask(number: int, data: bytes) -> tuple[str, bool]:
        neighbours = [b""] * (2 * jobs - 1) if number % 2 else []
        return judge(pool.load_clips([data, *neighbours])[0])

    def probe(name: str) -> str | None:
        (clip,) = pool.load_clips([files[name]])
        if isinstance(clip, Exception):
            return f"{type(clip).__name__}: {clip}"
        return None if np.array_equal(clip.pixels, expected[name]) else "other pixels than at the start"

    try:
        yield ask, probe
    finally:
        pool.close()


def judge(clip: Clip | Exception) -> tuple[str, bool]:
    """(outcome, is it a crasher) of what a decoder process gave."""
    if isinstance(clip, VideoError):
        return clip.code, clip.code in BAD_CODES or tells_internals(str(clip))
    if isinstance(clip, Exception):
        return f"exception: {str(clip).strip().splitlines()[-1]}", True
    numbers = [clip.info.duration_s, clip.info.fps, *clip.times_s]
    sound = clip.pixels.shape == (1, NUM_FRAMES, 3, *GEOMETRY.crop_to) and all(map(math.isfinite, numbers))
    if not sound or min(numbers) < 0:
        return "impossible: a shape or a time that cannot be", True
    return ("answered with a warning" if clip.warnings else "answered"), False


def tells_internals(message: str) -> bool:
    return any(word in message for word in (str(ROOT), "/tmp", "Errno", "Traceback", "0x"))


@contextlib.contextmanager
def demo_server(properties: dict[str, str] = {}) -> Iterator[Server]:
    """A server with the demo model and the settings that ship, but for the ports and `properties`."""
    with tempfile.TemporaryDirectory(prefix="vivit-server-") as folder:
        store = Path(folder) / "store"
        build_archive(checkpoint=str(CHECKPOINT), name=MODEL, version="1.0", export_path=store)
        settings = {**on_free_ports(read_properties(ROOT / "config.properties")), **properties}
        config = write_properties(Path(folder) / "config.properties", settings)
        with Server(config=config, model_store=store, directory=Path(folder) / "run") as server:
            server.wait_until_ready(MODEL)
            yield server


@contextlib.contextmanager
def fuzz_server(files: dict[str, bytes], jobs: int) -> Iterator[tuple[Ask, Probe]]:
    """A server of its own, over REST, gRPC and as base64 in JSON in turns."""
    with demo_server() as server:
        clients = (ask_rest, ask_grpc, ask_json)
        expected = {name: ask_rest(server, data)[1] for name, data in files.items()}
        pids = {worker.pid for worker in server.workers()}

        def ask(number: int, data: bytes) -> tuple[str, bool]:
            try:
                return judge_answer(*clients[number % len(clients)](server, data))
            except (requests.RequestException, grpc.RpcError) as error:
                return f"no answer: {type(error).__name__}", True

        def probe(name: str) -> str | None:
            if not pids <= {worker.pid for worker in server.workers()}:
                return "a worker has died"
            got, wanted = ask_rest(server, files[name])[1], expected[name]
            return None if is_same_answer(got, wanted) else f"expected {wanted}, got {got}"

        yield ask, probe


def judge_answer(status: int, answer: dict) -> tuple[str, bool]:
    """(outcome, is it a crasher) of what a server answered; the status of gRPC, which has none, is 0."""
    if "predictions" in answer and status in (0, 200):
        return ("answered with a warning" if answer["warnings"] else "answered"), False
    error = answer.get("error")
    if not isinstance(error, dict):
        return f"{status}: {json.dumps(answer)[:200]}", True
    proper = status in (0, *REFUSALS) and error["code"] not in BAD_CODES
    return f"{status or 'gRPC'} {error['code']}", not proper or tells_internals(error["message"])


def is_same_answer(got: dict, wanted: dict) -> bool:
    """Whether two answers agree, in scores to 1e-4 since batches of other sizes round otherwise."""
    if "predictions" not in got or "predictions" not in wanted:
        return got == wanted
    scores = [{each["label"]: each["score"] for each in answer["predictions"]} for answer in (got, wanted)]
    return (
        got["video"] == wanted["video"]
        and got["warnings"] == wanted["warnings"]
        and scores[0].keys() == scores[1].keys()
        and all(abs(scores[0][label] - scores[1][label]) < 1e-4 for label in scores[0])
    )


def ask_rest(server: Server, data: bytes, *, headers: dict[str, str] = {}) -> tuple[int, dict]:
    """(HTTP status, answer) for a raw body; what is no JSON object comes as {"body": ...}."""
    response = requests.post(
        f"{server.inference_url}/predictions/{MODEL}",
        data=data,
        headers={"Content-Type": "application/octet-stream", **server.headers("inference"), **headers},
        timeout=ANSWER_TIMEOUT_S,
    )
    return response.status_code, read_answer(response.content)


def ask_json(server: Server, data: bytes) -> tuple[int, dict]:
    """(HTTP status, answer) for base64 in JSON."""
    body = json.dumps({"video": base64.b64encode(data).decode()}).encode()
    return ask_rest(server, body, headers={"Content-Type": "application/json"})


def ask_grpc(server: Server, data: bytes) -> tuple[int, dict]:
    """(0, answer) over gRPC."""
    messages, services = load_proto("inference.proto")
    metadata = [(key.lower(), value) for key, value in server.headers("inference").items()]
    with open_channel(server.grpc_inference) as channel:
        response = services.InferenceAPIsServiceStub(channel).Predictions(
            messages.PredictionsRequest(model_name=MODEL, input={"data": data}),
            metadata=metadata,
            timeout=ANSWER_TIMEOUT_S,
        )
    return 0, read_answer(response.prediction)


def read_answer(body: bytes) -> dict:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"body": body[:200].decode(errors="replace")}


if __name__ == "__main__":
    sys.exit(main())

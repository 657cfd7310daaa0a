#!/usr/bin/env python3
"""Classifies videos on a running server, several side by side.

    scripts/classify.py clip.mp4 other.webm                        over REST, http://127.0.0.1:8080
    scripts/classify.py clip.mp4 --grpc 127.0.0.1:7070 --top-k 3   over gRPC

Where the server asks for a token, give the inference key of its key_file.json: --token=KEY, or VIVIT_TOKEN in the
environment. A video that met a full queue, or a worker that ended, is sent again after 1 s, 2 s, 4 s. The exit status
is 0 when every video got an answer, and 1 otherwise.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from handler.cli.client import DEFAULT_URL, classify_grpc, classify_rest, with_retries

MOST_SECONDS = 10**6  # more than anybody waits; sockets count milliseconds in 32 bits


def main() -> int:
    arguments = parse_arguments()
    ask = make_ask(arguments)
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        # On standard error, and only for people: --json and pipes stay clean.
        progress = tqdm(
            pool.map(ask, arguments.videos),
            total=len(arguments.videos),
            unit="video",
            leave=False,
            disable=not sys.stderr.isatty() or len(arguments.videos) == 1,
        )
        answers = list(progress)
    if arguments.json:
        rows = [{"file": str(video), **answer} for video, answer in zip(arguments.videos, answers)]
        print(json.dumps(rows, indent=2))
    else:
        print(table(arguments.videos, answers))
    return 1 if any("error" in answer for answer in answers) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default=DEFAULT_URL, help=f"the REST address (default: {DEFAULT_URL})")
    server.add_argument("--grpc", metavar="ADDRESS", help="the gRPC address, e.g. 127.0.0.1:7070, instead of REST")
    parser.add_argument("--model", default="vivit", metavar="NAME", help="the model's name (default: vivit)")
    parser.add_argument(
        "--top-k", type=whole_number(1), metavar="K", help="predictions a video (default: the server's)"
    )
    parser.add_argument("--token", default=os.environ.get("VIVIT_TOKEN"), help="the server's inference key")
    parser.add_argument(
        "--jobs", type=whole_number(1), default=8, metavar="N", help="videos sent at the same time (default: 8)"
    )
    parser.add_argument("--timeout-s", type=seconds, default=300, metavar="S", help="per video (default: 300)")
    parser.add_argument(
        "--retries", type=whole_number(0), default=3, metavar="N", help="times that a video is sent again (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="print the answers as they came, as a JSON list")
    return parser.parse_args()


def whole_number(least: int) -> Callable[[str], int]:
    """For argparse: reads a whole number that is `least` or more."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more; got {text!r}")
        return value

    return read


def seconds(text: str) -> float:
    """For argparse: reads a time that one can wait."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to {MOST_SECONDS}; got {text!r}")
    return value


def make_ask(arguments: argparse.Namespace) -> Callable[[Path], dict]:
    options = {
        "model": arguments.model,
        "parameters": {} if arguments.top_k is None else {"top_k": arguments.top_k},
        "token": arguments.token,
        "timeout_s": arguments.timeout_s,
    }
    if arguments.grpc:
        ask = partial(classify_grpc, address=arguments.grpc, **options)
    else:
        ask = partial(classify_rest, url=arguments.url, **options)
    return lambda video: with_retries(partial(ask, video), retries=arguments.retries).body


def table(videos: list[Path], answers: list[dict]) -> str:
    """A line a video for people: its best labels and their scores, or why there are none."""
    width = max(len(video.name) for video in videos)
    return "\n".join(one_line(f"{video.name:<{width}}  {_line(answer)}") for video, answer in zip(videos, answers))


def one_line(text: str) -> str:
    """Lines as one: gRPC's own messages may have several."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def _line(answer: dict) -> str:
    if "error" in answer:
        return f"{answer['error']['code']}: {answer['error']['message']}"
    best = ", ".join(f"{each['label']} {each['score']:.1%}" for each in answer["predictions"])
    return "  ".join([best, *(f"[{warning}]" for warning in answer["warnings"])])


if __name__ == "__main__":
    sys.exit(main())

"""Classifies videos on a running server, or without one, several in parallel.

    vivit classify clip.mp4 folder/                           over REST, http://127.0.0.1:8080
    vivit classify clip.mp4 --grpc 127.0.0.1:7070 --top-k 3   over gRPC
    ffmpeg ... -f matroska - | vivit classify -               from standard input
    vivit classify clip.mp4 --checkpoint DIRECTORY            without a server
    vivit classify clip.mp4 --explain --plot heat.png         what supports the label, drawn over the frames

A folder means all files below it that are not hidden. Answers are printed in the order of the videos, each as soon as
it and all answers before it have arrived. Errors on the server's side (500, 502, 503 and 507: a full queue, a worker
that was stopped) are retried after 1 s, 2 s and 4 s.

The inference key comes from --token, VIVIT_TOKEN, the file $VIVIT_KEY_FILE or, only for a server on this machine, the
newest of ./key_file.json, ./.server/key_file.json and the files that `vivit serve` writes.

Without a server, videos are decoded in separate processes and classified in this one, on a GPU if torch finds one. A
server is faster for many calls, because its workers have loaded the model.

The exit status is 0 if every video was classified, 1 if not, and 130 after Ctrl-C.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from handler.cli.client import (
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    Answer,
    Call,
    MissingPackageError,
    classify_grpc,
    classify_rest,
    failure,
    require,
    with_retries,
)
from handler.cli.command import VIEW_ARGUMENTS, CommandError, add_view_arguments, given, integer
from handler.cli.keys import find_key

STDIN = "-"
MAX_TIMEOUT_S = 10**6  # sockets count milliseconds in 32 bits
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
REJECTED_KEY_CODES = ("InvalidKeyException", "permission_denied")
INTERRUPTED_STATUS = 130
PART_ARGUMENTS = ("start_s", "end_s")
PLOT_SUFFIXES = (".png", ".gif", ".mp4")

Ask = Callable[[str], Answer]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program name; sys.argv if None.

    Returns:
        The exit status.
    """
    arguments = parse_arguments(argv)
    try:
        return classify(arguments)
    except (MissingPackageError, CommandError) as error:
        _note(str(error))
        return 1
    except KeyboardInterrupt:  # before the first request
        return INTERRUPTED_STATUS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Exits with status 2 if it is invalid."""
    parser = argparse.ArgumentParser(
        prog="vivit classify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="a file, a folder, or - for standard input")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default=DEFAULT_URL, help="REST address (default: %(default)s)")
    server.add_argument("--grpc", metavar="ADDRESS", help="use gRPC at this address, e.g. 127.0.0.1:7070")
    server.add_argument(
        "--checkpoint",
        metavar="MODEL",
        help="classify without a server: a checkpoint (directory or hub id), an archive (.mar) or `demo`",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME", help="model, or MODEL/VERSION (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=integer(minimum=1), metavar="K", help="predictions per video (default: the server's)"
    )
    views = add_view_arguments(parser, default="what the server's options say")
    views.add_argument("--start-s", type=_time_s, metavar="S", help="use frames from this time on, in seconds")
    views.add_argument("--end-s", type=_time_s, metavar="S", help="use frames before this time, in seconds")
    parser.add_argument("--token", default=os.environ.get("VIVIT_TOKEN"), help="the server's inference key")
    parser.add_argument(
        "--jobs", type=integer(minimum=1), default=8, metavar="N", help="requests in parallel (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout-s",
        type=_timeout_s,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds to wait for an answer (default: %(default)g)",
    )
    parser.add_argument(
        "--retries",
        type=integer(minimum=0),
        default=3,
        metavar="N",
        help="retries after a transient error (default: %(default)s)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print all answers as one JSON list at the end")
    output.add_argument("--jsonl", action="store_true", help="print each answer as a line of JSON when it arrives")
    parser.add_argument("--explain", action="store_true", help="compute which parts of the videos support a label")
    parser.add_argument("--label", help="what to explain (default: the best prediction)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the explanation of one video: a .png, .gif or .mp4",
    )
    arguments = parser.parse_args(argv)
    if not arguments.explain and (arguments.label is not None or arguments.plot is not None):
        parser.error("--label and --plot require --explain")
    if arguments.explain and arguments.views:
        parser.error("--views requires predictions: an explanation is of one view")
    if arguments.explain and arguments.grpc:
        parser.error("--explain requires --url or --checkpoint: TorchServe has no explanations over gRPC")
    if arguments.plot is not None and arguments.plot.suffix not in PLOT_SUFFIXES:
        parser.error(f"--plot takes a file with one of the suffixes {', '.join(PLOT_SUFFIXES)}, got {arguments.plot}")
    if arguments.videos.count(STDIN) > 1:
        parser.error("expected - at most once, because it reads all of standard input")
    return arguments


def classify(arguments: argparse.Namespace) -> int:
    """Classifies the videos, prints the answers and returns the exit status.

    After Ctrl-C it prints the answers that have arrived, and how many are missing.

    Raises:
        MissingPackageError: a package that the client needs is not installed.
        CommandError: the model of `--checkpoint` cannot be used.
    """
    videos = find_videos(arguments.videos)
    if arguments.plot is not None and len(videos) != 1:
        raise CommandError(f"--plot draws one video, got {len(videos)}")
    if arguments.checkpoint is None:
        return _classify_all(videos, _make_ask(arguments, videos, send=_make_send(arguments)), arguments)
    from handler.cli.local import LocalClassifier  # imports libraries that the client of a server does not need

    with LocalClassifier(
        arguments.checkpoint,
        videos=min(arguments.jobs, len(videos)),
        top_k=arguments.top_k,
        explain=arguments.explain,
        label=arguments.label,
        views=given(arguments, (*VIEW_ARGUMENTS, *PART_ARGUMENTS)),
    ) as classifier:
        return _classify_all(videos, _make_ask(arguments, videos, send=classifier.classify), arguments)


def _classify_all(videos: list[str], ask: Ask, arguments: argparse.Namespace) -> int:
    futures = _submit_all(ask, videos, jobs=arguments.jobs)
    video_of = dict(zip(futures, videos))
    names = _display_names(videos)
    width = max(map(len, names.values()))

    def print_answer(future: Future[Answer]) -> None:
        video, body = video_of[future], future.result().body
        if arguments.jsonl:
            print(json.dumps({"file": video, **body}), flush=True)
        elif not arguments.json:
            print(one_line(f"{names[video]:<{width}}  {_summary(body)}"), flush=True)

    unprinted = set(futures)
    with contextlib.suppress(KeyboardInterrupt):
        for future in _with_progress(
            concurrent.futures.as_completed(futures) if arguments.jsonl else futures, arguments, total=len(videos)
        ):
            print_answer(future)
            unprinted.remove(future)
    finished = [future for future in futures if future.done()]  # all of them unless interrupted
    for future in finished:
        if future in unprinted:
            print_answer(future)
    if arguments.json:
        print(json.dumps([{"file": video_of[future], **future.result().body} for future in finished], indent=2))
    errors = [future.result().error for future in finished]
    if any(error is not None and error["code"] in REJECTED_KEY_CODES for error in errors):
        _note("the server rejected the key: pass the inference key of its key_file.json with --token or VIVIT_TOKEN")
    if missing := len(videos) - len(finished):
        _note(f"interrupted: {missing} of {len(videos)} videos have no answer")
        return INTERRUPTED_STATUS
    return 1 if any(errors) else 0


def find_videos(paths: Iterable[str]) -> list[str]:
    """Replaces each folder by the files below it that are not hidden, in alphabetical order.

    A folder without such files remains in the list.
    """
    videos: list[str] = []
    for path in paths:
        folder = Path(path)
        if path == STDIN or not folder.is_dir():
            videos.append(path)
            continue
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_hidden(file, below=folder)]
        videos.extend(map(str, files) if files else [path])
    return videos


def one_line(text: str) -> str:
    """Joins the lines of a text with spaces; gRPC's messages may have several lines."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def _make_send(arguments: argparse.Namespace) -> Callable[[bytes | str], Answer]:
    """Returns the function that sends one video to a server."""
    options: dict[str, Any] = {
        "model": arguments.model,
        "parameters": given(arguments, ("top_k", "label", *VIEW_ARGUMENTS, *PART_ARGUMENTS)),
        "token": arguments.token or _find_key_for(arguments.grpc or arguments.url),
        "timeout_s": arguments.timeout_s,
    }
    if arguments.grpc:
        return partial(classify_grpc, address=arguments.grpc, **options)
    call: Call = "explanations" if arguments.explain else "predictions"
    return partial(classify_rest, url=arguments.url, call=call, **options)


def _make_ask(arguments: argparse.Namespace, videos: list[str], *, send: Callable[[bytes | str], Answer]) -> Ask:
    """Returns the function that classifies one video as the arguments specify."""
    retries = arguments.retries if arguments.checkpoint is None else 0
    stdin = sys.stdin.buffer.read() if STDIN in videos else b""

    def ask(video: str) -> Answer:
        if video != STDIN and Path(video).is_dir():
            return failure("no_file", f"expected a file or a folder with files, got a folder without any: {video}")
        source = stdin if video == STDIN else video
        answer = with_retries(lambda: send(source), retries=retries)
        if arguments.plot is not None and answer.error is None:
            from handler.cli.explanation_plot import plot_explanation  # PyAV and NumPy, which the client does not need

            plot_explanation(source, answer.body, arguments.plot)
        return answer

    return ask


def _find_key_for(address: str) -> str | None:
    """Returns the inference key for the server at this address, or None if no key file has one."""
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname
    except ValueError:  # an invalid address, which the request reports
        return None
    return find_key("inference", is_local=host in LOOPBACK_HOSTS)


def _submit_all(ask: Ask, videos: list[str], *, jobs: int) -> list[Future[Answer]]:
    """Calls `ask` for each video in daemon threads: after Ctrl-C the program does not wait for them to finish."""
    futures: list[Future[Answer]] = [Future() for _ in videos]
    pending = iter(zip(futures, videos))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                future, video = next(pending, (None, ""))
            if future is None:
                return
            try:
                future.set_result(ask(video))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(min(jobs, len(videos))):
        threading.Thread(target=work, daemon=True).start()
    return futures


def _with_progress(
    futures: Iterable[Future[Answer]], arguments: argparse.Namespace, *, total: int
) -> Iterable[Future[Answer]]:
    """Adds a progress bar if standard error is a terminal, unless answers are printed to a terminal as well."""
    prints_to_terminal = sys.stdout.isatty() and not arguments.json
    if total == 1 or prints_to_terminal or not sys.stderr.isatty():
        return futures
    progress: Iterable[Future[Answer]] = require("tqdm").tqdm(futures, total=total, unit="video", leave=False)
    return progress


def _display_names(videos: list[str]) -> dict[str, str]:
    """Video -> its file name, or its path where several have the same name."""
    counts = Counter(Path(video).name for video in videos)
    return {video: Path(video).name if counts[Path(video).name] == 1 else video for video in videos}


def _summary(body: dict[str, Any]) -> str:
    if "error" in body:
        return f"{body['error']['code']}: {body['error']['message']}"
    views = [f"[{body['agreement']:.0%} of {len(body['views'])} views agree]"] if "views" in body else []
    heads = [f"{name}: {_scores(best)}" for name, best in body.get("heads", {}).items()]
    explanation = [_explanation_summary(body["explanation"])] if "explanation" in body else []
    warnings = [f"[{warning}]" for warning in body["warnings"]]
    return "  ".join([_scores(body["predictions"]), *heads, *views, *explanation, *warnings])


def _explanation_summary(explanation: dict[str, Any]) -> str:
    best = max(explanation["time_steps"], key=lambda step: step["score"])
    return f"({explanation['label']}: {best['score']:.0%} of the heat at {best['time_s']:.1f} s)"


def _scores(predictions: list[dict[str, Any]]) -> str:
    return ", ".join(f"{each['label']} {each['score']:.1%}" for each in predictions)


def _is_hidden(file: Path, *, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _note(text: str) -> None:
    print(f"vivit classify: {text}", file=sys.stderr)


def _time_s(text: str) -> float:
    """An argparse type: a time in a video."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text!r}")
    return value


def _timeout_s(text: str) -> float:
    """An argparse type: a number of seconds that a socket can wait."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"must be a number > 0 and <= {MAX_TIMEOUT_S}, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())

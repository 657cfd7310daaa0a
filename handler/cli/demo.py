#!/usr/bin/env python3
"""Serves the demo model with TorchServe, classifies the bundled clips over REST and gRPC, and prints what came.

The server then runs until Ctrl-C; with --once it is stopped. The exit status is 0 if every answer was right.
"""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from handler.assets import DEMO_CHECKPOINT as CHECKPOINT
from handler.assets import DEMO_CLIPS as CLIPS
from handler.assets import SERVER_CONFIG
from handler.cli.classify import one_line
from handler.cli.client import classify_grpc, classify_rest
from handler.cli.server import Server, ServerError, exit_on_sigterm_or_sighup

# A store of its own, so that an archive of yours with the same name stays untouched.
STORE = Path("model_store", "demo")
NAME, VERSION = "vivit", "1.0"


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server when the clips are classified")
    once = parser.parse_args().once
    exit_on_sigterm_or_sighup()
    # TorchServe's own variable for a configuration elsewhere, e.g. on other ports.
    config = Path(os.environ.get("TS_CONFIG_FILE", SERVER_CONFIG))
    try:
        server = Server(config=config, model_store=STORE, directory=Path(".server"))
        build_demo_archive()
        print("starting TorchServe ...", flush=True)
        with server:
            server.wait_until_ready(NAME)
            right = classify_bundled_clips(server)
            if not once:
                print_next_steps(server)
                wait_for_interrupt()
    except ServerError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if right else 1


def build_demo_archive() -> None:
    """Builds model_store/demo/vivit.mar unless it is newer than everything that goes into it."""
    archive = STORE / f"{NAME}.mar"
    sources = [*CHECKPOINT.iterdir(), *Path(__file__).parents[1].rglob("*.py")]
    if archive.exists() and archive.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return
    from handler.cli.build import build_archive  # imports torch: not on a run that builds nothing

    print("building the demo archive ...", flush=True)
    build_archive(checkpoint=str(CHECKPOINT), name=NAME, version=VERSION, export_path=STORE, force=True)


def classify_bundled_clips(server: Server) -> bool:
    """Prints a table of both APIs' answers; True if the best label of each is the one in the file's name."""
    token = server.token("inference")
    rows, right = [], True
    for clip in sorted(CLIPS.iterdir()):
        expected = clip.stem.replace("-", " ")
        answers = {
            "REST": classify_rest(clip, url=server.inference_url, model=NAME, token=token).body,
            "gRPC": classify_grpc(clip, address=server.grpc_inference, model=NAME, token=token).body,
        }
        for api, answer in answers.items():
            if "error" in answer:
                label, score, good = one_line(answer["error"]["message"]), "", False
            else:
                best = answer["predictions"][0]
                label, score, good = best["label"], f"{best['score']:.1%}", best["label"] == expected
            rows.append((clip.name, api, label, score, "right" if good else f"WRONG, expected {expected}"))
            right &= good
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for row in rows:
        print("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[4]]))
    print(f"\n{sum(row[4] == 'right' for row in rows)} of {len(rows)} answers are right.")
    return right


def print_next_steps(server: Server) -> None:
    clip = sorted(CLIPS.iterdir())[0]
    header = "".join(f" -H {shlex.quote(f'{key}: {value}')}" for key, value in server.headers("inference").items())
    url = f"{server.inference_url}/predictions/{NAME}"
    print(
        f"""
TorchServe is running. Try in another terminal:

  curl{header} -H 'X-Top-K: 3' -T {shlex.quote(str(clip))} {url}

Its logs and its tokens (key_file.json) are in {server.directory}. Ctrl-C stops it.""",
        flush=True,
    )


def wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        print("\nstopping TorchServe ...")


if __name__ == "__main__":
    sys.exit(main())

"""Serves the demo model and classifies the bundled clips over REST and gRPC.

The server then runs until Ctrl-C; with --once it stops. The exit status is 0 if every answer is correct, otherwise 1.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS
from handler.cli.archives import build_if_outdated
from handler.cli.client import DEFAULT_MODEL, classify_grpc, classify_rest
from handler.cli.command import run_command
from handler.cli.serve import (
    DEFAULT_VERSION,
    DEMO,
    add_server_arguments,
    print_usage,
    running,
    server_directory,
    wait_for_interrupt,
)
from handler.cli.server import Server, exit_on_sigterm_or_sighup

COLUMN = 32
LINE_WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit demo ARGV` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vivit demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--once", action="store_true", help="stop the server after classifying the clips")
    add_server_arguments(parser)
    arguments = parser.parse_args(argv)
    exit_on_sigterm_or_sighup()
    return run_command("demo", lambda: demo(arguments))


def demo(arguments: argparse.Namespace) -> int:
    """Runs the demo and returns 0 if every answer is correct, otherwise 1."""
    directory = server_directory(arguments, name=DEMO)
    archive = build_if_outdated(
        checkpoint=str(DEMO_CHECKPOINT),
        name=DEFAULT_MODEL,
        version=DEFAULT_VERSION,
        model_store=arguments.model_store or directory / "model_store",
    )
    with running(archive, directory=directory, arguments=arguments) as server:
        all_correct = classify_bundled_clips(server)
        print_labels()
        if not arguments.once:
            print_usage(server, archive, sample=str(sorted(DEMO_CLIPS.iterdir())[0]))
            wait_for_interrupt(server, max_unhealthy_s=arguments.exit_when_unhealthy)
    return 0 if all_correct else 1


def classify_bundled_clips(server: Server) -> bool:
    """Prints what both APIs answer for each clip, and returns whether all answers are the label in the file's name."""
    token = server.token("inference")
    clips = sorted(DEMO_CLIPS.iterdir())
    width = max(len(clip.name) for clip in clips)
    correct = 0
    print(f"\n{'clip':<{width}}  {'REST':<{COLUMN}}{'gRPC':<{COLUMN}}")
    for clip in clips:
        expected = clip.stem.replace("-", " ")
        answers = (
            classify_rest(clip, url=server.inference_url, model=DEFAULT_MODEL, token=token).body,
            classify_grpc(clip, address=server.grpc_inference, model=DEFAULT_MODEL, token=token).body,
        )
        are_correct = [_best_label(answer) == expected for answer in answers]
        correct += sum(are_correct)
        verdict = "correct" if all(are_correct) else f"WRONG, expected {expected}"
        print(
            f"{clip.name:<{width}}  {''.join(f'{_summary(answer):<{COLUMN}}' for answer in answers)}{verdict}",
            flush=True,
        )
    print(f"\n{correct} of {2 * len(clips)} answers are right.")
    return correct == 2 * len(clips)


def print_labels() -> None:
    """Prints what the demo model can recognize."""
    labels = json.loads((DEMO_CHECKPOINT / "config.json").read_text())["id2label"].values()
    text = f"The demo model recognizes {len(labels)} motions: {', '.join(labels)}."
    print("\n" + textwrap.fill(text, width=LINE_WIDTH))
    print("It is a toy: whatever a video shows, its answer is one of these.")


def _best_label(answer: dict[str, Any]) -> str | None:
    return None if "error" in answer else answer["predictions"][0]["label"]


def _summary(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return " ".join(str(answer["error"]["message"]).split())
    best = answer["predictions"][0]
    return f"{best['label']} {best['score']:.1%}"


if __name__ == "__main__":
    sys.exit(main())

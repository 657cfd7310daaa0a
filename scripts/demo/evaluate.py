#!/usr/bin/env python3
"""Measures a checkpoint's accuracy on clips it was not trained on, through video files and the serving pipeline.

    scripts/demo/evaluate.py --clips 1800                  clips of the training renderer with other, harder settings
    scripts/demo/evaluate.py --independent --clips 810     clips of a renderer that shares no code with it

The first kind uses other seeds, shapes, textures and ranges than training (EVALUATION in scenes.py), 8 to 60 frames
per second, 0.5 to 8 seconds, and up to 1280 pixels.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from demo import independent_renderer
from demo.encoding import Encoding, encode, sample_encoding
from demo.motions import LABELS, render
from demo.scenes import EVALUATION, SAMPLED_FRAMES, sample_scene
from handler.classifier import VideoClassifier
from tables import format_table

DEFAULT_SEED = 1_000_003  # not used in training
MAX_PIXELS = 20_000_000  # in all frames of a clip; more would take seconds to draw
INDEPENDENT_ENCODINGS = (
    Encoding("mp4", "libx264"),
    Encoding("webm", "libvpx", (("deadline", "realtime"), ("cpu-used", "8"))),
    Encoding("matroska", "libvpx-vp9", (("deadline", "realtime"), ("cpu-used", "8"))),
)


@dataclass(frozen=True)
class LabeledClip:
    """A clip to classify.

    Attributes:
        video: The bytes of a video file.
        label: Its correct label.
        kinds: Codec, container and style of the clip; the report has a row for each.
    """

    video: bytes
    label: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """The correct and the predicted label of a clip."""

    label: str
    predicted: str
    kinds: tuple[str, ...]

    @property
    def is_correct(self) -> bool:
        return self.label == self.predicted


def draw_evaluation_clip(seed: int, number: int) -> LabeledClip:
    """Draws clip `number` with the training renderer; the labels alternate."""
    rng = np.random.default_rng((seed, number))
    label = LABELS[number % len(LABELS)]
    fps = int(rng.choice([8, 10, 12, 15, 24, 25, 30, 50, 60]))
    duration_s = math.exp(rng.uniform(math.log(0.5), math.log(8)))
    frame_count = max(4, round(fps * duration_s))
    scene = sample_scene(rng, label=label, settings=EVALUATION, frames=min(frame_count, SAMPLED_FRAMES))
    longer_side = int(math.exp(rng.uniform(math.log(64), math.log(1280))))
    longer_side = min(longer_side, int(math.sqrt(MAX_PIXELS / frame_count)))
    ratio = scene.aspect
    width, height = (longer_side, longer_side / ratio) if ratio >= 1 else (longer_side * ratio, longer_side)
    width, height = (max(32, 2 * round(side / 2)) for side in (width, height))
    encoding = sample_encoding(rng)
    frames = render(scene, np.arange(frame_count) / (frame_count - 1), height=height, width=width)
    style = f"{len(scene.objects) or 'no'} object(s)"
    return LabeledClip(encode(frames, encoding=encoding, fps=fps), label, (encoding.codec, encoding.container, style))


def draw_independent_clip(seed: int, number: int) -> LabeledClip:
    """Draws clip `number` with the independent renderer; labels, styles and encodings alternate."""
    styles = independent_renderer.PLAIN_STYLES + independent_renderer.HARD_STYLES
    label, style = LABELS[number % len(LABELS)], styles[number // len(LABELS) % len(styles)]
    encoding = INDEPENDENT_ENCODINGS[number % len(INDEPENDENT_ENCODINGS)]
    frames = independent_renderer.draw(label, style, f"{seed} {number}")
    fps = (25, 30)[number % 2]
    return LabeledClip(encode(frames, encoding=encoding, fps=fps), label, (encoding.codec, encoding.container, style))


def evaluate(
    classifier: VideoClassifier, *, draw: Callable[[int, int], LabeledClip], seed: int, count: int
) -> list[Result]:
    """Classifies clips 0 to count - 1 of `draw(seed, number)`."""
    results = []
    for number in range(count):
        clip = draw(seed, number)
        predicted, _ = classifier.classify(clip.video, top_k=1).predictions[0]
        results.append(Result(clip.label, predicted, clip.kinds))
    return results


def report(results: list[Result]) -> str:
    """Formats the accuracy overall, by label with the confusions, and by kind of clip."""
    kinds = sorted({kind for result in results for kind in result.kinds})
    label_rows = [_accuracy_row(label, [r for r in results if r.label == label]) for label in LABELS]
    kind_rows = [_accuracy_row(kind, [r for r in results if kind in r.kinds]) for kind in kinds]
    columns = (("correct", "{share:.1%}"), ("clips", "{clips}"))
    tables = (
        format_table((("label", "{name}"), *columns, ("confused with", "{confusions}")), label_rows),
        format_table((("kind of clip", "{name}"), *columns), kind_rows),
    )
    correct = sum(result.is_correct for result in results)
    summary = f"{correct} of {len(results)} correct: {correct / len(results):.1%}"
    return "\n\n".join((summary, *tables))


def _accuracy_row(name: str, results: list[Result]) -> dict[str, object]:
    """A row of a table; labels without clips have no share."""
    wrong = [result.predicted for result in results if not result.is_correct]
    confusions = ", ".join(f"{label} ({wrong.count(label)})" for label in LABELS if label in wrong)
    share = 1 - len(wrong) / len(results) if results else None
    return {"name": name, "share": share, "clips": len(results), "confusions": confusions or None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(__file__).parent / "checkpoint",
        metavar="DIR",
        help="default: scripts/demo/checkpoint",
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help=f"default: {DEFAULT_SEED}")
    parser.add_argument("--clips", type=int, default=1800, metavar="N", help="clips to classify (default: 1800)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="torch threads (default: 2)")
    parser.add_argument("--independent", action="store_true", help="use the independent renderer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = VideoClassifier.from_pretrained(options.checkpoint)
    draw = draw_independent_clip if options.independent else draw_evaluation_clip
    print(report(evaluate(classifier, draw=draw, seed=options.seed, count=options.clips)))


if __name__ == "__main__":
    main()

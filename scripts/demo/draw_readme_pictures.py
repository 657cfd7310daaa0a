#!/usr/bin/env python3
"""Draws the images of the README.

scripts/demo/draw_readme_pictures.py                      classified-clips.png: frames, labels and scores
scripts/benchmark.py serve --size demo --json FILE
scripts/demo/draw_readme_pictures.py --serve-json FILE    also throughput.png: this project and a transformers handler
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
import json

import numpy as np
from matplotlib.figure import Figure

from benchmarks.plots import INK, PALETTE
from benchmarks.serve import TABLE, TRANSFORMERS
from benchmarks.timing import OURS, Spread
from handler.classifier import VideoClassifier
from handler.video import decode_frames, sample_uniform

DEMO = Path(__file__).parent
CLIPS = ("turning-clockwise.mp4", "moving-left.mp4")
FRAMES_SHOWN = 7
LABELS_SHOWN = 3
BLUE, GRAY, PALE = PALETTE[0], "#B8B8B8", "#EEF2F6"


def draw_classified_clips(classifier: VideoClassifier, files: list[Path]) -> Figure:
    """Draws a row per clip: frames that the model saw with their times, the best labels and their scores."""
    figure = Figure(figsize=(10, 0.2 + 1.5 * len(files)))
    # Explicit margins: constrained layout would widen the first column for the title above it.
    strips = figure.add_gridspec(
        len(files), FRAMES_SHOWN, left=0.005, right=0.695, top=0.93, bottom=0.05, wspace=0.07, hspace=0.35
    )
    scores = figure.add_gridspec(len(files), 1, left=0.72, right=0.995, top=0.99, bottom=0.03, hspace=0.1)
    for row, file in enumerate(files):
        result = classifier.classify(file, top_k=LABELS_SHOWN)
        sampled = sample_uniform(result.clip.info.frame_count, len(result.clip.times_s))  # (T,)
        shown = np.linspace(0, len(sampled) - 1, FRAMES_SHOWN).round().astype(int)
        frames = decode_frames(file, sampled[shown])
        for column, (frame, position) in enumerate(zip(frames, shown)):
            axes = figure.add_subplot(strips[row, column])
            axes.imshow(frame, interpolation="bilinear")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{result.clip.times_s[position]:.1f} s", fontsize=9, color=INK)
            for spine in axes.spines.values():
                spine.set_color(GRAY)
            if column == 0:
                axes.set_title(file.name, fontsize=11, loc="left", color=INK, family="monospace")
        draw_scores(figure.add_subplot(scores[row, 0]), result.predictions)
    return figure


def draw_scores(axes, predictions) -> None:
    """Draws labels with their scores as bars."""
    for position, (label, score) in enumerate(predictions):
        weight = "bold" if position == 0 else "normal"
        axes.barh(position, 1, height=0.36, color=PALE)
        axes.barh(position, score, height=0.36, color=BLUE if position == 0 else GRAY)
        axes.text(0, position - 0.27, label, fontsize=10, color=INK, weight=weight, va="bottom")
        axes.text(1, position - 0.27, f"{score:.1%}", fontsize=10, color=INK, weight=weight, va="bottom", ha="right")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(predictions) - 0.5, -0.8)
    axes.set_axis_off()


def draw_throughput(report: dict) -> Figure:
    """Draws bars of the clips/s that `benchmark.py serve` measured, by number of clients.

    Args:
        report: The JSON that the benchmark wrote.
    """
    names = {OURS: "this project", TRANSFORMERS: "transformers handler"}
    colors = {OURS: BLUE, TRANSFORMERS: GRAY}
    rows = report["tables"][TABLE]
    clients = sorted({row["clients"] for row in rows})
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        spread = Spread.from_row(row, "clips", "per_s")
        position = clients.index(row["clients"]) + (-0.2 if row["handler"] == OURS else 0.2)
        is_first = row["clients"] == clients[0]
        axes.barh(
            position,
            spread.median,
            height=0.38,
            color=colors[row["handler"]],
            label=names[row["handler"]] if is_first else None,
        )
        text = f"{spread.median:.1f}"
        if row["handler"] == OURS:
            text += f"   {row_factor(rows, row['clients']):.1f}x"
        axes.text(spread.median, position, f"  {text}", va="center", fontsize=10, color=INK)
    axes.set_yticks(range(len(clients)), [f"{n} client{'s' if n > 1 else ''}" for n in clients], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(row["clips_per_s"] for row in rows))
    axes.set_xlabel("videos per second (higher is better)", fontsize=10, color=INK)
    axes.set_title("Throughput of TorchServe with the demo model", fontsize=12, loc="left", color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="upper right", fontsize=10, frameon=False)
    machine = report["machine"]
    settings = report["settings"]
    heights = ", ".join(f"{height}p" for height in settings["heights"])
    figure.supxlabel(
        f"{settings['workers']} workers on {machine['cores_available']} cores of {machine['cpu']}, "
        f"{settings['seconds_a_clip']:g} s videos in {heights}",
        fontsize=8,
        color="#666666",
    )
    return figure


def row_factor(rows: list[dict], clients: int) -> float:
    """Returns our throughput divided by that of the transformers handler."""
    return next(row["ours_factor"] for row in rows if (row["handler"], row["clients"]) == (TRANSFORMERS, clients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve-json", type=Path, metavar="FILE", help="JSON of `scripts/benchmark.py serve`")
    parser.add_argument("--output", type=Path, default=DEMO, metavar="DIR", help="default: scripts/demo")
    options = parser.parse_args()
    classifier = VideoClassifier.from_pretrained(DEMO / "checkpoint")
    figures = {"classified-clips.png": draw_classified_clips(classifier, [DEMO / "clips" / name for name in CLIPS])}
    if options.serve_json:
        figures["throughput.png"] = draw_throughput(json.loads(options.serve_json.read_text()))
    for name, figure in figures.items():
        figure.savefig(options.output / name, dpi=150, facecolor="white")
        print(options.output / name)


if __name__ == "__main__":
    main()

"""Compare the values of the option `sampling`: decoded frames, time, and answers of the demo model.

    uniform     the middle frame of each of 32 equal parts of the video
    segment     the frame of each part's central half that is decoded fastest
    keyframes   the keyframe nearest to each uniform frame

`frames` counts decoded frames, sampled or not. Time is that of one thread for opening, decoding and resizing. `same
label` counts clips of the demo's test set whose best label is that of uniform sampling.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.timing import Candidate, Spread, limit_cores, time_interleaved
from benchmarks.videos import VideoSpec, video_files
from benchmarks.videos import add_arguments as add_video_arguments
from handler.assets import DEMO_CHECKPOINT
from handler.classifier import VideoClassifier
from handler.clips import ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.views import Views

VIEWS = {name: Views(sampling=name) for name in ("uniform", "segment", "keyframes")}

HELP = "compare the values of the option sampling"
QUICK = {"heights": [48], "seconds_a_clip": 4, "long_s": 20, "gops": [12], "repetitions": 1, "agreement_clips": 1}
TABLE, AGREEMENT = "sampling", "agreement"
COLUMNS = (
    ("sampling", "{sampling}"),
    ("frames", "{decoded_frames}"),
    ("CPU ms", "{cpu_ms:.0f}"),
    ("min-max", "{cpu_low_ms:.0f}-{cpu_high_ms:.0f}"),
    ("x uniform", "{cpu_ratio:.2f}"),
)
AGREEMENT_COLUMNS = (
    ("clips", "{clips}"),
    ("number", "{count}"),
    ("sampling", "{sampling}"),
    ("correct", "{correct}"),
    ("same label", "{same_label}"),
    ("frames", "{decoded_frames}"),
)
RESIZE_CROP = ResizeCrop(resize_to=224, resample=2, crop_to=(224, 224))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_video_arguments(parser, heights=[720], seconds=10)
    parser.add_argument("--long-s", type=float, default=300, metavar="S", help="duration of long videos (default: 300)")
    parser.add_argument(
        "--gops",
        type=int,
        nargs="+",
        default=[12, 50, 250],
        metavar="N",
        help="keyframe distances (default: 12 50 250)",
    )
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="timed calls (default: 3)")
    parser.add_argument(
        "--agreement-clips", type=int, default=300, metavar="N", help="clips of each kind to classify (default: 300)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    specs = [
        VideoSpec(height, seconds, gop_frames=gop)
        for height in arguments.heights
        for seconds in (arguments.seconds_a_clip, arguments.long_s)
        for gop in arguments.gops
    ]
    with video_files(arguments, specs, report) as files, limit_cores(1):
        for file in files:
            report.progress(f"decoding {file.name}")
            report.table(TABLE, COLUMNS, measure(file, arguments.repetitions), title=file.name)
    if arguments.agreement_clips:
        report.progress("classifying clips of the demo's test set")
        report.table(AGREEMENT, AGREEMENT_COLUMNS, compare_answers(arguments.agreement_clips))


def measure(file: Path, repetitions: int) -> list[dict[str, Any]]:
    """Returns a row per sampling."""
    video = file.read_bytes()
    decoded_frames = {}

    def inspect(name: str, clip: Any) -> None:
        decoded_frames[name] = clip.decoded_frames

    candidates = [
        Candidate(
            name,
            partial(load_clip, video, ClipSettings(num_frames=32, resize_crop=RESIZE_CROP), views=views),
        )
        for name, views in VIEWS.items()
    ]
    timings, failures = time_interleaved(candidates, repetitions=repetitions, inspect=inspect)
    if failures:
        raise RuntimeError(f"sampling failed: {failures}")
    cpu = {name: Spread.of(timing.cpu_ms) for name, timing in timings.items()}
    return [
        {
            "file": file.name,
            "sampling": name,
            "decoded_frames": decoded_frames[name],
            **spread.to_row("cpu", "ms"),
            "cpu_ratio": spread.median / cpu["uniform"].median,
        }
        for name, spread in cpu.items()
    ]


def compare_answers(count: int) -> list[dict[str, Any]]:
    """Returns a row per renderer of the demo's test set and sampling."""
    from demo.evaluate import DEFAULT_SEED, LabeledClip, draw_evaluation_clip, draw_independent_clip

    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT)
    sources: dict[str, Callable[[int], LabeledClip]] = {
        "training renderer": partial(draw_evaluation_clip, DEFAULT_SEED),
        "independent renderer": partial(draw_independent_clip, 0),
    }
    rows = []
    for source, draw in sources.items():
        totals = {name: {"correct": 0, "same_label": 0, "decoded_frames": 0} for name in VIEWS}
        for number in range(count):
            video = draw(number)
            settings = classifier.clip_settings
            clips = {name: load_clip(video.video, settings, views=views) for name, views in VIEWS.items()}
            best = classifier.logits([clip.pixels for clip in clips.values()]).argmax(-1).tolist()  # (samplings,)
            labels = dict(zip(clips, (classifier.config.id2label[index] for index in best)))
            for name, total in totals.items():
                total["correct"] += labels[name] == video.label
                total["same_label"] += labels[name] == labels["uniform"]
                total["decoded_frames"] += clips[name].decoded_frames
        rows += [{"clips": source, "count": count, "sampling": name, **total} for name, total in totals.items()]
    return rows


def plot(report: Report):
    from benchmarks.plots import bar_chart

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        groups.setdefault(row["file"], {})[row["sampling"]] = Spread.from_row(row, "cpu", "ms")
    return bar_chart(groups, title="Opening, decoding and resizing a video (lower is better)", unit="CPU time in ms")

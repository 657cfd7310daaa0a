"""Resize and crop 32 decoded frames to the model's 224 x 224 pixels.

to bytes    8-bit pixels, which the server sends to its device and normalizes there
  ours             VivitImageProcessor.resize_and_crop
  ours, fast       the same with `resize: fast`
  transformers     its VivitImageProcessor without rescaling and normalization
to floats   normalized float32
  ours             resize_and_crop and one multiply-add, as in serving
  ours, call       calling our VivitImageProcessor like that of transformers
  transformers     its VivitImageProcessor

`x ours` is relative to our time for the same output. `largest difference` and `share that differs` compare with
transformers: in steps of 255 for bytes, in normalized values for floats. Several `clips` are processed
concurrently, one thread per clip, as a server prepares a batch; the time is per clip.

A second table shows the effect of `resize: fast` on predictions, with the demo's checkpoint on its own clips and
with a base-sized model of random weights. It lists the difference of the logits and, for scale, their standard
deviation.
"""

import argparse
import dataclasses
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import checkpoints, libraries
from benchmarks.report import Report
from benchmarks.timing import OURS, Candidate, Spread, limit_cores, ratio_to_ours, time_interleaved
from benchmarks.videos import draw_clip
from handler.classifier import VideoClassifier
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.threads import available_cores
from handler.video import open_video, sample_uniform

HELP = "resize and crop frames to the model's input size"
QUICK = {
    "sizes": [(96, 64)],
    "num_frames": 4,
    "threads": 2,
    "repetitions": 1,
    "answers": [("demo", 9), ("tiny", 2)],
}
TABLE = "preprocess"
CROP_PIXELS = 224
FLOAT_TOLERANCE = 1e-6  # in normalized values: rounding of a multiply-add in another order
TRANSFORMERS = "transformers"
COLUMNS = (
    ("to", "{to}"),
    ("clips", "{clips}"),
    ("cores", "{cores}"),
    ("processor", "{processor}"),
    ("ms per clip", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("x ours", "{wall_ratio:.2f}"),
    ("CPU ms", "{cpu_ms:.1f}"),
    ("largest difference", "{largest_difference:.2g}"),
    ("share that differs", "{differing_share:.4%}"),
)
PREDICTIONS_TABLE = "fast"
PREDICTIONS_COLUMNS = (
    ("model", "{model}"),
    ("clips", "{clips}"),
    ("same top-1", "{same_top_1:.2%}"),
    ("largest logit difference", "{largest_difference:.4f}"),
    ("mean", "{mean_difference:.5f}"),
    ("logits' std", "{spread:.2f}"),
)
# Letters in shapes: T frames, H and W their height and width, h and w those of the model's input.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[(320, 240), (1280, 720), (1920, 1080)],
        metavar="WxH",
        help="frame sizes (default: 320x240 1280x720 1920x1080)",
    )
    parser.add_argument("--num-frames", type=int, default=32, metavar="N", help="frames per clip (default: 32)")
    parser.add_argument(
        "--shortest-edge",
        type=int,
        default=CROP_PIXELS,
        metavar="PIXELS",
        help="the shorter side after resizing, before the crop to 224 (default: 224, as in the published checkpoint)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=min(3, available_cores()),
        metavar="N",
        help="cores in the multi-core measurements (default: 3, or fewer if fewer are available)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=7, metavar="N", help="timed calls per processor (default: 7)"
    )
    parser.add_argument(
        "--answers",
        nargs="*",
        type=parse_model_and_clips,
        default=[("demo", 300), ("base", 4)],
        metavar="MODEL=CLIPS",
        help="models and clips for the table on `resize: fast` (default: demo=300 base=4)",
    )


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1280x720, got {text!r}") from None


def parse_model_and_clips(text: str) -> tuple[str, int]:
    size, _, clips = text.partition("=")
    if size not in checkpoints.SIZES or not clips.isdecimal() or int(clips) < 1:
        known = ", ".join(checkpoints.SIZES)
        raise argparse.ArgumentTypeError(f"expected MODEL=CLIPS such as demo=300, MODEL one of {known}; got {text!r}")
    return size, int(clips)


def run(arguments: argparse.Namespace, report: Report) -> None:
    processors_by_output = load_processors(arguments.shortest_edge, report)
    # dict.fromkeys: with one thread all three are the same
    loads = dict.fromkeys([(1, 1), (1, arguments.threads), (arguments.threads, arguments.threads)])
    for width, height in arguments.sizes:
        report.progress(f"{width}x{height}")
        frames = draw_clip(arguments.num_frames, height=height, width=width)  # (T, H, W, 3)
        rows = [
            {"size": f"{width}x{height}", "to": output, "clips": clips, "cores": cores, **row}
            for output, processors in processors_by_output.items()
            for clips, cores in loads
            for row in measure(
                frames, processors, clips=clips, cores=cores, repetitions=arguments.repetitions, report=report
            )
        ]
        report.table(TABLE, COLUMNS, rows, title=f"{arguments.num_frames} frames of {width}x{height}")
    predictions = [compare_predictions(size, clips, report=report) for size, clips in arguments.answers]
    if predictions:
        report.table(
            PREDICTIONS_TABLE, PREDICTIONS_COLUMNS, predictions, title="resize: fast compared with resize: exact"
        )


def load_processors(shortest_edge: int, report: Report) -> dict[str, dict]:
    """Returns {output: {name: function}}; a function maps uint8 (T, H, W, 3) to uint8 or float32 (T, 3, h, w)."""
    transformers = libraries.load("transformers", report)
    # As in google/vivit-b-16x2-kinetics400.
    crop_size = {"height": CROP_PIXELS, "width": CROP_PIXELS}
    settings = {"size": {"shortest_edge": shortest_edge}, "crop_size": crop_size}
    ours = VivitImageProcessor(**settings)
    processors = {
        "bytes": {
            OURS: ours.resize_and_crop,
            "ours, fast": functools.partial(resize_fast, ours.resize_crop),
        },
        "floats": {
            OURS: functools.partial(resize_and_normalize, ours),
            "ours, call": functools.partial(call_processor, ours),
        },
    }
    if transformers is not None:
        theirs = transformers.VivitImageProcessor(**settings)
        resize_only = {"do_rescale": False, "do_normalize": False, "offset": False}
        processors["bytes"][TRANSFORMERS] = functools.partial(call_processor, theirs, **resize_only)
        processors["floats"][TRANSFORMERS] = functools.partial(call_processor, theirs)
    return processors


def resize_and_normalize(processor, frames):
    scale, bias = (torch.from_numpy(values)[:, None, None] for values in processor.scale_and_bias())  # (3, 1, 1)
    pixels = torch.from_numpy(processor.resize_and_crop(frames))
    return torch.addcmul(bias, pixels.float(), scale).numpy()


def call_processor(processor, frames, **options):
    return np.asarray(processor(list(frames), return_tensors="pt", **options)["pixel_values"][0])


def resize_fast(resize_crop, frames):
    threads = torch.get_num_threads()
    return dataclasses.replace(resize_crop, is_fast=True).resize_and_crop(frames, threads=threads)


def measure(
    frames: np.ndarray, processors: dict, *, clips: int, cores: int, repetitions: int, report: Report
) -> list[dict[str, Any]]:
    """Returns a row of the table per processor."""
    results: dict[str, np.ndarray] = {}
    with limit_cores(cores, torch_threads=cores // clips), ThreadPoolExecutor(max_workers=clips) as pool:
        candidates = [
            Candidate(name, functools.partial(process_concurrently, pool, process, frames, clips))
            for name, process in processors.items()
        ]
        timings, failures = time_interleaved(candidates, repetitions=repetitions, inspect=results.__setitem__)
    for name, reason in failures.items():
        report.note(f"{name} failed on {frames.shape[2]}x{frames.shape[1]}: {reason}")
    ours = Spread.of(timings[OURS].wall_ms).median if OURS in timings else None
    return [
        {
            "processor": name,
            **Spread.of(timing.wall_ms).times(1 / clips).to_row("wall", "ms"),
            **Spread.of(timing.cpu_ms).times(1 / clips).to_row("cpu", "ms"),
            "wall_ratio": ratio_to_ours(Spread.of(timing.wall_ms).median, ours),
            **compare_pixels(results[name], results.get(TRANSFORMERS)),
        }
        for name, timing in timings.items()
    ]


def process_concurrently(pool, process, frames, clips):
    """Processes the same frames `clips` times concurrently; returns one of the results."""
    if clips == 1:
        return process(frames)
    first, *_ = pool.map(process, [frames] * clips)
    return first


def compare_pixels(pixels: np.ndarray, expected: np.ndarray | None) -> dict[str, float]:
    """Returns the largest difference and the share of values that differ; empty if `expected` is None.

    Bytes differ if they are not equal, floats if they are more than FLOAT_TOLERANCE apart.
    """
    if expected is None:
        return {}
    tolerance = 0 if expected.dtype == np.uint8 else FLOAT_TOLERANCE
    distance = np.abs(pixels.astype(np.float32) - expected.astype(np.float32))
    share = float((distance > tolerance).mean())
    return {"largest_difference": float(distance.max()), "differing_share": share}


def compare_predictions(size: str, clips: int, *, report: Report) -> dict[str, Any]:
    """Compares a model's logits after exact and fast resizing.

    Args:
        size: One of checkpoints.SIZES. The demo's clips are drawn for it; other models get 720p clips.
        clips: Number of clips.
        report: For progress.
    """
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = checkpoints.save_checkpoint(size, Path(directory))
        classifiers = [
            VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(resize=resize))
            for resize in ("exact", "fast")
        ]
    num_frames = classifiers[0].config.num_frames
    logits_by_clip = []
    for number in range(clips):
        report.progress(f"classifying clip {number + 1} of {clips} with the {size} model")
        if size == "demo":
            frames = decode_clip(draw_demo_clip(number), num_frames)
        else:
            frames = draw_clip(num_frames, height=720, width=1280, seed=number)
        pixels = [classifier.clip_settings.resize_crop.resize_and_crop(frames) for classifier in classifiers]
        logits = [classifier.logits([clip[None]]) for classifier, clip in zip(classifiers, pixels)]
        logits_by_clip.append(torch.cat(logits))  # (2, labels)
    all_logits = torch.stack(logits_by_clip)  # (clips, 2, labels)
    difference = (all_logits[:, 0] - all_logits[:, 1]).abs()
    top_1 = all_logits.argmax(-1)  # (clips, 2)
    return {
        "model": size,
        "clips": clips,
        "same_top_1": (top_1[:, 0] == top_1[:, 1]).float().mean().item(),
        "largest_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "spread": all_logits.std().item(),
    }


def decode_clip(video: bytes, num_frames: int) -> np.ndarray:
    with open_video(video) as opened:
        return opened.decode(sample_uniform(opened.info.frame_count, num_frames))


def draw_demo_clip(number: int) -> bytes:
    """Returns a video file that the demo is evaluated on."""
    from demo import evaluate

    return evaluate.draw_evaluation_clip(evaluate.DEFAULT_SEED, number).video


def plot(report: Report):
    from benchmarks.plots import bar_chart, relative_spread

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        if row["wall_ratio"]:
            group = groups.setdefault(
                f"{row['size']} to {row['to']}\n{row['clips']} concurrently on {row['cores']} cores", {}
            )
            group[row["processor"]] = relative_spread(row)
    title = "Resizing and cropping frames (lower is better)"
    return bar_chart(groups, title=title, unit="wall time relative to ours", reference=1)

"""32 decoded frames to the 224 x 224 pixels that the model takes: resize the shorter side, crop the middle.

to bytes    8-bit pixels, which the server sends to its device and normalises there
  ours             VivitImageProcessor.resize_and_crop
  transformers     its VivitImageProcessor, told to stop there
  ours, fast       the same with `resize: fast`
to floats   normalised float32
  ours             resize_and_crop and one multiply-add, as served
  ours, call       our VivitImageProcessor called as that of transformers is
  transformers     its VivitImageProcessor

`x ours` compares with ours of the same kind. `largest difference` and `share that differs` are against
transformers: of 255 for bytes, of the normalised values for floats. `clips` of more than one go side by side,
a thread each, as a server prepares a batch; the time is that of one clip then.

What `resize: fast` does to answers is measured as well: with the demo's checkpoint on clips of its renderer, and
with a base-sized model of random weights. `logits differ` and their spread (standard deviation) are of all clips.
"""

import argparse
import dataclasses
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import checkpoints, peers
from benchmarks.clips import draw_clip
from benchmarks.measuring import (
    OURS,
    Contestant,
    Spread,
    on_cores,
    ratio_to_ours,
    take_turns,
)
from benchmarks.report import Report, bars
from handler.classifier import VideoClassifier
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.threads import available_cores
from handler.video import open_video, sample_uniform

HELP = "frames to the model's size"
QUICK = {
    "sizes": [(96, 64)],
    "num_frames": 4,
    "threads": 2,
    "repetitions": 1,
    "answers": [("demo", 9), ("tiny", 2)],
}
TABLE = "preprocess"
CROP = 224  # pixels
FLOAT_TOLERANCE = 1e-6  # of normalised values: the order of a multiplication and an addition
COLUMNS = (
    ("to", "{to}"),
    ("clips", "{clips}"),
    ("cores", "{cores}"),
    ("processor", "{processor}"),
    ("ms a clip", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("x ours", "{wall_ratio:.2f}"),
    ("CPU ms", "{cpu_ms:.1f}"),
    ("largest difference", "{largest_difference:.2g}"),
    ("share that differs", "{differing_share:.4%}"),
)
ANSWERS_TABLE = "fast"
ANSWERS_COLUMNS = (
    ("model", "{model}"),
    ("clips", "{clips}"),
    ("same top-1", "{same_top_1:.2%}"),
    ("logits differ by up to", "{largest_difference:.4f}"),
    ("on average", "{mean_difference:.5f}"),
    ("logits' spread", "{spread:.2f}"),
)
# Letters in shapes: T frames, H and W their height and width, h and w those of the model.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[(320, 240), (1280, 720), (1920, 1080)],
        metavar="WxH",
        help="default: 320x240 1280x720 1920x1080",
    )
    parser.add_argument("--num-frames", type=int, default=32, metavar="N", help="of a clip (default: 32)")
    parser.add_argument(
        "--shortest-edge",
        type=int,
        default=CROP,
        metavar="PIXELS",
        help="the shorter side before the crop to 224 (default: 224, as the published checkpoint has it)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=min(3, available_cores()),
        metavar="N",
        help="cores, where more than one is used (default: 3, or what there is)",
    )
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--answers",
        nargs="*",
        type=parse_answers,
        default=[("demo", 300), ("base", 4)],
        metavar="MODEL=CLIPS",
        help="models, and clips to ask each, to see what `resize: fast` does (default: demo=300 base=4)",
    )


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1280x720, got {text!r}") from None


def parse_answers(text: str) -> tuple[str, int]:
    size, _, clips = text.partition("=")
    if size not in checkpoints.SIZES or not clips.isdecimal() or int(clips) < 1:
        known = ", ".join(checkpoints.SIZES)
        raise argparse.ArgumentTypeError(f"expected MODEL=CLIPS such as demo=300, MODEL one of {known}; got {text!r}")
    return size, int(clips)


def run(arguments: argparse.Namespace, report: Report) -> None:
    transformers = peers.load("transformers", report)
    # As stored with google/vivit-b-16x2-kinetics400.
    crop_size = {"height": CROP, "width": CROP}
    settings = {"size": {"shortest_edge": arguments.shortest_edge}, "crop_size": crop_size}
    ours = VivitImageProcessor(**settings)
    kinds = {
        "bytes": {
            OURS: ours.resize_and_crop,
            "ours, fast": functools.partial(resize_fast, ours.resize_crop),
        },
        "floats": {
            OURS: functools.partial(resize_and_normalize, ours),
            "ours, call": lambda frames: ours(list(frames), return_tensors="pt")["pixel_values"][0].numpy(),
        },
    }
    if transformers is not None:
        theirs = transformers.VivitImageProcessor(**settings)
        stop_at_bytes = {"do_rescale": False, "do_normalize": False, "offset": False}
        kinds["bytes"]["transformers"] = functools.partial(call_transformers, theirs, **stop_at_bytes)
        kinds["floats"]["transformers"] = functools.partial(call_transformers, theirs)
    for width, height in arguments.sizes:
        report.progress(f"{width}x{height}")
        frames = draw_clip(arguments.num_frames, height=height, width=width)  # (T, H, W, 3)
        rows = [
            row
            for to, processors in kinds.items()
            for clips, cores in {(1, 1): None, (1, arguments.threads): None, (arguments.threads,) * 2: None}
            for row in measure(
                frames,
                to,
                processors,
                clips=clips,
                cores=cores,
                repetitions=arguments.repetitions,
                report=report,
            )
        ]
        report.table(TABLE, COLUMNS, rows, title=f"{arguments.num_frames} frames of {width}x{height}")
    answers = [compare_answers(size, clips, report=report) for size, clips in arguments.answers]
    if answers:
        report.table(ANSWERS_TABLE, ANSWERS_COLUMNS, answers, title="resize: fast against resize: exact")


def compare_answers(size: str, clips: int, *, report: Report) -> dict:
    """What a model says of the same clips, resized exactly and fast: the demo's own, or 720p for other models."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = checkpoints.save_checkpoint(size, Path(directory))
        exact, fast = (
            VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(resize=resize))
            for resize in ("exact", "fast")
        )
    logits = []  # of (2, labels): exactly, fast
    for number in range(clips):
        report.progress(f"asking the {size} model about clip {number + 1} of {clips}")
        if size == "demo":
            frames = decode_clip(draw_demo_clip(number), exact.config.num_frames)
        else:
            frames = draw_clip(exact.config.num_frames, height=720, width=1280, seed=number)
        pixels = [each.clip_settings.resize_crop.resize_and_crop(frames) for each in (exact, fast)]
        logits.append(torch.cat([each.logits([clip[None]]) for each, clip in zip((exact, fast), pixels)]))
    logits = torch.stack(logits)  # (clips, 2, labels)
    difference = (logits[:, 0] - logits[:, 1]).abs()
    guesses = logits.argmax(-1)
    return {
        "model": size,
        "clips": len(logits),
        "same_top_1": (guesses[:, 0] == guesses[:, 1]).float().mean().item(),
        "largest_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "spread": logits.std().item(),
    }


def decode_clip(video: bytes, num_frames: int) -> np.ndarray:
    with open_video(video) as opened:
        return opened.decode(sample_uniform(opened.info.frame_count, num_frames))


def draw_demo_clip(number: int) -> bytes:
    """A file, as the demo is evaluated on."""
    from demo import evaluate

    return evaluate.sample_clip(1_000_003, number)[0]


def measure(frames, to, processors, *, clips, cores, repetitions, report) -> list[dict]:
    results = {}
    with on_cores(cores, torch_threads=cores // clips), ThreadPoolExecutor(max_workers=clips) as pool:
        contestants = [
            Contestant(name, functools.partial(side_by_side, pool, process, frames, clips))
            for name, process in processors.items()
        ]
        timings, failures = take_turns(contestants, repetitions=repetitions, inspect=results.__setitem__)
    for name, reason in failures.items():
        report.note(f"{name} failed on {frames.shape[2]}x{frames.shape[1]}: {reason}")
    ours = Spread.of(timings[OURS].wall_ms).median if OURS in timings else None
    return [
        {
            "size": f"{frames.shape[2]}x{frames.shape[1]}",
            "to": to,
            "clips": clips,
            "cores": cores,
            "processor": name,
            **Spread.of(timing.wall_ms).times(1 / clips).in_row("wall", "ms"),
            **Spread.of(timing.cpu_ms).times(1 / clips).in_row("cpu", "ms"),
            "wall_ratio": ratio_to_ours(Spread.of(timing.wall_ms).median, ours),
            **difference(results[name], results.get("transformers")),
        }
        for name, timing in timings.items()
    ]


def difference(pixels: np.ndarray, expected: np.ndarray | None) -> dict[str, float]:
    """Largest difference, and share of the values that differ; nothing if there is nothing to compare with.

    Bytes differ if they are not the same, floats if they are more than FLOAT_TOLERANCE apart.
    """
    if expected is None:
        return {}
    tolerance = 0 if expected.dtype == np.uint8 else FLOAT_TOLERANCE
    distance = np.abs(pixels.astype(np.float32) - expected.astype(np.float32))
    share = float((distance > tolerance).mean())
    return {"largest_difference": float(distance.max()), "differing_share": share}


def plot(report: Report):
    groups = {}
    for row in report.tables[TABLE]:
        if row["wall_ratio"]:
            label = f"{row['size']} to {row['to']}\n{row['clips']} at once on {row['cores']} cores"
            spread = Spread.from_row(row, "wall", "ms")
            groups.setdefault(label, {})[row["processor"]] = spread.times(row["wall_ratio"] / spread.median)
    title = "frames to the model's size; shorter is better"
    return bars(groups, title=title, unit="wall time, ours = 1", reference=1)


# The contestants: uint8 (T, H, W, 3) to uint8 or float32 (T, 3, h, w).


def side_by_side(pool, process, frames, clips):
    """Processes the same frames `clips` times at once; returns one of the results."""
    return list(pool.map(process, [frames] * clips))[0] if clips > 1 else process(frames)


def resize_and_normalize(processor, frames):
    scale, bias = (torch.from_numpy(each)[:, None, None] for each in processor.scale_and_bias())  # (3, 1, 1)
    pixels = torch.from_numpy(processor.resize_and_crop(frames))
    return torch.addcmul(bias, pixels.float(), scale).numpy()


def call_transformers(processor, frames, **options):
    return processor(list(frames), return_tensors="pt", **options)["pixel_values"][0].numpy()


def resize_fast(resize_crop, frames):
    threads = torch.get_num_threads()
    return dataclasses.replace(resize_crop, is_fast=True).resize_and_crop(frames, threads=threads)

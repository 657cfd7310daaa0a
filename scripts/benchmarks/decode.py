"""Decode selected frames of a video file: time, and agreement with sequential decoding.

Sampling:

    uniform      32 frames over the whole video
    middle       32 frames at stride 4 from the middle of a longer video

Decoders:

    ours         handler.video
    ours, open   the part of ours that opens the file and reads its index
    codec only   lower bound: only the required packets, already in memory, decoded but not converted to RGB
    recipe       the code of the ViViT documentation: decode from frame 0 to the last selected frame
    torchcodec   VideoDecoder with seek_mode="exact"
    decord       VideoReader.get_batch
    opencv       grab and retrieve; sets CAP_PROP_POS_FRAMES first if more frames precede the selection than it spans

`wrong` counts frames that show another moment of the video. `differ` counts frames that are not bit-exact, including
those that differ only in color conversion. If a file has several video streams, the first one is expected. Every
decoder is pinned to the given number of cores, however many threads it starts.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.decoders import (
    CodecWork,
    Decoder,
    ReferenceFrames,
    load_decoders,
    open_ours,
    prepare_codec,
    run_codec,
)
from benchmarks.report import Report
from benchmarks.timing import OURS, Candidate, Spread, first_line, limit_cores, ratio_to_ours, time_interleaved
from benchmarks.videos import VideoSpec, video_files
from benchmarks.videos import add_arguments as add_video_arguments
from handler.threads import available_cores
from handler.video import VideoError, open_video, sample_uniform

HELP = "decode selected frames of a video file"
QUICK = {"heights": [96], "seconds_a_clip": 1.5, "seconds_inside": 5.0, "threads": [1], "repetitions": 1}
NUM_FRAMES, STRIDE_FRAMES = 32, 4
UNIFORM, MIDDLE = "uniform", "middle"
TABLE = "decode"
OPEN, CODEC_ONLY = "ours, open", "codec only"
COLUMNS = (
    ("frames", "{sampling}"),
    ("cores", "{threads}"),
    ("decoder", "{decoder}"),
    ("wall ms", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("x ours", "{wall_ratio:.2f}"),
    ("CPU ms", "{cpu_ms:.1f}"),
    ("x ours", "{cpu_ratio:.2f}"),
    ("wrong", "{wrong_frames}"),
    ("differ", "{differing_frames}"),
)


@dataclass(frozen=True)
class Case:
    """The frames that every decoder must return.

    Attributes:
        file: The video.
        sampling: UNIFORM or MIDDLE.
        indices: Indices of the frames, int64 (T,).
        threads: Decoder threads and cores.
    """

    file: Path
    sampling: str
    indices: np.ndarray
    threads: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_video_arguments(parser, heights=[240, 720, 1080], seconds=10)
    parser.add_argument(
        "--seconds-inside",
        type=float,
        default=60,
        metavar="S",
        help="duration of the generated video for `middle` sampling (default: 60)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 3],
        metavar="N",
        help="decoder threads, each on its own core (default: 1 3)",
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="timed calls per decoder (default: 5)")


def run(arguments: argparse.Namespace, report: Report) -> None:
    for threads in arguments.threads:
        if threads > available_cores():
            report.note(f"{threads} threads shared {available_cores()} cores")
    decoders = load_decoders(report)
    with video_files(arguments, generated_videos(arguments), report) as files:
        for file in files:
            if arguments.videos is not None:
                samplings = (UNIFORM, MIDDLE)
            else:  # only the last generated video is long
                samplings = (MIDDLE,) if file == files[-1] else (UNIFORM,)
            report.progress(f"decoding {file.name} sequentially for reference")
            try:
                indices_by_sampling = select_frames(file, samplings, report)
                selected = np.unique(np.concatenate(list(indices_by_sampling.values())))
                reference = ReferenceFrames.decode(file, selected)
            except (VideoError, av.FFmpegError) as error:
                report.note(f"{file.name} skipped: {first_line(error)}")
                continue
            rows = []
            for sampling, indices in indices_by_sampling.items():
                for threads in arguments.threads:
                    case = Case(file, sampling, indices, threads)
                    rows += measure(case, decoders, reference, arguments.repetitions, report)
            report.table(TABLE, COLUMNS, rows, title=file.name)


def generated_videos(arguments: argparse.Namespace) -> list[VideoSpec]:
    """Two keyframe distances at each height; at the middle height also other codecs, and the long video last."""
    heights, seconds = sorted(arguments.heights), arguments.seconds_a_clip
    middle = heights[len(heights) // 2]
    specs = [VideoSpec(height, seconds, "h264", gop_frames) for height in heights for gop_frames in (12, 250)]
    specs += [VideoSpec(middle, seconds, codec) for codec in ("hevc", "vp9", "av1")]
    return [*specs, VideoSpec(middle, arguments.seconds_inside)]


def select_frames(file: Path, samplings: Sequence[str], report: Report) -> dict[str, np.ndarray]:
    """Returns frame indices by sampling."""
    with open_video(file) as video:
        count = video.info.frame_count
    selected, span = {}, NUM_FRAMES * STRIDE_FRAMES
    if UNIFORM in samplings:
        selected[UNIFORM] = sample_uniform(count, NUM_FRAMES)
    if MIDDLE in samplings and count > span:
        selected[MIDDLE] = (count - span) // 2 + STRIDE_FRAMES * np.arange(NUM_FRAMES)
    elif MIDDLE in samplings:
        report.note(f"{file.name}: its {count} frames are too few for {NUM_FRAMES} frames at stride {STRIDE_FRAMES}")
    return selected


def measure(
    case: Case, decoders: dict[str, Decoder], reference: ReferenceFrames, repetitions: int, report: Report
) -> list[dict[str, Any]]:
    """Returns a row of the table per decoder."""
    file, indices, threads = case.file, case.indices, case.threads
    report.progress(f"{file.name}, {case.sampling}, {threads} threads")
    ours, *others = [
        Candidate(name, functools.partial(decode, file, indices, threads)) for name, decode in decoders.items()
    ]

    expected = len(np.unique(indices))

    def run_selected(work: CodecWork) -> None:
        count = run_codec(work)
        if count < expected:
            raise ValueError(f"expected {expected} frames from the selected packets, got {count}")

    prepare = functools.partial(prepare_codec, file, indices, threads)
    candidates = [
        ours,
        Candidate(OPEN, functools.partial(open_ours, file)),
        Candidate(CODEC_ONLY, run_selected, prepare),
        *others,
    ]
    comparisons = {}

    def inspect(name, frames):
        if name in decoders:
            comparisons[name] = reference.compare(frames, indices)

    with limit_cores(threads):
        timings, failures = time_interleaved(candidates, repetitions=repetitions, inspect=inspect)
    for name, reason in failures.items():
        report.note(f"{name} failed on {file.name}, {case.sampling}: {reason}")
    timing_of_ours = timings.get(OURS)
    rows = []
    for name, timing in timings.items():
        wall, cpu = Spread.of(timing.wall_ms), Spread.of(timing.cpu_ms)
        rows.append(
            {
                "file": file.name,
                "sampling": case.sampling,
                "threads": threads,
                "decoder": name,
                **wall.to_row("wall", "ms"),
                **cpu.to_row("cpu", "ms"),
                **comparisons.get(name, {}),
                "wall_ratio": ratio_to_ours(wall.median, timing_of_ours and Spread.of(timing_of_ours.wall_ms).median),
                "cpu_ratio": ratio_to_ours(cpu.median, timing_of_ours and Spread.of(timing_of_ours.cpu_ms).median),
            }
        )
    return rows


def plot(report: Report):
    from benchmarks.plots import bar_chart, relative_spread

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables[TABLE]:
        if row["decoder"] != OPEN and row["wall_ratio"]:
            group = groups.setdefault(f"{row['file']}\n{row['sampling']}, {row['threads']} threads", {})
            group[row["decoder"]] = relative_spread(row)
    title = f"Decoding {NUM_FRAMES} frames of a video (lower is better)"
    return bar_chart(groups, title=title, unit="wall time relative to ours", reference=1)

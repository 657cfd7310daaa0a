"""The wanted frames out of a video file: the time it takes, and if they are those of sequential decoding.

    evenly      32 frames over the whole video
    inside      32 frames, 4 apart, from the middle of a longer video

    ours         handler.video
    ours, open   the part of ours that opens the file and reads its index
    floor        the decoder's own: just the packets that it takes, in memory already, and nothing converted
    recipe       that of the ViViT documentation: decode from frame 0 to the last wanted, to_ndarray, stack
    torchcodec   VideoDecoder, exact
    decord       VideoReader.get_batch
    opencv       grab and retrieve; if more frames lie before the clip than in it, CAP_PROP_POS_FRAMES first

`wrong` counts frames that show another moment than they should, `differ` those that are not the same to the
bit: other colours count there, too. Where a file has several video streams, the first one is meant, and what
comes from another is wrong. Everybody is kept on the given number of cores, whatever threads it takes.
"""

import argparse
import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from benchmarks import peers
from benchmarks.clips import ClipSpec, clip_files
from benchmarks.clips import add_arguments as add_clip_arguments
from benchmarks.measuring import (
    OURS,
    Contestant,
    Spread,
    first_line,
    on_cores,
    ratio_to_ours,
    take_turns,
)
from benchmarks.report import Report, bars
from handler.threads import available_cores
from handler.video import VideoError, open_video, sample_uniform

HELP = "the wanted frames out of a video file"
QUICK = {"heights": [96], "seconds_a_clip": 1.5, "seconds_inside": 5.0, "threads": [1], "repetitions": 1}
NUM_FRAMES, STRIDE = 32, 4
TABLE = "decode"
OPEN = "ours, open"
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
# Letters in shapes: N frames in the video, T wanted ones, H and W height and width, P blocks of a frame.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_clip_arguments(parser, heights=[240, 720, 1080], seconds=10)
    parser.add_argument(
        "--seconds-inside",
        type=float,
        default=60,
        metavar="S",
        help="length of the made clip that frames are taken from inside of (default: 60)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 3],
        metavar="N",
        help="decoder threads, and as many cores (default: 1 3)",
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default: 5")


def run(arguments: argparse.Namespace, report: Report) -> None:
    for threads in arguments.threads:
        if threads > available_cores():
            report.note(f"{threads} threads had only {available_cores()} cores")
    decoders = load_decoders(report)
    with clip_files(arguments, made_clips(arguments), report) as files:
        for file in files:
            if arguments.videos is not None:
                samplings = ("evenly", "inside")
            else:  # the last one is made long, for that
                samplings = ("inside",) if file == files[-1] else ("evenly",)
            report.progress(f"decoding all of {file.name} for comparison")
            try:
                cases = cases_of(file, samplings, report)
                truth = Truth.of(file, np.unique(np.concatenate(list(cases.values()))))
            except (VideoError, av.FFmpegError) as error:
                report.note(f"{file.name} left out: {first_line(error)}")
                continue
            rows = []
            for sampling, indices in cases.items():
                for threads in arguments.threads:
                    case = Case(file, sampling, indices, threads)
                    rows += measure(case, decoders, truth, arguments.repetitions, report)
            report.table(TABLE, COLUMNS, rows, title=file.name)


def made_clips(arguments: argparse.Namespace) -> list[ClipSpec]:
    """Both usual distances of keyframes at every size; at the middle size other codecs, and the long clip."""
    heights, seconds = sorted(arguments.heights), arguments.seconds_a_clip
    middle = heights[len(heights) // 2]
    specs = [ClipSpec(height, seconds, "h264", gop_frames) for height in heights for gop_frames in (12, 250)]
    specs += [ClipSpec(middle, seconds, codec) for codec in ("hevc", "vp9")]
    return [*specs, ClipSpec(middle, arguments.seconds_inside)]


def cases_of(file: Path, samplings: Sequence[str], report: Report) -> dict[str, np.ndarray]:
    """The frame indices to ask for, by the kind of sampling."""
    with open_video(file) as video:
        count = video.info.frame_count
    cases, span = {}, NUM_FRAMES * STRIDE
    if "evenly" in samplings:
        cases["evenly"] = sample_uniform(count, NUM_FRAMES)
    if "inside" in samplings and count > span:
        cases["inside"] = (count - span) // 2 + STRIDE * np.arange(NUM_FRAMES)
    elif "inside" in samplings:
        report.note(f"{file.name}: with {count} frames too short for {NUM_FRAMES} frames {STRIDE} apart")
    return cases


def load_decoders(report: Report) -> dict:
    """Functions of (file, indices, threads) to uint8 (T, H, W, 3), by name."""
    decoders = {OURS: decode_ours, "recipe": decode_recipe}
    torchcodec, decord, cv2 = (peers.load(name, report) for name in ("torchcodec.decoders", "decord", "cv2"))
    if torchcodec:
        decoders["torchcodec"] = functools.partial(decode_torchcodec, torchcodec)
    if decord:
        decoders["decord"] = functools.partial(decode_decord, decord)
    if cv2:
        decoders["opencv"] = functools.partial(decode_opencv, cv2)
    return decoders


@dataclass(frozen=True)
class Case:
    """What is asked of every decoder: the frames at `indices`, int64 (T,)."""

    file: Path
    sampling: str
    indices: np.ndarray
    threads: int


def measure(case: Case, decoders: dict, truth: "Truth", repetitions: int, report: Report) -> list[dict]:
    """Rows of the table, one for each decoder."""
    file, indices, threads = case.file, case.indices, case.threads
    report.progress(f"{file.name}, {case.sampling}, {threads} threads")
    contestants = [
        Contestant(name, functools.partial(decode, file, indices, threads)) for name, decode in decoders.items()
    ]
    prepare = functools.partial(prepare_packets, file, indices, threads)
    contestants[1:1] = [
        Contestant(OPEN, functools.partial(open_ours, file)),
        Contestant("floor", decode_packets, prepare),
    ]
    verdicts = {}

    def inspect(name, result):
        if name in decoders:
            verdicts[name] = truth.judge(result, indices)
        elif name == "floor" and result < len(np.unique(indices)):
            raise ValueError(f"its packets gave only {result} of the wanted frames")

    with on_cores(threads):
        timings, failures = take_turns(contestants, repetitions=repetitions, inspect=inspect)
    for name, reason in failures.items():
        report.note(f"{name} failed on {file.name}, {case.sampling}: {reason}")
    ours = timings.get(OURS)
    rows = []
    for name, timing in timings.items():
        wall, cpu = Spread.of(timing.wall_ms), Spread.of(timing.cpu_ms)
        rows.append(
            {
                "file": file.name,
                "sampling": case.sampling,
                "threads": threads,
                "decoder": name,
                **wall.in_row("wall", "ms"),
                **cpu.in_row("cpu", "ms"),
                **verdicts.get(name, {}),
                "wall_ratio": ratio_to_ours(wall.median, ours and Spread.of(ours.wall_ms).median),
                "cpu_ratio": ratio_to_ours(cpu.median, ours and Spread.of(ours.cpu_ms).median),
            }
        )
    return rows


def plot(report: Report):
    groups = {}
    for row in report.tables[TABLE]:
        if row["decoder"] != OPEN and row["wall_ratio"]:
            group = groups.setdefault(f"{row['file']}\n{row['sampling']}, on {row['threads']}", {})
            spread = Spread.from_row(row, "wall", "ms")
            group[row["decoder"]] = spread.times(row["wall_ratio"] / spread.median)
    title = f"{NUM_FRAMES} frames out of a video; shorter is better"
    return bars(groups, title=title, unit="wall time, ours = 1", reference=1)


# The contestants. Each opens the file, and returns uint8 (T, H, W, 3) RGB.


def decode_ours(file, indices, threads):
    with open_video(file, thread_count=threads) as video:
        return video.decode(indices)


def open_ours(file):
    with open_video(file):
        pass


def decode_recipe(file, indices, threads):
    """What the documentation says, which leaves the threads to PyAV."""
    wanted, pictures = set(indices.tolist()), []
    with av.open(str(file)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i > indices[-1]:
                break
            if i in wanted:
                pictures.append(frame)
        return np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])


def decode_torchcodec(decoders, file, indices, threads):
    decoder = decoders.VideoDecoder(str(file), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact")
    return decoder.get_frames_at(indices.tolist()).data.numpy()


def decode_decord(decord, file, indices, threads):
    return decord.VideoReader(str(file), num_threads=threads).get_batch(indices).asnumpy()


def decode_opencv(cv2, file, indices, threads):
    cv2.setNumThreads(threads)
    capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    try:
        position, pictures = 0, []
        if indices[0] > indices[-1] - indices[0]:
            position = int(indices[0])
            capture.set(cv2.CAP_PROP_POS_FRAMES, position)
        for index in indices.tolist():
            while position <= index:
                if not capture.grab():
                    raise ValueError(f"no frame {position}")
                position += 1
            pictures.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        return np.stack(pictures)
    finally:
        capture.release()


# The floor: what any decoder has to do that wants these frames.


def prepare_packets(file, indices, threads):
    """(a fresh decoder, [stretches of packets], the wanted packets' timestamps).

    A stretch goes from the last keyframe before wanted frames to the last wanted packet before the next such
    keyframe.
    """
    with av.open(str(file)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    pts = [packet.pts for packet in packets]
    if None in pts or len(set(pts)) < len(pts):
        raise ValueError("the packets' timestamps do not say which frame is which")
    display_order = sorted(range(len(packets)), key=pts.__getitem__)
    wanted = sorted({display_order[index] for index in indices.tolist()})
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    stretches = {}
    for i in wanted:
        stretches[keyframes[max(0, bisect_right(keyframes, i) - 1)]] = i
    stretches = [packets[start : last + 1] for start, last in stretches.items()]
    decoder = av.open(str(file)).streams.video[0].codec_context
    decoder.thread_count, decoder.thread_type = threads, "FRAME"
    return decoder, stretches, {pts[i] for i in wanted}


def decode_packets(prepared):
    """Decodes them, and returns how many of the wanted frames came."""
    decoder, stretches, wanted_pts = prepared
    found = 0
    for stretch in stretches:
        decoder.flush_buffers()
        for number, packet in enumerate(stretch):
            # What no other frame refers to need not be decoded, unless it is wanted itself.
            decoder.skip_frame = "DEFAULT" if number == 0 or packet.pts in wanted_pts else "NONREF"
            found += sum(frame.pts in wanted_pts for frame in decoder.decode(packet))
        found += sum(frame.pts in wanted_pts for frame in decoder.decode(None))
    return found


# What the frames should be.


@dataclass(frozen=True)
class Truth:
    """What decoding a file in order gives.

    Attributes:
        pictures: {index: uint8 (H, W, 3)} of wanted frames, upright.
        thumbnails: float32 (N, P, 3) of all frames.
    """

    pictures: dict[int, np.ndarray]
    thumbnails: np.ndarray

    @classmethod
    def of(cls, file: Path, indices: np.ndarray) -> "Truth":
        wanted, pictures, thumbnails = set(indices.tolist()), {}, []
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                # PyAV's rotation is how far to turn counter-clockwise, and so is NumPy's.
                picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                thumbnails.append(thumbnail(picture))
                if index in wanted:
                    pictures[index] = picture
        return cls(pictures, np.stack(thumbnails))

    def judge(self, frames: np.ndarray, indices: np.ndarray) -> dict[str, int]:
        """How many of `frames`, uint8 (T, H, W, 3), are wrong, and how many differ; a missing one is both."""
        missing = max(0, len(indices) - len(frames))
        differing = [
            i
            for i, index in enumerate(indices[: len(frames)].tolist())
            if not np.array_equal(frames[i], self.pictures.get(index))
        ]
        wrong = sum(self._shows_another_moment(frames[i], int(indices[i])) for i in differing)
        return {"wrong_frames": missing + wrong, "differing_frames": missing + len(differing)}

    def _shows_another_moment(self, frame: np.ndarray, index: int) -> bool:
        """Whether another frame of the video is clearly more alike; colours and roundings don't matter."""
        if index not in self.pictures or frame.shape != self.pictures[index].shape:
            return True
        distances = np.abs(self.thumbnails - thumbnail(frame)).mean(axis=(1, 2))  # (N,)
        return bool(distances[index] > 1.25 * distances.min() + 0.05)


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """float32 (P, 3): means over square blocks of uint8 (H, W, 3), without the mean over the picture."""
    side = max(1, min(16, min(picture.shape[:2]) // 8))
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    blocks = picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1, 3)  # (P, 3)
    return means - means.mean(axis=0)

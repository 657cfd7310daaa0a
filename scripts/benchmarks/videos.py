"""Video files to measure on: generated ones, or a folder of real ones.

Generated videos resemble filmed ones, so that decoding them costs about as much. A camera pans over a textured
background, textured discs move in front of it, the brightness varies slightly, and every frame has sensor noise.
An encoder therefore spends bits on motion vectors, residuals and B-frames.

T: frames, H, W: height and width in pixels.
"""

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import Report
from handler.threads import available_cores
from synthetic import write_clip

FPS = 30
WIDTHS = {240: 320}  # width by height as in Kinetics; other heights are 16:9
NOISE_STDDEV = 3.0  # of 255: a phone's sensor indoors
# Typical settings of each encoder, at a preset that is fast enough for a benchmark.
ENCODERS = {  # codec -> container, encoder, options
    "h264": ("mp4", "libx264", {"preset": "faster", "crf": "23"}),
    "hevc": ("mp4", "libx265", {"preset": "superfast", "crf": "26", "x265-params": "log-level=none"}),
    "av1": ("mp4", "libsvtav1", {"preset": "10", "crf": "35"}),
    "vp9": (
        "webm",
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "7", "row-mt": "1", "crf": "33", "b": "0"},
    ),
}
MAX_ENCODER_THREADS = 8
SUFFIXES = {".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".ts", ".flv", ".mpg", ".wmv", ".3gp"}


@dataclass(frozen=True)
class VideoSpec:
    """A video to generate.

    Attributes:
        height: Pixels; the width follows from it.
        seconds: Duration.
        codec: A key of ENCODERS.
        gop_frames: Frames from one keyframe to the next.
    """

    height: int
    seconds: float
    codec: str = "h264"
    gop_frames: int = 250

    @property
    def width(self) -> int:
        return WIDTHS.get(self.height, round(self.height * 16 / 9 / 2) * 2)

    @property
    def frame_count(self) -> int:
        return round(self.seconds * FPS)

    @property
    def file_name(self) -> str:
        return f"{self.height}p-{self.seconds:g}s-{self.codec}-gop{self.gop_frames}.{ENCODERS[self.codec][0]}"


def add_arguments(parser: argparse.ArgumentParser, *, heights: list[int], seconds: float) -> None:
    """Adds --videos, --heights, --seconds-a-clip and --cache with these defaults."""
    parser.add_argument("--videos", type=Path, metavar="DIR", help="use the videos in this folder, generate none")
    parser.add_argument(
        "--heights",
        type=int,
        nargs="+",
        default=heights,
        metavar="PIXELS",
        help=f"heights of the generated videos (default: {' '.join(map(str, heights))})",
    )
    parser.add_argument(
        "--seconds-a-clip",
        type=float,
        default=seconds,
        metavar="S",
        help=f"duration of the generated videos (default: {seconds:g})",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the generated videos in this folder for later runs (default: a temporary folder)",
    )


@contextlib.contextmanager
def video_files(arguments: argparse.Namespace, specs: list[VideoSpec], report: Report) -> Iterator[list[Path]]:
    """Yields the files to measure on: those in the --videos folder, or one generated file per spec.

    Raises:
        ValueError: The --videos folder has no video file.
    """
    if arguments.videos is not None:
        files = sorted(file for file in arguments.videos.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            suffixes = " ".join(sorted(SUFFIXES))
            raise ValueError(f"--videos: expected video files ({suffixes}) in {arguments.videos}, found none")
        yield files
        return
    with contextlib.ExitStack() as stack:
        folder = arguments.cache
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vivit-videos-")))
        folder.mkdir(parents=True, exist_ok=True)
        yield [generate_video(folder, spec, report) for spec in specs]


def generate_video(folder: Path, spec: VideoSpec, report: Report) -> Path:
    """Draws and encodes a video unless the file exists already; returns its path."""
    path = folder / spec.file_name
    if path.exists():
        return path
    report.progress(f"generating {path.name}")
    container_format, encoder, options = ENCODERS[spec.codec]
    threads = min(MAX_ENCODER_THREADS, available_cores())
    unfinished = write_clip(
        path.with_suffix(".part"),
        draw_frames(spec.frame_count, height=spec.height, width=spec.width),
        fps=FPS,
        codec=encoder,
        options={**options, "g": str(spec.gop_frames), "threads": str(threads)},
        container_format=container_format,
    )
    return unfinished.rename(path)


def draw_frames(count: int, *, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields `count` frames of a scene, uint8 (H, W, 3) RGB."""
    rng = np.random.default_rng(seed)
    pan = height // 4  # how far the camera moves from the center, in pixels
    background = _texture(rng, height + 2 * pan, width + 2 * pan)  # (H + 2 * pan, W + 2 * pan, 3)
    radius = max(2, height // 8)
    side = 2 * radius
    discs = [(_texture(rng, side, side), rng.uniform(0.3, 1.5, 2), rng.uniform(0, 6.3, 2)) for _ in range(4)]
    y, x = np.mgrid[-radius:radius, -radius:radius] + 0.5
    inside = (x * x + y * y < radius * radius)[..., None]
    noise = np.rint(rng.normal(0, NOISE_STDDEV, (height + 64, width + 64, 1))).astype(np.int16)
    for index in range(count):
        time_s = index / FPS
        top = round(pan * (1 + 0.9 * math.sin(0.7 * time_s)))
        left = round(pan * (1 + 0.9 * math.sin(1.1 * time_s + 1)))
        frame = background[top : top + height, left : left + width].copy()  # (H, W, 3)
        for texture, speeds, phases in discs:
            position = (0.5 + 0.5 * np.sin(speeds * time_s * 2 + phases)) * (height - side, width - side)
            row, column = position.astype(int)
            np.copyto(frame[row : row + side, column : column + side], texture, where=inside)
        shift_y, shift_x = rng.integers(0, 64, 2)
        frame += noise[shift_y : shift_y + height, shift_x : shift_x + width]
        frame += round(6 * math.sin(3 * time_s))
        yield frame.clip(0, 255).astype(np.uint8)


def draw_clip(count: int, *, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draws `count` frames of a scene, uint8 (T, H, W, 3) RGB."""
    return np.stack(list(draw_frames(count, height=height, width=width, seed=seed)))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random detail at several scales, stronger at coarse ones as in photographs: int16 (H, W, 3), 16 to 239."""
    total = np.zeros((height, width, 3), np.float32)
    for cell_pixels, strength in ((96, 1.0), (24, 0.6), (6, 0.35), (2, 0.2)):
        shape = (height // cell_pixels + 2, width // cell_pixels + 2, 3)
        cells = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        total += strength * np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    low, high = total.min(), total.max()
    return (16 + (total - low) * (223 / max(high - low, 1e-6))).astype(np.int16)

"""What is measured on: clips that look like something, made here, or a folder of your own.

Neither zeros nor pure noise: a camera that sways over a textured ground, textured discs that move before it,
light that changes a little, and the grain of a sensor. So an encoder finds motion, residuals and B-frames to
spend bits on, and a decoder has the work that filmed video makes.

T: frames, H, W: height and width in pixels.
"""

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from benchmarks.report import Report
from handler.threads import available_cores

FPS = 30
WIDTHS = {240: 320}  # as in Kinetics; the others are 16:9
GRAIN = 3.0  # standard deviation of the sensor's noise, of 255: a phone's in a room
CODECS = {
    # container, encoder, options: what usually makes such files, at a speed that one can wait for
    "h264": ("mp4", "libx264", {"preset": "faster", "crf": "23"}),
    "hevc": ("mp4", "libx265", {"preset": "superfast", "crf": "26", "x265-params": "log-level=none"}),
    "vp9": (
        "webm",
        "libvpx-vp9",
        {
            "deadline": "realtime",
            "cpu-used": "7",
            "row-mt": "1",
            "crf": "33",
            "b": "0",
        },
    ),
}
SUFFIXES = {".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".ts", ".flv", ".mpg", ".wmv", ".3gp"}


@dataclass(frozen=True)
class ClipSpec:
    """A clip to be made; `gop_frames` from one keyframe to the next."""

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
        return f"{self.height}p-{self.seconds:g}s-{self.codec}-gop{self.gop_frames}.{CODECS[self.codec][0]}"


def add_arguments(parser: argparse.ArgumentParser, *, heights: list[int], seconds: float) -> None:
    parser.add_argument("--videos", type=Path, metavar="DIR", help="measure on these, not on made clips")
    parser.add_argument(
        "--heights",
        type=int,
        nargs="+",
        default=heights,
        metavar="PIXELS",
        help=f"of the made clips (default: {' '.join(map(str, heights))})",
    )
    parser.add_argument(
        "--seconds-a-clip",
        type=float,
        default=seconds,
        metavar="S",
        help=f"length of the made clips (default: {seconds:g})",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the made clips there for the next run (default: a temporary folder)",
    )


@contextlib.contextmanager
def clip_files(arguments: argparse.Namespace, specs: list[ClipSpec], report: Report) -> Iterator[list[Path]]:
    """The files to measure on: those of --videos, or one for each of `specs`.

    Raises ValueError where --videos holds no video file.
    """
    if arguments.videos is not None:
        files = sorted(file for file in arguments.videos.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            suffixes = " ".join(sorted(SUFFIXES))
            raise ValueError(f"--videos {arguments.videos} must hold video files ({suffixes})")
        yield files
        return
    with contextlib.ExitStack() as closing:
        folder = arguments.cache
        if folder is None:
            folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="vivit-clips-")))
        folder.mkdir(parents=True, exist_ok=True)
        yield [make_clip(folder, spec, report) for spec in specs]


def make_clip(folder: Path, spec: ClipSpec, report: Report) -> Path:
    """Draws and encodes a clip, unless it is there already."""
    path = folder / spec.file_name
    if path.exists():
        return path
    report.progress(f"making {path.name}")
    container_format, encoder, options = CODECS[spec.codec]
    options = {**options, "g": str(spec.gop_frames), "threads": str(min(8, available_cores()))}
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        for picture in draw_frames(spec.frame_count, height=spec.height, width=spec.width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return unfinished.rename(path)


def draw_frames(count: int, *, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields `count` frames of a scene, uint8 (H, W, 3) RGB."""
    rng = np.random.default_rng(seed)
    sway = height // 4  # how far the camera moves to either side
    ground = _texture(rng, height + 2 * sway, width + 2 * sway)  # (H + 2 * sway, W + 2 * sway, 3)
    radius = max(2, height // 8)
    side = 2 * radius
    discs = [(_texture(rng, side, side), rng.uniform(0.3, 1.5, 2), rng.uniform(0, 6.3, 2)) for _ in range(4)]
    y, x = np.mgrid[-radius:radius, -radius:radius] + 0.5
    inside = (x * x + y * y < radius * radius)[..., None]
    grain = np.rint(rng.normal(0, GRAIN, (height + 64, width + 64, 1))).astype(np.int16)
    for index in range(count):
        time_s = index / FPS
        top = round(sway * (1 + 0.9 * math.sin(0.7 * time_s)))
        left = round(sway * (1 + 0.9 * math.sin(1.1 * time_s + 1)))
        picture = ground[top : top + height, left : left + width].copy()  # (H, W, 3)
        for texture, speeds, phases in discs:
            place = (0.5 + 0.5 * np.sin(speeds * time_s * 2 + phases)) * (height - side, width - side)
            row, column = place.astype(int)
            np.copyto(picture[row : row + side, column : column + side], texture, where=inside)
        shift_y, shift_x = rng.integers(0, 64, 2)
        picture += grain[shift_y : shift_y + height, shift_x : shift_x + width]
        picture += round(6 * math.sin(3 * time_s))
        yield picture.clip(0, 255).astype(np.uint8)


def draw_clip(count: int, *, height: int, width: int, seed: int = 0) -> np.ndarray:
    """`count` frames of a scene as one array, uint8 (T, H, W, 3) RGB."""
    return np.stack(list(draw_frames(count, height=height, width=width, seed=seed)))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """int16 (H, W, 3), 16 to 239: detail at several scales, coarse stronger than fine, as in photographs."""
    total = np.zeros((height, width, 3), np.float32)
    for cell_pixels, strength in ((96, 1.0), (24, 0.6), (6, 0.35), (2, 0.2)):
        shape = (height // cell_pixels + 2, width // cell_pixels + 2, 3)
        cells = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        total += strength * np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    low, high = total.min(), total.max()
    return (16 + (total - low) * (223 / max(high - low, 1e-6))).astype(np.int16)

"""One upload becomes one clip: sample, decode, resize. Everything that touches a stranger's bytes, and no torch.

    clip = load_clip(source, num_frames=32, geometry=Geometry(...))

Shapes: T frames, C colour channels, h x w the model's picture size.
"""
import dataclasses
import os
import time
from pathlib import Path

import numpy as np

from handler.resize import Geometry
from handler.video import VideoInfo, open_video, sample_evenly


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video, ready for the model.

    Attributes:
        pixels: uint8 (T, C, h, w), resized and cropped, not yet normalised.
        info: the video that it came from.
        times_s: float64 (T,), display time of each sampled frame, seconds from the video's first frame.
        warnings: what a caller should know, e.g. that frames repeat.
        decode_s, resize_s: seconds of wall time that opening and decoding, and resizing took.
    """

    pixels: np.ndarray
    info: VideoInfo
    times_s: np.ndarray
    warnings: tuple[str, ...]
    decode_s: float
    resize_s: float


def load_clip(
    source: bytes | str | Path, *, num_frames: int, geometry: Geometry, decode_threads: int = 1
) -> Clip:
    """Samples `num_frames` evenly over the video (a file's bytes, or its path), decodes, resizes and crops them.

    Raises:
        VideoError: the source is not a video that can be used.
    """
    started_s = time.perf_counter()
    with open_video(source) as video:
        indices = sample_evenly(video.info.frame_count, num_frames)  # (T,)
        frames = video.decode(indices, thread_count=decode_threads)  # (T, H, W, 3)
        info, times_s, warnings = video.info, video.pts_s[indices], list(video.warnings)
    if info.frame_count < num_frames:
        warnings.append(
            f"the video has {info.frame_count} frames where the model looks at {num_frames}: frames repeat"
        )
    decoded_s = time.perf_counter()
    pixels = geometry.resize_and_crop(frames)  # (T, C, h, w)
    return Clip(
        pixels=pixels, info=info, times_s=times_s, warnings=tuple(warnings), decode_s=decoded_s - started_s,
        resize_s=time.perf_counter() - decoded_s,
    )


def available_cores() -> int:
    """Cores that this process may use: a container or taskset may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

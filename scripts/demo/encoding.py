"""Encodes drawn frames with random codecs, decodes them and resizes them to the model's input size.

T: frames, H, W: frame height and width, S: side of the model's input in pixels.
"""

import io
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F

from synthetic import write_clip


@dataclass(frozen=True)
class Encoding:
    """How to encode a video.

    Attributes:
        container: FFmpeg's name of the container format, such as "mp4" or "matroska".
        codec: FFmpeg's name of the encoder, such as "libx264".
        options: (name, value) pairs for the encoder.
    """

    container: str
    codec: str
    options: tuple[tuple[str, str], ...] = ()


def sample_encoding(rng: np.random.Generator) -> Encoding:
    """Returns a random codec, a container that supports it, and a random quality."""
    codec = str(rng.choice(["libx264", "libx264", "libvpx", "libvpx-vp9", "mpeg4"]))
    quality = rng.random()  # 0: good, 1: poor
    if codec == "libx264":
        containers, options = ("mp4", "matroska"), {"crf": str(int(18 + 20 * quality)), "preset": "ultrafast"}
    elif codec == "mpeg4":
        containers, options = (
            ("mp4", "avi", "matroska"),
            {"qscale": str(int(2 + 14 * quality)), "flags": "+qscale"},
        )
    else:
        containers = ("webm", "matroska")
        options = {"crf": str(int(15 + 35 * quality)), "b": "1M", "deadline": "realtime", "cpu-used": "8"}
    return Encoding(str(rng.choice(containers)), codec, tuple(options.items()))


def encode(frames: np.ndarray, *, encoding: Encoding, fps: int) -> bytes:
    """Encodes uint8 RGB (T, H, W, 3), H and W even, and returns the bytes of the video file."""
    buffer = io.BytesIO()
    write_clip(
        buffer,
        frames,
        fps=fps,
        codec=encoding.codec,
        options=dict(encoding.options),
        container_format=encoding.container,
    )
    return buffer.getvalue()


def decode_all(video: bytes) -> np.ndarray:
    """Decodes all frames of a video file: uint8 RGB (T, H, W, 3)."""
    with av.open(io.BytesIO(video)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def resize(frames: np.ndarray, side: int) -> torch.Tensor:
    """Resizes uint8 (T, H, W, 3) to uint8 (T, 3, S, S) with antialiasing, ignoring the aspect ratio."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)  # (T, 3, S, S)

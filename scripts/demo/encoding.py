"""Scenes to what a model is fed: encoded by real codecs, decoded, sampled, squashed to the model's size.

S: side of the model's picture, T: frames.
"""

import io
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Encoding:
    """One way to store a video."""

    container: str
    codec: str
    options: tuple[tuple[str, str], ...]


def sample_encoding(rng):
    """A container that can be uploaded, a codec that it may hold, and a quality from poor to good."""
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


def encode(frames, *, encoding, fps):
    """uint8 RGB (T, height, width, 3), both sides even -> the bytes of a video file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=encoding.container) as container:
        stream = container.add_stream(encoding.codec, rate=fps, options=dict(encoding.options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_all(video):
    """The bytes of a video file -> uint8 RGB (T, height, width, 3), all of its frames."""
    with av.open(io.BytesIO(video)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def squash(frames, side):
    """uint8 (T, height, width, 3) -> uint8 (T, 3, S, S), antialiased as the image processor does it."""
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)  # (T, 3, S, S)

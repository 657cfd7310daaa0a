"""Synthetic and corrupt video files for tests, benchmarks and the fuzzer, written with PyAV.

    path = write_clip("clip.mp4", numbered_frames(30))    encodes frames with any codec and container of PyAV's FFmpeg
    data = mutated(path.read_bytes(), seed=1)             corrupts a few bytes, reproducibly

T: number of frames; H, W: frame height and width in pixels.
"""

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints a banner otherwise

AUDIO_RATE_HZ = 48000

# Half of all mutations hit the first or last bytes, which usually hold headers and indexes.
_EDGE_BYTES = 2000
_BOUNDARY_VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_MUTATIONS = (
    *("flip", "flip", "integer", "integer", "random", "zero"),
    *("delete", "duplicate", "move", "truncate", "splice"),
)


def numbered_frames(count: int = 30, *, height: int = 144, width: int = 176, seed: int = 0) -> np.ndarray:
    """Returns uint8 (T, H, W, 3) frames, all different: a blocky texture drifts under a gradient and brightens."""
    texture = np.random.default_rng(seed).integers(0, 160, (-(-height // 8), -(-width // 8), 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]  # (H, W, 3)
    gradient = np.linspace(0, 60, width, dtype=np.uint8)[:, None]  # (W, 1)
    frames = [
        np.roll(texture, (2 * i, 3 * i), (0, 1)) + np.roll(gradient, 5 * i, 0) + np.uint8(30 * i // count)
        for i in range(count)
    ]
    return np.stack(frames)  # (T, H, W, 3)


def write_clip(
    target: str | Path | BinaryIO,
    frames: Iterable[np.ndarray],
    *,
    fps: float | Fraction = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    container_format: str | None = None,
    container_options: Mapping[str, str] | None = None,
    pts_ms: Sequence[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    audio_codec: str | None = None,
    audio_seconds: float | None = None,
    metadata: Mapping[str, str] | None = None,
    extradata: bytes | None = None,
) -> Path | BinaryIO:
    """Encodes frames into a video file.

    Args:
        target: The path of the file to write, or a file object; a file object needs `container_format`.
        frames: uint8 (H, W, 3) RGB each, all of one size: an array (T, H, W, 3), a list or a generator.
        fps: The frame rate. Ignored by the timestamps where `pts_ms` is given.
        codec: FFmpeg's name of the encoder.
        pix_fmt: The pixel format to encode.
        options: Options of the encoder, e.g. `{"g": "12", "x264-params": "open-gop=1"}`.
        container_format: FFmpeg's name of the muxer. Derived from the suffix of the path by default.
        container_options: Options of the muxer, e.g. `{"movflags": "frag_keyframe+empty_moov"}`.
        pts_ms: The presentation time of each frame in milliseconds, for a variable frame rate.
        rotation: Clockwise rotation in degrees that a player must apply: 0, 90, 180 or 270.
        mirrored: Whether a player must flip the frames horizontally, before it rotates them.
        audio_codec: FFmpeg's name of an audio encoder. Adds a tone as an audio stream.
        audio_seconds: Duration of the tone. The duration of the video by default.
        metadata: Tags of the container, e.g. `{"title": "..."}`.
        extradata: Codec header, for an encoder that does not write one.

    Returns:
        The target, a path as a Path.
    """
    if isinstance(target, str):
        target = Path(target)
    file = str(target) if isinstance(target, Path) else target
    time_base = 1 / Fraction(fps) if pts_ms is None else Fraction(1, 1000)
    with av.open(file, "w", format=container_format, options=dict(container_options or {})) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        if extradata:
            stream.codec_context.extradata = extradata
        if rotation or mirrored:
            # PyAV rotates counter-clockwise and flips last; a flip after a rotation reverses its direction.
            stream.set_display_rotation(rotation if mirrored else -rotation, hflip=mirrored)
        audio = container.add_stream(audio_codec, rate=AUDIO_RATE_HZ) if audio_codec else None
        frame_count = 0
        for i, pixels in enumerate(frames):
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = (i if pts_ms is None else pts_ms[i]), time_base
            container.mux(stream.encode(frame))
            frame_count += 1
        container.mux(stream.encode(None))
        if audio:
            write_tone(container, audio, audio_seconds or float(frame_count / Fraction(fps)))
    return target


def write_tone(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    """Encodes a sine tone into an audio stream of an open container."""
    tone = (0.2 * np.sin(np.arange(int(AUDIO_RATE_HZ * seconds)) * 0.06)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
    frame.sample_rate = AUDIO_RATE_HZ
    resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=AUDIO_RATE_HZ)
    fifo = av.AudioFifo()
    for resampled in resampler.resample(frame):
        resampled.pts = None
        fifo.write(resampled)
    written = 0
    while chunk := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
        chunk.pts, chunk.time_base = written, Fraction(1, AUDIO_RATE_HZ)
        written += chunk.samples
        container.mux(stream.encode(chunk))
    container.mux(stream.encode(None))


def mutated(data: bytes, seed: int | random.Random, *, donors: Sequence[bytes] | None = None) -> bytes:
    """Returns the bytes with 1 to 16 random mutations. Equal seeds give equal mutations.

    Args:
        data: The bytes to corrupt, at least one.
        seed: Seed of the random numbers, or their generator.
        donors: Files from which pieces are copied. `data` itself by default.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8, 16))):
        _mutate_once(result, rng.choice(donors or [data]), rng)
    return bytes(result)


def _mutate_once(data: bytearray, donor: bytes, rng: random.Random) -> None:
    """Applies one mutation to `data` in place and leaves at least one byte."""
    edge = min(_EDGE_BYTES, len(data))
    start = rng.randrange(len(data))
    if rng.random() < 0.5:
        start = rng.choice((rng.randrange(edge), len(data) - 1 - rng.randrange(edge)))
    size = rng.choice((1, 2, 4, 8, 16, 64, 256))
    piece = slice(start, start + size)
    kind = rng.choice(_MUTATIONS)
    if kind == "flip":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "integer":
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice(_BOUNDARY_VALUES) % 256**width
        data[start : start + width] = value.to_bytes(width, rng.choice(("big", "little")))
    elif kind == "random":
        data[piece] = rng.randbytes(size)
    elif kind == "zero":
        data[piece] = bytes(size)
    elif kind == "delete":
        del data[piece]
    elif kind == "duplicate":
        data[start:start] = data[piece]
    elif kind == "move":
        moved = data[piece]
        del data[piece]
        target = rng.randrange(len(data) + 1)
        data[target:target] = moved
    elif kind == "truncate":
        del data[start:]
    else:
        donor_start = rng.randrange(len(donor))
        data[piece] = donor[donor_start : donor_start + size]
    if not data:
        data.append(0)

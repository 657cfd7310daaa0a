"""Small video files for the tests, made with PyAV: any container and codec that its FFmpeg can write.

    write_clip(path, frames, ...)    frames -> a file; everything else is built on it
    numbered_frames(...)             frames that differ from each other in every corner
    audio_only, subtitles_only       files without a video stream
    remux                            the same packets in a new file: cut, shifted, renamed, in two streams
    mutated                          bytes with a few of them changed
"""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Letters in shapes: T frames, H and W their height and width.


def numbered_frames(count=30, *, height=144, width=176, seed=0) -> np.ndarray:
    """uint8 (T, H, W, 3): a coarse texture that drifts, under a gradient that brightens; no two frames are alike."""
    texture = np.random.default_rng(seed).integers(0, 160, (-(-height // 8), -(-width // 8), 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]  # (H, W, 3)
    gradient = np.linspace(0, 60, width, dtype=np.uint8)[:, None]  # (W, 1)
    frames = [
        np.roll(texture, (2 * i, 3 * i), axis=(0, 1)) + np.roll(gradient, 5 * i, axis=0) + np.uint8(30 * i // count)
        for i in range(count)
    ]
    return np.stack(frames)  # (T, H, W, 3)


def write_clip(
    path,
    frames,
    *,
    fps=25,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    container_format=None,
    container_options=None,
    pts_ms=None,
    rotation=0,
    mirrored=False,
    audio_codec=None,
    audio_seconds=None,
    metadata=None,
) -> Path:
    """Encode `frames`, uint8 (T, H, W, 3) RGB, into the file `path`, and return its path.

    Args:
        codec, pix_fmt: encoder and pixel format.
        options: the encoder's, such as {"g": "12", "x264-params": "open-gop=1"}.
        container_format: FFmpeg's muxer, if the path's suffix does not say it.
        container_options: the muxer's, such as {"movflags": "frag_keyframe+empty_moov"}.
        pts_ms: display times in milliseconds, one per frame, for a variable frame rate.
        rotation: degrees clockwise that a player must turn the picture (0, 90, 180, 270).
        mirrored: the player must mirror the picture left to right, before it turns it.
        audio_codec: also write a tone, `audio_seconds` long (as long as the video, if not given).
    """
    path = Path(path)
    time_base = Fraction(1, 1000) if pts_ms is not None else 1 / Fraction(fps)
    with av.open(
        str(path), "w", format=container_format, options={"fflags": "+bitexact", **(container_options or {})}
    ) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.codec_context.time_base = time_base
        if rotation or mirrored:
            # PyAV turns counter-clockwise and mirrors last; a mirror changes the sense of the turn before it.
            stream.set_display_rotation(rotation if mirrored else -rotation, hflip=mirrored)
        sound = container.add_stream(audio_codec, rate=48000) if audio_codec else None
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = (i if pts_ms is None else pts_ms[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            _write_tone(container, sound, audio_seconds or len(frames) / float(fps))
    return path


def audio_only(path, *, codec="aac", seconds=1.0) -> Path:
    """A tone, no video stream."""
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream(codec, rate=48000), seconds)
    return Path(path)


def _write_tone(container, stream, seconds):
    count = int(48000 * seconds)
    tone = (0.2 * np.sin(np.arange(count) * 0.06)).astype(np.float32)
    fifo = av.AudioFifo()
    frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
    frame.sample_rate = 48000
    resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=48000)
    for resampled in resampler.resample(frame):
        resampled.pts = None
        fifo.write(resampled)
    size = stream.codec_context.frame_size or 1024
    written = 0
    while chunk := fifo.read(size, partial=True):
        chunk.pts, chunk.time_base = written, Fraction(1, 48000)
        written += chunk.samples
        container.mux(stream.encode(chunk))
    container.mux(stream.encode(None))


def remux(source, path, *, edit=None, copies=1, container_format=None, container_options=None) -> Path:
    """The video packets of the file `source`, undecoded, in a new file.

    Args:
        edit: called with (number, packet), both of the source; returns the packet to write, changed or not, or None.
        copies: write so many video streams, all alike.
    """
    with av.open(str(source)) as old, av.open(
        str(path), "w", format=container_format, options=container_options or {}
    ) as new:
        streams = [new.add_stream_from_template(old.streams.video[0]) for _ in range(copies)]
        for i, packet in enumerate(old.demux(video=0)):
            if packet.size and (edit is None or (packet := edit(i, packet)) is not None):
                for stream in streams:
                    packet.stream = stream
                    new.mux(packet)
    return Path(path)


def mutated(data: bytes, seed: int, *, changes=8) -> bytes:
    """`data` with a few bytes changed, or a piece cut out, doubled or zeroed; the same for the same seed."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.randint(1, changes)):
        i, size = rng.randrange(len(damaged)), rng.randint(1, 64)
        kind = rng.choice(("flip", "flip", "flip", "zero", "cut", "double"))
        if kind == "flip":
            damaged[i] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            damaged[i:i + size] = bytes(len(damaged[i:i + size]))
        elif kind == "cut":
            del damaged[i:i + size]
        else:
            damaged[i:i] = damaged[i:i + size]
        damaged = damaged or bytearray(1)
    return bytes(damaged)

"""Small video files for the tests, made with PyAV: any container and codec that its FFmpeg can write.

write_clip(path, frames, ...)    frames -> a file; nearly everything is built on it
numbered_frames(count, ...)      frames of which no two are alike
remux(path, *sources, ...)       packets of other files in a new one: some left out, shifted, relabelled
audio_only, subtitles_only, cover_art_only, encoded_picture, with_external_media
                                 files that hold no moving pictures of their own
mutated(data, seed)              the bytes with a few of them changed
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder greets everybody otherwise

# Letters in shapes: T frames, H and W their height and width.


def numbered_frames(count=30, *, height=144, width=176, seed=0) -> np.ndarray:
    """uint8 (T, H, W, 3): a coarse texture that drifts under a gradient, and brightens; no two are alike."""
    texture = np.random.default_rng(seed).integers(0, 160, (-(-height // 8), -(-width // 8), 3), np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]  # (H, W, 3)
    gradient = np.linspace(0, 60, width, dtype=np.uint8)[:, None]  # (W, 1)
    frames = [
        np.roll(texture, (2 * i, 3 * i), (0, 1)) + np.roll(gradient, 5 * i, 0) + np.uint8(30 * i // count)
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
    extradata=None,
) -> Path:
    """Encodes `frames`, (T, H, W, 3) uint8 RGB, into the file `path` and returns the path.

    Args:
        codec, pix_fmt: encoder and pixel format.
        options: the encoder's, such as {"g": "12", "x264-params": "open-gop=1"}.
        container_format: FFmpeg's muxer, where the path's suffix does not say it.
        container_options: the muxer's, such as {"movflags": "frag_keyframe+empty_moov"}.
        pts_ms: when each frame is shown, in milliseconds, for a variable frame rate.
        rotation: degrees clockwise by which a player must turn the picture: 0, 90, 180 or 270.
        mirrored: a player must mirror the picture left to right, before it turns it.
        audio_codec: writes a tone as well, `audio_seconds` long, or as long as the video.
        metadata: such as {"title": "..."}.
        extradata: the codec's header, for an encoder that writes none of its own.
    """
    time_base = 1 / Fraction(fps) if pts_ms is None else Fraction(1, 1000)
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        if extradata:
            stream.codec_context.extradata = extradata
        if rotation or mirrored:
            # PyAV turns counter-clockwise, and mirrors last: that reverses the sense of a turn before it.
            stream.set_display_rotation(rotation if mirrored else -rotation, hflip=mirrored)
        audio = container.add_stream(audio_codec, rate=48000) if audio_codec else None
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = (i if pts_ms is None else pts_ms[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            _write_tone(container, audio, audio_seconds or float(len(frames) / Fraction(fps)))
    return Path(path)


def remux(path, *sources, edit=None, container_options=None) -> Path:
    """Writes the first video stream of each of the files `sources`, undecoded, into a new file.

    Args:
        edit: called with (number, packet); returns the packet to write, changed or not, or None to drop it.
    """
    with contextlib.ExitStack() as opened:
        new = opened.enter_context(av.open(str(path), "w", options=container_options or {}))
        olds = [opened.enter_context(av.open(str(source))) for source in sources]
        streams = [new.add_stream_from_template(old.streams.video[0]) for old in olds]
        for old, stream in zip(olds, streams):
            for i, packet in enumerate(old.demux(video=0)):
                if packet.size and (edit is None or (packet := edit(i, packet)) is not None):
                    packet.stream = stream
                    new.mux(packet)
    return Path(path)


def audio_only(path, *, codec="aac", seconds=1.0) -> Path:
    """A tone."""
    with av.open(str(path), "w") as container:
        _write_tone(container, container.add_stream(codec, rate=48000), seconds)
    return Path(path)


def _write_tone(container, stream, seconds):
    tone = (0.2 * np.sin(np.arange(int(48000 * seconds)) * 0.06)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
    frame.sample_rate = 48000
    resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=48000)
    fifo = av.AudioFifo()
    for resampled in resampler.resample(frame):
        resampled.pts = None
        fifo.write(resampled)
    written = 0
    while chunk := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
        chunk.pts, chunk.time_base = written, Fraction(1, 48000)
        written += chunk.samples
        container.mux(stream.encode(chunk))
    container.mux(stream.encode(None))


def subtitles_only(path) -> Path:
    """One line of text in a Matroska file."""
    with av.open(str(path), "w", format="matroska") as container:
        _write_packet(container, container.add_mux_stream("subrip"), b"Good evening.")
    return Path(path)


def cover_art_only(path) -> Path:
    """A tone with a picture of its record's sleeve, which FFmpeg gives as a video stream."""
    with av.open(str(path), "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=48000)
        cover = container.add_mux_stream("png", width=16, height=16)
        cover.disposition = av.stream.Disposition.attached_pic
        _write_packet(container, cover, encoded_picture("png"))
        _write_tone(container, audio, 0.5)
    return Path(path)


def _write_packet(container, stream, data):
    packet = av.Packet(data)
    packet.pts = packet.dts = 0
    packet.duration, packet.time_base, packet.stream = 1, Fraction(1), stream
    container.mux(packet)


def encoded_picture(codec, *, pix_fmt="rgb24") -> bytes:
    """A 16 x 16 picture as the bytes of a PNG ("png") or JPEG ("mjpeg", pix_fmt="yuvj420p") file."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 16, 16, pix_fmt, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 90, np.uint8), format="rgb24")
    packets = encoder.encode(frame.reformat(format=pix_fmt)) + encoder.encode(None)
    return b"".join(bytes(packet) for packet in packets)


def with_external_media(mp4: bytes, target: str) -> bytes:
    """The mp4 file, its header changed to say that the media lie in the file `target` (a QuickTime alias).

    The header must come after the media, as `write_clip` puts it: then nothing in it has to be moved.
    """
    path = target.encode() + b"\0" * (len(target) % 2)
    alias = bytes(4 + 130) + struct.pack(">HH16xHH", 1, 1, 2, len(target)) + path + b"\xff\xff\0\0"
    new = struct.pack(">I4s", len(alias) + 8, b"alis") + alias
    return with_other_reference(mp4, struct.pack(">I4sI", 12, b"url ", 1), new)


def with_other_reference(mp4: bytes, old: bytes, new: bytes) -> bytes:
    """The mp4 file, a box of its `dref` exchanged for another. The header must come after the media."""
    at = mp4.index(old, mp4.index(b"dref"))
    changed = bytearray(mp4[:at] + new + mp4[at + len(old) :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        size_at = mp4.index(name) - 4
        size = struct.unpack_from(">I", mp4, size_at)[0] + len(new) - len(old)
        struct.pack_into(">I", changed, size_at, size)
    return bytes(changed)


def mutated(data: bytes, seed: int, *, changes=8) -> bytes:
    """The bytes with a few of them flipped, zeroed, cut out or doubled; the same ones for the same seed."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.randint(1, changes)):
        i, size = rng.randrange(len(damaged)), rng.randint(1, 64)
        kind = rng.choice(("flip", "flip", "flip", "zero", "cut", "double"))
        if kind == "flip":
            damaged[i] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            damaged[i : i + size] = bytes(len(damaged[i : i + size]))
        elif kind == "cut":
            damaged[i : i + size] = b""
        else:
            damaged[i:i] = damaged[i : i + size]
        damaged = damaged or bytearray(1)
    return bytes(damaged)

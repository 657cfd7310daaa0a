"""Special video files for the tests, made from ordinary ones.

write_clip, numbered_frames, mutated     from synthetic.py
varied_clips                             files of several sizes, containers and lengths
remux, concatenate, with_data            packets of other files, edited, in a new file
audio_only, subtitles_only, cover_art_only, encoded_image, with_external_media
                                         files without a usable video
"""

from __future__ import annotations

import contextlib
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from synthetic import mutated, numbered_frames, write_clip, write_tone  # noqa: F401


def varied_clips(folder: Path) -> list[Path]:
    """Four files of different sizes, containers and lengths, with constant frame rates."""
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)),
        write_clip(folder / "b.webm", numbered_frames(21, height=90, width=64, seed=2), codec="libvpx"),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)),
        write_clip(folder / "d.ts", numbered_frames(40, height=72, width=96, seed=4)),
    ]


def remux(path, *sources, edit=None, container_options=None, default_source=None) -> Path:
    """Copies the packets of the first video stream of each source into a stream of a new file.

    Args:
        edit: called with (packet number, packet); returns the packet to write, or None to drop it.
        default_source: number of the source that becomes the default stream.
    """
    with contextlib.ExitStack() as opened:
        new = opened.enter_context(av.open(str(path), "w", options=container_options or {}))
        olds = [opened.enter_context(av.open(str(source))) for source in sources]
        streams = [new.add_stream_from_template(old.streams.video[0]) for old in olds]
        if default_source is not None:
            streams[default_source].disposition = av.stream.Disposition.default
        for old, stream in zip(olds, streams):
            for i, packet in enumerate(old.demux(video=0)):
                if packet.size and (edit is None or (packet := edit(i, packet)) is not None):
                    packet.stream = stream
                    new.mux(packet)
    return Path(path)


def concatenate(path, *sources, overlap_s=0.0, edit=None, template=None) -> Path:
    """Copies the packets of the first video streams of `sources`, one after the other, into one stream of a new file.

    Args:
        overlap_s: seconds by which the timestamps of successive sources overlap.
        edit: called with (source number, packet number, packet); returns the packet to write, or None to drop it.
        template: file with the codec header to write; the first source by default.
    """
    with contextlib.ExitStack() as opened:
        new = opened.enter_context(av.open(str(path), "w"))
        header = opened.enter_context(av.open(str(template or sources[0]))).streams.video[0]
        old = [opened.enter_context(av.open(str(source))) for source in sources]
        stream = new.add_stream_from_template(header)
        start_s, last_dts = Fraction(0), -(2**62)
        for part, container in enumerate(old):
            packets = [packet for packet in container.demux(video=0) if packet.size]
            shift = round(start_s / packets[0].time_base) - min(packet.pts for packet in packets)
            end = max(packet.pts + packet.duration for packet in packets) + shift
            start_s = end * packets[0].time_base - Fraction(overlap_s)
            for i, packet in enumerate(packets):
                if edit is None or (packet := edit(part, i, packet)) is not None:
                    packet.pts += shift
                    packet.dts = last_dts = max(packet.dts + shift, last_dts + 1)
                    packet.stream = stream
                    new.mux(packet)
    return Path(path)


def with_data(packet, data: bytes) -> av.Packet:
    """A packet with the timestamps and flags of another."""
    changed = av.Packet(data)
    changed.pts, changed.dts, changed.duration = packet.pts, packet.dts, packet.duration
    changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
    return changed


def audio_only(path, *, codec="aac", seconds=1.0) -> Path:
    """An audio file with a tone."""
    with av.open(str(path), "w") as container:
        write_tone(container, container.add_stream(codec, rate=48000), seconds)
    return Path(path)


def subtitles_only(path) -> Path:
    """A Matroska file with one subtitle."""
    with av.open(str(path), "w", format="matroska") as container:
        _write_packet(container, container.add_mux_stream("subrip"), b"Good evening.")
    return Path(path)


def cover_art_only(path) -> Path:
    """A tone with cover art, which FFmpeg lists as a video stream."""
    with av.open(str(path), "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=48000)
        cover = container.add_mux_stream("png", width=16, height=16)
        cover.disposition = av.stream.Disposition.attached_pic
        _write_packet(container, cover, encoded_image("png"))
        write_tone(container, audio, 0.5)
    return Path(path)


def _write_packet(container, stream, data):
    packet = av.Packet(data)
    packet.pts = packet.dts = 0
    packet.duration, packet.time_base, packet.stream = 1, Fraction(1), stream
    container.mux(packet)


def encoded_image(codec, *, pix_fmt="rgb24") -> bytes:
    """The bytes of a 16 x 16 image file, e.g. PNG ("png") or JPEG ("mjpeg", pix_fmt="yuvj420p")."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 16, 16, pix_fmt, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 90, np.uint8), format="rgb24")
    packets = encoder.encode(frame.reformat(format=pix_fmt)) + encoder.encode(None)
    return b"".join(bytes(packet) for packet in packets)


def with_external_media(mp4: bytes, target: str) -> bytes:
    """An mp4 file whose header states that its media are in the file `target` (a QuickTime alias).

    The header of `mp4` must follow the media, as in files of `write_clip`: then its offsets stay valid.
    """
    path = target.encode() + b"\0" * (len(target) % 2)
    alias = bytes(4 + 130) + struct.pack(">HH16xHH", 1, 1, 2, len(target)) + path + b"\xff\xff\0\0"
    new = struct.pack(">I4s", len(alias) + 8, b"alis") + alias
    return with_other_reference(mp4, struct.pack(">I4sI", 12, b"url ", 1), new)


def with_other_reference(mp4: bytes, old: bytes, new: bytes) -> bytes:
    """An mp4 file with another box in its `dref`. The header of `mp4` must follow the media."""
    at = mp4.index(old, mp4.index(b"dref"))
    changed = bytearray(mp4[:at] + new + mp4[at + len(old) :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        size_at = mp4.index(name) - 4
        size = struct.unpack_from(">I", mp4, size_at)[0] + len(new) - len(old)
        struct.pack_into(">I", changed, size_at, size)
    return bytes(changed)

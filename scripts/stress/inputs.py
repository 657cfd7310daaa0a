"""The inputs of the stress tests: small valid videos, reproducible corruptions of them, and memory-hungry files."""

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from synthetic import mutated, numbered_frames, write_clip

# File name -> arguments of write_clip. Every accepted container, with the codecs that are common in it.
FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"bf": "2", "g": "8"}},
    "header_first.mp4": {"container_options": {"movflags": "faststart"}},
    "fragmented.mp4": {"options": {"g": "8"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "with_audio.mp4": {"audio_codec": "aac"},
    "10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "rotated.mp4": {"rotation": 90},
    "variable_rate.mp4": {"pts_ms": [40 * i + i * i % 31 for i in range(16)]},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0:pools=1:keyint=8"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "h263.3gp": {"codec": "h263", "size": (144, 176)},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "h264.mkv": {"options": {"bf": "2", "g": "8"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp9_alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "utvideo.avi": {"codec": "utvideo", "pix_fmt": "yuv422p"},
    "raw.avi": {"codec": "rawvideo", "pix_fmt": "bgr24", "count": 3},
    "h264.ts": {"options": {"bf": "2", "g": "8"}},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "h264.flv": {"options": {"g": "8"}},
    "sorenson.flv": {"codec": "flv"},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "wmv2.wmv": {"codec": "wmv2"},
    "vp8.ogg": {"codec": "libvpx", "container_format": "ogg"},
}


TS_PACKET_BYTES = 188
FIRST_PID = 0x20  # lower ones are reserved


def make_files() -> dict[str, bytes]:
    """Encodes the valid files. Returns the contents by file name."""
    files = {}
    with tempfile.TemporaryDirectory(prefix="vivit-stress-") as folder:
        for name, arguments in FILES.items():
            options = dict(arguments)
            height, width = options.pop("size", (48, 64))
            frames = numbered_frames(options.pop("count", 16), height=height, width=width)
            files[name] = write_clip(Path(folder) / name, frames, **options).read_bytes()
    return files


def make_memory_hungry_files() -> dict[str, bytes]:
    """Makes files whose decoding leaves hundreds of MB allocated in a decoder process. Returns them by file name."""
    frames = numbered_frames(16, height=48, width=64)
    shades = (np.full((3000, 3000, 3), 20 * i, np.uint8) for i in range(8))
    with tempfile.TemporaryDirectory(prefix="vivit-stress-") as folder:
        transport_stream = write_clip(Path(folder) / "one_stream.ts", frames).read_bytes()
        large_frames = write_clip(Path(folder) / "large_frames.mov", shades, codec="mjpeg", pix_fmt="yuvj420p")
        return {
            "many_streams.ts": with_many_streams(transport_stream, count=1170),
            "large_frames.mov": large_frames.read_bytes(),
        }


def with_many_streams(transport_stream: bytes, *, count: int) -> bytes:
    """Returns a transport stream of copies of the video stream, each with a PID of its own, and without tables."""
    packets = [
        transport_stream[start : start + TS_PACKET_BYTES] for start in range(0, len(transport_stream), TS_PACKET_BYTES)
    ]
    ((video_pid, _),) = Counter(_pid(packet) for packet in packets).most_common(1)
    return b"".join(
        packet[:1] + (_flags(packet) << 13 | pid).to_bytes(2, "big") + packet[3:]
        for packet in packets
        if _pid(packet) == video_pid
        for pid in range(FIRST_PID, FIRST_PID + count)
    )


# The second and third byte of a packet: 3 bits of flags, 13 bits PID.


def _flags(packet: bytes) -> int:
    return packet[1] >> 5


def _pid(packet: bytes) -> int:
    return int.from_bytes(packet[1:3], "big") & 0x1FFF


def make_input(files: dict[str, bytes], *, seed: int, number: int) -> tuple[str, bytes]:
    """Returns input `number` of a seed: the name of a file and its corrupted contents."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(files))
    return name, mutated(files[name], rng, donors=list(files.values()))

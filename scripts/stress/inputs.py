"""The inputs of the stress tests: small valid videos and reproducible corruptions of them."""

import random
import tempfile
from pathlib import Path
from typing import Any

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


def make_input(files: dict[str, bytes], *, seed: int, number: int) -> tuple[str, bytes]:
    """Returns input `number` of a seed: the name of a file and its corrupted contents."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(files))
    return name, mutated(files[name], rng, donors=list(files.values()))

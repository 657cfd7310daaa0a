"""Limits on videos, and the checks that enforce them.

The values in the file header are checked before anything is decoded, the actual values as soon as they are known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from handler.video.errors import FrameTooLargeError, TooManyFramesError, VideoTooLongError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits, inclusive.

    Attributes:
        max_duration_s: duration in seconds.
        max_frame_pixels: width times height of a frame.
        max_frames: frames in the video stream. Without a usable index all of them are decoded.
        max_decode_gigapixels: work of decoding while the video is open, see cost.py.
    """

    max_duration_s: float = float("inf")
    max_frame_pixels: int = sys.maxsize
    max_frames: int = sys.maxsize
    max_decode_gigapixels: float = float("inf")


def check_header(container: InputContainer, stream: VideoStream, limits: Limits) -> None:
    """Checks what the file header states.

    Raises:
        VideoTooLongError, FrameTooLargeError, TooManyFramesError: a limit is exceeded.
    """
    check_duration((container.duration or 0) / av.time_base, limits)
    check_duration(float((stream.duration or 0) * (stream.time_base or 0)), limits)
    check_frame_size(stream.codec_context.width, stream.codec_context.height, limits)
    if stream.frames > limits.max_frames:
        raise TooManyFramesError(f"expected at most {limits.max_frames} frames, got {stream.frames}")


def check_duration(duration_s: float, limits: Limits) -> None:
    """Raises VideoTooLongError if the limit is exceeded."""
    if duration_s > limits.max_duration_s:
        raise VideoTooLongError(f"expected at most {limits.max_duration_s:g} s of video, got {duration_s:.1f} s")


def check_frame_size(width: int, height: int, limits: Limits) -> None:
    """Raises FrameTooLargeError if the limit is exceeded."""
    if width * height > limits.max_frame_pixels:
        raise FrameTooLargeError(f"{expected_frame_size(limits)}, got {width}x{height}")


def expected_frame_size(limits: Limits) -> str:
    """The first half of the message of a FrameTooLargeError."""
    return f"expected frames of at most {limits.max_frame_pixels} pixels"


def max_pixels_option(limits: Limits) -> dict[str, str]:
    """FFmpeg's option `max_pixels`, which stops decoders before they allocate a frame.

    It has 31 bits. FFmpeg also counts the rows and columns that pad a frame to whole blocks, so the value is larger
    than the limit; `check_frame_size` is exact.
    """
    return {"max_pixels": str(min(2 * limits.max_frame_pixels + 2**23, 2**31 - 1))}

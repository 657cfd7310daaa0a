"""The orientation of frames, from the display matrix, and their conversion to upright RGB."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from handler.video.errors import UnsupportedCodecError

RGBFrame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored frame upright: transpose it, then reverse its rows, its columns, or both."""

    is_transposed: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """Reads the display matrix (a b u; c d v; x y w): pixel (p, q) is displayed at (a p + c q, b p + d q)."""
        try:
            # PyAV declares only one of the keys of side_data.
            side_data = cast(Mapping[str, memoryview], frame.side_data)
            matrix = np.frombuffer(side_data["DISPLAYMATRIX"], np.int32)
        except (KeyError, ValueError):  # no display matrix, or side data that PyAV does not know
            return cls()
        a, b, c, d = matrix[[0, 1, 3, 4]].tolist()
        if abs(b) > abs(a):
            return cls(is_transposed=True, reverse_rows=b < 0, reverse_columns=c < 0)
        return cls(is_transposed=False, reverse_rows=d < 0, reverse_columns=a < 0)

    @property
    def rotation(self) -> int:
        """Clockwise rotation in degrees. Frames that the file mirrors are first flipped horizontally."""
        if self.is_transposed:
            return 90 if self.reverse_columns else 270
        return 180 if self.reverse_rows else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an upright frame, from those of a stored one."""
        return (height, width) if self.is_transposed else (width, height)

    def apply(self, frame: RGBFrame) -> RGBFrame:
        """The upright frame, as a view.

        Args:
            frame: uint8 (H, W, 3) as stored.

        Returns:
            uint8 (H, W, 3), or (W, H, 3) if transposed.
        """
        if self.is_transposed:
            frame = frame.transpose(1, 0, 2)  # (W, H, 3)
        return frame[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1]


class UprightRGBConverter:
    """Converts decoded frames to upright RGB in any thread. All get the size and orientation of the first."""

    def __init__(self, first: VideoFrame):
        self._local = threading.local()
        self._width, self._height = first.width, first.height
        self._orientation = Orientation.of(first)

    def __call__(self, frame: VideoFrame) -> RGBFrame:
        """Converts a frame.

        Returns:
            uint8 (H, W, 3).

        Raises:
            UnsupportedCodecError: FFmpeg cannot convert the frame's color space.
        """
        if not hasattr(self._local, "reformatter"):  # reused: its setup costs as much as a small frame
            self._local.reformatter = VideoReformatter()
        try:
            rgb: VideoFrame = self._local.reformatter.reformat(frame, self._width, self._height, "rgb24", threads=1)
        except av.FFmpegError as error:
            found = f"{frame.format.name}, color space {int(frame.colorspace)}"
            raise UnsupportedCodecError(f"expected frames that can be converted to RGB, got {found}") from error
        return self._orientation.apply(rgb_view(rgb))


def rgb_view(frame: VideoFrame) -> RGBFrame:
    """The pixels of an rgb24 frame as a view, uint8 (height, width, 3)."""
    plane = frame.planes[0]
    pixels = np.frombuffer(memoryview(plane), np.uint8)
    rows = pixels.reshape(plane.height, abs(plane.line_size))  # (height, padded row)
    if plane.line_size < 0:  # stored bottom-up
        rows = rows[::-1]
    return rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)  # (height, width, 3)

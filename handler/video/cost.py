"""The work of decoding frames: estimated before they are decoded, and limited.

The unit is a gigapixel: 10^9 pixels of decoded frames, times the time per pixel of their codec relative to H.264. It
does not depend on the machine. A new codec needs a factor in `_FACTORS`.
"""

from __future__ import annotations

from av.video.codeccontext import VideoCodecContext

from handler.video.errors import DecodingTooExpensiveError, Postponed
from handler.video.limits import Limits

# Time per decoded pixel relative to H.264: the CPU time of FFmpeg's decoders with one thread, for 48 frames of 1280x720
# of `draw_clip` (scripts/benchmarks/videos.py) at usual bit rates: 0.1 bits per pixel for H.264 (3 ns per pixel) and
# later codecs, 0.2 to 0.3 for MPEG-4 and older ones, 2 to 6 for codecs that compress each frame on its own. The size of
# the file is not taken into account: it adds 0.1 to 0.2 s per MB for H.264 and later codecs, 0.02 to 0.05 s for others.
_FACTORS = {
    "h264": 1.0,
    "hevc": 1.5,
    "vp8": 0.8,
    "vp9": 1.0,
    "libdav1d": 0.8,
    "mpeg4": 0.4,
    "mpeg2video": 0.5,
    "mpeg1video": 0.5,
    "h263": 0.4,
    "flv": 0.4,
    "msmpeg4": 0.4,
    "msmpeg4v2": 0.4,
    "wmv1": 0.4,
    "wmv2": 0.7,
    "mjpeg": 1.0,
    "prores": 4.0,
    "dnxhd": 3.0,
    "png": 9.0,
    "gif": 1.0,
    "ffv1": 12.0,
    "huffyuv": 3.0,
    "ffvhuff": 2.5,
    "utvideo": 1.3,
    "qtrle": 0.6,
    "rawvideo": 0.1,
}
_DEFAULT_FACTOR = 1.5


class DecodingBudget:
    """The work of decoding one video.

    Args:
        codec_context: of the stream, for the codec and the size of its frames.
        limits: upper limits on the video.
        postpone_above_gigapixels: more work raises Postponed, unless None.

    Attributes:
        decoded_frames: frames decoded so far.
    """

    def __init__(
        self, codec_context: VideoCodecContext, limits: Limits, *, postpone_above_gigapixels: float | None = None
    ):
        self.decoded_frames = 0
        self._decoded_gigapixels = 0.0
        self._codec_context = codec_context
        self._factor = _FACTORS.get(codec_context.name, _DEFAULT_FACTOR)
        self._limits = limits
        self._postpone_above_gigapixels = postpone_above_gigapixels

    def gigapixels(self, *, frame_count: int) -> float:
        """Returns the work of decoding `frame_count` frames."""
        return frame_count * self._codec_context.width * self._codec_context.height * self._factor / 1e9

    def check(self, *, frame_count: int) -> None:
        """Checks that the work done so far and that of `frame_count` more frames are within the limits.

        Raises:
            DecodingTooExpensiveError: they exceed Limits.max_decode_gigapixels.
            Postponed: they exceed `postpone_above_gigapixels`.
        """
        gigapixels = self._decoded_gigapixels + self.gigapixels(frame_count=frame_count)
        self._check(
            gigapixels, self.decoded_frames + frame_count, self._codec_context.width, self._codec_context.height
        )

    def count(self, *, width: int, height: int) -> None:
        """Counts a decoded frame, and checks the limits again, because its size may differ from that in the header.

        Raises:
            DecodingTooExpensiveError: the work done so far exceeds Limits.max_decode_gigapixels.
            Postponed: it exceeds `postpone_above_gigapixels`.
        """
        self.decoded_frames += 1
        self._decoded_gigapixels += width * height * self._factor / 1e9
        self._check(self._decoded_gigapixels, self.decoded_frames, width, height)

    def _check(self, gigapixels: float, frame_count: int, width: int, height: int) -> None:
        if gigapixels > self._limits.max_decode_gigapixels:
            raise DecodingTooExpensiveError(
                f"expected at most {self._limits.max_decode_gigapixels:g} gigapixels to decode, "
                f"got {gigapixels:.3g}: {frame_count} frames of {width}x{height}, codec {self._codec_context.name}"
            )
        if self._postpone_above_gigapixels is not None and gigapixels > self._postpone_above_gigapixels:
            raise Postponed(gigapixels)

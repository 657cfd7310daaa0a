"""How much work it is to decode frames, estimated before anything is decoded.

The unit is a gigapixel of H.264: 10^9 pixels of decoded frames, times a factor for codecs that take more or less time
per pixel. It does not depend on the machine.
"""

from __future__ import annotations

# Time per decoded pixel relative to H.264.
_FACTORS: dict[str, float] = {"h264": 1.0}
_FACTOR_OF_OTHERS = 1.0


def pixel_factor(codec: str) -> float:
    """The time to decode a pixel relative to H.264.

    Args:
        codec: FFmpeg's name of the decoder.
    """
    return _FACTORS.get(codec, _FACTOR_OF_OTHERS)

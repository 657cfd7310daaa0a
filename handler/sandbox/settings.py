"""Settings of the decoder processes."""

import dataclasses
from typing import TYPE_CHECKING

from handler.clips import ClipSettings

if TYPE_CHECKING:
    from handler.options import HandlerOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What a decoder process makes from a video, and its resource limits.

    Attributes:
        clip: How to sample, resize and crop.
        max_decode_s: Seconds of wall time from the arrival of the video to the finished clip.
        max_memory_bytes: Address space that one video may use, in addition to what the process uses when idle.
        requires_confinement: Whether a process exits if a part of its confinement is missing, see confinement.py.
    """

    clip: ClipSettings
    max_decode_s: float
    max_memory_bytes: int
    requires_confinement: bool = False

    @classmethod
    def from_options(cls, options: "HandlerOptions", *, clip: ClipSettings) -> "DecoderSettings":
        """Combines the limits of a deployment's options with a model's clip settings."""
        return cls(
            clip=clip,
            max_decode_s=options.max_decode_s,
            max_memory_bytes=options.max_decode_memory_bytes,
            requires_confinement=options.sandbox == "required",
        )

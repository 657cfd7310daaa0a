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
        max_batch_decode_s: Seconds in which the videos of a batch are decoded, if it has several.
        max_memory_bytes: Address space that one video may use, in addition to what the process uses when idle.
        max_videos_per_process: Videos after which a process is replaced. 0: no limit.
        requires_confinement: Whether a process exits if a part of its confinement is missing, see confinement.py.
    """

    clip: ClipSettings
    max_decode_s: float
    max_batch_decode_s: float
    max_memory_bytes: int
    max_videos_per_process: int = 0
    requires_confinement: bool = False

    @property
    def max_growth_bytes(self) -> int:
        """Address space that a process may keep after a video. If it keeps more, it is replaced.

        Thread stacks and heaps that glibc keeps for reuse take 90 to 200 MiB, after 4K video 500 MiB.
        """
        return max(2**28, self.max_memory_bytes // 2)

    @classmethod
    def from_options(cls, options: "HandlerOptions", *, clip: ClipSettings) -> "DecoderSettings":
        """Combines the limits of a deployment's options with a model's clip settings."""
        return cls(
            clip=clip,
            max_decode_s=options.max_decode_s,
            max_batch_decode_s=options.max_batch_decode_s,
            max_memory_bytes=options.max_decode_memory_bytes,
            max_videos_per_process=options.max_videos_per_decoder,
            requires_confinement=options.sandbox == "required",
        )

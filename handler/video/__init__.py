"""Opens untrusted video files and decodes exactly the requested frames."""

from handler.video.decoder import (
    Video,
    VideoInfo,
    decode_frames,
    open_video,
    probe,
)
from handler.video.errors import (
    CorruptVideoError,
    FrameIndexError,
    FrameTooLargeError,
    NoFramesError,
    NotAVideoError,
    NoVideoStreamError,
    TooManyFramesError,
    UnsupportedCodecError,
    UnsupportedContainerError,
    VideoError,
    VideoTooLongError,
)
from handler.video.limits import (
    Limits,
)
from handler.video.recipe import (
    read_video_pyav,
    sample_frame_indices,
)
from handler.video.sampling import (
    sample_frames,
    sample_uniform,
)

__all__ = [
    "CorruptVideoError",
    "FrameIndexError",
    "FrameTooLargeError",
    "Limits",
    "NoFramesError",
    "NoVideoStreamError",
    "NotAVideoError",
    "TooManyFramesError",
    "UnsupportedCodecError",
    "UnsupportedContainerError",
    "Video",
    "VideoError",
    "VideoInfo",
    "VideoTooLongError",
    "decode_frames",
    "open_video",
    "probe",
    "read_video_pyav",
    "sample_frame_indices",
    "sample_frames",
    "sample_uniform",
]

"""Opens untrusted video files and decodes exactly the requested frames.

decoder      open_video, Video: decoding
container    accepted containers and codecs, opening files, choosing a stream, reading packets
limits       Limits, and the checks that enforce them
mp4          reading only the needed packets of a large MP4 file, by the index in its header
index        which packet holds each frame, what must be decoded for it, and the verification of both
bitstream    parsing of NAL units, parameter sets, SEI, VP8 and VP9 headers
orientation  display matrix, conversion to upright RGB
sampling     which frames become a clip
recipe       the functions of the ViViT example in transformers' documentation
cost         how much work it is to decode frames
errors       VideoError and its subclasses
"""

from handler.video.container import VIDEO_STREAMS
from handler.video.decoder import Video, VideoInfo, decode_frames, open_video, probe
from handler.video.errors import (
    CorruptVideoError,
    DecodingTooExpensiveError,
    EmptyPartError,
    FrameIndexError,
    FrameTooLargeError,
    NoFramesError,
    NotAVideoError,
    NoVideoStreamError,
    Postponed,
    TooManyFramesError,
    UnsupportedCodecError,
    UnsupportedContainerError,
    VideoError,
    VideoTooLongError,
)
from handler.video.limits import Limits
from handler.video.recipe import read_video_pyav, sample_frame_indices
from handler.video.sampling import sample_frames, sample_uniform, sample_views

__all__ = [
    "VIDEO_STREAMS",
    "CorruptVideoError",
    "DecodingTooExpensiveError",
    "EmptyPartError",
    "FrameIndexError",
    "FrameTooLargeError",
    "Limits",
    "NoFramesError",
    "NoVideoStreamError",
    "NotAVideoError",
    "Postponed",
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
    "sample_views",
]

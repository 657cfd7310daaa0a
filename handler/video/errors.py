"""Errors for videos that cannot be used.

VideoError                     code
+-- NotAVideoError             not_a_video             not a media file, or a HEIF or AVIF image
+-- UnsupportedContainerError  unsupported_container   a media file in a format that is not accepted
+-- NoVideoStreamError         no_video_stream         audio, subtitles or cover art only
+-- UnsupportedCodecError      unsupported_codec       a video codec that is not accepted
+-- NoFramesError              no_frames               an empty video stream
+-- CorruptVideoError          corrupt_video           unreadable header, or no frame that can be decoded
+-- VideoTooLongError          video_too_long          longer than Limits allow
+-- FrameTooLargeError         frame_too_large         larger frames than Limits allow
+-- TooManyFramesError         too_many_frames         more frames than Limits allow
+-- DecodingTooExpensiveError  decode_cost             more work to decode than Limits allow
+-- FrameIndexError            frame_index             a requested frame index is out of range
+-- EmptyPartError             empty_part              the requested part of the video shows no frame
"""


class VideoError(ValueError):
    """A video cannot be used.

    Attributes:
        code: stable identifier for programs; the message is for people.
    """

    code = "video_error"


class NotAVideoError(VideoError):
    """The data is not a media file, or it is a HEIF or AVIF image."""

    code = "not_a_video"


class UnsupportedContainerError(VideoError):
    """The file format is not accepted: a playlist, an image, a raw stream."""

    code = "unsupported_container"


class NoVideoStreamError(VideoError):
    """The file has no video stream except cover art."""

    code = "no_video_stream"


class UnsupportedCodecError(VideoError):
    """The codec or color space of the video stream is not accepted, unknown, or encrypted."""

    code = "unsupported_codec"


class NoFramesError(VideoError):
    """The video stream is empty."""

    code = "no_frames"


class CorruptVideoError(VideoError):
    """The file header cannot be read, or none of the frames can be decoded."""

    code = "corrupt_video"


class VideoTooLongError(VideoError):
    """The video, or its header, exceeds Limits.max_duration_s."""

    code = "video_too_long"


class FrameTooLargeError(VideoError):
    """The frames exceed Limits.max_frame_pixels."""

    code = "frame_too_large"


class TooManyFramesError(VideoError):
    """The video, or its header, exceeds Limits.max_frames."""

    code = "too_many_frames"


class DecodingTooExpensiveError(VideoError):
    """The work to decode the requested frames exceeds Limits.max_decode_gigapixels."""

    code = "decode_cost"


class FrameIndexError(VideoError, IndexError):
    """A requested frame index is out of range."""

    code = "frame_index"


class EmptyPartError(VideoError):
    """No frame is shown in the requested part of the video: it is outside of the video, or between two frames."""

    code = "empty_part"


class Postponed(Exception):
    """The video was not decoded because it is more work than the caller wants to do now. Not an error of the video.

    Attributes:
        gigapixels: the work, see `Video.decode_gigapixels`.
    """

    def __init__(self, gigapixels: float):
        super().__init__(f"decoding is {gigapixels:.1f} gigapixels of work")
        self.gigapixels = gigapixels

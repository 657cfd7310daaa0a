"""Errors of videos that a decoder process could not finish.

VideoError
└── DecoderError             code
    ├── DecodeTimeoutError   decode_timeout    decoding exceeded the time limit
    ├── DecodeMemoryError    decode_memory     decoding exceeded the memory limit
    └── DecoderCrashError    decoder_crash     the process crashed or sent an invalid reply, twice

DecodersBusyError is not a VideoError: the video was not decoded, because others of its batch took too long.
"""

from handler.video import VideoError


class DecoderError(VideoError):
    """The decoder process could not finish the video."""

    code = "decoder_error"


class DecodeTimeoutError(DecoderError):
    """Decoding exceeded the time limit."""

    code = "decode_timeout"

    @classmethod
    def for_limit(cls, max_decode_s: float) -> "DecodeTimeoutError":
        """Returns the error with a message that states the limit."""
        return cls(f"decoding took longer than {max_decode_s:g} s and was stopped")


class DecodeMemoryError(DecoderError):
    """Decoding exceeded the memory limit."""

    code = "decode_memory"

    @classmethod
    def for_limit(cls, max_memory_bytes: int) -> "DecodeMemoryError":
        """Returns the error with a message that states the limit."""
        return cls(f"decoding this video needs more memory than the limit of {max_memory_bytes / 2**20:.0f} MiB")


class DecoderCrashError(DecoderError):
    """The decoder process crashed or sent an invalid reply, and so did a new one."""

    code = "decoder_crash"


class DecodersBusyError(Exception):
    """The video was not decoded, because the decoder processes were busy for too long. It may succeed later."""

    @classmethod
    def for_limit(cls, max_batch_decode_s: float) -> "DecodersBusyError":
        """Returns the error with a message that states the limit."""
        return cls(f"decoding the videos of the batch took longer than {max_batch_decode_s:g} s")

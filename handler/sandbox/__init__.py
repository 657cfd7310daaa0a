"""Decoding in separate processes, so that no upload can crash, stall or bloat the worker."""

from handler.sandbox.pool import (
    DecodeMemoryError,
    DecoderCrashError,
    DecoderError,
    DecoderPool,
    DecoderSettings,
    DecodeTimeoutError,
)

__all__ = [
    "DecodeMemoryError",
    "DecodeTimeoutError",
    "DecoderCrashError",
    "DecoderError",
    "DecoderPool",
    "DecoderSettings",
]

"""Decodes videos in separate processes, so that no video can crash, block or bloat the worker that serves the model."""

from handler.sandbox.errors import DecodeMemoryError, DecoderCrashError, DecoderError, DecodeTimeoutError
from handler.sandbox.pool import DecoderPool
from handler.sandbox.settings import DecoderSettings

__all__ = [
    "DecodeMemoryError",
    "DecodeTimeoutError",
    "DecoderCrashError",
    "DecoderError",
    "DecoderPool",
    "DecoderSettings",
]

"""Decodes videos in separate processes, so that no video can crash or block the worker, or exhaust its memory.

pool        the worker's side: starts, stops and replaces processes
process     the decoder process: sets its time and memory limits and decodes
confinement what the kernel denies the decoder process: files, network, other processes
settings    what a decoder process makes from a video, and the values of its limits
replies     what the process replies, and the worker's checks of it
wire        messages between the two
errors      DecoderError and its subclasses
"""

from handler.sandbox.confinement import Confinement
from handler.sandbox.errors import (
    DecodeMemoryError,
    DecoderCrashError,
    DecoderError,
    DecodersBusyError,
    DecodeTimeoutError,
)
from handler.sandbox.pool import DecoderPool
from handler.sandbox.settings import DecoderSettings

__all__ = [
    "Confinement",
    "DecodeMemoryError",
    "DecodeTimeoutError",
    "DecoderCrashError",
    "DecoderError",
    "DecoderPool",
    "DecoderSettings",
    "DecodersBusyError",
]

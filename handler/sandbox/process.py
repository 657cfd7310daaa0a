"""The decoder process: receives videos, returns clips.

    python -m handler.sandbox.process SETTINGS WORKER_PID

SETTINGS is a DecoderSettings as JSON, WORKER_PID the process that starts this one. Standard input is a socket, see
wire.py.

The process exits when the worker closes the connection or is killed. A timer (SIGALRM) and resource limits stop it if
a video takes too much time or memory. Before it receives a video, it gives up access to everything else, see
confinement.py.
"""

import contextlib
import gc
import json
import re
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import BinaryIO

import av.subtitles.codeccontext
import av.subtitles.stream
import numpy as np
import numpy.ma

from handler.clips import Clip, load_clip
from handler.processing.resize import ResizeCrop
from handler.sandbox.confinement import confine
from handler.sandbox.errors import DecodeMemoryError
from handler.sandbox.replies import to_message
from handler.sandbox.settings import OUT_OF_MEMORY_STATUS, DecoderSettings
from handler.sandbox.wire import MessageError, rebuild, receive_message, send_message
from handler.video import CorruptVideoError

# PyAV and numpy import these when they are first needed, when no file can be read any more.
_LATE_IMPORTS = (av.subtitles.codeccontext, av.subtitles.stream, numpy.ma)

# More than a decoder allocates at once for a frame of 4096 x 4096.
_FRAME_BYTES = 64 * 2**20


def main() -> None:
    """Serves videos until the connection is closed."""
    settings: DecoderSettings = rebuild(DecoderSettings, json.loads(sys.argv[1]))
    connection = socket.socket(fileno=sys.stdin.fileno())
    _preload_libraries(settings.clip.resize_crop)
    _limit_resources(settings)
    with Path("/proc/self/status").open("rb", buffering=0) as process_status:  # no file can be opened later
        confinement = confine(parent_pid=int(sys.argv[2]))
        if settings.requires_confinement and confinement.missing:
            sys.exit(f"sandbox: required, but this host lacks {'; '.join(confinement.missing)}")
        gc.freeze()  # makes the collection after each video fast
        send_message(connection, {"ready": confinement})
        with contextlib.suppress(EOFError, ConnectionError):  # the worker closed the connection or was killed
            while True:
                _serve_video(connection, settings, process_status)


def _serve_video(connection: socket.socket, settings: DecoderSettings, process_status: BinaryIO) -> None:
    """Receives one video and replies. Raises EOFError if the worker has closed the connection."""
    try:
        request, received = receive_message(connection, max_payload_bytes=settings.max_memory_bytes)
        source = bytes(received)
        del received
    except (MemoryError, MessageError):  # the file alone exceeds the limit
        sys.exit(OUT_OF_MEMORY_STATUS)
    send_message(connection, {"received": True})
    # SIGALRM kills the process even while a decoder loops in C, and even if the worker is gone.
    signal.setitimer(signal.ITIMER_REAL, settings.max_decode_s)
    header, payload = to_message(_load_or_error(source, settings, process_status, **request))
    signal.setitimer(signal.ITIMER_REAL, 0)
    del source
    # PyAV's objects and exceptions form reference cycles, which keep decoders with their threads and frames alive.
    gc.collect()
    send_message(connection, header, payload)


def _preload_libraries(resize_crop: ResizeCrop) -> None:
    """Resizes a frame, which may import torch, so that no library's address space counts against the first video."""
    height, width = np.broadcast_to(resize_crop.resize_to or 1, 2)
    resize_crop.resize_and_crop_frame(np.zeros((3 * height, 3 * width, 3), np.uint8))


def _limit_resources(settings: DecoderSettings) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + settings.max_memory_bytes),
        (resource.RLIMIT_FSIZE, 0),  # the process never writes to a file
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _load_or_error(
    source: bytes,
    settings: DecoderSettings,
    process_status: BinaryIO,
    *,
    threads: int,
    postpone_above_gigapixels: float | None,
) -> Clip | Exception:
    try:
        return load_clip(source, settings.clip, threads=threads, postpone_above_gigapixels=postpone_above_gigapixels)
    except Exception as error:
        if _is_out_of_memory(error) or (
            isinstance(error, CorruptVideoError) and _has_peaked_near_limit(process_status)
        ):
            return DecodeMemoryError.for_limit(settings.max_memory_bytes)
        return error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error was caused by a failed allocation, in Python or in FFmpeg."""
    while error is not None:
        # Python reports a thread whose stack cannot be allocated as a RuntimeError.
        if isinstance(error, MemoryError) or str(error) == "can't start new thread":
            return True
        error = error.__cause__ or error.__context__
    return False


def _has_peaked_near_limit(process_status: BinaryIO) -> bool:
    """Whether an allocation of a frame may have failed, which FFmpeg's decoders report as corrupt data."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    process_status.seek(0)
    match = re.search(rb"VmPeak:\s+(\d+) kB", process_status.read())
    return match is not None and int(match[1]) * 1024 > limit - _FRAME_BYTES


if __name__ == "__main__":
    main()

"""The decoder process: receives videos, returns clips.

    python -m handler.sandbox.process SETTINGS WORKER_PID

SETTINGS is a DecoderSettings as JSON, WORKER_PID the process that starts this one. Standard input is a socket, see
wire.py.

The process exits when the worker closes the connection or is killed. Timers (SIGALRM, SIGPROF) and resource limits stop
it if a video takes too much time or memory. Before it receives a video, it gives up access to everything else, see
confinement.py.
"""

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import signal
import socket
import sys
from typing import Any

import av.subtitles.codeccontext
import av.subtitles.stream
import numpy as np
import numpy.ma
import numpy.random
import PIL.ImageFile

from handler.clips import Clip, ClipLoader
from handler.processing.resize import ResizeCrop
from handler.sandbox.confinement import confine
from handler.sandbox.errors import DecodeMemoryError
from handler.sandbox.replies import to_message
from handler.sandbox.settings import DecoderSettings
from handler.sandbox.wire import OUT_OF_MEMORY_STATUS, MessageError, rebuild, receive_message, send_message
from handler.threads import available_cores, decoder_threads_per_file
from handler.video import CorruptVideoError
from handler.views import Views

# PyAV, numpy and Pillow import these when they are first needed. A confined process can no longer read them.
_LATE_IMPORTS = (av.subtitles.codeccontext, av.subtitles.stream, numpy.ma, numpy.random, PIL.ImageFile)

# More than a decoder allocates at once for a frame of 4096 x 4096.
_FRAME_BYTES = 64 * 2**20

_LIBC = ctypes.CDLL(None)
_TRIMMED_BYTES = 2**29  # 4K video leaves 400 MB, whose reuse saves 20 % of its decoding time


class _ProcessStatus:
    """/proc/self/status, opened before the confinement denies it."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/status", os.O_RDONLY) if sys.platform == "linux" else None

    def read_bytes(self, name: str) -> int:
        """Returns a size such as VmSize, or 0 if the system does not report it."""
        content = b"" if self._file is None else os.pread(self._file, 2**14, 0)
        match = re.search(rf"{name}:\s+(\d+) kB".encode(), content)
        return int(match[1]) * 1024 if match else 0


def main() -> None:
    """Serves videos until the connection is closed."""
    settings: DecoderSettings = rebuild(DecoderSettings, json.loads(sys.argv[1]))
    connection = socket.socket(fileno=sys.stdin.fileno())
    _preload_libraries(settings.clip.resize_crop)
    threads = decoder_threads_per_file(threads=available_cores(), files=1)
    status = _ProcessStatus()
    confinement = confine(parent_pid=int(sys.argv[2]))
    if settings.requires_confinement and confinement.missing:
        sys.exit(f"sandbox: required, but this host lacks {', '.join(confinement.missing)}")
    with ClipLoader(settings.clip, threads=threads) as loader:  # its threads are confined, too
        _limit_resources(settings, status)
        gc.freeze()  # makes the collection after each video fast
        send_message(connection, {"ready": confinement})
        with contextlib.suppress(EOFError, ConnectionError):  # the worker closed the connection or was killed
            while True:
                _serve_video(connection, settings, status, loader)


def _serve_video(
    connection: socket.socket, settings: DecoderSettings, status: _ProcessStatus, loader: ClipLoader
) -> None:
    """Receives one video and replies. Raises EOFError if the worker has closed the connection."""
    try:
        request, received = receive_message(connection, max_payload_bytes=settings.max_memory_bytes)
        source = bytes(received)
        del received
    except (MemoryError, MessageError):  # the file alone exceeds the limit
        sys.exit(OUT_OF_MEMORY_STATUS)
    send_message(connection, {"received": True})
    # SIGALRM and SIGPROF kill the process even while a decoder loops in C, and even if the worker is gone.
    signal.setitimer(signal.ITIMER_REAL, request.pop("max_s"))
    signal.setitimer(signal.ITIMER_PROF, request.pop("max_cpu_s") or 0)
    header, payload = to_message(_load_or_error(source, settings, status, loader, **request))
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    del source
    # PyAV's objects and exceptions form reference cycles, which keep decoders with their threads and frames alive.
    gc.collect()
    send_message(connection, header, payload)
    del payload
    if status.read_bytes("VmRSS") > _TRIMMED_BYTES and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)  # returns the memory that glibc keeps for reuse


def _preload_libraries(resize_crop: ResizeCrop) -> None:
    """Resizes a frame, which may import torch, so that no library's address space counts against the first video."""
    height, width = np.broadcast_to(resize_crop.resize_to or 1, 2)
    resize_crop.resize_and_crop_frame(np.zeros((3 * height, 3 * width, 3), np.uint8))


def _limit_resources(settings: DecoderSettings, status: _ProcessStatus) -> None:
    limits = {
        resource.RLIMIT_FSIZE: 0,  # the process never writes to a file
        resource.RLIMIT_NOFILE: 16,  # confinement.py opens a few
        resource.RLIMIT_CORE: 0,
        # Not RLIMIT_NPROC: it counts the threads of all processes of the user, and does not apply to root.
    }
    if idle_bytes := status.read_bytes("VmSize"):
        limits[resource.RLIMIT_AS] = idle_bytes + settings.max_memory_bytes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _load_or_error(
    source: bytes,
    settings: DecoderSettings,
    status: _ProcessStatus,
    loader: ClipLoader,
    *,
    views: dict[str, Any],
    threads: int,
    postpone_above_gigapixels: float | None,
) -> Clip | Exception:
    try:
        chosen: Views = rebuild(Views, views)
        return loader.load(source, views=chosen, threads=threads, postpone_above_gigapixels=postpone_above_gigapixels)
    except Exception as error:
        if _is_out_of_memory(error) or (isinstance(error, CorruptVideoError) and _has_peaked_near_limit(status)):
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


def _has_peaked_near_limit(status: _ProcessStatus) -> bool:
    """Whether an allocation of a frame may have failed, which FFmpeg's decoders report as corrupt data."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return limit != resource.RLIM_INFINITY and status.read_bytes("VmPeak") > limit - _FRAME_BYTES


if __name__ == "__main__":
    main()

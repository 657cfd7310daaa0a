"""Decoding in processes of their own, so that no upload can crash, stall or bloat the worker that serves the model.

    worker                               decoder process, one of several
    DecoderPool.load_clips(sources)
      -> header, the file's bytes  --->  main: load_clip under limits of time, memory and files
      <- Clip | VideoError         <---  header, the clip's pixels

A process that a file kills (its time is up, a decoder has a bug) is replaced, and the file gets its error. Messages are
JSON and raw bytes: nothing that comes from a process that a stranger's file may have taken over is unpickled.

    VideoError
    └── DecoderError             code
        ├── DecodeTimeoutError   decode_timeout    decoding took longer than allowed
        ├── DecodeMemoryError    decode_memory     decoding needed more memory than allowed
        └── DecoderCrashError    decoder_crash     the decoder died of the file
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import re
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from handler.clips import Clip, ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.video import CorruptVideoError, Limits, VideoError, VideoInfo

logger = logging.getLogger(__name__)

# Bytes of a JSON header and of what follows it.
_LENGTHS = struct.Struct(">QQ")

# For one file. As many decode and as many resize, each with a stack and pictures of its own; more gain little.
_MAX_THREADS = 16

# More than a decoder asks for at once for a picture of 4096 x 4096.
_PICTURE_BYTES = 64 * 2**20

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # For each thread glibc would set 64 MiB of address space aside, and a limit on that would soon be reached.
    "MALLOC_ARENA_MAX": "2",
}


class DecoderError(VideoError):
    """The file was too much for the process that decoded it."""

    code = "decoder_error"


class DecodeTimeoutError(DecoderError):
    code = "decode_timeout"


class DecodeMemoryError(DecoderError):
    code = "decode_memory"


class DecoderCrashError(DecoderError):
    code = "decoder_crash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What a decoder process is told when it starts.

    clip                what to make of a file
    max_decode_s        seconds of wall time from the file's arrival to the finished clip
    max_memory_bytes    address space that the process may take for a file, beyond what it has when it starts
    """

    clip: ClipSettings
    max_decode_s: float
    max_memory_bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DecoderSettings":
        values = json.loads(text)
        clip = values["clip"]
        resize_crop = {  # JSON has no tuples
            name: tuple(value) if isinstance(value, list) else value for name, value in clip["resize_crop"].items()
        }
        clip = ClipSettings(**{**clip, "resize_crop": ResizeCrop(**resize_crop), "limits": Limits(**clip["limits"])})
        return cls(**{**values, "clip": clip})


class DecoderPool:
    """Decoder processes and the files that wait for them.

    Args:
        settings: for every process.
        processes: how many files are decoded at the same time.
        threads: for the files of one call to share; by default as many as there are processes.
    """

    def __init__(self, settings: DecoderSettings, *, processes: int, threads: int | None = None):
        self.processes, self._max_threads = processes, threads or processes
        self._settings = settings
        self._idle = queue.SimpleQueue()
        for _ in range(processes):
            self._idle.put(_Decoder(settings))
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decoder")

    def load_clips(self, sources: Sequence[bytes]) -> list[Clip | Exception]:
        """Loads several videos side by side; what one of them raises stands in its own place."""
        # A lone file gets all threads, for the sake of its latency; many share them, for the sake of all.
        threads = min(_MAX_THREADS, max(1, self._max_threads // max(1, len(sources))))
        # The largest first: what comes last keeps one process busy while the others have nothing left to do.
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]), reverse=True)
        futures = {index: self._threads.submit(self._load, sources[index], threads) for index in order}
        return [futures[index].result() for index in range(len(sources))]

    def close(self) -> None:
        """Ends the processes; what is being decoded is finished before."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().stop()

    def _load(self, source: bytes, threads: int) -> Clip | Exception:
        decoder = self._idle.get()
        try:
            decoder = self._alive(decoder)
            if decoder.is_used:
                with contextlib.suppress(DecodeMemoryError):
                    return decoder.load(source, threads)
                # Other files may have left too little behind: what this one needs is seen in a new process.
                decoder = self._alive(decoder)
            return decoder.load(source, threads)
        except Exception as error:
            return error
        finally:
            with contextlib.suppress(OSError):  # no process can be started now: the next file tries again
                decoder = self._alive(decoder)
            self._idle.put(decoder)

    def _alive(self, decoder: "_Decoder") -> "_Decoder":
        if decoder.is_alive():
            return decoder
        decoder.stop()
        return _Decoder(self._settings)


class _Decoder:
    """The worker's end of one decoder process; `is_used` once it has been given a file."""

    def __init__(self, settings: DecoderSettings):
        self.is_used = False
        self._settings = settings
        package_root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "handler.sandbox.pool", settings.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # nothing is held back that could not be written to a process that has died
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": package_root},
            start_new_session=True,  # Ctrl-C is for the worker, which ends its decoders by closing their pipes
        )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def load(self, source: bytes, threads: int) -> Clip:
        self.is_used = True
        try:
            _send(self._process.stdin, {"threads": threads}, source)
            reply, pixels = _receive(self._process.stdout)
        except (OSError, EOFError) as error:
            raise self._cause_of_death() from error
        except BaseException:  # who knows how much of the reply is still to come
            self._end()
            raise
        if "clip" in reply:
            return _read_clip(reply["clip"], pixels)
        if "error" in reply:
            error = _video_error(**reply["error"])
            if isinstance(error, DecodeMemoryError):
                self._end()  # nobody knows what else it has no memory for
            raise error
        raise RuntimeError(f"decoding failed:\n{reply['failure']}")

    def _end(self) -> None:
        self._process.kill()
        self.stop()

    def _cause_of_death(self) -> DecoderError:
        code = self._process.wait()
        if code == -signal.SIGALRM:
            return DecodeTimeoutError(f"decoding took longer than {self._settings.max_decode_s:g} s and was stopped")
        logger.warning("a decoder process ended with %s", signal.Signals(-code).name if code < 0 else code)
        return DecoderCrashError("the decoder crashed on this file")


def main() -> None:
    """A decoder process: files in on standard input, clips out on standard output, until the input ends."""
    settings = DecoderSettings.from_json(sys.argv[1])
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    # What a library prints must not end up between the replies.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _load_libraries(settings.clip.resize_crop)
    _limit_resources(settings)
    while True:
        try:
            request, source = _receive(requests)
        except EOFError:
            return
        # The alarm ends this process even inside a decoder's loop, and even if the worker is no more.
        signal.setitimer(signal.ITIMER_REAL, settings.max_decode_s)
        reply, pixels = _answer(settings, request, source)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply, pixels)


def _load_libraries(resize_crop: ResizeCrop) -> None:
    """So that the address space they take, which is gigabytes for a torch with CUDA, is not counted as the file's."""
    height, width = np.broadcast_to(resize_crop.resize_to or 1, 2)
    resize_crop.resize_and_crop_frame(np.zeros((3 * height, 3 * width, 3), np.uint8))


def _limit_resources(settings: DecoderSettings) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + settings.max_memory_bytes),
        (resource.RLIMIT_FSIZE, 0),  # it has nothing to write to any file
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _answer(settings: DecoderSettings, request: dict, source: bytearray) -> tuple[dict, bytes]:
    try:
        clip = load_clip(source, settings.clip, threads=request["threads"])
    except Exception as error:
        if _is_want_of_memory(error) or (isinstance(error, CorruptVideoError) and _was_near_its_limit()):
            allowed = f"{settings.max_memory_bytes / 2**20:.0f} MiB"
            error = DecodeMemoryError(f"decoding this file needs more memory than the {allowed} that it may have")
        if isinstance(error, VideoError):
            return {"error": {"code": error.code, "message": str(error)}}, b""
        return {"failure": "".join(traceback.format_exception(error))}, b""
    return {"clip": _write_clip(clip)}, clip.pixels.data


def _is_want_of_memory(error: BaseException | None) -> bool:
    """Whether a MemoryError is at the bottom of it: FFmpeg's, too, which may have been taken for the file's fault."""
    while error is not None:
        # A thread that finds no room for its stack is a RuntimeError in Python.
        if isinstance(error, MemoryError) or str(error) == "can't start new thread":
            return True
        error = error.__cause__ or error.__context__
    return False


def _was_near_its_limit() -> bool:
    """Whether a picture may have found no room, which FFmpeg's decoders call damage."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmPeak:\s+(\d+) kB", status)[1]) * 1024 > limit - _PICTURE_BYTES


def _write_clip(clip: Clip) -> dict:
    """All of a clip but its pixels, fit for JSON."""
    fields = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip)}
    return {
        **fields,
        "pixels": clip.pixels.shape,
        "info": dataclasses.asdict(clip.info),
        "times_s": clip.times_s.tolist(),
    }


def _read_clip(fields: dict, pixels: bytearray) -> Clip:
    return Clip(
        **{
            **fields,
            "pixels": np.frombuffer(pixels, np.uint8).reshape(fields["pixels"]),
            "info": VideoInfo(**fields["info"]),
            "times_s": np.array(fields["times_s"]),
            "warnings": tuple(fields["warnings"]),
        }
    )


def _video_error(*, code: str, message: str) -> VideoError:
    error = DecodeMemoryError(message) if code == DecodeMemoryError.code else VideoError(message)
    error.code = code
    return error


def _send(stream, header: dict, payload) -> None:
    text = json.dumps(header).encode()
    payload = memoryview(payload).cast("B")
    for data in (_LENGTHS.pack(len(text), len(payload)) + text, payload):
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]


def _receive(stream) -> tuple[dict, bytearray]:
    text_bytes, payload_bytes = _LENGTHS.unpack(_read(stream, _LENGTHS.size))
    return json.loads(_read(stream, text_bytes)), _read(stream, payload_bytes)


def _read(stream, size: int) -> bytearray:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        count = stream.readinto(view[filled:])
        if not count:
            raise EOFError
        filled += count
    return buffer


if __name__ == "__main__":
    main()

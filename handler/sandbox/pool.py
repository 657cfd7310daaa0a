"""The worker's side of the decoder processes: starts them, sends them videos, and replaces them.

    worker                               one of several decoder processes
    DecoderPool.load_clips(sources)
      -> bytes of the file         --->  load_clip with limits on time, memory and files
      <- Clip | VideoError         <---  pixels of the clip

A process that crashes or exceeds a limit is replaced, and only the video that it was decoding gets an error. The
process itself enforces its limits, see process.py, and its confinement, see confinement.py.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handler.clips import Clip
from handler.sandbox.confinement import Confinement
from handler.sandbox.errors import DecodeMemoryError, DecoderCrashError, DecoderError, DecodeTimeoutError
from handler.sandbox.settings import DecoderSettings
from handler.sandbox.wire import (
    OUT_OF_MEMORY_STATUS,
    MessageError,
    read_result,
    rebuild,
    receive_message,
    send_message,
    to_json,
)
from handler.threads import decoder_threads_per_file

logger = logging.getLogger(__name__)

# The worker's own time limits, for a process that does not respond at all.
START_TIMEOUT_S = 120.0
TRANSFER_TIMEOUT_S = 30.0  # to send the file and receive the reply, in addition to max_decode_s

_EXIT_TIMEOUT_S = 5.0

# Where Python and the dynamic linker find libraries. The other variables of the worker may contain secrets.
_INHERITED_VARIABLES = (
    "HOME",
    "LD_LIBRARY_PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONNOUSERSITE",
    "PYTHONUSERBASE",
)

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc reserves 64 MiB of address space per arena and by default creates arenas per thread.
    "MALLOC_ARENA_MAX": "2",
}


class DecoderPool:
    """A fixed number of decoder processes and a queue of videos for them.

    Args:
        settings: Settings of every process.
        processes: Number of videos that are decoded at the same time.
        threads: Number of threads that the videos of one call share. Equal to `processes` by default.
    """

    def __init__(self, settings: DecoderSettings, *, processes: int, threads: int | None = None):
        self._settings = settings
        self._max_threads = threads or processes
        # Its threads start all processes, because the kernel kills a decoder process when the thread that started it
        # exits. These threads exit with the pool.
        self._executor = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        self._idle: queue.SimpleQueue[_DecoderProcess] = queue.SimpleQueue()
        for start in [self._executor.submit(_DecoderProcess, settings) for _ in range(processes)]:
            self._idle.put(start.result())

    def confinement(self) -> Confinement:
        """Waits until a process has started, and returns which parts of the confinement it has.

        Raises:
            RuntimeError: The process failed to start, or a required part is missing.
        """
        process = self._idle.get()
        try:
            return process.wait_until_ready()
        finally:
            self._idle.put(process)

    def load_clips(self, sources: Sequence[bytes]) -> list[Clip | Exception]:
        """Loads clips from several videos in parallel. Thread-safe.

        Args:
            sources: The contents of video files.

        Returns:
            For each video, in the same order, the clip or the error: a VideoError, or another exception if the cause is
            not the video.
        """
        threads = decoder_threads_per_file(threads=self._max_threads, files=len(sources))
        # The largest file first: started last, it would occupy one process while the others are already idle.
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]), reverse=True)
        futures = {index: self._executor.submit(self._load_or_error, sources[index], threads) for index in order}
        return [futures[index].result() for index in range(len(sources))]

    def close(self) -> None:
        """Waits for the videos that are being decoded, then stops the processes."""
        self._executor.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _load_or_error(self, source: bytes, threads: int) -> Clip | Exception:
        process = self._idle.get()
        try:
            process = self._replace_if_dead(process)
            if process.is_used:
                with contextlib.suppress(DecodeMemoryError):
                    return process.load(source, threads=threads)
                # Memory that earlier videos left allocated counts against the limit: decide in a new process.
                process = self._replace_if_dead(process)
            return process.load(source, threads=threads)
        except Exception as error:
            return error
        finally:
            with contextlib.suppress(OSError):  # the start failed; the next video tries again
                process = self._replace_if_dead(process)
            self._idle.put(process)

    def _replace_if_dead(self, process: "_DecoderProcess") -> "_DecoderProcess":
        if process.is_alive():
            return process
        process.close()
        return _DecoderProcess(self._settings)


class _DecoderProcess:
    """The worker's end of one decoder process.

    Attributes:
        is_used: Whether the process has already received a video.
    """

    def __init__(self, settings: DecoderSettings):
        self.is_used = False
        self._confinement: Confinement | None = None
        self._settings = settings
        self._connection, remote = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        inherited = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "handler.sandbox.process", to_json(settings), str(os.getpid())],
                stdin=remote.fileno(),
                # Until the process is ready. It must not write to the worker's output, which TorchServe parses.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**inherited, **_ENVIRONMENT, "PYTHONPATH": package_root},
                start_new_session=True,  # Ctrl-C reaches only the worker, which then closes its connections
            )
        assert self._process.stdout is not None
        self._startup_output = self._process.stdout

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._startup_output.close()

    def load(self, source: bytes, *, threads: int) -> Clip:
        """Decodes one video. Kills the process if it may not be able to decode another one.

        Raises:
            VideoError: The video cannot be decoded, or not within the limits.
            RuntimeError: The cause is not the video.
        """
        self.wait_until_ready()
        self.is_used = True
        deadline_s = time.monotonic() + self._settings.max_decode_s + TRANSFER_TIMEOUT_S
        try:
            send_message(self._connection, {"threads": threads}, source, deadline_s=deadline_s)
            header, payload = receive_message(
                self._connection, max_payload_bytes=self._settings.max_memory_bytes, deadline_s=deadline_s
            )
            result = read_result(header, payload)
        except TimeoutError as error:
            self.close()
            raise self._timeout_error() from error
        except (EOFError, OSError) as error:
            raise self._error_of_exit() from error
        except MessageError as error:
            self.close()
            logger.warning("a decoder process sent an invalid reply: %s", error)
            raise DecoderCrashError("the decoder crashed on this video") from error
        except BaseException:  # the rest of the reply is still in the socket
            self.close()
            raise
        if isinstance(result, DecodeMemoryError):
            self.close()  # other allocations may have failed unnoticed
        if isinstance(result, Exception):
            raise result
        return result

    def wait_until_ready(self) -> Confinement:
        """Waits until the process has started, and returns its confinement.

        Raises:
            RuntimeError: The process failed to start, or a required part of its confinement is missing.
        """
        if self._confinement is not None:
            return self._confinement
        try:
            header, _ = receive_message(
                self._connection, max_payload_bytes=0, deadline_s=time.monotonic() + START_TIMEOUT_S
            )
        except (EOFError, OSError, MessageError) as error:
            if isinstance(error, EOFError):
                self._wait_for_exit()
            output = self._read_startup_output()
            self.close()
            raise RuntimeError(
                f"a decoder process failed to start: exit status {self._process.returncode}, output: {output or 'none'}"
            ) from error
        confinement: Confinement = rebuild(Confinement, header["ready"])
        if output := self._read_startup_output():
            logger.warning("a decoder process printed: %s", output)
        self._confinement = confinement
        return confinement

    def _read_startup_output(self) -> str:
        """Returns what the process has printed: warnings, or why it failed. It cannot print anything afterwards."""
        if self._startup_output.closed:
            return ""
        os.set_blocking(self._startup_output.fileno(), False)
        with self._startup_output as output:
            return (output.read() or b"").decode(errors="replace").strip()

    def _wait_for_exit(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)

    def _error_of_exit(self) -> DecoderError:
        """Returns the error for the video during which the process closed the connection, from its exit status."""
        self._wait_for_exit()
        self.close()
        status = self._process.returncode
        if status == -signal.SIGALRM:
            return self._timeout_error()
        if status == OUT_OF_MEMORY_STATUS:
            return DecodeMemoryError.for_limit(self._settings.max_memory_bytes)
        logger.warning("a decoder process exited with %s", signal.Signals(-status).name if status < 0 else status)
        return DecoderCrashError("the decoder crashed on this video")

    def _timeout_error(self) -> DecodeTimeoutError:
        return DecodeTimeoutError(f"decoding took longer than {self._settings.max_decode_s:g} s and was stopped")

"""The worker's side of the decoder processes: starts them, sends them videos, and replaces them.

A process enforces its own limits (process.py) and confinement (confinement.py). The pool replaces a process

- that failed to start, exited, sent an invalid reply, or did not reply in time. Its video is decoded once more in a new
  process. It gets a VideoError only if it crashes that process, too, and an exception of another type if the processes
  were killed from outside.
- that ran out of memory. If earlier videos may have used the memory, the video is decoded once more in a new process.
- that has decoded max_videos_per_process videos, so that the next one cannot be affected by earlier ones.
- whose address space has grown: memory that a video leaves allocated is not available to the next ones.
"""

import contextlib
import dataclasses
import logging
import math
import os
import queue
import resource
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
from handler.sandbox.errors import DecodeMemoryError, DecoderCrashError, DecodersBusyError, DecodeTimeoutError
from handler.sandbox.replies import max_payload_bytes, read_result
from handler.sandbox.settings import DecoderSettings
from handler.sandbox.wire import OUT_OF_MEMORY_STATUS, MessageError, rebuild, receive_message, send_message, to_json
from handler.threads import decoder_threads_per_file
from handler.video import Postponed
from handler.views import ONE_VIEW, Views

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # to decode a video, each in another process

# In a batch, videos that cost more than one of these are decoded last. The first is a fraction of max_decode_gigapixels
# for an estimate before decoding. The second is CPU time, which also limits what the estimate does not cover: an equal
# share of a fraction of the remaining time, but at least CHEAP_CPU_S. A video that exceeds it is decoded again from the
# start, so an ordinary one on a slow machine should not.
CHEAP_FRACTION = 1 / 8
CHEAP_BATCH_FRACTION = 0.8
CHEAP_CPU_S = 2.0

# The worker's own time limits, for a process that does not respond at all.
START_TIMEOUT_S = 60.0
TRANSFER_TIMEOUT_S = 10.0  # to send a file
REPLY_TIMEOUT_S = 5.0  # to receive a reply, in addition to the time limit of the process
_EXIT_TIMEOUT_S = 5.0

# Signals that a defect in a decoder causes. Others come from outside, such as SIGKILL if the system runs out of memory.
_CRASH_SIGNALS = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
)

# Where Python and the dynamic linker find libraries. The other variables of the worker may contain secrets, or preload
# an allocator (LD_PRELOAD) that takes more address space than glibc's.
_INHERITED_VARIABLES = (
    "HOME",
    "LD_LIBRARY_PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONNOUSERSITE",
    "PYTHONUSERBASE",
)
_ADDED_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # By default glibc reserves 64 MiB of address space for each thread, before RLIMIT_AS is set: videos could use that
    # memory beyond their limit.
    "MALLOC_ARENA_MAX": "1",
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
        self._max_videos = processes
        self._max_threads = threads or processes
        # Only these threads start processes, because the parent death signal is sent when the thread that started a
        # process exits. They exist as long as the pool.
        self._executor = ThreadPoolExecutor(processes, thread_name_prefix="decoder")
        # The process that was used last is used first. So the first video gets one whose start is complete.
        self._idle: queue.LifoQueue[_DecoderProcess] = queue.LifoQueue()
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

    def load_clips(self, sources: Sequence[bytes], *, views: Sequence[Views] | None = None) -> list[Clip | Exception]:
        """Loads clips from several videos in parallel. Thread-safe.

        Several videos take at most about max_batch_decode_s together. Those that are cheap to decode are decoded first.
        A single one takes at most about max_decode_s, or twice that if its process does not respond.

        Args:
            sources: The contents of video files.
            views: Which frames of each video, and which parts of them. One view of each by default.

        Returns:
            For each video, in the same order, the clip or the error: a VideoError, or another exception if the cause is
            not the video.
        """
        views = [ONE_VIEW] * len(sources) if views is None else views
        is_batch = len(sources) > 1
        deadline_s = time.monotonic() + self._settings.max_batch_decode_s if is_batch else math.inf
        results: dict[int, Clip | Exception] = {}
        pending = sorted(range(len(sources)), key=lambda index: len(sources[index]))
        for only_if_cheap in (True, False) if is_batch else (False,):
            threads = decoder_threads_per_file(threads=self._max_threads, files=len(pending))
            futures = {
                index: self._executor.submit(
                    self._load_or_error,
                    sources[index],
                    views[index],
                    threads,
                    videos_left=len(pending) - position if only_if_cheap else None,
                    deadline_s=deadline_s,
                )
                for position, index in enumerate(pending)
            }
            results.update((index, future.result()) for index, future in futures.items())
            costs = {index: result.gigapixels for index, result in results.items() if isinstance(result, Postponed)}
            pending = sorted(costs, key=costs.__getitem__)
        return [results[index] for index in range(len(sources))]

    def close(self) -> None:
        """Waits for the videos that are being decoded, then stops the processes."""
        self._executor.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _cheap_gigapixels(self) -> float | None:
        gigapixels = CHEAP_FRACTION * self._settings.clip.limits.max_decode_gigapixels
        return gigapixels if math.isfinite(gigapixels) else None

    def _cheap_s(self, *, videos: int, remaining_s: float) -> float:
        share_s = remaining_s * min(1.0, self._max_videos / videos)
        return max(CHEAP_CPU_S, CHEAP_BATCH_FRACTION * share_s)

    def _load_or_error(
        self, source: bytes, views: Views, threads: int, *, videos_left: int | None, deadline_s: float
    ) -> Clip | Exception:
        """Loads a clip. With `videos_left`, the videos that share the remaining time, only if it is cheap."""
        process = self._idle.get()
        try:
            for _ in range(MAX_ATTEMPTS):
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise DecodersBusyError.for_limit(self._settings.max_batch_decode_s)
                request = _Request(views=views, threads=threads, max_s=min(self._settings.max_decode_s, remaining_s))
                if videos_left is not None:
                    max_cpu_s = threads * self._cheap_s(videos=videos_left, remaining_s=remaining_s)
                    request = dataclasses.replace(
                        request, max_cpu_s=max_cpu_s, postpone_above_gigapixels=self._cheap_gigapixels()
                    )
                process = self._usable(process)
                try:
                    return process.load(source, request)
                except _RetryError as error:
                    reason = error.reason
            return reason
        except Exception as error:
            return error
        finally:
            with contextlib.suppress(Exception):  # the start failed; the next video tries again
                process = self._usable(process)
            self._idle.put(process)

    def _usable(self, process: "_DecoderProcess") -> "_DecoderProcess":
        """Returns the process, or a new one if it exited or must be replaced."""
        if process.is_alive() and not process.must_be_replaced():
            return process
        process.close()
        return _DecoderProcess(self._settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """How a process decodes a video.

    Attributes:
        views: Which frames, and which parts of them.
        threads: Number of threads.
        max_s: Maximum wall time in seconds.
        max_cpu_s: CPU time in seconds after which the video is postponed. None: no limit.
        postpone_above_gigapixels: Estimated cost above which the video is postponed. None: no limit.
    """

    views: Views
    threads: int
    max_s: float
    max_cpu_s: float | None = None
    postpone_above_gigapixels: float | None = None


class _RetryError(Exception):
    """A video failed, and it is unknown whether the video is the reason.

    Attributes:
        reason: The error of the video if it fails again in a new process.
    """

    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


class _DecoderProcess:
    """The worker's end of one decoder process."""

    def __init__(self, settings: DecoderSettings):
        self._confinement: Confinement | None = None
        self._settings = settings
        self._video_count = 0
        self._initial_bytes = 0  # address space when the process was ready
        self._connection, remote = socket.socketpair()
        package_root = str(Path(__file__).resolve().parents[2])
        inherited = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "handler.sandbox.process", to_json(settings), str(os.getpid())],
                stdin=remote.fileno(),
                # Read until the process is ready. It must not write to the worker's output, which TorchServe parses.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**inherited, **_ADDED_VARIABLES},
                cwd=package_root,  # which is where `-m` looks first
                start_new_session=True,  # Ctrl-C reaches only the worker, which then closes its connections
            )
        assert self._process.stdout is not None
        self._startup_output = self._process.stdout

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
                self._wait_for_exit()  # its exit status is known afterwards
            output = self._read_startup_output()
            self.close()
            raise RuntimeError(
                f"a decoder process failed to start: exit status {self._process.returncode}, output: {output or 'none'}"
            ) from error
        confinement: Confinement = rebuild(Confinement, header["ready"])
        if output := self._read_startup_output():
            logger.warning("a decoder process printed: %s", output)
        self._initial_bytes = self._address_space_bytes()
        self._confinement = confinement
        return confinement

    def load(self, source: bytes, request: _Request) -> Clip:
        """Decodes one video. Kills the process if it may not be able to decode another one.

        Raises:
            VideoError: The video cannot be decoded, or not within the limits.
            Postponed: Decoding would cost more than the request allows.
            DecodersBusyError: The time of the batch is over.
            RuntimeError: The cause is not the video.
            _RetryError: The cause is unknown. The process no longer exists.
        """
        try:
            self.wait_until_ready()
        except RuntimeError as error:
            raise _RetryError(error) from error
        self._video_count += 1
        try:
            result = self._exchange(source, request)
        except BaseException:
            self.close()
            raise
        if isinstance(result, DecodeMemoryError):
            self.close()  # other allocations may have failed unnoticed
            # Memory that earlier videos left allocated counts against the limit.
            raise _RetryError(result) if self._video_count > 1 else result
        if isinstance(result, Exception):
            raise result
        return result

    def is_alive(self) -> bool:
        """Whether the process has not exited."""
        if self._process.returncode is not None:
            return False
        try:
            # WNOWAIT keeps the process id, so that `close` cannot kill an unrelated process.
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # something else in this program has waited for it
            return False

    def must_be_replaced(self) -> bool:
        """Whether the process must not decode another video, although it could."""
        if not self._video_count:
            return False
        size_bytes = self._address_space_bytes()  # 0 if its main thread has exited
        return (
            not 0 < size_bytes <= self._initial_bytes + self._settings.max_growth_bytes
            or self._video_count == self._settings.max_videos_per_process
        )

    def close(self) -> None:
        """Kills the process and any process that it has started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._connection.close()
        self._startup_output.close()

    def _exchange(self, source: bytes, request: _Request) -> Clip | Exception:
        """Sends a video and receives the result. If this raises an exception, the process must be killed."""
        is_received = False
        started_s = time.monotonic()
        try:
            deadline_s = started_s + TRANSFER_TIMEOUT_S
            send_message(self._connection, dataclasses.asdict(request), source, deadline_s=deadline_s)
            receive_message(self._connection, max_payload_bytes=0, deadline_s=deadline_s)
            is_received = True
            header, payload = receive_message(
                self._connection,
                max_payload_bytes=max_payload_bytes(self._settings.clip, request.views),
                deadline_s=time.monotonic() + request.max_s + REPLY_TIMEOUT_S,
            )
            result = read_result(header, payload, self._settings.clip, request.views)
            if isinstance(result, Postponed) and request.postpone_above_gigapixels is None:
                raise MessageError("expected a clip or an error, got a postponed video")
            return result
        except TimeoutError as error:  # a running process would have stopped itself after max_s
            logger.warning("a decoder process did not respond and is killed")
            timeout = DecodeTimeoutError.for_limit(request.max_s)
            raise _RetryError(timeout if is_received else RuntimeError("a decoder process did not respond")) from error
        except (EOFError, OSError) as error:
            return self._error_of_exit(error, request, is_received=is_received, elapsed_s=time.monotonic() - started_s)
        except MessageError as error:
            logger.warning("a decoder process sent an invalid reply: %s", error)
            raise _RetryError(DecoderCrashError("the decoder crashed on this video")) from error

    def _error_of_exit(self, cause: Exception, request: _Request, *, is_received: bool, elapsed_s: float) -> Exception:
        """Returns the error for the video during which the process exited, from its exit status.

        Raises:
            _RetryError: The video may succeed in a new process.
        """
        has_exited = self._wait_for_exit()
        self.close()
        status = self._process.returncode
        if is_received and status == -signal.SIGPROF and request.max_cpu_s is not None:
            return Postponed(math.inf)
        if is_received and status == -signal.SIGALRM and elapsed_s >= request.max_s:  # not a signal from outside
            if request.max_s < self._settings.max_decode_s:
                return DecodersBusyError.for_limit(self._settings.max_batch_decode_s)
            return DecodeTimeoutError.for_limit(request.max_s)
        if status == OUT_OF_MEMORY_STATUS:
            return DecodeMemoryError.for_limit(self._settings.max_memory_bytes)
        description = f"a decoder process exited with {signal.Signals(-status).name if status < 0 else status}"
        logger.warning(description)
        if is_received and (status >= 0 or -status in _CRASH_SIGNALS or not has_exited):
            raise _RetryError(DecoderCrashError("the decoder crashed on this video")) from cause
        raise _RetryError(RuntimeError(description)) from cause

    def _wait_for_exit(self) -> bool:
        """Returns whether the process has exited."""
        deadline_s = time.monotonic() + _EXIT_TIMEOUT_S
        while self.is_alive() and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return not self.is_alive()

    def _read_startup_output(self) -> str:
        """Returns what the process has printed: warnings, or why it failed. It cannot print anything afterwards."""
        if self._startup_output.closed:
            return ""
        os.set_blocking(self._startup_output.fileno(), False)
        with self._startup_output as output:
            return (output.read() or b"").decode(errors="replace").strip()

    def _address_space_bytes(self) -> int:
        """Returns the size that RLIMIT_AS limits."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[0])
        except (OSError, IndexError):  # the process has exited
            return 0
        return pages * resource.getpagesize()

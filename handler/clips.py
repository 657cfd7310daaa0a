"""Turns an uploaded video into a clip: samples frames, decodes, resizes and crops them. Imports no torch.

    clip = load_clip(source, ClipSettings(num_frames=32, resize_crop=ResizeCrop(...)))

    with ClipLoader(settings, threads=4) as loader:  # for several videos
        clips = [loader.load(source) for source in sources]

Each frame is resized in a separate thread as soon as it is decoded, while it is still in the CPU cache. Only a few
full-size frames are in memory at the same time.

Shapes: V views, T frames, C color channels, H x W size of a decoded frame, h x w size of a model input.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import numpy.typing as npt

from handler.processing.resize import ResizeCrop
from handler.threads import start_threads
from handler.video import FrameTooLargeError, Limits, VideoInfo, open_video, sample_frames

# Pixels of the frames that are resized at the same time. As many again may wait: 0.4 GB in total.
MAX_RESIZING_PIXELS = 2**26

Frame = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """The clip that a model takes.

    Attributes:
        num_frames: T.
        resize_crop: how frames are resized and cropped.
        limits: limits on uploaded videos.
        sampling: "uniform" or "keyframes", see `handler.video.sample_frames`.
        video_stream: "first" or "best", see `handler.video.open_video`.
    """

    num_frames: int
    resize_crop: ResizeCrop
    limits: Limits = dataclasses.field(default_factory=Limits)
    sampling: str = "uniform"
    video_stream: str = "first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Which frames of a video, and which part of them, become a clip. Serving uses the default; training varies it.

    Attributes:
        phase: position in time, from 0 to 1, see `handler.video.sampling.sample_uniform` and `sample_stride`.
        stride_frames: distance between sampled frames. None: they cover the whole video.
        zoom: see ResizeCrop.
        crop_at: see ResizeCrop.
    """

    phase: float = 0.5
    stride_frames: int | None = None
    zoom: float = 1.0
    crop_at: tuple[float, float] = (0.5, 0.5)


SERVED_VIEW = View()


@dataclasses.dataclass(frozen=True)
class Clip:
    """A model input made from one video.

    Attributes:
        pixels: uint8 (V, T, C, h, w), resized and cropped, not normalized. V is 1 for now.
        info: properties of the video.
        times_s: float64 (T,), presentation time of each sampled frame in seconds from the first frame of the video.
        warnings: what the user should know, e.g. that frames repeat.
        decoded_frames: frames that were decoded, sampled or not.
        decode_s: seconds spent opening and decoding the video.
        resize_s: seconds spent resizing, summed over threads and concurrent with decoding.
    """

    pixels: Frame
    info: VideoInfo
    times_s: npt.NDArray[np.float64]
    warnings: tuple[str, ...]
    decoded_frames: int
    decode_s: float
    resize_s: float


def load_clip(
    source: bytes | str | Path,
    settings: ClipSettings,
    *,
    threads: int = 1,
    postpone_above_gigapixels: float | None = None,
) -> Clip:
    """Samples frames of a video, decodes, resizes and crops them. See `ClipLoader.load`; raises its errors."""
    with ClipLoader(settings, threads=threads) as loader:
        return loader.load(source, postpone_above_gigapixels=postpone_above_gigapixels)


class ClipLoader:
    """Loads clips from videos, one after the other, in a `with` block.

    Its threads start before the first video is read, because starting one can fail or never return when videos have
    used up the memory that the process may use. Not thread-safe.

    Args:
        settings: the clip that the model takes.
        threads: threads that decode, and as many that resize.

    Raises:
        RuntimeError: a thread cannot be started.
    """

    def __init__(self, settings: ClipSettings, *, threads: int = 1):
        self._settings = settings
        self._threads = threads
        with contextlib.ExitStack() as stack:
            self._decoding = stack.enter_context(start_threads(threads))
            self._resizing = stack.enter_context(start_threads(threads))
            self._stack = stack.pop_all()

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def load(
        self,
        source: bytes | str | Path,
        *,
        view: View = SERVED_VIEW,
        threads: int | None = None,
        postpone_above_gigapixels: float | None = None,
    ) -> Clip:
        """Samples frames of a video, decodes, resizes and crops them.

        Args:
            source: bytes of a file, or a path.
            view: which frames, and which part of them.
            threads: threads that decode, and at most as many that resize. By default, and at most, all threads.
            postpone_above_gigapixels: do not decode if it is more work than this, see `Video.decode_gigapixels`.

        Raises:
            VideoError: the video cannot be used.
            Postponed: decoding is more work than `postpone_above_gigapixels`.
            OSError: the path cannot be read.
        """
        started_s = time.perf_counter()
        settings = self._settings
        resize_crop = dataclasses.replace(settings.resize_crop, zoom=view.zoom, crop_at=view.crop_at)
        threads = min(threads or self._threads, self._threads)
        with contextlib.ExitStack() as stack:
            video = stack.enter_context(
                open_video(
                    source,
                    limits=settings.limits,
                    thread_count=threads,
                    stream=settings.video_stream,
                    postpone_above_gigapixels=postpone_above_gigapixels,
                    executor=self._decoding,
                )
            )
            resizer = stack.enter_context(
                _Resizer(resize_crop, self._resizing, threads=_resize_threads(video.info, threads))
            )
            _check_resized_size(video.info, resize_crop, settings.limits)
            indices, warnings = sample_frames(
                video,
                num_frames=settings.num_frames,
                sampling=settings.sampling,
                phase=view.phase,
                stride_frames=view.stride_frames,
            )  # (T,)
            resized: dict[int, Future[tuple[Frame, float]]] = {}
            for positions, convert in video.frames(indices):
                # A position may be yielded again; then the later frame is the right one.
                resized.update(dict.fromkeys(positions.tolist(), resizer.submit(convert)))
            decode_s = time.perf_counter() - started_s - resizer.blocked_s
            frames = np.stack([resized[position].result()[0] for position in range(len(indices))])  # (T, h, w, C)
            pixels = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))[None]  # (1, T, C, h, w)
            resize_s = sum(future.result()[1] for future in set(resized.values()))
            return Clip(
                pixels=pixels,
                info=video.info,
                times_s=video.pts_s[indices],
                warnings=(*video.warnings, *warnings),
                decoded_frames=video.decoded_frames,
                decode_s=decode_s,
                resize_s=resize_s,
            )


def _check_resized_size(info: VideoInfo, resize_crop: ResizeCrop, limits: Limits) -> None:
    """Rejects small frames that become huge: 8000 x 2 pixels are 200 million when the shorter side becomes 224."""
    height, width = resize_crop.resized_size(info.height, info.width)
    max_pixels = limits.max_frame_pixels
    if height * width > max_pixels:
        raise FrameTooLargeError(
            f"expected frames of at most {max_pixels} pixels, got {info.width}x{info.height}, "
            f"which the image processor resizes to {width}x{height}"
        )


def _resize_threads(info: VideoInfo, threads: int) -> int:
    """Limits the threads for large frames, to bound memory."""
    return max(1, min(threads, MAX_RESIZING_PIXELS // (info.width * info.height)))


class _Resizer:
    """Resizes frames in threads. `submit` blocks while two frames per thread are unfinished, to bound memory.

    Args:
        resize_crop: how frames are resized and cropped.
        executor: runs the threads.
        threads: frames that are resized at the same time, at most the threads of `executor`.

    Attributes:
        blocked_s: seconds that `submit` was blocked.
    """

    def __init__(self, resize_crop: ResizeCrop, executor: ThreadPoolExecutor, *, threads: int):
        self._resize_crop = resize_crop
        self._executor = executor
        self._slots = threading.BoundedSemaphore(2 * threads)
        self._running = threading.BoundedSemaphore(threads)
        self._futures: list[Future[tuple[Frame, float]]] = []
        self.blocked_s = 0.0

    def __enter__(self) -> "_Resizer":
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._futures:
            future.cancel()
        wait(self._futures)  # they use the video, which is closed next

    def submit(self, convert: Callable[[], Frame]) -> Future[tuple[Frame, float]]:
        """Calls `convert`, which returns uint8 (H, W, 3), and resizes the result.

        Returns:
            A future of the frame, uint8 (h, w, 3), and the seconds that resizing took.
        """
        started_s = time.perf_counter()
        self._slots.acquire()
        self.blocked_s += time.perf_counter() - started_s
        future = self._executor.submit(self._resize, convert)
        self._futures.append(future)
        return future

    def _resize(self, convert: Callable[[], Frame]) -> tuple[Frame, float]:
        try:
            with self._running:
                frame = convert()  # (H, W, 3)
                started_s = time.perf_counter()
                resized = self._resize_crop.resize_and_crop_frame(frame)  # (h, w, 3)
                return resized, time.perf_counter() - started_s
        finally:
            self._slots.release()

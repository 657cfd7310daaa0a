"""Turns an uploaded video into a clip: samples frames, decodes, resizes and crops them. Imports no torch.

    clip = load_clip(source, ClipSettings(num_frames=32, resize_crop=ResizeCrop(...)))
    clip = load_clip(source, settings, views=Views(clips=4, crops=3, sampling="dense", stride_frames=2))

    with ClipLoader(settings, threads=4) as loader:  # for several videos
        clips = [loader.load(source) for source in sources]

Each frame is resized in a separate thread as soon as it is decoded, while it is still in the CPU cache. Only a few
full-size frames are in memory at the same time.

Views share frames: each is decoded and resized once, and cropped when the model needs it.

Shapes: V views = K clips in time x crops, T frames of a view, F distinct frames of all views, C color channels, H x W
size of a decoded frame, h x w size of a model input, h' x w' size of the part of a resized frame that the crops need.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handler.processing.resize import Crop, ResizeCrop
from handler.threads import start_threads
from handler.video import FrameTooLargeError, Limits, VideoInfo, open_video, sample_views
from handler.views import ONE_VIEW, Views

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
        video_stream: "first" or "best", see `handler.video.open_video`.
    """

    num_frames: int
    resize_crop: ResizeCrop
    limits: Limits = dataclasses.field(default_factory=Limits)
    video_stream: str = "first"


@dataclasses.dataclass(frozen=True)
class View:
    """Where a view is in the video.

    Attributes:
        frame_indices: int64 (T,), frames of the video, counted from 0 in display order.
        times_s: float64 (T,), their display times in seconds from the first frame of the video.
        crop: the part of the resized frames.
    """

    frame_indices: npt.NDArray[np.int64]
    times_s: npt.NDArray[np.float64]
    crop: Crop


@dataclasses.dataclass(frozen=True)
class Clip:
    """Model inputs made from one video.

    Attributes:
        frames: uint8 (F, C, h', w'), the distinct sampled frames in display order, resized, not normalized.
        info: properties of the video.
        frame_indices: int64 (K * T,), the frames of each clip in time, one clip after the other.
        times_s: float64 (K * T,), their display times in seconds from the first frame of the video.
        crops: of each clip in time.
        num_frames: T.
        warnings: what the user should know, e.g. that frames repeat.
        decoded_frames: frames that were decoded, sampled or not.
        decode_s: seconds spent opening and decoding the video.
        resize_s: seconds spent resizing, summed over threads and concurrent with decoding.
    """

    frames: Frame
    info: VideoInfo
    frame_indices: npt.NDArray[np.int64]
    times_s: npt.NDArray[np.float64]
    crops: tuple[Crop, ...]
    num_frames: int
    warnings: tuple[str, ...]
    decoded_frames: int
    decode_s: float
    resize_s: float

    @property
    def views(self) -> list[View]:
        """The V views: all crops of the first clip in time, then those of the second, and so on."""
        rows = zip(self.frame_indices.reshape(-1, self.num_frames), self.times_s.reshape(-1, self.num_frames))
        return [View(indices, times_s, crop) for indices, times_s in rows for crop in self.crops]

    @property
    def pixels(self) -> Frame:
        """uint8 (V, T, C, h, w), the pixels of all views; a copy if there are several. See also `inputs`."""
        return np.stack(self.inputs) if len(self.inputs) > 1 else self.inputs[0][None]

    @property
    def inputs(self) -> "ViewPixels":
        """The pixels of each view, cropped when they are read."""
        return ViewPixels(self)

    def first_view(self) -> "Clip":
        """Returns a clip with the first view only."""
        view, pixels = self.views[0], self.inputs[0]  # (T, C, h, w)
        positions = [view.frame_indices.tolist().index(number) for number in distinct(view.frame_indices)]
        return dataclasses.replace(
            self,
            frames=pixels[positions],
            frame_indices=view.frame_indices,
            times_s=view.times_s,
            crops=(view.crop,),
        )


class ViewPixels(Sequence[Frame]):
    """The pixels of the V views of a clip, uint8 (T, C, h, w) each."""

    def __init__(self, clip: Clip):
        self._frames, self._crops = clip.frames, clip.crops
        pooled = distinct(clip.frame_indices)  # (F,)
        self._positions = np.searchsorted(pooled, clip.frame_indices).reshape(-1, clip.num_frames)  # (K, T)
        self._starts = layout(clip.crops).starts

    def __len__(self) -> int:
        return len(self._positions) * len(self._crops)

    def __getitem__(self, view: Any) -> Any:
        number, crop = divmod(range(len(self))[view], len(self._crops))
        (top, left), (_, _, height, width) = self._starts[crop], self._crops[crop]
        frames = self._frames[:, :, top : top + height, left : left + width]  # (F, C, h, w)
        positions = self._positions[number]
        if len(frames) == len(positions) and (np.diff(positions) == 1).all():
            return frames  # without a copy
        return frames[positions]  # (T, C, h, w)


def distinct(frame_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the distinct frames (F,), ascending, of several frame indices (n,)."""
    return np.array(sorted(set(frame_indices.tolist())), np.int64)  # np.unique imports numpy.ma, which takes 10 ms


class Layout(NamedTuple):
    """What is kept of a resized frame for several crops.

    Attributes:
        band: the smallest part that contains all crops.
        starts: (top, left) of each crop in what is kept.
        size: (h', w') of what is kept.
    """

    band: Crop
    starts: tuple[tuple[int, int], ...]
    size: tuple[int, int]


def layout(crops: Sequence[Crop]) -> Layout:
    """Returns what is kept of a frame: the band, or only the crops one after the other if they are smaller than it.

    Args:
        crops: of the same size, on a line, in ascending order.
    """
    (top, left, height, width), last = crops[0], crops[-1]
    band = Crop(top, left, last.top - top + height, last.left - left + width)
    if band.height > len(crops) * height:
        return Layout(band, tuple((number * height, 0) for number in range(len(crops))), (len(crops) * height, width))
    if band.width > len(crops) * width:
        return Layout(band, tuple((0, number * width) for number in range(len(crops))), (height, len(crops) * width))
    return Layout(band, tuple((crop.top - top, crop.left - left) for crop in crops), (band.height, band.width))


def keep(band_pixels: Frame, crops: Sequence[Crop]) -> Frame:
    """Returns what is kept of the pixels (H, W, C) of a band, see `layout`."""
    (band, starts, size) = layout(crops)
    if size == (band.height, band.width):
        return band_pixels
    parts = [band_pixels[crop.top - band.top :, crop.left - band.left :][: crop.height, : crop.width] for crop in crops]
    return np.concatenate(parts, axis=0 if starts[1][0] else 1)


def load_clip(
    source: bytes | str | Path,
    settings: ClipSettings,
    *,
    views: Views = ONE_VIEW,
    threads: int = 1,
    postpone_above_gigapixels: float | None = None,
) -> Clip:
    """Samples frames of a video, decodes, resizes and crops them. See `ClipLoader.load`; raises its errors."""
    with ClipLoader(settings, threads=threads) as loader:
        return loader.load(source, views=views, postpone_above_gigapixels=postpone_above_gigapixels)


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
        views: Views = ONE_VIEW,
        threads: int | None = None,
        postpone_above_gigapixels: float | None = None,
    ) -> Clip:
        """Samples frames of a video, decodes, resizes and crops them.

        Args:
            source: bytes of a file, or a path.
            views: which frames, and which parts of them.
            threads: threads that decode, and at most as many that resize. By default, and at most, all threads.
            postpone_above_gigapixels: do not decode if it is more work than this, see `Video.decode_gigapixels`.

        Raises:
            VideoError: the video cannot be used, or has no frame in the part that `views` specifies.
            Postponed: decoding is more work than `postpone_above_gigapixels`.
            OSError: the path cannot be read.
        """
        started_s = time.perf_counter()
        settings = self._settings
        resize_crop = dataclasses.replace(settings.resize_crop, zoom=views.zoom, crop_at=views.crop_at)
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
            _check_resized_size(video.info, resize_crop, settings.limits)
            crops = tuple(resize_crop.crops(video.info.height, video.info.width, count=views.crops))
            resizer = stack.enter_context(
                _Resizer(resize_crop, crops, self._resizing, threads=_resize_threads(video.info, threads))
            )
            indices, warnings = sample_views(video, views, num_frames=settings.num_frames)  # (K, T)
            if crops[0] == crops[-1] and views.crops > 1:
                warnings.append(f"the {views.crops} crops are the same: resized frames have no more than one crop")
            pooled = distinct(indices.ravel())  # (F,)
            resized: dict[int, Future[tuple[Frame, float]]] = {}
            for positions, convert in video.frames(pooled):
                # A position may be yielded again; then the later frame is the right one.
                resized.update(dict.fromkeys(positions.tolist(), resizer.submit(convert)))
            decode_s = time.perf_counter() - started_s - resizer.blocked_s
            frames = np.stack([resized[position].result()[0] for position in range(len(pooled))])  # (F, h', w', C)
            resize_s = sum(future.result()[1] for future in set(resized.values()))
            return Clip(
                frames=np.ascontiguousarray(frames.transpose(0, 3, 1, 2)),  # (F, C, h', w')
                info=video.info,
                frame_indices=indices.ravel(),
                times_s=video.pts_s[indices].ravel(),
                crops=crops,
                num_frames=settings.num_frames,
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
        resize_crop: how frames are resized.
        crops: which parts of them are needed.
        executor: runs the threads.
        threads: frames that are resized at the same time, at most the threads of `executor`.

    Attributes:
        blocked_s: seconds that `submit` was blocked.
    """

    def __init__(self, resize_crop: ResizeCrop, crops: Sequence[Crop], executor: ThreadPoolExecutor, *, threads: int):
        self._resize_crop = resize_crop
        self._crops = crops
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
            A future of what is kept of the frame, uint8 (h', w', 3), and the seconds that resizing took.
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
                band = self._resize_crop.resize_and_crop_frame(frame, layout(self._crops).band)
                resized = keep(band, self._crops)  # (h', w', 3)
                return resized, time.perf_counter() - started_s
        finally:
            self._slots.release()

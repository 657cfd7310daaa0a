"""One upload becomes one clip: sample, decode, resize. Everything that touches a stranger's bytes, and no torch.

    clip = load_clip(source, ClipSettings(num_frames=32, resize_crop=ResizeCrop(...)))

Each picture is resized as soon as it is decoded, in threads of its own: it is still in the processor's cache, and no
more than a few pictures of full size are in memory at a time.

Shapes: T frames, C colour channels, H x W a frame's size, h x w the model's picture size.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from handler.processing.resize import ResizeCrop
from handler.video import FrameTooLargeError, Limits, VideoInfo, open_video, sample_frames

# Of the pictures that are resized at the same time; twice as many wait. 0.4 GB of memory.
RESIZING_PIXELS = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What clip a model wants of a video.

    num_frames  T
    resize_crop    what becomes of a frame
    limits      of what may be uploaded
    sampling    `uniform`: see sample_uniform; `keyframes`: the keyframes nearest to those, which need no others decoded
    video_stream  `first` or `best`: see open_video
    """

    num_frames: int
    resize_crop: ResizeCrop
    limits: Limits = Limits()
    sampling: str = "uniform"
    video_stream: str = "first"


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video, ready for the model.

    Attributes:
        pixels: uint8 (V, T, C, h, w), resized and cropped, not yet normalised. V views of the video; 1 for now.
        info: the video that it came from.
        times_s: float64 (T,), display time of each sampled frame, seconds from the video's first frame.
        warnings: what a caller should know, e.g. that frames repeat.
        decoded_frames: how many had to be decoded for it.
        decode_s, resize_s: seconds of opening and decoding, and of resizing, which goes on meanwhile.
    """

    pixels: np.ndarray
    info: VideoInfo
    times_s: np.ndarray
    warnings: tuple[str, ...]
    decoded_frames: int
    decode_s: float
    resize_s: float


def load_clip(source: bytes | str | Path, settings: ClipSettings, *, threads: int = 1) -> Clip:
    """Samples frames of a video (a file's bytes, or its path), decodes, resizes and crops them.

    Args:
        threads: that decode, and as many that resize.

    Raises:
        VideoError: the source is not a video that can be used.
    """
    started_s = time.perf_counter()
    with (
        open_video(source, limits=settings.limits, thread_count=threads, stream=settings.video_stream) as video,
        _Resizer(settings.resize_crop, _resizing_threads(video.info, threads)) as resizer,
    ):
        _check_resized_size(video.info, settings)
        indices, warnings = sample_frames(video, num_frames=settings.num_frames, sampling=settings.sampling)  # (T,)
        resized = {}
        for places, picture in video.frames(indices):
            # A place may come twice, and the later picture is the right one.
            resized.update(dict.fromkeys(places.tolist(), resizer.submit(picture)))
        decode_s = time.perf_counter() - started_s - resizer.waited_s
        pictures = np.stack([resized[place].result()[0] for place in range(len(indices))])  # (T, h, w, C)
        pixels = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))[None]  # (1, T, C, h, w)
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


def _check_resized_size(info: VideoInfo, settings: ClipSettings) -> None:
    """A picture of 8000 x 2 pixels has few, but 200 million when its shorter side becomes 224."""
    height, width = settings.resize_crop.resized_size(info.height, info.width)
    limit = settings.limits.max_frame_pixels
    if height * width > limit:
        raise FrameTooLargeError(
            f"expected pictures of at most {limit} pixels, got {info.width}x{info.height}, "
            f"which the model wants resized to {width}x{height}"
        )


def _resizing_threads(info: VideoInfo, threads: int) -> int:
    """Fewer for pictures so large that a few fill the memory."""
    return max(1, min(threads, RESIZING_PIXELS // (info.width * info.height)))


class _Resizer:
    """Threads that resize pictures, so few at a time that these do not fill the memory.

    waited_s  seconds that `submit` has waited until there was room
    """

    def __init__(self, resize_crop: ResizeCrop, threads: int):
        self._resize_crop = resize_crop
        self._room = threading.BoundedSemaphore(2 * threads)
        self._threads = ThreadPoolExecutor(threads)
        self.waited_s = 0.0

    def __enter__(self) -> "_Resizer":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)

    def submit(self, picture: Callable[[], np.ndarray]) -> Future:
        """What gives uint8 (H, W, 3) -> a future (uint8 (h, w, 3), seconds that resizing took)."""
        started_s = time.perf_counter()
        self._room.acquire()
        self.waited_s += time.perf_counter() - started_s
        return self._threads.submit(self._resize, picture)

    def _resize(self, picture: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
        try:
            converted = picture()  # (H, W, 3)
            started_s = time.perf_counter()
            resized = self._resize_crop.resize_and_crop_frame(converted)  # (h, w, 3)
            return resized, time.perf_counter() - started_s
        finally:
            self._room.release()

"""Decodes exactly the requested frames of a video file.

    with open_video(source) as video:
        indices, warnings = sample_frames(video, num_frames=32)
        frames = video.decode(indices)  # uint8 (32, height, width, 3)

Frame i is the i-th frame of the whole video stream when it is decoded sequentially, turned upright. To avoid decoding
the whole stream, all packets are read first, which is fast; of large MP4 files only the header (see mp4.py). The
timestamps of the packets give the display order, and only the ranges that contain requested frames are
decoded. With frames 5 and 7 requested (packet B5 holds frame 5):

    packets as stored   I0  P4  B2  B1  B3  P8  B6  B5  B7  P12  B10 ...  I24  P28 ...
    decoded             x   x   x   .   .   x   x   x   x
                        |           |           |       |
                        |           |           |       the last packet needed: decoding continues at the keyframe
                        |           |           |       before the next requested frame
                        |           |           not requested, but B5 and B7 refer to it
                        |           no frame refers to B1 and B3: the decoder skips them
                        the keyframe before the first requested frame

References between frames of AV1 and VP9 are followed in frame headers instead (see references.py).

If the header of a large file cannot be trusted, all packets are read. If they cannot be trusted either (see index.py),
the stream is decoded sequentially and its frames are counted.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import queue
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from handler.threads import available_cores, decoder_threads_per_file, start_threads
from handler.video.bitstream import NAL_CODECS
from handler.video.container import (
    EXPECTED_CODEC,
    SharedFile,
    Source,
    choose_video_stream,
    open_container,
    read_packets,
    several_streams_warning,
)
from handler.video.cost import DecodingBudget
from handler.video.errors import (
    CorruptVideoError,
    FrameIndexError,
    FrameTooLargeError,
    NoFramesError,
    UnsupportedCodecError,
)
from handler.video.index import DecodeRange, PacketIndex, Packets, build_index, verified
from handler.video.limits import (
    Limits,
    check_duration,
    check_frame_size,
    check_header,
    expected_frame_size,
    max_pixels_option,
)
from handler.video.mp4 import IndexedPackets, IndexMismatch, open_indexed_packets
from handler.video.orientation import Orientation, UprightRGBConverter
from handler.video.references import SLOT_CODECS, required_packets

# Letters in shapes: N frames in the video, T requested frames, H and W height and width of an upright frame.

# Their decoders skip a frame that no other frame refers to. Packets of SLOT_CODECS are left out instead. A frame of VP8
# that is not decoded could lose a segment map update.
_SKIPPING_CODECS = NAL_CODECS

# Their frame threads are idle at times (see `_frame_threads`). libdav1d divides its work differently: twice the threads
# do not make it faster.
_WAITING_CODECS = (*NAL_CODECS, "vp9")

# Pixels of one frame from each parallel decoder. A decoder holds up to 17 frames of 3 bytes per pixel: 0.5 GB in total.
_MAX_PARALLEL_PIXELS = 10_000_000

# Pixels that the threads of one decoder hold at the same time: 0.4 GB.
_MAX_FRAME_THREAD_PIXELS = 2**27

# Slow-motion cameras record up to 960 frames per second. Several containers store times in milliseconds.
_MAX_FPS = 1000.0

Indices = Sequence[int] | npt.NDArray[np.int64]
RGBFrames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video stream.

    Attributes:
        frame_count: frames in the stream, at least 1.
        duration_s: from the start of the first frame to the end of the last one, in seconds.
        fps: mean number of frames per second; None if it is implausible: above 1000, or all timestamps are equal.
        width, height: of an upright frame in stored pixels. Non-square pixels are not rescaled.
        rotation: clockwise rotation in degrees that makes stored frames upright: 0, 90, 180 or 270. Frames that the
            file mirrors are first flipped horizontally.
        codec: "h264", "hevc", "av1", "vp9", ...
        container: FFmpeg's name of the demuxer, such as "mov,mp4,m4a,3gp,3g2,mj2" or "matroska,webm".
        stream: index of the stream in the file.
    """

    frame_count: int
    duration_s: float
    fps: float | None
    width: int
    height: int
    rotation: int
    codec: str
    container: str
    stream: int


def probe(source: Source) -> VideoInfo:
    """Returns the properties of a video. Takes the sources of `open_video`, and raises its errors.

    One thread: with several, the first frame would be returned only after one frame per thread has been decoded.
    """
    with open_video(source) as video:
        return video.info


def decode_frames(source: Source, indices: Indices) -> RGBFrames:
    """Returns frames as uint8 (T, H, W, 3), decoded on all available cores.

    See `Video.decode` and `open_video` for the arguments; raises the errors of both.
    """
    threads = decoder_threads_per_file(threads=available_cores(), files=1)
    with open_video(source, thread_count=threads) as video:
        return video.decode(indices)


@contextlib.contextmanager
def open_video(
    source: Source,
    *,
    limits: Limits = Limits(),
    thread_count: int = 1,
    stream: str = "first",
    postpone_above_gigapixels: float | None = None,
    executor: ThreadPoolExecutor | None = None,
) -> Iterator[Video]:
    """Opens a video in a `with` block.

    If the header of an MP4 or MOV file of at least 1 MiB states where each packet is, only the packets that are needed
    are read from the path or file object (see mp4.py). Otherwise all packets of the stream are read, and stay in memory
    until the end of the block.

    Args:
        source: bytes of a file, a path, or a binary file object with `read`, `seek` and `tell`. The file object is read
            from its beginning, stays open, and its position changes.
        limits: upper limits on the video.
        thread_count: threads that decode, and as many that convert to RGB. One thread costs the least CPU time,
            several decode a single video faster.
        stream: the video stream to use if there are several, "first" or "best" (see `choose_video_stream`).
        postpone_above_gigapixels: do not decode if it is more work than this, see `Video.decode_gigapixels`.
        executor: has at least `thread_count` threads. By default one is created for this video.

    Raises:
        VideoError: the video cannot be used; errors.py lists the subclasses.
        Postponed: opening or decoding is more work than `postpone_above_gigapixels`.
        OSError: the path cannot be read.
    """
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)  # shared by all containers that are opened for it
    elif not isinstance(source, (bytes, str, os.PathLike, SharedFile)):
        source = SharedFile(source)
    with contextlib.ExitStack() as stack:
        executor = executor or stack.enter_context(start_threads(thread_count))
        yield Video(
            source,
            limits=limits,
            thread_count=thread_count,
            stream=stream,
            postpone_above_gigapixels=postpone_above_gigapixels,
            executor=executor,
            stack=stack,
        )


class Video:
    """An open video, made by `open_video`. Not thread-safe.

    Attributes:
        info: VideoInfo.
        pts_s: float64 (N,), presentation time of each frame in seconds from the first frame, non-decreasing.
    """

    def __init__(
        self,
        source: Source,
        *,
        limits: Limits,
        thread_count: int,
        stream: str,
        postpone_above_gigapixels: float | None,
        executor: ThreadPoolExecutor,
        stack: contextlib.ExitStack,
    ):
        stack.callback(self._close)
        container = stack.enter_context(open_container(source, limits))
        self._stream = choose_video_stream(container, stream, limits)
        check_header(container, self._stream, limits)
        self._limits = limits
        self._thread_count = thread_count
        self._executor = executor
        self._budget = DecodingBudget(
            self._stream.codec_context, limits, postpone_above_gigapixels=postpone_above_gigapixels
        )
        self._is_open = True
        self._decoders = _Decoders(source, self._stream, limits)
        self._is_too_large = False
        self._warnings: list[str] = []
        self._index: PacketIndex | None = None
        self._opening: _RangeDecoder | None = None  # has decoded the first frames, and can continue
        # Without an index: the number in sequential decoding of each frame, int64 (N,).
        self._sequential_numbers: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        indexed_packets = open_indexed_packets(source, self._stream, limits, stack)
        self._packets: Packets = indexed_packets or self._read_all_packets()
        first = self._open_index()
        if indexed_packets and not first:
            self._packets = self._read_all_packets()
            first = self._open_index()
        if warning := several_streams_warning(container, self._stream):
            self._warn(warning)
        pts: list[int | None] | npt.NDArray[np.int64]
        if self._index and first:
            pts = self._index.pts
            last_packet = self._packets[self._index.display_order[-1]]
        else:
            first, pts = self._decode_all()
            self._sequential_numbers = np.arange(len(pts))
            last_packet = self._packets[-1]
        self._first = first
        check_frame_size(first.width, first.height, limits)
        self.pts_s = _seconds(pts, self._stream)  # (N,)
        self.info = self._describe(last_packet)
        check_duration(self.info.duration_s, limits)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems of the file that are known so far. Decoding may find more."""
        return tuple(self._warnings)

    @property
    def decoded_frames(self) -> int:
        """Frames decoded so far, requested or not, without those that are only decoded as a reference for others."""
        return self._budget.decoded_frames

    @property
    def is_indexed(self) -> bool:
        """Whether frames are found by the packet index. If not, the whole stream is decoded sequentially."""
        self._check_open()
        return self._index is not None

    @property
    def keyframes(self) -> npt.NDArray[np.int64] | None:
        """int64 (K,), ascending: the frames that are decoded without any other; None without an index."""
        self._check_open()
        return self._index.keyframes if self._index else None

    @property
    def decode_lengths(self) -> npt.NDArray[np.int64] | None:
        """int64 (N,): frames that must be decoded for each frame alone, including itself; None without an index."""
        self._check_open()
        return self._index.decode_lengths if self._index else None

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("expected an open video, got one whose `with` block has ended")

    def _close(self) -> None:
        # PyAV's objects for a closed file point to freed memory.
        self._is_open = False
        for name in ("_packets", "_stream", "_decoders", "_opening", "_index"):
            vars(self).pop(name, None)

    def decode(self, indices: Indices) -> RGBFrames:
        """Decodes frames.

        A frame that cannot be decoded is replaced by the previous one, with a warning. Frames that differ in size from
        the first frame are scaled to its size.

        Args:
            indices: (T,) integers from 0 to info.frame_count - 1, in any order, with repeats.

        Returns:
            uint8 (T, H, W, 3), RGB, upright, with the values of PyAV's `frame.to_ndarray(format="rgb24")`.

        Raises:
            FrameIndexError: an index is out of range.
            DecodingTooExpensiveError, Postponed: the work exceeds a limit.
            CorruptVideoError: none of the frames can be decoded.
            UnsupportedCodecError: FFmpeg cannot convert the color space to RGB.
        """
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)  # (T, H, W, 3)

        def fill(positions: npt.NDArray[np.int64], convert: Callable[[], RGBFrames]) -> None:
            frames[positions] = convert()

        filled: dict[int, Future[None]] = {}
        try:
            for positions, convert in self.frames(indices):
                for position in filled.keys() & positions.tolist():  # overwritten below, after it is complete
                    filled[position].result()
                filled.update(dict.fromkeys(positions.tolist(), self._executor.submit(fill, positions, convert)))
        finally:
            wait(filled.values())
        for future in filled.values():
            future.result()
        return frames

    def frames(self, indices: Indices) -> Iterator[tuple[npt.NDArray[np.int64], Callable[[], RGBFrames]]]:
        """Decodes frames one by one, so that not all are in memory at the same time.

        Args:
            indices: as in `decode`.

        Yields:
            int64 (k,) positions in `indices`, and a function that returns their frame, uint8 (H, W, 3). The function
            can be called in any thread while the video is open, and raises UnsupportedCodecError. Positions come in
            no particular order. If the index turns out to be wrong, they are yielded again with the right frames.

        Raises:
            The errors of `decode`.
        """
        self._check_open()
        indices = _checked_indices(indices, self.info.frame_count)  # (T,)
        self._budget.check(frame_count=self._frames_to_decode(indices))
        to_rgb = UprightRGBConverter(self._first)
        while self._index:
            try:
                for index, frame in self._decode_ranges(self._index, np.unique(indices)):
                    yield np.flatnonzero(indices == index), partial(to_rgb, frame)
                return
            except (IndexMismatch, av.FFmpegError):
                self._replace_index(self._index)
        numbers = self._sequential_numbers[indices]  # (T,)
        for number, frame in self._decode_numbers(np.unique(numbers)):
            yield np.flatnonzero(numbers == number), partial(to_rgb, frame)

    def decode_gigapixels(self, indices: Indices) -> float:
        """Estimates the work of decoding frames without decoding anything.

        The number of frames is exact or an upper bound if the index is right. Opening a file without a usable index
        has already decoded all of its frames once.

        Args:
            indices: as in `decode`.

        Returns:
            10^9 pixels of the decoded frames, requested or not, times the codec's factor (see cost.py).

        Raises:
            FrameIndexError: an index is out of range.
        """
        self._check_open()
        frame_count = self._frames_to_decode(_checked_indices(indices, self.info.frame_count))
        return self._budget.gigapixels(frame_count=frame_count)

    def _frames_to_decode(self, indices: npt.NDArray[np.int64]) -> int:
        if not len(indices):
            return 0
        if self._index:
            wanted = set(self._index.display_order[indices].tolist())
            return sum(stop - start for start, stop in self._index.decode_ranges(wanted))
        return int(self._sequential_numbers[indices].max()) + 1

    # With an index: decode the ranges that contain requested frames.

    def _decode_ranges(self, index: PacketIndex, indices: npt.NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (frame index, frame) for each unique index, in no particular order; raises IndexMismatch."""
        pending = dict(zip(index.pts[indices].tolist(), indices.tolist()))
        wanted = set(index.display_order[indices].tolist())
        ranges = index.decode_ranges(wanted)
        decoder_count = min(self._thread_count, _MAX_PARALLEL_PIXELS // (self._first.width * self._first.height))
        if decoder_count > 1 and _parallel_packets(ranges, decoder_count) < self._one_by_one_packets(index, ranges):
            frames = self._decode_in_parallel(index, ranges, wanted, decoder_count)
        else:
            frames = self._decode_one_by_one(index, ranges, wanted)
        with contextlib.closing(frames):
            for frame in frames:
                if frame.pts in pending:
                    yield pending.pop(frame.pts), frame
        if pending:
            raise IndexMismatch

    def _decode_one_by_one(
        self, index: PacketIndex, ranges: list[DecodeRange], wanted: Collection[int]
    ) -> Generator[VideoFrame]:
        """Yields the frames of ranges, decoded by one decoder that may have several threads."""
        for decode_range in ranges:
            opening, self._opening = self._opening, None  # valid until anything else is decoded
            plan = self._plan(index, decode_range, wanted)
            if plan.is_strict and opening and decode_range.start == 0 and opening.next_packet <= decode_range.stop:
                opening.plan = plan
                frames = opening
            else:
                decoder = self._decoders.get(self._frame_threads if plan.is_strict else 1, is_strict=plan.is_strict)
                frames = _RangeDecoder(decoder, plan)
            for frame in verified(frames):
                self._budget.count(width=frame.width, height=frame.height)
                yield frame

    def _decode_in_parallel(
        self, index: PacketIndex, ranges: list[DecodeRange], wanted: Collection[int], decoder_count: int
    ) -> Generator[VideoFrame]:
        """Yields the wanted frames of ranges, decoded by several decoders with one thread each.

        For many short ranges this is faster than one decoder with several threads, which stall at the end of each.
        """
        self._opening = None
        wanted_pts = set(index.packet_pts[[*wanted]].tolist())
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(decoder_count):
            slots.put(slot)

        def decode(decode_range: DecodeRange) -> tuple[list[VideoFrame], list[tuple[int, int]]]:
            slot = slots.get()
            try:
                plan = self._plan(index, decode_range, wanted)
                decoder = self._decoders.get(1, is_strict=plan.is_strict, slot=slot)
                frames, sizes = [], []
                for frame in verified(_RangeDecoder(decoder, plan)):
                    sizes.append((frame.width, frame.height))
                    if frame.pts in wanted_pts:
                        frames.append(frame)
                return frames, sizes
            finally:
                slots.put(slot)

        futures: deque[Future[tuple[list[VideoFrame], list[tuple[int, int]]]]] = deque()
        remaining = iter(ranges)
        try:
            # At most two ranges per decoder are in progress, to bound the frames in memory.
            for decode_range in islice(remaining, 2 * decoder_count):
                futures.append(self._executor.submit(decode, decode_range))
            while futures:
                frames, sizes = futures.popleft().result()
                for width, height in sizes:
                    self._budget.count(width=width, height=height)
                yield from frames
                for decode_range in islice(remaining, 1):
                    futures.append(self._executor.submit(decode, decode_range))
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _one_by_one_packets(self, index: PacketIndex, ranges: list[DecodeRange]) -> float:
        """Estimates how long `_decode_one_by_one` takes, in packets decoded by one thread."""
        packets = 0.0
        for decode_range in ranges:
            length = decode_range.stop - decode_range.start
            if index.starts_at_non_idr(decode_range):  # only one thread can decode it
                packets += length
            else:
                # The first thread starts, and the last one ends, as many packets apart as there are threads.
                packets += (length + self._frame_threads) / self._thread_count
        return packets

    def _plan(self, index: PacketIndex, decode_range: DecodeRange, wanted: Collection[int]) -> _Plan:
        """How to decode a range: what may be skipped, and whether its decoder is strict."""
        codec, packets = self._stream.codec_context.name, self._packets[slice(*decode_range)]
        required: Sequence[Packet[VideoStream] | None] = packets
        if index.may_lack_packets(decode_range):  # the decoder conceals a lost frame when it sees the next packet
            wanted = range(*decode_range)
        elif codec in SLOT_CODECS:
            required = required_packets([*packets], {i - decode_range.start for i in wanted}, codec=codec)
        # For a strict decoder, references to frames before the range are an error. A concealing decoder marks frames
        # with such references as corrupt; with several threads it may do so too late.
        return _Plan(decode_range.start, required, wanted, is_strict=not index.starts_at_non_idr(decode_range))

    @property
    def _frame_threads(self) -> int:
        """Threads of one decoder. More than thread_count, because some are idle at any time: those that got a skipped
        packet, and those that wait for a frame that theirs refers to."""
        coded = self._stream.codec_context
        if self._thread_count == 1 or coded.name not in _WAITING_CODECS:
            return self._thread_count
        fitting = _MAX_FRAME_THREAD_PIXELS // max(1, coded.width * coded.height)
        return max(self._thread_count, min(2 * self._thread_count + 2, fitting))

    def _read_all_packets(self) -> Packets:
        container = self._stream.container
        assert isinstance(container, InputContainer)
        packets, truncation = read_packets(container, self._stream, self._limits)
        if truncation:
            self._warn(truncation)
        if not packets:
            raise NoFramesError("expected frames, got an empty video stream")
        if packets[0].has_sidedata("encryption_info"):  # it can be decoded, but to noise
            raise UnsupportedCodecError(f"{EXPECTED_CODEC}, got an encrypted video")
        return packets

    def _open_index(self) -> VideoFrame | None:
        """Builds the index and returns the first frame; None if the index cannot be used."""
        self._index = build_index(self._packets, self._stream)
        first = self._verify_index(self._index) if self._index else None
        if first is None:
            self._index = self._opening = None
        return first

    def _verify_index(self, index: PacketIndex) -> VideoFrame | None:
        """Returns the first frame, or None if the first decoded frames contradict the index."""
        everything = _Plan(0, self._packets, range(len(self._packets)), is_strict=True)
        # For a large file one thread: several hold more frames, and few requests continue with the first ones.
        threads = 1 if isinstance(self._packets, IndexedPackets) else self._frame_threads
        opening = _RangeDecoder(self._decoders.get(threads, is_strict=True), everything)
        try:
            frames = opening.peek(index.verified_frame_count)
        except (IndexMismatch, av.FFmpegError):
            return None
        if not index.verify_first_frames(frames):
            return None
        self._opening = opening if threads == self._frame_threads else None
        return frames[0]

    def _replace_index(self, wrong: PacketIndex) -> None:
        """Builds the index from all packets if that has not been done; otherwise decodes sequentially."""
        if isinstance(self._packets, IndexedPackets):
            self._packets = self._read_all_packets()
            self._opening = None
            self._index = build_index(self._packets, self._stream)
            if self._index and np.array_equal(self._index.pts, wrong.pts):
                return
        self._fall_back_to_sequential()

    def _fall_back_to_sequential(self) -> None:
        """Drops the index. Frame indices keep their meaning: the same frame, or the one shown at its time."""
        self._index = None
        _, pts = self._decode_all()
        self._sequential_numbers = np.arange(self.info.frame_count)  # (N,)
        if len(pts) != self.info.frame_count:
            shown = np.searchsorted(_seconds(pts, self._stream), self.pts_s, side="right") - 1  # (N,)
            self._sequential_numbers = shown.clip(0, len(pts) - 1)  # (N,)
            self._warn(f"the file has {self.info.frame_count} frames, {len(pts)} of them can be decoded")

    # Without an index: decode everything in order, and count.

    def _decode_all(self) -> tuple[VideoFrame, list[int | None]]:
        """Returns the first frame, and the pts of every frame."""
        self._budget.check(frame_count=2 * len(self._packets))  # here, and again to return the requested frames
        first: VideoFrame | None = None
        pts: list[int | None] = []
        for frame in self._all_frames():
            first = first or frame
            pts.append(frame.pts)
        if first is None:
            if self._is_too_large:
                raise FrameTooLargeError(f"{expected_frame_size(self._limits)}, got larger ones")
            # FFmpeg may report frames that exceed max_pixels as corrupt, without their size.
            self._decoders.check_header_without_limits()
            raise CorruptVideoError("the video is corrupt: none of its frames can be decoded")
        return first, pts

    def _decode_numbers(self, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (number, frame) for ascending numbers of frames in sequential decoding."""
        if not len(numbers):
            return
        pending = deque(numbers.tolist())
        for number, frame in enumerate(self._all_frames()):
            if number == pending[0]:
                yield pending.popleft(), frame
                if not pending:
                    return
        raise CorruptVideoError("the video is corrupt: decoding it twice gives different results")

    def _all_frames(self) -> Iterator[VideoFrame]:
        """Yields all frames that can be decoded. Skips corrupt packets with a warning."""
        with self._decoders.new() as decoder:
            for packet in (*self._packets, None):
                try:
                    for frame in decoder.decode(packet):
                        self._budget.count(width=frame.width, height=frame.height)
                        yield frame
                except av.FFmpegError as error:
                    if isinstance(error, MemoryError):  # not the file's fault
                        raise
                    self._warn("the video is partially corrupt: some packets cannot be decoded")
                    # Corrupt packets raise InvalidDataError, frames beyond max_pixels ArgumentError.
                    self._is_too_large |= isinstance(error, av.ArgumentError)

    def _warn(self, warning: str) -> None:
        if warning not in self._warnings:
            self._warnings.append(warning)

    def _describe(self, last_packet: Packet[VideoStream]) -> VideoInfo:
        frame_count = len(self.pts_s)
        last_frame_s = (last_packet.duration or 0) * _tick_s(self._stream)
        duration_s = float(self.pts_s[-1]) + max(0.0, last_frame_s or _nominal_frame_s(self._stream))
        orientation = Orientation.of(self._first)
        width, height = orientation.size(self._first.width, self._first.height)
        return VideoInfo(
            frame_count=frame_count,
            duration_s=duration_s,
            fps=frame_count / duration_s if frame_count <= _MAX_FPS * duration_s else None,
            width=width,
            height=height,
            rotation=orientation.rotation,
            codec=self._stream.codec_context.codec.canonical_name,
            container=self._stream.container.format.name,
            stream=self._stream.index,
        )


class _Decoders:
    """Decoders of one stream. Each belongs to a container of its own, since a container has one decoder per stream."""

    def __init__(self, source: Source, stream: VideoStream, limits: Limits):
        self._source = source
        self._stream = stream
        self._limits = limits
        self._reused: dict[tuple[int, bool, int], VideoCodecContext] = {}

    def get(self, thread_count: int, *, is_strict: bool, slot: int = 0) -> VideoCodecContext:
        """A decoder that is reused in later calls with the same arguments.

        Args:
            is_strict: corrupt data is an error; other decoders conceal it.
            slot: decoders that are used in parallel have different slots.
        """
        key = thread_count, is_strict, slot
        if key not in self._reused:
            if self._reused:
                with open_container(self._source, self._limits) as container:  # a decoder does not need it any longer
                    self._reused[key] = self._configured(container, thread_count, is_strict=is_strict)
            else:
                opened = self._stream.container
                assert isinstance(opened, InputContainer)
                self._reused[key] = self._configured(opened, thread_count, is_strict=is_strict)
        return self._reused[key]

    @contextlib.contextmanager
    def new(self) -> Iterator[VideoCodecContext]:
        """A decoder that has decoded nothing yet: `flush_buffers` does not reset all of a decoder's state."""
        with open_container(self._source, self._limits) as container:
            yield self._configured(container, 1, is_strict=False)

    def check_header_without_limits(self) -> None:
        """Opens the file again without limits on FFmpeg, and checks what its header states."""
        with open_container(self._source, Limits()) as container:
            check_header(container, container.streams.video[self._position], self._limits)

    @property
    def _position(self) -> int:
        """Position among the video streams of the file."""
        return [stream.index for stream in self._stream.container.streams.video].index(self._stream.index)

    def _configured(self, container: InputContainer, thread_count: int, *, is_strict: bool) -> VideoCodecContext:
        decoder = container.streams.video[self._position].codec_context
        decoder.thread_count = thread_count
        decoder.thread_type = "FRAME"
        decoder.options = {**({"err_detect": "explode"} if is_strict else {}), **max_pixels_option(self._limits)}
        return decoder


class _Plan(NamedTuple):
    """How to decode a range.

    Attributes:
        start: number of its first packet.
        packets: those to decode; None for packets that are left out.
        kept: numbers of the packets that the decoder must not skip.
        is_strict: see `_Decoders.get`.
    """

    start: int
    packets: Sequence[Packet[VideoStream] | None]
    kept: Collection[int]
    is_strict: bool


class _RangeDecoder:
    """Decodes a range of packets: an iterator over the decoded frames.

    `plan` can be replaced during the iteration by one that starts at the same packet.
    """

    def __init__(self, decoder: VideoCodecContext, plan: _Plan):
        self.plan = plan
        self.next_packet = plan.start
        self._decoder = decoder
        self._peeked: list[VideoFrame] = []
        self._frames = self._decode()

    def peek(self, count: int) -> list[VideoFrame]:
        """The first `count` frames, or all if there are fewer. The iteration still returns them."""
        self._peeked = list(islice(self._frames, count))
        return list(self._peeked)

    def __iter__(self) -> Iterator[VideoFrame]:
        yield from self._peeked
        self._peeked = []
        yield from self._frames

    def _decode(self) -> Iterator[VideoFrame]:
        self._decoder.flush_buffers()
        can_skip = self._decoder.name in _SKIPPING_CODECS
        start = self.plan.start
        while self.next_packet < start + len(self.plan.packets):
            i = self.next_packet
            self.next_packet += 1
            packet = self.plan.packets[i - start]
            if packet is None:
                continue
            is_kept = not can_skip or i == start or i in self.plan.kept
            self._decoder.skip_frame = "DEFAULT" if is_kept else "NONREF"
            yield from self._decoder.decode(packet)
        yield from self._decoder.decode(None)


def _parallel_packets(ranges: Sequence[DecodeRange], decoder_count: int) -> int:
    """Returns the packets of the decoder that gets most, if each one takes the next range when it is done."""
    packets = [0] * decoder_count
    for start, stop in ranges:
        heapq.heapreplace(packets, packets[0] + stop - start)
    return max(packets)


def _seconds(pts: list[int | None] | npt.NDArray[np.int64], stream: VideoStream) -> npt.NDArray[np.float64]:
    """float64 (N,) from the first frame on; at the nominal frame rate if timestamps are missing or decrease."""
    ticks = np.array(pts, np.float64)  # (N,), nan for None
    if np.isnan(ticks).any() or (np.diff(ticks) < 0).any():
        return np.arange(len(pts), dtype=np.float64) * _nominal_frame_s(stream)
    seconds: npt.NDArray[np.float64] = (ticks - ticks[0]) * _tick_s(stream)
    return seconds


def _tick_s(stream: VideoStream) -> float:
    """The unit of the stream's timestamps in seconds."""
    return float(stream.time_base or 0)


def _nominal_frame_s(stream: VideoStream) -> float:
    return float(1 / stream.average_rate) if stream.average_rate and stream.average_rate > 0 else 0.0


def _checked_indices(indices: Indices, frame_count: int) -> npt.NDArray[np.int64]:
    array = np.asarray(indices)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise FrameIndexError(f"expected a list of integers, got {array.dtype} of shape {array.shape}")
    outside = array[(array < 0) | (array >= frame_count)]
    if outside.size:
        raise FrameIndexError(f"expected frame indices from 0 to {frame_count - 1}, got {outside[0]}")
    return array.astype(np.int64)  # (T,)

"""Video files in, exactly the wanted frames out.

    with open_video(source) as video:
        indices = sample_uniform(video.info.frame_count, 32)
        frames = video.decode(indices)  # uint8 (32, height, width, 3)

Frame i is the i-th frame that decoding the whole first video stream gives, turned upright. To have it without
decoding the whole stream, all packets are read first, which is quick; their timestamps put them into display
order; and only the stretches around wanted frames are decoded. With 5 and 7 wanted (packet B5 holds frame 5):

    packets as stored   I0  P4  B2  B1  B3  P8  B6  B5  B7  P12  B10 ...  I24  P28 ...
    decoded             x   x   x   .   .   x   x   x   x
                        |           |           |       |
                        |           |           |       the last one needed: stop here, and go on at the
                        |           |           |       keyframe before the next wanted frame
                        |           |           not wanted, but B5 and B7 refer to it
                        |           nobody refers to B1 and B3: the decoder skips them
                        the keyframe before the first wanted frame

Timestamps can lie. So the first frames are decoded when a file is opened, to prove them; every stretch is
checked while it is decoded; and where a check fails, the plain way is taken: decode everything and count. What
no check sees: times of B-frames that were swapped on purpose, and streams that were cut at open GOPs and joined
or have lost single frames without a trace in their times. There a frame may be another one than counting gives.

    VideoError                     code
    +-- NotAVideoError             not_a_video             no media file, or a picture of the mp4 family
    +-- UnsupportedContainerError  unsupported_container   a media file of a kind that is not accepted
    +-- NoVideoStreamError         no_video_stream         no moving pictures in it
    +-- UnsupportedCodecError      unsupported_codec       moving pictures in a codec that is not accepted
    +-- NoFramesError              no_frames               a video stream with nothing in it
    +-- CorruptVideoError          corrupt_video           unreadable header, or no frame that can be decoded
    +-- VideoTooLongError          video_too_long          longer than Limits allow
    +-- FrameTooLargeError         frame_too_large         larger pictures than Limits allow
    +-- TooManyFramesError         too_many_frames         more frames than Limits allow
    +-- FrameIndexError            frame_index             a frame was asked for that is not there
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from handler.video.bitstream import NalReader, shown_frame_count

# Letters in shapes: N frames in the video, T frames asked for, H and W height and width of an upright frame.

# FFmpeg's demuxers for files that hold their media themselves: no playlists, image sequences, devices.
_MP4, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_CONTAINERS = (_MP4, _MATROSKA, "avi", "mpegts", "mpeg", "flv", "gif", "ogg", "asf")
_ACCEPTED = "expected a video file (mp4/mov, webm/mkv, avi, mpeg-ts, mpeg-ps, flv, gif, ogg, asf/wmv)"

# FFmpeg's decoders for what cameras, browsers and editors write; the others only widen the attack surface.
_CODECS = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "h263", "flv"),
    *("mjpeg", "gif", "prores", "dnxhd", "vc1", "wmv3", "wmv2", "wmv1", "msmpeg4", "msmpeg4v2", "msmpeg4v1"),
    *("theora", "vp6", "vp6a", "vp6f", "ffv1", "huffyuv", "ffvhuff", "utvideo", "qtrle", "png", "rawvideo"),
    "dvvideo",
)

_USUAL_CODEC = "expected a usual video codec (h264, vp9, ...)"

_OPEN_OPTIONS = {
    "format_whitelist": ",".join(_CONTAINERS),
    "codec_whitelist": ",".join(_CODECS),
    # FFmpeg is handed the opened file; whatever that refers to stays closed.
    "protocol_whitelist": "none",
}

# Where packets can be counted instead of frames: one packet is one frame, its timestamp the time of display.
_TRUSTED_CONTAINERS = (_MP4, _MATROSKA, "mpegts", "flv")
_TRUSTED_CODECS = ("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mjpeg", "prores", "dnxhd")

# Where a frame that no other refers to leaves nothing behind in the decoder; VP8's may leave a segment map.
# Other decoders skip nothing.
_SKIPPING_CODECS = ("h264", "hevc")

# Codecs made of NAL units.
_NAL_CODECS = ("h264", "hevc")

# Enough to notice B-frames without display times, pairs of fields, and lost leading pictures; a few ms.
_PROOF_FRAMES = 4

# Of one picture of each decoder that works beside others: at up to 17 pictures of 3 bytes a pixel, 0.5 GB of memory.
_SIDE_BY_SIDE_PIXELS = 10_000_000

# Of the pictures that the threads of one decoder have in work together: 0.4 GB of memory.
_FRAME_THREADS_PIXELS = 2**27

# Containers that state their duration; for others FFmpeg estimates it from the packets that are there.
_STATING_DURATION = (_MP4, _MATROSKA, "avi", "flv", "asf")

# How accepted containers begin, (offset, bytes), to tell a damaged one from something else.
_MAGIC = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"moof"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI ")),
    *((0, b"\0\0\1\xba"), (0, b"FLV"), (0, b"GIF8"), (0, b"OggS"), (0, b"\x30\x26\xb2\x75")),
)

# How images begin: PNG, JPEG, BMP, TIFF, WebP, JPEG 2000, JPEG XL.
_IMAGE_MAGIC = (
    *((0, b"\x89PNG\r\n"), (0, b"\xff\xd8\xff"), (0, b"BM"), (0, b"II*\0"), (0, b"MM\0*"), (8, b"WEBP")),
    *((4, b"jP  "), (0, b"\xff\x4f\xff\x51"), (4, b"JXL "), (0, b"\xff\x0a")),
)

# How archives begin. In one that does not compress, FFmpeg would find a transport stream.
_ARCHIVE_MAGIC = ((0, b"PK\3\4"), (0, b"\x1f\x8b"), (257, b"ustar"))

# Brands of the mp4 family whose "video" is the tiles of a picture, moving or not (HEIF and AVIF).
_PICTURE_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1", "avif", "avis")


class VideoError(ValueError):
    """A video that cannot be used. The code is stable and meant for programs, the message for people."""

    code = "video_error"


class NotAVideoError(VideoError):
    """The bytes are no media file, or a HEIF or AVIF picture."""

    code = "not_a_video"


class UnsupportedContainerError(VideoError):
    """A file of a kind that is not accepted: a playlist, an image, a raw stream, ..."""

    code = "unsupported_container"


class NoVideoStreamError(VideoError):
    """Only sound, subtitles or cover art."""

    code = "no_video_stream"


class UnsupportedCodecError(VideoError):
    """The video stream's codec is not accepted, or not even known."""

    code = "unsupported_codec"


class NoFramesError(VideoError):
    """The video stream is empty."""

    code = "no_frames"


class CorruptVideoError(VideoError):
    """The file's header cannot be read, or not one of its frames can be decoded."""

    code = "corrupt_video"


class VideoTooLongError(VideoError):
    """It lasts longer than allowed, or says so."""

    code = "video_too_long"


class FrameTooLargeError(VideoError):
    """Its pictures have more pixels than allowed."""

    code = "frame_too_large"


class TooManyFramesError(VideoError):
    """It has more frames than allowed, or says so."""

    code = "too_many_frames"


class FrameIndexError(VideoError, IndexError):
    """A frame was asked for that is not there."""

    code = "frame_index"


# What reading a damaged file raises: FFmpeg's errors, and the Python file's when it is told to seek nowhere.
_UNREADABLE = (av.FFmpegError, OSError, ValueError)


class _PacketsLie(Exception):
    """What came out of the decoder contradicts what the packets say."""


@dataclass(frozen=True)
class VideoInfo:
    """What is in a video file.

    Attributes:
        frame_count: how many frames decoding the whole stream gives, at least 1.
        duration_s: from the first frame's start to the last frame's end, in seconds.
        fps: frames per second on average; 0.0 if the file knows no times.
        width, height: of an upright frame, in pixels as stored: pixels that are not square stay as they are.
        stream: index in the file of the video stream that is used.
        rotation: how many degrees stored pictures are turned clockwise to stand upright: 0, 90, 180 or 270.
            Those that the file marks as mirrored are mirrored left to right first.
        codec: "h264", "hevc", "av1", "vp9", ...
        container: FFmpeg's name for it, such as "mov,mp4,m4a,3gp,3g2,mj2" or "matroska,webm".
    """

    frame_count: int
    duration_s: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    container: str
    stream: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a video may be at most, its own word and the facts alike. They are checked as early as each is known,
    before it costs anything.

    max_duration_s    seconds
    max_frame_pixels  width times height of a picture
    max_frames        in its video stream: with an index that cannot be trusted, all of them are decoded
    """

    max_duration_s: float = float("inf")
    max_frame_pixels: int = sys.maxsize
    max_frames: int = sys.maxsize


def probe(source: bytes | str | os.PathLike) -> VideoInfo:
    """What is in a video file, given as bytes or as a path. Raises as `open_video` does."""
    with open_video(source) as video:
        return video.info


def decode_frames(source: bytes | str | os.PathLike, indices: Sequence[int]) -> np.ndarray:
    """The frames at `indices`, uint8 (T, H, W, 3). See `Video.decode`; raises as that and `open_video` do."""
    with open_video(source) as video:
        return video.decode(indices)


@contextlib.contextmanager
def open_video(
    source: bytes | str | os.PathLike, *, limits: Limits = Limits(), thread_count: int = 1, stream: str = "first"
) -> Iterator[Video]:
    """Opens a video, given as bytes or as a path, for the length of a `with` block.

    Its compressed packets are held in memory until the end of the block.

    Args:
        thread_count: threads that decode, and as many that convert to RGB. One costs the least CPU time, several
            finish a lone video sooner.
        stream: which video stream to use where a file has several: "first", or "best" (FFmpeg's av_find_best_stream,
            mostly the largest). Cover art does not count.

    Raises:
        VideoError: it cannot be used; the module's docstring shows the kinds.
        OSError: the path cannot be read.
    """
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)  # which every container that is opened on it shares
    with contextlib.ExitStack() as closing:
        yield Video(source, limits, thread_count, stream, closing)


class Video:
    """An open video, made by `open_video`. Several can be used in as many threads, but each in one at a time.

    Attributes:
        info: VideoInfo.
        pts_s: float64 (N,), when each frame is shown, in seconds from the first frame; never decreasing.
        decoded_frames: how many have been decoded so far, wanted or not.
    """

    def __init__(
        self,
        source: bytes | str | os.PathLike,
        limits: Limits,
        thread_count: int,
        stream: str,
        closing: contextlib.ExitStack,
    ):
        self._source = source
        self._limits = limits
        self._thread_count = thread_count
        self._closing = closing
        closing.callback(self._close)
        container = closing.enter_context(_open_container(source, limits))
        self._stream = _video_stream(container, stream)
        _check_header(self._stream, limits)
        self._decoders = {}
        self._is_too_large = False
        self.decoded_frames = 0
        self._packets, shortfall = _read_packets(container, self._stream, limits)
        self._warnings = [warning for warning in (shortfall, _several_streams(self._stream)) if warning]
        if not self._packets:
            raise NoFramesError("expected frames, got an empty video stream")
        if self._packets[0].has_sidedata("encryption_info"):  # which could be decoded, to noise
            raise UnsupportedCodecError(f"{_USUAL_CODEC}, got an encrypted video")

        # A frame is found by its packet, where packets tell, and by the order of decoding otherwise.
        self._packet_of = _packets_in_display_order(self._packets, self._stream)  # (N,) or None
        self._number_of = None  # (N,) or None
        self._proof = None  # what proved the packets, to go on from
        self._first = None if self._packet_of is None else self._prove_packets()
        if self._first is not None:
            pts = [self._packets[i].pts for i in self._packet_of]
            self._all_pts = np.sort([packet.pts for packet in self._packets])  # of hidden ones, too
            self._usual_step = np.median(np.diff(pts)) if len(pts) > 1 else 0
            last_packet = self._packets[self._packet_of[-1]]
        else:
            self._packet_of = None
            self._first, pts = self._decode_everything()
            self._number_of = np.arange(len(pts))
            last_packet = self._packets[-1]
        _check_pixels(self._first, limits)
        self.pts_s = _seconds(pts, self._stream)  # (N,)
        self.info = self._describe(last_packet)
        _check_duration(self.info.duration_s, limits)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what is wrong with the file, as far as it is known by now: decoding may find more."""
        return tuple(self._warnings)

    def _close(self):
        # What PyAV keeps of a closed file points into freed memory.
        self._packets = self._stream = self._decoders = self._proof = None

    def decode(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at `indices`, in that order, repeats included.

        A frame that is in the file but cannot be decoded is replaced by the one shown before it, and a
        warning says so. A frame of another size than the first one is scaled to that.

        Args:
            indices: (T,) integers from 0 to info.frame_count - 1.

        Returns:
            uint8 (T, H, W, 3), RGB, upright, with the values of PyAV's `frame.to_ndarray(format="rgb24")`.

        Raises:
            FrameIndexError: an index is out of range.
            CorruptVideoError: not one frame can be decoded.
            UnsupportedCodecError: FFmpeg cannot convert such pictures to RGB.
        """
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)  # (T, H, W, 3)

        def fill(places, picture):
            frames[places] = picture()

        filled = {}
        with ThreadPoolExecutor(self._thread_count) as converters:
            for places, picture in self.frames(indices):
                for place in filled.keys() & places.tolist():  # a place that comes again is filled anew
                    filled[place].result()
                filled.update(dict.fromkeys(places.tolist(), converters.submit(fill, places, picture)))
        for future in filled.values():
            future.result()
        return frames

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[np.ndarray, Callable[[], np.ndarray]]]:
        """What `decode` gives, one frame at a time: as soon as each is decoded, and without all being in memory.

        Yields:
            (int64 (k,), function that gives uint8 (H, W, 3)): the places in `indices` where a frame is wanted, and
            what converts it, for any thread to call while the video is open; it raises UnsupportedCodecError. They
            come in no particular order, and where the file turns out to lie, some come again: the later count.
        """
        if self._packets is None:
            raise RuntimeError("expected an open video, got one whose `with` block has ended")
        indices = _checked_indices(indices, self.info.frame_count)  # (T,)
        to_rgb = _UprightRGB(self._first)
        if self._packet_of is not None:
            try:
                for index, frame in self._decode_stretches(np.unique(indices)):
                    yield np.flatnonzero(indices == index), partial(to_rgb, frame)
                return
            except (_PacketsLie, av.FFmpegError):
                self._stop_trusting_packets()
        numbers = self._number_of[indices]  # (T,)
        for number, frame in self._decode_in_order(np.unique(numbers)):
            yield np.flatnonzero(numbers == number), partial(to_rgb, frame)

    @property
    def keyframes(self) -> np.ndarray | None:
        """int64 (K,), ascending: frames that are decoded without any other; None if the index is not usable."""
        if self._packet_of is None:
            return None
        return np.flatnonzero([self._packets[i].is_keyframe for i in self._packet_of])

    # The economical way: decode the stretches that hold wanted frames.

    def _decode_stretches(self, indices):
        """Yields (index, frame) for every index, in no particular order; _PacketsLie if a check fails."""
        index_of_pts = {self._packets[self._packet_of[i]].pts: i for i in indices.tolist()}
        wanted = set(self._packet_of[indices].tolist())
        stretches = _stretches(self._packets, wanted)
        decoders = min(self._thread_count, _SIDE_BY_SIDE_PIXELS // (self._first.width * self._first.height))
        if 1 < decoders <= len(stretches):
            frames = self._side_by_side(stretches, wanted, decoders)
        else:
            frames = self._one_by_one(stretches, wanted)
        with contextlib.closing(frames):
            for frame in frames:
                if frame.pts in index_of_pts:
                    yield index_of_pts.pop(frame.pts), frame
        if index_of_pts:
            raise _PacketsLie

    def _one_by_one(self, stretches, wanted):
        """The frames of stretches, by one decoder that may have several threads."""
        for start, stop in stretches:
            proof, self._proof = self._proof, None  # which is lost as soon as anything else is decoded
            stretch_wanted, strict = self._terms(start, stop, wanted)
            if strict and proof and start == 0 and proof.next_packet <= stop:
                proof.stop, proof.wanted = stop, stretch_wanted
                stretch = proof
            else:
                decoder = self._decoder(self._frame_threads if strict else 1, strict=strict)
                stretch = _Stretch(self._packets, decoder, start, stop, stretch_wanted)
            for frame in _in_display_order(stretch):
                self.decoded_frames += 1
                yield frame

    def _side_by_side(self, stretches, wanted, decoders):
        """The wanted frames of stretches, by several decoders of one thread each.

        These waste less than one decoder's threads, which come to a halt wherever a stretch ends.
        """
        self._proof = None
        wanted_pts = {self._packets[i].pts for i in wanted}
        seats = queue.SimpleQueue()
        for seat in range(decoders):
            seats.put(seat)

        def decode(start, stop):
            seat = seats.get()
            try:
                stretch_wanted, strict = self._terms(start, stop, wanted)
                decoder = self._decoder(1, strict=strict, seat=seat)
                frames, count = [], 0
                for frame in _in_display_order(_Stretch(self._packets, decoder, start, stop, stretch_wanted)):
                    count += 1
                    if frame.pts in wanted_pts:
                        frames.append(frame)
                return frames, count
            finally:
                seats.put(seat)

        def take(future):
            frames, count = future.result()
            self.decoded_frames += count
            return frames

        pool, futures = ThreadPoolExecutor(decoders), deque()
        try:
            for start, stop in stretches:
                if len(futures) == 2 * decoders:  # more frames need not wait to be taken
                    yield from take(futures.popleft())
                futures.append(pool.submit(decode, start, stop))
            while futures:
                yield from take(futures.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _terms(self, start, stop, wanted):
        """(packets of a stretch that must not be skipped, whether its decoder shall be strict)."""
        if self._may_lack_packets(start, stop):  # the decoder makes up for them at the next one that it sees
            wanted = range(start, stop)
        # A strict decoder takes talk of frames that it has not seen for damage; another one tells the two apart, but
        # in time only on one thread.
        return wanted, not self._is_non_idr(self._packets[start])

    def _is_non_idr(self, keyframe):
        coded = self._stream.codec_context
        return coded.name == "h264" and NalReader(coded.name, coded.extradata).is_non_idr(keyframe)

    def _may_lack_packets(self, start, stop):
        """Whether frames are not evenly spaced from the first to the last one that packets start to stop - 1 show."""
        pts = [packet.pts for packet in self._packets[start:stop]]
        # With those of later packets: a stretch may end before some frames that are shown between its own.
        first, last = np.searchsorted(self._all_pts, (min(pts), max(pts)))
        steps = np.diff(self._all_pts[first : last + 1])
        return len(steps) > 0 and steps.max() > 1.5 * self._usual_step

    @property
    def _frame_threads(self):
        """Of one decoder. It hands its threads packets in turn, of which half may be skipped: these have nothing to do."""
        coded = self._stream.codec_context
        if self._thread_count == 1 or coded.name not in _SKIPPING_CODECS:
            return self._thread_count
        fit_in = _FRAME_THREADS_PIXELS // max(1, coded.width * coded.height)
        return max(self._thread_count, min(2 * self._thread_count, fit_in))

    def _decoder(self, thread_count, *, strict=True, seat=0):
        """A decoder to be used again, one a seat; a strict one gives up on damage, where others paint over it."""
        key = thread_count, strict, seat
        if key not in self._decoders:
            container = self._stream.container
            if self._decoders:
                container = self._closing.enter_context(_open_container(self._source, self._limits))
            options = {"err_detect": "explode"} if strict else {}
            self._decoders[key] = self._configured(container, thread_count, options)
        return self._decoders[key]

    def _prove_packets(self):
        """The first frame, or None if the first few do not come out as the packets say."""
        every_packet = range(len(self._packets))
        proof = _Stretch(self._packets, self._decoder(self._frame_threads), 0, len(self._packets), every_packet)
        # Frames that are stored in another order than they are shown in do have display times; the rest shows at once.
        is_reordered = bool((np.diff(self._packet_of) < 0).any())
        try:
            frames = proof.peek(1 if is_reordered else _PROOF_FRAMES)
        except av.FFmpegError:
            return None
        expected_pts = [self._packets[i].pts for i in self._packet_of[: len(frames)]]
        if not frames or any(map(_is_dubious, frames)) or [frame.pts for frame in frames] != expected_pts:
            return None
        self._proof = proof
        return frames[0]

    def _stop_trusting_packets(self):
        """Finds out which decoded frame each promised frame is: the same, or the one on show at its time."""
        self._packet_of = None
        _, pts = self._decode_everything()
        self._number_of = np.arange(self.info.frame_count)  # (N,)
        if len(pts) != self.info.frame_count:
            on_show = np.searchsorted(_seconds(pts, self._stream), self.pts_s, side="right") - 1  # (N,)
            self._number_of = on_show.clip(0, len(pts) - 1)  # (N,)
            self._warn(f"{self.info.frame_count} frames are in the file, {len(pts)} can be decoded")

    # The plain way: decode everything in order, and count.

    def _decode_everything(self):
        """(the first frame, the pts of every frame)."""
        first, pts = None, []
        for frame in self._all_frames():
            first = first or frame
            pts.append(frame.pts)
        if first is None:
            if self._is_too_large:
                raise FrameTooLargeError(f"{_expected_pixels(self._limits)}, got larger ones")
            # Of pictures that are too large, FFmpeg may have forgotten the size and then called them damaged.
            with _open_container(self._source, Limits()) as container:
                _check_header(container.streams[self._stream.index], self._limits)
            raise CorruptVideoError("the video is damaged: not one of its frames can be decoded")
        return first, pts

    def _decode_in_order(self, numbers):
        """Yields (number, frame) for ascending numbers, counted from 0 as frames come out."""
        pending = numbers.tolist()
        for number, frame in enumerate(self._all_frames()):
            if not pending:
                return
            if number == pending[0]:
                yield pending.pop(0), frame
        if pending:
            raise CorruptVideoError("the video is damaged: it cannot be decoded twice alike")

    def _all_frames(self):
        """Yields every frame that can be decoded; damaged packets are passed over, and warned of."""
        # A decoder of its own, since some of what one has seen survives `flush_buffers`.
        with _open_container(self._source, self._limits) as container:
            decoder = self._configured(container, thread_count=1, options={})
            for packet in (*self._packets, None):
                try:
                    for frame in decoder.decode(packet):
                        self.decoded_frames += 1
                        yield frame
                except av.FFmpegError as error:
                    if isinstance(error, MemoryError):  # ours to have, not the file's fault
                        raise
                    self._warn("parts of the video are damaged and cannot be decoded")
                    # Damage is InvalidDataError; this one is about max_pixels.
                    self._is_too_large |= isinstance(error, av.ArgumentError)

    # What both ways need.

    def _configured(self, container, thread_count, options):
        """The container's decoder, which takes settings only before its first packet."""
        decoder = container.streams[self._stream.index].codec_context
        decoder.thread_count = thread_count
        decoder.thread_type = "FRAME"
        decoder.options = {**options, "max_pixels": str(_max_pixels(self._limits))}
        return decoder

    def _warn(self, warning):
        if warning not in self._warnings:
            self._warnings.append(warning)

    def _describe(self, last_packet):
        frame_count = len(self.pts_s)
        last_frame_s = float((last_packet.duration or 0) * self._stream.time_base)
        duration_s = float(self.pts_s[-1]) + (last_frame_s or _stated_frame_s(self._stream))
        turn = _Turn.of(self._first)
        width, height = self._first.width, self._first.height
        return VideoInfo(
            frame_count=frame_count,
            duration_s=duration_s,
            fps=frame_count / duration_s if duration_s > 0 else 0.0,
            width=height if turn.transposed else width,
            height=width if turn.transposed else height,
            rotation=turn.rotation,
            codec=self._stream.codec_context.codec.canonical_name,
            container=self._stream.container.format.name,
            stream=self._stream.index,
        )


def sample_frame_indices(clip_len: int, frame_sample_rate: int, seg_len: int) -> np.ndarray:
    """A clip from a random place (np.random's), as in the ViViT recipe of transformers' documentation.

    Args:
        clip_len: how many frames to sample.
        frame_sample_rate: distance from one to the next, in frames.
        seg_len: how many frames the video has.

    Returns:
        int64 (clip_len,), ascending.

    Raises:
        ValueError: the video is too short for such a clip.
    """
    span = int(clip_len * frame_sample_rate)
    if seg_len <= span:
        raise ValueError(
            f"expected a video of more than {clip_len} x {frame_sample_rate} = {span} frames, got {seg_len} "
            "(PyAV's stream.frames is 0 where the file does not state it; probe() knows)"
        )
    end = np.random.randint(span, seg_len)
    return np.linspace(end - span, end, num=clip_len).clip(end - span, end - 1).astype(np.int64)


def read_video_pyav(container: av.container.InputContainer, indices: Sequence[int]) -> np.ndarray:
    """Frames of a container that PyAV opened, as in the ViViT recipe of transformers' documentation.

    Like the recipe, it decodes everything up to the last index, gives frames in the order of the video, each
    once, none before `indices[0]` and none after `indices[-1]` or the video's end, and does not turn them
    upright. `decode_frames` is quicker and stricter.

    Returns:
        uint8 (number of frames found, height, width, 3), RGB.

    Raises:
        FrameIndexError: there is no frame at any of the indices.
    """
    wanted = {int(index) for index in indices if indices[0] <= index <= indices[-1]}
    reformatter = VideoReformatter()
    pictures = []
    if wanted:
        container.seek(0)
        for i, frame in enumerate(container.decode(video=0)):
            if i > max(wanted):
                break
            if i in wanted:
                pictures.append(_pixels(reformatter.reformat(frame, format="rgb24", threads=1)))
    if not pictures:
        raise FrameIndexError(f"expected indices of frames that the video has, got {list(indices)}")
    return np.stack(pictures)


@contextlib.contextmanager
def _open_container(source, limits):
    """Yields the PyAV container. FFmpeg is given an open file, never a path or an address."""
    # FFmpeg decodes a little to find out what is in a file; not even then may a picture be too large.
    decoding = {"max_pixels": str(_max_pixels(limits))}
    in_memory = isinstance(source, (bytes, bytearray, memoryview))
    with io.BytesIO(source) if in_memory else open(source, "rb") as file:
        beginning = file.read(512)
        file.seek(0)
        if any(beginning[offset:].startswith(magic) for offset, magic in _ARCHIVE_MAGIC):
            raise NotAVideoError(f"{_ACCEPTED}, got an archive")
        try:
            container = av.open(
                file, mode="r", options=decoding, container_options=_OPEN_OPTIONS, metadata_errors="replace"
            )
        except _UNREADABLE as error:
            if beginning[4:8] == b"ftyp" and beginning[8:12].decode("latin-1") in _PICTURE_BRANDS:
                raise NotAVideoError(f"{_ACCEPTED}, got an image") from error
            if any(beginning[offset:].startswith(magic) for offset, magic in _MAGIC):
                raise CorruptVideoError("the video's header is damaged or cut off") from error
            is_image = any(beginning[offset:].startswith(magic) for offset, magic in _IMAGE_MAGIC)
            if isinstance(error, av.ArgumentError):  # a format that FFmpeg knows and the allow-list excludes
                found = "an image" if is_image else "a file of another kind"
                raise UnsupportedContainerError(f"{_ACCEPTED}, got {found}") from error
            raise NotAVideoError(f"{_ACCEPTED}, got {'an image' if is_image else 'something else'}") from error
        with container:
            yield container


def _video_stream(container, choice):
    """The first or the best video stream that is not cover art."""
    if container.metadata.get("major_brand") in _PICTURE_BRANDS:
        raise NotAVideoError(f"{_ACCEPTED}, got an image")
    streams = _video_streams(container)
    if not streams:
        raise NoVideoStreamError("expected a video stream, got a file without one")
    best = container.streams.best("video") if choice == "best" else None
    stream = best if best in streams else streams[0]
    codec = stream.codec_context.name if stream.codec_context else "an unknown one"
    if codec not in _CODECS:
        if not stream.codec_context and not _read_packets(container, stream, Limits())[0]:
            raise CorruptVideoError("the video's header is damaged or cut off")
        raise UnsupportedCodecError(f"{_USUAL_CODEC}, got {codec}")
    return stream


def _video_streams(container):
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _several_streams(used):
    """A warning where there are other video streams than the one that is used, or None."""
    streams = _video_streams(used.container)
    if len(streams) == 1:
        return None
    sizes = [f"{s.index} ({s.width}x{s.height})" if s.codec_context else f"{s.index}" for s in streams]
    return f"the file has {len(streams)} video streams: {', '.join(sizes)}; stream {used.index} is used"


def _check_header(stream, limits):
    """Raises VideoTooLongError, FrameTooLargeError or TooManyFramesError for what a file says of itself."""
    _check_duration((stream.container.duration or 0) / av.time_base, limits)
    _check_duration(float((stream.duration or 0) * (stream.time_base or 0)), limits)
    _check_pixels(stream.codec_context, limits)
    if stream.frames > limits.max_frames:
        raise TooManyFramesError(f"expected at most {limits.max_frames} frames, got {stream.frames}")


def _check_duration(duration_s, limits):
    if duration_s > limits.max_duration_s:
        raise VideoTooLongError(f"expected at most {limits.max_duration_s:g} s of video, got {duration_s:.1f} s")


def _check_pixels(sized, limits):
    if sized.width * sized.height > limits.max_frame_pixels:
        raise FrameTooLargeError(f"{_expected_pixels(limits)}, got {sized.width}x{sized.height}")


def _max_pixels(limits):
    """FFmpeg's option of that name, which has 31 bits. FFmpeg counts rows and columns that only fill up blocks, too."""
    return min(2 * limits.max_frame_pixels + 2**23, 2**31 - 1)


def _expected_pixels(limits):
    return f"expected pictures of at most {limits.max_frame_pixels} pixels"


def _read_packets(container, stream, limits):
    """(the stream's packets as stored, a warning if the file ends too early or None)."""
    packets = []
    ends = {}  # of every stream, since the header's duration is that of the longest
    try:
        for packet in container.demux():
            if packet.size and packet.stream_index == stream.index:
                packets.append(packet)
                if len(packets) > limits.max_frames:
                    break
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
    except _UNREADABLE:
        return packets, "the file is damaged: the rest of it cannot be read"
    except IndexError:
        pass  # at the end of the file, PyAV looks for streams that turned up midway among those of the header
    if len(packets) > limits.max_frames:
        raise TooManyFramesError(f"expected at most {limits.max_frames} frames, got more")
    if container.duration and container.format.name in _STATING_DURATION:
        stated_s = (container.duration + (container.start_time or 0)) / av.time_base
        end_s = max((float(end * container.streams[i].time_base) for i, end in ends.items()), default=0.0)
        if end_s < 0.95 * stated_s - 0.5:
            return packets, f"the file is cut off: its header says {stated_s:.1f} s, {end_s:.1f} s are there"
    return packets, None


def _packets_in_display_order(packets, stream):
    """int64 (N,), which packet holds each frame; None where the packets do not tell."""
    codec = stream.codec_context.name
    if stream.container.format.name not in _TRUSTED_CONTAINERS or codec not in _TRUSTED_CODECS:
        return None
    for packet in packets:
        if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            return None
    pts = np.array([packet.pts for packet in packets])
    keyframes = np.flatnonzero([packet.is_keyframe for packet in packets])
    # Nothing may be shown before the first keyframe, nor anything from the next keyframe on before this one.
    if keyframes[:1].tolist() != [0] or pts.min() < pts[0]:
        return None
    if codec in _NAL_CODECS:
        reader = NalReader(codec, stream.codec_context.extradata)
        if any(reader.is_unclean_random_access_point(packets[i]) for i in keyframes[1:]):
            return None
        if not _are_parameter_sets_known(packets, reader):
            return None
    # Shown in another order than stored, although the codec has none: the times are wrong.
    if not _may_reorder(stream.codec_context) and (np.diff(pts) < 0).any():
        return None
    earliest_from, latest_until = np.minimum.accumulate(pts[::-1])[::-1], np.maximum.accumulate(pts)
    if (earliest_from[keyframes[1:]] <= latest_until[keyframes[1:] - 1]).any():
        return None
    shown = np.array([shown_frame_count(packet, codec) for packet in packets])
    if shown.max() > 1:
        return None
    # Decoded but not shown: what an edit list cuts although others need it, and what VP8 and VP9 hide.
    hidden = (shown == 0) | [packet.is_discard for packet in packets]
    order = np.argsort(pts, kind="stable")
    order = order[~hidden[order]]  # (N,)
    steps = np.diff(pts[order])
    if not len(order) or (steps == 0).any():
        return None
    # A transport stream does not always notice what it has lost, but its frames do not vary in length.
    if stream.container.format.name == "mpegts" and len(steps) and steps.max() > 1.5 * np.median(steps):
        return None
    return order


def _are_parameter_sets_known(packets, reader):
    """Whether decoding from any keyframe uses the parameter sets that sequential decoding uses.

    They never differ from those in the stream's header, or every keyframe repeats all of them.
    """
    sets = [reader.packet_parameter_sets(packet) for packet in packets]
    if all(found.items() <= reader.parameter_sets.items() for found in sets if found):
        return True
    keys = reader.parameter_sets.keys() | {key for found in sets for key in found}
    return all(found.keys() == keys for found, packet in zip(sets, packets) if packet.is_keyframe)


def _may_reorder(codec_context):
    return codec_context.name in ("h264", "hevc") and codec_context.has_b_frames


class _Stretch:
    """Packets start to stop - 1 on their way through a decoder: an iterator over the frames that come out.

    Both `stop` and `wanted`, the packets that must not be skipped, may change while it is under way.
    """

    def __init__(self, packets, decoder, start, stop, wanted):
        self.next_packet, self.stop, self.wanted = start, stop, wanted
        self._packets, self._decoder, self._start = packets, decoder, start
        self._peeked = []
        self._frames = self._decode()

    def peek(self, count):
        """The first frames, `count` of them or as many as there are, which nevertheless come out again later."""
        self._peeked = list(islice(self._frames, count))
        return list(self._peeked)

    def __iter__(self):
        yield from self._peeked
        self._peeked = []
        yield from self._frames

    def _decode(self):
        self._decoder.flush_buffers()
        can_skip = self._decoder.name in _SKIPPING_CODECS
        while self.next_packet < self.stop:
            i = self.next_packet
            self.next_packet += 1
            is_wanted = not can_skip or i == self._start or i in self.wanted
            self._decoder.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            yield from self._decoder.decode(self._packets[i])
        yield from self._decoder.decode(None)


def _stretches(packets, wanted):
    """[[start, stop], ...] of the packets to decode for the wanted ones, each from a keyframe on."""
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    stretches = []
    for i in wanted:
        k = bisect_right(keyframes, i) - 1
        # Stored after a keyframe and shown before it: refers to frames before the keyframe too (an open GOP).
        while packets[keyframes[k]].pts > packets[i].pts:
            k -= 1
        stretches.append([keyframes[k], i + 1])
    merged = []
    for start, stop in sorted(stretches):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return merged


def _in_display_order(frames):
    """The same frames; _PacketsLie where one is damaged, has no time or is not later than the one before."""
    last_pts = -np.inf
    for frame in frames:
        if frame.pts is None or frame.pts <= last_pts or _is_dubious(frame):
            raise _PacketsLie
        last_pts = frame.pts
        yield frame


def _is_dubious(frame):
    """Damaged, or interlaced, of which the two halves may be two packets."""
    return frame.is_corrupt or frame.interlaced_frame


def _seconds(pts, stream):
    """float64 (N,) from the first frame on; at the stated rate where pts are missing or run backwards."""
    if None in pts or any(later < earlier for earlier, later in pairwise(pts)):
        return np.arange(len(pts)) * _stated_frame_s(stream)
    return (np.array(pts, np.float64) - pts[0]) * float(stream.time_base)


def _stated_frame_s(stream):
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


@dataclass(frozen=True)
class _Turn:
    """What brings a stored picture upright: transposing it, then reversing its rows, its columns, or both."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    @classmethod
    def of(cls, frame):
        """From the display matrix (a b u; c d v; x y w): pixel (p, q) is shown at (a p + c q, b p + d q)."""
        try:
            matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)
        except (KeyError, ValueError):  # there is none, or side data of a kind that PyAV has not heard of
            return cls()
        a, b, c, d = matrix[[0, 1, 3, 4]].tolist()
        if abs(b) > abs(a):
            return cls(transposed=True, rows_reversed=b < 0, columns_reversed=c < 0)
        return cls(transposed=False, rows_reversed=d < 0, columns_reversed=a < 0)

    @property
    def rotation(self):
        """Degrees clockwise, after mirroring left to right where the picture is mirrored."""
        if self.transposed:
            return 90 if self.columns_reversed else 270
        return 180 if self.rows_reversed else 0

    def __call__(self, picture):
        """A view of the picture, (H, W, 3)."""
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]


class _UprightRGB:
    """Turns decoded frames into uint8 (H, W, 3), all of the first one's size, in any thread."""

    def __init__(self, first):
        self._own = threading.local()
        self._width, self._height, self._turn = first.width, first.height, _Turn.of(first)

    def __call__(self, frame):
        if not hasattr(self._own, "reformatter"):  # one a thread: setting it up costs as much as a small frame
            self._own.reformatter = VideoReformatter()
        try:
            rgb = self._own.reformatter.reformat(frame, self._width, self._height, "rgb24", threads=1)
        except av.FFmpegError as error:
            kind = f"{frame.format.name}, colour space {int(frame.colorspace)}"
            raise UnsupportedCodecError(f"expected pictures that convert to RGB, got {kind}") from error
        return self._turn(_pixels(rgb))


def _pixels(rgb_frame):
    """A view of an rgb24 frame, uint8 (height, width, 3)."""
    plane = rgb_frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, abs(plane.line_size))  # padded at their ends
    if plane.line_size < 0:  # stored bottom-up
        rows = rows[::-1]
    return rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)


def _checked_indices(indices, frame_count):
    indices = np.asarray(indices)
    if indices.size == 0:
        return np.zeros(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise FrameIndexError(f"expected a list of integers, got {indices.dtype} of shape {indices.shape}")
    outside = indices[(indices < 0) | (indices >= frame_count)]
    if outside.size:
        raise FrameIndexError(f"expected frame indices from 0 to {frame_count - 1}, got {outside[0]}")
    return indices.astype(np.int64)  # (T,)

"""Video files in, exactly the wanted frames out.

    with open_video(source) as video:
        indices = sample_evenly(video.info.frame_count, 32)
        frames = video.decode(indices)                              # (32, height, width, 3)

Frame i is the i-th frame that decoding the whole first video stream gives, turned upright. To have it without decoding
everything, all packets are read first (no decoding), their timestamps put them into display order, and only the stretches
that matter are decoded. One stretch, with wanted frames 5 and 7 (numbers are display order, packets stand as stored):

    packet    I0  P4  B2  B1  B3  P8  B6  B5  B7  P12 ...  I24 ...
    decoded   x   x   -   -   -   x   x   x   x
              |       '---------'     |       '   stop after the last one that is needed; the next stretch
              |            |          |           starts at the keyframe before the next wanted frame
              |            |          decoded because others refer to it
              |            not wanted and referred to by nobody: the decoder skips it
              starts at the keyframe

The timestamps may lie, so the first frames are decoded to prove them when a file is opened, and every stretch is checked
while it is decoded. Wherever a check fails, the plain way is taken: decode everything in order, and count.

    VideoError                     code
    +-- NotAVideoError             not_a_video             no container that FFmpeg knows
    +-- UnsupportedContainerError  unsupported_container   known, not accepted (playlists, images, raw streams, ...)
    +-- NoVideoStreamError         no_video_stream         accepted container without moving pictures
    +-- UnsupportedCodecError      unsupported_codec       moving pictures in a codec that is not accepted
    +-- NoFramesError              no_frames               a video stream without a single packet
    +-- CorruptVideoError          corrupt_video           header unreadable, or nothing in it can be decoded
    +-- FrameIndexError            frame_index             a frame was asked for that is not there
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np

# Letters in shapes: N frames in the video, T frames asked for.


class VideoError(ValueError):
    """A video that cannot be used. `code` is stable and meant for programs, the message for people."""

    code = "video_error"


class NotAVideoError(VideoError):
    """The bytes are no media file that FFmpeg recognises."""

    code = "not_a_video"


class UnsupportedContainerError(VideoError):
    """A file of a kind that is not accepted: a playlist, an image, a raw stream, ..."""

    code = "unsupported_container"


class NoVideoStreamError(VideoError):
    """Only sound, subtitles or cover art."""

    code = "no_video_stream"


class UnsupportedCodecError(VideoError):
    """A video stream in a codec that is not accepted or that this FFmpeg cannot decode."""

    code = "unsupported_codec"


class NoFramesError(VideoError):
    """A video stream that holds no picture."""

    code = "no_frames"


class CorruptVideoError(VideoError):
    """The file's header cannot be read, or no frame of it can be decoded."""

    code = "corrupt_video"


class FrameIndexError(VideoError, IndexError):
    """A frame index below 0 or beyond the last frame."""

    code = "frame_index"


# FFmpeg's demuxer names. All of them keep their media in the file itself: no playlists, no image sequences.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "gif", "ogg", "asf")

# FFmpeg's decoder names: what cameras, editors and the web produce. Everything else is attack surface.
_CODECS = frozenset(
    "h264 hevc libdav1d av1 vp8 vp9 mpeg1video mpeg2video mpeg4 msmpeg4v1 msmpeg4v2 msmpeg4 h263 flv vp6 vp6a vp6f "
    "wmv1 wmv2 wmv3 vc1 theora mjpeg prores dnxhd ffv1 huffyuv ffvhuff utvideo qtrle rawvideo png gif dvvideo".split()
)

# Codecs of which every packet is one frame, so that packets can be counted instead of frames.
_ONE_FRAME_A_PACKET = frozenset(("h264", "hevc", "libdav1d", "av1", "vp9", "mjpeg", "prores", "dnxhd"))

_OPEN_OPTIONS = {
    "format_whitelist": ",".join(_CONTAINERS),
    "protocol_whitelist": "none",
    "codec_whitelist": ",".join(sorted(_CODECS)),
}

# How an accepted container begins: (offset, bytes).
_SIGNATURES = (
    (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"FLV"), (0, b"GIF8"),
    (0, b"OggS"), (0, b"\x00\x00\x01\xba"), (0, b"\x30\x26\xb2\x75"),
)

_PROOF_FRAMES = 8


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. Width and height are those of the upright frames, in stored pixels (not stretched to the
    sample aspect ratio).

    Attributes:
        frame_count: frames that decoding the whole stream gives, at least 1.
        duration_s: from the first frame's start to the last frame's end.
        fps: average, `frame_count / duration_s`; 0.0 where the file has no times at all.
        width, height: of a frame as it comes out, in pixels.
        rotation: 0, 90, 180 or 270: how many degrees clockwise the stored picture was turned to stand upright (after
            mirroring it left to right, if the file says that it is mirrored).
        codec: "h264", "vp9", ...
        container: FFmpeg's name, such as "mov,mp4,m4a,3gp,3g2,mj2" or "matroska,webm".
    """

    frame_count: int
    duration_s: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    container: str


class _IndexLies(Exception):
    """What came out of the decoder contradicts the packets' timestamps."""


class Video:
    """An open video; made by `open_video`. Not to be used by two threads at a time, unlike two Videos.

    Attributes:
        info: VideoInfo.
        pts_s: float64 (N,), when each frame is shown, in seconds from the first frame; never decreasing.
    """

    def __init__(self, source, container, closing):
        self._source = source
        self._closing = closing
        self._stream = _video_stream(container)
        self._warnings = []
        self._decoders = {}
        self._packets, shortfall = _read_packets(container, self._stream)
        if shortfall:
            self._warn(shortfall)
        if not self._packets:
            raise NoFramesError("The video stream holds no frames.")
        context = self._stream.codec_context
        context.thread_count = 1
        self._decoders[1] = context
        self._order = _display_order(self._packets, context)  # (N,) packet of each frame, None: not to be trusted
        if self._order is not None:
            self._keys = np.array([self._packets[i].pts for i in self._order])  # (N,)
            if not self._prove():
                self._order = None
        if self._order is None:
            self._count()
        else:
            self.pts_s = (self._keys - self._keys[0]) * float(self._stream.time_base)  # (N,)
        last = self._packets[-1 if self._order is None else self._order[-1]]
        self.info = self._describe(container.format.name, last.duration)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the file, as far as is known by now; decoding may find more."""
        return tuple(self._warnings)

    def decode(self, indices: Sequence[int], *, thread_count: int = 1) -> np.ndarray:
        """The frames at `indices`, in that order, repeats included.

        Args:
            indices: (T,) integers in [0, info.frame_count).
            thread_count: 1 costs least CPU time; more finish a lone video sooner.

        Returns:
            uint8 (T, height, width, 3), RGB, upright. A frame that the file holds but that cannot be decoded is
            replaced by the one shown before it, and `warnings` says so. Frames whose size differs from the first
            frame's are scaled to it.

        Raises:
            FrameIndexError: an index is out of range.
            CorruptVideoError: not one frame could be decoded.
        """
        indices = _checked(indices, self.info.frame_count)
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)
        if not len(indices):
            return frames
        wanted, rows = np.unique(indices, return_inverse=True)
        picture = _Converter(self._first)
        rows_of = {int(index): np.flatnonzero(rows == i) for i, index in enumerate(wanted)}
        if self._order is not None:
            try:
                for index, frame in self._decode_stretches(wanted, thread_count):
                    frames[rows_of.pop(index)] = picture(frame)
            except (_IndexLies, av.FFmpegError):
                pass
        if rows_of:
            for index, frame in self._decode_in_order(sorted(rows_of)):
                frames[rows_of.pop(index)] = picture(frame)
        return frames

    def _warn(self, warning):
        if warning not in self._warnings:
            self._warnings.append(warning)

    def _decoder(self, thread_count):
        """A codec context that decodes with so many threads; FFmpeg cannot change the number later."""
        if ("strict", thread_count) not in self._decoders:
            container = self._closing.enter_context(_open_container(self._source))
            context = container.streams[self._stream.index].codec_context
            context.thread_count = thread_count
            context.thread_type = "FRAME"
            context.options = {"err_detect": os.environ.get("ED", "crccheck")}
            self._decoders["strict", thread_count] = context
        return self._decoders["strict", thread_count]

    def _frames(self, decoder, start, stop, wanted=None):
        """Decode packets start to stop; with `wanted` (a set of packets), nobody else's unreferenced frames."""
        decoder.flush_buffers()
        for i in range(start, stop):
            plain = wanted is None or i == start or i in wanted
            decoder.skip_frame = "DEFAULT" if plain else "NONREF"
            yield from decoder.decode(self._packets[i])
        yield from decoder.decode(None)

    def _prove(self):
        """Do the first frames come out as the packets' timestamps say?"""
        frames = []
        try:
            for frame in self._frames(self._decoders[1], 0, len(self._packets)):
                frames.append(frame)
                if len(frames) == _PROOF_FRAMES:
                    break
        except av.FFmpegError:
            return False
        if not frames or any(frame.interlaced_frame or frame.is_corrupt for frame in frames):
            return False
        self._first = frames[0]
        return [frame.pts for frame in frames] == self._keys[:_PROOF_FRAMES].tolist()

    def _count(self):
        """Decode everything in order, the slow and certain way to know the frames."""
        pts = []
        for frame in self._all_frames():
            if not pts:
                self._first = frame
            pts.append(frame.pts)
        if not pts:
            raise CorruptVideoError("The video stream is damaged: not one frame of it can be decoded.")
        self._keys = np.arange(len(pts))  # (N,)
        rate = float(self._stream.average_rate or 0)
        if None in pts:
            self.pts_s = self._keys / rate if rate else np.zeros(len(pts))  # (N,)
        else:
            pts_s = (np.array(pts) - pts[0]) * float(self._stream.time_base)
            self.pts_s = np.maximum.accumulate(pts_s)  # (N,)

    def _all_frames(self):
        """All frames in order, past damaged packets."""
        decoder = self._decoders[1]
        decoder.flush_buffers()
        decoder.skip_frame = "DEFAULT"
        for packet in (*self._packets, None):
            try:
                yield from decoder.decode(packet)
            except av.FFmpegError:
                self._warn("Parts of the video are damaged and could not be decoded.")

    def _decode_stretches(self, wanted, thread_count):
        """(index, frame) of the wanted frames by the index; raises _IndexLies where it proves wrong."""
        decoder = self._decoder(thread_count)
        index_of = {int(self._keys[i]): int(i) for i in wanted}  # by pts
        packets = self._order[wanted]  # (T,)
        needed = set(packets.tolist())
        for start, stop in self._stretches(np.sort(packets)):
            last_pts = -np.inf
            entry_pts = self._packets[start].pts
            for frame in self._frames(decoder, start, stop, needed):
                if (frame.pts is None or frame.pts <= last_pts or frame.interlaced_frame or frame.is_corrupt
                        or (frame.pts == entry_pts and not frame.key_frame)):
                    raise _IndexLies(locals().get("frame") and (frame, last_pts, entry_pts, frame.key_frame, frame.is_corrupt), locals().get("index_of"))
                last_pts = frame.pts
                if frame.pts in index_of:
                    yield index_of.pop(frame.pts), frame
        if index_of:
            raise _IndexLies(locals().get("frame") and (frame, last_pts, entry_pts, frame.key_frame, frame.is_corrupt), locals().get("index_of"))

    def _stretches(self, packets):
        """[start, stop) of the packets to decode, each from the keyframe that its first wanted frame needs."""
        pts = np.array([packet.pts for packet in self._packets])
        keyframes = [i for i, packet in enumerate(self._packets) if packet.is_keyframe]
        starts = [max(k for k in keyframes if k <= i and pts[k] <= pts[i]) for i in packets.tolist()]
        stretches = []
        for start, i in sorted(zip(starts, packets.tolist())):
            if stretches and start < stretches[-1][1]:
                stretches[-1][1] = max(stretches[-1][1], i + 1)
            else:
                stretches.append([start, i + 1])
        return stretches

    def _decode_in_order(self, wanted):
        """(index, frame) of the wanted frames, decoding everything; the frame before stands in for a missing one."""
        pending = list(reversed(wanted))
        missing = 0
        before = None
        for ordinal, frame in enumerate(self._all_frames()):
            key = ordinal if self._order is None else frame.pts
            while pending and before is not None and key > self._keys[pending[-1]]:
                yield pending.pop(), before
                missing += 1
            if pending and key == self._keys[pending[-1]]:
                yield pending.pop(), frame
            if not pending:
                break
            before = frame
        if pending and before is None:
            raise CorruptVideoError("The video stream is damaged: not one frame of it can be decoded.")
        missing += len(pending)
        while pending:
            yield pending.pop(), before
        if missing:
            self._warn(f"{missing} of the frames asked for could not be decoded; the frames before them stand in.")

    def _describe(self, container_name, last_duration):
        frame_count = len(self._keys)
        last_s = float((last_duration or 0) * self._stream.time_base)
        if last_s <= 0 and frame_count > 1:
            last_s = float(np.median(np.diff(self.pts_s)))
        duration_s = float(self.pts_s[-1]) + last_s
        turn = _turn(self._first)
        width, height = self._first.width, self._first.height
        if turn.transposed:
            width, height = height, width
        codec = self._stream.codec_context.codec
        return VideoInfo(
            frame_count=frame_count,
            duration_s=duration_s,
            fps=frame_count / duration_s if duration_s > 0 else 0.0,
            width=width,
            height=height,
            rotation=turn.rotation,
            codec=getattr(codec, "canonical_name", codec.name),
            container=container_name,
        )


@contextlib.contextmanager
def open_video(source: bytes | str | os.PathLike) -> Iterator[Video]:
    """Open a video from its bytes or a path.

    Raises:
        VideoError: one of its kinds.
        OSError: the path cannot be read.
    """
    with contextlib.ExitStack() as closing:
        yield Video(source, closing.enter_context(_open_container(source)), closing)


def probe(source: bytes | str | os.PathLike) -> VideoInfo:
    """What the video is; errors as in `open_video`."""
    with open_video(source) as video:
        return video.info


def decode_frames(source: bytes | str | os.PathLike, indices: Sequence[int]) -> np.ndarray:
    """uint8 (len(indices), height, width, 3): see `Video.decode`; errors as there and in `open_video`."""
    with open_video(source) as video:
        return video.decode(indices)


@contextlib.contextmanager
def _open_container(source):
    """The file in FFmpeg, which gets to see this file object and nothing else: no path, no protocol."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
    else:
        file = open(source, "rb")
    with file:
        start = file.read(16)
        file.seek(0)
        try:
            container = av.open(file, mode="r", container_options=_OPEN_OPTIONS, metadata_errors="replace")
        except av.error.ArgumentError as error:
            raise UnsupportedContainerError("unsupported") from error
        except av.FFmpegError as error:
            if any(start[offset:].startswith(magic) for offset, magic in _SIGNATURES):
                raise CorruptVideoError("The video's header cannot be read: it is damaged or cut off.") from error
            raise NotAVideoError("This is not a video file.") from error
        with container:
            yield container


def _video_stream(container):
    for stream in container.streams.video:
        attached = stream.disposition & 0x400
        if attached:
            continue
        name = stream.codec_context.name if stream.codec_context else "unknown"
        if name not in _CODECS:
            raise UnsupportedCodecError(f"The video codec {name!r} is not accepted.")
        return stream
    raise NoVideoStreamError("The file holds no video.")


def _read_packets(container, stream):
    """All packets of the stream, and a sentence if the file ends early or None."""
    packets = []
    last_s = 0.0
    broken = False
    try:
        for packet in container.demux():
            if packet.pts is not None:
                last_s = max(last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index and packet.size:
                packets.append(packet)
    except av.FFmpegError:
        broken = True
    stated_s = (container.duration or 0) / av.time_base
    if broken or last_s < 0.95 * stated_s - 0.5:
        return packets, f"The file is cut off: its header says {stated_s:.1f} s, {last_s:.1f} s could be read."
    return packets, None


def _display_order(packets, decoder):
    """int64 (N,): the packets in the order in which their frames are shown; None where that is not certain."""
    if decoder.name not in _ONE_FRAME_A_PACKET:
        return None
    if any(packet.pts is None or packet.is_corrupt for packet in packets):
        return None
    pts = np.array([packet.pts for packet in packets])
    keyframes = np.flatnonzero([packet.is_keyframe for packet in packets])
    if not len(keyframes) or keyframes[0] != 0 or len(np.unique(pts)) < len(pts) or pts.min() < pts[0]:
        return None
    shown_later = np.minimum.accumulate(pts[::-1])[::-1]  # the earliest pts from here to the end
    if (shown_later[keyframes[1:]] <= pts[keyframes[:-1]]).any():
        return None
    if decoder.has_b_frames and (np.diff(pts) > 0).all():
        return None
    order = np.argsort(pts)
    discarded = np.array([packet.is_discard for packet in packets])
    return order[~discarded[order]]


@dataclass(frozen=True)
class _Turn:
    """How a stored picture is brought upright: transposed, then rows and columns reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    @property
    def rotation(self):
        mirrored = self.transposed ^ self.rows_reversed ^ self.columns_reversed
        if self.transposed:
            return 270 if self.rows_reversed else 90
        return 180 if self.rows_reversed else 0

    def __call__(self, picture):
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]


def _turn(frame):
    """From the display matrix (a b u; c d v; x y w): a stored pixel (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        matrix = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)
    except (KeyError, ValueError):
        return _Turn()
    a, b, c, d = matrix[[0, 1, 3, 4]].tolist()
    if abs(b) > abs(a):
        return _Turn(True, b < 0, c < 0)
    return _Turn(False, d < 0, a < 0)


class _Converter:
    """A decoded frame -> uint8 (height, width, 3) RGB, upright; a view, valid until the next call."""

    def __init__(self, first):
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._width, self._height, self._turn = first.width, first.height, _turn(first)

    def __call__(self, frame):
        rgb = self._reformatter.reformat(frame, width=self._width, height=self._height, format="rgb24")
        plane = rgb.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(self._height, plane.line_size)
        self._rgb = rgb
        return self._turn(rows[:, : self._width * 3].reshape(self._height, self._width, 3))


def _checked(indices, frame_count):
    indices = np.asarray(indices)
    if not indices.size:
        return np.zeros(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise FrameIndexError(f"indices must be a list of integers, got {indices.dtype} {indices.shape}.")
    bad = indices[(indices < 0) | (indices >= frame_count)]
    if bad.size:
        raise FrameIndexError(f"frame {bad[0]} was asked for; the video has frames 0 to {frame_count - 1}.")
    return indices.astype(np.int64)


def sample_evenly(frame_count: int, num_frames: int) -> np.ndarray:
    """The middle frame of each of `num_frames` equal parts of the video: int64 (num_frames,), never decreasing."""
    if frame_count < 1 or num_frames < 1:
        raise ValueError(f"frame_count and num_frames must be at least 1, got {frame_count} and {num_frames}.")
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * frame_count // (2 * num_frames)


def sample_frame_indices(clip_len: int, frame_sample_rate: int, seg_len: int) -> np.ndarray:
    """A random clip, as in the ViViT documentation."""
    converted_len = int(clip_len * frame_sample_rate)
    if seg_len <= converted_len:
        raise ValueError(f"{clip_len} x {frame_sample_rate} needs more than {converted_len} frames, got {seg_len}.")
    end = np.random.randint(converted_len, seg_len)
    start = end - converted_len
    return np.clip(np.linspace(start, end, num=clip_len), start, end - 1).astype(np.int64)


def read_video_pyav(container, indices: Sequence[int]) -> np.ndarray:
    """Frames of an open PyAV container, as in the ViViT documentation."""
    first, last, wanted = indices[0], indices[-1], set(int(i) for i in indices)
    frames = []
    container.seek(0)
    for i, frame in enumerate(container.decode(video=0)):
        if i > last:
            break
        if i >= first and i in wanted:
            frames.append(frame.to_ndarray(format="rgb24"))
    return np.stack(frames)

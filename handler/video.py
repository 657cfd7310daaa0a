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
    """What came out of the decoder contradicts what the packets say."""


class Video:
    """An open video; made by `open_video`.

    One Video is for one thread at a time; several decode in as many threads at once.

    Attributes:
        info: VideoInfo.
        pts_s: float64 (N,), when each frame is shown, in seconds from the first frame; never decreasing.
    """

    def __init__(self, source, container, closing):
        self._source = source
        self._closing = closing
        self._stream = _video_stream(container)
        self._unused_decoder = self._stream.codec_context
        self._decoders = {}
        self._warnings = []
        self._packets, warning = _read_packets(container, self._stream)
        if warning:
            self._warnings.append(warning)
        if not self._packets:
            raise NoFramesError("The video stream holds no frames.")
        # Either the packet of each frame, from the packets' timestamps, or None; then the plain way knows the frames.
        self._packet_of = _display_order(self._packets, container.format.name, self._stream.codec_context.name)  # (N,)
        self._first = self._proven_first_frame() if self._packet_of is not None else None
        if self._first is not None:
            last_packet = self._packets[self._packet_of[-1]]
            pts = np.array([self._packets[i].pts for i in self._packet_of])  # (N,)
        else:
            self._packet_of = None
            last_packet = self._packets[-1]
            self._first, pts = self._decode_everything()
            self._nth_decoded = np.arange(len(pts))  # (N,)
        self.pts_s = _seconds(pts, self._stream)  # (N,)
        self.info = self._describe(container.format.name, last_packet)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the file, as far as it is known by now: decoding may find more."""
        return tuple(self._warnings)

    def decode(self, indices: Sequence[int], *, thread_count: int = 1) -> np.ndarray:
        """The frames at `indices`, in that order, repeats included.

        Args:
            indices: (T,) integers from 0 to info.frame_count - 1.
            thread_count: 1 costs the least CPU time; more finish a lone video sooner.

        Returns:
            uint8 (T, height, width, 3), RGB, upright. Where the file's header promises a frame that cannot be decoded,
            the frame shown before it stands in and `warnings` says so. Frames of another size than the first are
            scaled to the first one's.

        Raises:
            FrameIndexError: an index is out of range.
            CorruptVideoError: not one frame can be decoded.
        """
        indices = _checked_indices(indices, self.info.frame_count)  # (T,)
        frames = np.empty((len(indices), self.info.height, self.info.width, 3), np.uint8)  # (T, H, W, 3)
        to_rgb = _RGBConverter(self._first)
        if self._packet_of is not None:
            try:
                for index, frame in self._decode_stretches(np.unique(indices), thread_count):
                    frames[indices == index] = to_rgb(frame)
                return frames
            except (_IndexLies, av.FFmpegError):
                self._stop_trusting_packets()
        numbers = self._nth_decoded[indices]  # (T,)
        for number, frame in self._decode_in_order(np.unique(numbers)):
            frames[numbers == number] = to_rgb(frame)
        return frames

    # --- the plain way: decode everything in order, and count

    def _decode_everything(self):
        """The first frame, and the timestamps of all, in the order in which they come."""
        first, pts = None, []
        for frame in self._all_frames():
            first = first or frame
            pts.append(frame.pts)
        if not pts:
            raise CorruptVideoError("The video stream is damaged: not one frame of it can be decoded.")
        return first, pts

    def _decode_in_order(self, numbers):
        """(number, frame) for the frames with these ascending numbers, counted as they come."""
        pending = numbers.tolist()[::-1]
        for number, frame in enumerate(self._all_frames()):
            if number == pending[-1]:
                yield pending.pop(), frame
            if not pending:
                return
        raise CorruptVideoError("The video stream is damaged: it decodes differently each time.")

    def _all_frames(self):
        """Every frame that can be decoded; damaged packets are passed over, and noted."""
        decoder = self._decoder(strict=False)
        decoder.flush_buffers()
        for packet in (*self._packets, None):
            try:
                yield from decoder.decode(packet)
            except av.FFmpegError:
                self._warn("Parts of the video are damaged and could not be decoded.")

    def _stop_trusting_packets(self):
        """Find out which decoded frame each promised frame is: the same one, or the one shown at its time."""
        self._packet_of = None
        _, pts = self._decode_everything()
        missing = self.info.frame_count - len(pts)
        if missing:
            shown_s = _seconds(pts, self._stream)
            self._nth_decoded = np.searchsorted(shown_s, self.pts_s, side="right").clip(1, len(pts)) - 1  # (N,)
            self._warn(f"{len(pts)} of {self.info.frame_count} frames could be decoded.")
        else:
            self._nth_decoded = np.arange(len(pts))  # (N,)

    # --- the economical way: decode the stretches that hold the wanted frames

    def _decode_stretches(self, indices, thread_count):
        """(index, frame) for these frames, in no particular order; _IndexLies where the packets' timestamps do."""
        index_of = {self._packets[self._packet_of[i]].pts: i for i in indices.tolist()}
        wanted = self._packet_of[indices]  # (T,)
        decoder = self._decoder(strict=True, thread_count=thread_count)
        for start, stop in _stretches(self._packets, wanted):
            first_pts = self._packets[start].pts
            last_pts = -np.inf
            for frame in self._frames_of(decoder, start, stop, set(wanted.tolist())):
                if frame.pts is None or frame.pts <= last_pts or frame.interlaced_frame or frame.is_corrupt:
                    raise _IndexLies
                if frame.pts == first_pts and not frame.key_frame:
                    raise _IndexLies
                last_pts = frame.pts
                if frame.pts in index_of:
                    yield index_of.pop(frame.pts), frame
        if index_of:
            raise _IndexLies

    def _frames_of(self, decoder, start, stop, wanted):
        """Decode packets [start, stop), without the unreferenced frames of packets that are not wanted."""
        decoder.flush_buffers()
        for i in range(start, stop):
            decoder.skip_frame = "DEFAULT" if i == start or i in wanted else "NONREF"
            yield from decoder.decode(self._packets[i])
        yield from decoder.decode(None)

    def _proven_first_frame(self):
        """The first frame, or None if the first few don't come out as the packets' timestamps say."""
        expected_pts = [self._packets[i].pts for i in self._packet_of[:_PROOF_FRAMES]]
        every_packet = range(len(self._packets))
        try:
            frames = list(islice(self._frames_of(self._decoder(strict=True), 0, len(every_packet), every_packet), _PROOF_FRAMES))
        except av.FFmpegError:
            return None
        if [frame.pts for frame in frames] != expected_pts:
            return None
        if any(frame.interlaced_frame or frame.is_corrupt for frame in frames):
            return None
        return frames[0]

    def _decoder(self, *, strict, thread_count=1):
        """A codec context; a strict one fails on damage that the other conceals. Made once for each setting."""
        key = strict, thread_count
        if key not in self._decoders:
            decoder, self._unused_decoder = self._unused_decoder, None
            if decoder is None:  # FFmpeg fixes these settings when a decoder opens, so another one is needed
                container = self._closing.enter_context(_open_container(self._source))
                decoder = container.streams[self._stream.index].codec_context
            decoder.thread_count = thread_count
            decoder.thread_type = "FRAME"
            decoder.options = {"err_detect": "explode"} if strict else {}
            self._decoders[key] = decoder
        return self._decoders[key]

    def _warn(self, warning):
        if warning not in self._warnings:
            self._warnings.append(warning)

    def _describe(self, container_name, last_packet):
        last_s = float((last_packet.duration or 0) * self._stream.time_base)
        if last_s <= 0:
            last_s = _frame_s(self._stream)
        duration_s = float(self.pts_s[-1]) + last_s
        turn = _Turn.of(self._first)
        width, height = self._first.width, self._first.height
        codec = self._stream.codec_context.codec
        return VideoInfo(
            frame_count=len(self.pts_s),
            duration_s=duration_s,
            fps=len(self.pts_s) / duration_s if duration_s > 0 else 0.0,
            width=height if turn.transposed else width,
            height=width if turn.transposed else height,
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

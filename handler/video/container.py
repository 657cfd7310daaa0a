"""Opens media files safely: which containers and codecs are accepted, which stream is used, and reading its packets.

FFmpeg is given an open file or bytes, never a path or URL, and may open nothing else. Playlists, image sequences and
devices are not in the allow-list.

A new container needs an entry in `ACCEPTED_CONTAINERS`, a new codec one in `ACCEPTED_CODECS`. Their videos are then
decoded sequentially. To decode only what is needed, add them to the lists in index.py as well.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Protocol, TypeAlias, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from handler.video.errors import (
    CorruptVideoError,
    NotAVideoError,
    NoVideoStreamError,
    TooManyFramesError,
    UnsupportedCodecError,
    UnsupportedContainerError,
)
from handler.video.limits import Limits, max_pixels_option

if TYPE_CHECKING:
    from typing_extensions import Buffer

# FFmpeg's names of demuxers.
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
ACCEPTED_CONTAINERS = (MP4, MATROSKA, "avi", "mpegts", "mpeg", "flv", "gif", "ogg", "asf")
EXPECTED_CONTAINER = "expected a video file (mp4/mov, webm/mkv, avi, mpeg-ts, mpeg-ps, flv, gif, ogg, asf/wmv)"

# FFmpeg's names of decoders for what cameras, browsers and editors write. Others would only add attack surface.
ACCEPTED_CODECS = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "h263", "flv"),
    *("mjpeg", "gif", "prores", "dnxhd", "vc1", "wmv3", "wmv2", "wmv1", "msmpeg4", "msmpeg4v2", "msmpeg4v1"),
    *("theora", "vp6", "vp6a", "vp6f", "ffv1", "huffyuv", "ffvhuff", "utvideo", "qtrle", "png", "rawvideo"),
    "dvvideo",
)
EXPECTED_CODEC = "expected a common video codec (h264, vp9, ...)"

VIDEO_STREAMS = ("first", "best")

_OPEN_OPTIONS = {
    "format_whitelist": ",".join(ACCEPTED_CONTAINERS),
    "codec_whitelist": ",".join(ACCEPTED_CODECS),
    "protocol_whitelist": "none",  # files and URLs that the file refers to are not opened
}

# Containers with a duration in the header. For others FFmpeg estimates it from the packets.
_DURATION_IN_HEADER = (MP4, MATROSKA, "avi", "flv", "asf")

# Packets of all streams, relative to Limits.max_frames: 3 to 6 audio tracks have about as many as the video.
_MAX_PACKETS_PER_FRAME = 8

# First bytes of files, as (offset, bytes).
_VIDEO_MAGIC = (
    *((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"moof"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI ")),
    *((0, b"\0\0\1\xba"), (0, b"FLV"), (0, b"GIF8"), (0, b"OggS"), (0, b"\x30\x26\xb2\x75")),
)
# PNG, JPEG, BMP, TIFF, WebP, JPEG 2000, JPEG XL.
_IMAGE_MAGIC = (
    *((0, b"\x89PNG\r\n"), (0, b"\xff\xd8\xff"), (0, b"BM"), (0, b"II*\0"), (0, b"MM\0*"), (8, b"WEBP")),
    *((4, b"jP  "), (0, b"\xff\x4f\xff\x51"), (4, b"JXL "), (0, b"\xff\x0a")),
)
# zip, gzip, tar. FFmpeg would find a transport stream inside an uncompressed archive.
_ARCHIVE_MAGIC = ((0, b"PK\3\4"), (0, b"\x1f\x8b"), (257, b"ustar"))

# ISO brands of HEIF and AVIF files, whose video streams are the tiles of an image.
_IMAGE_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1", "avif", "avis")

# Raised while reading a corrupt file: by FFmpeg, and by the Python file when it seeks to an invalid position.
READ_ERRORS = (av.FFmpegError, OSError, ValueError)

_CORRUPT_HEADER = "the file header is corrupt or truncated"


class BinaryFile(Protocol):
    """What is used of a file object: one opened in mode "rb", io.BytesIO, a file of fsspec, ..."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, whence: int, /) -> object: ...

    def tell(self) -> int: ...


class SharedFile:
    """A file object that several containers read."""

    def __init__(self, file: BinaryFile):
        self.file = file
        self.lock = threading.Lock()


Source: TypeAlias = "bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryFile | SharedFile"


class _FileView(io.RawIOBase):
    """Reads a shared file at a position of its own. Closing the view does not close the file."""

    def __init__(self, shared: SharedFile):
        self._shared = shared
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer)
        with self._shared.lock:
            self._shared.file.seek(self._position, os.SEEK_SET)
            data = self._shared.file.read(len(target))
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = self._position if whence == os.SEEK_CUR else 0
        if whence == os.SEEK_END:
            with self._shared.lock:
                self._shared.file.seek(0, os.SEEK_END)
                start = self._shared.file.tell()
        if start + offset < 0:
            raise ValueError(f"expected a position in the file, got {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position


def open_file(source: Source) -> IO[bytes]:
    """Opens a source for reading, at its beginning. Raises OSError if the path cannot be read."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        return open(source, "rb")
    return cast("IO[bytes]", _FileView(source if isinstance(source, SharedFile) else SharedFile(source)))


@contextlib.contextmanager
def open_container(source: Source, limits: Limits) -> Iterator[InputContainer]:
    """Opens a file in a `with` block.

    Raises:
        NotAVideoError, UnsupportedContainerError, CorruptVideoError: the file is not an accepted video file.
        OSError: the path cannot be read.
    """
    with open_file(source) as file:
        beginning = file.read(512)
        file.seek(0)
        if _has_magic(beginning, _ARCHIVE_MAGIC):
            raise NotAVideoError(f"{EXPECTED_CONTAINER}, got an archive")
        try:
            container = av.open(
                file,
                mode="r",
                options=max_pixels_option(limits),  # FFmpeg decodes a few frames to find the stream's properties
                container_options=_OPEN_OPTIONS,
                metadata_errors="replace",
            )
        except READ_ERRORS as error:
            raise _open_error(beginning, error) from error
        with container:
            yield container


def _open_error(beginning: bytes, error: Exception) -> Exception:
    """The VideoError for a file that FFmpeg cannot open."""
    if beginning[4:8] == b"ftyp" and beginning[8:12].decode("latin-1") in _IMAGE_BRANDS:
        return NotAVideoError(f"{EXPECTED_CONTAINER}, got an image")
    if _has_magic(beginning, _VIDEO_MAGIC):
        return CorruptVideoError(_CORRUPT_HEADER)
    is_image = _has_magic(beginning, _IMAGE_MAGIC)
    if isinstance(error, av.ArgumentError):  # FFmpeg knows the format, but it is not in the allow-list
        return UnsupportedContainerError(
            f"{EXPECTED_CONTAINER}, got {'an image' if is_image else 'a file in another format'}"
        )
    return NotAVideoError(f"{EXPECTED_CONTAINER}, got {'an image' if is_image else 'something else'}")


def _has_magic(beginning: bytes, magic: Sequence[tuple[int, bytes]]) -> bool:
    return any(beginning.startswith(value, offset) for offset, value in magic)


def choose_video_stream(container: InputContainer, choice: str, limits: Limits) -> VideoStream:
    """Returns a video stream of the file that is not cover art.

    Args:
        choice: "first", or "best": FFmpeg's av_find_best_stream, which prefers the default track, then the bit rate.
        limits: upper limits on the video.

    Raises:
        ValueError: `choice` is not one of VIDEO_STREAMS.
        NotAVideoError, NoVideoStreamError, UnsupportedCodecError, CorruptVideoError: there is no usable stream.
        TooManyFramesError: a stream of an unknown codec exceeds the limit.
    """
    if choice not in VIDEO_STREAMS:
        raise ValueError(f"expected the video stream to be one of {', '.join(VIDEO_STREAMS)}, got {choice!r}")
    if container.metadata.get("major_brand") in _IMAGE_BRANDS:
        raise NotAVideoError(f"{EXPECTED_CONTAINER}, got an image")
    streams = _video_streams(container)
    if not streams:
        raise NoVideoStreamError("expected a video stream, got a file without one")
    best = container.streams.best("video") if choice == "best" else None
    stream = next((stream for stream in streams if stream is best), streams[0])
    codec = stream.codec_context.name if stream.codec_context else "an unknown one"
    if codec not in ACCEPTED_CODECS:
        if not stream.codec_context and not read_packets(container, stream, limits)[0]:
            raise CorruptVideoError(_CORRUPT_HEADER)
        raise UnsupportedCodecError(f"{EXPECTED_CODEC}, got {codec}")
    return stream


def several_streams_warning(container: InputContainer, used: VideoStream) -> str | None:
    """A warning if the file has more video streams than the used one."""
    streams = _video_streams(container)
    if len(streams) == 1:
        return None
    sizes = [f"{s.index} ({s.codec_context.width}x{s.codec_context.height})" for s in streams if s.codec_context]
    return f"the file has {len(streams)} video streams: {', '.join(sizes)}; stream {used.index} is used"


def _video_streams(container: InputContainer) -> list[VideoStream]:
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def read_packets(
    container: InputContainer, stream: VideoStream, limits: Limits
) -> tuple[list[Packet[VideoStream]], str | None]:
    """Reads all packets of the stream without decoding them.

    Returns:
        The packets in stored order; and a warning if the file ends too early.

    Raises:
        TooManyFramesError: there are more packets than Limits.max_frames, or very many in other streams.
    """
    packets: list[Packet[VideoStream]] = []
    max_packets = _MAX_PACKETS_PER_FRAME * limits.max_frames
    ends: dict[int, int] = {}  # of every stream, because the header's duration is that of the longest one
    try:
        for number, packet in enumerate(container.demux()):
            if number >= max_packets:
                raise TooManyFramesError(f"expected at most {max_packets} packets, got more")
            if packet.size and packet.stream_index == stream.index:
                packets.append(cast("Packet[VideoStream]", packet))
                if len(packets) > limits.max_frames:
                    raise TooManyFramesError(f"expected at most {limits.max_frames} frames, got more")
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
    except TooManyFramesError:
        raise
    except READ_ERRORS:
        return packets, "the file is partially corrupt: it cannot be read to its end"
    except IndexError:
        pass  # at the end of the file PyAV looks up streams that are missing in the header
    return packets, truncation_warning(container, ends)


def truncation_warning(container: InputContainer, ends: Mapping[int, int]) -> str | None:
    """A warning if the header states a longer duration than that of the data.

    Args:
        ends: when each stream ends, by its number, in units of its time base.
    """
    if container.duration and container.format.name in _DURATION_IN_HEADER:
        stated_s = (container.duration + (container.start_time or 0)) / av.time_base
        end_s = max((end * float(container.streams[i].time_base or 0) for i, end in ends.items()), default=0.0)
        if end_s < 0.95 * stated_s - 0.5:
            return f"the file is truncated: its header states {stated_s:.1f} s, its data ends at {end_s:.1f} s"
    return None

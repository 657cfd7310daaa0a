"""Reads the packets of an MP4 file one range at a time, by the index in the file's header.

The header (the box `moov`) states the position, size, decoding time and keyframe flag of each packet. FFmpeg reads them
into the stream's index entries. They lack the presentation times, which follow from the box `ctts`:

    presentation time = decoding time + offset in ctts + a constant that the first packet shows

Every packet that is read is compared with the table that is made of them. Where no such table can be made, or a packet
contradicts it, all packets of the file are read instead (see decoder.py).

Specification: ISO/IEC 14496-12, sections 4.2 (boxes), 8.3 (tracks), 8.5 (sample tables), 8.6.1 (times).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast, overload

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from handler.video.bitstream import NAL_CODECS, NalReader
from handler.video.container import (
    MP4,
    READ_ERRORS,
    Source,
    open_container,
    open_file,
    truncation_warning,
)
from handler.video.errors import TooManyFramesError
from handler.video.limits import Limits

# Smaller files are read completely: that takes milliseconds, and all packets can be checked.
_MIN_FILE_BYTES = 2**20

# Each of their packets shows one frame, which is known without reading it.
_CODECS = (*NAL_CODECS, "libdav1d", "av1", "mjpeg", "prores", "dnxhd")

# The header of ten hours of video and audio takes about 20 MB.
_MAX_HEADER_BYTES = 2**26
_MAX_TOP_LEVEL_BOXES = 1000

# Packets that are read at once, unless a single one is larger. The first chunk of a range is small, because the first
# frames may be all that is needed; each further one is twice as large as the one before it.
_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES = 2**15, 2**18

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class IndexMismatch(Exception):
    """The packets or the decoded frames contradict the index."""


@dataclass(frozen=True)
class SampleTable:
    """What the header states about the P packets of a stream, in stored order.

    Attributes:
        pos, size: int64 (P,), where each packet is in the file, in bytes.
        dts, pts: int64 (P,), in the stream's time base.
        is_keyframe: bool (P,).
        is_discard: bool (P,), packets that are decoded and not shown, because of an edit list.
    """

    pos: Int64Array
    size: Int64Array
    dts: Int64Array
    pts: Int64Array
    is_keyframe: BoolArray
    is_discard: BoolArray


class IndexedPackets(Sequence["Packet[VideoStream]"]):
    """A range of the packets of a stream. They are read from the file when they are accessed, and not kept.

    Access raises IndexMismatch if a packet contradicts the index or cannot be read. Several threads may access the same
    file, each one a range of its own.

    Attributes:
        table: SampleTable of the whole stream.
    """

    def __init__(self, reader: _Reader, span: range):
        self.table = reader.table
        self._reader = reader
        self._span = span
        self._chunk: list[Packet[VideoStream]] = []
        self._chunk_start = 0
        self._chunk_bytes = _MIN_CHUNK_BYTES

    def __len__(self) -> int:
        return len(self._span)

    @overload
    def __getitem__(self, item: int) -> Packet[VideoStream]: ...

    @overload
    def __getitem__(self, item: slice) -> IndexedPackets: ...

    def __getitem__(self, item: int | slice) -> Packet[VideoStream] | IndexedPackets:
        if isinstance(item, slice):
            return IndexedPackets(self._reader, self._span[item])
        i = self._span[item]
        if not self._chunk_start <= i < self._chunk_start + len(self._chunk):
            sizes = np.cumsum(self.table.size[i : self._span.stop])
            count = max(1, int(np.searchsorted(sizes, self._chunk_bytes, side="right")))
            self._chunk_bytes = min(2 * self._chunk_bytes, _MAX_CHUNK_BYTES)
            self._chunk = self._reader.read(i, min(i + count, self._span.stop))
            self._chunk_start = i
        return self._chunk[i - self._chunk_start]


class _Reader:
    """Reads packets with a container of its own, because seeking resets a container's decoders. Thread-safe."""

    def __init__(self, container: InputContainer, stream: VideoStream, table: SampleTable):
        codec = stream.codec_context.name
        self.table = table
        self._container = container
        self._stream = stream
        self._nal_reader = NalReader(codec, stream.codec_context.extradata) if codec in NAL_CODECS else None
        self._packets: Iterator[Packet[VideoStream]] = iter(())
        self._next: int | None = None  # number of the packet that `_packets` returns next
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> list[Packet[VideoStream]]:
        """Returns packets `start` to `stop - 1`; raises IndexMismatch."""
        with self._lock:
            try:
                return self._read(start, stop)
            except READ_ERRORS as error:
                raise IndexMismatch from error

    def _read(self, start: int, stop: int) -> list[Packet[VideoStream]]:
        first_dts = int(self.table.dts[start])
        if self._next != start:
            self._container.seek(first_dts, stream=self._stream, any_frame=True)
            self._packets = self._container.demux(self._stream)
        self._next = None
        packets: list[Packet[VideoStream]] = []
        while len(packets) < stop - start:
            packet = next(self._packets, None)
            if packet is None or packet.dts is None:
                raise IndexMismatch
            if packets or packet.dts >= first_dts:  # FFmpeg may start at an earlier packet
                self._check(start + len(packets), packet)
                packets.append(packet)
        self._next = stop
        return packets

    def _check(self, i: int, packet: Packet[VideoStream]) -> None:
        """Raises IndexMismatch if packet i is not the expected one, or if decoding from it may differ."""
        table = self.table
        stated = (table.pos[i], table.size[i], table.dts[i], table.pts[i], table.is_keyframe[i], table.is_discard[i])
        found = (packet.pos, packet.size, packet.dts, packet.pts, packet.is_keyframe, packet.is_discard)
        if stated != found or packet.is_corrupt:
            raise IndexMismatch
        if packet.has_sidedata("new_extradata") or packet.has_sidedata("encryption_info"):
            raise IndexMismatch
        if self._nal_reader:
            if i > 0 and packet.is_keyframe and self._nal_reader.is_unclean_random_access_point(packet):
                raise IndexMismatch
            if not self._nal_reader.packet_parameter_sets(packet).items() <= self._nal_reader.parameter_sets.items():
                raise IndexMismatch


def open_indexed_packets(
    source: Source, stream: VideoStream, limits: Limits, stack: contextlib.ExitStack
) -> IndexedPackets | None:
    """Opens the packets of a stream, to be read when they are needed.

    Args:
        source: what `stream` was opened from.
        stack: keeps the file open.

    Returns:
        The packets; None if all packets must be read to find the frames: the source is in memory already, the file is
        small, or its header does not state everything about each packet.

    Raises:
        TooManyFramesError: there are more packets than Limits.max_frames.
    """
    format_name, codec = stream.container.format.name, stream.codec_context.name
    if isinstance(source, (bytes, bytearray, memoryview)) or format_name != MP4 or codec not in _CODECS:
        return None
    with open_file(source) as file:
        file_bytes = file.seek(0, os.SEEK_END)
        if file_bytes < _MIN_FILE_BYTES:
            return None
        packet_count = len(stream.index_entries)
        if not packet_count or packet_count != stream.frames:
            return None  # fragments follow, or an edit list drops or repeats packets
        if packet_count > limits.max_frames:
            raise TooManyFramesError(f"expected at most {limits.max_frames} frames, got more")
        offsets = _presentation_offsets(file, track_id=stream.id, packet_count=packet_count)
    if offsets is None:
        return None
    container = stack.enter_context(open_container(source, limits))
    table = _read_table(container, stream.index, offsets)
    if table is None or (table.pos + table.size).max() > file_bytes:
        return None
    return IndexedPackets(
        _Reader(container, cast(VideoStream, container.streams[stream.index]), table), range(len(offsets))
    )


def _read_table(container: InputContainer, stream_index: int, offsets: Int64Array) -> SampleTable | None:
    """The table, whose presentation times are those of the first packet; None if it is contradictory."""
    entries = container.streams[stream_index].index_entries
    rows = ((entry.pos, entry.size, entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in entries)
    columns = np.fromiter(rows, np.dtype((np.int64, 5)), count=len(entries)).T  # (5, P)
    pos, size, dts = columns[:3]
    try:
        first = next(container.demux(container.streams[stream_index]))
    except READ_ERRORS:
        return None
    if first.pts is None or first.dts is None or first.dts != dts[0] or first.pos != pos[0]:
        return None
    if (np.diff(dts) <= 0).any() or (np.diff(pos) <= 0).any() or (size <= 0).any() or pos[0] < 0:
        return None
    pts = dts + offsets + (first.pts - first.dts - offsets[0])
    ends = {
        stream.index: stream.index_entries[-1].timestamp for stream in container.streams if len(stream.index_entries)
    }
    if truncation_warning(container, {**ends, stream_index: int(pts.max())}):
        return None
    return SampleTable(pos, size, dts, pts, columns[3].astype(bool), columns[4].astype(bool))


# Boxes


def _presentation_offsets(file: IO[bytes], *, track_id: int, packet_count: int) -> Int64Array | None:
    """int64 (P,): the offset in `ctts` of each packet of a track; None if the header is missing or unusual."""
    header = _read_header(file)
    for track in _boxes(header, b"trak"):
        for tkhd in _boxes(track, b"tkhd"):
            if len(tkhd) < 24 or _uint32(tkhd, 20 if tkhd[0] == 1 else 12) != track_id:
                continue
            tables = [
                table
                for media in _boxes(track, b"mdia")
                for information in _boxes(media, b"minf")
                for table in _boxes(information, b"stbl")
            ]
            return _table_offsets(tables[0], packet_count=packet_count) if len(tables) == 1 else None
    return None


def _table_offsets(table: memoryview, *, packet_count: int) -> Int64Array | None:
    descriptions = [*_boxes(table, b"stsd")]
    if len(descriptions) != 1 or _uint32(descriptions[0], 4) != 1:
        return None  # with several descriptions the decoder's header changes within the video
    offsets = [*_boxes(table, b"ctts")]
    if not offsets:
        return np.zeros(packet_count, np.int64)
    entry_count = _uint32(offsets[0], 4)
    if len(offsets) > 1 or len(offsets[0]) < 8 + 8 * entry_count:
        return None
    entries = np.frombuffer(offsets[0], ">i4", 2 * entry_count, offset=8).reshape(-1, 2)  # (runs, 2)
    counts = entries[:, 0].astype(np.int64)
    if (counts < 0).any() or counts.sum() != packet_count:
        return None
    return entries[:, 1].astype(np.int64).repeat(counts)


def _read_header(file: IO[bytes]) -> memoryview:
    """The content of the box `moov`; empty if there is none."""
    start = 0
    for _ in range(_MAX_TOP_LEVEL_BOXES):
        file.seek(start)
        head = file.read(16)
        size, content_start = _box_size(memoryview(head), 0)
        if size < content_start:
            break
        if head[4:8] == b"moov":
            if size > _MAX_HEADER_BYTES:
                break
            file.seek(start + content_start)
            return memoryview(file.read(size - content_start))
        start += size
    return memoryview(b"")


def _boxes(data: memoryview, kind: bytes) -> Iterator[memoryview]:
    """The contents of the boxes of one type, without those inside other boxes."""
    start = 0
    while start + 8 <= len(data):
        size, content_start = _box_size(data, start)
        if not content_start <= size <= len(data) - start:
            return
        if data[start + 4 : start + 8] == kind:
            yield data[start + content_start : start + size]
        start += size


def _box_size(data: memoryview, start: int) -> tuple[int, int]:
    """(size of the box at `start`, size of its head); (0, 8) if it is not stated."""
    size = _uint32(data, start)
    if size == 1:
        return int.from_bytes(data[start + 8 : start + 16], "big"), 16
    return size, 8


def _uint32(data: memoryview, start: int) -> int:
    return int.from_bytes(data[start : start + 4], "big")

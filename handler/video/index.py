"""The packet index: which packet holds each frame, and which packets must be decoded for it. Also its verification.

Timestamps can be wrong. The index is verified in three steps:

1. `build_index` rejects streams whose packets are inconsistent.
2. `PacketIndex.verify_first_frames` compares the first decoded frames with the index when a file is opened.
3. `verified` checks the frames of each decode range while they are decoded.

Two things remain undetected: B-frames whose timestamps were swapped on purpose, and streams that were cut at open GOPs
and joined, or that lost frames, without a trace in the timestamps. Their frames can differ from sequential decoding.

Packets of large MP4 files are read when they are needed (see mp4.py), and checked then. Parameter sets that change in
packets which are not read remain undetected as well. MP4 files store parameter sets in the header.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from handler.video.bitstream import NAL_CODECS, NalReader, shown_frame_count
from handler.video.container import MATROSKA, MP4
from handler.video.mp4 import IndexedPackets, IndexMismatch

# Letters in shapes: N frames in the video, P packets, K keyframes.

# One packet is one frame, and its timestamp is the presentation time.
INDEXED_CONTAINERS = (MP4, MATROSKA, "mpegts", "flv")
INDEXED_CODECS = ("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mjpeg", "prores", "dnxhd")

# Number of frames to verify if none are reordered. This takes a few ms and detects fields in separate packets, B-frames
# without presentation times, and lost leading frames.
_VERIFIED_FRAMES = 4

# A larger step between frames, relative to the median, means missing packets.
_GAP_FACTOR = 1.5

Packets: TypeAlias = "Sequence[Packet[VideoStream]]"
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class DecodeRange(NamedTuple):
    """Packets `start` to `stop - 1`; the first one is a keyframe."""

    start: int
    stop: int


class PacketIndex:
    """Where each frame of a stream is.

    Attributes:
        packets: all P packets, in stored order, which is the order of decoding.
        packet_pts: int64 (P,), their presentation timestamps.
        display_order: int64 (N,), the packet of each frame.
    """

    def __init__(
        self,
        packets: Packets,
        *,
        packet_pts: Int64Array,
        is_keyframe: BoolArray,
        display_order: Int64Array,
        nal_reader: NalReader | None,
    ):
        self.packets = packets
        self.packet_pts = packet_pts
        self.display_order = display_order
        self._nal_reader = nal_reader
        self._is_keyframe = is_keyframe  # (P,)
        self._keyframe_packets = np.flatnonzero(is_keyframe)  # (keyframes,)
        self._is_non_idr: dict[int, bool] = {}  # of the keyframes that have been read for this
        self._sorted_pts = np.sort(packet_pts)  # (P,), with those of hidden frames
        self._median_step = np.median(np.diff(self.pts)) if len(self.pts) > 1 else 0

    @property
    def pts(self) -> Int64Array:
        """int64 (N,), ascending: the presentation timestamp of each frame."""
        return self.packet_pts[self.display_order]  # (N,)

    @cached_property
    def keyframes(self) -> Int64Array:
        """int64 (K,), ascending: the frames that are keyframes."""
        return np.flatnonzero(self._is_keyframe[self.display_order])

    def decode_ranges(self, wanted: Iterable[int]) -> list[DecodeRange]:
        """The disjoint ranges, ascending, that contain the wanted packets and the keyframes they depend on."""
        packets = np.array(sorted(wanted), np.int64)  # (n,)
        merged: list[DecodeRange] = []
        for start, stop in sorted(zip(self._first_packets(packets).tolist(), (packets + 1).tolist())):
            if merged and start < merged[-1].stop:
                merged[-1] = DecodeRange(merged[-1].start, max(merged[-1].stop, stop))
            else:
                merged.append(DecodeRange(start, stop))
        return merged

    @cached_property
    def decode_lengths(self) -> Int64Array:
        """int64 (N,): the number of packets that must be decoded for each frame alone."""
        return self.display_order + 1 - self._first_packets(self.display_order)  # (N,)

    def _first_packets(self, packets: Int64Array) -> Int64Array:
        """The keyframes' packets, int64 (n,), at which decoding must start to decode each of n packets."""
        k = np.searchsorted(self._keyframe_packets, packets, side="right") - 1  # (n,)
        # Leading frames of an open GOP: stored after a keyframe, shown before it, depend on the previous GOP.
        while (is_leading := self.packet_pts[self._keyframe_packets[k]] > self.packet_pts[packets]).any():
            k -= is_leading
        return self._keyframe_packets[k]  # (n,)

    def may_lack_packets(self, decode_range: DecodeRange) -> bool:
        """Whether there is a gap between the first and the last frame that the range shows."""
        pts = self.packet_pts[slice(*decode_range)]
        # All packets count: those shown between the frames of a range may be stored after it.
        first, last = np.searchsorted(self._sorted_pts, (pts.min(), pts.max()))
        steps = np.diff(self._sorted_pts[first : last + 1])
        return bool(steps.max(initial=0) > _GAP_FACTOR * self._median_step)

    def starts_at_non_idr(self, decode_range: DecodeRange) -> bool:
        """Whether frames of the range may refer to frames before it."""
        if self._nal_reader is None:
            return False
        start = decode_range.start
        if start not in self._is_non_idr:
            (keyframe,) = self.packets[start : start + 1]
            self._is_non_idr[start] = self._nal_reader.is_non_idr(keyframe)
        return self._is_non_idr[start]

    @property
    def verified_frame_count(self) -> int:
        """How many frames `verify_first_frames` needs. Reordered frames have presentation times, so one is enough."""
        return 1 if (np.diff(self.display_order) < 0).any() else _VERIFIED_FRAMES

    def verify_first_frames(self, frames: Sequence[VideoFrame]) -> bool:
        """Whether the first decoded frames are those of the index."""
        expected = self.pts[: len(frames)].tolist()
        return (
            len(frames) > 0
            and not any(is_unverifiable(frame) for frame in frames)
            and [frame.pts for frame in frames] == expected
        )


def verified(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """Checks the frames of a decode range, and yields them unchanged.

    Raises:
        IndexMismatch: a frame is corrupt, interlaced, without a timestamp, or not later than the one before it.
    """
    last_pts: float = -np.inf
    for frame in frames:
        if frame.pts is None or frame.pts <= last_pts or is_unverifiable(frame):
            raise IndexMismatch
        last_pts = frame.pts
        yield frame


def is_unverifiable(frame: VideoFrame) -> bool:
    """Whether a frame is corrupt, or interlaced: its fields may have been two packets."""
    return frame.is_corrupt or frame.interlaced_frame


def build_index(packets: Packets, stream: VideoStream) -> PacketIndex | None:
    """Builds the index from the packets of a stream, at least one.

    Returns:
        The index, or None if the container or the codec is not supported, or the packets are inconsistent.
    """
    codec = stream.codec_context.name
    if stream.container.format.name not in INDEXED_CONTAINERS or codec not in INDEXED_CODECS:
        return None
    is_checked_when_read = isinstance(packets, IndexedPackets)
    if isinstance(packets, IndexedPackets):
        pts, is_keyframe, is_discard = packets.table.pts, packets.table.is_keyframe, packets.table.is_discard
    else:
        for packet in packets:
            if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
                return None
        pts = np.array([packet.pts for packet in packets], np.int64)  # (P,)
        is_keyframe = np.array([packet.is_keyframe for packet in packets])  # (P,)
        is_discard = np.array([packet.is_discard for packet in packets])  # (P,)
    keyframes = np.flatnonzero(is_keyframe)  # (K,)
    if not _are_gops_in_order(pts, keyframes):
        return None
    may_reorder = codec in NAL_CODECS and stream.codec_context.has_b_frames
    if not may_reorder and (np.diff(pts) < 0).any():
        return None
    nal_reader = NalReader(codec, stream.codec_context.extradata) if codec in NAL_CODECS else None
    if (
        nal_reader
        and not is_checked_when_read
        and not _are_keyframes_decodable(packets, keyframes.tolist(), nal_reader)
    ):
        return None
    # Some packets are decoded and not shown: those that an edit list discards, and hidden frames of VP8 and VP9.
    is_shown = ~is_discard  # (P,)
    if not is_checked_when_read:
        shown_counts = np.array([shown_frame_count(packet, codec) for packet in packets])  # (P,)
        if shown_counts.max() > 1:
            return None
        is_shown &= shown_counts == 1
    order = np.argsort(pts, kind="stable")
    order = order[is_shown[order]]  # (N,)
    steps = np.diff(pts[order])
    if not len(order) or (steps == 0).any():
        return None
    # FFmpeg does not notice every loss in a transport stream. Frames of undamaged ones have a constant duration.
    if stream.container.format.name == "mpegts" and len(steps) and steps.max() > _GAP_FACTOR * np.median(steps):
        return None
    return PacketIndex(packets, packet_pts=pts, is_keyframe=is_keyframe, display_order=order, nal_reader=nal_reader)


def _are_gops_in_order(pts: Int64Array, keyframes: Int64Array) -> bool:
    """Whether the stream starts with a keyframe, and all packets stored before a keyframe are shown before the rest."""
    if not len(keyframes) or keyframes[0] != 0 or pts.min() < pts[0]:
        return False
    latest_until = np.maximum.accumulate(pts)  # (P,)
    earliest_from = np.minimum.accumulate(pts[::-1])[::-1]  # (P,)
    return bool((latest_until[keyframes[1:] - 1] < earliest_from[keyframes[1:]]).all())


def _are_keyframes_decodable(packets: Packets, keyframes: Collection[int], nal_reader: NalReader) -> bool:
    """Whether decoding from any keyframe is the same as sequential decoding."""
    if any(nal_reader.is_unclean_random_access_point(packets[i]) for i in keyframes if i > 0):
        return False
    # The parameter sets never differ from those in the stream's header, or every keyframe repeats all of them.
    known = nal_reader.parameter_sets
    found = {i: sets for i, packet in enumerate(packets) if (sets := nal_reader.packet_parameter_sets(packet))}
    if all(sets.items() <= known.items() for sets in found.values()):
        return True
    keys = known.keys() | {key for sets in found.values() for key in sets}
    return all(i in found and found[i].keys() == keys for i in keyframes)

"""The packets of AV1 and VP9 that must be decoded for wanted frames, read from frame headers.

Both codecs keep reference frames in eight slots. The header of a frame states which slots it reads and writes. One pass
from the end of a decode range to its start therefore finds every frame that a wanted one depends on:

    packet           0     1     2     3     4          r: reads the slot, w: writes it
    slot 0           w     r     r     rw    r
    slot 1                 w     r           .
    wanted                                   x
    decoded          x     .     .     x     x

AV1 saves everything that a later frame may use with the slot: probabilities, motion vectors, segmentation, loop filter
deltas. VP9 also passes such state from each frame to the next one, except in error-resilient mode. This state is
treated as a ninth slot: every frame writes it, and only keyframes and error-resilient frames do not read it. Only
streams with temporal layers in error-resilient mode, such as recordings of video calls, have VP9 frames to skip.

Specifications: AV1 Bitstream & Decoding Process, sections 5.3 to 5.9 and 7.20; VP9 Bitstream & Decoding Process,
sections 6.2 and 7.2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, cast

from av.packet import Packet
from av.video.stream import VideoStream

from handler.video.bitstream import BitReader, vp9_frames

# Decoders that can be given a part of the packets.
SLOT_CODECS = ("libdav1d", "vp9")

# Sets of slots are bit masks.
_ALL_SLOTS = 0xFF
_VP9_STATE = 0x100

_OBU_SEQUENCE_HEADER, _OBU_FRAME_HEADER, _OBU_TILE_GROUP, _OBU_FRAME, _OBU_REDUNDANT_HEADER = 1, 3, 4, 6, 7
_KEY_FRAME, _INTER_FRAME, _INTRA_ONLY_FRAME, _SWITCH_FRAME = range(4)  # frame_type of AV1
_CHOSEN_PER_FRAME = 2  # SELECT_SCREEN_CONTENT_TOOLS, SELECT_INTEGER_MV


class _Unreadable(Exception):
    """The headers are corrupt, or use a feature that is not parsed."""


class _Frame(NamedTuple):
    """What a coded frame, or all frames of a VP9 packet, read and write.

    Attributes:
        reads, writes: sets of slots.
        is_shown: whether its packet shows it. Another packet may show a hidden frame.
        parts: where its OBUs are in the packet (AV1).
    """

    reads: int
    writes: int
    is_shown: bool
    parts: tuple[slice, ...] = ()


def required_packets(
    packets: Sequence[Packet[VideoStream]], wanted: Collection[int], *, codec: str
) -> Sequence[Packet[VideoStream] | None]:
    """Returns the packets of a decode range that must be decoded for its wanted frames.

    Args:
        packets: of the range; the first one is a keyframe.
        wanted: positions in `packets` of those that show wanted frames.
        codec: one of SLOT_CODECS.

    Returns:
        For each packet: itself, a packet without the frames that are not needed (AV1), or None if no frame of it is
        needed. All packets if their headers cannot be read, or if frames depend on others before the range.
    """
    try:
        frames = [*_av1_frames(packets)] if codec == "libdav1d" else [[_vp9_frame(packet)] for packet in packets]
    except _Unreadable:
        return packets
    needed = 0  # slots that needed frames read
    required: list[Packet[VideoStream] | None] = []
    for i in reversed(range(len(packets))):
        skipped: list[_Frame] = []
        for frame in reversed(frames[i]):
            if frame.writes & needed or (frame.is_shown and i in wanted):
                needed = needed & ~frame.writes | frame.reads
            else:
                skipped.append(frame)
        if not skipped:
            required.append(packets[i])
        else:
            required.append(_without(packets[i], skipped) if len(skipped) < len(frames[i]) else None)
    return packets if needed else required[::-1]


def _without(packet: Packet[VideoStream], frames: Sequence[_Frame]) -> Packet[VideoStream]:
    """A packet without some of its frames, which are given from the last to the first."""
    data = bytearray(packet)
    for frame in frames:
        for part in reversed(frame.parts):
            del data[part]
    shorter = Packet(bytes(data))
    shorter.pts, shorter.dts, shorter.time_base = packet.pts, packet.dts, packet.time_base
    return cast("Packet[VideoStream]", shorter)


# AV1


class _SequenceHeader(NamedTuple):
    """What the headers of frames depend on; sizes in bits."""

    frame_id_size: int
    delta_frame_id_size: int
    screen_content_tools: int
    integer_mv: int
    order_hint_size: int


def _av1_frames(packets: Sequence[Packet[VideoStream]]) -> Iterator[list[_Frame]]:
    """Yields the frames of each packet of a decode range."""
    header_data, header = b"", None
    keyframe_slots = 0  # slots that hold a keyframe
    for packet in packets:
        frames: list[_Frame] = []
        for obu_type, content, part in _obus(memoryview(packet)):
            if obu_type == _OBU_SEQUENCE_HEADER and header_data != content:
                if header:
                    raise _Unreadable("the sequence header changes within a decode range")
                header_data, header = bytes(content), _sequence_header(content)
            elif obu_type in (_OBU_FRAME_HEADER, _OBU_FRAME):
                if header is None:
                    raise _Unreadable("no sequence header")
                frame, is_keyframe = _av1_frame(content, header, keyframe_slots)
                keyframe_slots = keyframe_slots & ~frame.writes | (frame.writes if is_keyframe else 0)
                frames.append(frame._replace(parts=(part,)))
            elif obu_type in (_OBU_TILE_GROUP, _OBU_REDUNDANT_HEADER):
                if not frames:
                    raise _Unreadable("no frame header before a tile group")
                frames[-1] = frames[-1]._replace(parts=(*frames[-1].parts, part))
        yield frames


def _obus(packet: memoryview) -> Iterator[tuple[int, memoryview, slice]]:
    """Yields the type of each open bitstream unit, its content, and where it is in the packet."""
    i = 0
    while i < len(packet):
        start, header = i, packet[i]
        i += 2 if header & 4 else 1  # obu_extension_flag
        size = len(packet) - i
        if header & 2:  # obu_has_size_field
            size, i = _leb128(packet, i)
        if not 0 <= size <= len(packet) - i:
            raise _Unreadable("an OBU exceeds its packet")
        yield header >> 3 & 15, packet[i : i + size], slice(start, i + size)
        i += size


def _leb128(data: memoryview, i: int) -> tuple[int, int]:
    """(the number at position i, the position after it)."""
    value = 0
    for k, byte in enumerate(data[i : i + 8]):
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, i + k + 1
    raise _Unreadable("an OBU has no valid size")


def _sequence_header(content: memoryview) -> _SequenceHeader:
    """Parses sequence_header_obu (section 5.5) up to OrderHintBits."""
    bits = BitReader(content)
    bits.skip(3 + 1)  # seq_profile, still_picture
    if bits.read(1):
        raise _Unreadable("reduced_still_picture_header")
    if bits.read(1):  # timing_info_present_flag
        bits.skip(32 + 32)  # num_units_in_display_tick, time_scale
        if bits.read(1):  # equal_picture_interval
            bits.read_exp_golomb()  # num_ticks_per_picture_minus_1
        if bits.read(1):
            raise _Unreadable("decoder_model_info_present_flag")
    has_display_delay = bits.read(1)
    for point in range(bits.read(5) + 1):  # operating_points_cnt_minus_1
        layers = bits.read(12)  # operating_point_idc
        if point == 0 and layers >> 8 > 1:  # FFmpeg decodes operating point 0 and shows its highest spatial layer
            raise _Unreadable("spatial layers")
        if bits.read(5) > 7:  # seq_level_idx
            bits.skip(1)  # seq_tier
        if has_display_delay and bits.read(1):
            bits.skip(4)  # initial_display_delay_minus_1
    width_size, height_size = bits.read(4) + 1, bits.read(4) + 1
    bits.skip(width_size + height_size)
    frame_id_size = delta_frame_id_size = 0
    if bits.read(1):  # frame_id_numbers_present_flag
        delta_frame_id_size = bits.read(4) + 2
        frame_id_size = bits.read(3) + delta_frame_id_size + 1
    # use_128x128_superblock, enable_filter_intra, enable_intra_edge_filter, enable_interintra_compound,
    # enable_masked_compound, enable_warped_motion, enable_dual_filter
    bits.skip(7)
    has_order_hint = bits.read(1)
    if has_order_hint:
        bits.skip(1 + 1)  # enable_jnt_comp, enable_ref_frame_mvs
    screen_content_tools = _CHOSEN_PER_FRAME if bits.read(1) else bits.read(1)
    integer_mv = _CHOSEN_PER_FRAME
    if screen_content_tools and not bits.read(1):  # seq_choose_integer_mv
        integer_mv = bits.read(1)
    order_hint_size = bits.read(3) + 1 if has_order_hint else 0
    return _SequenceHeader(frame_id_size, delta_frame_id_size, screen_content_tools, integer_mv, order_hint_size)


def _av1_frame(content: memoryview, sequence: _SequenceHeader, keyframe_slots: int) -> tuple[_Frame, bool]:
    """Parses uncompressed_header (section 5.9.2) up to ref_frame_idx: the frame, and whether it is a keyframe."""
    bits = BitReader(content)
    if bits.read(1):  # show_existing_frame
        slot = 1 << bits.read(3)
        is_keyframe = bool(slot & keyframe_slots)  # then it is loaded into all slots
        return _Frame(reads=slot, writes=_ALL_SLOTS if is_keyframe else 0, is_shown=True), is_keyframe
    frame_type, is_shown = bits.read(2), bool(bits.read(1))
    if not is_shown:
        bits.skip(1)  # showable_frame
    is_intra = frame_type in (_KEY_FRAME, _INTRA_ONLY_FRAME)
    writes_all = frame_type == _SWITCH_FRAME or (frame_type == _KEY_FRAME and is_shown)
    is_error_resilient = writes_all or bool(bits.read(1))
    bits.skip(1)  # disable_cdf_update
    allows_screen_content = sequence.screen_content_tools
    if allows_screen_content == _CHOSEN_PER_FRAME:
        allows_screen_content = bits.read(1)
    if allows_screen_content and sequence.integer_mv == _CHOSEN_PER_FRAME:
        bits.skip(1)  # force_integer_mv
    bits.skip(sequence.frame_id_size)
    if frame_type != _SWITCH_FRAME:
        bits.skip(1)  # frame_size_override_flag
    bits.skip(sequence.order_hint_size)
    if not is_intra and not is_error_resilient:
        bits.skip(3)  # primary_ref_frame: one of ref_frame_idx
    writes = _ALL_SLOTS if writes_all else bits.read(8)  # refresh_frame_flags
    reads = 0
    if not is_intra:
        if is_error_resilient:
            bits.skip(8 * sequence.order_hint_size)  # ref_order_hint
        if sequence.order_hint_size and bits.read(1):  # frame_refs_short_signaling: derived from all slots
            reads = _ALL_SLOTS
        else:
            for _ in range(7):
                reads |= 1 << bits.read(3)  # ref_frame_idx
                bits.skip(sequence.delta_frame_id_size)
    return _Frame(reads, writes, is_shown), frame_type == _KEY_FRAME


# VP9


def _vp9_frame(packet: Packet[VideoStream]) -> _Frame:
    """The frames of a packet as one: a superframe is decoded as a whole."""
    reads = writes = 0
    is_shown = False
    for data in vp9_frames(memoryview(packet)):
        frame = _vp9_header(data)
        reads |= frame.reads & ~writes
        writes |= frame.writes
        is_shown |= frame.is_shown
    return _Frame(reads, writes, is_shown)


def _vp9_header(data: memoryview) -> _Frame:
    """Parses uncompressed_header (section 6.2) up to ref_frame_idx."""
    bits = BitReader(data)
    bits.skip(2)  # frame_marker
    profile = bits.read(1) | bits.read(1) << 1
    if profile == 3:
        bits.skip(1)  # reserved_zero
    if bits.read(1):  # show_existing_frame
        return _Frame(1 << bits.read(3) | _VP9_STATE, _VP9_STATE, is_shown=True)
    is_keyframe, is_shown, is_error_resilient = not bits.read(1), bool(bits.read(1)), bits.read(1)
    if is_keyframe:
        return _Frame(0, _ALL_SLOTS | _VP9_STATE, is_shown)
    is_intra = not is_shown and bits.read(1)  # intra_only
    reads = 0 if is_error_resilient else _VP9_STATE
    if not is_error_resilient:
        bits.skip(2)  # reset_frame_context
    if is_intra:
        if profile:
            raise _Unreadable("an intra-only frame with color information")
        bits.skip(24)  # frame_sync_code
    writes = bits.read(8) | _VP9_STATE  # refresh_frame_flags
    for _ in range(0 if is_intra else 3):
        reads |= 1 << bits.read(3)  # ref_frame_idx
        bits.skip(1)  # ref_frame_sign_bias
    return _Frame(reads, writes, is_shown)

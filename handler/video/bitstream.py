"""Parses packets without decoding them: NAL units, parameter sets, SEI messages, VP8 and VP9 headers.

The index uses this to find the packets that hold a frame and the packets where decoding may start. A new codec
that hides frames needs a branch in `shown_frame_count`; a new codec made of NAL units needs a branch in `NalReader`.
`references.py` reads more of the headers of AV1 and VP9.

Specifications: ITU-T H.264 and H.265 (NAL units, SEI), ISO/IEC 14496-15 (avcC, hvcC), RFC 6386 (VP8), and the VP9
Bitstream & Decoding Process Specification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from av.packet import Packet
from av.video.stream import VideoStream

# NAL unit types of H.264 (Table 7-1).
_H264_IDR, _H264_SEI, _H264_SPS, _H264_PPS = 5, 6, 7, 8
_H264_SLICES = range(1, 6)

# NAL unit types of HEVC (Table 7-1). Slices are below 32; a BLA has broken links to the frames before it.
_HEVC_SLICES = range(32)
_HEVC_BLA = range(16, 19)
_HEVC_VPS, _HEVC_SPS, _HEVC_PPS = 32, 33, 34

_SEI_RECOVERY_POINT = 6

_START_CODE = re.compile(rb"\x00\x00\x01")

# FFmpeg's names of the codecs made of NAL units. Their frames may be stored in another order than they are shown in.
NAL_CODECS = ("h264", "hevc")

# (type, id) -> content: one parameter set replaces another with the same key.
ParameterSets = Mapping[tuple[int, int], bytes]


def shown_frame_count(packet: Packet[VideoStream], codec: str) -> int:
    """Number of frames that a packet shows: 0 for the hidden reference frames (alt-ref) of VP8 and VP9.

    A VP9 superframe holds several frames and normally shows exactly one.
    """
    if codec == "vp8":
        return memoryview(packet)[0] >> 4 & 1  # show_frame
    if codec == "vp9":
        return sum(_is_shown_vp9(frame[0]) for frame in vp9_frames(memoryview(packet)))
    return 1


def vp9_frames(packet: memoryview) -> Iterator[memoryview]:
    """The frames of a packet: several if it ends with a superframe index (VP9 specification, Annex B)."""
    marker = packet[-1]
    frame_count, size_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index_size = 2 + frame_count * size_bytes
    if marker >> 5 != 0b110 or len(packet) < index_size or packet[-index_size] != marker:
        yield packet
        return
    index = packet[-index_size + 1 : -1]
    start = 0
    for i in range(0, len(index), size_bytes):
        size = int.from_bytes(index[i : i + size_bytes], "little")
        if frame := packet[start : start + size]:
            yield frame
        start += size


def _is_shown_vp9(header: int) -> bool:
    """Whether a frame is shown, from the first byte of its uncompressed header.

    The bits are: frame_marker (2), profile (2, low bit first), a reserved bit in profile 3 only,
    show_existing_frame, frame_type, show_frame.
    """
    is_profile_3 = header >> 4 & 3 == 3
    show_existing_frame, show_frame = (2, 0) if is_profile_3 else (3, 1)
    return bool(header >> show_existing_frame & 1 or header >> show_frame & 1)


class NalReader:
    """Reads the NAL units of one H.264 or HEVC stream.

    Args:
        codec: "h264" or "hevc".
        extradata: the stream's codec header: avcC, hvcC, or NAL units with start codes (Annex B).

    Attributes:
        parameter_sets: those in `extradata`, which every decoder of the stream knows from the start.
    """

    def __init__(self, codec: str, extradata: bytes | None):
        self._is_hevc = codec == "hevc"
        header = extradata or b""
        length_at = 21 if self._is_hevc else 4
        self._length_bytes = 0  # of the length in front of each unit; 0 where units have start codes
        if len(header) > length_at + 1 and header[0] == 1:
            self._length_bytes = (header[length_at] & 3) + 1
            units: Iterable[memoryview] = _hvcc_units(header) if self._is_hevc else _avcc_units(header)
        else:
            units = _units_after_start_codes(memoryview(header), self._is_slice)
        self.parameter_sets: ParameterSets = self._parameter_sets(units)

    def nal_units_before_slice(self, packet: Packet[VideoStream]) -> Iterator[memoryview]:
        """The NAL units of a packet up to and including its first slice, as views."""
        data = memoryview(packet)
        if not self._length_bytes:
            yield from _units_after_start_codes(data, self._is_slice)
            return
        for unit in _units_by_length(data, self._length_bytes):
            yield unit
            if self._is_slice(unit[0]):
                return

    def packet_parameter_sets(self, packet: Packet[VideoStream]) -> ParameterSets:
        """The parameter sets that a packet carries.

        With start codes only those before the first slice: FFmpeg's parser starts a new packet at any others.
        """
        if self._length_bytes:
            return self._parameter_sets(_units_by_length(memoryview(packet), self._length_bytes))
        return self._parameter_sets(self.nal_units_before_slice(packet))

    def is_non_idr(self, keyframe: Packet[VideoStream]) -> bool:
        """Whether frames after an H.264 keyframe may refer to frames before it, because it is not an IDR frame."""
        return not self._is_hevc and all(
            self._type(unit) != _H264_IDR for unit in self.nal_units_before_slice(keyframe)
        )

    def is_unclean_random_access_point(self, keyframe: Packet[VideoStream]) -> bool:
        """Whether decoding from this keyframe makes frames that differ from those of sequential decoding.

        True for H.264 recovery points with a recovery_frame_cnt (intra refresh), and for BLA frames of HEVC, whose
        leading frames are decoded or dropped depending on where decoding started.
        """
        units = self.nal_units_before_slice(keyframe)
        if self._is_hevc:
            return any(self._type(unit) in _HEVC_BLA for unit in units)
        return any(self._type(unit) == _H264_SEI and _recovery_frame_count(unit) > 0 for unit in units)

    def _type(self, unit: memoryview) -> int:
        return unit[0] >> 1 & 63 if self._is_hevc else unit[0] & 31

    def _is_slice(self, header: int) -> bool:
        return header >> 1 & 63 in _HEVC_SLICES if self._is_hevc else header & 31 in _H264_SLICES

    def _parameter_sets(self, units: Iterable[memoryview]) -> ParameterSets:
        kinds = (_HEVC_VPS, _HEVC_SPS, _HEVC_PPS) if self._is_hevc else (_H264_SPS, _H264_PPS)
        found: dict[tuple[int, int], bytes] = {}
        for unit in units:
            kind = self._type(unit)
            if kind in kinds:
                content = bytes(unit[2 if self._is_hevc else 1 :]).rstrip(b"\0")
                found[kind, _parameter_set_id(kind, content, is_hevc=self._is_hevc)] = content
        return found


def _parameter_set_id(kind: int, content: bytes, *, is_hevc: bool) -> int:
    """The id of a parameter set, whose NAL unit header has been removed."""
    bits = BitReader(_payload(content))
    if is_hevc and kind == _HEVC_VPS:
        return bits.read(4)
    if is_hevc and kind == _HEVC_SPS:
        bits.skip(4)  # sps_video_parameter_set_id
        sub_layers = bits.read(3)  # sps_max_sub_layers_minus1
        bits.skip(1 + 88 + 8)  # sps_temporal_id_nesting_flag, general profile and level
        if sub_layers:
            flags = [bits.read(2) for _ in range(8)][:sub_layers]  # a profile and a level may be present for each
            bits.skip(sum(88 * (flag >> 1) + 8 * (flag & 1) for flag in flags))
    elif not is_hevc and kind == _H264_SPS:
        bits.skip(24)  # profile_idc, constraint flags, level_idc
    return bits.read_exp_golomb()


def _recovery_frame_count(sei: memoryview) -> int:
    """recovery_frame_cnt of an H.264 SEI unit (section D.1.8); 0 if the unit has no recovery point."""
    i = 1
    while i + 2 < len(sei):
        payload_type, i = _read_sei_number(sei, i)
        size, i = _read_sei_number(sei, i)
        if payload_type == _SEI_RECOVERY_POINT:
            return BitReader(_payload(sei[i : i + 16])).read_exp_golomb()
        i += size
    return 0


def _read_sei_number(sei: memoryview, i: int) -> tuple[int, int]:
    """(the sum of the bytes from i to the first that is not 255, the position after them)."""
    start = i
    while i < len(sei) - 1 and sei[i] == 255:
        i += 1
    return sum(sei[start : i + 1]), i + 1


def _payload(nal_unit: bytes | memoryview) -> bytes:
    """The first bytes of a NAL unit, without emulation prevention bytes."""
    return bytes(nal_unit[:128]).replace(b"\0\0\3", b"\0\0")


class BitReader:
    """Reads the first 128 bytes of a header bit by bit. Bits beyond its end are 0."""

    def __init__(self, data: bytes | memoryview):
        head = bytes(data[:128])
        self._value, self._unread = int.from_bytes(head, "big"), 8 * len(head)

    def skip(self, count: int) -> None:
        self._unread -= count

    def read(self, count: int) -> int:
        self._unread -= count
        shifted = self._value >> self._unread if self._unread >= 0 else self._value << -self._unread
        return shifted & (1 << count) - 1

    def read_exp_golomb(self) -> int:
        """An unsigned Exp-Golomb code, ue(v); 0 if there is none."""
        zeros = 0
        while not self.read(1):
            if self._unread <= 0:
                return 0
            zeros += 1
        return (1 << zeros | self.read(zeros)) - 1


def _avcc_units(header: bytes) -> list[memoryview]:
    """The parameter sets of an AVCDecoderConfigurationRecord: SPS, then PPS."""
    data = memoryview(header)
    sps, i = _counted_units(data, 6, count=data[5] & 31)
    pps, _ = _counted_units(data, i + 1, count=int.from_bytes(data[i : i + 1], "big"))
    return sps + pps


def _hvcc_units(header: bytes) -> list[memoryview]:
    """The parameter sets of an HEVCDecoderConfigurationRecord: an array for each NAL unit type."""
    data, i = memoryview(header), 23
    units: list[memoryview] = []
    for _ in range(int.from_bytes(data[22:23], "big")):
        array, i = _counted_units(data, i + 3, count=int.from_bytes(data[i + 1 : i + 3], "big"))
        units += array
    return units


def _counted_units(data: memoryview, i: int, *, count: int) -> tuple[list[memoryview], int]:
    """(`count` units from position i on, each preceded by a 2-byte length; the position after them)."""
    units = []
    for _ in range(count):
        start, i = i + 2, i + 2 + int.from_bytes(data[i : i + 2], "big")
        if not start < i <= len(data):
            break
        units.append(data[start:i])
    return units, i


def _units_by_length(data: memoryview, length_bytes: int) -> Iterator[memoryview]:
    i = 0
    while i + length_bytes < len(data):
        start = i + length_bytes
        i = start + int.from_bytes(data[i:start], "big")
        if i > start:
            yield data[start:i]


def _units_after_start_codes(data: memoryview, is_slice: Callable[[int], bool]) -> Iterator[memoryview]:
    """Units up to the first slice, which includes everything after it: searching for its end would be slow."""
    match = _START_CODE.search(data)
    while match and match.end() < len(data):
        start = match.end()
        if is_slice(data[start]):
            yield data[start:]
            return
        match = _START_CODE.search(data, start)
        if unit := data[start : match.start() if match else len(data)]:
            yield unit

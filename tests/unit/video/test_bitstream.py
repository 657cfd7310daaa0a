"""Parsing NAL units and frame headers of compressed packets."""

import av
import pytest

from handler.video.bitstream import NalReader, shown_frame_count


@pytest.mark.parametrize("name", ["hevc_open_gop.mp4", "hevc_open_gop.ts"])
def test_bla_is_unclean_random_access_point(clip, name):
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        reader = NalReader("hevc", stream.codec_context.extradata)
        keyframes = [packet for packet in container.demux(stream) if packet.is_keyframe][1:]
        # The NAL unit type CRA, 21, becomes BLA, 16.
        broken = [av.Packet(bytes(packet).replace(b"\x2a\x01", b"\x20\x01")) for packet in keyframes]
    assert keyframes and not any(reader.is_unclean_random_access_point(packet) for packet in keyframes)
    assert all(reader.is_unclean_random_access_point(packet) for packet in broken)


@pytest.mark.parametrize(
    "header, count",
    [(0b10_00_0_0_1_0, 1), (0b10_00_0_0_0_0, 0), (0b10_00_1_000, 1), (0b10_11_0_0_0_1, 1), (0b10_11_0_0_1_0, 0)],
)
def test_shown_vp9_frames(header, count):
    frame = bytes([header]) + bytes(20)
    assert shown_frame_count(av.Packet(frame), "vp9") == count
    index = bytes([0b110_00_001, 21, 21, 0b110_00_001])  # a superframe of two frames
    assert shown_frame_count(av.Packet(2 * frame + index), "vp9") == 2 * count


@pytest.mark.parametrize("name", ["hevc.mp4", "bframes.mp4", "hevc_open_gop.ts", "bframes.ts"])
def test_parameter_sets(clip, name):
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        reader = NalReader(stream.codec_context.name, stream.codec_context.extradata)
        first = next(container.demux(stream))
        found = reader.packet_parameter_sets(first)
    kinds = [(32, 0), (33, 0), (34, 0)] if "hevc" in name else [(7, 0), (8, 0)]
    assert list(reader.parameter_sets) == kinds and all(reader.parameter_sets.values())
    assert not found or found == reader.parameter_sets

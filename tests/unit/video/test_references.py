"""Frames of AV1 and VP9 that no needed frame refers to are not decoded; all others are unchanged."""

import random

import av
import numpy as np
import pytest

from handler.video import open_video
from handler.video.references import required_packets
from tests.support.clips import mutated, with_data

PYRAMIDS = ("av1.mp4", "av1_long_gop.mp4", "av1_low_delay.webm", "av1_tiles_10_bit.mp4")
LAYERS = "vp9_temporal_layers.webm"


def packets_of(path):
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return container.streams.video[0].codec_context.name, [with_data(packet, bytes(packet)) for packet in packets]


@pytest.mark.parametrize("name", [*PYRAMIDS, LAYERS, "vp9_layers_not_resilient.webm"])
def test_every_set_of_frames_unchanged(clip, every_frame, name):
    expected, rng = every_frame(clip(name)), random.Random(0)
    single = [[i] for i in range(len(expected))]
    for indices in (*single, *(sorted(rng.sample(range(len(expected)), count)) for count in (2, 3, 5, 9, 20))):
        with open_video(clip(name)) as video:
            np.testing.assert_array_equal(video.decode(indices), [expected[i] for i in indices], f"frames {indices}")
            assert video.is_indexed


@pytest.mark.parametrize(
    ("name", "wanted", "part"),
    [("av1_long_gop.mp4", {5, 35}, 0.6), ("av1_low_delay.webm", {39}, 0.6), (LAYERS, {36}, 0.55), (LAYERS, {37}, 0.55)],
)
def test_unreferenced_frames_left_out(clip, name, wanted, part):
    codec, packets = packets_of(clip(name))
    packets = packets[: max(wanted) + 1]
    required = required_packets(packets, wanted, codec=codec)
    assert len(required) == len(packets) and all(required[i] is not None for i in (0, *wanted))
    assert sum(packet is not None for packet in required) < part * len(packets)
    assert sum(packet.size for packet in required[1:] if packet) < 0.8 * sum(packet.size for packet in packets[1:])


def test_unreferenced_frames_not_decoded(clip):
    for name in ("av1_low_delay.webm", LAYERS):
        with open_video(clip(name)) as video:
            video.decode([38])
            assert 10 < video.decoded_frames < 28


def test_vp9_frames_that_pass_on_state_kept(clip):
    """No frame refers to those of the highest layer, but the next one uses their probabilities and motion vectors."""
    codec, packets = packets_of(clip("vp9_layers_not_resilient.webm"))
    assert list(required_packets(packets, {len(packets) - 1}, codec=codec)) == packets


def test_frames_after_the_last_wanted_one_left_out(clip):
    for name in ("av1.mp4", LAYERS):
        codec, packets = packets_of(clip(name))
        assert required_packets(packets[:12], {0}, codec=codec) == [packets[0], *[None] * 11]


@pytest.mark.parametrize("name", ["av1_long_gop.mp4", LAYERS])
def test_references_before_the_range(clip, name):
    codec, packets = packets_of(clip(name))
    with_header = with_data(packets[3], bytes(packets[0])[:13] * (codec == "libdav1d") + bytes(packets[3]))
    for part in (packets[3:9], [with_header, *packets[4:9]]):
        assert required_packets(part, {5}, codec=codec) is part


@pytest.mark.parametrize("name", ["av1.mp4", LAYERS, "hidden_vp9.webm"])
def test_damaged_headers(clip, name):
    codec, packets = packets_of(clip(name))
    for seed in range(300):
        damaged = [with_data(packet, mutated(bytes(packet)[:40], seed + i)) for i, packet in enumerate(packets[:12])]
        assert len(required_packets(damaged, {3, 11}, codec=codec)) == 12

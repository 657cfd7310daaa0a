"""Decoded frames equal those of sequential decoding with PyAV, for every file."""

import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from handler.video import (
    CorruptVideoError,
    FrameIndexError,
    Limits,
    VideoError,
    decode_frames,
    open_video,
    probe,
    sample_uniform,
)
from tests.support.clips import mutated, numbered_frames, write_clip
from tests.support.video_files import FRAMES, HIDDEN, INDEXED, INDEXED_MISLEADING, MISLEADING, SEQUENTIAL, VFR_MS, x264


def assert_exact(path, expected):
    """Compares all frames, some, and single ones, directly after opening and after others, on 1 and 3 threads."""
    expected = np.stack(expected)  # (N, H, W, 3)
    count, rng = len(expected), random.Random(0)
    some = [range(count), sample_uniform(count, 8), [rng.randrange(count) for _ in range(5)]]
    single = [[i] for i in (0, 2, count // 2, count // 2 + 1, count * 5 // 6, count - 1) if i < count]
    warnings, stays_indexed = [], True
    after_opening = {1: (some, some[1:2], single[:2], single[2:4], single[4:]), 3: (some, single[-1:])}
    for thread_count, openings in after_opening.items():
        for decoded in openings:
            with open_video(path, thread_count=thread_count) as video:
                assert video.info.frame_count == count == len(video.pts_s)
                assert video.pts_s.dtype == np.float64 and video.pts_s[0] == 0 and (np.diff(video.pts_s) >= 0).all()
                assert video.pts_s[-1] <= video.info.duration_s
                starts_indexed = video.is_indexed
                for indices in decoded:
                    frames = video.decode(indices)
                    assert frames.dtype == np.uint8
                    np.testing.assert_array_equal(frames, expected[list(indices)], f"frames {indices}")
                warnings += video.warnings
                stays_indexed &= video.is_indexed
            if not starts_indexed:
                break
    return warnings, stays_indexed


@pytest.mark.parametrize("name", [*INDEXED, *SEQUENTIAL])
def test_frames(clip, every_frame, name):
    assert assert_exact(clip(name), every_frame(clip(name))) == ([], name in INDEXED)


@pytest.mark.parametrize("name", MISLEADING)
def test_frames_of_misleading_files(clip, every_frame, name):
    _, stays_indexed = assert_exact(clip(name), every_frame(clip(name)))
    assert stays_indexed or name not in INDEXED_MISLEADING


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_frames_not_counted(clip, name):
    with av.open(str(clip(name))) as container:
        packet_count = sum(packet.size > 0 for packet in container.demux(video=0))
    assert probe(clip(name)).frame_count == packet_count - HIDDEN[name]


def test_repeated_times_replaced_by_frame_rate(clip):
    with open_video(clip("repeated_times.ts")) as video:
        np.testing.assert_allclose(video.pts_s, np.arange(80) / 25)


def test_variable_frame_rate_times(clip):
    with open_video(clip("vfr.mkv")) as video:
        np.testing.assert_allclose(video.pts_s, np.array(VFR_MS) / 1000, atol=0.0006)
        assert video.info.duration_s == pytest.approx(VFR_MS[-1] / 1000 + 0.04, abs=0.04)
        assert video.info.fps == pytest.approx(40 / video.info.duration_s)


@pytest.mark.parametrize(("fps", "expected"), [(960, pytest.approx(960)), (5000, None)])
def test_implausible_frame_rate_is_none(tmp_path, fps, expected):
    info = probe(write_clip(tmp_path / "fast.mp4", FRAMES[:8], fps=fps))
    assert info.fps == expected and 0 < info.duration_s < 0.01


def test_frames_of_other_size_scaled(clip, every_frame, tmp_path):
    small = write_clip(tmp_path / "small.ts", numbered_frames(20, height=64, width=96), **x264())
    path = tmp_path / "sizes.ts"
    path.write_bytes(clip("bframes.ts").read_bytes() + small.read_bytes())
    assert len(every_frame(path)) == 60
    assert_exact(path, every_frame(path))


# How much is decoded


def test_only_needed_frames_decoded(tmp_path):
    path = write_clip(tmp_path / "long.mp4", numbered_frames(600, height=32, width=48), **x264("keyint=100"))
    for thread_count in (1, 3):
        with open_video(path, thread_count=thread_count) as video:
            video.decode(range(310, 342, 4))
            assert 8 <= video.decoded_frames <= 32 + 10  # the span, and the frames before it in its GOP
            assert video.decode([0, 300]).shape == (2, 32, 48, 3)
            assert video.decoded_frames <= 32 + 10 + 2


@pytest.mark.parametrize("keyint, is_shared", [(8, True), (100, False)])
def test_ranges_shared_by_decoders_only_if_balanced(tmp_path, monkeypatch, keyint, is_shared):
    path = write_clip(tmp_path / "a.mp4", numbered_frames(120, height=32, width=48), **x264(f"keyint={keyint}"))
    openings = []
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: openings.append(args) or open_file(*args, **options))
    with open_video(path, thread_count=2) as video:
        video.decode(range(0, 120, 8))
    # Each decoder belongs to a container. One decoder with two threads is faster than a GOP of 100 beside one of 20.
    assert (len(openings) > 1) == is_shared


def test_unreferenced_frames_skipped(tmp_path):
    # I P B B P B B ...: no frame refers to a B-frame.
    options = {"x264-params": "keyint=250:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none"}
    path = write_clip(tmp_path / "a.mp4", numbered_frames(61, height=32, width=48), options=options)
    for index in (58, 59, 60):
        with open_video(path) as video:
            video.decode([index])
            assert 61 / 3 < video.decoded_frames < 61 / 2


def test_sequential_decoding_happens_once_per_call(clip):
    with open_video(clip("mpeg4.avi")) as video:
        assert video.decoded_frames == 40
        video.decode([3, 9])
        assert 50 <= video.decoded_frames <= 51


# Arguments


def test_order_and_repeats_of_indices(clip, every_frame):
    for name in ("bframes.mp4", "mpeg4.avi", "truncated_in_packet.ts"):
        indices = [18, 0, 17, 17, 3, 18]
        expected = [every_frame(clip(name))[i] for i in indices]
        np.testing.assert_array_equal(decode_frames(clip(name), indices), expected)
        frames = {}
        with open_video(clip(name)) as video:
            for positions, convert in video.frames(indices):
                frames.update(dict.fromkeys(positions.tolist(), convert()))
        np.testing.assert_array_equal([frames[position] for position in range(6)], expected)


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
def test_invalid_indices(clip, name):
    assert decode_frames(clip(name), []).shape == (0, 96, 128, 3)
    for indices in ([40], [0, -1], [1.0], [[1, 2]], [True]):
        with pytest.raises(IndexError, match="expected") as caught:
            decode_frames(clip(name), indices)
        assert isinstance(caught.value, FrameIndexError) and caught.value.code == "frame_index"


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_same_as_path(clip, wrap):
    data = wrap(clip("bframes.mp4").read_bytes())
    assert probe(data) == probe(clip("bframes.mp4")) == probe(str(clip("bframes.mp4")))
    np.testing.assert_array_equal(decode_frames(data, [7, 30]), decode_frames(clip("bframes.mp4"), [7, 30]))


def test_closed_video_rejected(clip):
    with open_video(clip("bframes.mp4")) as video:
        pass
    assert video.info.frame_count == len(video.pts_s) == 40
    with pytest.raises(RuntimeError, match="has ended"):
        video.decode([0])


# Corrupt and truncated files

STATING_DURATION = ("bframes.mkv", "vp9.webm", "bframes.flv", "mpeg4_bframes.avi", "header_first.mp4")


@pytest.mark.parametrize("name", [*STATING_DURATION, "fragmented.mp4", "bframes.ts", "mpeg2.mpg"])
def test_truncated_file(clip, every_frame, tmp_path, name):
    path = tmp_path / name

    path.write_bytes(clip(name).read_bytes()[: clip(name).stat().st_size // 2])
    assert 1 < len(every_frame(path)) < 35
    warnings, _ = assert_exact(path, every_frame(path))
    assert any("truncated" in warning for warning in warnings) == (name in STATING_DURATION)


def test_audio_of_other_length_not_a_truncation(tmp_path):
    for seconds in (0.5, 5.0):
        path = write_clip(tmp_path / f"{seconds}.mkv", FRAMES, audio_codec="aac", audio_seconds=seconds)
        with open_video(path) as video:
            assert video.warnings == () and video.info.duration_s == pytest.approx(1.6)


def _corrupted(path, number, *, kept=0.0):
    """The file's bytes with those of packet `number` of its video inverted, except for the part `kept`."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    data = bytearray(path.read_bytes())
    for i in range(packet.pos + int(kept * packet.size), packet.pos + packet.size):
        data[i] ^= 0xFF
    return bytes(data)


def test_corrupt_frame_replaced_by_previous(clip, every_frame):
    expected = [*every_frame(clip("prores.mov"))]
    expected[20] = expected[19]
    with open_video(_corrupted(clip("prores.mov"), 20)) as video:
        assert video.info.frame_count == 40
        indices = [5, 19, 20, 21, 39]
        np.testing.assert_array_equal(video.decode(indices), [expected[i] for i in indices])
        assert "the file has 40 frames, 39 of them can be decoded" in video.warnings
        assert "the video is partially corrupt: some packets cannot be decoded" in video.warnings
        np.testing.assert_array_equal(video.decode(range(40)), expected)


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [("bframes.mp4", 14, 0.5), ("bframes.mp4", 20, 0.6), ("open_gop.mp4", 26, 0.5), ("hevc.mp4", 22, 0.8)],
)
def test_concealed_errors(clip, every_frame, tmp_path, name, number, kept):
    path = tmp_path / name
    path.write_bytes(_corrupted(clip(name), number, kept=kept))
    expected, intact = every_frame(path), every_frame(clip(name))
    assert any((frame != other).any() for frame, other in zip(expected, intact, strict=True))
    for thread_count in (1, 3):
        for indices in ([number - 2], [number], [number + 2], range(40), sample_uniform(40, 8)):
            with open_video(path, thread_count=thread_count) as video:
                np.testing.assert_array_equal(video.decode(indices), [expected[i] for i in indices])


MUTATED = (
    *("bframes.mp4", "fragmented.mp4", "open_gop.ts", "bframes.flv", "hevc.mp4", "hevc_open_gop.ts", "av1.mp4"),
    *("vp8.webm", "hidden_vp9.webm", "mpeg4.avi", "mpeg2.mpg", "animated.gif", "wmv2.wmv", "prores.mov"),
)


@pytest.mark.parametrize("name", MUTATED)
def test_corrupt_bytes_raise_only_video_errors(clip, name):
    data = clip(name).read_bytes()
    for seed in range(16):
        corrupt = mutated(data[:3000], seed) + data[3000:] if seed % 2 else mutated(data, seed)
        with contextlib.suppress(VideoError), open_video(corrupt, thread_count=1 + seed // 2 % 2) as video:
            frames = video.decode(sample_uniform(video.info.frame_count, 4))
            assert frames.shape == (4, video.info.height, video.info.width, 3)
            assert np.isfinite(video.pts_s).all() and video.info.duration_s >= 0


def test_corrupt_file_logs_nothing(clip, capfd):
    data = bytearray(clip("bframes.mkv").read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    with open_video(bytes(data)) as video:
        video.decode(range(video.info.frame_count))
        assert not video.is_indexed
    assert capfd.readouterr() == ("", "")


# Resources


def test_videos_decoded_concurrently(clip, every_frame):
    names = ["bframes.mp4", "vp9.webm", "hevc.mp4", "mpeg4.avi", "open_gop.ts"] * 3
    with ThreadPoolExecutor(8) as pool:
        decoded = pool.map(lambda name: decode_frames(clip(name).read_bytes(), range(40)), names)
        for name, frames in zip(names, decoded):
            np.testing.assert_array_equal(frames, every_frame(clip(name)), name)


def test_files_closed(clip, tmp_path):
    def open_files():
        return len(os.listdir("/dev/fd"))

    bad = tmp_path / "bad.mp4"
    bad.write_bytes(clip("bframes.mp4").read_bytes()[:2000])
    before = open_files()
    for name in ("bframes.mp4", "mpeg4.avi"):
        with open_video(clip(name), thread_count=2) as video:
            video.decode([1, 20])
            opened = open_files()
            for _ in range(3):
                video.decode([3, 21])
            assert open_files() == opened
    with pytest.raises(CorruptVideoError):
        probe(bad)
    with pytest.raises(FrameIndexError):
        decode_frames(clip("bframes.mp4"), [99])
    assert open_files() == before


def test_growing_frames_are_corrupt(tmp_path):
    """Frames that exceed the limit in the middle of a file are never allocated."""
    small = write_clip(tmp_path / "small.ts", FRAMES[:12], **x264())
    large = write_clip(tmp_path / "large.ts", np.full((2, 3200, 3200, 3), 90, np.uint8), **x264(preset="ultrafast"))
    with open_video(small.read_bytes() + large.read_bytes(), limits=Limits(max_frame_pixels=500_000)) as video:
        assert video.info.frame_count == 12 and video.warnings

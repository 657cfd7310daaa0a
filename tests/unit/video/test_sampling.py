"""Which frames are sampled, and the warnings about them."""

from fractions import Fraction

import numpy as np
import pytest

from handler.video import open_video, sample_frames, sample_uniform
from handler.video.sampling import sample_segments
from tests.support.clips import remux, write_clip
from tests.support.video_files import FRAMES, earlier, x264


def _sample(path, num_frames, sampling="uniform"):
    with open_video(path) as video:
        indices, warnings = sample_frames(video, num_frames=num_frames, sampling=sampling)
        return indices.tolist(), warnings


@pytest.mark.parametrize("frame_count", [1, 5, 31, 32, 33, 300])
def test_uniform_takes_middle_of_equal_parts(frame_count):
    indices = sample_uniform(frame_count, 32)
    assert indices.dtype == np.int64
    assert indices.tolist() == [int((i + 0.5) * frame_count / 32) for i in range(32)]


@pytest.mark.parametrize(("frame_count", "num_frames"), [(0, 32), (32, 0), (-1, 2)])
def test_uniform_rejects_zero(frame_count, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        sample_uniform(frame_count, num_frames)


def test_uniform_sampling_of_video(clip):
    assert _sample(clip("bframes.mp4"), 4) == ([5, 15, 25, 35], [])
    assert _sample(clip("bframes.mp4"), 40) == (list(range(40)), [])
    assert _sample(clip("two_frames.mp4"), 4) == (
        [0, 0, 1, 1],
        ["the video has 2 frames and the model takes 4: frames repeat"],
    )
    assert _sample(clip("one_frame.gif"), 2)[1] == ["the video has 1 frame and the model takes 2: frames repeat"]


def test_keyframe_sampling(clip, every_frame):
    with open_video(clip("bframes.mp4")) as video:  # uniform sampling takes 3, 10, 16, 23, 30, 36
        indices, warnings = sample_frames(video, num_frames=6, sampling="keyframes")
        assert indices.tolist() == [0, 12, 12, 24, 24, 36]
        assert warnings == ["the video has 4 keyframes to sample and the model takes 6: frames repeat"]
        frames = video.decode(indices)
        assert video.decoded_frames == 4
    np.testing.assert_array_equal(frames, np.stack(every_frame(clip("bframes.mp4")))[indices])


def test_keyframe_sampling_between_equally_near_keyframes(clip):
    # The middle frames 6 and 18 are between keyframes 0, 12 and 24.
    with open_video(clip("bframes.mp4")) as video:
        assert video.keyframes.tolist() == [0, 12, 24, 36]
    assert _sample(clip("bframes.mp4"), 3, "keyframes")[0] == [0, 24, 36]  # 6, 20, 33
    assert _sample(clip("bframes.mp4"), 1, "keyframes") == ([24], [])


def test_keyframe_sampling_without_index(clip):
    assert _sample(clip("mpeg4.avi"), 4, "keyframes") == ([5, 15, 25, 35], [])


def test_keyframe_sampling_without_shown_keyframe(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", FRAMES[:10], **x264("bframes=0"))
    path = remux(tmp_path / "cut.mp4", whole, edit=earlier(3))
    uniform, _ = _sample(path, 4)
    assert _sample(path, 4, "keyframes") == (
        uniform,
        ["the video shows no keyframe: frames are sampled uniformly"],
    )


@pytest.mark.parametrize("frame_count", [1, 2, 7, 32, 100, 1000])
@pytest.mark.parametrize("num_frames", [1, 4, 32])
def test_segment_takes_fastest_frame_of_central_half(frame_count, num_frames):
    decode_lengths = np.random.default_rng(frame_count).integers(1, 5, frame_count)
    expected = []
    for part in range(num_frames):
        start, length = Fraction(part * frame_count, num_frames), Fraction(frame_count, num_frames)
        middle = int(start + length / 2)
        half = [i for i in range(frame_count) if start + length / 4 <= i <= start + length * 3 / 4]
        expected.append(min({*half, middle}, key=lambda i: (decode_lengths[i], abs(i - middle), i)))
    indices = sample_segments(num_frames, decode_lengths=decode_lengths)
    assert indices.dtype == np.int64
    assert indices.tolist() == expected == sorted(expected)


@pytest.mark.parametrize("name", ["bframes.mp4", "open_gop.mp4", "hevc.mp4", "vp9.webm", "prores.mov"])
def test_segment_sampling_decodes_fewer_frames(clip, every_frame, name):
    with open_video(clip(name)) as video:
        uniform, _ = sample_frames(video, num_frames=4)
        indices, warnings = sample_frames(video, num_frames=4, sampling="segment")
        assert warnings == []
        assert video.decode_gigapixels(indices) <= video.decode_gigapixels(uniform)
        np.testing.assert_array_equal(video.decode(indices), np.stack(every_frame(clip(name)))[indices])


def test_decode_lengths_equal_decoded_frames(clip):
    for index in (12, 20, 23, 39):
        with open_video(clip("no_bframes.mp4")) as video:
            opened = video.decoded_frames
            video.decode([index])
            assert video.decoded_frames - opened == video.decode_lengths[index] == index % 12 + 1


def test_segment_sampling_without_index(clip):
    assert _sample(clip("mpeg4.avi"), 4, "segment") == ([5, 15, 25, 35], [])


def test_frames_far_apart(tmp_path):
    slow = write_clip(tmp_path / "slow.mp4", FRAMES[:12], fps=1)
    assert _sample(slow, 4)[1] == ["sampled frames are up to 3.0 s apart: actions shorter than that may be missed"]
    assert _sample(slow, 6)[1] == []


def test_unknown_sampling_rejected(clip):
    with pytest.raises(ValueError, match="expected sampling to be one of uniform, segment, keyframes, got 'random'"):
        _sample(clip("bframes.mp4"), 4, "random")


def test_short_video_of_keyframes_warned_about_once(tmp_path):
    path = write_clip(tmp_path / "short.mp4", FRAMES[:2], options={"g": "1"})
    assert _sample(path, 4, "keyframes") == (
        [0, 0, 1, 1],
        ["the video has 2 frames and the model takes 4: frames repeat"],
    )

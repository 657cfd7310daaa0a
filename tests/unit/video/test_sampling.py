"""Which frames are sampled, and the warnings about them."""

from fractions import Fraction

import numpy as np
import pytest

from handler.video import EmptyPartError, open_video, sample_frames, sample_uniform, sample_views
from handler.video.sampling import sample_dense, sample_segments
from handler.views import Views
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
    with pytest.raises(ValueError, match="sampling must be one of uniform, segment, keyframes, dense, got 'random'"):
        _sample(clip("bframes.mp4"), 4, "random")


def test_short_video_of_keyframes_warned_about_once(tmp_path):
    path = write_clip(tmp_path / "short.mp4", FRAMES[:2], options={"g": "1"})
    assert _sample(path, 4, "keyframes") == (
        [0, 0, 1, 1],
        ["the video has 2 frames and the model takes 4: frames repeat"],
    )


# Several clips and parts of a video


def original_indices(frame_count, num_frames, stride, clips):
    """The frames that DMVR's sample_linspace_sequence and sample_sequence gather from a repeated video."""
    last = max(0, frame_count - num_frames * stride)
    offsets = np.linspace(np.float32(0), np.float32(last), clips, dtype=np.float32) if clips > 1 else [last // 2]
    repeated = list(range(frame_count)) * (num_frames * stride // frame_count + 2)
    return [repeated[int(offset) : int(offset) + num_frames * stride : stride] for offset in offsets]


@pytest.mark.parametrize("frame_count", [1, 5, 31, 62, 63, 64, 65, 70, 250, 301, 100_003])
@pytest.mark.parametrize("clips", [1, 2, 3, 4, 5, 10])
def test_dense_frames_are_those_of_the_original(frame_count, clips):
    for num_frames, stride in ((32, 2), (32, 1), (16, 4)):
        found = sample_dense(frame_count, num_frames, stride_frames=stride, clips=clips)
        assert found.dtype == np.int64
        assert found.tolist() == original_indices(frame_count, num_frames, stride, clips)


@pytest.mark.parametrize("sampling", ["uniform", "segment", "keyframes"])
def test_clips_divide_the_part_of_a_video(clip, sampling):
    with open_video(clip("bframes.mp4")) as video:
        count, end_s = video.info.frame_count, float(video.pts_s[-10])
        options = {"sampling": sampling, "start_s": float(video.pts_s[8]), "end_s": end_s}
        together, _ = sample_views(video, Views(clips=3, **options), num_frames=4)
        borders = [8 + part * (count - 18) // 3 for part in range(4)]
        for row, first, stop in zip(together, borders, borders[1:]):
            assert sampling == "keyframes" or (first <= row.min() and row.max() < stop)
            part = {**options, "start_s": float(video.pts_s[first]), "end_s": float(video.pts_s[stop])}
            alone, _ = sample_views(video, Views(**part), num_frames=4)
            assert sampling == "keyframes" or row.tolist() == alone[0].tolist()
        if sampling == "keyframes":
            assert set(together.ravel().tolist()) <= {index for index in video.keyframes if 8 <= index < count - 10}


def test_part_of_a_video_is_half_open(clip):
    with open_video(clip("bframes.mp4")) as video:
        times = video.pts_s.tolist()
        indices, _ = sample_views(video, Views(start_s=times[5], end_s=times[9]), num_frames=4)
        assert indices.tolist() == [[5, 6, 7, 8]]
        indices, _ = sample_views(video, Views(start_s=round(times[5], 6), end_s=round(times[9], 6)), num_frames=4)
        assert indices.tolist() == [[5, 6, 7, 8]]
        dense = Views(clips=2, sampling="dense", stride_frames=2, start_s=times[5], end_s=times[15])
        assert sample_views(video, dense, num_frames=4)[0].tolist() == [[5, 7, 9, 11], [7, 9, 11, 13]]
        for start_s, end_s in ((times[-1] + 0.01, None), (1e6, 2e6), (times[5] + 1e-3, times[6] - 1e-3)):
            with pytest.raises(EmptyPartError, match="expected a frame from"):
                sample_views(video, Views(start_s=start_s, end_s=end_s), num_frames=4)

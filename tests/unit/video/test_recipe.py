"""The functions of the ViViT example in transformers' documentation, compared with the original example."""

import av
import numpy as np
import pytest

from handler.video import FrameIndexError, read_video_pyav, sample_frame_indices


def recipe_indices(clip_len, frame_sample_rate, seg_len):
    converted_len = int(clip_len * frame_sample_rate)
    end_idx = np.random.randint(converted_len, seg_len)
    start_idx = end_idx - converted_len
    indices = np.linspace(start_idx, end_idx, num=clip_len)
    return np.clip(indices, start_idx, end_idx - 1).astype(np.int64)


def recipe_frames(container, indices):
    frames = []
    container.seek(0)
    for i, frame in enumerate(container.decode(video=0)):
        if i > indices[-1]:
            break
        if i >= indices[0] and i in indices:
            frames.append(frame)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.mark.parametrize("arguments", [(32, 1, 300), (32, 4, 300), (8, 2.5, 21), (10, 1, 11), (1, 1, 2)])
def test_sample_frame_indices(arguments):
    for seed in range(20):
        np.random.seed(seed)
        expected = [recipe_indices(*arguments) for _ in range(3)]
        np.random.seed(seed)
        indices = [sample_frame_indices(*arguments) for _ in range(3)]
        np.testing.assert_array_equal(indices, expected)
        assert indices[0].dtype == np.int64


@pytest.mark.parametrize("seg_len", [0, 31, 32])
def test_sample_frame_indices_rejects_short_video(seg_len):
    with pytest.raises(ValueError, match=f"more than 32 x 1 = 32 frames, got {seg_len}"):
        sample_frame_indices(clip_len=32, frame_sample_rate=1, seg_len=seg_len)


@pytest.mark.parametrize("name", ["bframes.mp4", "vp8_odd_size.webm", "mpeg4.avi", "animated.gif"])
@pytest.mark.parametrize("indices", [np.arange(3, 19), [5, 5, 7, 9], [30], [0, 39], [38, 39, 40], [5, 3, 9]])
def test_read_video_pyav(clip, name, indices):
    with av.open(str(clip(name))) as container:
        expected = recipe_frames(container, indices)
        for _ in range(2):  # it rewinds the container
            frames = read_video_pyav(container, indices)
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("indices", [[], [40, 41], [9, 3]])
def test_read_video_pyav_rejects_missing_frames(clip, indices):
    with av.open(str(clip("bframes.mp4"))) as container, pytest.raises(FrameIndexError, match="expected"):
        read_video_pyav(container, indices)

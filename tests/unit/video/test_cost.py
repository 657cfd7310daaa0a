"""The estimate of the work of decoding, and its limit."""

import pytest

from handler.video import DecodingTooExpensiveError, Limits, Postponed, open_video, sample_uniform
from handler.video.cost import pixel_factor
from tests.support.hostile_clips import slow_gif

PIXELS = 128 * 96


def test_small_file_of_many_large_frames_rejected():
    with (
        pytest.raises(DecodingTooExpensiveError, match=r"at most 40 .*, got .*: 2800 gif frames of 4000x4000"),
        open_video(slow_gif(1400), limits=Limits(max_decode_gigapixels=40)),
    ):
        pass


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
def test_limit(clip, name):
    with open_video(clip(name)) as video:
        indices = sample_uniform(video.info.frame_count, 8)
        estimate = video.decode_gigapixels(indices)
        video.decode(indices)
        decoded = video.decoded_frames * PIXELS * pixel_factor(video.info.codec) / 1e9
    with open_video(clip(name), limits=Limits(max_decode_gigapixels=decoded + estimate)) as video:
        assert len(video.decode(indices)) == 8
    with (
        pytest.raises(DecodingTooExpensiveError, match="expected at most"),
        open_video(clip(name), limits=Limits(max_decode_gigapixels=0.9 * estimate)) as video,
    ):
        video.decode(indices)


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
def test_postponed(clip, name):
    gigapixels = 40 * PIXELS / 1e9
    with pytest.raises(Postponed) as caught, open_video(clip(name), postpone_above_gigapixels=gigapixels / 2) as video:
        next(video.frames(range(40)))
    assert caught.value.gigapixels >= gigapixels

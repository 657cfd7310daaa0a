"""The estimate of the work of decoding, and its limits."""

import av
import numpy as np
import pytest

from handler.video import DecodingTooExpensiveError, Limits, Postponed, open_video, sample_uniform
from handler.video.container import ACCEPTED_CODECS
from handler.video.cost import DecodingBudget
from tests.support.clips import write_clip
from tests.support.hostile_clips import slow_gif
from tests.support.video_files import FRAMES, INDEXED, INDEXED_MISLEADING, SEQUENTIAL, x264


def gigapixels(path, *, frame_count):
    with av.open(str(path)) as container:
        budget = DecodingBudget(container.streams.video[0].codec_context, Limits())
        return budget.gigapixels(frame_count=frame_count)


def corrupted_middle(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    return bytes(data)


@pytest.mark.parametrize("name", [*INDEXED, *INDEXED_MISLEADING, *SEQUENTIAL])
def test_estimate_is_one_to_two_times_what_is_decoded(clip, name):
    with open_video(clip(name)) as video:
        indices = sample_uniform(video.info.frame_count, 8)
        estimate, opened = video.decode_gigapixels(indices), video.decoded_frames
        video.decode(indices)
        decoded = video.decoded_frames - opened
    assert gigapixels(clip(name), frame_count=decoded) <= estimate + 1e-12
    # Frames that no other frame refers to are skipped: up to half of them here. Frames of AV1 that are decoded but not
    # shown are not counted.
    factor = 5 if "av1" in name else 2
    assert gigapixels(clip(name), frame_count=factor * decoded) >= estimate


def test_work_of_codecs():
    def per_pixel(codec):
        coded = av.CodecContext.create(codec, "r")
        coded.width, coded.height = 1000, 1000
        budget = DecodingBudget(coded, Limits())
        return 1000 * budget.gigapixels(frame_count=1)

    assert per_pixel("h264") == 1
    assert all(0.1 <= per_pixel(codec) <= 12 for codec in ACCEPTED_CODECS)


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
@pytest.mark.parametrize("thread_count", [1, 3])
def test_limit_checked_before_decoding(clip, name, thread_count):
    with open_video(clip(name)) as video:
        opened = video.decoded_frames
        work = gigapixels(clip(name), frame_count=opened) + video.decode_gigapixels(range(40))
    limits = Limits(max_decode_gigapixels=1.2 * work)
    with open_video(clip(name), limits=limits, thread_count=thread_count) as video:
        assert len(video.decode(range(40))) == 40
    limits = Limits(max_decode_gigapixels=0.9 * work)
    with (
        pytest.raises(DecodingTooExpensiveError, match=r"at most .* gigapixels .* 128x96, codec \w+"),
        open_video(clip(name), limits=limits, thread_count=thread_count) as video,
    ):
        opened = video.decoded_frames
        try:
            video.decode(range(40))
        finally:
            assert video.decoded_frames == opened


def test_small_file_of_many_large_frames_rejected():
    with (
        pytest.raises(DecodingTooExpensiveError, match="at most 16 .*, got 44.8: 2800 frames of 4000x4000, codec gif"),
        open_video(slow_gif(1400), limits=Limits(max_decode_gigapixels=16)),
    ):
        pass


def test_limit_holds_when_the_index_is_wrong(clip):
    """A file that seems cheap because of its index is not decoded sequentially at any cost."""
    data = corrupted_middle(clip("bframes.mp4"))
    with open_video(data) as video:
        work = video.decode_gigapixels([18])
        video.decode([18])
        assert not video.is_indexed and video.decoded_frames > 40
    with (
        open_video(data, limits=Limits(max_decode_gigapixels=2 * work)) as video,
        pytest.raises(DecodingTooExpensiveError),
    ):
        video.decode([18])
    assert video.decoded_frames < 15


def test_limit_counts_frames_larger_than_the_header_states(tmp_path):
    small = write_clip(tmp_path / "small.ts", FRAMES[:20], **x264())
    large = write_clip(tmp_path / "large.ts", np.full((20, 480, 640, 3), 90, np.uint8), **x264())
    limits = Limits(max_decode_gigapixels=6 * 480 * 640 / 1e9)
    data = small.read_bytes() + large.read_bytes()
    with pytest.raises(DecodingTooExpensiveError, match="26 frames of 640x480"), open_video(data, limits=limits):
        pass


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
def test_postponed(clip, name):
    work = gigapixels(clip(name), frame_count=40)
    with pytest.raises(Postponed) as caught, open_video(clip(name), postpone_above_gigapixels=work / 2) as video:
        next(video.frames(range(40)))
    assert caught.value.gigapixels >= work

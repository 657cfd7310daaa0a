"""From an upload to a clip: sampled, decoded, resized, under limits and with few pictures in memory."""

import dataclasses

import numpy as np
import pytest

from handler.clips import ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.video import FrameTooLargeError, Limits, Video, decode_frames, sample_uniform
from tests.support.clips import numbered_frames, write_clip

GEOMETRY = ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32))
SETTINGS = ClipSettings(num_frames=8, resize_crop=GEOMETRY)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0"}
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4", numbered_frames(60), options=options)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_clip_is_evenly_sampled_decoded_resized_and_cropped(video, threads):
    clip = load_clip(video, SETTINGS, threads=threads)
    expected = GEOMETRY.resize_and_crop(decode_frames(video, sample_uniform(60, 8)))
    np.testing.assert_array_equal(clip.pixels[0], expected)
    assert clip.pixels.flags.c_contiguous and clip.warnings == ()
    np.testing.assert_allclose(clip.times_s, sample_uniform(60, 8) / 25)


def test_a_file_that_lies_midway_gives_the_frames_of_decoding_everything(tmp_path, video):
    data = bytearray(video.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    clip = load_clip(path, SETTINGS, threads=3)
    expected = GEOMETRY.resize_and_crop(decode_frames(path, sample_uniform(clip.info.frame_count, 8)))
    np.testing.assert_array_equal(clip.pixels[0], expected)
    assert clip.warnings


def test_a_short_video_repeats_frames_and_says_so(tmp_path):
    path = write_clip(tmp_path / "short.mp4", numbered_frames(3))
    clip = load_clip(path, SETTINGS)
    assert len(np.unique(clip.pixels[0], axis=0)) == 3
    assert clip.warnings == ("the video has 3 frames and the model takes 8: frames repeat",)


def test_sampling_keyframes_takes_the_nearest_and_tells_their_times(video):
    clip = load_clip(video, ClipSettings(num_frames=3, resize_crop=GEOMETRY, sampling="keyframes"))
    np.testing.assert_allclose(clip.times_s * 25, [10, 30, 50])
    np.testing.assert_array_equal(clip.pixels[0], GEOMETRY.resize_and_crop(decode_frames(video, [10, 30, 50])))
    assert clip.warnings == ()


def test_sampling_keyframes_says_when_there_are_too_few(video):
    clip = load_clip(video, ClipSettings(num_frames=8, resize_crop=GEOMETRY, sampling="keyframes"))
    assert clip.warnings == ("the video has 6 keyframes to sample and the model takes 8: frames repeat",)


def test_limits_are_obeyed(video):
    limits = Limits(max_frame_pixels=100)
    with pytest.raises(FrameTooLargeError):
        load_clip(video, ClipSettings(num_frames=8, resize_crop=GEOMETRY, limits=limits))


def test_a_frame_that_would_become_too_large_when_resized_is_refused(tmp_path):
    path = write_clip(tmp_path / "wide.mp4", numbered_frames(8, height=2, width=400))
    limits = Limits(max_frame_pixels=100_000)
    with pytest.raises(FrameTooLargeError, match="400x2, which the image processor resizes to 8000x40"):
        load_clip(path, ClipSettings(num_frames=8, resize_crop=GEOMETRY, limits=limits))
    squashed = dataclasses.replace(GEOMETRY, resize_to=(40, 40))
    assert load_clip(path, ClipSettings(num_frames=8, resize_crop=squashed, limits=limits)).info.width == 400


@pytest.mark.parametrize("threads", [1, 2])
def test_few_pictures_wait_to_be_resized(video, threads, monkeypatch):
    waiting, most = set(), 0
    resize_and_crop_frame, to_rgb = ResizeCrop.resize_and_crop_frame, Video.frames

    def decoding(self, *args, **options):
        nonlocal most
        for number, item in enumerate(to_rgb(self, *args, **options)):
            waiting.add(number)
            most = max(most, len(waiting))
            yield item

    def resizing(self, picture):
        resized = resize_and_crop_frame(self, picture)
        waiting.pop()
        return resized

    monkeypatch.setattr(Video, "frames", decoding)
    monkeypatch.setattr(ResizeCrop, "resize_and_crop_frame", resizing)
    load_clip(video, ClipSettings(num_frames=40, resize_crop=GEOMETRY), threads=threads)
    assert most <= 2 * threads + 1 and not waiting


def test_decoded_frames_are_the_wanted_ones_and_those_they_refer_to(tmp_path):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
    path = write_clip(tmp_path / "a.mp4", numbered_frames(60), options=options)
    settings = ClipSettings(num_frames=6, resize_crop=GEOMETRY)  # the frames 5, 15, 25, ...
    assert load_clip(path, settings).decoded_frames == 6 * 6
    assert load_clip(path, dataclasses.replace(settings, sampling="keyframes")).decoded_frames == 6

"""From an upload to a clip: sampling, decoding, resizing, cropping, limits, and few frames in memory."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from handler.clips import ClipLoader, ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.video import FrameTooLargeError, Limits, Postponed, Video, VideoError, decode_frames, sample_uniform
from handler.views import Views
from tests.support.clips import numbered_frames, remux, write_clip

ROOT = Path(__file__).resolve().parents[2]
RESIZE_CROP = ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32))
SETTINGS = ClipSettings(num_frames=8, resize_crop=RESIZE_CROP)
KEYFRAMES = Views(sampling="keyframes")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"}
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4", numbered_frames(60), options=options)


@pytest.mark.parametrize("threads", [1, 3])
def test_clip(video, threads):
    clip = load_clip(video, SETTINGS, threads=threads)
    expected = RESIZE_CROP.resize_and_crop(decode_frames(video, sample_uniform(60, 8)))
    np.testing.assert_array_equal(clip.pixels, expected[None])
    assert clip.pixels.flags.c_contiguous and clip.warnings == () and clip.info.frame_count == 60
    np.testing.assert_allclose(clip.times_s, sample_uniform(60, 8) / 25)
    assert clip.decode_s > 0 and clip.resize_s > 0


def cropped(resized, crop):
    """A part of resized frames (T, H, W, 3) as a model input."""
    top, left, height, width = crop
    return resized[:, top : top + height, left : left + width].transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    "height, width, crops",
    [
        (144, 176, [(4, 0), (4, 8), (4, 16)]),  # 40 x 48
        (176, 90, [(0, 4), (23, 4), (46, 4)]),  # 78 x 40
        (92, 178, [(4, 0), (4, 23), (4, 45)]),  # 40 x 77: rounded up
        (48, 48, [(4, 0), (4, 4), (4, 8)]),
        (32, 320, [(4, 0), (4, 184), (4, 368)]),  # 40 x 400: gaps between the crops
    ],
)
def test_twelve_views_share_decoded_frames(tmp_path, height, width, crops):
    path = write_clip(tmp_path / "a.mp4", numbered_frames(50, height=height, width=width))
    clip = load_clip(path, SETTINGS, views=Views(clips=4, crops=3, sampling="dense", stride_frames=3), threads=2)
    whole = dataclasses.replace(RESIZE_CROP, crop_to=None)
    assert len(clip.views) == len(clip.inputs) == 12
    decoded = set()
    for number, (view, pixels) in enumerate(zip(clip.views, clip.pixels)):
        offset = (0, 8, 17, 26)[number // 3]
        assert view.frame_indices.dtype == np.int64
        assert view.frame_indices.tolist() == list(range(offset, offset + 24, 3))
        assert view.crop == (*crops[number % 3], 32, 32)
        np.testing.assert_allclose(view.times_s, view.frame_indices / 25)
        resized = whole.resize_and_crop(decode_frames(path, view.frame_indices)).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(pixels, cropped(resized, view.crop))
        decoded |= set(view.frame_indices.tolist())
    assert len(clip.frames) == len(decoded) < 32
    assert clip.frames.nbytes <= 3 * len(decoded) * 3 * 32 * 32  # no more than the crops


def test_crops_without_room_are_warned_about(video):
    settings = dataclasses.replace(SETTINGS, resize_crop=ResizeCrop(resize_to=(32, 32), resample=2, crop_to=None))
    clip = load_clip(video, settings, views=Views(crops=3))
    assert clip.warnings == ("the 3 crops are the same: resized frames have no more than one crop",)
    np.testing.assert_array_equal(clip.pixels, np.repeat(load_clip(video, settings).pixels, 3, axis=0))


def test_corrupt_file_same_as_sequential_decoding(tmp_path, video):
    data = bytearray(video.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path = tmp_path / "corrupt.mp4"
    path.write_bytes(data)
    clip = load_clip(path, SETTINGS, threads=3)
    expected = RESIZE_CROP.resize_and_crop(decode_frames(path, sample_uniform(clip.info.frame_count, 8)))
    np.testing.assert_array_equal(clip.pixels[0], expected)
    assert clip.warnings


def test_warnings_of_sampling_and_decoding(tmp_path):
    short = write_clip(tmp_path / "short.mp4", numbered_frames(3))
    clip = load_clip(remux(tmp_path / "two.mp4", short, short), SETTINGS)
    assert len(np.unique(clip.pixels[0], axis=0)) == 3
    assert clip.warnings == (
        "the file has 2 video streams: 0 (176x144), 1 (176x144); stream 0 is used",
        "the video has 3 frames and the model takes 8: frames repeat",
    )


def test_sampling_and_stream_settings(tmp_path, video):
    path = remux(tmp_path / "two.mp4", video, video, default_source=1)
    settings = ClipSettings(num_frames=3, resize_crop=RESIZE_CROP, video_stream="best")
    clip = load_clip(path, settings, views=KEYFRAMES)
    assert clip.info.stream == 1 and clip.decoded_frames == 3
    np.testing.assert_allclose(clip.times_s * 25, [10, 30, 50])


def test_decoded_frames(video):
    settings = ClipSettings(num_frames=6, resize_crop=RESIZE_CROP)  # frames 5, 15, 25, ...
    assert load_clip(video, settings).decoded_frames == 6 * 6
    assert load_clip(video, settings, views=KEYFRAMES).decoded_frames == 6


def test_limits(tmp_path, video):
    settings = dataclasses.replace(SETTINGS, limits=Limits(max_frame_pixels=100_000))
    assert load_clip(video, settings).info.width == 176
    with pytest.raises(FrameTooLargeError):
        load_clip(video, dataclasses.replace(SETTINGS, limits=Limits(max_frame_pixels=100)))
    wide = write_clip(tmp_path / "wide.mp4", numbered_frames(8, height=2, width=400))
    with pytest.raises(FrameTooLargeError, match="400x2, which the image processor resizes to 8000x40"):
        load_clip(wide, settings)
    squashed = dataclasses.replace(settings, resize_crop=dataclasses.replace(RESIZE_CROP, resize_to=(40, 40)))
    assert load_clip(wide, squashed).info.width == 400


@pytest.mark.parametrize("threads", [1, 2])
def test_few_frames_in_memory_before_resizing(video, threads, monkeypatch):
    waiting, most = set(), 0
    resize_and_crop_frame, decode = ResizeCrop.resize_and_crop_frame, Video.frames

    def decoding(self, *args, **options):
        nonlocal most
        for number, item in enumerate(decode(self, *args, **options)):
            waiting.add(number)
            most = max(most, len(waiting))
            yield item

    def resizing(self, frame, crop):
        resized = resize_and_crop_frame(self, frame, crop)
        waiting.pop()
        return resized

    monkeypatch.setattr(Video, "frames", decoding)
    monkeypatch.setattr(ResizeCrop, "resize_and_crop_frame", resizing)
    load_clip(video, ClipSettings(num_frames=40, resize_crop=RESIZE_CROP), threads=threads)
    assert most <= 2 * threads + 1 and not waiting


def test_no_memory_for_threads(video):
    """Starting a thread without memory can block forever, so threads must exist before memory runs out."""
    code = (
        "import pathlib, resource, signal, sys; from handler.clips import *; from handler.processing.resize import *\n"
        "settings = ClipSettings(num_frames=8, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "load_clip(data, settings)\n"  # everything is imported
        "with ClipLoader(settings, threads=3) as loader:\n"
        "    used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))\n"
        "    signal.alarm(20)\n"
        "    try:\n"
        "        loader.load(data)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, str(video)], env=environment, check=True, capture_output=True)
    assert run.stdout.decode().strip() in ("MemoryError", "CorruptVideoError")


def test_loader_same_as_load_clip(video, tmp_path):
    other = write_clip(tmp_path / "other.avi", numbered_frames(20, height=40, width=60, seed=1), codec="mpeg4")
    with ClipLoader(SETTINGS, threads=3) as loader:
        for threads in (3, 1, None, 9):
            for path in (video, other):
                np.testing.assert_array_equal(
                    loader.load(path, threads=threads).pixels, load_clip(path, SETTINGS).pixels
                )
        with pytest.raises(VideoError):
            loader.load(b"no video")
        with pytest.raises(Postponed) as caught:
            loader.load(video, postpone_above_gigapixels=1e-9)
        assert caught.value.gigapixels == pytest.approx(40 * 176 * 144 / 1e9)
        assert loader.load(video).warnings == ()

"""Decoded frames are upright."""

import av
import numpy as np
import pytest

from handler.video import decode_frames, probe
from tests.support.clips import write_clip
from tests.support.video_files import FRAMES, plain, svt_av1, vpx, x265


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize(("suffix", "mirrored"), [("mp4", 0), ("mp4", 1), ("mkv", 0)])
def test_rotated_frames_upright(tmp_path, suffix, rotation, mirrored):
    path = write_clip(tmp_path / f"rotated.{suffix}", FRAMES[:3], rotation=rotation, mirrored=mirrored)
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    mirrored_frames = [frame[:, ::-1] if mirrored else frame for frame in stored]
    expected = [np.rot90(frame, -rotation // 90) for frame in mirrored_frames]  # rot90 is counter-clockwise
    info = probe(path)
    assert (info.height, info.width, 3) == expected[0].shape and info.rotation == rotation
    np.testing.assert_array_equal(decode_frames(path, range(3)), expected)


@pytest.mark.parametrize("encoding", [{}, svt_av1(), vpx("libvpx-vp9"), x265(""), plain("mpeg4")])
def test_left_edge_becomes_top_after_clockwise_rotation(tmp_path, encoding):
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, :, :32] = 255
    path = write_clip(tmp_path / "marker.mp4", frames, rotation=90, **encoding)
    upright = decode_frames(path, [0])[0]
    assert probe(path).rotation == 90 and upright.shape == (96, 64, 3)
    assert upright[:24].min() > 200 and upright[40:].max() < 50

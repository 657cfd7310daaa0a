"""Joined videos, changing parameter sets, hidden frames."""

import av
import numpy as np
import pytest

from handler.clips import ClipSettings, load_clip
from handler.processing.resize import ResizeCrop
from handler.video import UnsupportedContainerError, open_video, probe
from tests.support.clips import concatenate, encoded_picture, numbered_frames, remux, with_data, write_clip

FRAMES = numbered_frames(30, height=64, width=80)
OTHER_FRAMES = numbered_frames(30, height=64, width=80, seed=1)


def x264(params):
    return {"options": {"x264-params": f"keyint=12:min-keyint=12:scenecut=0:{params}"}}


def x265(params):
    return {"codec": "libx265", "options": {"x265-params": f"log-level=0:pools=1:keyint=12:min-keyint=12:{params}"}}


def every_frame(path):
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_exact(path, *, is_indexed):
    expected = every_frame(path)
    count = len(expected)
    for thread_count in (1, 3):
        for indices in ([count - 1], *([i] for i in range(0, count, 3)), range(count), range(1, count, 7)):
            with open_video(path, thread_count=thread_count) as video:
                assert video.info.frame_count == count
                frames = video.decode(indices)
                assert (video.keyframes is not None) == is_indexed
            for frame, index in zip(frames, indices):
                np.testing.assert_array_equal(frame, expected[index], f"frame {index} of {indices}")


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
@pytest.mark.parametrize("overlap_frames, is_indexed", [(0, True), (2.5, False)])
def test_joined_at_closed_gops(tmp_path, suffix, overlap_frames, is_indexed):
    parts = [
        write_clip(tmp_path / f"{i}.mp4", frames, **x264("open-gop=0:bframes=3"))
        for i, frames in enumerate((FRAMES, OTHER_FRAMES))
    ]
    path = concatenate(tmp_path / f"joined.{suffix}", *parts, overlap_s=overlap_frames / 25)
    assert_exact(path, is_indexed=is_indexed)


def _units(data, length_bytes):
    """The NAL units of a packet."""
    if length_bytes == 0:
        return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1") if unit.rstrip(b"\0")]
    units = []
    while data:
        size = int.from_bytes(data[:length_bytes], "big")
        units.append(data[length_bytes : length_bytes + size])
        data = data[length_bytes + size :]
    return units


def _packet_data(units, length_bytes):
    return b"".join((len(u).to_bytes(length_bytes, "big") if length_bytes else b"\0\0\0\1") + u for u in units)


def _is_parameter_set(unit, codec):
    return unit[0] & 31 in (7, 8) if codec == "h264" else unit[0] >> 1 in (32, 33, 34)


@pytest.mark.parametrize(
    "codec, suffix, repeated",
    # FFmpeg's TS muxer repeats the parameter sets of H.264 itself.
    [("h264", "mkv", False), ("hevc", "ts", False), ("h264", "ts", True), ("hevc", "mkv", True)],
)
def test_parameter_sets_change(tmp_path, codec, suffix, repeated):
    encodings = {
        "h264": [x264("bframes=2"), x264("bframes=2:chroma-qp-offset=9:no-8x8dct=1")],
        "hevc": [x265("bframes=2:repeat-headers=1"), x265("bframes=2:cbqpoffs=9:crqpoffs=-9:repeat-headers=1")],
    }[codec]
    parts = [
        write_clip(tmp_path / f"{i}.ts", frames, **encoding)
        for i, (frames, encoding) in enumerate(zip((FRAMES, OTHER_FRAMES), encodings))
    ]
    template = write_clip(tmp_path / f"template.{suffix}", FRAMES, **encodings[0])
    length_bytes = 0 if suffix == "ts" else 4

    def edit(part, i, packet):
        units = _units(bytes(packet), 0)
        if i > 0 and not repeated:
            units = [unit for unit in units if not _is_parameter_set(unit, codec)]
        return with_data(packet, _packet_data(units, length_bytes))

    path = tmp_path / f"joined.{suffix}"
    concatenate(path, *parts, edit=edit, template=template)
    assert_exact(path, is_indexed=repeated)


def _hidden(packet):
    """A keyframe of VP9 that is not shown."""
    return with_data(packet, bytes([bytes(packet)[0] & ~2]) + bytes(packet)[1:])


@pytest.mark.parametrize("suffix", ["webm", "mp4"])
@pytest.mark.parametrize("is_superframe", [False, True])
def test_hidden_vp9_frames(tmp_path, suffix, is_superframe):
    options = {"g": "10", "deadline": "realtime", "cpu-used": "8", "error-resilient": "1", "auto-alt-ref": "0"}
    whole = write_clip(tmp_path / "whole.webm", FRAMES, codec="libvpx-vp9", options=options)

    def edit(i, packet):
        if i in (10, 20):
            assert packet.is_keyframe
            return _hidden(packet)
        return with_data(packet, b"\x88") if i == 12 else packet  # show_existing_frame

    # FFmpeg's muxers would merge a hidden frame and the next one to a superframe.
    muxing = {} if is_superframe else {"fflags": "-autobsf"}
    path = remux(tmp_path / f"hidden.{suffix}", whole, edit=edit, container_options=muxing)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux()) == (28 if is_superframe else 30)
    assert len(every_frame(path)) == 28
    assert_exact(path, is_indexed=True)


SETTINGS = ClipSettings(num_frames=4, resize_crop=ResizeCrop(resize_to=40, resample=2, crop_to=(32, 32)))


def _settings(**changes):
    return ClipSettings(num_frames=4, resize_crop=SETTINGS.resize_crop, **changes)


def test_keyframe_sampling_without_shown_keyframe(tmp_path):
    def edit(i, packet):
        packet.pts -= 3 * packet.duration
        packet.dts -= 3 * packet.duration
        return packet

    whole = write_clip(tmp_path / "whole.mp4", FRAMES[:10], **x264("bframes=0"))
    path = remux(tmp_path / "cut.mp4", whole, edit=edit)
    clip = load_clip(path, _settings(sampling="keyframes"))
    assert clip.warnings == ("the video shows no keyframe: frames are sampled uniformly",)
    np.testing.assert_array_equal(clip.pixels, load_clip(path, _settings()).pixels)


def test_several_video_streams(tmp_path):
    small = write_clip(tmp_path / "small.mp4", FRAMES[:8])
    large = write_clip(tmp_path / "large.mp4", numbered_frames(8, height=96, width=128))
    path = remux(tmp_path / "two.mp4", small, large, default_source=1)
    warning = "the file has 2 video streams: 0 (80x64), 1 (128x96); stream {} is used"
    for choice, stream, width in (("first", 0, 80), ("best", 1, 128)):
        clip = load_clip(path, _settings(video_stream=choice))
        assert (clip.info.stream, clip.info.width) == (stream, width)
        assert clip.warnings == (warning.format(stream),)
    assert probe(small).stream == 0


def test_frames_far_apart(tmp_path):
    path = write_clip(tmp_path / "slow.mp4", FRAMES[:12], fps=1)
    assert load_clip(path, _settings()).warnings == (
        "sampled frames are up to 3.0 s apart: actions shorter than that may be missed",
    )
    assert load_clip(write_clip(tmp_path / "b.mp4", FRAMES[:8], fps=1), _settings()).warnings == ()


@pytest.mark.parametrize(
    "codec, pix_fmt", [("png", "rgb24"), ("mjpeg", "yuvj420p"), ("bmp", "bgr24"), ("tiff", "rgb24")]
)
def test_image_is_called_image(codec, pix_fmt):
    with pytest.raises(UnsupportedContainerError, match="got an image"):
        probe(encoded_picture(codec, pix_fmt=pix_fmt))

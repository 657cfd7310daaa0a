"""Every file here is made on the spot, by clips.py. The oracle is PyAV, decoding a whole file in order."""

import contextlib
import http.server
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import PacketSideData

from handler.video import (
    CorruptVideoError,
    FrameIndexError,
    FrameTooLargeError,
    Limits,
    NoFramesError,
    NotAVideoError,
    NoVideoStreamError,
    TooManyFramesError,
    UnsupportedCodecError,
    UnsupportedContainerError,
    VideoError,
    VideoTooLongError,
    decode_frames,
    open_video,
    probe,
    read_video_pyav,
    sample_frame_indices,
    sample_uniform,
)
from handler.video import decoder as video_module
from handler.video.bitstream import NalReader
from handler.video.sampling import nearest
from tests.support.clips import (
    audio_only,
    cover_art_only,
    encoded_picture,
    mutated,
    numbered_frames,
    remux,
    subtitles_only,
    with_external_media,
    write_clip,
)

ROOT = Path(__file__).resolve().parents[2]
FRAMES = numbered_frames(40)
ODD_FRAMES = numbered_frames(40, height=143, width=175)
VFR_MS = [40 * i + (7 * i * i) % 31 for i in range(40)]


def x264(params="", **options):
    return {"options": {"x264-params": f"keyint=12:min-keyint=12:scenecut=0:{params}", **options}}


def x265(params):
    always = "log-level=0:pools=1:keyint=12:min-keyint=12"
    return {"codec": "libx265", "options": {"x265-params": f"{always}:{params}"}}


def vpx(codec, **options):
    return {"codec": codec, "options": {"g": "12", "cpu-used": "5", "deadline": "good", **options}}


def plain(codec, pix_fmt="yuv420p", **options):
    return {"codec": codec, "pix_fmt": pix_fmt, "options": {"g": "12", **options}}


ALTREF = {"auto-alt-ref": "1", "lag-in-frames": "12"}
AV1 = {"codec": "libsvtav1", "options": {"g": "12", "preset": "11"}}
OPEN_GOP = "open-gop=1:bframes=3:b-pyramid=normal"

# Files whose packets tell the truth: every frame is found without decoding the whole stream.
TRUSTWORTHY = {
    "bframes.mp4": x264("bframes=3"),
    "bframes.mov": x264("bframes=3"),
    "bframes.mkv": x264("bframes=3"),
    "bframes.ts": x264("bframes=3"),
    "bframes.flv": x264("bframes=3"),
    "no_bframes.mp4": x264("bframes=0"),
    "default_gop.mp4": {},
    "intra_only.mp4": {"options": {"g": "1"}},
    "slices.mp4": x264("slices=4"),
    "open_gop.mp4": x264(OPEN_GOP),
    "open_gop.mkv": x264(OPEN_GOP),
    "open_gop.ts": x264(OPEN_GOP),
    "open_gop_no_leading.mp4": x264("open-gop=1:bframes=5:ref=3:b-adapt=0:keyint=19", preset="ultrafast"),
    "fragmented.mp4": {**x264(), "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "header_first.mp4": {**x264(), "container_options": {"movflags": "faststart"}},
    "10_bit.mp4": {**x264(), "pix_fmt": "yuv420p10le"},
    "444.mp4": {**x264(), "pix_fmt": "yuv444p"},
    "grey.mp4": {**x264(), "pix_fmt": "gray"},
    "full_range.mp4": x264(color_range="pc"),
    "bt709.mp4": x264(colorspace="bt709", color_primaries="bt709", color_trc="bt709"),
    "vfr.mp4": {**x264(), "pts_ms": VFR_MS},
    "vfr.mkv": {**x264(), "pts_ms": VFR_MS},
    "with_audio.mp4": {**x264(), "audio_codec": "aac"},
    "with_audio.ts": {**x264(), "audio_codec": "aac"},
    "two_frames.mp4": {"frames": FRAMES[:2]},
    "hevc.mp4": x265("open-gop=0"),
    "no_bframes_hevc.mkv": x265("bframes=0"),
    "hevc_open_gop.mp4": x265("open-gop=1:bframes=4"),
    "hevc_open_gop.mkv": x265("open-gop=1:bframes=4"),
    "hevc_open_gop.ts": x265("open-gop=1:bframes=4"),
    "hevc_temporal_layers.mp4": x265("temporal-layers=3:bframes=7"),
    "hevc_10_bit.mp4": {**x265(""), "pix_fmt": "yuv420p10le"},
    "vp8.webm": vpx("libvpx"),
    "vp8_altref.webm": vpx("libvpx", **ALTREF),
    "vp8_odd_size.webm": {**vpx("libvpx"), "frames": ODD_FRAMES},
    "vp9.webm": vpx("libvpx-vp9"),
    "vp9_altref.webm": vpx("libvpx-vp9", **ALTREF),
    "vp9_odd_size.webm": {**vpx("libvpx-vp9"), "frames": ODD_FRAMES},
    "vp9_alpha.webm": {**vpx("libvpx-vp9"), "pix_fmt": "yuva420p"},
    "vp9.mp4": vpx("libvpx-vp9"),
    "av1.mp4": AV1,
    "av1.webm": AV1,
    "mjpeg.mov": plain("mjpeg", "yuvj420p"),
    "prores.mov": plain("prores_ks", "yuv422p10le"),
    "prores_alpha.mov": plain("prores_ks", "yuva444p10le"),
}

# Containers and codecs that do not tell frames from packets for certain.
COUNTED = {
    "one_frame.gif": {**plain("gif", "rgb8"), "frames": FRAMES[:1]},
    "animated.gif": plain("gif", "rgb8"),
    "odd_size.gif": {**plain("gif", "rgb8"), "frames": ODD_FRAMES},
    "h264.avi": x264("bframes=2"),
    "h264.mpg": x264("bframes=2"),
    "interlaced.mp4": x264("tff=1"),
    "interlaced.ts": x264("tff=1"),
    "mpeg4.mp4": plain("mpeg4", bf="2"),
    "mpeg4.mkv": plain("mpeg4", bf="2"),
    "mpeg4.avi": plain("mpeg4"),
    "mpeg4_bframes.avi": plain("mpeg4", bf="2"),
    "mpeg4_odd_size.avi": {**plain("mpeg4"), "frames": ODD_FRAMES},
    "mpeg2.ts": plain("mpeg2video", bf="2"),
    "mpeg2.mpg": plain("mpeg2video", bf="2"),
    "mpeg1.mpg": plain("mpeg1video", bf="2"),
    "h263.3gp": plain("h263"),
    "sorenson.flv": plain("flv"),
    "wmv2.wmv": plain("wmv2"),
    "msmpeg4.avi": plain("msmpeg4"),
    "mjpeg.avi": plain("mjpeg", "yuvj420p"),
    "ffv1.mkv": plain("ffv1"),
    "ffv1_odd_size.mkv": {**plain("ffv1"), "frames": ODD_FRAMES},
    "huffyuv.avi": plain("huffyuv", "yuv422p"),
    "utvideo.avi": plain("utvideo", "yuv422p"),
    "qtrle.mov": plain("qtrle", "rgb24"),
    "png.mov": plain("png", "rgb24"),
    "raw.avi": plain("rawvideo", "bgr24"),
    "raw.mov": plain("rawvideo", "yuv422p"),
    "raw_stored_bottom_up.mov": {**plain("rawvideo", "rgb24"), "extradata": b"BottomUp\0"},
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """clip(name) -> path of the file made as TRUSTWORTHY, COUNTED or LYING says, made once."""
    folder = tmp_path_factory.mktemp("clips")
    made = {}

    def make(name):
        if name not in made:
            if name in LYING:
                made[name] = folder / name
                LYING[name](clip=make, path=folder / name)
            else:
                options = {"frames": FRAMES, **{**TRUSTWORTHY, **COUNTED}[name]}
                made[name] = write_clip(folder / name, options.pop("frames"), **options)
        return made[name]

    return make


def every_frame(path):
    """The oracle: all pictures of the first video stream, (height, width, 3) each, turned as PyAV says.

    On one thread, since with several FFmpeg no longer paints over the holes in damaged pictures.
    """
    pictures = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for packet in container.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                for frame in packet.decode():
                    pictures.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
    return pictures


def assert_exact(path, expected):
    """All frames, some, one at a time; on one thread and on several; each of these first, and after others."""
    rng = random.Random(0)
    count = len(expected)
    some = [range(count), sample_uniform(count, 8), [rng.randrange(count) for _ in range(5)], [0], [min(2, count - 1)]]
    alone = [[i] for i in (count // 2, count // 2 + 1, count // 2 + 2, count - 1) if i < count]
    for thread_count in (1, 3):
        for number, first in enumerate(some):
            with open_video(path, thread_count=thread_count) as video:
                assert video.info.frame_count == count == len(video.pts_s)
                for indices in [first, *some[number + 1 :], *alone] if number < 2 else [first]:
                    frames = video.decode(indices)
                    assert frames.dtype == np.uint8 and frames.shape == (len(indices), *expected[0].shape)
                    for frame, index in zip(frames, indices):
                        np.testing.assert_array_equal(frame, expected[index], f"frame {index} of {indices}")
                if number == 0:
                    warnings = video.warnings
    return warnings


@pytest.mark.parametrize("name", [*TRUSTWORTHY, *COUNTED])
def test_frames_are_those_of_sequential_decoding(clip, name):
    assert assert_exact(clip(name), every_frame(clip(name))) == ()


@pytest.mark.parametrize("name", [*TRUSTWORTHY, "edit_list.mp4", "edit_list_hevc.mp4", "not_all_shown.webm"])
def test_a_trustworthy_file_is_never_decoded_as_a_whole(clip, name, monkeypatch):
    monkeypatch.setattr(video_module.Video, "_all_frames", lambda self: pytest.fail("decoded as a whole"))
    with open_video(clip(name)) as video:
        for indices in (sample_uniform(video.info.frame_count, 8), range(video.info.frame_count)):
            video.decode(indices)


def test_a_short_span_of_a_long_video_decodes_little_more_than_that_span(tmp_path):
    path = write_clip(tmp_path / "long.mp4", numbered_frames(600, height=32, width=48), **x264("keyint=100"))
    with open_video(path) as video:
        video.decode(range(310, 342, 4))
        assert 8 <= video.decoded_frames <= 32 + 10  # at most the span, and what is before it in its GOP


def test_several_threads_decode_ranges_decode_in_parallel_and_give_the_same_frames(clip, monkeypatch):
    wanted = [3, 15, 30, 39]  # of "bframes.mp4", which has a keyframe every 12 frames
    with open_video(clip("bframes.mp4")) as video:
        expected, count = video.decode(wanted), video.decoded_frames
    with monkeypatch.context() as patch:
        patch.setattr(video_module.Video, "_decode_one_by_one", lambda *_: pytest.fail("one after the other"))
        with open_video(clip("bframes.mp4"), thread_count=3) as video:
            np.testing.assert_array_equal(video.decode(wanted), expected)
            assert video.decoded_frames == count
    monkeypatch.setattr(video_module, "_MAX_PARALLEL_PIXELS", 1)
    monkeypatch.setattr(video_module.Video, "_decode_in_parallel", lambda *_: pytest.fail("side by side"))
    with open_video(clip("bframes.mp4"), thread_count=3) as video:
        np.testing.assert_array_equal(video.decode(wanted), expected)


# Files whose timestamps, keyframe marks or packets mislead: what counts is what comes out of the decoder.


def _without(box, source):
    def make(clip, path):
        data = clip(source).read_bytes()
        assert box in data
        path.write_bytes(data.replace(box, b"free"))

    return make


def _remuxed(source, edit):
    return lambda clip, path: remux(path, clip(source), edit=edit)


def _bytes_of(source, change):
    return lambda clip, path: path.write_bytes(change(clip(source).read_bytes()))


def _earlier(frames):
    def edit(i, packet):
        packet.pts -= frames * packet.duration
        packet.dts -= frames * packet.duration
        return packet

    return edit


def _marked_as_keyframe(i, packet):
    packet.is_keyframe = True
    return packet


def _from_packet(first):
    return lambda i, packet: packet if i >= first else None


def _ts_packets(first=0.0, last=1.0):
    def cut(data):
        count = len(data) // 188
        return data[188 * int(first * count) : 188 * int(last * count)]

    return cut


def _shown_when_decoded(i, packet):
    packet.pts = packet.dts = i * packet.duration
    return packet


def _not_shown(i, packet):
    """Every seventh packet of VP8 for reference only, as encoders do it in two passes."""
    if i % 7 != 3:
        return packet
    data = bytearray(packet)
    data[0] &= ~0x10
    hidden = av.Packet(bytes(data))
    hidden.pts, hidden.dts, hidden.duration = packet.pts, packet.dts, packet.duration
    hidden.time_base = packet.time_base
    return hidden


def _not_marked_as_keyframe(i, packet):
    packet.is_keyframe = False
    return packet


def _two_at_one_time(i, packet):
    packet.pts += (40 - (i == 21)) * packet.duration  # muxers want no pts before its dts
    return packet


def _scene_changes(clip, path):
    """Intra frames without the right to start from: frames after them refer to frames before them."""
    scenes = [numbered_frames(40, seed=1), numbered_frames(40, seed=2)]
    frames = np.stack([scenes[i // 3 % 2][i] for i in range(40)])
    encoding = x264("keyint=300:min-keyint=300:scenecut=80:bframes=0:ref=8")
    remux(path, write_clip(path.with_suffix(".mp4"), frames, **encoding), edit=_marked_as_keyframe)


def _followed_by_sound(clip, path):
    """Sound begins after more packets than FFmpeg looks through when it opens a file."""
    nothing = b"\x47\x1f\xff\x10" + bytes(184)
    path.write_bytes(clip("bframes.ts").read_bytes() + 30_000 * nothing + clip("with_audio.ts").read_bytes())


LYING = {
    "no_keyframe_table_h264.mp4": _without(b"stss", "bframes.mp4"),
    "no_keyframe_table_hevc.mp4": _without(b"stss", "hevc.mp4"),
    "no_display_times_h264.mp4": _without(b"ctts", "bframes.mp4"),
    "no_display_times_hevc.mp4": _without(b"ctts", "hevc.mp4"),
    "all_keyframes_h264.mkv": _remuxed("bframes.mkv", _marked_as_keyframe),
    "all_keyframes_hevc.mkv": _remuxed("hevc_open_gop.mkv", _marked_as_keyframe),
    "all_keyframes_no_bframes_hevc.mkv": _remuxed("no_bframes_hevc.mkv", _marked_as_keyframe),
    "all_keyframes_vp9.webm": _remuxed("vp9.webm", _marked_as_keyframe),
    "times_of_decoding_h264.mkv": _remuxed("bframes.mp4", _shown_when_decoded),
    "times_of_decoding_hevc.mkv": _remuxed("hevc.mp4", _shown_when_decoded),
    "no_keyframes.mkv": _remuxed("bframes.mkv", _not_marked_as_keyframe),
    "intra_frames_as_keyframes.mkv": _scene_changes,
    "not_all_shown.webm": _remuxed("vp8.webm", _not_shown),
    "two_at_one_time.mkv": _remuxed("no_bframes.mp4", _two_at_one_time),
    "edit_list.mp4": _remuxed("bframes.mp4", _earlier(7)),
    "edit_list_open_gop.mp4": _remuxed("open_gop.mp4", _earlier(15)),
    "edit_list_hevc.mp4": _remuxed("hevc_open_gop.mp4", _earlier(15)),
    "edit_list_vp9.mp4": _remuxed("vp9.mp4", _earlier(7)),
    "intra_refresh.mp4": lambda clip, path: write_clip(path, FRAMES, **x264("intra-refresh=1:bframes=0")),
    "intra_refresh.ts": lambda clip, path: write_clip(path, FRAMES, **x264("intra-refresh=1:bframes=0")),
    "no_keyframe_at_the_start.mkv": _remuxed("bframes.mkv", _from_packet(5)),
    "no_keyframe_at_the_start_hevc.mkv": _remuxed("hevc_open_gop.mkv", _from_packet(5)),
    "no_keyframe_at_the_start.ts": _bytes_of("bframes.ts", _ts_packets(first=0.2)),
    "open_gop_from_its_middle.ts": _bytes_of("open_gop.ts", _ts_packets(first=0.3)),
    "cut_within_a_packet.ts": _bytes_of("bframes.ts", lambda data: data[: len(data) // 2 + 50]),
    "with_a_gap.ts": _bytes_of("bframes.ts", lambda data: _ts_packets(0, 0.3)(data) + _ts_packets(0.5)(data)),
    "twice_the_same_times.ts": _bytes_of("bframes.ts", lambda data: data + data),
    "sound_from_the_middle_on.ts": _followed_by_sound,
    "a_packet_lost.mp4": _remuxed("bframes.mp4", lambda i, packet: None if i == 17 else packet),
    "a_packet_lost.ts": _remuxed("bframes.ts", lambda i, packet: None if i == 17 else packet),
}


@pytest.mark.parametrize("name", LYING)
def test_files_that_mislead_give_the_frames_of_sequential_decoding(clip, name):
    assert_exact(clip(name), every_frame(clip(name)))


@pytest.mark.parametrize("name", ["interlaced.mp4", "interlaced.ts"])
def test_interlaced_video_is_counted_since_two_packets_may_be_one_frame(clip, name, monkeypatch):
    with open_video(clip(name)) as video:
        monkeypatch.setattr(video, "_decode_ranges", lambda *args: pytest.fail("trusted its packets"))
        video.decode([3])


@pytest.mark.parametrize("name", ["no_bframes.mp4", "no_bframes_hevc.mkv", "vp8.webm", "vp9.webm"])
def test_times_swapped_midway_are_noticed_in_codecs_that_keep_the_order(clip, tmp_path, name):
    with av.open(str(clip(name))) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    times[20], times[21] = times[21], times[20]

    def swap(i, packet):
        packet.pts = times[i] + 40 * packet.duration
        return packet

    path = remux(tmp_path / "swapped.mkv", clip(name), edit=swap)
    frames = every_frame(path)
    for wanted in (range(40), [20], [21], [5, 22, 35]):
        np.testing.assert_array_equal(decode_frames(path, wanted), np.stack([frames[i] for i in wanted]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_pictures_renewed_part_by_part_are_those_that_have_seen_all_before(tmp_path, suffix):
    texture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    moving = np.stack([np.roll(texture, 3 * i, 1) for i in range(72)])
    path = write_clip(
        tmp_path / f"refresh.{suffix}", moving, options={"x264-params": "intra-refresh=1:keyint=24:bframes=0"}
    )
    frames = every_frame(path)
    for wanted in (50, 56, 64, 71):
        np.testing.assert_array_equal(decode_frames(path, [wanted])[0], frames[wanted])


@pytest.mark.parametrize("name", ["hevc_open_gop.mp4", "hevc_open_gop.ts"])
def test_bla_pictures_are_unclean_random_access_points(clip, name):
    with av.open(str(clip(name))) as container:
        stream = container.streams.video[0]
        reader = NalReader("hevc", stream.codec_context.extradata)
        keyframes = [packet for packet in container.demux(stream) if packet.is_keyframe][1:]
        assert not any(reader.is_unclean_random_access_point(packet) for packet in keyframes)
        assert all(reader.is_unclean_random_access_point(_as_bla(packet)) for packet in keyframes)


def _as_bla(keyframe):
    """A CRA picture of HEVC, type 21, as one with broken links, type 16."""
    return av.Packet(bytes(keyframe).replace(b"\x2a\x01", b"\x20\x01"))


def test_a_gap_of_lost_frames_is_no_frame(clip):
    assert probe(clip("with_a_gap.ts")).frame_count < probe(clip("bframes.ts")).frame_count


def test_headers_that_change_midway_reach_the_decoder(clip, tmp_path):
    """FLV sends new H.264 headers with a packet; skipping that packet must not lose them."""
    second = write_clip(tmp_path / "second.flv", FRAMES, **x264("chroma-qp-offset=9"))
    path = tmp_path / "joined.flv"
    with av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(av.open(str(clip("bframes.flv"))).streams.video[0])
        for part, source in enumerate((clip("bframes.flv"), second)):
            with av.open(str(source)) as old:
                packets = [packet for packet in old.demux(video=0) if packet.size]
                headers = old.streams.video[0].codec_context.extradata
            side_data = PacketSideData(1, len(headers))  # AV_PKT_DATA_NEW_EXTRADATA
            side_data.update(headers)
            packets[0].set_sidedata(side_data)
            for packet in packets:
                packet.stream = stream
                packet.pts, packet.dts = packet.pts + 2000 * part, packet.dts + 2000 * part
                new.mux(packet)
    assert_exact(path, every_frame(path))


def test_frames_of_another_size_are_scaled_to_the_first_ones(clip, tmp_path):
    small = write_clip(tmp_path / "small.ts", numbered_frames(20, height=96, width=128), **x264())
    path = tmp_path / "sizes.ts"
    path.write_bytes(clip("bframes.ts").read_bytes() + small.read_bytes())
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len({(frame.width, frame.height) for frame in frames}) == 2
    assert_exact(path, [frame.reformat(176, 144, "rgb24").to_ndarray() for frame in frames])


def test_frames_come_in_the_order_asked_for_with_repeats(clip):
    expected = every_frame(clip("bframes.mp4"))
    frames = decode_frames(clip("bframes.mp4"), [39, 0, 17, 17, 3, 39])
    np.testing.assert_array_equal(frames, np.stack([expected[i] for i in (39, 0, 17, 17, 3, 39)]))


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
def test_no_indices_give_no_frames(clip, name):
    assert decode_frames(clip(name), []).shape == (0, 144, 176, 3)


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi"])
@pytest.mark.parametrize("indices", [[40], [0, -1], [1.0], [[1, 2]], [True]])
def test_an_index_that_is_no_frame_of_the_video_is_an_index_error(clip, name, indices):
    with pytest.raises(IndexError, match="expected") as caught:
        decode_frames(clip(name), indices)
    assert isinstance(caught.value, FrameIndexError) and caught.value.code == "frame_index"


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_and_path_give_the_same(clip, wrap):
    data = wrap(clip("bframes.mp4").read_bytes())
    assert probe(data) == probe(clip("bframes.mp4")) == probe(str(clip("bframes.mp4")))
    np.testing.assert_array_equal(decode_frames(data, [7, 30]), decode_frames(clip("bframes.mp4"), [7, 30]))


# What probe says.


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("bframes.mp4", "h264", "mov,mp4,m4a,3gp,3g2,mj2"),
        ("hevc_open_gop.mkv", "hevc", "matroska,webm"),
        ("hevc_open_gop.ts", "hevc", "mpegts"),
        ("vp8.webm", "vp8", "matroska,webm"),
        ("vp9.webm", "vp9", "matroska,webm"),
        ("av1.webm", "av1", "matroska,webm"),
        ("fragmented.mp4", "h264", "mov,mp4,m4a,3gp,3g2,mj2"),
        ("bframes.flv", "h264", "flv"),
        ("mpeg4.avi", "mpeg4", "avi"),
        ("mpeg2.mpg", "mpeg2video", "mpeg"),
        ("animated.gif", "gif", "gif"),
    ],
)
def test_probe_says_what_is_in_the_file(clip, name, codec, container):
    info = probe(clip(name))
    assert (info.frame_count, info.width, info.height, info.rotation) == (40, 176, 144, 0)
    assert (info.codec, info.container) == (codec, container)
    assert info.duration_s == pytest.approx(40 / 25, abs=0.002)
    assert info.fps == pytest.approx(25, rel=0.002)


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_variable_frame_rate_keeps_its_times(clip, name):
    with open_video(clip(name)) as video:
        np.testing.assert_allclose(video.pts_s, np.array(VFR_MS) / 1000, atol=0.0006)
        assert video.info.duration_s == pytest.approx(VFR_MS[-1] / 1000 + 0.04, abs=0.04)
        assert video.info.fps == pytest.approx(40 / video.info.duration_s)


@pytest.mark.parametrize("name", [*TRUSTWORTHY, *COUNTED, *LYING])
def test_times_start_at_zero_and_never_decrease(clip, name):
    with open_video(clip(name)) as video:
        assert video.pts_s.dtype == np.float64 and video.pts_s[0] == 0
        assert (np.diff(video.pts_s) >= 0).all() and video.pts_s[-1] < video.info.duration_s


def test_times_that_run_backwards_are_replaced_by_the_frame_rate(clip):
    with open_video(clip("twice_the_same_times.ts")) as video:
        np.testing.assert_allclose(video.pts_s, np.arange(80) / 25)


# Rotation.


def _upright(picture, rotation, mirrored):
    picture = picture[:, ::-1] if mirrored else picture
    return np.rot90(picture, -rotation // 90)  # rot90 turns counter-clockwise


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize(("container", "mirrored"), [("mp4", 0), ("mp4", 1), ("mov", 0), ("mkv", 0)])
def test_pictures_come_out_upright(tmp_path, container, rotation, mirrored):
    path = write_clip(tmp_path / f"turned.{container}", FRAMES[:9], rotation=rotation, mirrored=mirrored)
    with av.open(str(path)) as opened:
        stored = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    expected = [_upright(picture, rotation, mirrored) for picture in stored]
    info = probe(path)
    assert (info.height, info.width, 3) == expected[0].shape and info.rotation == rotation
    np.testing.assert_array_equal(decode_frames(path, range(9)), expected)


def test_a_marker_that_must_be_turned_clockwise_goes_from_the_left_to_the_top(tmp_path):
    frames = np.zeros((3, 64, 96, 3), np.uint8)
    frames[:, :, :32] = 255
    upright = decode_frames(write_clip(tmp_path / "marker.mp4", frames, rotation=90), [0])[0]
    assert upright.shape == (96, 64, 3)
    assert upright[:24].min() > 200 and upright[40:].max() < 50


@pytest.mark.parametrize("encoding", [AV1, vpx("libvpx-vp9"), x265(""), plain("mpeg4")])
def test_every_decoder_passes_the_rotation_on(tmp_path, encoding):
    path = write_clip(tmp_path / "turned.mp4", FRAMES[:5], rotation=90, **encoding)
    assert probe(path).rotation == 90
    assert_exact(path, every_frame(path))


# Which stream.


def test_the_first_of_two_video_streams_is_the_video(tmp_path, clip):
    other = write_clip(tmp_path / "other.mp4", numbered_frames(30, height=96, width=128, seed=5))
    path = remux(tmp_path / "two.mp4", clip("bframes.mp4"), other)
    assert_exact(path, every_frame(clip("bframes.mp4")))


def test_cover_art_is_not_the_video(tmp_path):
    path = cover_art_only(tmp_path / "song.mp4")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(NoVideoStreamError):
        probe(path)


# Files that are cut off or damaged.


STATING_DURATION = ["bframes.mkv", "vp9.webm", "bframes.flv", "mpeg4.avi", "header_first.mp4"]


@pytest.mark.parametrize("name", [*STATING_DURATION, "fragmented.mp4", "bframes.ts", "mpeg2.mpg"])
def test_a_file_that_is_cut_off_gives_its_frames(clip, tmp_path, name):
    data = clip(name).read_bytes()
    path = _written(tmp_path / name, data[: len(data) // 2])
    assert 1 < len(every_frame(path)) < 35
    warnings = assert_exact(path, every_frame(path))
    assert any("truncated" in warning for warning in warnings) == (name in STATING_DURATION)


def test_a_whole_file_has_no_warnings_even_if_sound_and_picture_differ_in_length(tmp_path):
    for seconds in (0.5, 5.0):
        path = write_clip(tmp_path / f"{seconds}.mkv", FRAMES, audio_codec="aac", audio_seconds=seconds)
        with open_video(path) as video:
            assert video.warnings == () and video.info.duration_s == pytest.approx(1.6)


def _damaged(path, number, *, kept=0.0):
    """The file's bytes, with those of packet `number` of its video inverted, except for the part kept."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    data = bytearray(path.read_bytes())
    for i in range(packet.pos + int(kept * packet.size), packet.pos + packet.size):
        data[i] ^= 0xFF
    return bytes(data)


def test_a_frame_that_cannot_be_decoded_is_replaced_by_the_one_before_it(clip):
    expected = every_frame(clip("prores.mov"))
    expected[20] = expected[19]
    with open_video(_damaged(clip("prores.mov"), 20)) as video:
        assert video.info.frame_count == 40
        frames = video.decode([5, 19, 20, 21, 39])
        np.testing.assert_array_equal(frames, [expected[i] for i in (5, 19, 20, 21, 39)])
        assert "the file has 40 frames, 39 of them can be decoded" in video.warnings
        np.testing.assert_array_equal(video.decode(range(40)), expected)


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [("bframes.mp4", 14, 0.5), ("bframes.mp4", 20, 0.6), ("open_gop.mp4", 26, 0.5), ("hevc.mp4", 22, 0.8)],
)
@pytest.mark.parametrize("thread_count", [1, 3])
def test_damage_that_the_decoder_paints_over_comes_out_as_in_sequential_decoding(
    clip, tmp_path, name, number, kept, thread_count
):
    data = _damaged(clip(name), number, kept=kept)
    expected = every_frame(_written(tmp_path / name, data))
    whole = every_frame(clip(name))
    assert any((picture != intact).any() for picture, intact in zip(expected, whole, strict=True))
    for indices in ([number - 2], [number], [number + 2], range(40), sample_uniform(40, 8)):
        with open_video(data, thread_count=thread_count) as video:
            frames = video.decode(indices)
        np.testing.assert_array_equal(frames, [expected[i] for i in indices])


def _written(path, data):
    path.write_bytes(data)
    return path


# What is not a video.


def _zip():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("clip.mp4", b"not really")
    return archive.getvalue()


NOT_VIDEOS = {
    "empty": (b"", NotAVideoError),
    "one byte": (b"\0", NotAVideoError),
    "text": (b"hello, world\n" * 50, NotAVideoError),
    "html": (b"<!doctype html><html><body>not found</body></html>" * 9, NotAVideoError),
    "json": (b'{"video": "..."}', NotAVideoError),
    "random": (random.Random(0).randbytes(5000), NotAVideoError),
    "zip": (_zip(), NotAVideoError),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n" * 9, NotAVideoError),
    "jpeg": (encoded_picture("mjpeg", pix_fmt="yuvj420p"), UnsupportedContainerError),
    "png": (encoded_picture("png"), UnsupportedContainerError),
    "sdp": (b"v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", UnsupportedContainerError),
    "ftyp and nothing else": (b"\0\0\0\x18ftypisom\0\0\2\0isommp41", CorruptVideoError),
    "matroska's first bytes": (b"\x1a\x45\xdf\xa3" + bytes(60), CorruptVideoError),
    "flv's first bytes": (b"FLV\1\5\0\0\0\x09\0\0\0\0", CorruptVideoError),
}


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_what_is_no_video_has_an_error_of_its_own(tmp_path, kind):
    data, expected = NOT_VIDEOS[kind]
    for source in (data, _written(tmp_path / "upload", data)):
        with pytest.raises(expected) as caught:
            probe(source)
        assert type(caught.value) is expected


def test_no_moving_pictures_have_errors_of_their_own(clip, tmp_path):
    mp4 = clip("bframes.mp4").read_bytes()
    fragmented = clip("fragmented.mp4").read_bytes()
    cases = [
        (audio_only(tmp_path / "tone.m4a"), NoVideoStreamError),
        (audio_only(tmp_path / "tone.ogg", codec="libopus"), NoVideoStreamError),
        (subtitles_only(tmp_path / "text.mkv"), NoVideoStreamError),
        (mp4[: len(mp4) // 2], CorruptVideoError),  # its header would have come last
        (fragmented[: fragmented.index(b"moof") - 4], NoFramesError),  # the header, and nothing more
        (mp4.replace(b"avc1", b"xyz1"), UnsupportedCodecError),
        (write_clip(tmp_path / "flash.avi", FRAMES[:3], **plain("flashsv", "bgr24")), UnsupportedCodecError),
        (write_clip(tmp_path / "still.avif", FRAMES[:1], **AV1), NotAVideoError),
        (_all_packets_zeroed(clip("bframes.mp4")), CorruptVideoError),
    ]
    for source, expected in cases:
        with pytest.raises(expected) as caught:
            probe(source)
        assert type(caught.value) is expected


def _all_packets_zeroed(path):
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(data)


def test_colours_that_cannot_be_converted_have_an_error_of_their_own(tmp_path):
    path = write_clip(tmp_path / "ycgco.mp4", FRAMES[:3], **x264("colormatrix=YCgCo"))
    assert probe(path).frame_count == 3
    with pytest.raises(UnsupportedCodecError, match="yuv420p, color space 8"):
        decode_frames(path, [0])


def test_codes_are_distinct_and_messages_give_nothing_away(tmp_path):
    # Other rooms have kinds of their own.
    kinds = [error for error in VideoError.__subclasses__() if error.__module__ == VideoError.__module__]
    codes = [error.code for error in kinds]
    assert len(set(codes)) == len(codes) == 10
    for data, _ in NOT_VIDEOS.values():
        with pytest.raises(VideoError) as caught:
            probe(_written(tmp_path / "secret-name.mp4", data))
        assert "expected" in str(caught.value) or "header" in str(caught.value)
        for leak in (str(tmp_path), "secret-name", "<none>", "0x", "Errno", "av."):
            assert leak not in str(caught.value)


@pytest.mark.parametrize("name", ["https://127.0.0.1/clip.mp4", "concat:a.mp4|b.mp4", "no such file.mp4"])
def test_a_path_is_a_path_and_nothing_else(name):
    with pytest.raises(FileNotFoundError):
        probe(name)


def test_metadata_in_no_known_encoding_does_no_harm(tmp_path):
    path = write_clip(tmp_path / "named.mp4", FRAMES[:3], metadata={"title": "A" * 40})
    data = path.read_bytes()
    assert b"A" * 40 in data
    assert probe(data.replace(b"A" * 40, b"\xff\xfe" * 20)).frame_count == 3


# Files that name other files and addresses.


@pytest.fixture
def listener():
    """The address of an HTTP server of our own, and the list of paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/clip.ts", asked
        server.shutdown()
        thread.join()


def _playlists(target):
    return {
        "list.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    }


def test_playlists_reach_no_address(tmp_path, listener):
    url, asked = listener
    permissive = {"protocol_whitelist": "file,http,tcp", "safe": "0"}
    for name in ("list.ffconcat", "list.m3u8"):  # this is what they would do
        with contextlib.suppress(av.FFmpegError):
            path = _written(tmp_path / name, _playlists(url)[name].encode())
            av.open(str(path), container_options=permissive)
    assert len(asked) == 2
    asked.clear()
    for name, text in _playlists(url).items():
        for source in (text.encode(), _written(tmp_path / name, text.encode())):
            with pytest.raises((UnsupportedContainerError, NotAVideoError)):
                probe(source)
    assert asked == []


def test_playlists_open_no_other_file(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.ts").write_bytes(clip("bframes.ts").read_bytes())
    playlists = _playlists("other.ts")
    with av.open(io.BytesIO(playlists["list.ffconcat"].encode())) as container:  # this is what one would do
        assert len(list(container.decode(video=0))) == 40
    for name, text in playlists.items():
        for source in (text.encode(), _written(tmp_path / name, text.encode())):
            with pytest.raises((UnsupportedContainerError, NotAVideoError)):
                probe(source)


def test_a_movie_that_keeps_its_media_elsewhere_gets_none(clip, tmp_path):
    target = tmp_path / "other.mp4"
    target.write_bytes(clip("bframes.mp4").read_bytes())
    path = _written(tmp_path / "alias.mp4", with_external_media(target.read_bytes(), str(target)))
    permissive = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), container_options=permissive) as container:  # this is what it would do
        assert len([packet for packet in container.demux(video=0) if packet.size]) == 40
    for source in (path, path.read_bytes()):
        with pytest.raises(NoFramesError):
            probe(source)


# Robustness.

MUTATED = (
    *("bframes.mp4", "fragmented.mp4", "open_gop.mkv", "bframes.ts", "bframes.flv", "hevc.mp4", "av1.mp4"),
    *("vp8_altref.webm", "vp9.webm", "mpeg4.avi", "mpeg2.mpg", "animated.gif", "wmv2.wmv", "prores.mov"),
)


@pytest.mark.parametrize("name", MUTATED)
def test_damaged_bytes_give_frames_or_a_video_error(clip, name):
    data = clip(name).read_bytes()
    for seed in range(30):
        head = 3000 if seed % 2 else len(data)  # half of them in the header
        damaged = mutated(data[:head], seed) + data[head:]
        damaged = damaged[: len(damaged) // 2] if seed % 7 == 0 else damaged
        with contextlib.suppress(VideoError), open_video(damaged, thread_count=1 + seed % 2) as video:
            frames = video.decode(sample_uniform(video.info.frame_count, 4))
            assert frames.shape == (4, video.info.height, video.info.width, 3)
            assert np.isfinite(video.pts_s).all() and video.info.duration_s >= 0


def test_threads_decode_several_videos_decode_in_parallel(clip):
    names = ["bframes.mp4", "vp9.webm", "hevc.mp4", "mpeg4.avi", "open_gop.mkv"] * 4
    expected = {name: np.stack(every_frame(clip(name))) for name in set(names)}
    with ThreadPoolExecutor(8) as pool:
        decoded = pool.map(lambda name: decode_frames(clip(name).read_bytes(), range(40)), names)
        for name, frames in zip(names, decoded):
            np.testing.assert_array_equal(frames, expected[name], name)


def test_files_are_closed_whatever_happens(clip, tmp_path):
    def open_files():
        return len(os.listdir("/dev/fd"))

    good, bad = clip("bframes.mp4"), _written(tmp_path / "bad.mp4", clip("bframes.mp4").read_bytes()[:2000])
    counted = clip("mpeg4.avi")
    before = open_files()
    for _ in range(5):
        for name in (good, counted):
            with open_video(name, thread_count=2) as video:
                video.decode([1, 20])
                opened = open_files()
                for _ in range(3):
                    video.decode([3, 21])
                assert open_files() == opened
        with pytest.raises(CorruptVideoError):
            probe(bad)
        with pytest.raises(FrameIndexError):
            decode_frames(good, [99])
    assert open_files() == before


def test_a_closed_video_says_so(clip):
    with open_video(clip("bframes.mp4")) as video:
        pass
    assert video.info.frame_count == len(video.pts_s) == 40
    with pytest.raises(RuntimeError, match="has ended"):
        video.decode([0])


def test_a_damaged_file_writes_nothing_to_the_log(clip, capfd):
    with contextlib.suppress(VideoError), open_video(mutated(clip("bframes.mkv").read_bytes(), 3)) as video:
        video.decode(range(video.info.frame_count))
    assert capfd.readouterr() == ("", "")


# Sampling.


# Limits. The pictures of a flat colour are large and their files small.

LARGE = {
    "large.mp4": plain("libx264"),
    "large.ts": plain("libx264"),
    "large_vp8.webm": vpx("libvpx"),
    "large_vp9.webm": vpx("libvpx-vp9"),
    "large_av1.mp4": AV1,
    "large_mpeg4.avi": plain("mpeg4"),
    "large_mjpeg.avi": plain("mjpeg", "yuvj420p"),
    "large.gif": plain("gif", "rgb8"),
    "large_png.mov": plain("png", "rgb24"),
    "large_qtrle.mov": plain("qtrle", "rgb24"),
    "large_ffv1.mkv": plain("ffv1"),
    "large_raw.avi": plain("rawvideo"),
}


@pytest.mark.parametrize("name", LARGE)
def test_pictures_of_more_pixels_than_allowed_are_refused(tmp_path, name):
    path = write_clip(tmp_path / name, np.full((10, 1024, 1024, 3), 90, np.uint8), **LARGE[name])
    with open_video(path, limits=Limits(max_frame_pixels=1024 * 1024)) as video:
        assert video.decode([0]).shape == (1, 1024, 1024, 3)
    with pytest.raises(FrameTooLargeError, match="at most 1048575 pixels"):
        with open_video(path, limits=Limits(max_frame_pixels=1024 * 1024 - 1)):
            pass


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("height, width", [(240, 135), (135, 240), (100, 2)])
def test_pictures_of_as_many_pixels_as_allowed_are_accepted_whatever_blocks_a_codec_has(tmp_path, name, height, width):
    if width == 2 and name in ("large_av1.mp4", "large_ffv1.mkv"):
        pytest.skip("the encoder makes none so narrow")
    encoding = {**LARGE[name], "pix_fmt": "yuv444p"} if name in ("large.mp4", "large.ts") else LARGE[name]
    path = write_clip(tmp_path / name, np.full((4, height, width, 3), 90, np.uint8), **encoding)
    with open_video(path, limits=Limits(max_frame_pixels=height * width)) as video:
        assert video.decode([0]).shape == (1, height, width, 3)


def test_frames_that_are_neither_wanted_nor_referred_to_are_not_decoded(tmp_path):
    # I P B B P B B ...: nobody refers to a B.
    options = {"x264-params": "keyint=250:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none"}
    path = write_clip(tmp_path / "a.mp4", numbered_frames(61), options=options)
    for index in (58, 59, 60):
        with open_video(path) as video:
            video.decode([index])
            assert 61 / 3 < video.decoded_frames < 61 / 2


def test_no_memory_is_spent_on_pictures_that_are_too_large(tmp_path):
    flat = np.zeros((1, 8192, 8192, 3), np.uint8)
    for name, encoding in {"large.mp4": plain("libx264"), "large_png.mov": plain("png", "rgb24")}.items():
        path = write_clip(tmp_path / name, flat, **encoding)
        code = (
            "import pathlib, re, sys; import contextlib; from handler.video import *\n"
            "limits = Limits(max_frame_pixels=9)\n"
            "with contextlib.suppress(FrameTooLargeError), open_video(sys.argv[1], limits=limits):\n"
            "    sys.exit('was opened')\n"
            "print(re.search(r'VmHWM:\\s+([0-9]+)', pathlib.Path('/proc/self/status').read_text())[1])"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", code, str(path)]
        peak_kib = int(subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout)
        assert peak_kib < 150_000  # a picture alone would take 100 MB or 200 MB more


def test_a_picture_that_grows_beyond_the_limit_midway_is_damage(clip, tmp_path):
    small = write_clip(tmp_path / "small.ts", FRAMES[:12], **x264())
    large = write_clip(tmp_path / "large.ts", np.full((12, 3200, 3200, 3), 90, np.uint8), **x264())
    with open_video(small.read_bytes() + large.read_bytes(), limits=Limits(max_frame_pixels=500_000)) as video:
        assert video.info.frame_count == 12 and video.warnings


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.ts", "vp8_odd_size.webm", "mpeg4.avi", "animated.gif"])
def test_more_frames_than_allowed_are_refused(clip, name):
    with open_video(clip(name), limits=Limits(max_frames=40)) as video:
        assert video.info.frame_count == 40
    with pytest.raises(TooManyFramesError, match="at most 39 frames"):
        with open_video(clip(name), limits=Limits(max_frames=39)):
            pass


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.ts", "vp8_odd_size.webm", "mpeg4.avi", "animated.gif"])
def test_a_video_longer_than_allowed_is_refused(clip, name):
    duration_s = probe(clip(name)).duration_s
    with open_video(clip(name), limits=Limits(max_duration_s=duration_s + 0.1)):
        pass
    with pytest.raises(VideoTooLongError, match=f"at most {duration_s - 0.2:g} s of video, got"):
        with open_video(clip(name), limits=Limits(max_duration_s=duration_s - 0.2)):
            pass


@pytest.mark.parametrize("name", ["far_apart.mp4", "far_apart.mkv", "far_apart.ts"])
def test_a_few_frames_over_ten_hours_are_a_long_video(tmp_path, name):
    path = write_clip(tmp_path / name, FRAMES[:4], pts_ms=[0, 40, 80, 36_000_000])
    with pytest.raises(VideoTooLongError), open_video(path, limits=Limits(max_duration_s=3600)):
        pass


# Keyframes


@pytest.mark.parametrize("thread_count", [1, 3])
def test_nearest_keyframes_are_decoded_alone_and_are_what_they_are_in_sequence(clip, thread_count):
    with open_video(clip("bframes.mp4"), thread_count=thread_count) as video:  # a keyframe every 12 frames
        indices = nearest(np.array([0, 5, 6, 7, 17, 18, 19, 39]), video.keyframes)
        assert indices.tolist() == [0, 0, 0, 12, 12, 12, 24, 36]
        frames = video.decode(indices)
        assert video.decoded_frames == 4
    np.testing.assert_array_equal(frames, np.stack(every_frame(clip("bframes.mp4")))[indices])


def test_where_packets_cannot_be_trusted_the_frames_are_as_asked_for(clip):
    with open_video(clip("mpeg4.avi")) as video:
        assert video.keyframes is None


# Pictures, one at a time


@pytest.mark.parametrize("name", ["bframes.mp4", "mpeg4.avi", "cut_within_a_packet.ts"])
def test_pictures_are_the_frames_with_their_places(clip, name):
    indices = [7, 3, 7, 18, 0]
    frames = {}
    with open_video(clip(name)) as video:
        for places, picture in video.frames(indices):
            frames.update(dict.fromkeys(places.tolist(), picture()))
    np.testing.assert_array_equal(np.stack([frames[i] for i in range(5)]), decode_frames(clip(name), indices))


@pytest.mark.parametrize("frame_count", [1, 5, 31, 32, 33, 300])
def test_sample_evenly_takes_the_middle_of_equal_parts(frame_count):
    num_frames = 32
    indices = sample_uniform(frame_count, num_frames)
    assert indices.dtype == np.int64
    part = frame_count / num_frames
    assert indices.tolist() == [int((i + 0.5) * part) for i in range(num_frames)]
    assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < frame_count


def test_sample_evenly_gives_each_frame_once_if_there_are_just_enough():
    assert sample_uniform(32, 32).tolist() == list(range(32))


def test_sample_evenly_is_symmetric():
    for frame_count in (7, 33, 250, 1001):
        indices = sample_uniform(frame_count, 8)
        mirrored = frame_count - 1 - indices[::-1]
        assert np.abs(indices - mirrored).max() <= 1


@pytest.mark.parametrize(("frame_count", "num_frames"), [(0, 32), (32, 0), (-1, 2)])
def test_sample_evenly_needs_something_to_sample(frame_count, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        sample_uniform(frame_count, num_frames)


# The documented recipe of transformers, word for word where it matters, as the oracle.


def _recipe_indices(clip_len, frame_sample_rate, seg_len):
    converted_len = int(clip_len * frame_sample_rate)
    end_idx = np.random.randint(converted_len, seg_len)
    start_idx = end_idx - converted_len
    indices = np.linspace(start_idx, end_idx, num=clip_len)
    return np.clip(indices, start_idx, end_idx - 1).astype(np.int64)


def _recipe_frames(container, indices):
    frames = []
    container.seek(0)
    for i, frame in enumerate(container.decode(video=0)):
        if i > indices[-1]:
            break
        if i >= indices[0] and i in indices:
            frames.append(frame)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.mark.parametrize("arguments", [(32, 1, 300), (32, 4, 300), (8, 2.5, 21), (10, 1, 11), (1, 1, 2)])
def test_sample_frame_indices_draws_what_the_recipe_draws(arguments):
    for seed in range(20):
        np.random.seed(seed)
        expected = [_recipe_indices(*arguments) for _ in range(3)]
        np.random.seed(seed)
        indices = [sample_frame_indices(*arguments) for _ in range(3)]
        np.testing.assert_array_equal(indices, expected)
        assert indices[0].dtype == np.int64


@pytest.mark.parametrize("seg_len", [0, 31, 32])
def test_sample_frame_indices_says_what_a_short_video_lacks(seg_len):
    with pytest.raises(ValueError, match=f"more than 32 x 1 = 32 frames, got {seg_len}"):
        sample_frame_indices(clip_len=32, frame_sample_rate=1, seg_len=seg_len)


@pytest.mark.parametrize("name", ["bframes.mp4", "vp8_odd_size.webm", "mpeg4.avi", "animated.gif"])
@pytest.mark.parametrize("indices", [np.arange(3, 19), [5, 5, 7, 9], [30], [0, 39], [38, 39, 40], [5, 3, 9]])
def test_read_video_pyav_gives_what_the_recipe_gives(clip, name, indices):
    with av.open(str(clip(name))) as container:
        expected = _recipe_frames(container, indices)
        for _ in range(2):  # it rewinds the container
            frames = read_video_pyav(container, indices)
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("indices", [[], [40, 41], [9, 3]])
def test_read_video_pyav_says_when_there_is_nothing_to_read(clip, indices):
    with av.open(str(clip("bframes.mp4"))) as container, pytest.raises(FrameIndexError, match="expected"):
        read_video_pyav(container, indices)

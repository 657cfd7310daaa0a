"""Reading only the needed packets of a file gives the same frames as reading all of them."""

import contextlib
import io
import random

import av
import numpy as np
import pytest

from handler.video import VideoError, decode_frames, decoder, mp4, open_video, probe, sample_uniform
from tests.support.clips import mutated, numbered_frames, write_clip
from tests.support.video_files import INDEXED, MISLEADING, SEQUENTIAL, x264

NAMES = [name for name in (*INDEXED, *SEQUENTIAL, *MISLEADING) if name.endswith((".mp4", ".mov", ".3gp"))]

# Not MP4, or with a header that does not suffice: their fallback must be the same as for bytes.
OTHER_CONTAINERS = ("bframes.mkv", "open_gop.ts", "vp9.webm", "mpeg4_bframes.avi", "bframes.flv", "animated.gif")


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    bytes_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.bytes_read += len(data)
        return data


@pytest.fixture
def small_files_by_index(monkeypatch):
    """The index of the header is used for files of any size."""
    monkeypatch.setattr(mp4, "_MIN_FILE_BYTES", 0)


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory):
    """2,400 frames in about 12 MB, a keyframe every 24 frames: a short video repeated."""
    folder = tmp_path_factory.mktemp("long")
    encoding = x264("keyint=24:min-keyint=24:bframes=3:qp=8", preset="ultrafast")
    short = write_clip(folder / "short.mp4", numbered_frames(120, height=192, width=256), **encoding)
    with av.open(str(short)) as old, av.open(str(folder / "long.mp4"), "w") as new:
        packets = [packet for packet in old.demux(video=0) if packet.size]
        stream = new.add_stream_from_template(old.streams.video[0])
        duration = sum(packet.duration for packet in packets)
        for i in range(20 * len(packets)):
            packet = packets[i % len(packets)]
            if i >= len(packets):
                packet.pts += duration
                packet.dts += duration
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
            copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
            new.mux(copy)
    return folder / "long.mp4"


def assert_same(path, indices, *, thread_count):
    """Compares a path with the bytes of the file."""
    with (
        open_video(path, thread_count=thread_count) as partial,
        open_video(path.read_bytes(), thread_count=thread_count) as whole,
    ):
        assert (partial.info, partial.is_indexed) == (whole.info, whole.is_indexed)
        np.testing.assert_array_equal(partial.pts_s, whole.pts_s)
        np.testing.assert_array_equal(partial.keyframes, whole.keyframes)
        frames = partial.decode(indices)
        np.testing.assert_array_equal(frames, whole.decode(indices), f"frames {indices}")
        assert (partial.warnings, partial.is_indexed) == (whole.warnings, whole.is_indexed)
    return frames


@pytest.mark.parametrize("name", [*NAMES, *OTHER_CONTAINERS])
def test_frames(clip, every_frame, small_files_by_index, name):
    expected = every_frame(clip(name))
    count, rng = len(expected), random.Random(0)
    for thread_count, indices in ((1, [count // 2]), (3, rng.sample(range(count), min(12, count)))):
        frames = assert_same(clip(name), indices, thread_count=thread_count)
        np.testing.assert_array_equal(frames, [expected[i] for i in indices])


def test_few_bytes_read(long_clip):
    size = long_clip.stat().st_size
    assert size > 8e6
    indices = sample_uniform(2400, 4)
    expected = decode_frames(long_clip.read_bytes(), indices)
    for thread_count in (1, 2):
        with CountingFile(long_clip) as file:
            with open_video(file, thread_count=thread_count) as video:
                np.testing.assert_array_equal(video.decode(indices), expected)
                assert video.info == probe(long_clip.read_bytes()) and video.is_indexed
            assert file.bytes_read < 0.1 * size
            file.bytes_read = 0
            probe(file)
            assert file.bytes_read < 0.1 * size


@pytest.mark.parametrize("name", ["bframes.mp4", *OTHER_CONTAINERS])
def test_file_object_same_as_path(clip, small_files_by_index, name):
    expected = decode_frames(clip(name), [3, 31])
    with open(clip(name), "rb") as file:
        for source in (file, io.BytesIO(clip(name).read_bytes())):
            source.seek(77)  # it is read from its beginning
            assert probe(source) == probe(clip(name))
            with open_video(source, thread_count=3) as video:
                np.testing.assert_array_equal(video.decode([3, 31]), expected)
            assert not source.closed


def test_truncated_file(clip, small_files_by_index, tmp_path):
    path = tmp_path / "truncated.mp4"
    path.write_bytes(clip("header_first.mp4").read_bytes()[:-4000])
    assert_same(path, [0, 9], thread_count=1)


@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_corrupt_packets(clip, small_files_by_index, tmp_path, kept):
    with av.open(str(clip("bframes.mp4"))) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in (0, 14, 24):
        data = bytearray(clip("bframes.mp4").read_bytes())
        start, size = spans[number]
        for i in range(start + int(kept * size), start + size):
            data[i] ^= 0xFF
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(data)
        count = probe(path.read_bytes()).frame_count
        for indices in ([number], [number + 2], range(count)):
            assert_same(path, indices, thread_count=1)


@pytest.mark.parametrize("recipe", ["parameter_sets_repeated_h264.ts", "parameter_sets_repeated_hevc.mkv"])
def test_parameter_sets_in_packets(clip, small_files_by_index, tmp_path, recipe):
    path = tmp_path / "a.mp4"
    MISLEADING[recipe](clip, path)
    for indices in ([2], [35], [58], [3, 29, 41]):
        assert_same(path, indices, thread_count=1)


@pytest.mark.parametrize("name", ["bframes.mp4", "edit_list.mp4", "header_first.mp4", "av1.mp4"])
def test_corrupt_header_raises_only_video_errors(clip, small_files_by_index, name):
    data = clip(name).read_bytes()
    header = data.index(b"moov") - 4
    for seed in range(40):
        corrupt = data[:header] + mutated(data[header:], seed)
        with contextlib.suppress(VideoError), open_video(io.BytesIO(corrupt)) as video:
            frames = video.decode(sample_uniform(video.info.frame_count, 4))
            assert frames.shape == (4, video.info.height, video.info.width, 3)


def test_all_cores_used_by_default(clip, monkeypatch):
    started = []
    start_threads = decoder.start_threads
    monkeypatch.setattr(decoder, "available_cores", lambda: 3)
    monkeypatch.setattr(decoder, "start_threads", lambda count: started.append(count) or start_threads(count))
    decode_frames(clip("bframes.mp4"), [0])
    assert started == [3]

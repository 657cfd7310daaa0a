"""Accepted files, the choice of a stream, and limits. No file makes the decoder access other files or the network."""

import contextlib
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from handler.video import (
    CorruptVideoError,
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
)
from tests.support.clips import (
    audio_only,
    cover_art_only,
    encoded_image,
    numbered_frames,
    remux,
    subtitles_only,
    with_external_media,
    write_clip,
)
from tests.support.video_files import FRAMES, plain, svt_av1, vpx, x264
from tests.support.web_server import web_server

ROOT = Path(__file__).resolve().parents[3]


def _written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("bframes.mp4", "h264", "mov,mp4,m4a,3gp,3g2,mj2"),
        ("fragmented.mp4", "h264", "mov,mp4,m4a,3gp,3g2,mj2"),
        ("bframes.mkv", "h264", "matroska,webm"),
        ("bframes.flv", "h264", "flv"),
        ("hevc_open_gop.ts", "hevc", "mpegts"),
        ("vp8.webm", "vp8", "matroska,webm"),
        ("vp9.webm", "vp9", "matroska,webm"),
        ("av1.webm", "av1", "matroska,webm"),
        ("mpeg4.avi", "mpeg4", "avi"),
        ("mpeg2.mpg", "mpeg2video", "mpeg"),
        ("animated.gif", "gif", "gif"),
    ],
)
def test_probe(clip, name, codec, container):
    info = probe(clip(name))
    assert (info.frame_count, info.width, info.height, info.rotation) == (40, 128, 96, 0)
    assert (info.codec, info.container, info.stream) == (codec, container, 0)
    assert info.duration_s == pytest.approx(40 / 25, abs=0.002)
    assert info.fps == pytest.approx(25, rel=0.002)


# Streams


def test_several_video_streams(tmp_path):
    small = write_clip(tmp_path / "small.mp4", FRAMES[:8])
    large = write_clip(tmp_path / "large.mp4", numbered_frames(8, height=120, width=160, seed=5))
    path = remux(tmp_path / "two.mp4", small, large, default_source=1)
    for choice, stream, source in (("first", 0, small), ("best", 1, large)):
        with open_video(path, stream=choice) as video:
            assert video.info.stream == stream
            np.testing.assert_array_equal(video.decode(range(8)), decode_frames(source, range(8)))
            warning = f"the file has 2 video streams: 0 (128x96), 1 (160x120); stream {stream} is used"
            assert video.warnings == (warning,)
    with (
        pytest.raises(ValueError, match="expected the video stream to be one of first, best, got 'largest'"),
        open_video(path, stream="largest"),
    ):
        pass


@pytest.mark.parametrize("stream", ["first", "best"])
def test_cover_art_is_no_video_stream(tmp_path, stream):
    path = cover_art_only(tmp_path / "song.mp4")
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(NoVideoStreamError), open_video(path, stream=stream):
        pass


# Files that are not accepted


def _zip():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("clip.mp4", b"not a video")
    return archive.getvalue()


REJECTED = {
    "empty": (b"", NotAVideoError),
    "one byte": (b"\0", NotAVideoError),
    "text": (b"hello, world\n" * 50, NotAVideoError),
    "html": (b"<!doctype html><html><body>not found</body></html>" * 9, NotAVideoError),
    "json": (b'{"video": "..."}', NotAVideoError),
    "random": (random.Random(0).randbytes(5000), NotAVideoError),
    "zip": (_zip(), NotAVideoError),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n" * 9, NotAVideoError),
    "jpeg": (encoded_image("mjpeg", pix_fmt="yuvj420p"), UnsupportedContainerError),
    "png": (encoded_image("png"), UnsupportedContainerError),
    "bmp": (encoded_image("bmp", pix_fmt="bgr24"), UnsupportedContainerError),
    "tiff": (encoded_image("tiff"), UnsupportedContainerError),
    "sdp": (b"v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", UnsupportedContainerError),
    "mp4 signature": (b"\0\0\0\x18ftypisom\0\0\2\0isommp41", CorruptVideoError),
    "matroska signature": (b"\x1a\x45\xdf\xa3" + bytes(60), CorruptVideoError),
    "flv signature": (b"FLV\1\5\0\0\0\x09\0\0\0\0", CorruptVideoError),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_other_files_rejected(tmp_path, kind):
    data, expected = REJECTED[kind]
    for source in (data, _written(tmp_path / "secret-name.mp4", data)):
        with pytest.raises(expected) as caught:
            probe(source)
        message = str(caught.value)
        assert type(caught.value) is expected and ("expected" in message or "header" in message)
        assert message.endswith("got an image") == (kind in ("jpeg", "png", "bmp", "tiff"))
        for leak in (str(tmp_path), "secret-name", "<none>", "0x", "Errno", "av."):
            assert leak not in message


def test_files_without_usable_video(clip, tmp_path):
    mp4, fragmented = clip("bframes.mp4").read_bytes(), clip("fragmented.mp4").read_bytes()
    with av.open(str(clip("bframes.mp4"))) as container:
        spans = [slice(packet.pos, packet.pos + packet.size) for packet in container.demux(video=0) if packet.size]
    zeroed = bytearray(mp4)
    for span in spans:
        zeroed[span] = bytes(span.stop - span.start)
    cases = [
        (audio_only(tmp_path / "tone.m4a"), NoVideoStreamError),
        (audio_only(tmp_path / "tone.ogg", codec="libopus"), NoVideoStreamError),
        (subtitles_only(tmp_path / "text.mkv"), NoVideoStreamError),
        (mp4[: len(mp4) // 2], CorruptVideoError),  # without the header, which comes last
        (fragmented[: fragmented.index(b"moof") - 4], NoFramesError),  # the header only
        (mp4.replace(b"avc1", b"xyz1"), UnsupportedCodecError),
        (write_clip(tmp_path / "flash.avi", FRAMES[:3], **plain("flashsv", "bgr24")), UnsupportedCodecError),
        (write_clip(tmp_path / "still.avif", FRAMES[:1], **svt_av1()), NotAVideoError),
        (bytes(zeroed), CorruptVideoError),
    ]
    for source, expected in cases:
        with pytest.raises(expected) as caught:
            probe(source)
        assert type(caught.value) is expected


def test_unconvertible_color_space_rejected(tmp_path):
    path = write_clip(tmp_path / "ycgco.mp4", FRAMES[:3], **x264("colormatrix=YCgCo"))
    assert probe(path).frame_count == 3
    with pytest.raises(UnsupportedCodecError, match="yuv420p, color space 8"):
        decode_frames(path, [0])


def test_error_codes_distinct():
    errors = [error for error in VideoError.__subclasses__() if error.__module__ == VideoError.__module__]
    assert len({error.code for error in errors}) == len(errors) == 12


def test_metadata_in_unknown_encoding(tmp_path):
    data = write_clip(tmp_path / "named.mp4", FRAMES[:3], metadata={"title": "A" * 40}).read_bytes()
    assert b"A" * 40 in data
    assert probe(data.replace(b"A" * 40, b"\xff\xfe" * 20)).frame_count == 3


# Files that refer to other files and URLs


@pytest.mark.parametrize("name", ["https://127.0.0.1/clip.mp4", "concat:a.mp4|b.mp4", "no such file.mp4"])
def test_path_is_never_a_url(name):
    with pytest.raises(FileNotFoundError):
        probe(name)


@pytest.fixture
def listener():
    """The URL of a local HTTP server, and the list of requested paths."""
    requested = []

    def respond(request):
        requested.append(request.path)
        return 404, b""

    with web_server(respond) as port:
        yield f"http://127.0.0.1:{port}/clip.ts", requested


def _playlists(target):
    return {
        "list.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "master.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    }


def _assert_rejected(playlists, folder):
    for name, text in playlists.items():
        for source in (text.encode(), _written(folder / name, text.encode())):
            with pytest.raises((UnsupportedContainerError, NotAVideoError)):
                probe(source)


def test_playlists_open_no_url(tmp_path, listener):
    url, requested = listener
    permissive = {"protocol_whitelist": "file,http,tcp", "safe": "0"}
    for name in ("list.ffconcat", "list.m3u8"):  # without the allow-lists they request the URL
        with contextlib.suppress(av.FFmpegError):
            path = _written(tmp_path / name, _playlists(url)[name].encode())
            av.open(str(path), container_options=permissive)
    assert len(requested) == 2
    requested.clear()
    _assert_rejected(_playlists(url), tmp_path)
    assert requested == []


def test_playlists_open_no_file(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _written(tmp_path / "other.ts", clip("bframes.ts").read_bytes())
    playlists = _playlists("other.ts")
    with av.open(io.BytesIO(playlists["list.ffconcat"].encode())) as container:  # without the allow-lists it opens
        assert len(list(container.decode(video=0))) == 40
    _assert_rejected(playlists, tmp_path)


def test_external_media_not_opened(clip, tmp_path):
    target = _written(tmp_path / "other.mp4", clip("bframes.mp4").read_bytes())
    path = _written(tmp_path / "alias.mp4", with_external_media(target.read_bytes(), str(target)))
    permissive = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), container_options=permissive) as container:  # without the allow-lists it opens
        assert len([packet for packet in container.demux(video=0) if packet.size]) == 40
    for source in (path, path.read_bytes()):
        with pytest.raises(NoFramesError):
            probe(source)


# Limits

ENCODINGS = {
    "a.mp4": plain("libx264", "yuv444p"),
    "a.ts": plain("libx264", "yuv444p"),
    "vp8.webm": vpx("libvpx"),
    "vp9.webm": vpx("libvpx-vp9"),
    "av1.mp4": svt_av1(),
    "mpeg4.avi": plain("mpeg4"),
    "mjpeg.avi": plain("mjpeg", "yuvj420p"),
    "a.gif": plain("gif", "rgb8"),
    "png.mov": plain("png", "rgb24"),
    "qtrle.mov": plain("qtrle", "rgb24"),
    "ffv1.mkv": plain("ffv1"),
    "raw.avi": plain("rawvideo"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_frame_size_limit_is_exact(tmp_path, name):
    sizes = [(240, 135), (135, 240)]  # no multiple of any codec's block size
    if name not in ("av1.mp4", "ffv1.mkv"):  # their encoders have a minimum width
        sizes.append((100, 2))
    for height, width in sizes:
        path = write_clip(tmp_path / name, np.full((8, height, width, 3), 90, np.uint8), **ENCODINGS[name])
        with open_video(path, limits=Limits(max_frame_pixels=height * width)) as video:
            assert video.decode([0]).shape == (1, height, width, 3)
        with (
            pytest.raises(FrameTooLargeError, match=f"at most {height * width - 1} pixels"),
            open_video(path, limits=Limits(max_frame_pixels=height * width - 1)),
        ):
            pass


def test_too_large_frames_not_allocated(tmp_path):
    code = (
        "import contextlib, pathlib, re, sys; from handler.video import *\n"
        "for path in sys.argv[1:]:\n"
        "    with contextlib.suppress(FrameTooLargeError), open_video(path, limits=Limits(max_frame_pixels=9)):\n"
        "        sys.exit('opened')\n"
        "print(re.search(r'VmHWM:\\s+([0-9]+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    flat = np.zeros((1, 6144, 6144, 3), np.uint8)
    fast = plain("libx264", preset="ultrafast")
    encodings = {"large.mp4": fast, "large.ts": fast, "png.mov": plain("png", "rgb24")}
    paths = [str(write_clip(tmp_path / name, flat, **encoding)) for name, encoding in encodings.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, *paths], env=environment, check=True, capture_output=True)
    assert int(run.stdout) < 150_000  # KiB; a decoded frame and its RGB copy take 170 MB


@pytest.mark.parametrize("name", ["bframes.mp4", "bframes.ts", "vp8_odd_size.webm", "mpeg4.avi", "animated.gif"])
def test_frame_count_and_duration_limits(clip, name):
    with open_video(clip(name), limits=Limits(max_frames=40)) as video:
        assert video.info.frame_count == 40
        duration_s = video.info.duration_s
    with (
        pytest.raises(TooManyFramesError, match="at most 39 frames"),
        open_video(clip(name), limits=Limits(max_frames=39)),
    ):
        pass
    with open_video(clip(name), limits=Limits(max_duration_s=duration_s + 0.1)):
        pass
    with (
        pytest.raises(VideoTooLongError, match=f"at most {duration_s - 0.2:g} s of video, got"),
        open_video(clip(name), limits=Limits(max_duration_s=duration_s - 0.2)),
    ):
        pass


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_duration_limit_counts_gaps(tmp_path, suffix):
    path = write_clip(tmp_path / f"gap.{suffix}", FRAMES[:4], pts_ms=[0, 40, 80, 36_000_000])
    with pytest.raises(VideoTooLongError), open_video(path, limits=Limits(max_duration_s=3600)):
        pass


def test_packets_of_other_streams_limited(tmp_path):
    path = write_clip(tmp_path / "audio.mkv", FRAMES[:5], audio_codec="pcm_s16le", audio_seconds=20)  # 938 packets
    with open_video(path, limits=Limits(max_frames=200)) as video:
        assert video.info.frame_count == 5
    with (
        pytest.raises(TooManyFramesError, match="at most 80 packets, got more"),
        open_video(path, limits=Limits(max_frames=10)),
    ):
        pass

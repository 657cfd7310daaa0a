"""Hostile and corrupt uploads against a real TorchServe.

Every upload must be answered as the error table in scripts/README.md states. In addition, no upload may kill a worker,
affect the answers to valid videos in the same batch, make the server request a URL or read a file, or cause a message
that reveals paths or internals.
"""

import base64
import io
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import grpc
import pytest
import requests

from handler.cli.client import Answer, authorization, open_channel
from stress.server import is_same_answer
from tests.server.conftest import MAX_FRAMES, MAX_UPLOAD_BYTES
from tests.support import hostile_clips as make
from tests.support.clips import write_clip
from tests.support.hostile_clips import FRAMES, Sources
from tests.support.server import concurrently, wait_for

LOCAL_NAME = "neighbor.ts"

# Expected responses: (HTTP status, regular expression for the error's code or the warnings).
NOT_A_VIDEO, OTHER_FORMAT, NO_CODEC = (415, "not_a_video"), (415, "unsupported_container"), (415, "unsupported_codec")
UNKNOWN = (415, "not_a_video|unsupported_container")  # depends on how FFmpeg's probing interprets random bytes
NO_VIDEO_STREAM, NO_FRAMES, CORRUPT = (422, "no_video_stream"), (422, "no_frames"), (422, "corrupt_video")
FINE = (200, "")
CORRUPT_FRAMES, TRUNCATED, REPEATED = (200, "partially corrupt"), (200, "is truncated"), (200, "frames repeat")


def playlist(write, target):
    """A playlist that references the listener's URL ("url"), the local video by path or name, or `target` itself."""

    def make_playlist(sources):
        named = {"url": sources.url, "absolute path": str(sources.local_video), "file name": LOCAL_NAME}
        return write(named.get(target, target))

    return make_playlist


# Name of an upload -> (Maker, HTTP status, expected code or warning)
NOT_MEDIA = {
    "empty": (make.constant(b""), 400, "empty_body"),
    "one byte": (make.constant(b"\0"), *NOT_A_VIDEO),
    "text": (make.constant(b"hello, world\n" * 50), *NOT_A_VIDEO),
    "HTML": (make.constant(b"<!doctype html><html><body>not found</body></html>" * 9), *NOT_A_VIDEO),
    "SVG referencing a file": (make.constant(b'<svg><image href="file:///etc/passwd"/></svg>'), *UNKNOWN),
    "noise": (make.constant(random.Random(0).randbytes(5000)), *UNKNOWN),
    "zeros": (make.constant(bytes(5000)), *NOT_A_VIDEO),
    "ELF": (make.constant(b"\x7fELF\2\1\1" + bytes(500)), *NOT_A_VIDEO),
}
IMAGES = {
    "png": (make.image("PNG"), *OTHER_FORMAT),
    "jpeg": (make.image("JPEG"), *OTHER_FORMAT),
    "webp": (make.image("WEBP"), *OTHER_FORMAT),
    "tiff": (make.image("TIFF"), *OTHER_FORMAT),
    "bmp": (make.image("BMP"), *OTHER_FORMAT),
    "heic": (make.heic(), *NOT_A_VIDEO),
    "avif": (make.valid("still.avif"), *NOT_A_VIDEO),
    "animated avif": (make.valid("animated.avif"), *NOT_A_VIDEO),
    "animated png": (make.valid("animated.apng"), *OTHER_FORMAT),
    "animated webp": (make.valid("animated.webp"), *OTHER_FORMAT),
    "animated gif": (make.valid("animated.gif"), *FINE),
    "gif, one frame": (make.valid("still.gif"), *REPEATED),
}
NO_VIDEO = {
    "mp3": (make.audio("tone.mp3", "libmp3lame"), *OTHER_FORMAT),
    "wav": (make.wav, *OTHER_FORMAT),
    "flac": (make.audio("tone.flac", "flac"), *OTHER_FORMAT),
    "m4a": (make.audio("tone.m4a", "aac"), *NO_VIDEO_STREAM),
    "ogg, audio only": (make.audio("tone.ogg", "libopus"), *NO_VIDEO_STREAM),
    "mkv, audio only": (make.audio("tone.mka", "aac"), *NO_VIDEO_STREAM),
    "ts, audio only": (make.audio("tone.ts", "aac"), *NO_VIDEO_STREAM),
    "cover art": (make.cover_art, *NO_VIDEO_STREAM),
    "mkv, subtitles only": (make.subtitle_track, *NO_VIDEO_STREAM),
    "srt": (make.constant(b"1\n00:00:00,000 --> 00:00:01,000\nGood evening.\n\n" * 9), *OTHER_FORMAT),
}
TRUNCATED_FILES = {
    "mp4, 50 %": (make.first("h264.mp4", 0.5), *CORRUPT),
    "mp4, 8 bytes": (make.first_bytes("h264.mp4", 8), *CORRUPT),
    "mp4, 40 bytes": (make.first_bytes("h264.mp4", 40), *CORRUPT),
    "mp4 without tracks": (make.up_to("h264.mp4", b"trak"), *NO_VIDEO_STREAM),
    "mp4 up to stsd": (make.up_to("h264.mp4", b"stsd", 14), *CORRUPT),
    "mp4 up to stsz": (make.up_to("h264.mp4", b"stsz", -4), *CORRUPT),
    "faststart mp4, 10 %": (make.first("header_first.mp4", 0.1), *CORRUPT),
    "faststart mp4, 60 %": (make.first("header_first.mp4", 0.6), *TRUNCATED),
    "faststart mp4, 95 %": (make.first("header_first.mp4", 0.95), *CORRUPT_FRAMES),
    "fragmented mp4, 60 %": (make.first("fragmented.mp4", 0.6), *CORRUPT_FRAMES),
    "fragmented mp4, header only": (make.up_to("fragmented.mp4", b"moof", -8), *NO_FRAMES),
    "mkv, 1 %": (make.first("h264.mkv", 0.01), *CORRUPT),
    "mkv, 10 %": (make.first("h264.mkv", 0.1), *NO_FRAMES),
    "mkv, 60 %": (make.first("h264.mkv", 0.6), *TRUNCATED),
    "webm, 60 %": (make.first("vp9.webm", 0.6), *TRUNCATED),
    "flv, 60 %": (make.first("h264.flv", 0.6), *TRUNCATED),
    "avi, 30 %": (make.first("mpeg4.avi", 0.3), *CORRUPT),
    "avi, 80 %": (make.first("mpeg4.avi", 0.8), *TRUNCATED),
    # These formats do not state a duration.
    "ts, 60 %": (make.first("h264.ts", 0.6), *FINE),
    "ts, 6 %": (make.first("h264.ts", 0.06), *CORRUPT),
    "mpg, 70 %": (make.first("mpeg2.mpg", 0.7), *FINE),
    "gif, 60 %": (make.first("animated.gif", 0.6), *FINE),
    "ogg, 70 %": (make.first("vp8.ogg", 0.7), *FINE),
}
CORRUPT_FILES = {
    "mp4, bit flips in frames": (make.flipped("header_first.mp4", every=97, after=0.3), *CORRUPT_FRAMES),
    "mp4, bit flips in header": (make.flipped("header_first.mp4", every=5), *UNKNOWN),
    "ts, bit flips": (make.flipped("h264.ts", every=97, after=0.3), *CORRUPT_FRAMES),
    "mpg, bit flips": (make.flipped("mpeg2.mpg", every=97, after=0.3), *CORRUPT_FRAMES),
    "ffv1, bit flips": (make.flipped("ffv1.mkv", every=97, after=0.3), *CORRUPT_FRAMES),
    "every third frame corrupt": (make.packets_inverted("prores.mov", lambda i: i % 3 == 1), *CORRUPT_FRAMES),
    "all but the first frame corrupt": (make.packets_inverted("h264.mp4", lambda i: i), *REPEATED),
    "all frames corrupt": (make.packets_inverted("h264.mp4", lambda i: True), *CORRUPT),
    "only keyframe corrupt": (make.packets_inverted("one_gop.mp4", lambda i: i == 0), *CORRUPT),
    "no keyframe, h264": (make.remuxed("one_gop.mp4", "a.mkv", make.only_packets(lambda i: i)), *CORRUPT),
    "no keyframe, h264 in ts": (make.remuxed("one_gop.mp4", "a.ts", make.only_packets(lambda i: i)), *CORRUPT),
    "no keyframe, vp8": (make.remuxed("vp8.webm", "a.webm", make.only_packets(lambda i: 0 < i < 12)), *CORRUPT),
    "no keyframe, vp9": (make.remuxed("vp9.webm", "b.webm", make.only_packets(lambda i: 0 < i < 12)), *CORRUPT),
    "first keyframe missing": (make.remuxed("h264.mkv", "b.mkv", make.only_packets(lambda i: i)), *FINE),
    "no stss": (make.without("h264.mp4", b"stss"), *FINE),
    "no ctts": (make.without("h264.mp4", b"ctts"), *FINE),
    "no stts": (make.without("h264.mp4", b"stts"), *NO_FRAMES),
    "no stsz": (make.without("h264.mp4", b"stsz"), *NO_FRAMES),
    "no stco": (make.without("h264.mp4", b"stco"), *NO_FRAMES),
    "no stsd": (make.without("h264.mp4", b"stsd"), *NO_CODEC),
    "no avcC": (make.without("h264.mp4", b"avcC"), *CORRUPT),
    "unknown codec": (make.replaced("h264.mp4", b"avc1\0", b"xyz1\0"), *NO_CODEC),
    "snow": (make.valid("snow.avi"), *NO_CODEC),
    "flash screen video": (make.valid("flash.avi"), *NO_CODEC),
    "encrypted": (make.valid("encrypted.mp4"), *NO_CODEC),
    "frames of 2 GiB": (make.patched("h264.mp4", b"stsz", 4, ">I", 2**31 - 1), *NO_FRAMES),
    "4 billion stsz entries": (make.patched("h264.mp4", b"stsz", 8, ">I", 2**32 - 1), *CORRUPT),
    "4 billion stco entries": (make.patched("h264.mp4", b"stco", 4, ">I", 2**32 - 1), *FINE),
    "4 billion elst entries": (make.patched("h264.mp4", b"elst", 4, ">I", 2**32 - 1), *FINE),
    "nested boxes": (make.nested_boxes, *CORRUPT),
    "compressed header": (make.compressed_header, *NO_VIDEO_STREAM),
    "gif, 0x0": (make.patched("animated.gif", b"GIF89a", 0, "<HH", 0, 0), *CORRUPT),
}
SIZES = {
    "odd, h264": (make.of_size("odd.mp4", 175, 143, pix_fmt="yuv444p"), *FINE),
    "odd, vp9": (make.of_size("odd.webm", 175, 143, codec="libvpx-vp9"), *FINE),
    "1x1, vp8": (make.of_size("1x1.webm", 1, 1, codec="libvpx"), *FINE),
    "1x1, png": (make.of_size("1x1.mov", 1, 1, codec="png", pix_fmt="rgb24"), *FINE),
    "2x2, h264": (make.of_size("2x2.mp4", 2, 2), *FINE),
    "4000x2": (make.of_size("wide.mp4", 4000, 2), *FINE),
    "32000x2": (make.of_size("very_wide.mov", 32000, 2, codec="png", pix_fmt="rgb24"), 413, "frame_too_large"),
    "2x4000": (make.of_size("high.mp4", 2, 4000), *FINE),
    "two sizes, ts": (make.of_two_sizes("sizes.ts"), *FINE),
    "two sizes, mpg": (make.of_two_sizes("sizes.mpg", codec="mpeg2video"), *FINE),
    "two sizes, vp8": (make.vp8_of_two_sizes, *FINE),
}
CODECS = {
    **{
        name: (make.valid(name), *FINE)
        for name in (
            *("10_bit.mp4", "gray.mp4", "interlaced.mp4", "mpeg2_interlaced.mpg", "black_and_white.avi", "hevc.mp4"),
            *("av1.mp4", "vp9_alpha.webm", "prores_alpha.mov", "qtrle_alpha.mov", "png_alpha.mov", "h263.3gp"),
            *("sorenson.flv", "wmv2.wmv", "open_gop.mp4", "audio_and_video.mp4", "fragmented.mp4", "vp8.ogg"),
        )
    },
    "rotated by 45 degrees": (
        make.patched("h264.mp4", b"tkhd", 40, ">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 2**30),
        *FINE,
    ),
    "rotation matrix of zeros": (make.patched("h264.mp4", b"tkhd", 40, ">9i", *[0] * 9), *FINE),
}
TIMESTAMPS = {
    "variable frame rate": (make.valid("varying.mp4"), *FINE),
    "one frame": (make.valid("one_frame.mp4"), *REPEATED),
    "one frame, no duration": (make.patched("one_frame.mp4", b"mvhd", 16, ">I", 0), *REPEATED),
    "no duration": (make.patched("h264.mp4", b"mdhd", 16, ">I", 0), *FINE),
    "no time base": (make.patched("h264.mp4", b"mvhd", 12, ">I", 0), *FINE),
    "negative, mp4": (
        make.remuxed(
            "h264.mp4",
            "negative.mp4",
            make.shifted_by(-100),
            container_options={"avoid_negative_ts": "disabled", "use_editlist": "0"},
        ),
        *FINE,
    ),
    "negative, mkv": (
        make.remuxed(
            "h264.mp4", "negative.mkv", make.shifted_by(-100), container_options={"avoid_negative_ts": "disabled"}
        ),
        *FINE,
    ),
    "negative, ts": (
        make.remuxed(
            "h264.mp4", "negative.ts", make.shifted_by(-100), container_options={"avoid_negative_ts": "disabled"}
        ),
        *FINE,
    ),
    "missing, avi": (make.remuxed("mpeg4.avi", "missing.avi", make.without_timestamps), *FINE),
    "missing, ogg": (make.remuxed("vp8.ogg", "missing.ogg", make.without_timestamps), *FINE),
    "restarting": (make.joined(make.valid("h264.ts"), make.valid("h264.ts")), *FINE),
    "late start": (make.remuxed("h264.mp4", "late.mp4", make.shifted_by(50)), *FINE),
    "edit list skips the start": (make.remuxed("h264.mp4", "skip.mp4", make.shifted_by(-7)), *FINE),
    "edit list skips everything": (make.remuxed("h264.mp4", "all.mp4", make.shifted_by(-100)), *CORRUPT),
    "negative edit list entry": (make.patched("h264.mp4", b"elst", 16, ">i", -65536), *FINE),
    "edit list beyond the end": (make.patched("h264.mp4", b"elst", 12, ">i", 2**31 - 1), *CORRUPT),
}
PLAYLISTS = {
    **{
        f"{kind} to {target}": (playlist(write, target), *refusal)
        for kind, write, refusal in (
            ("ffconcat", make.ffconcat, OTHER_FORMAT),
            ("HLS", make.hls, NOT_A_VIDEO),
            ("HLS master", make.hls_master, NOT_A_VIDEO),
            ("HLS with a key", make.hls_with_key, NOT_A_VIDEO),
            ("DASH", make.dash, NOT_A_VIDEO),
            ("ASX", make.asx, NOT_A_VIDEO),
            ("SMIL", make.smil, NOT_A_VIDEO),
        )
        for target in ("url", "absolute path", "file name")
    },
    **{
        f"ffconcat to {target[:10]}": (playlist(make.ffconcat, target), *OTHER_FORMAT)
        for target in (
            "/etc/passwd",
            "file:///etc/passwd",
            f"subfile,,start,0,end,0,,:{LOCAL_NAME}",
            "data:video/mp4;base64,AAAA",
            f"concat:{LOCAL_NAME}|{LOCAL_NAME}",
            "../../../../etc/passwd",
            "rtsp://127.0.0.1/",
            "pipe:0",
            "fd:0",
        )
    },
    **{
        f"plain {target[:10]}": (make.constant(target.encode()), *NOT_A_VIDEO)
        for target in (
            "/etc/passwd",
            LOCAL_NAME,
            f"subfile,,start,0,end,0,,:{LOCAL_NAME}",
            "data:video/mp4;base64,AAAA",
            f"concat:{LOCAL_NAME}|{LOCAL_NAME}",
            "http://127.0.0.1/clip.mp4",
            "frame-%03d.png",
        )
    },
    "SDP": (make.constant(make.sdp()), *OTHER_FORMAT),
    "QuickTime to url": (playlist(lambda url: make.reference_movie(url.encode()), "url"), *NO_VIDEO_STREAM),
    "QuickTime to file name": (
        playlist(lambda name: make.reference_movie(name.encode()), "file name"),
        *NO_VIDEO_STREAM,
    ),
    "external media, alias": (make.with_external_alias, *NO_FRAMES),
    "external media, URL": (make.with_external_url, *CORRUPT),
    "avi, playlist as subtitles": (
        lambda sources: make.avi_with_playlist_as_subtitles(sources.url, sources.bytes("mpeg4.avi")),
        *FINE,
    ),
}
ARCHIVES_AND_POLYGLOTS = {
    "zip": (make.zipped("h264.mp4"), *NOT_A_VIDEO),
    "zip, stored": (make.zipped("h264.ts", compressed=False), *NOT_A_VIDEO),
    "tar": (make.tarred("h264.mp4"), *NOT_A_VIDEO),
    "tar of ts": (make.tarred("h264.ts"), *NOT_A_VIDEO),
    "tar of mpg": (make.tarred("mpeg2.mpg"), *NOT_A_VIDEO),
    "gzip": (make.gzipped("h264.mp4"), *NOT_A_VIDEO),
    "mp4, then zip": (make.joined(make.valid("h264.mp4"), make.zipped("h264.mp4")), *FINE),
    "gif, then zip": (make.joined(make.valid("animated.gif"), make.zipped("h264.mp4")), *FINE),
    "zip, then mp4": (make.joined(make.zipped("h264.mp4"), make.valid("h264.mp4")), *NOT_A_VIDEO),
    "HTML, then mp4": (make.joined(make.constant(b"<script>alert(1)</script>"), make.valid("h264.mp4")), *UNKNOWN),
    "mp4 with HTML inside": (make.joined(make.valid("h264.mp4"), make.constant(make.box(b"free", b"<script>"))), *FINE),
    "mp4, then webm": (make.joined(make.valid("h264.mp4"), make.valid("vp9.webm")), *FINE),
}
OVER_LIMITS = {
    "too many bytes": (make.constant(bytes(MAX_UPLOAD_BYTES + 1)), 413, "upload_too_large"),
    "ten hours, mp4": (make.at_times("hours.mp4", [0, 40, 80, 36_000_000]), 413, "video_too_long"),
    "ten hours, mkv": (make.at_times("hours.mkv", [0, 40, 80, 36_000_000]), 413, "video_too_long"),
    "frame duration of a day": (make.patched("h264.mp4", b"stts", 12, ">I", 2**31 - 1), 413, "video_too_long"),
    "8192x2064, h264": (make.of_8192_pixels_width, 413, "frame_too_large"),
    "8192x8192, gif": (make.patched("animated.gif", b"GIF89a", 0, "<HH", 8192, 8192), 413, "frame_too_large"),
    "65535x65535, qtrle": (make.patched("qtrle.mov", b"rle ", 24, ">HH", 65535, 65535), 413, "frame_too_large"),
    "4 billion frames": (make.patched("h264.mp4", b"stts", 8, ">I", 2**32 - 1), 413, "too_many_frames"),
    "20,001 frames": (make.many_frames(MAX_FRAMES + 1), 413, "too_many_frames"),
}
UPLOADS = {
    "not media": NOT_MEDIA,
    "images": IMAGES,
    "no video": NO_VIDEO,
    "truncated": TRUNCATED_FILES,
    "corrupt": CORRUPT_FILES,
    "sizes": SIZES,
    "codecs": CODECS,
    "timestamps": TIMESTAMPS,
    "playlists": PLAYLISTS,
    "archives and polyglots": ARCHIVES_AND_POLYGLOTS,
    "over limits": OVER_LIMITS,
}


@pytest.fixture(scope="module")
def listener():
    """(URL of a listening socket, list that grows with every connection to it)."""
    connections = []
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            while True:
                connection, _ = listening.accept()
                connection.close()
                if is_over.is_set():
                    return
                connections.append(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/clip.ts", connections
        is_over.set()
        socket.create_connection(listening.getsockname()).close()
        thread.join()


@pytest.fixture(scope="module")
def sources(server, listener, tmp_path_factory):
    """Clips and attack targets; the local video is also placed in the worker's working directory."""
    folder = tmp_path_factory.mktemp("hostile")
    local_video = write_clip(folder / LOCAL_NAME, FRAMES)
    (worker,) = server.workers()
    (Path(worker.cwd()) / LOCAL_NAME).write_bytes(local_video.read_bytes())
    return Sources(folder, url=listener[0], local_video=local_video)


@pytest.fixture(scope="module")
def good(server, sources):
    """Two valid videos: [(bytes, answer when sent alone), ...]."""
    videos = [sources.bytes("h264.mp4"), sources.bytes("vp8.webm")]
    return [(video, server.rest(video)) for video in videos]


@pytest.fixture(autouse=True)
def unharmed_server(server, listener):
    """After each test the same workers run, and nothing has connected to the listener."""
    workers = server.ready_pids()
    assert workers
    yield
    assert server.ready_pids() == workers
    assert listener[1] == []


# Paths, addresses, names of Python and of FFmpeg's C functions: nothing that a client should see.
INTERNALS = re.compile(
    r"(^|[\s'\"(])/\w|\\\\|0x[0-9a-f]{4}|\w(Error|Exception)\b|Traceback|<\w+ object|errno|codec can't|recursion|sys\."
    r"|libav|avcodec|av_|Invalid data|[\[@] ?(mov|matroska|h264)|" + re.escape(LOCAL_NAME),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Case:
    """A request and its expected response; `expected` is a regular expression for the code or the warnings."""

    name: str
    send: Callable[[], Answer]
    status: int
    expected: str

    def fault(self, answer: Answer) -> str:
        """A description of what is wrong with the answer; empty if it is correct."""
        body, found = answer.body, f"{self.name}: HTTP {answer.status}, {str(answer.body)[:500]}"
        if not answer.is_from_handler or answer.status not in (None, self.status):
            return found
        if self.status == 200:
            if set(body) != {"predictions", "video", "warnings"} or len(body["video"]["frame_times_s"]) != 8:
                return found
            texts = body["warnings"]
            if bool(texts) != bool(self.expected) or not re.search(self.expected, " ".join(texts)):
                return found
        else:
            if set(body) != {"error"} or set(body["error"]) != {"code", "message"}:
                return found
            if not re.fullmatch(self.expected, body["error"]["code"]):
                return found
            texts = [body["error"]["message"]]
        if not all(10 < len(text) < 300 and not INTERNALS.search(text) for text in texts):
            return f"reveals internals: {found}"
        return ""


def assert_answered(answer, status, expected):
    assert not Case("", lambda: answer, status, expected).fault(answer)


@pytest.fixture(scope="module")
def check(server, good):
    """check(cases) sends all cases concurrently, a valid video after every third; all must be answered correctly."""

    def check(cases):
        requests = []
        for index, case in enumerate(cases):
            requests.append((case.send, case.fault))
            if index % 3 == 0:
                video, alone = good[index % 2]
                requests.append(
                    (
                        lambda video=video: server.rest(video),
                        lambda answer, alone=alone: "" if is_same_answer(answer, alone) else f"neighbor: {answer}",
                    )
                )
        answers = concurrently(*(send for send, _ in requests))
        faults = [fault(answer) for (_, fault), answer in zip(requests, answers)]
        assert not any(faults), "\n".join(filter(None, faults))

    return check


@pytest.mark.parametrize("group", UPLOADS)
def test_uploads(server, sources, check, group):
    def case(name, maker, status, expected):
        upload = maker(sources)
        return Case(name, lambda: server.rest(upload), status, expected)

    check([case(name, *row) for name, row in UPLOADS[group].items()])


TRANSPORTS = {
    "multipart": lambda server, data: server.rest(data, send_as="multipart"),
    "json": lambda server, data: server.rest(data, send_as="json"),
    "grpc": lambda server, data: server.grpc(data),
    "grpc_json": lambda server, data: server.grpc(json_body('{"video": "@"}', data)),
    "grpc_stream": lambda server, data: server.grpc_stream(data),
}
SAMPLE = (
    ("not media", "empty"),
    ("not media", "text"),
    ("images", "png"),
    ("no video", "m4a"),
    ("truncated", "faststart mp4, 60 %"),
    ("corrupt", "every third frame corrupt"),
    ("corrupt", "encrypted"),
    ("timestamps", "one frame"),
    ("playlists", "ffconcat to file name"),
    ("over limits", "too many bytes"),
    ("over limits", "8192x8192, gif"),
)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_uploads_by_transport(server, sources, check, transport):
    def case(group, name):
        maker, status, expected = UPLOADS[group][name]
        upload = maker(sources)
        return Case(name, lambda: TRANSPORTS[transport](server, upload), status, expected)

    check([case(group, name) for group, name in SAMPLE])


def test_slow_video_stopped(server, good):
    """A decoder over its time limit is killed; the other videos of the batch are answered, or rejected in advance."""
    slow = make.slow_gif(10_000)
    slower = make.slow_gif(19_000, side=4001)  # "0x4" in "4000x4000" looks like an address
    uploads = (good[0][0], slow, good[1][0], slower)
    answers = concurrently(*(lambda data=data: server.rest(data) for data in uploads))
    assert_answered(answers[1], 413, "decode_timeout")
    assert_answered(answers[3], 413, "decode_cost")
    assert is_same_answer(answers[0], good[0][1]) and is_same_answer(answers[2], good[1][1])


def test_attack_targets_exist(server, sources, listener, monkeypatch):
    """Following a playlist would reach the listener and the local video."""
    assert_answered(server.rest(sources.local_video), *FINE)
    (worker,) = server.workers()
    monkeypatch.chdir(worker.cwd())
    with av.open(io.BytesIO(make.ffconcat(LOCAL_NAME))) as container:
        assert len(list(container.decode(video=0))) == len(FRAMES)
    with pytest.raises(requests.ConnectionError):
        requests.get(sources.url, timeout=10)
    wait_for(lambda: bool(listener[1]))
    listener[1].clear()


def test_requests_share_batches(server, good):
    def clips_and_batches():
        return [server.metric(f"vivit_batch_clips_{part}") for part in ("sum", "count")]

    ((video, alone), _) = good
    clips, batches = clips_and_batches()
    answers = concurrently(*[lambda: server.rest(video)] * 32)
    assert all(is_same_answer(answer, alone) for answer in answers)
    wait_for(lambda: clips_and_batches()[0] >= clips + 32)  # metrics arrive a little later than answers
    assert clips_and_batches()[0] == clips + 32
    assert clips_and_batches()[1] <= batches + 16


# Malformed requests

# JSON body -> error code; "@" is replaced by a valid video in base64.
BAD_JSON = {
    "[]": "bad_json",
    "null": "bad_json",
    "7": "bad_json",
    '"@"': "bad_json",
    "{}": "no_video",
    '{"video": 3}': "bad_base64",
    '{"video": null}': "bad_base64",
    '{"video": ["@"]}': "bad_base64",
    '{"video": {"b64": "@"}}': "bad_base64",
    '{"video": ""}': "empty_body",
    '{"video": "???"}': "bad_base64",
    '{"video": "@A"}': "bad_base64",
    '{"video": "@-_-_"}': "bad_base64",
    '{"video": "http://127.0.0.1/clip.mp4"}': "bad_base64",
    '{"video": "/etc/passwd"}': "bad_base64",
    '{"video": "\\ud800"}': "bad_json",
    '{"video": "@': "bad_json",
    '{"video": "@"}{}': "bad_json",
    '{"video":' * 100_000: "bad_json",
    '{"video": ' + "[" * 100_000 + "]" * 100_000 + "}": "bad_json",
    '{"video": "@", "top_k": ' + "9" * 5000 + "}": "bad_json",
    '{"video": "@", "data": "@"}': "several_videos",
    '{"video": "@", "views": "99x3"}': "too_many_views",
    '{"video": "@", "views": "x"}': "bad_parameter",
    '{"video": "@", "view": "1x1"}': "unknown_parameter",
    '{"video": "@", "a\\u0000b": 1}': "unknown_parameter",
    '{"video": "@", "' + "x" * 10**6 + '": 1}': "unknown_parameter",
    **{
        f'{{"video": "@", "top_k": {value}}}': "bad_parameter"
        for value in ("0", "-1", "1e9", "1e400", "NaN", "-Infinity", "3.0", "true", "null", "[3]", '{"a": 3}', '""')
    },
}
JSON_HEADERS = {"Content-Type": "application/json"}


def json_body(text, video):
    return text.replace("@", base64.b64encode(video).decode()).encode()


def test_bad_json(server, good, check):
    bodies = [(json_body(text, good[0][0]), code) for text, code in BAD_JSON.items()]
    bodies += [(b'{"video": "\xff\xfe"}', "bad_json"), (good[0][0], "bad_json")]
    over_rest = [
        Case(ascii(body[:60]), lambda body=body: server.rest(body, headers=JSON_HEADERS), 400, code)
        for body, code in bodies
    ]
    over_grpc = [  # gRPC has no content type; the handler recognizes objects
        Case(f"gRPC {body[:60]!a}", lambda body=body: server.grpc(body), 400, code)
        for body, code in bodies[4::3]
        if body[:1] == b"{"
    ]
    check(over_rest + over_grpc)


BAD_TOP_K = ("0", "-1", "10", "1e9", "NaN", "3.0", "0x3", "+3", "3 ", "", "٣", "9" * 3000, "3\r\nX-A: 1", "3\0", "%00")
UNKNOWN_PARAMETERS = ("view", "Top_K", "a\0b", "ä\U0001f600", "x" * 100_000, "../../etc/passwd", "a\r\nX-A: 1")


def test_bad_parameters(server, good, check):
    video = good[0][0]

    def cases(parameters, code):
        """The parameters over gRPC, in a form and, where they are valid headers, in a header."""
        ((name, value),) = parameters.items()
        label = ascii(f"{name[:20]}={value[:20]}")
        yield Case(f"gRPC {label}", lambda: server.grpc(video, parameters=parameters), 400, code)
        yield Case(f"form {label}", lambda: server.rest(video, parameters=parameters, send_as="multipart"), 400, code)
        if code == "bad_parameter" and value.isprintable() and value == value.strip():
            headers = {"X-Top-K": value.encode()}
            yield Case(f"header {label}", lambda: server.rest(video, headers=headers), 400, code)

    check(
        [
            *(case for value in BAD_TOP_K for case in cases({"top_k": value}, "bad_parameter")),
            *(case for name in UNKNOWN_PARAMETERS for case in cases({name: "1000x1000"}, "unknown_parameter")),
        ]
    )


def part(name, content, *, header=b""):
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + header + b"\r\n\r\n" + content + b"\r\n"


VIDEO = b"@video@"  # replaced by a valid video
FORMS = {
    "path as file name": ([part(b"video", VIDEO, header=b'; filename="../../etc/passwd"')], *FINE),
    "NUL in file name": ([part(b"video", VIDEO, header=b'; filename="a\0b"')], *FINE),
    "no file name": ([part(b"video", VIDEO)], *FINE),
    "wrong content type": ([part(b"video", VIDEO, header=b"\r\nContent-Type: text/html")], *FINE),
    "two parts named video": ([part(b"video", VIDEO, header=b'; filename="a"')] * 2, 400, "several_videos"),
    "parts video and data": ([part(b"video", VIDEO), part(b"data", VIDEO)], 400, "several_videos"),
    "empty part": ([part(b"video", b"")], 400, "empty_body"),
    "no part": ([], 400, "no_video"),
    "only a parameter": ([part(b"top_k", b"3")], 400, "no_video"),
    "1000 parts": ([part(b"video", VIDEO), *(part(b"p%d" % i, b"1") for i in range(1000))], 400, "unknown_parameter"),
    "binary top_k": ([part(b"video", VIDEO), part(b"top_k", b"\xff\xfe\0")], 400, "bad_parameter"),
    "binary name": ([part(b"video", VIDEO), part(b"\xff\xfe", b"1")], 400, "unknown_parameter"),
    "text": ([part(b"video", b"hello")], *NOT_A_VIDEO),
}
FORM_HEADERS = {"Content-Type": "multipart/form-data; boundary=B"}


def test_forms(server, good, check):
    def case(name, parts, status, expected):
        body = b"".join(parts).replace(VIDEO, good[0][0]) + b"--B--\r\n"
        return Case(name, lambda: server.rest(body, headers=FORM_HEADERS), status, expected)

    # TorchServe itself answers invalid escapes and line ends in a URL-encoded form.
    url_encoded = good[0][0].translate(None, b"%\r\n")
    url_encoded_headers = {"Content-Type": "application/x-www-form-urlencoded"}
    check(
        [
            *(case(name, *row) for name, row in FORMS.items()),
            Case("URL-encoded", lambda: server.rest(url_encoded, headers=url_encoded_headers), 400, "no_video"),
        ]
    )


def test_unparsable_forms(server, good):
    """TorchServe answers forms that Netty cannot parse with a 500; they do not reach a worker."""
    charset = b"; filename=a\r\nContent-Type: text/plain; charset=x"
    encoding = b"; filename=a\r\nContent-Transfer-Encoding: x"
    for body in (
        b"--B\r\nContent-Disposition: form-data\r\n\r\nabc\r\n",
        part(b"", b"abc"),
        part(b"video", b"abc", header=encoding),
        part(b"video", b"abc", header=charset),
    ):
        answer = server.rest(body + b"--B--\r\n", headers=FORM_HEADERS)
        assert (answer.status, answer.error["code"]) == (500, "ErrorDataDecoderException")
    assert is_same_answer(server.rest(good[0][0]), good[0][1])


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzzz\r\nabc\r\n",
        b"X-Top-K: 3\0\r\nContent-Length: 1\r\n\r\n0",
        b"X-Top-K: " + b"3" * 100_000 + b"\r\nContent-Length: 1\r\n\r\n0",
        b"Content-Length: 100000\r\n\r\n" + bytes(1000),
    ],
    ids=lambda rest: ascii(rest[:30]),
)
def test_invalid_http(server, good, rest):
    """TorchServe handles invalid HTTP; it does not reach a worker."""
    host, port = server.inference_url.removeprefix("http://").split(":")
    token = authorization(server.token("inference"))["Authorization"]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        request = f"POST /predictions/vivit HTTP/1.1\r\nAuthorization: {token}\r\n".encode()
        connection.sendall(request + rest)
    assert is_same_answer(server.rest(good[0][0]), good[0][1])


def test_torchserve_headers_ignored(server, good):
    """Headers that TorchServe uses internally change nothing."""
    for headers in (
        {"Content-Encoding": "gzip"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"describe": "True"},
        {"ts_request_sequence_id": "1"},
        {"ts_stream_next": "true"},
    ):
        assert is_same_answer(server.rest(good[0][0], headers=headers), good[0][1]), headers


def test_stateful_streams_rejected(server, good):
    """StreamPredictions2, for models with state, fails; other requests in the batch are answered."""

    def stream_2(data):
        with server.inference_stub() as (_, messages, metadata), open_channel(server.grpc_inference) as channel:
            request = messages.PredictionsRequest(model_name="vivit", input={"data": data}).SerializeToString()
            request += b"\x22\x01a"  # field 4, sequence_id: "a"
            call = channel.stream_stream("/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions2")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([request]), metadata=metadata, timeout=60))
        return caught.value.code()

    asks = [
        (ask, data, alone) for data, alone in good for ask in (server.rest, stream_2, server.grpc) for _ in range(3)
    ]
    answers = concurrently(*(lambda ask=ask, data=data: ask(data) for ask, data, _ in asks))
    for (ask, _, alone), answer in zip(asks, answers):
        assert answer == grpc.StatusCode.UNKNOWN if ask is stream_2 else is_same_answer(answer, alone)


def test_cancelled_streams(server, good):
    with server.inference_stub() as (stub, messages, metadata):
        request = messages.PredictionsRequest(model_name="vivit", input={"data": good[0][0]})
        for cancel_after_s in (0, 0.005, 0.02, 0.05):
            call = stub.StreamPredictions(request, metadata=metadata, timeout=60)
            time.sleep(cancel_after_s)
            call.cancel()
    assert is_same_answer(server.grpc(good[0][0]), good[0][1])

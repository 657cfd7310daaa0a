"""Hostile and broken uploads, one row each, against a real TorchServe: over REST, over gRPC, and beside good ones.

Each row is answered as the README's table of errors says, and whatever it is: no worker dies, no neighbour in the batch
notices, no address is asked, no file is read, and no message tells more than it should.
"""

import base64
import io
import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import grpc
import pytest
import requests

from handler.cli.build import build_archive
from handler.cli.client import load_proto, open_channel
from handler.cli.server import Server, on_free_ports, read_properties, with_model_settings, write_properties
from tests.server.test_server import authorization
from tests.support import hostile_clips as make
from tests.support.clips import write_clip
from tests.support.hostile_clips import FRAMES, Workshop, whole

ROOT = Path(__file__).resolve().parents[2]
LOCAL_NAME = "neighbour.ts"
UPLOAD_BYTES, REQUEST_BYTES, DECODE_S, VIDEO_FRAMES = 8_000_000, 12_000_000, 6, 20_000
CONFIG = f"""
responseTimeout: 120
startupTimeout: 120
handler: {{decode_processes: 2, max_upload_bytes: {UPLOAD_BYTES}, max_decode_s: {DECODE_S}, max_frames: {VIDEO_FRAMES}}}
"""

NOT_A_VIDEO, OTHER_KIND, NO_CODEC = (415, "not_a_video"), (415, "unsupported_container"), (415, "unsupported_codec")
NEITHER = (415, "not_a_video|unsupported_container")  # what FFmpeg takes meaningless bytes for is a matter of chance
NO_STREAM, NO_FRAMES, CORRUPT = (422, "no_video_stream"), (422, "no_frames"), (422, "corrupt_video")
FINE, DAMAGED, CUT_OFF, REPEATED = (200, ""), (200, "partially corrupt"), (200, "is truncated"), (200, "frames repeat")


def playlist(write, target):
    """A playlist that names the listener ("url"), the local video in the workers' folder, or anything else."""

    def maker(workshop):
        named = {"url": workshop.url, "absolute": str(workshop.local_video), "beside": LOCAL_NAME}
        return write(named.get(target, target))

    return maker


# Name -> (what makes it, the HTTP status, the error's code or a part of a warning).
NOT_MEDIA = {
    "empty": (make.data(b""), 400, "empty_body"),
    "one byte": (make.data(b"\0"), *NOT_A_VIDEO),
    "text": (make.data(b"hello, world\n" * 50), *NOT_A_VIDEO),
    "HTML": (make.data(b"<!doctype html><html><body>not found</body></html>" * 9), *NOT_A_VIDEO),
    "SVG that shows a file": (make.data(b'<svg><image href="file:///etc/passwd"/></svg>'), *NEITHER),
    "noise": (make.data(random.Random(0).randbytes(5000)), *NEITHER),
    "zeros": (make.data(bytes(5000)), *NOT_A_VIDEO),
    "program": (make.data(b"\x7fELF\2\1\1" + bytes(500)), *NOT_A_VIDEO),
}
PICTURES = {
    "png": (make.picture("PNG"), *OTHER_KIND),
    "jpeg": (make.picture("JPEG"), *OTHER_KIND),
    "webp": (make.picture("WEBP"), *OTHER_KIND),
    "tiff": (make.picture("TIFF"), *OTHER_KIND),
    "bmp": (make.picture("BMP"), *OTHER_KIND),
    "heic": (make.heic(), *NOT_A_VIDEO),
    "avif": (whole("still.avif"), *NOT_A_VIDEO),
    "animated avif": (whole("animated.avif"), *NOT_A_VIDEO),
    "animated png": (whole("animated.apng"), *OTHER_KIND),
    "animated webp": (whole("animated.webp"), *OTHER_KIND),
    "animated gif": (whole("animated.gif"), *FINE),
    "gif of one frame": (whole("still.gif"), *REPEATED),
}
NO_MOVING_PICTURES = {
    "mp3": (make.sound("tone.mp3", "libmp3lame"), *OTHER_KIND),
    "wav": (make.wav, *OTHER_KIND),
    "flac": (make.sound("tone.flac", "flac"), *OTHER_KIND),
    "m4a": (make.sound("tone.m4a", "aac"), *NO_STREAM),
    "ogg with sound": (make.sound("tone.ogg", "libopus"), *NO_STREAM),
    "mkv with sound": (make.sound("tone.mka", "aac"), *NO_STREAM),
    "ts with sound": (make.sound("tone.ts", "aac"), *NO_STREAM),
    "record with its sleeve": (make.cover_art, *NO_STREAM),
    "mkv with subtitles": (make.subtitles, *NO_STREAM),
    "srt": (make.data(b"1\n00:00:00,000 --> 00:00:01,000\nGood evening.\n\n" * 9), *OTHER_KIND),
}
CUT = {
    "mp4 without its index": (make.first("h264.mp4", 0.5), *CORRUPT),
    "mp4, 8 bytes": (make.first_bytes("h264.mp4", 8), *CORRUPT),
    "mp4, 40 bytes": (make.first_bytes("h264.mp4", 40), *CORRUPT),
    "mp4 cut before its tracks": (make.up_to("h264.mp4", b"trak"), *NO_STREAM),
    "mp4 cut within its stsd": (make.up_to("h264.mp4", b"stsd", 14), *CORRUPT),
    "mp4 cut before its sizes": (make.up_to("h264.mp4", b"stsz", -4), *CORRUPT),
    "mp4 with index in front, 10 %": (make.first("header_first.mp4", 0.1), *CORRUPT),
    "mp4 with index in front, 60 %": (make.first("header_first.mp4", 0.6), *CUT_OFF),
    "mp4 with index in front, 95 %": (make.first("header_first.mp4", 0.95), *DAMAGED),
    "fragmented mp4, 60 %": (make.first("fragmented.mp4", 0.6), *DAMAGED),
    "fragmented mp4, only its header": (make.up_to("fragmented.mp4", b"moof", -8), *NO_FRAMES),
    "mkv, 1 %": (make.first("h264.mkv", 0.01), *CORRUPT),
    "mkv, 10 %": (make.first("h264.mkv", 0.1), *NO_FRAMES),
    "mkv, 60 %": (make.first("h264.mkv", 0.6), *CUT_OFF),
    "webm, 60 %": (make.first("vp9.webm", 0.6), *CUT_OFF),
    "flv, 60 %": (make.first("h264.flv", 0.6), *CUT_OFF),
    "avi without its pictures": (make.first("mpeg4.avi", 0.3), *CORRUPT),
    "avi, 80 %": (make.first("mpeg4.avi", 0.8), *CUT_OFF),
    # Nothing in these says how long they are meant to be.
    "ts, 60 %": (make.first("h264.ts", 0.6), *FINE),
    "ts, within its first picture": (make.first("h264.ts", 0.06), *CORRUPT),
    "mpg, 70 %": (make.first("mpeg2.mpg", 0.7), *FINE),
    "gif, 60 %": (make.first("animated.gif", 0.6), *FINE),
    "ogg, 70 %": (make.first("vp8.ogg", 0.7), *FINE),
}
BROKEN = {
    "mp4 with bits flipped in its pictures": (make.flipped("header_first.mp4", every=97, after=0.3), *DAMAGED),
    "mp4 with bits flipped in its header": (make.flipped("header_first.mp4", every=5), *NEITHER),
    "ts with bits flipped": (make.flipped("h264.ts", every=97, after=0.3), *DAMAGED),
    "mpg with bits flipped": (make.flipped("mpeg2.mpg", every=97, after=0.3), *DAMAGED),
    "ffv1 with bits flipped": (make.flipped("ffv1.mkv", every=97, after=0.3), *DAMAGED),
    "some frames are noise": (make.packets_inverted("prores.mov", lambda i: i % 3 == 1), *DAMAGED),
    "all frames but the first are noise": (make.packets_inverted("h264.mp4", lambda i: i), *REPEATED),
    "all frames are noise": (make.packets_inverted("h264.mp4", lambda i: True), *CORRUPT),
    "the keyframe is noise": (make.packets_inverted("one_gop.mp4", lambda i: i == 0), *CORRUPT),
    "no keyframe, h264": (make.remuxed("one_gop.mp4", "a.mkv", make.only_packets(lambda i: i)), *CORRUPT),
    "no keyframe, h264 in ts": (make.remuxed("one_gop.mp4", "a.ts", make.only_packets(lambda i: i)), *CORRUPT),
    "no keyframe, vp8": (make.remuxed("vp8.webm", "a.webm", make.only_packets(lambda i: 0 < i < 12)), *CORRUPT),
    "no keyframe, vp9": (make.remuxed("vp9.webm", "b.webm", make.only_packets(lambda i: 0 < i < 12)), *CORRUPT),
    "the first keyframe is missing": (make.remuxed("h264.mkv", "b.mkv", make.only_packets(lambda i: i)), *FINE),
    "no list of keyframes": (make.without("h264.mp4", b"stss"), *FINE),
    "no display times": (make.without("h264.mp4", b"ctts"), *FINE),
    "no times": (make.without("h264.mp4", b"stts"), *NO_FRAMES),
    "no sizes": (make.without("h264.mp4", b"stsz"), *NO_FRAMES),
    "no places": (make.without("h264.mp4", b"stco"), *NO_FRAMES),
    "no codec": (make.without("h264.mp4", b"stsd"), *NO_CODEC),
    "no codec header": (make.without("h264.mp4", b"avcC"), *CORRUPT),
    "a codec that nobody knows": (make.replaced("h264.mp4", b"avc1\0", b"xyz1\0"), *NO_CODEC),
    "a codec that is not accepted": (whole("snow.avi"), *NO_CODEC),
    "a screen recorder's codec": (whole("flash.avi"), *NO_CODEC),
    "encrypted": (whole("encrypted.mp4"), *NO_CODEC),
    "frames of 2 GiB": (make.patched("h264.mp4", b"stsz", 4, ">I", 2**31 - 1), *NO_FRAMES),
    "4 billion sizes": (make.patched("h264.mp4", b"stsz", 8, ">I", 2**32 - 1), *CORRUPT),
    "4 billion places": (make.patched("h264.mp4", b"stco", 4, ">I", 2**32 - 1), *FINE),
    "4 billion edits": (make.patched("h264.mp4", b"elst", 4, ">I", 2**32 - 1), *FINE),
    "boxes within boxes": (make.boxes_within_boxes, *CORRUPT),
    "64 MiB of zeros as a compressed header": (make.compressed_header, *NO_STREAM),
    "a gif without area": (make.patched("animated.gif", b"GIF89a", 0, "<HH", 0, 0), *CORRUPT),
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
    "growing midway, ts": (make.of_two_sizes("sizes.ts"), *FINE),
    "growing midway, mpg": (make.of_two_sizes("sizes.mpg", codec="mpeg2video"), *FINE),
    "growing midway, vp8": (make.vp8_of_two_sizes, *FINE),
}
KINDS = {
    **{
        name: (whole(name), *FINE)
        for name in (
            *("10_bit.mp4", "grey.mp4", "interlaced.mp4", "mpeg2_interlaced.mpg", "black_and_white.avi", "hevc.mp4"),
            *("av1.mp4", "vp9_alpha.webm", "prores_alpha.mov", "qtrle_alpha.mov", "png_alpha.mov", "h263.3gp"),
            *("sorenson.flv", "wmv2.wmv", "open_gop.mp4", "sound_and_picture.mp4", "fragmented.mp4", "vp8.ogg"),
        )
    },
    "turned by 45 degrees": (
        make.patched("h264.mp4", b"tkhd", 40, ">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 2**30),
        *FINE,
    ),
    "turned by zeros": (make.patched("h264.mp4", b"tkhd", 40, ">9i", *[0] * 9), *FINE),
}
TIMES = {
    "varying": (whole("varying.mp4"), *FINE),
    "one frame": (whole("one_frame.mp4"), *REPEATED),
    "one frame of no duration": (make.patched("one_frame.mp4", b"mvhd", 16, ">I", 0), *REPEATED),
    "no duration": (make.patched("h264.mp4", b"mdhd", 16, ">I", 0), *FINE),
    "no unit of time": (make.patched("h264.mp4", b"mvhd", 12, ">I", 0), *FINE),
    "negative, mp4": (
        make.remuxed(
            "h264.mp4",
            "negative.mp4",
            make.later_by(-100),
            container_options={"avoid_negative_ts": "disabled", "use_editlist": "0"},
        ),
        *FINE,
    ),
    "negative, mkv": (
        make.remuxed(
            "h264.mp4", "negative.mkv", make.later_by(-100), container_options={"avoid_negative_ts": "disabled"}
        ),
        *FINE,
    ),
    "negative, ts": (
        make.remuxed(
            "h264.mp4", "negative.ts", make.later_by(-100), container_options={"avoid_negative_ts": "disabled"}
        ),
        *FINE,
    ),
    "missing, avi": (make.remuxed("mpeg4.avi", "missing.avi", make.without_times), *FINE),
    "missing, ogg": (make.remuxed("vp8.ogg", "missing.ogg", make.without_times), *FINE),
    "beginning anew": (make.joined(whole("h264.ts"), whole("h264.ts")), *FINE),
    "beginning late": (make.remuxed("h264.mp4", "late.mp4", make.later_by(50)), *FINE),
    "an edit list that skips the beginning": (make.remuxed("h264.mp4", "skip.mp4", make.later_by(-7)), *FINE),
    "an edit list that skips everything": (make.remuxed("h264.mp4", "all.mp4", make.later_by(-100)), *CORRUPT),
    "an edit list that goes backwards": (make.patched("h264.mp4", b"elst", 16, ">i", -65536), *FINE),
    "an edit list beyond the end": (make.patched("h264.mp4", b"elst", 12, ">i", 2**31 - 1), *CORRUPT),
}
PLAYLISTS = {
    **{
        f"{kind} to {target}": (playlist(write, target), *refusal)
        for kind, write, refusal in (
            ("ffconcat", make.ffconcat, OTHER_KIND),
            ("HLS", make.hls, NOT_A_VIDEO),
            ("HLS master", make.hls_master, NOT_A_VIDEO),
            ("HLS with a key", make.hls_with_key, NOT_A_VIDEO),
            ("DASH", make.dash, NOT_A_VIDEO),
            ("ASX", make.asx, NOT_A_VIDEO),
            ("SMIL", make.smil, NOT_A_VIDEO),
        )
        for target in ("url", "absolute", "beside")
    },
    **{
        f"ffconcat to {target[:10]}": (playlist(make.ffconcat, target), *OTHER_KIND)
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
        f"only {target[:10]}": (make.data(target.encode()), *NOT_A_VIDEO)
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
    "SDP": (make.data(make.sdp()), *OTHER_KIND),
    "QuickTime to url": (playlist(lambda url: make.reference_movie(url.encode()), "url"), *NO_STREAM),
    "QuickTime to beside": (playlist(lambda name: make.reference_movie(name.encode()), "beside"), *NO_STREAM),
    "media in another file, alias": (make.with_alias_elsewhere, *NO_FRAMES),
    "media in another file, URL": (make.with_url_elsewhere, *CORRUPT),
    "avi with a playlist as subtitles": (
        lambda workshop: make.avi_with_playlist_as_subtitles(workshop.url, workshop.bytes("mpeg4.avi")),
        *FINE,
    ),
}
ARCHIVES_AND_POLYGLOTS = {
    "zip": (make.zipped("h264.mp4"), *NOT_A_VIDEO),
    "zip that does not compress": (make.zipped("h264.ts", compressed=False), *NOT_A_VIDEO),
    "tar": (make.tarred("h264.mp4"), *NOT_A_VIDEO),
    "tar of ts": (make.tarred("h264.ts"), *NOT_A_VIDEO),
    "tar of mpg": (make.tarred("mpeg2.mpg"), *NOT_A_VIDEO),
    "gzip": (make.gzipped("h264.mp4"), *NOT_A_VIDEO),
    "mp4, then zip": (make.joined(whole("h264.mp4"), make.zipped("h264.mp4")), *FINE),
    "gif, then zip": (make.joined(whole("animated.gif"), make.zipped("h264.mp4")), *FINE),
    "zip, then mp4": (make.joined(make.zipped("h264.mp4"), whole("h264.mp4")), *NOT_A_VIDEO),
    "HTML, then mp4": (make.joined(make.data(b"<script>alert(1)</script>"), whole("h264.mp4")), *NEITHER),
    "mp4 with HTML inside": (make.joined(whole("h264.mp4"), make.data(make.box(b"free", b"<script>"))), *FINE),
    "mp4, then webm": (make.joined(whole("h264.mp4"), whole("vp9.webm")), *FINE),
}
OVER_LIMITS = {
    "a file of more bytes": (make.joined(whole("h264.mp4"), make.data(bytes(UPLOAD_BYTES))), 413, "upload_too_large"),
    "ten hours, mp4": (make.at_times("hours.mp4", [0, 40, 80, 36_000_000]), 413, "video_too_long"),
    "ten hours, mkv": (make.at_times("hours.mkv", [0, 40, 80, 36_000_000]), 413, "video_too_long"),
    "frames of a day": (make.patched("h264.mp4", b"stts", 12, ">I", 2**31 - 1), 413, "video_too_long"),
    "8192x8192, h264": (make.claiming_8192x8192, 413, "frame_too_large"),
    "8192x8192, gif": (make.patched("animated.gif", b"GIF89a", 0, "<HH", 8192, 8192), 413, "frame_too_large"),
    "65535x65535, qtrle": (make.patched("qtrle.mov", b"rle ", 24, ">HH", 65535, 65535), 413, "frame_too_large"),
    "4 billion frames": (make.patched("h264.mp4", b"stts", 8, ">I", 2**32 - 1), 413, "too_many_frames"),
    "one frame too many": (make.many_frames(VIDEO_FRAMES + 1), 413, "too_many_frames"),
}
UPLOADS = {
    f"{table}: {name}": row
    for table, rows in {
        "not media": NOT_MEDIA,
        "picture": PICTURES,
        "no moving pictures": NO_MOVING_PICTURES,
        "cut": CUT,
        "broken": BROKEN,
        "size": SIZES,
        "kind": KINDS,
        "times": TIMES,
        "playlist": PLAYLISTS,
        "archive or polyglot": ARCHIVES_AND_POLYGLOTS,
        "over a limit": OVER_LIMITS,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture(scope="module")
def listener():
    """The address of a socket of our own, and a list with an entry for each connection to it."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            while True:
                connection, _ = listening.accept()
                connection.close()
                if is_over.is_set():
                    return
                connections.append(connection)

        is_over = threading.Event()
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/clip.ts", connections
        is_over.set()
        socket.create_connection(listening.getsockname()).close()
        thread.join()


@pytest.fixture(scope="module")
def workshop(listener, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return Workshop(folder, url=listener[0], local_video=write_clip(folder / LOCAL_NAME, FRAMES))


@pytest.fixture(scope="module")
def server(checkpoint, workshop, tmp_path_factory):
    """The settings that ship, but for ports, sizes, one worker and a batch that waits for all who were sent together.

    The local video lies where the workers run.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "model-config.yaml").write_text(CONFIG)
    store = folder / "store"
    build_archive(
        checkpoint=str(checkpoint),
        name="vivit",
        version="1.0",
        export_path=store,
        config=folder / "model-config.yaml",
    )
    properties = on_free_ports(read_properties(ROOT / "config.properties"))
    properties = with_model_settings(properties, minWorkers=1, maxBatchDelay=20)
    config = write_properties(
        folder / "config.properties",
        {**properties, "max_request_size": str(REQUEST_BYTES)},
    )
    with Server(config=config, model_store=store, directory=folder / "run") as server:
        server.wait_until_ready("vivit")
        (worker,) = server.workers()
        (Path(worker.cwd()) / LOCAL_NAME).write_bytes(workshop.local_video.read_bytes())
        yield server


@pytest.fixture(scope="module")
def worker_pids(server):
    return described_pids(server)


@pytest.fixture(autouse=True)
def nobody_is_harmed(server, worker_pids, listener):
    """After each row the workers are the same, and nobody has been asked for anything."""
    yield
    assert described_pids(server) == worker_pids
    assert listener[1] == []


@pytest.fixture(scope="module")
def upload(workshop):
    """upload(name) -> the bytes of a row, made once."""
    made = {}

    def make_once(name):
        if name not in made:
            made[name] = UPLOADS[name][0](workshop)
        return made[name]

    return make_once


def described_pids(server):
    answer = requests.get(f"{server.management_url}/models/vivit", headers=server.headers("management"), timeout=60)
    return [worker["pid"] for worker in answer.json()[0]["workers"]]


def post(server, data, *, headers={}, **options):
    return requests.post(
        f"{server.inference_url}/predictions/vivit",
        data=data,
        headers={**server.headers("inference"), **headers},
        timeout=120,
        **options,
    )


def over_rest(server, data, **headers):
    """(HTTP status, answer)."""
    response = post(server, data, headers={"Content-Type": "application/octet-stream", **headers})
    return response.status_code, response.json()


def over_grpc(server, data, **inputs):
    """(None, answer), since gRPC knows no status."""
    messages, services = load_proto("inference.proto")
    with open_channel(server.grpc_inference) as channel:
        response = services.InferenceAPIsServiceStub(channel).Predictions(
            messages.PredictionsRequest(model_name="vivit", input={"data": data, **inputs}),
            metadata=authorization(server),
            timeout=120,
        )
    return None, json.loads(response.prediction)


TELLTALE = re.compile(
    r"(^|[\s'\"(])/\w|\\\\|0x[0-9a-f]{4}|\w(Error|Exception)\b|Traceback|<\w+ object|errno|codec can't|recursion|sys\."
    r"|libav|avcodec|av_|Invalid data|[\[@] ?(mov|matroska|h264)|" + re.escape(LOCAL_NAME),
    re.IGNORECASE,
)


def assert_answered(got, status, words):
    """That (status or None, answer) is an answer with a warning of these words, or a refusal with this code."""
    assert got[0] in (None, status), got
    answer = got[1]
    if status == 200:
        assert set(answer) == {"predictions", "video", "warnings"}, answer
        assert len(answer["video"]["frames"]) == 8
        assert any(words in each for each in answer["warnings"]) if words else answer["warnings"] == []
        said = answer["warnings"]
    else:
        assert set(answer) == {"error"} and set(answer["error"]) == {"code", "message"}, answer
        assert re.fullmatch(words, answer["error"]["code"]), answer
        said = [answer["error"]["message"]]
    for sentence in said:
        assert 10 < len(sentence) < 300 and not TELLTALE.search(sentence), sentence


@pytest.fixture(scope="module")
def good(server, workshop):
    """[(bytes, what is answered to it alone), ...]."""
    files = [workshop.bytes("h264.mp4"), workshop.bytes("vp8.webm")]
    return [(data, over_rest(server, data)[1]) for data in files]


def assert_same(answer, expected):
    """The same top-1 and the same scores as alone."""
    assert answer["predictions"][0]["label"] == expected["predictions"][0]["label"]
    scores = [{each["label"]: each["score"] for each in one["predictions"]} for one in (answer, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert answer["video"] == expected["video"] and answer["warnings"] == expected["warnings"]


@pytest.mark.parametrize("name", UPLOADS)
@pytest.mark.parametrize("ask", [over_rest, over_grpc], ids=["REST", "gRPC"])
def test_an_upload_is_answered_alone(server, upload, ask, name):
    assert_answered(ask(server, upload(name)), *UPLOADS[name][1:])


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_is_answered_beside_good_ones_and_these_as_if_alone(server, upload, good, name):
    asked = [(over_rest, good[0][0]), (over_rest, upload(name)), (over_grpc, good[1][0]), (over_grpc, upload(name))]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: each[0](server, each[1]), asked))
    assert_same(answers[0][1], good[0][1])
    assert_same(answers[2][1], good[1][1])
    for got in (answers[1], answers[3]):
        assert_answered(got, *UPLOADS[name][1:])


def test_a_file_that_keeps_a_decoder_busy_is_stopped_and_its_neighbours_are_answered(server, good):
    slow = make.slow_gif(5000)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda data: over_rest(server, data), [good[0][0], slow, good[1][0]]))
    assert_answered(answers[1], 413, "decode_timeout")
    assert_same(answers[0][1], good[0][1])
    assert_same(answers[2][1], good[1][1])


def test_what_playlists_name_is_there_to_be_found(server, workshop, listener, monkeypatch):
    assert_answered(over_rest(server, workshop.local_video.read_bytes()), *FINE)
    monkeypatch.chdir(server.workers()[0].cwd())
    with av.open(io.BytesIO(make.ffconcat(LOCAL_NAME))) as container:
        assert len(list(container.decode(video=0))) == len(FRAMES)
    with pytest.raises(requests.ConnectionError):
        requests.get(workshop.url)
    while not listener[1]:
        time.sleep(0.01)
    listener[1].clear()


def test_what_is_sent_together_shares_batches(server, good):
    def clips_and_batches():
        text = requests.get(f"{server.metrics_url}/metrics", headers=server.headers("management"), timeout=60).text
        return [
            float(re.search(rf"^vivit_batch_clips_{each}{{.*}} (.+)$", text, re.MULTILINE)[1])
            for each in ("sum", "count")
        ]

    def wait_until_still():  # metrics come a little later than answers
        numbers, earlier = clips_and_batches(), None
        while numbers != earlier:
            time.sleep(1)
            numbers, earlier = clips_and_batches(), numbers
        return numbers

    before = wait_until_still()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: over_rest(server, good[0][0]), range(32)))
    clips, batches = (after - earlier for after, earlier in zip(wait_until_still(), before))
    assert clips == 32 and batches <= 16


# What is wrong with the request around the video.

# Text of the body -> the error's code; "@" stands for a whole video in base64.
JSON = {
    "an array": ("[]", "bad_json"),
    "null": ("null", "bad_json"),
    "a number": ("7", "bad_json"),
    "a string": ('"@"', "bad_json"),
    "no key": ("{}", "no_video"),
    "the video is a number": ('{"video": 3}', "bad_base64"),
    "the video is null": ('{"video": null}', "bad_base64"),
    "the video is an array": ('{"video": ["@"]}', "bad_base64"),
    "the video is an object": ('{"video": {"b64": "@"}}', "bad_base64"),
    "the video is empty": ('{"video": ""}', "empty_body"),
    "bad base64": ('{"video": "???"}', "bad_base64"),
    "base64 that is cut off": ('{"video": "@A"}', "bad_base64"),
    "base64 of another alphabet": ('{"video": "@-_-_"}', "bad_base64"),
    "a URL": ('{"video": "http://127.0.0.1/clip.mp4"}', "bad_base64"),
    "a path": ('{"video": "/etc/passwd"}', "bad_base64"),
    "a lone surrogate": ('{"video": "\\ud800"}', "bad_base64"),
    "cut off": ('{"video": "@', "bad_json"),
    "two objects": ('{"video": "@"}{}', "bad_json"),
    "nested objects": ('{"video":' * 100_000, "bad_json"),
    "nested arrays": ('{"video": ' + "[" * 100_000 + "]" * 100_000 + "}", "bad_json"),
    "a number of 5000 digits": ('{"video": "@", "top_k": ' + "9" * 5000 + "}", "bad_json"),
    "no UTF-8": (b'{"video": "\xff\xfe"}', "bad_json"),
    "two videos": ('{"video": "@", "data": "@"}', "several_videos"),
    "an unknown key": ('{"video": "@", "views": "1000x1000"}', "unknown_parameter"),
    "a key with a NUL": ('{"video": "@", "a\\u0000b": 1}', "unknown_parameter"),
    "a key of a million letters": ('{"video": "@", "' + "x" * 10**6 + '": 1}', "unknown_parameter"),
    **{
        f"top_k = {value}": (f'{{"video": "@", "top_k": {value}}}', "bad_parameter")
        for value in (
            "0",
            "-1",
            "1e9",
            "1e400",
            "NaN",
            "-Infinity",
            "3.0",
            "true",
            "null",
            "[3]",
            '{"a": 3}',
            '"\\u0000"',
            '""',
        )
    },
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_no_request_is_a_400(server, good, name):
    text, code = JSON[name]
    body = text if isinstance(text, bytes) else text.replace("@", base64.b64encode(good[0][0]).decode()).encode()
    assert_answered(over_rest(server, body, **{"Content-Type": "application/json"}), 400, code)
    if body[:1] == b"{":  # gRPC does not say that it is JSON
        assert_answered(over_grpc(server, body), 400, code)


def test_bytes_that_are_said_to_be_json_are_a_400(server, good):
    assert_answered(over_rest(server, good[0][0], **{"Content-Type": "application/json"}), 400, "bad_json")


TOP_K = (
    "0",
    "-1",
    "10",
    "1e9",
    "1e400",
    "NaN",
    "inf",
    "3.0",
    "0x3",
    "+3",
    "3 ",
    "",
    "٣",
    "9" * 3000,
    "3\r\nX-A: 1",
    "3\0",
    "\ufeff3",
    "%00",
    "${7*7}",
)


@pytest.mark.parametrize("value", TOP_K, ids=lambda value: ascii(value[:9]))
def test_top_k_out_of_range_is_a_400_wherever_it_stands(server, good, value):
    data = good[0][0]
    assert_answered(over_grpc(server, data, top_k=value.encode()), 400, "bad_parameter")
    form = post(server, {"top_k": value}, files={"video": data})
    assert_answered((form.status_code, form.json()), 400, "bad_parameter")
    if value.isprintable() and value == value.strip():  # no client sends others in a header
        assert_answered(over_rest(server, data, **{"X-Top-K": value.encode()}), 400, "bad_parameter")


NAMES = (
    "views",
    "Top_K",
    "a\0b",
    "ä\U0001f600",
    "x" * 100_000,
    "../../etc/passwd",
    "a\r\nX-A: 1",
    "__class__",
    "Content-Type",
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:9]))
def test_a_parameter_that_nobody_knows_is_a_400(server, good, name):
    assert_answered(over_grpc(server, good[0][0], **{name: b"1000x1000"}), 400, "unknown_parameter")
    form = post(server, {name: "1000x1000"}, files={"video": good[0][0]})
    assert_answered((form.status_code, form.json()), 400, "unknown_parameter")


def part(name, content, *, header=b""):
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + header + b"\r\n\r\n" + content + b"\r\n"


# Forms by hand -> (status, code or warning); `video` is put in for VIDEO.
VIDEO = b"@video@"
FORMS = {
    "a path as the file's name": ([part(b"video", VIDEO, header=b'; filename="../../etc/passwd"')], *FINE),
    "a NUL in the file's name": ([part(b"video", VIDEO, header=b'; filename="a\0b"')], *FINE),
    "no file's name": ([part(b"video", VIDEO)], *FINE),
    "a type that is not its own": ([part(b"video", VIDEO, header=b"\r\nContent-Type: text/html")], *FINE),
    "a video twice by one name": ([part(b"video", VIDEO, header=b'; filename="a"')] * 2, 400, "several_videos"),
    "a video by two names": ([part(b"video", VIDEO), part(b"data", VIDEO)], 400, "several_videos"),
    "an empty part": ([part(b"video", b"")], 400, "empty_body"),
    "no part": ([], 400, "no_video"),
    "only a parameter": ([part(b"top_k", b"3")], 400, "no_video"),
    "a thousand parts": (
        [part(b"video", VIDEO), *(part(b"p%d" % i, b"1") for i in range(1000))],
        400,
        "unknown_parameter",
    ),
    "an odd top_k": ([part(b"video", VIDEO), part(b"top_k", b"\xff\xfe\0")], 400, "bad_parameter"),
    "a name in no encoding": ([part(b"video", VIDEO), part(b"\xff\xfe", b"1")], 400, "unknown_parameter"),
    "text": ([part(b"video", b"hello")], *NOT_A_VIDEO),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_answered(server, good, name):
    parts, status, words = FORMS[name]
    body = b"".join(parts).replace(VIDEO, good[0][0]) + b"--B--\r\n"
    response = post(server, body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert_answered((response.status_code, response.json()), status, words)


# Each is answered by TorchServe, before any worker hears of it.
NOT_HTTP = {
    "a length below zero": b"Content-Length: -1\r\n\r\n",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a length beyond all limits": b"Content-Length: 99999999999999999999\r\n\r\n",
    "a chunk without a length": b"Transfer-Encoding: chunked\r\n\r\nzzz\r\nabc\r\n",
    "a NUL in a header": b"X-Top-K: 3\0\r\nContent-Length: 1\r\n\r\n0",
    "a header of 100 kB": b"X-Top-K: " + b"3" * 100_000 + b"\r\nContent-Length: 1\r\n\r\n0",
    "a hang-up midway": b"Content-Length: 100000\r\n\r\n" + bytes(1000),
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_no_http_request_reaches_no_worker(server, good, name):
    host, port = server.inference_url.removeprefix("http://").split(":")
    token = server.headers("inference")["Authorization"].encode()
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"POST /predictions/vivit HTTP/1.1\r\nAuthorization: " + token + b"\r\n" + NOT_HTTP[name])
    assert_same(over_rest(server, good[0][0])[1], good[0][1])


# Netty's parser of forms gives up, and TorchServe calls it 500: no worker hears of these either.
NO_FORM = {
    "a part without a name": b"--B\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--B--\r\n",
    "an empty name": part(b"", b"abc") + b"--B--\r\n",
    "an encoding that nobody knows": part(b"video", b"abc", header=b"; filename=a\r\nContent-Transfer-Encoding: x")
    + b"--B--\r\n",
    "a charset that nobody knows": part(b"video", b"abc", header=b"; filename=a\r\nContent-Type: text/plain; charset=x")
    + b"--B--\r\n",
}


@pytest.mark.parametrize("name", NO_FORM)
def test_a_form_that_torchserve_cannot_take_apart_reaches_no_worker(server, good, name):
    response = post(server, NO_FORM[name], headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert response.json()["type"] == "ErrorDataDecoderException"
    assert_same(over_rest(server, good[0][0])[1], good[0][1])


def test_a_request_over_torchserves_own_limit_is_refused_before_it_is_read(server):
    assert post(server, bytes(REQUEST_BYTES + 1)).status_code == 413
    with pytest.raises(grpc.RpcError):
        over_grpc(server, bytes(REQUEST_BYTES + 1))


def test_a_header_that_is_torchserves_own_changes_nothing(server, good):
    for headers in (
        {"Content-Encoding": "gzip"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"describe": "True"},
        {"ts_request_sequence_id": "1"},
        {"ts_stream_next": "true"},
    ):
        assert_same(over_rest(server, good[0][0], **headers)[1], good[0][1])


def over_grpc_with_state(server, data):
    """The status of a StreamPredictions2 call, TorchServe's for models that keep a state between requests."""
    messages, _ = load_proto("inference.proto")
    request = messages.PredictionsRequest(model_name="vivit", input={"data": data}).SerializeToString()
    request += b"\x22\x01a"  # field 4, sequence_id, "a"
    with open_channel(server.grpc_inference) as channel:
        call = channel.stream_stream("/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions2")
        with pytest.raises(grpc.RpcError) as refusal:
            list(call(iter([request]), metadata=authorization(server), timeout=60))
    return None, refusal.value.code()


def test_a_call_for_models_that_keep_a_state_is_refused_and_its_neighbours_get_their_answers(server, good):
    asked = [(ask, data) for data, _ in good for ask in (over_rest, over_grpc_with_state, over_grpc)] * 3
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: one[0](server, one[1])[1], asked))
    expected = {data: answer for data, answer in good}
    for (ask, data), answer in zip(asked, answers):
        if ask is over_grpc_with_state:
            assert answer == grpc.StatusCode.UNKNOWN
        else:
            assert_same(answer, expected[data])


def test_a_stream_whose_client_leaves_harms_nobody(server, good):
    messages, services = load_proto("inference.proto")
    request = messages.PredictionsRequest(model_name="vivit", input={"data": good[0][0]})
    with open_channel(server.grpc_inference) as channel:
        for leave_after_s in (0, 0.005, 0.02, 0.05):
            call = services.InferenceAPIsServiceStub(channel).StreamPredictions(
                request, metadata=authorization(server), timeout=60
            )
            time.sleep(leave_after_s)
            call.cancel()
    assert_same(over_grpc(server, good[0][0])[1], good[0][1])

"""Hostile and broken uploads, made on the spot: a row of tests/test_hostile.py names one of these functions.

Each gives a maker, to be called with a Workshop, which has what it needs: whole clips to damage, and what a hostile
file would like to reach, an address that must not be asked and a file that must not be read.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.support.clips import (
    audio_only,
    cover_art_only,
    encoded_picture,
    numbered_frames,
    remux,
    subtitles_only,
    with_external_media,
    with_other_reference,
    write_clip,
)

FRAMES = numbered_frames(24, height=48, width=64)


def x264(params="", *, keyint=12, **more):
    # Without mbtree it makes the same bytes every time, which cuts and flipped bits ask for.
    always = f"mbtree=0:keyint={keyint}:min-keyint={keyint}:scenecut=0:bframes=2"
    return {"options": {"x264-params": f"{always}:{params}"}, **more}


# Whole clips, by file name: what write_clip makes of FRAMES.
WHOLE = {
    "h264.mp4": x264(),
    "header_first.mp4": x264(container_options={"movflags": "faststart"}),
    "fragmented.mp4": x264(container_options={"movflags": "frag_keyframe+empty_moov"}),
    "encrypted.mp4": x264(
        container_options={
            "encryption_scheme": "cenc-aes-ctr",
            "encryption_key": "0123456789abcdef" * 2,
            "encryption_kid": "fedcba9876543210" * 2,
        }
    ),
    "one_gop.mp4": x264("bframes=0", keyint=1000),
    "open_gop.mp4": x264("open-gop=1:bframes=3"),
    "10_bit.mp4": x264(pix_fmt="yuv420p10le"),
    "grey.mp4": x264(pix_fmt="gray"),
    "interlaced.mp4": x264("tff=1"),
    "varying.mp4": x264(pts_ms=[40 * i + (7 * i * i) % 31 for i in range(24)]),
    "h264.mkv": x264(),
    "h264.ts": x264(),
    "h264.flv": x264(),
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0:pools=1:keyint=12"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12"}},
    "vp9_alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2_interlaced.mpg": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "sorenson.flv": {"codec": "flv"},
    "h263.3gp": {"codec": "h263", "frames": numbered_frames(24)},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "prores_alpha.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "qtrle_alpha.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "png_alpha.mov": {"codec": "png", "pix_fmt": "rgba"},
    "ffv1.mkv": {"codec": "ffv1"},
    "black_and_white.avi": {"codec": "rawvideo", "pix_fmt": "monob"},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "still.gif": {"codec": "gif", "pix_fmt": "rgb8", "frames": FRAMES[:1]},
    "one_frame.mp4": x264(frames=FRAMES[:1]),
    "vp8.ogg": {"codec": "libvpx", "container_format": "ogg"},
    "flash.avi": {"codec": "flashsv", "pix_fmt": "bgr24"},
    "snow.avi": {"codec": "snow", "options": {"strict": "-2"}},
    "still.avif": {"codec": "libsvtav1", "options": {"preset": "11"}, "frames": FRAMES[:1]},
    "animated.avif": {"codec": "libsvtav1", "options": {"preset": "11"}},
    "animated.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "animated.webp": {"codec": "libwebp_anim"},
    "sound_and_picture.mp4": x264(audio_codec="aac"),
}


class Workshop:
    """What makers work with: a folder, the address `url` and the file `local_video` that no upload may reach."""

    def __init__(self, folder: Path, *, url: str, local_video: Path):
        self.folder, self.url, self.local_video = folder, url, local_video

    def path(self, name: str) -> Path:
        """A whole clip, made once."""
        path = self.folder / name
        if not path.exists():
            options = {"frames": FRAMES, "fps": 10, **WHOLE[name]}
            write_clip(path, options.pop("frames"), **options)
        return path

    def bytes(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def written(self, name: str, write: Callable[[Path], object]) -> bytes:
        """What `write` leaves in a file of that suffix."""
        path = self.folder / f"new-{name}"
        write(path)
        return path.read_bytes()


Maker = Callable[[Workshop], bytes]


def data(content: bytes) -> Maker:
    return lambda workshop: content


def whole(name: str) -> Maker:
    return lambda workshop: workshop.bytes(name)


def of_size(name: str, width: int, height: int, **options) -> Maker:
    frames = numbered_frames(12, height=height, width=width)
    return lambda workshop: workshop.written(name, lambda path: write_clip(path, frames, **options))


# Damage.


def first(name: str, share: float) -> Maker:
    """A file that is cut off after that share of it."""
    return lambda workshop: workshop.bytes(name)[: int(share * len(workshop.bytes(name)))]


def first_bytes(name: str, count: int) -> Maker:
    return lambda workshop: workshop.bytes(name)[:count]


def up_to(name: str, mark: bytes, more: int = 0) -> Maker:
    """A file that is cut off `more` bytes after where `mark` first stands."""
    return lambda workshop: workshop.bytes(name)[: workshop.bytes(name).index(mark) + more]


def without(name: str, mark: bytes) -> Maker:
    """The file with a box, or whatever has that name, renamed so that nobody finds it."""
    return replaced(name, mark, b"free")


def replaced(name: str, old: bytes, new: bytes) -> Maker:
    def make(workshop):
        content = workshop.bytes(name)
        assert old in content
        return content.replace(old, new)

    return make


def patched(name: str, mark: bytes, offset: int, layout: str, *values) -> Maker:
    """The file with `values` written `offset` bytes after the first `mark`: the fields of an mp4 box, say."""

    def make(workshop):
        content = bytearray(workshop.bytes(name))
        struct.pack_into(layout, content, content.index(mark) + len(mark) + offset, *values)
        return bytes(content)

    return make


def flipped(name: str, *, every: int, after: float = 0.0) -> Maker:
    """One bit in `every` bytes, from a share of the file on."""

    def make(workshop):
        content = bytearray(workshop.bytes(name))
        for i in range(int(after * len(content)), len(content), every):
            content[i] ^= 1 << i // every % 8
        return bytes(content)

    return make


def packets_inverted(name: str, chosen: Callable[[int], bool]) -> Maker:
    """Some of the video's packets inverted."""

    def make(workshop):
        content = bytearray(workshop.bytes(name))
        with av.open(str(workshop.path(name))) as container:
            for i, packet in enumerate(container.demux(video=0)):
                if packet.size and chosen(i):
                    for k in range(packet.pos, packet.pos + packet.size):
                        content[k] ^= 0xFF
        return bytes(content)

    return make


def remuxed(name: str, new_name: str, edit, **options) -> Maker:
    """Packets of `name`, changed by edit(number, packet), in a new file."""
    return lambda workshop: workshop.written(
        new_name, lambda path: remux(path, workshop.path(name), edit=edit, **options)
    )


def joined(*parts: Maker) -> Maker:
    return lambda workshop: b"".join(part(workshop) for part in parts)


# Other kinds of files.


def picture(kind: str) -> Maker:
    def make(workshop):
        file = io.BytesIO()
        Image.fromarray(FRAMES[0]).save(file, kind)
        return file.getvalue()

    return make


def heic() -> Maker:
    """How a telephone's photograph begins: no index of a movie, but of a picture's items."""

    def make(workshop):
        meta = box(b"hdlr", bytes(8), b"pict", bytes(13)) + box(b"pitm", bytes(4), b"\0\1")
        brands = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
        return brands + box(b"meta", bytes(4), meta) + box(b"mdat", encoded_picture("png"))

    return make


def sound(name: str, codec: str) -> Maker:
    return lambda workshop: workshop.written(name, lambda path: audio_only(path, codec=codec, seconds=0.3))


def subtitles(workshop: Workshop) -> bytes:
    return workshop.written("subtitles.mkv", subtitles_only)


def cover_art(workshop: Workshop) -> bytes:
    return workshop.written("cover.m4a", cover_art_only)


def wav(workshop: Workshop) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as tone:
        tone.setnchannels(1), tone.setsampwidth(2), tone.setframerate(8000)
        tone.writeframes(bytes(8000))
    return file.getvalue()


def zipped(name: str, *, compressed=True) -> Maker:
    def make(workshop):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            archive.writestr(name, workshop.bytes(name))
        return file.getvalue()

    return make


def tarred(name: str) -> Maker:
    def make(workshop):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(workshop.path(name), name)
        return file.getvalue()

    return make


def gzipped(name: str) -> Maker:
    return lambda workshop: gzip.compress(workshop.bytes(name))


# Times, sizes and counts.


def at_times(name: str, pts_ms) -> Maker:
    frames = FRAMES[: len(pts_ms)]
    return lambda workshop: workshop.written(name, lambda path: write_clip(path, frames, pts_ms=pts_ms))


def later_by(frames: int):
    """An edit of packets: so many frames later, or earlier."""

    def edit(i, packet):
        packet.pts += frames * packet.duration
        packet.dts += frames * packet.duration
        return packet

    return edit


def without_times(i, packet):
    packet.pts = packet.dts = None
    return packet


def only_packets(chosen: Callable[[int], bool]):
    """An edit of packets: the others are left out."""
    return lambda i, packet: packet if chosen(i) else None


def of_two_sizes(name: str, **options) -> Maker:
    """One stream whose pictures grow midway."""

    def make(workshop):
        sizes = [numbered_frames(12, height=48, width=64), numbered_frames(12, height=96, width=80)]
        return b"".join(
            workshop.written(name, lambda path: write_clip(path, frames, fps=10, **options)) for frames in sizes
        )

    return make


def vp8_of_two_sizes(workshop: Workshop) -> bytes:
    paths = [workshop.folder / f"size-{width}.webm" for width in (64, 80)]
    for path, width in zip(paths, (64, 80)):
        write_clip(path, numbered_frames(12, height=48, width=width), codec="libvpx", fps=10)
    return workshop.written("sizes.webm", lambda path: _one_after_another(path, paths))


def _one_after_another(path, sources):
    with av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(av.open(str(sources[0])).streams.video[0])
        for number, source in enumerate(sources):
            with av.open(str(source)) as old:
                for packet in old.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts += 1200 * number
                        packet.dts = packet.pts
                        new.mux(packet)


def many_frames(count: int) -> Maker:
    """A Matroska file with one small packet, so many times."""

    def write(path, source):
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            content = bytes(next(packet for packet in old.demux(video=0) if packet.size))
            for i in range(count):
                packet = av.Packet(content)
                packet.pts = packet.dts = i
                packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 1000), stream, True
                new.mux(packet)

    def make(workshop):
        source = workshop.folder / "tiny.mkv"
        write_clip(source, np.zeros((1, 2, 2, 3), np.uint8), codec="libvpx")
        return workshop.written("many.mkv", lambda path: write(path, source))

    return make


def claiming_8192x8192(workshop: Workshop) -> bytes:
    flat = np.zeros((1, 8192, 8192, 3), np.uint8)
    return workshop.written("8192.mp4", lambda path: write_clip(path, flat, options={"preset": "ultrafast"}))


def slow_gif(count: int, *, side: int = 4000) -> bytes:
    """One pixel changes in each frame, and every frame is a whole picture to who decodes it."""
    pixel = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    palette = bytes(6) + b"\xff" * 6
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x81, 0, 0) + palette + count * pixel + b";"


# mp4 by hand.


def box(name: bytes, *content: bytes) -> bytes:
    payload = b"".join(content)
    return struct.pack(">I4s", len(payload) + 8, name) + payload


def boxes_within_boxes(workshop: Workshop) -> bytes:
    """An index nested so deeply that whoever reads it box by box runs out of stack."""
    nested = b""
    for _ in range(20_000):
        nested = box(b"udta", nested)
    content = workshop.bytes("h264.mp4")
    return content[: content.index(b"moov") - 4] + box(b"moov", nested)


def with_alias_elsewhere(workshop: Workshop) -> bytes:
    return with_external_media(workshop.bytes("h264.mp4"), str(workshop.local_video))


def with_url_elsewhere(workshop: Workshop) -> bytes:
    """An mp4 whose `dref` says that the media lie at a file: URL; its own are gone."""
    content = bytearray(workshop.bytes("h264.mp4"))
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    location = f"file://{workshop.local_video}".encode() + b"\0"
    return with_other_reference(bytes(content), box(b"url ", b"\0\0\0\1"), box(b"url ", bytes(4), location))


def compressed_header(workshop: Workshop) -> bytes:
    """A QuickTime header that is compressed, a thousand to one: 64 MB of zeros."""
    packed = zlib.compress(bytes(64 * 2**20))
    return box(b"ftyp", b"qt  ", bytes(4)) + box(
        b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", struct.pack(">I", 64 * 2**20), packed))
    )


def reference_movie(target: bytes) -> bytes:
    """A QuickTime movie that only says where another one is."""
    rdrf = box(b"rdrf", bytes(4), b"url ", struct.pack(">I", len(target) + 1), target + b"\0")
    return box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"rmra", box(b"rmda", rdrf)))


# Playlists. `target` is the address or the file that they name.


def ffconcat(target: str) -> bytes:
    return f"ffconcat version 1.0\nfile '{target}'\n".encode()


def hls(target: str) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n".encode()


def hls_master(target: str) -> bytes:
    return f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n".encode()


def hls_with_key(target: str) -> bytes:
    key = f'#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXT-X-MAP:URI="{target}"\n'
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{key}#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n".encode()


def dash(target: str) -> bytes:
    media = f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    period = f'<Period><AdaptationSet mimeType="video/mp4">{media}</AdaptationSet></Period>'
    attributes = 'xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"'
    return f'<?xml version="1.0"?><MPD {attributes}>{period}</MPD>'.encode()


def sdp() -> bytes:
    return b"v=0\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"


def asx(target: str) -> bytes:
    return f'<ASX version="3.0"><ENTRY><REF HREF="{target}"/></ENTRY></ASX>'.encode()


def smil(target: str) -> bytes:
    return f'<smil><body><video src="{target}"/></body></smil>'.encode()


def avi_with_playlist_as_subtitles(target: str, avi: bytes) -> bytes:
    """A subtitle track (GAB2) that holds a playlist, which FFmpeg once opened with a demuxer of its own."""
    text = hls(target)
    gab2 = b"GAB2\0" + struct.pack("<HI", 2, 2) + b"s\0" + struct.pack("<HI", 4, len(text)) + text
    strh = struct.pack("<4s4sIHHIIIIIIIIhhhh", b"txts", bytes(4), 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
    stream = riff_list(b"strl", riff(b"strh", strh) + riff(b"strf", b""))
    content = bytearray(avi)
    movi = content.index(b"movi") - 8
    hdrl = content.index(b"hdrl") - 8
    at = hdrl + 8 + struct.unpack_from("<I", content, hdrl + 4)[0]
    packet = riff(b"01tx", gab2)
    struct.pack_into("<I", content, movi + 4, struct.unpack_from("<I", content, movi + 4)[0] + len(packet))
    content[movi + 12 : movi + 12] = packet
    struct.pack_into("<I", content, content.index(b"avih") + 8 + 24, 2)  # streams
    content[at:at] = stream
    struct.pack_into("<I", content, hdrl + 4, struct.unpack_from("<I", content, hdrl + 4)[0] + len(stream))
    struct.pack_into("<I", content, 4, len(content) - 8)
    return bytes(content)


def riff(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def riff_list(name: bytes, content: bytes) -> bytes:
    return riff(b"LIST", name + content)

"""Hostile and corrupt uploads for tests/server/test_hostile.py, generated on the fly.

Most functions here return a Maker: a function from Sources to the bytes of an upload. Sources provides valid clips to
corrupt, and the targets of attacks: a URL that must never be requested and a local file that must never be read.
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
    encoded_image,
    numbered_frames,
    remux,
    subtitles_only,
    with_external_media,
    with_other_reference,
    write_clip,
)

FRAMES = numbered_frames(24, height=48, width=64)


def x264(params="", *, keyint=12, **options):
    # mbtree=0 makes x264 deterministic; otherwise cuts and bit flips would hit different bytes in every run.
    fixed = f"mbtree=0:keyint={keyint}:min-keyint={keyint}:scenecut=0:bframes=2"
    return {"options": {"x264-params": f"{fixed}:{params}"}, **options}


# Name of a valid clip -> options of write_clip; the frames are FRAMES unless given.
CLIPS = {
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
    "gray.mp4": x264(pix_fmt="gray"),
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
    "audio_and_video.mp4": x264(audio_codec="aac"),
}


class Sources:
    """What makers build on.

    Attributes:
        folder: where clips are written.
        url: an address that no upload may make the server request.
        local_video: a file that no upload may make the server read.
    """

    def __init__(self, folder: Path, *, url: str, local_video: Path):
        self.folder, self.url, self.local_video = folder, url, local_video

    def path(self, name: str) -> Path:
        """Path of a clip in CLIPS, encoded on first use."""
        path = self.folder / name
        if not path.exists():
            options = {"frames": FRAMES, "fps": 10, **CLIPS[name]}
            write_clip(path, options.pop("frames"), **options)
        return path

    def bytes(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def written(self, name: str, write: Callable[[Path], object]) -> bytes:
        """Bytes that `write` puts into a file called `name`."""
        path = self.folder / f"new-{name}"
        write(path)
        return path.read_bytes()


Maker = Callable[[Sources], bytes]


def constant(content: bytes) -> Maker:
    return lambda sources: content


def valid(name: str) -> Maker:
    return lambda sources: sources.bytes(name)


def of_size(name: str, width: int, height: int, **options) -> Maker:
    frames = numbered_frames(12, height=height, width=width)
    return lambda sources: sources.written(name, lambda path: write_clip(path, frames, **options))


# Corruption


def first(name: str, share: float) -> Maker:
    """The first `share` of the file, from 0 to 1."""
    return lambda sources: sources.bytes(name)[: int(share * len(sources.bytes(name)))]


def first_bytes(name: str, count: int) -> Maker:
    return lambda sources: sources.bytes(name)[:count]


def up_to(name: str, mark: bytes, offset: int = 0) -> Maker:
    """The file up to `offset` bytes after the start of the first `mark`."""
    return lambda sources: sources.bytes(name)[: sources.bytes(name).index(mark) + offset]


def without(name: str, mark: bytes) -> Maker:
    """The file with the box `mark` renamed to `free`, which demuxers skip."""
    return replaced(name, mark, b"free")


def replaced(name: str, old: bytes, new: bytes) -> Maker:
    def make(sources):
        content = sources.bytes(name)
        assert old in content
        return content.replace(old, new)

    return make


def patched(name: str, mark: bytes, offset: int, layout: str, *values) -> Maker:
    """The file with `values` packed `offset` bytes after the first `mark`, e.g. into the fields of an mp4 box."""

    def make(sources):
        content = bytearray(sources.bytes(name))
        struct.pack_into(layout, content, content.index(mark) + len(mark) + offset, *values)
        return bytes(content)

    return make


def flipped(name: str, *, every: int, after: float = 0.0) -> Maker:
    """The file with one bit flipped every `every` bytes, starting at the share `after` of its length."""

    def make(sources):
        content = bytearray(sources.bytes(name))
        for i in range(int(after * len(content)), len(content), every):
            content[i] ^= 1 << i // every % 8
        return bytes(content)

    return make


def packets_inverted(name: str, chosen: Callable[[int], bool]) -> Maker:
    """The file with all bits of the chosen video packets inverted."""

    def make(sources):
        content = bytearray(sources.bytes(name))
        with av.open(str(sources.path(name))) as container:
            for i, packet in enumerate(container.demux(video=0)):
                if packet.size and chosen(i):
                    for k in range(packet.pos, packet.pos + packet.size):
                        content[k] ^= 0xFF
        return bytes(content)

    return make


def remuxed(name: str, new_name: str, edit, **options) -> Maker:
    """The packets of `name`, each changed by edit(index, packet), in a new file."""
    return lambda sources: sources.written(new_name, lambda path: remux(path, sources.path(name), edit=edit, **options))


def joined(*parts: Maker) -> Maker:
    return lambda sources: b"".join(part(sources) for part in parts)


# Other file types


def image(file_format: str) -> Maker:
    def make(sources):
        file = io.BytesIO()
        Image.fromarray(FRAMES[0]).save(file, file_format)
        return file.getvalue()

    return make


def heic() -> Maker:
    """The boxes of a phone's HEIC photo: an item index instead of a movie header."""

    def make(sources):
        meta = box(b"hdlr", bytes(8), b"pict", bytes(13)) + box(b"pitm", bytes(4), b"\0\1")
        brands = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
        return brands + box(b"meta", bytes(4), meta) + box(b"mdat", encoded_image("png"))

    return make


def audio(name: str, codec: str) -> Maker:
    return lambda sources: sources.written(name, lambda path: audio_only(path, codec=codec, seconds=0.3))


def subtitle_track(sources: Sources) -> bytes:
    return sources.written("subtitles.mkv", subtitles_only)


def cover_art(sources: Sources) -> bytes:
    return sources.written("cover.m4a", cover_art_only)


def wav(sources: Sources) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as tone:
        tone.setnchannels(1), tone.setsampwidth(2), tone.setframerate(8000)
        tone.writeframes(bytes(8000))
    return file.getvalue()


def zipped(name: str, *, compressed=True) -> Maker:
    def make(sources):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            archive.writestr(name, sources.bytes(name))
        return file.getvalue()

    return make


def tarred(name: str) -> Maker:
    def make(sources):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(sources.path(name), name)
        return file.getvalue()

    return make


def gzipped(name: str) -> Maker:
    return lambda sources: gzip.compress(sources.bytes(name))


# Timestamps, sizes and counts


def at_times(name: str, pts_ms) -> Maker:
    frames = FRAMES[: len(pts_ms)]
    return lambda sources: sources.written(name, lambda path: write_clip(path, frames, pts_ms=pts_ms))


def shifted_by(frames: int):
    """A packet edit that shifts timestamps by a number of frames; negative means earlier."""

    def edit(i, packet):
        packet.pts += frames * packet.duration
        packet.dts += frames * packet.duration
        return packet

    return edit


def without_timestamps(i, packet):
    """A packet edit that removes pts and dts."""
    packet.pts = packet.dts = None
    return packet


def only_packets(chosen: Callable[[int], bool]):
    """A packet edit that drops all other packets."""
    return lambda i, packet: packet if chosen(i) else None


def of_two_sizes(name: str, **options) -> Maker:
    """One stream whose resolution increases halfway."""

    def make(sources):
        sizes = [numbered_frames(12, height=48, width=64), numbered_frames(12, height=96, width=80)]
        return b"".join(
            sources.written(name, lambda path, frames=frames: write_clip(path, frames, fps=10, **options))
            for frames in sizes
        )

    return make


def vp8_of_two_sizes(sources: Sources) -> bytes:
    paths = [sources.folder / f"size-{width}.webm" for width in (64, 80)]
    for path, width in zip(paths, (64, 80)):
        write_clip(path, numbered_frames(12, height=48, width=width), codec="libvpx", fps=10)
    return sources.written("sizes.webm", lambda path: _concatenate_packets(path, paths))


def _concatenate_packets(path, clips):
    with av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(av.open(str(clips[0])).streams.video[0])
        for number, clip in enumerate(clips):
            with av.open(str(clip)) as old:
                for packet in old.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packet.pts += 1200 * number
                        packet.dts = packet.pts
                        new.mux(packet)


def many_frames(count: int) -> Maker:
    """A Matroska file that repeats one small packet `count` times."""

    def write(path, source):
        with av.open(str(source)) as old, av.open(str(path), "w") as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            content = bytes(next(packet for packet in old.demux(video=0) if packet.size))
            for i in range(count):
                packet = av.Packet(content)
                packet.pts = packet.dts = i
                packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 1000), stream, True
                new.mux(packet)

    def make(sources):
        source = sources.folder / "tiny.mkv"
        write_clip(source, np.zeros((1, 2, 2, 3), np.uint8), codec="libvpx")
        return sources.written("many.mkv", lambda path: write(path, source))

    return make


def of_8192_pixels_width(sources: Sources) -> bytes:
    black = np.zeros((1, 2064, 8192, 3), np.uint8)  # just above the limit of 4096 x 4096 pixels
    return sources.written("8192.mp4", lambda path: write_clip(path, black, options={"preset": "ultrafast"}))


def slow_gif(count: int, *, side: int = 4000) -> bytes:
    """A small GIF that is slow to decode: each frame changes one pixel, but decodes to the full canvas."""
    pixel = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    palette = bytes(6) + b"\xff" * 6
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x81, 0, 0) + palette + count * pixel + b";"


# MP4 boxes written by hand


def box(name: bytes, *content: bytes) -> bytes:
    payload = b"".join(content)
    return struct.pack(">I4s", len(payload) + 8, name) + payload


def nested_boxes(sources: Sources) -> bytes:
    """A header of 20,000 nested boxes, to overflow the stack of a recursive parser."""
    nested = b""
    for _ in range(20_000):
        nested = box(b"udta", nested)
    content = sources.bytes("h264.mp4")
    return content[: content.index(b"moov") - 4] + box(b"moov", nested)


def with_external_alias(sources: Sources) -> bytes:
    return with_external_media(sources.bytes("h264.mp4"), str(sources.local_video))


def with_external_url(sources: Sources) -> bytes:
    """An mp4 whose `dref` points to a file: URL; its own media data is zeroed."""
    content = bytearray(sources.bytes("h264.mp4"))
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = bytes(end - start)
    location = f"file://{sources.local_video}".encode() + b"\0"
    return with_other_reference(bytes(content), box(b"url ", b"\0\0\0\1"), box(b"url ", bytes(4), location))


def compressed_header(sources: Sources) -> bytes:
    """A zlib-compressed QuickTime header of 64 MiB of zeros, compressed a thousand to one."""
    packed = zlib.compress(bytes(64 * 2**20))
    return box(b"ftyp", b"qt  ", bytes(4)) + box(
        b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", struct.pack(">I", 64 * 2**20), packed))
    )


def reference_movie(target: bytes) -> bytes:
    """A QuickTime movie that only references another movie."""
    rdrf = box(b"rdrf", bytes(4), b"url ", struct.pack(">I", len(target) + 1), target + b"\0")
    return box(b"ftyp", b"qt  ", bytes(4)) + box(b"moov", box(b"rmra", box(b"rmda", rdrf)))


# Playlists; `target` is the URL or file they reference


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
    """An AVI with a GAB2 subtitle track that contains a playlist; old FFmpeg versions opened it as a nested file."""
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

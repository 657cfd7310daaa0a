"""Recipes of the video files that the decoder is tested with.

INDEXED       the index finds every frame
SEQUENTIAL    containers and codecs without an index
MISLEADING    timestamps, keyframe flags, parameter sets or packets are misleading; sequential decoding is correct
"""

import av
import numpy as np
from av.packet import PacketSideData

from tests.support.clips import concatenate, numbered_frames, remux, with_data, write_clip

FRAMES = numbered_frames(40, height=96, width=128)
OTHER_FRAMES = numbered_frames(40, height=96, width=128, seed=1)
ODD_FRAMES = numbered_frames(40, height=95, width=127)
VFR_MS = [40 * i + (7 * i * i) % 31 for i in range(40)]


def x264(params="", **options):
    return {"options": {"x264-params": f"keyint=12:min-keyint=12:scenecut=0:{params}", **options}}


def x265(params):
    always = "log-level=0:pools=1:keyint=12:min-keyint=12"
    return {"codec": "libx265", "options": {"x265-params": f"{always}:{params}", "preset": "veryfast"}}


def vpx(codec, **options):
    return {"codec": codec, "options": {"g": "12", "cpu-used": "8", "deadline": "realtime", **options}}


def plain(codec, pix_fmt="yuv420p", **options):
    return {"codec": codec, "pix_fmt": pix_fmt, "options": {"g": "12", **options}}


def svt_av1(params="", **options):
    return {"codec": "libsvtav1", "options": {"g": "12", "preset": "11", "svtav1-params": params, **options}}


# Layers 0 2 1 2, from the slowest to the fastest: no frame refers to one of layer 2.
TEMPORAL_LAYERS = {
    "lag-in-frames": "0",
    "b": "200k",
    "ts-parameters": "ts_number_layers=3:ts_target_bitrate=100,150,200:ts_rate_decimator=4,2,1:ts_periodicity=4:"
    "ts_layer_id=0,2,1,2:ts_layering_mode=3",
}
OPEN_GOP = "open-gop=1:bframes=3:b-pyramid=normal"

INDEXED = {
    "bframes.mp4": x264("bframes=3"),
    "bframes.mkv": x264("bframes=3"),
    "bframes.ts": x264("bframes=3"),
    "bframes.flv": x264("bframes=3"),
    "no_bframes.mp4": x264("bframes=0"),
    "slices.mp4": x264("slices=4"),
    "open_gop.mp4": x264(OPEN_GOP),
    "open_gop.ts": x264(OPEN_GOP),
    "open_gop_no_leading.mp4": x264("open-gop=1:bframes=5:ref=3:b-adapt=0:keyint=19", preset="ultrafast"),
    "fragmented.mp4": {**x264(), "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "header_first.mp4": {**x264(), "container_options": {"movflags": "faststart"}},
    "10_bit.mp4": {**x264(), "pix_fmt": "yuv420p10le"},
    "gray.mp4": {**x264(), "pix_fmt": "gray"},
    "full_range_bt709.mp4": x264(color_range="pc", colorspace="bt709", color_primaries="bt709", color_trc="bt709"),
    "vfr.mkv": {**x264(), "pts_ms": VFR_MS},
    "with_audio.mp4": {**x264(), "audio_codec": "aac"},
    "two_frames.mp4": {"frames": FRAMES[:2]},
    "hevc.mp4": x265("open-gop=0"),
    "no_bframes_hevc.mkv": x265("bframes=0"),
    "hevc_open_gop.mp4": x265("open-gop=1:bframes=4"),
    "hevc_open_gop.ts": x265("open-gop=1:bframes=4"),
    "hevc_temporal_layers.mp4": x265("temporal-layers=3:bframes=7"),
    "vp8.webm": vpx("libvpx"),
    "vp8_odd_size.webm": {**vpx("libvpx"), "frames": ODD_FRAMES},
    "vp9.webm": vpx("libvpx-vp9"),
    "vp9_odd_size.webm": {**vpx("libvpx-vp9"), "frames": ODD_FRAMES},
    "vp9_alpha.webm": {**vpx("libvpx-vp9"), "pix_fmt": "yuva420p"},
    "vp9.mp4": vpx("libvpx-vp9"),
    "vp9_resilient.webm": vpx("libvpx-vp9", **{"error-resilient": "1", "auto-alt-ref": "0"}),
    "vp9_temporal_layers.webm": vpx("libvpx-vp9", g="100", **TEMPORAL_LAYERS, **{"error-resilient": "1"}),
    "vp9_layers_not_resilient.webm": vpx("libvpx-vp9", g="100", **TEMPORAL_LAYERS),
    "av1.mp4": svt_av1(),
    "av1.webm": svt_av1(),
    "av1_long_gop.mp4": svt_av1(g="100", preset="10"),
    "av1_low_delay.webm": svt_av1("pred-struct=1", g="100"),
    "av1_tiles_10_bit.mp4": {**svt_av1("tile-columns=1:tile-rows=1", g="20"), "pix_fmt": "yuv420p10le"},
    "mjpeg.mov": plain("mjpeg", "yuvj420p"),
    "prores.mov": plain("prores_ks", "yuv422p10le"),
}

SEQUENTIAL = {
    "one_frame.gif": {**plain("gif", "rgb8"), "frames": FRAMES[:1]},
    "animated.gif": plain("gif", "rgb8"),
    "odd_size.gif": {**plain("gif", "rgb8"), "frames": ODD_FRAMES},
    "h264.avi": x264("bframes=2"),
    "h264.mpg": x264("bframes=2"),
    "interlaced.mp4": x264("tff=1"),
    "interlaced.ts": x264("tff=1"),
    "mpeg4.mp4": plain("mpeg4", bf="2"),
    "mpeg4.avi": plain("mpeg4"),
    "mpeg4_bframes.avi": plain("mpeg4", bf="2"),
    "mpeg2.ts": plain("mpeg2video", bf="2"),
    "mpeg2.mpg": plain("mpeg2video", bf="2"),
    "h263.3gp": plain("h263"),
    "sorenson.flv": plain("flv"),
    "wmv2.wmv": plain("wmv2"),
    "mjpeg.avi": plain("mjpeg", "yuvj420p"),
    "ffv1_odd_size.mkv": {**plain("ffv1"), "frames": ODD_FRAMES},
    "huffyuv.avi": plain("huffyuv", "yuv422p"),
    "qtrle.mov": plain("qtrle", "rgb24"),
    "png.mov": plain("png", "rgb24"),
    "raw.avi": plain("rawvideo", "bgr24"),
    "raw_stored_bottom_up.mov": {**plain("rawvideo", "rgb24"), "extradata": b"BottomUp\0"},
}


# A recipe of a misleading file is called with `make`, which returns the path of another file, and the path to write.


def _without_box(box, source):
    def write(make, path):
        data = make(source).read_bytes()
        assert box in data
        path.write_bytes(data.replace(box, b"free"))

    return write


def _remuxed(source, edit, **options):
    return lambda make, path: remux(path, make(source), edit=edit, **options)


def _bytes_of(source, change):
    return lambda make, path: path.write_bytes(change(make(source).read_bytes()))


def earlier(frames):
    """An edit that starts the video `frames` frames before its edit list."""

    def edit(i, packet):
        packet.pts -= frames * packet.duration
        packet.dts -= frames * packet.duration
        return packet

    return edit


def _marked_as_keyframe(i, packet):
    packet.is_keyframe = True
    return packet


def _not_marked_as_keyframe(i, packet):
    packet.is_keyframe = False
    return packet


def _ts_packets(first=0.0, last=1.0):
    def cut(data):
        count = len(data) // 188
        return data[188 * int(first * count) : 188 * int(last * count)]

    return cut


def _shown_when_decoded(i, packet):
    packet.pts = packet.dts = i * packet.duration
    return packet


def _hidden_vp8(i, packet):
    """Every seventh packet becomes a hidden frame."""
    if i % 7 != 3:
        return packet
    data = bytearray(packet)
    data[0] &= ~0x10
    return with_data(packet, bytes(data))


def _hidden_vp9(i, packet):
    """Two keyframes become hidden, and a later packet shows one of them (show_existing_frame)."""
    if i in (12, 24):
        assert packet.is_keyframe
        return with_data(packet, bytes([memoryview(packet)[0] & ~2]) + bytes(packet)[1:])
    return with_data(packet, b"\x88") if i == 14 else packet


def _two_at_one_time(i, packet):
    packet.pts += (40 - (i == 21)) * packet.duration  # muxers reject a pts before its dts
    return packet


def _swapped_times(i, packet):
    packet.pts += (40 + {20: 1, 21: -1}.get(i, 0)) * packet.duration
    return packet


def _scene_changes(make, path):
    """Intra frames that are not IDR frames: later frames refer to frames before them."""
    frames = np.stack([(FRAMES, OTHER_FRAMES)[i // 3 % 2][i] for i in range(40)])
    encoding = x264("keyint=300:min-keyint=300:scenecut=80:bframes=0:ref=8")
    remux(path, write_clip(path.with_suffix(".mp4"), frames, **encoding), edit=_marked_as_keyframe)


def _intra_refresh(make, path):
    """Frames are refreshed column by column while the texture moves into the refreshed part."""
    texture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(texture, 3 * i, 1) for i in range(72)])
    write_clip(path, frames, options={"x264-params": "intra-refresh=1:keyint=24:bframes=0"})


def _audio_starts_late(make, path):
    """Audio starts after more packets than FFmpeg inspects when it opens a file."""
    null_packet = b"\x47\x1f\xff\x10" + bytes(184)
    with_audio = write_clip(path.with_name("with_audio.ts"), FRAMES, audio_codec="aac", **x264())
    path.write_bytes(make("bframes.ts").read_bytes() + 30_000 * null_packet + with_audio.read_bytes())


def _new_extradata(make, path):
    """FLV sends a new H.264 header with a packet, which must reach the decoder even if the packet is skipped."""
    second = write_clip(path.with_name("second.flv"), OTHER_FRAMES, **x264("chroma-qp-offset=9"))
    sources = make("bframes.flv"), second
    headers = []
    for source in sources:
        with av.open(str(source)) as container:
            headers.append(container.streams.video[0].codec_context.extradata)

    def edit(part, i, packet):
        if i == 0:
            side_data = PacketSideData(1, len(headers[part]))  # AV_PKT_DATA_NEW_EXTRADATA
            side_data.update(headers[part])
            packet.set_sidedata(side_data)
        return packet

    concatenate(path, *sources, edit=edit)


def _overlapping(frames):
    """Two closed-GOP videos; the second one starts before the first one ends."""

    def write(make, path):
        second = write_clip(path.with_name(f"{path.stem}_2.mp4"), OTHER_FRAMES[:30], **x264("bframes=3"))
        concatenate(path, make("bframes.mp4"), second, overlap_s=frames / 25)

    return write


_PARAMETER_SETS = {
    "h264": (x264("bframes=2"), x264("bframes=2:chroma-qp-offset=9:no-8x8dct=1")),
    "hevc": (x265("bframes=2:repeat-headers=1"), x265("bframes=2:cbqpoffs=9:crqpoffs=-9:repeat-headers=1")),
}


def _parameter_sets_change(codec, *, repeated):
    """Two videos with different parameter sets; `repeated` at every keyframe, or stripped from all but the first."""

    def is_kept(unit, i):
        is_parameter_set = unit[0] & 31 in (7, 8) if codec == "h264" else unit[0] >> 1 in (32, 33, 34)
        return repeated or i == 0 or not is_parameter_set

    def write(make, path):
        parts = [
            write_clip(path.with_name(f"{path.stem}_{part}.ts"), frames, **encoding)
            for part, (frames, encoding) in enumerate(zip((FRAMES[:30], OTHER_FRAMES[:30]), _PARAMETER_SETS[codec]))
        ]
        template = write_clip(path.with_name(f"template_{path.name}"), FRAMES[:1], **_PARAMETER_SETS[codec][0])
        has_start_codes = path.suffix == ".ts"

        def edit(part, i, packet):
            units = [unit.rstrip(b"\0") for unit in bytes(packet).split(b"\0\0\1")]
            units = [unit for unit in units if unit and is_kept(unit, i)]
            prefixes = (b"\0\0\0\1" if has_start_codes else len(unit).to_bytes(4, "big") for unit in units)
            return with_data(packet, b"".join(prefix + unit for prefix, unit in zip(prefixes, units)))

        concatenate(path, *parts, edit=edit, template=template)

    return write


MISLEADING = {
    "no_keyframe_table_h264.mp4": _without_box(b"stss", "bframes.mp4"),
    "no_keyframe_table_hevc.mp4": _without_box(b"stss", "hevc.mp4"),
    "no_display_times_h264.mp4": _without_box(b"ctts", "bframes.mp4"),
    "no_display_times_hevc.mp4": _without_box(b"ctts", "hevc.mp4"),
    "all_keyframes_h264.mkv": _remuxed("bframes.mkv", _marked_as_keyframe),
    "all_keyframes_hevc.mkv": _remuxed("no_bframes_hevc.mkv", _marked_as_keyframe),
    "all_keyframes_vp9.webm": _remuxed("vp9.webm", _marked_as_keyframe),
    "no_keyframes.mkv": _remuxed("bframes.mkv", _not_marked_as_keyframe),
    "intra_frames_as_keyframes.mkv": _scene_changes,
    "times_of_decoding_h264.mkv": _remuxed("bframes.mp4", _shown_when_decoded),
    "times_of_decoding_hevc.mkv": _remuxed("hevc.mp4", _shown_when_decoded),
    "swapped_times_h264.mkv": _remuxed("no_bframes.mp4", _swapped_times),
    "swapped_times_vp9.mkv": _remuxed("vp9.webm", _swapped_times),
    "two_at_one_time.mkv": _remuxed("no_bframes.mp4", _two_at_one_time),
    "edit_list.mp4": _remuxed("bframes.mp4", earlier(7)),
    "edit_list_open_gop.mp4": _remuxed("open_gop.mp4", earlier(15)),
    "edit_list_hevc.mp4": _remuxed("hevc.mp4", earlier(15)),
    "edit_list_hevc_open_gop.mp4": _remuxed("hevc_open_gop.mp4", earlier(15)),
    "hidden_vp8.webm": _remuxed("vp8.webm", _hidden_vp8),
    "hidden_vp9.webm": _remuxed("vp9_resilient.webm", _hidden_vp9, container_options={"fflags": "-autobsf"}),
    "hidden_vp9.mp4": _remuxed("vp9_resilient.webm", _hidden_vp9, container_options={"fflags": "-autobsf"}),
    "superframes_vp9.webm": _remuxed("vp9_resilient.webm", _hidden_vp9),  # FFmpeg's muxer makes superframes
    "intra_refresh.mp4": _intra_refresh,
    "intra_refresh.ts": _intra_refresh,
    "starts_without_keyframe.mkv": _remuxed("bframes.mkv", lambda i, packet: packet if i >= 5 else None),
    "starts_without_keyframe.ts": _bytes_of("bframes.ts", _ts_packets(first=0.2)),
    "starts_in_open_gop.ts": _bytes_of("open_gop.ts", _ts_packets(first=0.3)),
    "truncated_in_packet.ts": _bytes_of("bframes.ts", lambda data: data[: len(data) // 2 + 50]),
    "gap.ts": _bytes_of("bframes.ts", lambda data: _ts_packets(0, 0.3)(data) + _ts_packets(0.5)(data)),
    "lost_packet.mp4": _remuxed("bframes.mp4", lambda i, packet: None if i == 17 else packet),
    "lost_packet.ts": _remuxed("bframes.ts", lambda i, packet: None if i == 17 else packet),
    "repeated_times.ts": _bytes_of("bframes.ts", lambda data: data + data),
    "audio_starts_late.ts": _audio_starts_late,
    "joined.mkv": _overlapping(frames=0),
    "overlapping.mkv": _overlapping(frames=2.5),
    "overlapping.ts": _overlapping(frames=2.5),
    "new_extradata.flv": _new_extradata,
    "parameter_sets_stripped_h264.mkv": _parameter_sets_change("h264", repeated=False),
    "parameter_sets_stripped_hevc.ts": _parameter_sets_change("hevc", repeated=False),
    "parameter_sets_repeated_h264.ts": _parameter_sets_change("h264", repeated=True),
    "parameter_sets_repeated_hevc.mkv": _parameter_sets_change("hevc", repeated=True),
}

# Misleading files for which the index must work nevertheless.
INDEXED_MISLEADING = (
    *("edit_list.mp4", "edit_list_hevc.mp4", "hidden_vp8.webm", "hidden_vp9.webm", "hidden_vp9.mp4"),
    *("superframes_vp9.webm", "joined.mkv", "parameter_sets_repeated_h264.ts", "parameter_sets_repeated_hevc.mkv"),
)

# Files with hidden frames -> number of packets that show none.
HIDDEN = {"hidden_vp8.webm": 6, "hidden_vp9.webm": 2, "hidden_vp9.mp4": 2, "superframes_vp9.webm": 0}

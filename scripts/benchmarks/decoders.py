"""The decoders that `benchmark.py decode` compares, and the reference frames.

A decoder is a function (file, indices, threads) -> frames: it opens the file and returns the frames at `indices`,
int64 (T,) in ascending order, as uint8 (T, H, W, 3) RGB.

N: frames in the video, T: selected frames, H, W: frame height and width, P: blocks of a thumbnail.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from benchmarks import libraries
from benchmarks.report import Report
from benchmarks.timing import OURS
from handler.video import open_video
from handler.video.references import SLOT_CODECS, required_packets

Decoder = Callable[[Path, np.ndarray, int], np.ndarray]


def load_decoders(report: Report) -> dict[str, Decoder]:
    """Returns the available decoders by name."""
    decoders: dict[str, Decoder] = {OURS: decode_ours, "recipe": decode_as_documented}
    torchcodec, decord, cv2 = (libraries.load(name, report) for name in ("torchcodec.decoders", "decord", "cv2"))
    if torchcodec:
        decoders["torchcodec"] = functools.partial(decode_torchcodec, torchcodec)
    if decord:
        decoders["decord"] = functools.partial(decode_decord, decord)
    if cv2:
        decoders["opencv"] = functools.partial(decode_opencv, cv2)
    return decoders


def decode_ours(file, indices, threads):
    with open_video(file, thread_count=threads) as video:
        return video.decode(indices)


def open_ours(file):
    with open_video(file):
        pass


def decode_as_documented(file, indices, threads):
    """Decodes as the example in the ViViT documentation does, which leaves the thread count to PyAV."""
    selected, frames = set(indices.tolist()), []
    with av.open(str(file)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index > indices[-1]:
                break
            if index in selected:
                frames.append(frame)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def decode_torchcodec(decoders, file, indices, threads):
    decoder = decoders.VideoDecoder(str(file), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact")
    return decoder.get_frames_at(indices.tolist()).data.numpy()


def decode_decord(decord, file, indices, threads):
    return decord.VideoReader(str(file), num_threads=threads).get_batch(indices).asnumpy()


def decode_opencv(cv2, file, indices, threads):
    cv2.setNumThreads(threads)
    capture = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    try:
        position, frames = 0, []
        if indices[0] > indices[-1] - indices[0]:
            position = int(indices[0])
            capture.set(cv2.CAP_PROP_POS_FRAMES, position)
        for index in indices.tolist():
            while position <= index:
                if not capture.grab():
                    raise ValueError(f"no frame {position}")
                position += 1
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        return np.stack(frames)
    finally:
        capture.release()


# The codec alone: a lower bound for the time of every decoder.


@dataclass(frozen=True)
class CodecWork:
    """The packets that must be decoded for the selected frames, in memory.

    Attributes:
        codec: A fresh codec context.
        ranges: Packets in decoding order, one list per decode range. A range starts at the last keyframe before
            selected frames and ends at the last selected packet before the next such keyframe. Of AV1 and VP9 only the
            frames that selected ones depend on.
        selected_pts: Timestamps of the selected frames.
    """

    codec: av.VideoCodecContext
    ranges: list[list[av.Packet]]
    selected_pts: set[int]


def prepare_codec(file: Path, indices: np.ndarray, threads: int) -> CodecWork:
    """Demuxes the file and selects the packets to decode.

    Raises:
        ValueError: The packets' timestamps do not determine the display order.
    """
    with av.open(str(file)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    pts = [packet.pts for packet in packets]
    if None in pts or len(set(pts)) < len(pts):
        raise ValueError("expected a unique timestamp for each packet, found missing or repeated ones")
    display_order = sorted(range(len(packets)), key=pts.__getitem__)
    selected = sorted({display_order[index] for index in indices.tolist()})
    keyframes = [position for position, packet in enumerate(packets) if packet.is_keyframe]
    last_by_keyframe: dict[int, int] = {}
    for position in selected:
        last_by_keyframe[keyframes[max(0, bisect_right(keyframes, position) - 1)]] = position
    ranges = [packets[start : last + 1] for start, last in last_by_keyframe.items()]
    codec = av.open(str(file)).streams.video[0].codec_context
    selected_pts = {pts[position] for position in selected}
    if codec.name in SLOT_CODECS:
        ranges = [_required(packets, selected_pts, codec.name) for packets in ranges]
    codec.thread_count, codec.thread_type = threads, "FRAME"
    return CodecWork(codec, ranges, selected_pts)


def _required(packets: list[av.Packet], selected_pts: set[int], codec: str) -> list[av.Packet]:
    """The packets of a decode range that the selected frames depend on."""
    selected = {position for position, packet in enumerate(packets) if packet.pts in selected_pts}
    return [packet for packet in required_packets(packets, selected, codec=codec) if packet]


def run_codec(work: CodecWork) -> int:
    """Decodes the packets without converting frames to RGB; returns how many selected frames were decoded."""
    count = 0
    for packets in work.ranges:
        work.codec.flush_buffers()
        for position, packet in enumerate(packets):
            # A frame that no other frame references is decoded only if it is selected.
            is_needed = position == 0 or packet.pts in work.selected_pts
            work.codec.skip_frame = "DEFAULT" if is_needed else "NONREF"
            count += sum(frame.pts in work.selected_pts for frame in work.codec.decode(packet))
        count += sum(frame.pts in work.selected_pts for frame in work.codec.decode(None))
    return count


# Reference frames


@dataclass(frozen=True)
class ReferenceFrames:
    """The frames of a file decoded sequentially.

    Attributes:
        frames: {index: uint8 (H, W, 3)} of the selected frames, upright.
        thumbnails: float32 (N, P, 3) of all frames.
    """

    frames: dict[int, np.ndarray]
    thumbnails: np.ndarray

    @classmethod
    def decode(cls, file: Path, indices: np.ndarray) -> "ReferenceFrames":
        selected, frames, thumbnails = set(indices.tolist()), {}, []
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                # PyAV's rotation and np.rot90 are both counter-clockwise.
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                thumbnails.append(_thumbnail(pixels))
                if index in selected:
                    frames[index] = pixels
        return cls(frames, np.stack(thumbnails))

    def compare(self, frames: np.ndarray, indices: np.ndarray) -> dict[str, int]:
        """Counts incorrect frames.

        Args:
            frames: A decoder's result, uint8 (T, H, W, 3).
            indices: The indices it was asked for.

        Returns:
            `wrong_frames` show another moment of the video; `differing_frames` are not bit-exact. A missing frame
            counts as both.
        """
        missing = max(0, len(indices) - len(frames))
        differing = [
            position
            for position, index in enumerate(indices[: len(frames)].tolist())
            if not np.array_equal(frames[position], self.frames.get(index))
        ]
        wrong = sum(self._shows_another_moment(frames[position], int(indices[position])) for position in differing)
        return {"wrong_frames": missing + wrong, "differing_frames": missing + len(differing)}

    def _shows_another_moment(self, frame: np.ndarray, index: int) -> bool:
        """Returns True if another frame is clearly more similar; differences in color or rounding do not count."""
        if index not in self.frames or frame.shape != self.frames[index].shape:
            return True
        distances = np.abs(self.thumbnails - _thumbnail(frame)).mean(axis=(1, 2))  # (N,)
        return bool(distances[index] > 1.25 * distances.min() + 0.05)


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """Returns block means of uint8 (H, W, 3) minus the frame's mean color: float32 (P, 3)."""
    side = max(1, min(16, min(frame.shape[:2]) // 8))
    rows, columns = frame.shape[0] // side, frame.shape[1] // side
    blocks = frame[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1, 3)  # (P, 3)
    return means - means.mean(axis=0)

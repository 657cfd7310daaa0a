"""Which frames of a video become a clip: the frame indices and the warnings about them. All sampling policy is here.

    indices, warnings = sample_frames(video, num_frames=32, sampling="uniform")

A new sampling strategy is a branch in `sample_frames` and a value in `SAMPLINGS`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from handler.video.decoder import Video

SAMPLINGS = ("uniform", "segment", "keyframes")

# Warn if neighboring sampled frames are further apart than this.
MAX_DISTANCE_S = 2.0

FrameIndices = npt.NDArray[np.int64]


def sample_frames(
    video: Video, *, num_frames: int, sampling: str = "uniform", phase: float = 0.5, stride_frames: int | None = None
) -> tuple[FrameIndices, list[str]]:
    """Chooses the frames of a clip.

    Args:
        video: an open video.
        num_frames: frames in the clip, at least 1.
        sampling: "uniform" (see `sample_uniform`); "segment", near those and faster to decode (see `sample_segments`);
            or "keyframes", the nearest keyframe to each uniform index. Without a usable index all frames are decoded
            anyway; then all three are the same.
        phase: where in its part of the video a frame of "uniform" is taken, see `sample_uniform`.
        stride_frames: take frames at this distance instead, see `sample_stride`; with "uniform" only.

    Returns:
        int64 (num_frames,), non-decreasing frame indices; and warnings for the user.

    Raises:
        ValueError: `sampling` is not one of SAMPLINGS, or num_frames is below 1.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"expected sampling to be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    warnings, frame_count = [], video.info.frame_count
    indices = sample_uniform(frame_count, num_frames, phase=phase)  # (T,)
    if frame_count < num_frames:
        frames = "1 frame" if frame_count == 1 else f"{frame_count} frames"
        warnings.append(f"the video has {frames} and the model takes {num_frames}: frames repeat")
    if sampling == "uniform" and stride_frames is not None:
        indices = sample_stride(frame_count, num_frames, stride_frames=stride_frames, phase=phase)
    if sampling == "segment" and video.decode_lengths is not None:
        indices = sample_segments(num_frames, decode_lengths=video.decode_lengths)
    elif sampling == "keyframes" and video.keyframes is not None:
        if len(video.keyframes):
            indices = nearest(indices, video.keyframes)
            distinct = len(np.unique(indices))
            if distinct < min(frame_count, num_frames):
                warnings.append(
                    f"the video has {distinct} keyframes to sample and the model takes {num_frames}: frames repeat"
                )
        else:
            warnings.append("the video shows no keyframe: frames are sampled uniformly")
    distance_s = float(np.diff(video.pts_s[indices]).max(initial=0.0))
    if distance_s > MAX_DISTANCE_S:
        warnings.append(f"sampled frames are up to {distance_s:.1f} s apart: actions shorter than that may be missed")
    return indices, warnings


def sample_uniform(frame_count: int, num_frames: int, *, phase: float = 0.5) -> FrameIndices:
    """Splits the video into `num_frames` equal parts and returns one frame of each, by default the middle one.

    Each sampled frame represents an equally long part of the video. The first and last frames, which are often black
    or part of a fade, are left out. A video of exactly `num_frames` frames is sampled once each; frames of a shorter
    video repeat.

    Args:
        frame_count: frames in the video.
        num_frames: T.
        phase: where in its part the frame is taken, from 0 to 1. Training varies it.

    Returns:
        int64 (num_frames,), non-decreasing, from 0 to frame_count - 1.

    Raises:
        ValueError: frame_count or num_frames is below 1.
    """
    if frame_count < 1 or num_frames < 1:
        raise ValueError(f"expected num_frames and frame_count of at least 1, got {num_frames} and {frame_count}")
    # Exact for phase 0.5: the quotient is an integer, or further from the next one than rounding moves it.
    indices = np.floor((np.arange(num_frames) + phase) * frame_count / num_frames)
    return indices.clip(max=frame_count - 1).astype(np.int64)


def sample_stride(frame_count: int, num_frames: int, *, stride_frames: int, phase: float) -> FrameIndices:
    """Returns frames at a constant distance; a video that is too short for that is sampled uniformly.

    Args:
        frame_count: frames in the video.
        num_frames: T.
        stride_frames: distance between the frames.
        phase: where the clip is, from 0 (at the start of the video) to 1 (at its end).

    Returns:
        int64 (num_frames,), non-decreasing, from 0 to frame_count - 1.
    """
    starts = frame_count - (num_frames - 1) * stride_frames
    if starts < 1:
        return sample_uniform(frame_count, num_frames, phase=phase)
    return min(int(phase * starts), starts - 1) + stride_frames * np.arange(num_frames, dtype=np.int64)


def sample_segments(num_frames: int, *, decode_lengths: FrameIndices) -> FrameIndices:
    """Splits the video into `num_frames` equal parts and returns the frame of each that is decoded fastest.

    Only the central half of a part counts, so that a frame is at most a quarter of a part away from the one that
    `sample_uniform` takes. If several are equally fast, such as keyframes, the one nearest to the middle is taken.
    The longer the video, the more parts have a keyframe there, which is decoded without any other frame.

    Args:
        num_frames: T.
        decode_lengths: int64 (N,), frames that must be decoded for each frame of the video.

    Returns:
        int64 (T,), non-decreasing, from 0 to N - 1.
    """
    frame_count = len(decode_lengths)
    chosen = []
    for part, middle in enumerate(sample_uniform(frame_count, num_frames).tolist()):
        # The bounds of the central half are (4 * part + 1) / 4 and (4 * part + 3) / 4 of a part's length.
        first = min(middle, -(-(4 * part + 1) * frame_count // (4 * num_frames)))
        last = max(middle, (4 * part + 3) * frame_count // (4 * num_frames))
        lengths = decode_lengths[first : last + 1]
        fastest = first + np.flatnonzero(lengths == lengths.min())
        chosen.append(fastest[np.abs(fastest - middle).argmin()])
    return np.array(chosen, np.int64)  # (T,)


def nearest(indices: FrameIndices, candidates: FrameIndices) -> FrameIndices:
    """Returns the nearest candidate to each index, the smaller one in case of a tie.

    Args:
        indices: int64 (T,).
        candidates: int64 (K,), ascending, at least one.

    Returns:
        int64 (T,).
    """
    distances = np.abs(indices[:, None] - candidates)  # (T, K)
    chosen: FrameIndices = candidates[distances.argmin(1)]  # (T,)
    return chosen

"""Which frames of a video become its clips: the frame indices and the warnings about them. All sampling policy is here.

    indices, warnings = sample_frames(video, num_frames=32, sampling="uniform")
    indices, warnings = sample_views(video, Views(clips=4, sampling="dense", stride_frames=2), num_frames=32)

A new sampling strategy is a branch in `_sample_clip` and a value in `handler.views.SAMPLINGS`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from handler.video.decoder import Video
from handler.video.errors import EmptyPartError
from handler.views import Views

# Warn if neighboring sampled frames are further apart than this.
MAX_DISTANCE_S = 2.0

# Display times are compared with this precision, because decimal fractions are not exact.
TIME_PRECISION_S = 1e-6

FrameIndices = npt.NDArray[np.int64]


def sample_frames(
    video: Video, *, num_frames: int, sampling: str = "uniform", phase: float = 0.5, stride_frames: int | None = None
) -> tuple[FrameIndices, list[str]]:
    """Chooses the frames of a single clip from the whole video, see `sample_views`.

    Returns:
        int64 (num_frames,), and warnings for the user.

    Raises:
        ValueError: `sampling` is unknown or lacks `stride_frames`, or num_frames is below 1.
    """
    indices, warnings = sample_views(
        video, Views(sampling=sampling, phase=phase, stride_frames=stride_frames), num_frames=num_frames
    )
    return indices[0], warnings


def sample_views(video: Video, views: Views, *, num_frames: int) -> tuple[FrameIndices, list[str]]:
    """Chooses the frames of each clip in time.

    The samplings are "uniform" (see `sample_uniform`); "segment", near those and faster to decode (see
    `sample_segments`); "keyframes", the nearest keyframe to each uniform index; and "dense" (see `sample_dense`).
    Without a usable index all frames are decoded anyway; then "segment" and "keyframes" are the same as "uniform".

    With "dense", clips may overlap, or leave frames of the video out. The other samplings divide the video, or its part
    from `start_s` to `end_s`, into as many equal parts as there are clips, and sample each part like a video.

    Args:
        video: an open video.
        views: the clips; only their position in time matters here.
        num_frames: T, frames in a clip, at least 1.

    Returns:
        int64 (clips, T), frame indices; non-decreasing within a clip, except that "dense" repeats short videos from the
        start; and warnings for the user.

    Raises:
        EmptyPartError: no frame is shown from `start_s` to `end_s`.
        ValueError: num_frames is below 1.
    """
    first, stop = frames_between(video.pts_s, start_s=views.start_s, end_s=views.end_s)
    count, is_whole = stop - first, stop - first == video.info.frame_count
    warnings: list[str] = []
    if views.sampling == "dense":
        assert views.stride_frames is not None  # checked by Views
        dense = sample_dense(count, num_frames, stride_frames=views.stride_frames, clips=views.clips)  # (K, T)
        indices = first + dense
        if count <= (span := (num_frames - 1) * views.stride_frames):
            warnings.append(_repeat_warning(count, span + 1, is_whole=is_whole))
    else:
        starts = first + np.arange(views.clips + 1) * count // views.clips  # (K + 1,)
        rows = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
            # With more clips than frames, parts have one frame.
            bounds = start, max(end, start + 1)
            rows.append(_sample_clip(video, views, num_frames, bounds=bounds, part=(first, stop), warnings=warnings))
        indices = np.stack(rows)  # (K, T)
    distance_s = float(np.diff(video.pts_s[indices]).max(initial=0.0))
    if distance_s > MAX_DISTANCE_S:
        warnings.append(f"sampled frames are up to {distance_s:.1f} s apart: actions shorter than that may be missed")
    return indices, list(dict.fromkeys(warnings))


def frames_between(pts_s: npt.NDArray[np.float64], *, start_s: float, end_s: float | None) -> tuple[int, int]:
    """Returns the range of the frames whose display begins from `start_s` on and before `end_s`.

    Args:
        pts_s: float64 (N,), non-decreasing, see `Video.pts_s`.
        start_s: seconds from the first frame.
        end_s: seconds from the first frame; None: the end of the video.

    Returns:
        The first frame, and the one after the last.

    Raises:
        EmptyPartError: there is no such frame.
    """
    first = int(np.searchsorted(pts_s, start_s - TIME_PRECISION_S))
    stop = len(pts_s) if end_s is None else int(np.searchsorted(pts_s, end_s - TIME_PRECISION_S))
    if first >= stop:
        part = f"from {start_s:g} s on" if end_s is None else f"from {start_s:g} s to {end_s:g} s"
        raise EmptyPartError(f"expected a frame {part}, got a video with frames at 0 s to {pts_s[-1]:.3f} s")
    return first, stop


def _sample_clip(
    video: Video,
    views: Views,
    num_frames: int,
    *,
    bounds: tuple[int, int],
    part: tuple[int, int],
    warnings: list[str],
) -> FrameIndices:
    """Chooses the frames of one clip, int64 (T,), and appends to the warnings.

    Args:
        bounds: first frame of the clip's part of the video, and the one after its last.
        part: the same of all clips together.
    """
    first, stop = bounds
    count = stop - first
    indices = first + sample_uniform(count, num_frames, phase=views.phase)  # (T,)
    if count < num_frames:
        warnings.append(_repeat_warning(count, num_frames, is_whole=count == video.info.frame_count))
    if views.sampling == "uniform" and views.stride_frames is not None:
        return first + sample_stride(count, num_frames, stride_frames=views.stride_frames, phase=views.phase)
    if views.sampling == "segment" and video.decode_lengths is not None:
        return first + sample_segments(num_frames, decode_lengths=video.decode_lengths[first:stop])
    if views.sampling == "keyframes" and video.keyframes is not None:
        keyframes = video.keyframes[(video.keyframes >= part[0]) & (video.keyframes < part[1])]
        if not len(keyframes):
            warnings.append("the video shows no keyframe: frames are sampled uniformly")
            return indices
        indices = nearest(indices, keyframes)
        distinct = len(np.unique(indices))
        if distinct < min(count, num_frames):
            warnings.append(
                f"the video has {distinct} keyframes to sample and the model takes {num_frames}: frames repeat"
            )
    return indices


def _repeat_warning(count: int, num_frames: int, *, is_whole: bool) -> str:
    frames = "1 frame" if count == 1 else f"{count} frames"
    video = "the video" if is_whole else "a part of the video"
    return f"{video} has {frames} and the model takes {num_frames}: frames repeat"


def sample_dense(frame_count: int, num_frames: int, *, stride_frames: int, clips: int) -> FrameIndices:
    """Returns clips of frames at a constant distance, as in the evaluation of the paper.

    The clips start at equal distances, from the first frame to the last at which a clip of T * stride frames fits. A
    single clip is in the middle. If the video has fewer than T * stride frames, all clips start at its first frame, and
    the video repeats. These are the indices of `sample_linspace_sequence` and `sample_sequence` of DMVR, the original's
    library.

    Args:
        frame_count: N, frames in the video.
        num_frames: T.
        stride_frames: distance between the frames of a clip.
        clips: K.

    Returns:
        int64 (K, T), from 0 to N - 1.

    Raises:
        ValueError: an argument is below 1.
    """
    if min(frame_count, num_frames, stride_frames, clips) < 1:
        raise ValueError(
            "expected frame_count, num_frames, stride_frames and clips of at least 1, got "
            f"{frame_count}, {num_frames}, {stride_frames} and {clips}"
        )
    last = max(0, frame_count - num_frames * stride_frames)
    offsets = np.linspace(0, last, clips).astype(np.int64) if clips > 1 else np.array([last // 2])  # (K,)
    steps = np.arange(num_frames, dtype=np.int64) * stride_frames  # (T,)
    indices: FrameIndices = (offsets[:, None] + steps) % frame_count
    return indices


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

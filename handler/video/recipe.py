"""The two functions of the ViViT example in transformers' documentation. `decode_frames` is faster and stricter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from handler.video.errors import FrameIndexError
from handler.video.orientation import rgb_view


def sample_frame_indices(clip_len: int, frame_sample_rate: int, seg_len: int) -> npt.NDArray[np.int64]:
    """Samples a clip at a random position, drawn from np.random's global generator.

    Args:
        clip_len: frames in the clip.
        frame_sample_rate: distance between sampled frames, in frames.
        seg_len: frames in the video.

    Returns:
        int64 (clip_len,), ascending.

    Raises:
        ValueError: the video is too short for the clip.
    """
    span = int(clip_len * frame_sample_rate)
    if seg_len <= span:
        raise ValueError(
            f"expected a video of more than {clip_len} x {frame_sample_rate} = {span} frames, got {seg_len} "
            "(PyAV's stream.frames is 0 if the file does not state it; probe() returns the frame count)"
        )
    end = np.random.randint(span, seg_len)
    return np.linspace(end - span, end, num=clip_len).clip(end - span, end - 1).astype(np.int64)


def read_video_pyav(container: InputContainer, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Decodes frames of an open PyAV container, sequentially from its start.

    Returns each frame once, in display order, as stored (not turned upright). Indices below `indices[0]` or above
    `indices[-1]`, and those beyond the end of the video, are ignored.

    Returns:
        uint8 (number of frames found, height, width, 3), RGB.

    Raises:
        FrameIndexError: the video has none of the frames.
    """
    wanted = {int(index) for index in indices if indices[0] <= index <= indices[-1]}
    reformatter = VideoReformatter()
    frames = []
    if wanted:
        container.seek(0)
        for i, frame in enumerate(container.decode(video=0)):
            if i > max(wanted):
                break
            if i in wanted:
                frames.append(rgb_view(reformatter.reformat(frame, format="rgb24", threads=1)))
    if not frames:
        raise FrameIndexError(f"expected indices of frames in the video, got {list(indices)}")
    return np.stack(frames)

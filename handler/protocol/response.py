"""The bodies of responses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from handler.protocol.errors import ApiError

TIME_DECIMALS = 3


def render_answer(
    predictions: Iterable[tuple[str, float]],
    *,
    video: Mapping[str, Any],
    frame_times_s: Iterable[float],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Returns the body for a classified video.

    Args:
        predictions: (label, score) pairs, best first.
        video: properties of the video (the fields of VideoInfo).
        frame_times_s: display time of each sampled frame, in seconds from the video's first frame.
        warnings: what the caller should know about the result, such as repeated frames.
    """
    times_s = [round(float(time_s), TIME_DECIMALS) for time_s in frame_times_s]
    return {
        "predictions": [{"label": label, "score": score} for label, score in predictions],
        # `frames` is the deprecated name of `frame_times_s`.
        "video": {**video, "frame_times_s": times_s, "frames": times_s},
        "warnings": list(warnings),
    }


def render_error(error: ApiError) -> dict[str, Any]:
    """Returns the body for an error. It contains everything a client needs, because gRPC drops the HTTP status."""
    return {"error": {"code": error.code, "message": str(error)}}

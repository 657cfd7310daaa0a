"""The bodies of responses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from handler.protocol.errors import ApiError

TIME_DECIMALS = 3


def render_answer(
    predictions: Iterable[tuple[str, float]],
    *,
    labels: Iterable[Mapping[str, str]] | None = None,
    heads: Mapping[str, Iterable[tuple[str, float]]] | None = None,
    video: Mapping[str, Any],
    frame_times_s: Iterable[float],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Returns the body for a classified video.

    Args:
        predictions: (label, score) pairs, best first.
        labels: of a model with several label heads: the labels of each prediction, by the name of the head.
        heads: of a model with several label heads: (label, score) pairs of each head, best first, by its name.
        video: properties of the video (the fields of VideoInfo).
        frame_times_s: display time of each sampled frame, in seconds from the video's first frame.
        warnings: what the caller should know about the result, such as repeated frames.
    """
    times_s = [round(float(time_s), TIME_DECIMALS) for time_s in frame_times_s]
    answer: dict[str, Any] = {"predictions": _render_pairs(predictions)}
    if labels is not None and heads is not None:
        for prediction, of_heads in zip(answer["predictions"], labels):
            prediction["labels"] = dict(of_heads)
        answer["heads"] = {name: _render_pairs(pairs) for name, pairs in heads.items()}
    return {
        **answer,
        # `frames` is the deprecated name of `frame_times_s`.
        "video": {**video, "frame_times_s": times_s, "frames": times_s},
        "warnings": list(warnings),
    }


def _render_pairs(pairs: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in pairs]


def render_error(error: ApiError) -> dict[str, Any]:
    """Returns the body for an error. It contains everything a client needs, because gRPC drops the HTTP status."""
    return {"error": {"code": error.code, "message": str(error)}}

"""The bodies of responses."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from handler.protocol.errors import ApiError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TIME_DECIMALS = 3
HEAT_DECIMALS = 4


def render_answer(
    predictions: Iterable[tuple[str, float]],
    *,
    labels: Iterable[Mapping[str, str]] | None = None,
    heads: Mapping[str, Iterable[tuple[str, float]]] | None = None,
    video: Mapping[str, Any],
    frame_times_s: Iterable[float],
    warnings: Sequence[str],
    views: Iterable[Mapping[str, Any]] = (),
    agreement: float | None = None,
) -> dict[str, Any]:
    """Returns the body for a classified video.

    Args:
        predictions: (label, score) pairs, best first.
        labels: of a model with several label heads: the labels of each prediction, by the name of the head.
        heads: of a model with several label heads: (label, score) pairs of each head, best first, by its name.
        video: properties of the video (the fields of VideoInfo).
        frame_times_s: display time of each sampled frame, in seconds from the video's first frame.
        warnings: what the caller should know about the result, such as repeated frames.
        views: `predictions`, `times_s` and `crop` (top, left, height, width) of each view.
        agreement: share of the views whose best label is that of the video. None: there is only one view.
    """
    times_s = _render_times(frame_times_s)
    answer: dict[str, Any] = {"predictions": _render_pairs(predictions)}
    if labels is not None and heads is not None:
        for prediction, of_heads in zip(answer["predictions"], labels):
            prediction["labels"] = dict(of_heads)
        answer["heads"] = {name: _render_pairs(pairs) for name, pairs in heads.items()}
    if agreement is not None:
        answer["agreement"] = agreement
        answer["views"] = [_render_view(**view) for view in views]
    return {
        **answer,
        # `frames` is the deprecated name of `frame_times_s`.
        "video": {**video, "frame_times_s": times_s, "frames": times_s},
        "warnings": list(warnings),
    }


def render_embedding(
    vector: "npt.NDArray[np.float32]",
    *,
    encoding: str,
    pooling: str,
    is_normalized: bool,
    weights_sha256: str | None,
    video: Mapping[str, Any],
    frame_times_s: Iterable[float],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Returns the body for the embedding of a video.

    Args:
        vector: float32 (D,).
        encoding: "numbers"; or "base64", of D little-endian 32-bit floats.
        pooling, is_normalized, weights_sha256: see Embedding.
        video, frame_times_s, warnings: see `render_answer`.
    """
    content = vector.astype("<f4")
    return {
        "embedding": base64.b64encode(content.tobytes()).decode() if encoding == "base64" else content.tolist(),
        "dimensions": len(content),
        "pooling": pooling,
        "normalized": is_normalized,
        "weights_sha256": weights_sha256,
        "video": {**video, "frame_times_s": _render_times(frame_times_s)},
        "warnings": list(warnings),
    }


def _render_view(
    *, predictions: Sequence[tuple[str, float]], times_s: Iterable[float], crop: tuple[int, int, int, int]
) -> dict[str, Any]:
    return {
        **_render_pairs(predictions[:1])[0],
        "frame_times_s": _render_times(times_s),
        "crop": dict(zip(("top", "left", "height", "width"), crop)),
    }


def _render_times(times_s: Iterable[float]) -> list[float]:
    return [round(float(time_s), TIME_DECIMALS) for time_s in times_s]


def render_explanation(
    *,
    label: str,
    score: float,
    heat: "npt.NDArray[np.float32]",
    step_times_s: Iterable[float],
    region: tuple[float, float, float, float],
) -> dict[str, Any]:
    """Returns the part of an answer that explains it, at most about 20 bytes for each tubelet.

    Args:
        label: what is explained.
        score: its score.
        heat: (T', H', W') >= 0, with the sum 1 or 0. The answer contains it with the maximum 1.
        step_times_s: (T',), in seconds from the video's first frame.
        region: (left, top, width, height) of the part of the video's frames that the heat covers, in their pixels.
    """
    steps = zip(step_times_s, heat.sum((1, 2)).tolist())
    return {
        "label": label,
        "score": score,
        "grid": dict(zip(("time", "height", "width"), heat.shape)),
        "region": {name: round(value, 1) for name, value in zip(("left", "top", "width", "height"), region)},
        "time_steps": [
            {"time_s": round(float(time_s), TIME_DECIMALS), "score": round(score, HEAT_DECIMALS)}
            for time_s, score in steps
        ],
        "heat": (heat.astype(float) / (heat.max() or 1)).round(HEAT_DECIMALS).tolist(),
    }


def _render_pairs(pairs: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in pairs]


def render_error(error: ApiError) -> dict[str, Any]:
    """Returns the body for an error. It contains everything a client needs, because gRPC drops the HTTP status."""
    return {"error": {"code": error.code, "message": str(error)}}

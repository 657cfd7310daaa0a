"""What a worker knows about one request while its batch passes through the handler's hooks."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from handler.clips import Clip
from handler.protocol import ApiError, Request

if TYPE_CHECKING:
    from handler.explanation.result import Explanation


@dataclasses.dataclass
class Job:
    """One request of a batch.

    It fails or succeeds independently of the other requests: as soon as `error` is set, the later hooks skip it.

    Attributes:
        index: position in the batch.
        request: the parsed request, set by preprocess; without its video once that is decoded.
        clip: the decoded and resized video, set by preprocess.
        logits: float32 (V, labels), of each view, set by inference.
        features: float32 (V, D), of each view, set by inference.
        error: why the request failed.
        description: the answer to a request that asks for a description of the model instead of a prediction.
    """

    index: int
    request: Request | None = None
    clip: Clip | None = None
    logits: torch.Tensor | None = None
    features: torch.Tensor | None = None
    explanation: "Explanation | None" = None
    error: ApiError | None = None
    description: dict[str, Any] | None = None

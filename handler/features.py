"""Embedding: a vector that represents a video, for search and clustering."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.clips import Clip
from handler.protocol import render_embedding


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Embedding:
    """The features of a video after the last LayerNorm of the model, averaged over its views.

    Vectors are comparable if `weights_sha256`, `pooling` and the way of sampling are the same.

    Attributes:
        vector: float32 (D,).
        pooling: "cls", the feature of the CLS token; or "mean", the mean of the other tokens.
        is_normalized: whether the vector has the length 1.
        weights_sha256: hash of the checkpoint's weights; None for a model that was not loaded from a checkpoint.
        clip: the frames that were used, and facts about the video.
    """

    vector: npt.NDArray[np.float32]
    pooling: str
    is_normalized: bool
    weights_sha256: str | None
    clip: Clip

    def to_answer(self, *, encoding: str = "numbers") -> dict[str, Any]:
        """Returns the body of a server's response. `encoding` is "numbers" or "base64", see `render_embedding`."""
        return render_embedding(
            self.vector,
            encoding=encoding,
            pooling=self.pooling,
            is_normalized=self.is_normalized,
            weights_sha256=self.weights_sha256,
            video=dataclasses.asdict(self.clip.info),
            frame_times_s=self.clip.times_s,
            warnings=self.clip.warnings,
        )

    def __repr__(self) -> str:
        return f"Embedding(vector=<{len(self.vector)} numbers>, pooling={self.pooling!r})"

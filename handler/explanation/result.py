"""Explanation: a heat map over a clip."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from handler.clips import Clip
from handler.protocol import render_explanation

METHODS = ("rollout", "occlusion")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """How much each tubelet of a clip supports a label.

    Attributes:
        label: the label that is explained; of a model with several heads possibly a combination, see Ranking.
        score: its score, as in a prediction.
        method: one of METHODS.
        heat: float32 (T', H', W'), >= 0, with the sum 1; all zeros if nothing in the clip supports the label. Tubelet
            (t, y, x) covers the frames `t * T / T'` to `(t + 1) * T / T'` of the clip and the same shares of its height
            and width.
        step_times_s: float64 (T',), the mean presentation time of the frames of each time step, in seconds from the
            first frame of the video.
        region: (left, top, width, height) of the part of the video's frames that the heat covers, in their pixels. It
            is larger than the frame where the clip is padded.
        logits: float32 (labels,).
        clip: the view that was explained, and facts about the video.
    """

    label: str
    score: float
    method: str
    heat: npt.NDArray[np.float32]
    step_times_s: npt.NDArray[np.float64]
    region: tuple[float, float, float, float]
    logits: torch.Tensor
    clip: Clip

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tubelets along (time, height, width)."""
        time, height, width = self.heat.shape
        return time, height, width

    @property
    def step_scores(self) -> npt.NDArray[np.float32]:
        """Share of each time step in the heat: (T',), with the sum 1."""
        scores: npt.NDArray[np.float32] = self.heat.sum((1, 2))
        return scores

    def render(self) -> dict[str, Any]:
        """Returns the part of an answer that explains it."""
        return render_explanation(
            label=self.label,
            score=self.score,
            heat=self.heat,
            step_times_s=self.step_times_s,
            region=self.region,
        )

    def __repr__(self) -> str:
        time, height, width = self.grid
        return f"Explanation(label={self.label!r}, score={self.score:.4f}, heat=<{time} x {height} x {width}>)"


def normalize_heat(relevance: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales relevance (T', H', W') >= 0 to the sum 1, unless it is zero everywhere."""
    total = relevance.sum(dtype=np.float64)
    return relevance if total == 0 else (relevance / total).astype(np.float32)

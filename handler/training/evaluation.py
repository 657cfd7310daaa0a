"""Accuracy of a classifier on labeled videos.

N  videos      labels  number of classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TOP = 5


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well labeled videos were classified.

    Attributes:
        confusion: int64 (labels, labels), number of videos by true label (row) and predicted label (column).
        top5: share of videos whose label is among the TOP best, in [0, 1]; nan without videos.
        errors: message by path, of videos that could not be decoded. They are not counted.
    """

    confusion: NDArray[np.int64]
    top5: float
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of classified videos."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of videos whose best label is right, in [0, 1]; nan without videos."""
        return float(self.confusion.trace() / self.count) if self.count else float("nan")

    @property
    def per_class(self) -> NDArray[np.float64]:
        """Share of each label's videos that were recognized, float64 (labels,); nan for labels without videos."""
        counts = self.confusion.sum(1)
        accuracy: NDArray[np.float64] = np.full(len(counts), np.nan)
        np.divide(self.confusion.diagonal(), counts, out=accuracy, where=counts > 0)
        return accuracy

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """Returns the content of a JSON file, which has null where there are no videos."""
        return {
            "videos": self.count,
            "top1": _finite(self.top1),
            "top5": _finite(self.top5),
            "per_class": {label: _finite(accuracy) for label, accuracy in zip(labels, self.per_class)},
            "labels": list(labels),
            "confusion": self.confusion.tolist(),
            "errors": dict(self.errors),
        }


def evaluate(
    logits: torch.Tensor, labels: torch.Tensor, *, num_labels: int, errors: Mapping[str, str] | None = None
) -> Evaluation:
    """Compares logits with the true labels.

    Among equal logits, the label with the lowest index counts as the best.

    Args:
        logits: (N, labels).
        labels: true label of each video, int64 (N,) in [0, num_labels).
        num_labels: number of labels.
        errors: message by path, of the videos that could not be decoded.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or logits are not finite.
    """
    if logits.shape != (len(labels), num_labels) or labels.ndim != 1:
        expected = f"logits (N, {num_labels}) and labels (N,)"
        raise ValueError(f"expected {expected}, got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not torch.isfinite(logits).all():
        raise ValueError("expected finite logits, got NaN or infinity")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(f"expected labels in [0, {num_labels}), got {int(labels.min())} to {int(labels.max())}")
    labels = labels.cpu()
    ranking = logits.float().cpu().argsort(dim=1, descending=True, stable=True)  # (N, labels)
    pairs = labels * num_labels + ranking[:, 0]  # (N,)
    confusion = torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels)
    is_among_top = (ranking[:, :TOP] == labels[:, None]).any(1)  # (N,)
    return Evaluation(confusion=confusion.numpy(), top5=float(is_among_top.double().mean()), errors=dict(errors or {}))


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return float(value) if np.isfinite(value) else None

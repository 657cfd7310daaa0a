"""Training losses."""

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as F


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str | None = None,
    *,
    label_heads: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """Computes the loss of a batch of B clips.

    problem_type                   loss                   labels
    single_label_classification    cross entropy          (B,) class indices; -100 is ignored
    multi_label_classification     binary cross entropy   (B, num_labels) from 0 to 1
    regression                     mean squared error     (B, num_labels), or (B,) if num_labels is 1

    With several label heads the loss is the mean of the heads' cross entropies, as in the original, and labels are
    (B, heads) class indices, counted from 0 in each head; -100 is ignored.

    Args:
        logits: (B, num_labels).
        labels: see the table.
        problem_type: None selects regression for one label, otherwise single_label_classification for labels of dtype
            int32 or int64 and multi_label_classification for other dtypes.
        label_heads: see VivitConfig.

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: the labels have the wrong number of elements, or with several heads the wrong shape.
    """
    batch, num_labels = logits.shape
    if label_heads is not None:
        if labels.shape != (batch, len(label_heads)):
            shape = (batch, len(label_heads))
            raise ValueError(
                f"expected labels of shape {shape} for {', '.join(label_heads)}, got {tuple(labels.shape)}"
            )
        parts = torch.split(logits, list(label_heads.values()), dim=1)  # (B, labels of the head) each
        targets = labels.to(logits.device).long().unbind(1)  # (B,) each
        return torch.stack([F.cross_entropy(part, target) for part, target in zip(parts, targets)]).mean()
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        elif labels.dtype in (torch.int32, torch.int64):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    expected = (batch,) if problem_type == "single_label_classification" else (batch, num_labels)
    if labels.numel() != math.prod(expected):
        raise ValueError(f"expected labels of shape {expected} for {problem_type}, got {tuple(labels.shape)}")
    labels = labels.to(logits.device).view(expected)  # (B,) or (B, num_labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.long())
    if problem_type == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

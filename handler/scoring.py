"""From logits to scores and labels, as the configuration of a model defines them."""

from collections.abc import Mapping, Sequence

import torch

from handler.models.config import VivitConfig
from handler.ranking import SEPARATOR, Ranking
from handler.validation import describe_unknown


def top_k(logits: torch.Tensor, config: VivitConfig, *, k: int) -> Ranking:
    """Returns the `k` best labels of one clip.

    Scores are the softmax over all labels. For the problem type multi_label_classification they are the sigmoid of
    each label, and for regression the values themselves. With several label heads each has a softmax of its own.

    Args:
        logits: (labels,).
        config: of the model, which has the labels.
        k: number of predictions, and of labels per head; larger numbers return all.
    """
    scores = scores_of(logits, config)
    if config.label_heads is not None:
        parts = torch.split(scores, list(config.label_heads.values()))
        labels_of_heads = config.labels_of_heads.items()
        heads = {name: _best(part, labels, k) for (name, labels), part in zip(labels_of_heads, parts)}
        return Ranking.of_heads(heads, k=k)
    return Ranking(predictions=_best(scores, config.id2label, k))


def scores_of(logits: torch.Tensor, config: VivitConfig) -> torch.Tensor:
    """Returns the score of each label (labels,) of one clip, see `top_k`."""
    if config.label_heads is not None:
        parts = torch.split(logits, list(config.label_heads.values()))
        return torch.cat([part.softmax(-1) for part in parts])
    if config.problem_type == "multi_label_classification":
        return logits.sigmoid()
    if config.problem_type == "regression" or len(logits) == 1:  # the loss treats one label as a regression
        return logits
    return logits.softmax(-1)


def label_indices(label: str, config: VivitConfig) -> list[int]:
    """Returns the indices of a label among the logits: one, or of a combination one for each head.

    Args:
        label: a label of the model. With several heads a label of one of them, or a combination as in predictions.
        config: of the model.

    Raises:
        ValueError: the model does not have this label, or several heads do.
    """
    labels, heads = list(config.id2label.values()), config.labels_of_heads
    indices = [index for index, name in enumerate(labels) if name == label]
    if len(indices) == 1:
        return indices
    if indices:
        raise ValueError(f"several heads have the label {label!r}: expected one label of each, joined by {SEPARATOR!r}")
    parts = label.split(SEPARATOR)
    if len(parts) != len(heads) or not all(part in names for part, names in zip(parts, heads.values())):
        raise ValueError(f"the model has no label {label!r}: {describe_unknown(label, labels)}")
    first = 0
    for part, names in zip(parts, heads.values()):
        indices.append(first + names.index(part))
        first += len(names)
    return indices


def best_indices(logits: torch.Tensor, config: VivitConfig) -> list[int]:
    """Returns the index of the best label among logits (labels,), with several heads of each."""
    first, indices = 0, []
    for part in torch.split(logits, list((config.label_heads or {"": len(logits)}).values())):
        indices.append(first + int(part.argmax()))
        first += len(part)
    return indices


def _best(scores: torch.Tensor, labels: Sequence[str] | Mapping[int, str], k: int) -> list[tuple[str, float]]:
    """The `k` best (label, score) pairs of the scores (labels,), best first."""
    best = scores.topk(min(k, len(scores)))
    return [(labels[index], score) for index, score in zip(best.indices.tolist(), best.values.tolist())]

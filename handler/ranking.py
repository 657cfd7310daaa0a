"""The best labels of one clip, for models with one or several label heads.

A model with several heads answers several questions at once: one softmax is over the nouns, another one over the verbs.
A combination has one label of each head. Its score is the product of their scores, as in the original's evaluation.
"""

import dataclasses
import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter

SEPARATOR = " + "  # between the labels of a combination

Combination = tuple[tuple[str, ...], float]  # labels, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The best labels of one clip.

    Attributes:
        predictions: (label, score) pairs, best first. With several heads these are the best combinations, with their
            labels joined by SEPARATOR in the order of the heads.
        labels: the labels of each prediction, by the name of the head. None for one head.
        heads: (label, score) pairs of each head, best first, by its name. None for one head.
    """

    predictions: list[tuple[str, float]]
    labels: list[dict[str, str]] | None = None
    heads: dict[str, list[tuple[str, float]]] | None = None

    @classmethod
    def of_heads(cls, heads: Mapping[str, Sequence[tuple[str, float]]], *, k: int) -> "Ranking":
        """Ranks combinations.

        Args:
            heads: name of each head -> its `k` best (label, score) pairs, best first; all of them if it has fewer.
            k: number of combinations.
        """
        best = best_combinations(list(heads.values()), k=k)
        return cls(
            predictions=[(SEPARATOR.join(labels), score) for labels, score in best],
            labels=[dict(zip(heads, labels)) for labels, _ in best],
            heads={name: list(pairs) for name, pairs in heads.items()},
        )


def best_combinations(heads: Sequence[Sequence[tuple[str, float]]], *, k: int) -> list[Combination]:
    """Returns the `k` combinations with the largest products of scores, best first.

    The result is exact without computing all products: the `k` best combinations begin with one of the `k` best of the
    heads before, and consist of each head's `k` best labels.

    Args:
        heads: (label, score) pairs of each head, best first; scores >= 0.
        k: number of combinations; larger numbers return all.
    """
    best: list[Combination] = [((), 1.0)]
    for head in heads:
        extended = (_extend(combination, head) for combination in best)
        best = list(islice(heapq.merge(*extended, key=itemgetter(1), reverse=True), k))
    return best


def _extend(combination: Combination, head: Sequence[tuple[str, float]]) -> Iterator[Combination]:
    """A combination with each label of one more head, best first."""
    labels, score = combination
    for label, factor in head:
        yield (*labels, label), score * factor

"""The best combinations of labels of several heads, against all products in NumPy."""

import time

import numpy as np
import pytest

from handler.ranking import Ranking, best_combinations


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def best_pairs(scores, k):
    """The k best (label, score) pairs; labels are indices."""
    return [(str(index), float(scores[index])) for index in np.argsort(-scores, kind="stable")[:k]]


def all_products(scores):
    products = np.ones(())
    for each in scores:
        products = products[..., None] * each
    return products


@pytest.mark.parametrize("sizes", [(6, 5), (1, 7), (9, 1), (4, 3, 5), (3, 2, 2, 3), (2, 2)])
@pytest.mark.parametrize("scale", [0, 0.1, 3, 50], ids=lambda scale: f"scale {scale}")  # 0: all scores are equal
def test_best_of_all_products(sizes, scale):
    generator = np.random.default_rng(sum(sizes))
    scores = [softmax(generator.normal(size=size) * scale) for size in sizes]
    products = all_products(scores)
    for k in (1, 2, max(sizes), products.size, products.size + 1):
        found = best_combinations([best_pairs(each, k) for each in scores], k=k)
        assert [score for _, score in found] == sorted(products.flat, reverse=True)[:k]
        assert [products[tuple(map(int, labels))] for labels, _ in found] == [score for _, score in found]
        assert len({labels for labels, _ in found}) == min(k, products.size)


def test_large_heads_ranked_without_all_products():
    head = [(str(index), 0.999**index) for index in range(3000)]
    start_s = time.monotonic()
    found = best_combinations([head] * 3, k=3000)  # of 27 billion combinations
    assert time.monotonic() - start_s < 20
    exponents = [sum(map(int, labels)) for labels, _ in found]
    assert len(found) == 3000 and exponents == sorted(exponents)
    assert exponents[:5] == [0, 1, 1, 1, 2]


def test_ranking_names_labels_of_heads():
    heads = {"noun": [("onion", 0.5), ("cut", 0.25)], "verb": [("cut", 0.75), ("wash", 0.25)]}
    ranking = Ranking.of_heads(heads, k=3)
    assert ranking.predictions == [("onion + cut", 0.375), ("cut + cut", 0.1875), ("onion + wash", 0.125)]
    assert ranking.labels[2] == {"noun": "onion", "verb": "wash"}
    assert ranking.heads == heads

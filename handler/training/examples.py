"""Examples: clips with their labels, made in threads and delivered in an order that does not depend on their timing.

T  frames of a clip     h, w  height and width of the model's frames, in pixels
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from handler.training.augmentation import augment_clip, sample_share, sample_view
from handler.training.data import Clips
from handler.training.options import Recipe
from handler.video import VideoError
from handler.views import ONE_VIEW, Views

Result = TypeVar("Result")

AHEAD = 8  # results per thread that may wait

# The first number of the entropy of each kind of random numbers. (A last number of 0 would not distinguish them.)
ORDER, AUGMENTATION, MIXUP, DROPOUT = 1, 2, 3, 4


@dataclass(frozen=True)
class Example:
    """A clip for training, or the reason why there is none.

    Attributes:
        name: of the video.
        clip: uint8 (T, 3, h, w), or None.
        label: index of its label.
        share: share of its own pixels in a mix, see `sample_share`.
        error: code and message if the clip could not be made.
    """

    name: str
    clip: NDArray[np.uint8] | None
    label: int = 0
    share: float = 1.0
    error: tuple[str, str] | None = None


def training_order(count: int, *, epoch: int, recipe: Recipe) -> NDArray[np.int64]:
    """Returns the clips of an epoch in random order, int64 (steps * recipe.batch_size,).

    The first ones are repeated at the end, to fill the last step.
    """
    order = np.random.default_rng((ORDER, recipe.seed, epoch)).permutation(count)
    return np.resize(order, -(-count // recipe.batch_size) * recipe.batch_size)


def training_examples(
    clips: Clips, positions: Sequence[int], *, epoch: int, recipe: Recipe, threads: int
) -> Generator[Example]:
    """Yields the examples at these positions of an epoch's order. Each depends on seed, epoch and position only."""
    order = training_order(len(clips.names), epoch=epoch, recipe=recipe)

    def make(position: int) -> Example:
        rng = np.random.default_rng((AUGMENTATION, recipe.seed, epoch, position))
        pair_rng = np.random.default_rng((MIXUP, recipe.seed, epoch, position // 2))
        example = _load(clips, int(order[position]), sample_view(rng, recipe), rng)
        if example.clip is None:
            return example
        clip = augment_clip(example.clip, rng, recipe)
        return Example(example.name, clip, example.label, sample_share(pair_rng, recipe))

    return in_order((functools.partial(make, position) for position in positions), threads=threads)


def served_examples(clips: Clips, indices: Iterable[int], *, threads: int) -> Generator[Example]:
    """Yields the examples that serving would make."""
    return in_order((functools.partial(_load, clips, index, ONE_VIEW, None) for index in indices), threads=threads)


def _load(clips: Clips, index: int, views: Views, rng: np.random.Generator | None) -> Example:
    try:
        clip, label = clips.load(index, views, rng)
    except VideoError as error:
        return Example(clips.names[index], None, error=(error.code, str(error)))
    return Example(clips.names[index], clip, label)


def in_order(functions: Iterable[Callable[[], Result]], *, threads: int) -> Generator[Result]:
    """Calls functions in threads and yields their results in order, whatever their timing.

    Args:
        functions: called a little before their result is needed.
        threads: calls at the same time.

    Raises:
        Exception: that of a function, in its place in the order.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="clips") as executor:
        waiting: deque[Future[Result]] = deque()
        try:
            for function in functions:
                waiting.append(executor.submit(function))
                if len(waiting) > AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

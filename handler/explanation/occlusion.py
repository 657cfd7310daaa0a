"""Occlusion: covers blocks of tubelets in turn and observes how the label's logit changes (Zeiler and Fergus, 2014)."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

# Blocks grow until there are at most this many, each of which takes a forward pass.
MAX_BLOCKS = 256

# Clips that are classified by one call, to bound memory.
MAX_CLIPS = 8

Pixels = npt.NDArray[np.uint8]


def occlude(
    logits: Callable[[Sequence[Pixels]], torch.Tensor],
    pixels: Pixels,
    *,
    labels: Sequence[int],
    grid: tuple[int, int, int],
) -> npt.NDArray[np.float32]:
    """Computes the relevance of each tubelet: how much the logit decreases when its block gets the clip's mean color.

    Args:
        logits: classifies clips, uint8 (1, T, C, h, w) each, to (clips, labels).
        pixels: uint8 (1, T, C, h, w).
        labels: indices of the labels to explain, whose logits are added.
        grid: (T', H', W').

    Returns:
        float32 (T', H', W') >= 0, the same for all tubelets of a block.
    """
    blocks = list(blocks_of(grid))
    color = pixels.mean((0, 1, 3, 4)).round().astype(np.uint8)[:, None, None]  # (C, 1, 1)
    heat = np.zeros(grid, np.float32)
    original = logits([pixels])[0, list(labels)].sum()
    for start in range(0, len(blocks), MAX_CLIPS):
        part = blocks[start : start + MAX_CLIPS]
        covered = logits([_cover(pixels, block, grid=grid, color=color) for block in part])[:, list(labels)].sum(1)
        for block, decrease in zip(part, (original - covered).clamp(min=0).tolist()):
            heat[block] = decrease
    return heat


def blocks_of(grid: tuple[int, int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Yields blocks that together cover a grid of tubelets: cubes, smaller at the ends, at most MAX_BLOCKS."""
    side = next(side for side in itertools.count(1) if math.prod(-(-length // side) for length in grid) <= MAX_BLOCKS)
    for time, top, left in itertools.product(*(range(0, length, side) for length in grid)):
        yield slice(time, time + side), slice(top, top + side), slice(left, left + side)


def _cover(pixels: Pixels, block: tuple[slice, slice, slice], *, grid: tuple[int, int, int], color: Pixels) -> Pixels:
    """A copy of the clip (1, T, C, h, w) with a block of tubelets in one color (C, 1, 1)."""
    _, frames, _, height, width = pixels.shape
    units = [length // cells for length, cells in zip((frames, height, width), grid)]
    time, rows, columns = (slice(cells.start * unit, cells.stop * unit) for cells, unit in zip(block, units))
    covered: Pixels = pixels.copy()
    covered[:, time, :, rows, columns] = color
    return covered

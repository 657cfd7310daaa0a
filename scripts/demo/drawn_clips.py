"""Clips of the demo's motions that are drawn when they are needed: a data set for `handler.training.loop.fit`.

T: frames, S: side of the frame in pixels.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from demo.encoding import decode_all, encode, resize, sample_encoding
from demo.motions import LABELS, REVERSED, render
from demo.moving_textures import draw_moving_textures
from demo.scenes import EASY, TRAINING, sample_scene
from handler.views import Views

FRAMES, SIDE = 16, 64  # T, S

TURNS = ("turning clockwise", "turning counterclockwise")
DRAWN_LABELS = (*LABELS, *TURNS)  # drawn in this order; turns, the hardest labels, twice as often


def relabel(*swapped):
    """Returns the class indices after a transformation that swaps these pairs of labels."""
    table = {a: b for pair in swapped for a, b in (pair, pair[::-1])}
    return tuple(LABELS.index(table.get(label, label)) for label in LABELS)


REVERSE = tuple(LABELS.index(REVERSED[label]) for label in LABELS)
MIRROR = relabel(("moving left", "moving right"), TURNS)
FLIP = relabel(("moving up", "moving down"), TURNS)
TRANSPOSE = relabel(("moving left", "moving up"), ("moving right", "moving down"), TURNS)


@dataclass(frozen=True)
class Kinds:
    """Shares of clips that are easy to learn from. The others are scenes with the settings TRAINING.

    Attributes:
        textures: of textures that fill the frame and move as a whole.
        easy: of scenes with the settings EASY.
    """

    textures: float = 0.0
    easy: float = 0.0


class DrawnClips:
    """A set of clips, see `handler.training.data.Clips`. In training, every epoch has new ones.

    Args:
        count: number of clips, in training per epoch.
        seed: of the clips that do not change, those for evaluation.
        kinds: what is drawn.
        executor: processes that draw.
    """

    def __init__(self, count: int, *, seed: int, kinds: Kinds, executor: Executor) -> None:
        self.names = [f"clip {index}" for index in range(count)]
        self._seed, self._kinds, self._executor = seed, kinds, executor

    def load(self, index: int, views: Views, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Draws clip `index`; in training a new one, in evaluation always the same one."""
        entropy = (self._seed, index) if rng is None else tuple(rng.integers(2**32, size=4).tolist())
        label = DRAWN_LABELS[index % len(DRAWN_LABELS)]
        return self._executor.submit(draw_clip, label, entropy, self._kinds).result()


def draw_clip(label: str, entropy: Sequence[int], kinds: Kinds) -> tuple[np.ndarray, int]:
    """Draws a clip, with a random label if it is a texture.

    Returns:
        uint8 (T, 3, S, S), and the index of the label.
    """
    torch.set_num_threads(1)  # processes draw in parallel
    rng = np.random.default_rng(entropy)
    kind = rng.random()
    if kind < kinds.textures:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        clips, labels = draw_moving_textures(1, generator, frames=FRAMES, side=SIDE)
        clip, index = ((clips[0] + 1) * 127.5).round().byte(), int(labels[0])
    else:
        clip, index = _draw_scene(rng, label, easy=kind < kinds.textures + kinds.easy)
    clip, index = augment(rng, clip, index)
    return clip.contiguous().numpy(), index


def _draw_scene(rng: np.random.Generator, label: str, *, easy: bool) -> tuple[torch.Tensor, int]:
    """Draws a clip of a scene, sometimes a short one, and sometimes through a real codec."""
    encoded = not easy and rng.random() < 0.12
    short = rng.random() < 0.12
    frame_count = int(rng.integers(5, FRAMES) if short else rng.integers(FRAMES, 41 if encoded else 200))
    scene = sample_scene(rng, label=label, settings=EASY if easy else TRAINING, frames=min(FRAMES, frame_count))
    size = sample_size(rng, scene.aspect)
    indices = sample_indices(rng, frame_count)
    times = np.arange(frame_count) / (frame_count - 1)
    if encoded:
        frames = render(scene, times, **size)
        frames = decode_all(encode(frames, encoding=sample_encoding(rng), fps=int(rng.integers(8, 61))))
        clip = resize(frames[np.minimum(indices, len(frames) - 1)], SIDE)
    else:
        unique, inverse = np.unique(indices, return_inverse=True)
        clip = resize(render(scene, times[unique], **size), SIDE)[torch.from_numpy(inverse)]
    return clip, LABELS.index(label)


def sample_indices(rng, frame_count):
    """Samples T frames uniformly: from the first to the last, or one from each of T equal parts."""
    if rng.random() < 0.5:
        positions = np.linspace(0, frame_count - 1, FRAMES)
    else:
        positions = (np.arange(FRAMES) + rng.uniform(0.3, 0.7)) * frame_count / FRAMES - 0.5
    return np.clip(np.round(positions), 0, frame_count - 1).astype(int)


def sample_size(rng, aspect):
    """Samples the height and width of a small video in pixels, even because most codecs require it."""
    side = int(rng.integers(64, 133))
    ratios = {"height": 1 / aspect, "width": aspect}
    return {name: max(32, 2 * round(side * math.sqrt(ratio) / 2)) for name, ratio in ratios.items()}


def augment(rng: np.random.Generator, clip: torch.Tensor, label: int) -> tuple[torch.Tensor, int]:
    """Randomly reverses, mirrors, flips, transposes and recolors a clip (T, 3, S, S), and adapts its label."""
    if rng.random() < 0.5:
        clip, label = clip.flip(0), REVERSE[label]
    if rng.random() < 0.5:
        clip, label = clip.flip(3), MIRROR[label]
    if rng.random() < 0.5:
        clip, label = clip.flip(2), FLIP[label]
    if rng.random() < 0.5:
        clip, label = clip.transpose(2, 3), TRANSPOSE[label]
    if rng.random() < 0.5:
        clip = clip[:, torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.5:
        clip = 255 - clip
    return clip, label

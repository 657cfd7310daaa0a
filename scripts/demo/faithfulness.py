"""How faithful explanations of the demo model are: on drawn clips it is known where the moving objects are.

    deletion     how much the score falls when the hottest fifth of the tubelets gets the clip's mean color, compared
                 with a random fifth
    location     whether the heat lies on the moving objects

T, H, W: frames, height and width of a clip; T', H', W': tubelets along each.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from demo.motions import LABELS, extent, render, sample_layer
from demo.scenes import EVALUATION, sample_scene
from handler.classifier import VideoClassifier
from handler.clips import Clip
from handler.explanation.result import Explanation
from handler.processing.resize import Crop
from handler.video import VideoInfo

DELETED_SHARE = 0.2
RANDOM_DELETIONS = 8
SHORTER_SIDE = 128  # of the drawn frames, in pixels
COVERED_SHARE = 0.05  # of a tubelet that an object must cover


@dataclass(frozen=True)
class DrawnClip:
    """A clip and where its moving objects are.

    Attributes:
        clip: what is explained.
        label: the correct label.
        coverage: float (T', H', W') in [0, 1], the share of each tubelet that moving objects cover.
    """

    clip: Clip
    label: str
    coverage: torch.Tensor


@dataclass(frozen=True)
class Faithfulness:
    """Measurements of one explanation.

    Attributes:
        drop: by how much the score falls without the hottest tubelets.
        random_drop: the mean for random tubelets.
        pointed_at: whether the hottest tubelet, or one beside it, contains a part of a moving object.
        chance: the share of all tubelets for which this is so.
        density_ratio: heat per area on moving objects, divided by heat per area elsewhere.
    """

    drop: float
    random_drop: float
    pointed_at: bool
    chance: float
    density_ratio: float


def draw_clips(classifier: VideoClassifier, *, seed: int) -> Iterator[DrawnClip]:
    """Yields clips in which objects move, in shapes, textures and ranges that the model was not trained on.

    Clips in which objects are near all tubelets, or cover none, are left out.
    """
    config, resize_crop = classifier.config, classifier.image_processor.resize_crop
    labels = [label for label in LABELS if label != "still"]
    times = np.linspace(0, 1, config.num_frames)  # (T,)
    for number in itertools.count():
        label = labels[number % len(labels)]
        scene = sample_scene(np.random.default_rng((seed, number)), label=label, settings=EVALUATION)
        height, width = (round(2 * half * SHORTER_SIDE) for half in reversed(extent(scene.aspect)))
        mask = torch.zeros(config.num_frames, config.image_height, config.image_width)  # (T, H, W)
        for layer in scene.objects:
            if not layer.is_motionless:
                still = np.zeros((config.num_frames, 2))
                shown = sample_layer(layer, times, extent(scene.aspect), still, config.image_height, config.image_width)
                mask = torch.maximum(mask, shown[:, 3])
        coverage = F.avg_pool3d(mask[None], config.tubelet_size)[0]  # (T', H', W')
        if not is_covered(coverage).any() or is_near(coverage).all():
            continue
        frames = render(scene, times, height=height, width=width)
        yield DrawnClip(as_clip(resize_crop.resize_and_crop(frames), height=height, width=width), label, coverage)


def as_clip(pixels: np.ndarray, *, height: int, width: int) -> Clip:
    """A clip of one second from uint8 (T, 3, h, w), as if it came from a file."""
    count = len(pixels)
    info = VideoInfo(count, 1.0, float(count), width, height, 0, "drawn", "drawn", 0)
    return Clip(
        frames=pixels,
        info=info,
        frame_indices=np.arange(count),
        times_s=np.arange(count) / count,
        crops=(Crop(0, 0, *pixels.shape[2:]),),
        num_frames=count,
        warnings=(),
        decoded_frames=count,
        decode_s=0.0,
        resize_s=0.0,
    )


def is_covered(coverage: torch.Tensor) -> torch.Tensor:
    """The tubelets (T', H', W') that contain a part of an object."""
    return coverage > COVERED_SHARE


def is_near(coverage: torch.Tensor) -> torch.Tensor:
    """The tubelets (T', H', W') that contain a part of an object or touch one that does, at the same time."""
    return F.max_pool2d(is_covered(coverage).float(), 3, stride=1, padding=1) > 0


def measure(classifier: VideoClassifier, drawn: DrawnClip, explanation: Explanation) -> Faithfulness:
    """Measures how faithful an explanation of the best prediction is."""
    heat = torch.from_numpy(explanation.heat)  # (T', H', W')
    count = round(DELETED_SHARE * heat.numel())
    generator = torch.Generator().manual_seed(0)
    deletions = [heat.flatten().topk(count).indices]
    deletions += [torch.randperm(heat.numel(), generator=generator)[:count] for _ in range(RANDOM_DELETIONS)]
    clips = [drawn.clip.pixels, *(delete(drawn.clip.pixels, indices, grid=explanation.grid) for indices in deletions)]
    index = classifier.label_indices(explanation.label)[0]
    original, hottest, *random = classifier.logits(clips).softmax(-1)[:, index].tolist()
    coverage = drawn.coverage
    on = float((heat * coverage).sum() / coverage.sum())
    elsewhere = float((heat * (1 - coverage)).sum() / (1 - coverage).sum())
    return Faithfulness(
        drop=original - hottest,
        random_drop=original - sum(random) / len(random),
        pointed_at=bool(is_near(coverage).flatten()[heat.argmax()]),
        chance=float(is_near(coverage).float().mean()),
        density_ratio=on / max(elsewhere, 1e-12),
    )


def delete(pixels: np.ndarray, indices: torch.Tensor, *, grid: tuple[int, int, int]) -> np.ndarray:
    """A copy of a clip, uint8 (1, T, C, H, W), in which tubelets have the clip's mean color."""
    _, frames, _, height, width = pixels.shape
    is_deleted = torch.zeros(grid).flatten().index_fill(0, indices, 1).view(grid)  # (T', H', W')
    mask = F.interpolate(is_deleted[None, None], (frames, height, width))[0].bool()  # (1, T, H, W)
    color = pixels.mean((0, 1, 3, 4)).round().astype(np.uint8)[:, None, None]  # (C, 1, 1)
    return np.where(mask.numpy()[:, :, None], color, pixels)

"""Random changes of training clips: position in time and space, scale, mirroring, colors, RandAugment, mixup.

    views = sample_view(rng, recipe)             which part of the video the decoder makes the clip from
    clip = augment_clip(clip, rng, recipe)       mirrored and recolored
    pixels, targets = mix_pairs(...)             mixed with the neighbor in the batch

All parameters are drawn once per clip and never depend on the label. As in the original code, an operation sees the
frames of a clip as one image, one above the other: all frames change in the same way, and statistics such as the
histogram are those of the clip. RandAugment has the operations of the original code, which do not move pixels.

B  clips of a batch     T  frames of a clip     h, w  height and width of the model's frames, in pixels
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

from handler.training.options import Recipe
from handler.views import Views

Pixels = NDArray[np.uint8]

# Largest changes of the color jitter, the defaults of the original code's data loader.
MAX_BRIGHTNESS = 32  # of 255
SATURATION_AND_CONTRAST = (0.6, 1.4)  # factors
MAX_HUE = 0.2  # of a full turn

# RandAugment: the level at which operations reach the strengths below.
FULL_LEVEL = 10
FULL_POSTERIZE_BITS, FULL_SOLARIZE_THRESHOLD, FULL_SOLARIZE_ADDITION = 4, 256, 110
FULL_CUTOUT = 40 / 224  # half of the side of the square, as a share of the frame's side
CUTOUT_GRAY = 128


def sample_view(rng: np.random.Generator, recipe: Recipe) -> Views:
    """Draws the position of a clip in time and space, and its scale."""
    phase, top, left = rng.random(3)
    zoom = rng.uniform(*recipe.scale_jitter)
    if not recipe.random_crop:
        phase, top, left = 0.5, 0.5, 0.5
    return Views(
        phase=float(phase), stride_frames=recipe.stride_frames, zoom=float(zoom), crop_at=(float(top), float(left))
    )


def augment_clip(clip: Pixels, rng: np.random.Generator, recipe: Recipe) -> Pixels:
    """Mirrors and recolors a clip, all frames in the same way.

    Args:
        clip: uint8 (T, 3, h, w).
        rng: source of randomness.
        recipe: the probabilities and strengths.

    Returns:
        uint8 (T, 3, h, w), contiguous.
    """
    if rng.random() < recipe.flip:
        clip = clip[..., ::-1]
    frames = np.ascontiguousarray(clip.transpose(0, 2, 3, 1))  # (T, h, w, 3)
    if rng.random() < recipe.color_jitter:
        frames = _jitter_color(frames, rng)
    if rng.random() < recipe.color_drop:
        frames = _as_tall_image(frames, lambda image: image.convert("L").convert("RGB"))
    for _ in range(recipe.rand_augment_layers):
        operation = RAND_AUGMENT[int(rng.integers(len(RAND_AUGMENT)))]
        frames = operation(frames, recipe.rand_augment_magnitude / FULL_LEVEL, rng)
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))  # (T, 3, h, w)


def mix_pairs(
    pixels: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes clips 0 and 1 of a batch, 2 and 3, and so on.

    Mixing neighbors, rather than clips of the whole batch, gives the same result however the batch is divided.

    Args:
        pixels: float (B, T, 3, h, w), B even.
        targets: float (B, labels), probabilities.
        weights: (B,), 0 for clips that could not be decoded; these are not mixed into others.
        shares: (B,), share of the clip's own pixels, from 0.5 to 1.

    Returns:
        The mixed pixels and targets.
    """
    own = torch.where(_swap(weights) > 0, shares, torch.ones_like(shares))  # (B,)
    own_pixels = own.to(pixels.dtype)[:, None, None, None, None]
    mixed = own_pixels * pixels + (1 - own_pixels) * _swap(pixels)
    return mixed, own[:, None] * targets + (1 - own[:, None]) * _swap(targets)


def sample_share(rng: np.random.Generator, recipe: Recipe) -> float:
    """Draws the share of its own pixels in a clip of a mixed pair, from 0.5 to 1.

    The two clips of a pair get the same share. Which of them is called the first does not matter. So the larger share
    of the Beta distribution is always the clip's own, and its label the dominant one.
    """
    share = rng.beta(recipe.mixup, recipe.mixup) if recipe.mixup else 1.0
    return float(max(share, 1 - share))


def smooth_targets(labels: torch.Tensor, *, num_labels: int, smoothing: float) -> torch.Tensor:
    """Returns label probabilities, float (B, num_labels), for labels int64 (B,)."""
    return F.one_hot(labels, num_labels).float() * (1 - smoothing) + smoothing / num_labels


def _swap(values: torch.Tensor) -> torch.Tensor:
    """Exchanges 0 with 1, 2 with 3, and so on along the first axis, whose length is even."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).flatten(0, 1)


def _as_tall_image(frames: Pixels, function: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Applies a function to frames (T, h, w, 3) as one RGB image of T * h rows."""
    image = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))  # (T * h, w, 3)
    return np.asarray(function(image)).reshape(frames.shape)


def _jitter_color(frames: Pixels, rng: np.random.Generator) -> Pixels:
    """Changes brightness, contrast and saturation, the latter two in random order, and hue."""
    brightness = round(rng.uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS))
    saturation, contrast = rng.uniform(*SATURATION_AND_CONTRAST, size=2)
    hue = round(256 * rng.uniform(-MAX_HUE, MAX_HUE))
    contrast_first = rng.random() < 0.5

    def jitter(image: Image.Image) -> Image.Image:
        image = image.point([min(max(value + brightness, 0), 255) for value in range(256)] * 3)
        if contrast_first:
            image = ImageEnhance.Contrast(image).enhance(contrast)
        image = ImageEnhance.Color(image).enhance(saturation)
        if not contrast_first:
            image = ImageEnhance.Contrast(image).enhance(contrast)
        channels = image.convert("HSV").split()
        turned = channels[0].point([(value + hue) % 256 for value in range(256)])
        return Image.merge("HSV", (turned, *channels[1:])).convert("RGB")

    return _as_tall_image(frames, jitter)


# RandAugment. Each operation takes frames uint8 (T, h, w, 3), the strength as a multiple of FULL_LEVEL (1.5 and 2 in
# the paper's recipes), and the source of randomness.

Operation = Callable[[Pixels, float, np.random.Generator], Pixels]


def _of_image(function: Callable[[Image.Image, float], Image.Image]) -> Operation:
    """Makes an operation of a function of an image and a strength."""
    return lambda frames, strength, rng: _as_tall_image(frames, lambda image: function(image, strength))


def _enhancement(strength: float) -> float:
    """The factor of color, contrast, brightness and sharpness; 1 changes nothing."""
    return 1.8 * strength + 0.1


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, min(8, max(1, int(FULL_POSTERIZE_BITS * strength))))


def _solarize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, int(FULL_SOLARIZE_THRESHOLD * strength))


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    addition = int(FULL_SOLARIZE_ADDITION * strength)
    return image.point([min(value + addition, 255) if value < 128 else value for value in range(256)] * 3)


def _sharpen(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Frame by frame, because the filter would mix the last row of a frame with the first row of the next one."""
    images = [Image.fromarray(frame) for frame in frames]
    return np.stack([np.asarray(ImageEnhance.Sharpness(image).enhance(_enhancement(strength))) for image in images])


def _cut_out(frames: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Covers a square at a random position, the same in all frames."""
    height, width = frames.shape[1:3]
    row, column = rng.integers(height), rng.integers(width)
    half = int(FULL_CUTOUT * strength * min(height, width))
    frames = frames.copy()
    frames[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = CUTOUT_GRAY
    return frames


RAND_AUGMENT: tuple[Operation, ...] = (
    lambda frames, strength, rng: frames,
    _of_image(lambda image, strength: ImageOps.autocontrast(image)),
    _of_image(lambda image, strength: ImageOps.equalize(image)),
    _of_image(lambda image, strength: ImageOps.invert(image)),
    _of_image(_posterize),
    _of_image(_solarize),
    _of_image(_solarize_add),
    _of_image(lambda image, strength: ImageEnhance.Color(image).enhance(_enhancement(strength))),
    _of_image(lambda image, strength: ImageEnhance.Contrast(image).enhance(_enhancement(strength))),
    _of_image(lambda image, strength: ImageEnhance.Brightness(image).enhance(_enhancement(strength))),
    _sharpen,
    _cut_out,
)

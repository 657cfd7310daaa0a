"""Textures that fill the frame and move as a whole: clips that are easy to learn from.

Every part of such a frame shows the motion, so every token learns from every clip. A model that starts with objects
on plain backgrounds, where most tokens see no motion, stays at chance for thousands of steps instead of a hundred.

B: clips, T: frames, S: side of the square frame in pixels. Lengths are in sides of the frame, with the origin in its
center, x to the right and y downwards. Angles are in radians, clockwise on screen. Time runs from -0.5 to 0.5.
"""

import math

import torch
import torch.nn.functional as F

from demo.motions import DIRECTIONS, LABELS

TEXTURE_PIXELS = 160  # side of a texture
TEXTURE_SIDES = 2.6  # side of a texture in sides of the frame; it is mirrored beyond
SHIFT = (0.15, 1.5)  # sides per clip
GROWTH = (1.3, 5.0)  # factor per clip
TURN = (0.6, 5.0)  # radians per clip


def draw_textures(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws soft blobs or hard squares, colored or gray: float (count, 3, side, side) in [0, 1]."""
    cells = int(torch.randint(6, 40, (), generator=generator))
    mode = ("nearest", "bicubic")[int(torch.randint(2, (), generator=generator))]
    texture = F.interpolate(torch.rand(count, 3, cells, cells, generator=generator), TEXTURE_PIXELS, mode=mode)
    gray = torch.rand(count, 1, 1, 1, generator=generator) < 0.4
    texture = torch.where(gray, texture.mean(1, keepdim=True), texture)
    contrast = 0.5 + 1.5 * torch.rand(count, 1, 1, 1, generator=generator)
    return ((texture - 0.5) * contrast + 0.5).clamp(0, 1)


def draw_moving_textures(
    count: int, generator: torch.Generator, *, frames: int, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws clips of random motions.

    Args:
        count: Number of clips, B.
        generator: Source of randomness.
        frames: Frames per clip, T.
        side: Side of a frame in pixels, S.

    Returns:
        clips: float (B, T, 3, S, S) in [-1, 1].
        labels: int64 (B,).
    """
    labels = torch.randint(len(LABELS), (count,), generator=generator)
    shift, growth, turn = _sample_rates(labels, generator)  # (B, 2), (B,), (B,), per clip

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    time = torch.linspace(-0.5, 0.5, frames)  # (T,)
    angle = turn[:, None] * time + uniform(0, 2 * math.pi)[:, None]  # (B, T)
    scale = torch.exp(growth[:, None] * time) * torch.exp(uniform(-0.5, 0.5))[:, None]  # (B, T)
    pivot = torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], -1)  # (B, 2)
    center = shift[:, None] * time[:, None] + pivot[:, None]  # (B, T, 2)

    textures = draw_textures(count, generator)[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)  # (B T, 3, ...)
    grid = F.affine_grid(
        _frame_to_texture(angle, scale, center).flatten(0, 1), (len(textures), 3, side, side), align_corners=False
    )
    clips = F.grid_sample(textures, grid, padding_mode="reflection", align_corners=False)
    clips = clips.unflatten(0, (count, frames))  # (B, T, 3, S, S)
    noise = torch.randn(clips.shape, generator=generator) * uniform(0, 0.06)[:, None, None, None, None]
    return (clips + noise).clamp(0, 1) * 2 - 1, labels


def _sample_rates(labels, generator):
    """Samples shift (B, 2), logarithm of the growth (B,) and turn (B,) per clip, zero where the label has none."""

    def log_uniform(low, high):
        span = math.log(high / low) * torch.rand(len(labels), generator=generator)
        return low * torch.exp(span)

    names = [LABELS[label] for label in labels.tolist()]
    direction = torch.tensor([DIRECTIONS.get(name, (0, 0)) for name in names]).float()  # (B, 2)
    growing = torch.tensor([{"growing": 1, "shrinking": -1}.get(name, 0) for name in names])
    turning = torch.tensor([{"turning clockwise": 1, "turning counterclockwise": -1}.get(name, 0) for name in names])
    return (
        direction * log_uniform(*SHIFT)[:, None],
        growing * log_uniform(*GROWTH).log(),
        turning * log_uniform(*TURN),
    )


def _frame_to_texture(angle, scale, center):
    """Returns affine maps (B, T, 2, 3) from frame to texture coordinates, both in [-1, 1]."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)  # (B, T, 2, 2)
    offset = -(inverse @ center[..., None])  # (B, T, 2, 1)
    return torch.cat([inverse / 2, offset], -1) * (2 / TEXTURE_SIDES)

"""Textures that fill the picture and move as a whole: what training begins with.

Every part of such a picture shows its motion, so every token learns from every clip. A model that starts with objects
on plain grounds, where most tokens see nothing, stays at chance for thousands of steps instead of a hundred.

B: clips, T: frames, S: the side of the picture in pixels. Lengths are in sides of the picture, its middle the origin,
x to the right, y downwards; angles in radians, clockwise as seen; time runs from -0.5 to 0.5.
"""

import math

import torch
import torch.nn.functional as F

from demo.motions import DIRECTIONS, LABELS

TEXTURE_SIDE = 160  # pixels of a texture, which covers COVER sides of the picture and is mirrored beyond
COVER = 2.6
SHIFT = (0.15, 1.5)  # sides over the clip
GROWTH = (1.3, 5.0)
TURN = (0.6, 5.0)  # radians


def draw_textures(count, generator):
    """float (count, 3, TEXTURE_SIDE, TEXTURE_SIDE) in [0, 1]: soft blobs or hard squares, coloured or grey."""
    cells = int(torch.randint(6, 40, (), generator=generator))
    mode = ("nearest", "bicubic")[int(torch.randint(2, (), generator=generator))]
    texture = F.interpolate(torch.rand(count, 3, cells, cells, generator=generator), TEXTURE_SIDE, mode=mode)
    grey = torch.rand(count, 1, 1, 1, generator=generator) < 0.4
    texture = torch.where(grey, texture.mean(1, keepdim=True), texture)
    contrast = 0.5 + 1.5 * torch.rand(count, 1, 1, 1, generator=generator)
    return ((texture - 0.5) * contrast + 0.5).clamp(0, 1)


def draw_drifts(count, generator, *, frames, side, cells):
    """(clips, labels, flow) of `count` random drifts.

    clips float (B, T, 3, S, S) in [-1, 1]; labels int64 (B,); flow (B, T - 1, cells, cells, 4) as motions.cell_flow has
    it: x and y, the growth's logarithm, the turn, each per frame.
    """
    labels = torch.randint(len(LABELS), (count,), generator=generator)
    shift, growth, turn = _rates(labels, generator)  # (B, 2), (B,), (B,), each over the clip

    def draw(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    time = torch.linspace(-0.5, 0.5, frames)  # (T,)
    angle = turn[:, None] * time + draw(0, 2 * math.pi)[:, None]  # (B, T)
    scale = torch.exp(growth[:, None] * time) * torch.exp(draw(-0.5, 0.5))[:, None]  # (B, T)
    pivot = torch.stack([draw(-0.2, 0.2), draw(-0.2, 0.2)], -1)  # (B, 2)
    centre = shift[:, None] * time[:, None] + pivot[:, None]  # (B, T, 2)

    textures = draw_textures(count, generator)[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    grid = F.affine_grid(
        _picture_to_texture(angle, scale, centre).flatten(0, 1), (len(textures), 3, side, side), align_corners=False
    )
    clips = F.grid_sample(textures, grid, padding_mode="reflection", align_corners=False)
    clips = clips.unflatten(0, (count, frames))  # (B, T, 3, S, S)
    noise = torch.randn(clips.shape, generator=generator) * draw(0, 0.06)[:, None, None, None, None]
    flow = _flow(shift, growth, turn, centre, cells) / (frames - 1)
    return (clips + noise).clamp(0, 1) * 2 - 1, labels, flow


def _rates(labels, generator):
    def draw(low, high):
        span = math.log(high / low) * torch.rand(len(labels), generator=generator)
        return low * torch.exp(span)

    names = [LABELS[label] for label in labels.tolist()]
    direction = torch.tensor([DIRECTIONS.get(name, (0, 0)) for name in names]).float()  # (B, 2)
    growing = torch.tensor([{"growing": 1, "shrinking": -1}.get(name, 0) for name in names])
    turning = torch.tensor([{"turning clockwise": 1, "turning counterclockwise": -1}.get(name, 0) for name in names])
    return direction * draw(*SHIFT)[:, None], growing * draw(*GROWTH).log(), turning * draw(*TURN)


def _picture_to_texture(angle, scale, centre):
    """Affine maps (B, T, 2, 3) from places of the picture to places of the texture, both from -1 to 1."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)  # (B, T, 2, 2)
    offset = -(inverse @ centre[..., None])  # (B, T, 2, 1)
    return torch.cat([inverse / 2, offset], -1) * (2 / COVER)


def _flow(shift, growth, turn, centre, cells):
    """(B, T - 1, cells, cells, 4), per clip length."""
    line = (torch.arange(cells) + 0.5) / cells - 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    between = (centre[:, 1:] + centre[:, :-1]) / 2  # (B, T - 1, 2)
    x, y = x - between[..., 0, None, None], y - between[..., 1, None, None]  # (B, T - 1, cells, cells)
    growth, turn = growth[:, None, None, None], turn[:, None, None, None]
    along_x = shift[:, 0, None, None, None] + growth * x - turn * y
    along_y = shift[:, 1, None, None, None] + growth * y + turn * x
    return torch.stack([along_x, along_y, growth.expand_as(x), turn.expand_as(x)], -1)

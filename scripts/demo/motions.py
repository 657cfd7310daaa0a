"""What moves how, and its pictures: a scene in, frames out.

    render(scene, times, height=, width=)  ->  uint8 (T, height, width, 3), at any resolution

Lengths are in units of the picture's shorter side, x to the right, y downwards, from the picture's middle.
Angles are in radians, clockwise as seen. Time runs from 0 (first frame) to 1 (last frame).

T: frames, N: pictures sampled at once, S: a layer's picture's side in pixels.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

LABELS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "turning clockwise",
    "turning counterclockwise",
    "still",
)
REVERSED = {  # what a clip shows when it is played backwards
    "moving left": "moving right",
    "moving right": "moving left",
    "moving up": "moving down",
    "moving down": "moving up",
    "growing": "shrinking",
    "shrinking": "growing",
    "turning clockwise": "turning counterclockwise",
    "turning counterclockwise": "turning clockwise",
    "still": "still",
}
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}


@dataclass(frozen=True)
class Path:
    """Where a thing is at progress p in [0, 1]: shifted, scaled and turned about a pivot."""

    centre: tuple[float, float] = (0.0, 0.0)  # at p = 1/2
    shift: tuple[float, float] = (0.0, 0.0)  # from p = 0 to p = 1
    half_size: float = 0.2  # at p = 1/2
    log_growth: float = 0.0
    angle: float = 0.0  # at p = 0
    turn: float = 0.0
    pivot: tuple[float, float] = (0.0, 0.0)  # what stays in place, in half sizes from the thing's middle

    def pose(self, progress):
        """(T,) progress -> x, y, half size, angle, each (T,)."""
        angle = self.angle + self.turn * progress
        half_size = self.half_size * np.exp(self.log_growth * (progress - 0.5))
        cos, sin = np.cos(angle), np.sin(angle)
        pivot_x = half_size * (cos * self.pivot[0] - sin * self.pivot[1])
        pivot_y = half_size * (sin * self.pivot[0] + cos * self.pivot[1])
        x = self.centre[0] + self.shift[0] * (progress - 0.5) - pivot_x
        y = self.centre[1] + self.shift[1] * (progress - 0.5) - pivot_y
        return x, y, half_size, angle


@dataclass(frozen=True)
class Timing:
    """Progress over time: rests at both ends, one pause, speeding up or slowing down."""

    start: float = 0.0
    end: float = 1.0
    ease_in: float = 1.0  # exponents: 1 is even speed
    ease_out: float = 1.0
    pause: tuple[float, float] = (0.5, 0.0)  # when (as a share of the moving time), how long
    frozen_at: float | None = None

    def progress(self, times):
        """(T,) times in [0, 1] -> (T,) progress in [0, 1], never decreasing."""
        if self.frozen_at is not None:
            return np.full(len(times), self.frozen_at)
        moving = np.clip((np.asarray(times) - self.start) / (self.end - self.start), 0, 1)
        when, length = self.pause
        moving = (np.minimum(moving, when) + np.maximum(moving - when - length, 0)) / (1 - length)
        moving = np.clip(moving, 0, 1)
        return 1 - (1 - moving**self.ease_in) ** self.ease_out

    def longest_step(self, frames):
        """The largest progress between two of `frames` evenly sampled frames."""
        return float(np.diff(self.progress(np.linspace(0, 1, frames))).max())


@dataclass(frozen=True)
class Layer:
    """A picture on its path: float (4, S, S), red, green, blue (times alpha) and alpha in [0, 1]."""

    picture: torch.Tensor
    path: Path
    timing: Timing
    endless: bool = False  # a background: goes on (mirrored) beyond its edges
    wrap: bool = False  # leaves on one side and comes back on the other

    @property
    def stands(self):
        """Whether it looks the same at all times."""
        motions = (*self.path.shift, self.path.log_growth, self.path.turn)
        return self.timing.frozen_at is not None or not any(motions)


@dataclass(frozen=True)
class Effects:
    """What a camera and a cable do to every picture; amplitudes, white is 1."""

    noise: float = 0.0
    noise_grain: int = 1  # side of a grain in pixels
    salt: float = 0.0  # share of pixels that are black or white
    shake: float = 0.0
    flicker: float = 0.0
    fade: float = 0.0  # brightness gained from first to last frame
    contrast: float = 1.0
    blur: float = 0.0  # radius, in shorter sides
    grey: bool = False
    film_grain_background: float = 0.0  # noise behind the objects only
    background_flicker: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What is seen: a label, a background, objects, effects, and the seed of all that flickers."""

    label: str
    aspect: float
    background: Layer
    objects: tuple[Layer, ...]
    effects: Effects
    seed: int


def extent(aspect):
    """(half width, half height) of a picture whose shorter side is 1."""
    return (aspect / 2, 0.5) if aspect >= 1 else (0.5, 0.5 / aspect)


def freeze(scene, progress, *, background_too=False):
    """The scene with its objects (or, where there are none, itself) standing at one moment of their way."""
    stop = Timing(frozen_at=float(progress))
    objects = tuple(replace(layer, timing=stop) for layer in scene.objects)
    background = replace(scene.background, timing=stop) if background_too else scene.background
    return replace(scene, label="still", objects=objects, background=background)


def opaque(picture, path, timing):
    """(3, S, S) colours as an endless layer."""
    return Layer(torch.cat([picture, torch.ones_like(picture[:1])]), path, timing, endless=True)


# Pictures


def layer_scale_and_bias(layer, times, half, offset):
    """(T, 2, 3) maps from the picture ([-1, 1] each way) to the layer's own picture, and half sizes (T,)."""
    x, y, half_size, angle = layer.path.pose(layer.timing.progress(times))
    if layer.wrap:
        axis = 0 if abs(layer.path.shift[0]) > abs(layer.path.shift[1]) else 1
        period = 2 * half[axis] + 2 * layer.path.half_size
        place = (x, y)[axis]
        place[:] = (place + period / 2) % period - period / 2
    x, y = x + offset[:, 0], y + offset[:, 1]
    cos, sin = np.cos(angle) / half_size, np.sin(angle) / half_size
    to_own_x = np.stack([cos * half[0], sin * half[1], -(cos * x + sin * y)], -1)  # (T, 3)
    to_own_y = np.stack([-sin * half[0], cos * half[1], sin * x - cos * y], -1)  # (T, 3)
    return torch.from_numpy(np.stack([to_own_x, to_own_y], 1)).float(), half_size  # (T, 2, 3), (T,)


def sample_layer(layer, times, half, offset, height, width):
    """The layer as the camera sees it: float (T, 4, height, width)."""
    affine, half_size = layer_scale_and_bias(layer, times, half, offset)
    side = layer.picture.shape[-1]
    pixels = 2 * half_size * min(height, width)  # how large the layer is in the picture
    levels = np.floor(np.log2(side / np.maximum(pixels, 1)) + 0.3)  # halvings that keep it from aliasing
    levels = np.clip(levels, 0, math.log2(side) - 1).astype(int)
    padding = "reflection" if layer.endless else "zeros"
    seen = torch.empty(len(times), 4, height, width)
    for level in np.unique(levels):
        which = np.flatnonzero(levels == level)
        picture = F.avg_pool2d(layer.picture[None], 2**level) if level and side >= 8 else layer.picture[None]
        grid = F.affine_grid(affine[which], (len(which), 4, height, width), align_corners=False)
        picture = picture.expand(len(which), -1, -1, -1)  # (N, 4, S, S)
        seen[which] = F.grid_sample(picture, grid, align_corners=False, padding_mode=padding)
    return seen


def render(scene, times, *, height, width):
    """The scene at times in [0, 1]: uint8 (T, height, width, 3). Deterministic."""
    times = np.asarray(times, dtype=np.float64)
    rng = np.random.default_rng(scene.seed)
    effects, half = scene.effects, extent(scene.aspect)
    offset = np.zeros((len(times), 2))
    if effects.shake:
        offset = effects.shake * rng.standard_normal((len(times), 2))
    if scene.background.stands and not effects.shake:
        frames = sample_layer(scene.background, times[:1], half, offset[:1], height, width)[:, :3]
        frames = frames.repeat(len(times), 1, 1, 1)
    else:
        frames = sample_layer(scene.background, times, half, offset, height, width)[:, :3]
    if effects.film_grain_background:
        frames += effects.film_grain_background * noise_like(rng, frames, effects.noise_grain)
    if effects.background_flicker:
        gain = effects.background_flicker * rng.standard_normal(len(times), dtype=np.float32)
        frames = frames + torch.from_numpy(gain)[:, None, None, None]
    for layer in scene.objects:
        seen = sample_layer(layer, times, half, offset, height, width)
        frames = frames * (1 - seen[:, 3:]) + seen[:, :3]
    return apply_effects(rng, frames, times, effects)


def cell_flow(scene, times, *, cells):
    """How what is seen in each of (cells, cells) parts of the picture moves from each time to the next.

    float (T - 1, cells, cells, 4): x and y, in sides of the picture; the growth's logarithm; the turn. Used in
    training only, as a hint.
    """
    times, half = np.asarray(times, dtype=np.float64), extent(scene.aspect)
    line = (torch.arange(cells) + 0.5) / cells * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)  # (cells * cells, 3)
    flow = torch.zeros(len(times) - 1, cells, cells, 4)
    standing = np.zeros((len(times), 2))
    for layer in (scene.background, *scene.objects):
        affine, _ = layer_scale_and_bias(layer, times, half, standing)
        own = points @ affine[:-1].transpose(1, 2)  # (T - 1, cells * cells, 2)
        moved = torch.linalg.solve(affine[1:, :, :2], (own - affine[1:, None, :, 2]).transpose(1, 2))
        step = (moved.transpose(1, 2) - points[:, :2]).reshape(-1, cells, cells, 2) / 2
        _, _, half_size, angle = layer.path.pose(layer.timing.progress(times))
        rates = torch.from_numpy(np.stack([np.diff(np.log(half_size)), np.diff(angle)], -1)).float()  # (T - 1, 2)
        step = torch.cat([step.clamp(-0.1, 0.1), rates[:, None, None].expand_as(step)], -1)
        if layer.endless:
            flow = step
        else:
            alpha = sample_layer(layer, times[:-1], half, standing[:-1], cells, cells)[:, 3, :, :, None]
            flow = torch.where(alpha > 0.15, step, flow)
    if scene.background.picture.shape[-1] < 8 and not scene.objects:
        flow = torch.zeros_like(flow)
    return flow


def noise_like(rng, frames, grain):
    """Normal noise in grains, the same in all channels: float (T, 1, height, width)."""
    count, _, height, width = frames.shape
    rows, columns = -(-height // grain), -(-width // grain)
    grains = torch.from_numpy(rng.standard_normal((count, 1, rows, columns), dtype=np.float32))
    if grain == 1:
        return grains
    return F.interpolate(grains, scale_factor=grain, mode="nearest")[:, :, :height, :width]


def apply_effects(rng, frames, times, effects):
    """float (T, 3, height, width) in [0, 1] -> uint8 (T, height, width, 3)."""
    height, width = frames.shape[-2:]
    radius = effects.blur * min(height, width)
    if radius >= 1:
        small = (max(4, int(height / radius)), max(4, int(width / radius)))
        frames = F.interpolate(F.interpolate(frames, small, mode="area"), (height, width), mode="bilinear")
    if effects.grey:
        frames = frames.mean(1, keepdim=True).expand_as(frames)
    if effects.contrast != 1:
        frames = 0.5 + (frames - 0.5) * effects.contrast
    if effects.fade or effects.flicker:
        gain = effects.fade * (times - 0.5) + effects.flicker * rng.standard_normal(len(times))
        frames = frames + torch.from_numpy(gain).float()[:, None, None, None]
    if effects.noise:
        frames = frames + effects.noise * noise_like(rng, frames, effects.noise_grain)
    if effects.salt:
        dice = torch.from_numpy(rng.random((len(times), 1, height, width), dtype=np.float32))
        frames = frames.masked_fill(dice < effects.salt / 2, 0).masked_fill(dice > 1 - effects.salt / 2, 1)
    return (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (T, height, width, 3)

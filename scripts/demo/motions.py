"""The labels, the description of a scene, and the renderer.

    render(scene, times, height=, width=)  ->  uint8 (T, H, W, 3), at any resolution

Lengths are in units of the frame's shorter side, with the origin in the frame's center, x to the right and y
downwards. Angles are in radians, clockwise on screen. Time runs from 0 (first frame) to 1 (last frame).

T: frames, H, W: frame height and width, N: frames sampled at once, S: side of a layer's image in pixels.
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
REVERSED = {  # the label of a clip played backwards
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
    """Position, size and angle of a layer as a function of its progress p in [0, 1].

    Attributes:
        center: Position (x, y) at p = 1/2.
        shift: Translation (x, y) from p = 0 to p = 1.
        half_size: Half of the layer's side at p = 1/2.
        log_growth: Logarithm of the factor by which it grows.
        angle: Angle at p = 0.
        turn: Rotation from p = 0 to p = 1.
        pivot: The point about which it grows and turns, in half sizes from the layer's center.
    """

    center: tuple[float, float] = (0.0, 0.0)
    shift: tuple[float, float] = (0.0, 0.0)
    half_size: float = 0.2
    log_growth: float = 0.0
    angle: float = 0.0
    turn: float = 0.0
    pivot: tuple[float, float] = (0.0, 0.0)

    def pose(self, progress):
        """Returns x, y, half size and angle, (T,) each, at these values of the progress (T,)."""
        angle = self.angle + self.turn * progress
        half_size = self.half_size * np.exp(self.log_growth * (progress - 0.5))
        cos, sin = np.cos(angle), np.sin(angle)
        pivot_x = half_size * (cos * self.pivot[0] - sin * self.pivot[1])
        pivot_y = half_size * (sin * self.pivot[0] + cos * self.pivot[1])
        x = self.center[0] + self.shift[0] * (progress - 0.5) - pivot_x
        y = self.center[1] + self.shift[1] * (progress - 0.5) - pivot_y
        return x, y, half_size, angle


@dataclass(frozen=True)
class Timing:
    """The progress of a motion over time.

    Attributes:
        start: Time at which the motion starts.
        end: Time at which it ends.
        ease_in: Exponent of the acceleration at the start; 1 for constant speed.
        ease_out: Exponent of the deceleration at the end; 1 for constant speed.
        pause: Start and length of a pause, as shares of the time from `start` to `end`.
        frozen_at: The progress at all times, for a motionless layer.
    """

    start: float = 0.0
    end: float = 1.0
    ease_in: float = 1.0
    ease_out: float = 1.0
    pause: tuple[float, float] = (0.5, 0.0)
    frozen_at: float | None = None

    def progress(self, times):
        """Returns the progress (T,) in [0, 1] at times (T,) in [0, 1]; it never decreases."""
        if self.frozen_at is not None:
            return np.full(len(times), self.frozen_at)
        moving = np.clip((np.asarray(times) - self.start) / (self.end - self.start), 0, 1)
        when, length = self.pause
        moving = (np.minimum(moving, when) + np.maximum(moving - when - length, 0)) / (1 - length)
        moving = np.clip(moving, 0, 1)
        return 1 - (1 - moving**self.ease_in) ** self.ease_out

    def longest_step(self, frames):
        """Returns the largest progress between two of `frames` uniformly sampled frames."""
        return float(np.diff(self.progress(np.linspace(0, 1, frames))).max())


@dataclass(frozen=True)
class Layer:
    """An image that moves along a path.

    Attributes:
        image: float (4, S, S) in [0, 1]: red, green and blue, premultiplied by alpha, and alpha.
        path: Where the image is.
        timing: When it is there.
        endless: Whether the image continues, mirrored, beyond its edges, as a background does.
        wrap: Whether the image leaves the frame on one side and returns on the other.
    """

    image: torch.Tensor
    path: Path
    timing: Timing
    endless: bool = False
    wrap: bool = False

    @property
    def is_motionless(self):
        """Whether the layer looks the same at all times."""
        motions = (*self.path.shift, self.path.log_growth, self.path.turn)
        return self.timing.frozen_at is not None or not any(motions)


@dataclass(frozen=True)
class Effects:
    """Degradations of the frames. Amplitudes and standard deviations are in units of white.

    Attributes:
        noise: Standard deviation of the noise.
        noise_grain: Side of a grain of noise in pixels.
        salt: Share of pixels that are black or white.
        shake: Standard deviation of the camera's position.
        flicker: Standard deviation of the brightness.
        fade: Change of brightness from the first to the last frame.
        contrast: Factor.
        blur: Radius.
        gray: Whether colors are removed.
        film_grain_background: Standard deviation of noise behind the objects.
        background_flicker: Standard deviation of the background's brightness.
    """

    noise: float = 0.0
    noise_grain: int = 1
    salt: float = 0.0
    shake: float = 0.0
    flicker: float = 0.0
    fade: float = 0.0
    contrast: float = 1.0
    blur: float = 0.0
    gray: bool = False
    film_grain_background: float = 0.0
    background_flicker: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A scene to render.

    Attributes:
        label: One of LABELS.
        aspect: Width divided by height.
        background: A layer that fills the frame.
        objects: Layers in front of it, back to front.
        effects: Degradations of the frames.
        seed: Seed of the random effects.
    """

    label: str
    aspect: float
    background: Layer
    objects: tuple[Layer, ...]
    effects: Effects
    seed: int


def extent(aspect):
    """Returns (half width, half height) of a frame whose shorter side is 1."""
    return (aspect / 2, 0.5) if aspect >= 1 else (0.5, 0.5 / aspect)


def freeze(scene, progress, *, background_too=False):
    """Returns the scene as a still one, with its objects, and optionally its background, frozen at some progress."""
    stop = Timing(frozen_at=float(progress))
    objects = tuple(replace(layer, timing=stop) for layer in scene.objects)
    background = replace(scene.background, timing=stop) if background_too else scene.background
    return replace(scene, label="still", objects=objects, background=background)


def opaque(colors, path, timing):
    """Returns an endless layer with these colors, float (3, S, S)."""
    return Layer(torch.cat([colors, torch.ones_like(colors[:1])]), path, timing, endless=True)


# Rendering


def frame_to_layer(layer, times, half, offset):
    """Returns affine maps (T, 2, 3) from frame to layer coordinates, both in [-1, 1], and half sizes (T,)."""
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
    """Returns the layer as it appears in each frame: float (T, 4, H, W)."""
    maps, half_size = frame_to_layer(layer, times, half, offset)
    side = layer.image.shape[-1]
    pixels = 2 * half_size * min(height, width)  # side of the layer in the frame
    levels = np.floor(np.log2(side / np.maximum(pixels, 1)) + 0.3)  # halvings that avoid aliasing
    levels = np.clip(levels, 0, math.log2(side) - 1).astype(int)
    padding = "reflection" if layer.endless else "zeros"
    seen = torch.empty(len(times), 4, height, width)
    for level in np.unique(levels):
        which = np.flatnonzero(levels == level)
        image = F.avg_pool2d(layer.image[None], 2**level) if level and side >= 8 else layer.image[None]
        grid = F.affine_grid(maps[which], (len(which), 4, height, width), align_corners=False)
        image = image.expand(len(which), -1, -1, -1)  # (N, 4, S, S)
        seen[which] = F.grid_sample(image, grid, align_corners=False, padding_mode=padding)
    return seen


def render(scene, times, *, height, width):
    """Renders a scene; equal arguments give equal frames.

    Args:
        scene: The scene.
        times: (T,) in [0, 1].
        height: Height of the frames in pixels, H.
        width: Width of the frames in pixels, W.

    Returns:
        uint8 RGB (T, H, W, 3).
    """
    times = np.asarray(times, dtype=np.float64)
    rng = np.random.default_rng(scene.seed)
    effects, half = scene.effects, extent(scene.aspect)
    offset = np.zeros((len(times), 2))
    if effects.shake:
        offset = effects.shake * rng.standard_normal((len(times), 2))
    if scene.background.is_motionless and not effects.shake:
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


def noise_like(rng, frames, grain):
    """Returns normally distributed noise in grains, the same in all channels: float (T, 1, H, W)."""
    count, _, height, width = frames.shape
    rows, columns = -(-height // grain), -(-width // grain)
    grains = torch.from_numpy(rng.standard_normal((count, 1, rows, columns), dtype=np.float32))
    if grain == 1:
        return grains
    return F.interpolate(grains, scale_factor=grain, mode="nearest")[:, :, :height, :width]


def apply_effects(rng, frames, times, effects):
    """Applies the effects to float (T, 3, H, W) in [0, 1]; returns uint8 (T, H, W, 3)."""
    height, width = frames.shape[-2:]
    radius = effects.blur * min(height, width)
    if radius >= 1:
        small = (max(4, int(height / radius)), max(4, int(width / radius)))
        frames = F.interpolate(F.interpolate(frames, small, mode="area"), (height, width), mode="bilinear")
    if effects.gray:
        frames = frames.mean(1, keepdim=True).expand_as(frames)
    if effects.contrast != 1:
        frames = 0.5 + (frames - 0.5) * effects.contrast
    if effects.fade or effects.flicker:
        gain = effects.fade * (times - 0.5) + effects.flicker * rng.standard_normal(len(times))
        frames = frames + torch.from_numpy(gain).float()[:, None, None, None]
    if effects.noise:
        frames = frames + effects.noise * noise_like(rng, frames, effects.noise_grain)
    if effects.salt:
        random = torch.from_numpy(rng.random((len(times), 1, height, width), dtype=np.float32))
        frames = frames.masked_fill(random < effects.salt / 2, 0).masked_fill(random > 1 - effects.salt / 2, 1)
    return (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (T, H, W, 3)

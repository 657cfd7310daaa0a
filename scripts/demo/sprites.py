"""Draws the images that scenes are made of: random colors, textures and shapes.

S: side of an image in pixels. Colors are (3,) red, green and blue in [0, 1].
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SPRITE_SIDE = 128  # pixels of an object's image, several times the resolution that the model sees
SCENE_SIDE = 192  # pixels of a background's image
COLLAGE_SHAPES = ("disc", "square", "bar", "shard", "ellipse")
HOLLOW_SHAPES = ("square", "bar", "triangle", "polygon", "star", "arrow", "blob")  # may be drawn as an outline
MAX_CELLS = 9  # half periods of a regular pattern across half of its image


# Random numbers


def log_uniform(rng, low, high):
    """Returns a number between low and high whose logarithm is uniformly distributed."""
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def chance(rng, probability):
    """Returns True with this probability."""
    return bool(rng.random() < probability)


# Colors and textures: float (3, S, S) in [0, 1]


def sample_color(rng):
    """Returns a color (3,); black, white and grays are more frequent than in a uniform distribution."""
    kind = rng.random()
    if kind < 0.22:
        return np.full(3, rng.uniform(0, 0.08))
    if kind < 0.4:
        return np.full(3, rng.uniform(0.92, 1))
    if kind < 0.55:
        return np.full(3, rng.random())
    return rng.random(3)


def sample_contrasting(rng, others, *, distance):
    """Returns a color that differs from all others by `distance` in some channel and half of it on average."""
    for _ in range(50):
        color = sample_color(rng)
        gaps = [np.abs(color - other) for other in others]
        if all(gap.max() >= distance and gap.mean() >= distance / 2 for gap in gaps):
            return color
    mean = np.mean(others, axis=0)
    return np.where(mean > 0.5, 0.0, 1.0)


def plane(color):
    """Returns a color as float (3, 1, 1), to be broadcast."""
    return torch.tensor(color, dtype=torch.float32)[:, None, None]


def value_noise(rng, side, *, cells, octaves=1):
    """Returns float (S, S) in [0, 1]: random values on a grid, interpolated."""
    total, weight_sum = torch.zeros(side, side), 0.0
    for octave in range(octaves):
        count = min(side, max(2, int(cells * 2**octave)))
        grid = torch.from_numpy(rng.random((1, 1, count, count), dtype=np.float32))
        weight = 0.6**octave
        total += weight * F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)[0, 0]
        weight_sum += weight
    return (total / weight_sum).clamp(0, 1)


def normalize(pattern):
    """Scales (S, S) to the range [0, 1]."""
    low, high = pattern.min(), pattern.max()
    return (pattern - low) / (high - low + 1e-6)


def draw_pattern(rng, kind, side):
    """Returns a pattern, float (S, S) in [0, 1], to be colored with two colors."""
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    if kind == "noise":
        return normalize(value_noise(rng, side, cells=log_uniform(rng, 3, 24), octaves=int(rng.integers(1, 4))))
    if kind == "speckle":
        return value_noise(rng, side, cells=side / rng.integers(1, 5))
    if kind == "marble":
        warp = value_noise(rng, side, cells=4, octaves=2)
        return 0.5 + 0.5 * torch.sin(rng.uniform(3, 9) * (x * rng.uniform(-1, 1) + y) + 9 * warp)
    if kind == "collage":
        return normalize(value_noise(rng, side, cells=rng.uniform(2, 5)))
    angle = rng.choice([0, math.pi / 2, rng.uniform(0, math.pi)])
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if kind == "gradient":
        return normalize(u)
    cells = rng.uniform(2, MAX_CELLS)
    phase = rng.uniform(0, 1, 2)
    wave_u, wave_v = torch.sin(math.pi * (cells * u + phase[0])), torch.sin(math.pi * (cells * v + phase[1]))
    sharp = rng.choice([1.5, 30])
    if kind == "checker":
        return torch.sigmoid(sharp * wave_u * wave_v * 2)
    if kind == "plaid":
        return (torch.sigmoid(sharp * wave_u) + torch.sigmoid(sharp * wave_v)) / 2
    if kind == "stripes":
        return torch.sigmoid(sharp * wave_u)
    if kind == "dots":
        return torch.sigmoid(sharp * (wave_u * wave_v - 0.4) * 3)
    if kind == "rings":
        radius = torch.sqrt((x - phase[0]) ** 2 + (y - phase[1]) ** 2)
        return 0.5 + 0.5 * torch.sin(rng.uniform(8, 25) * radius)
    if kind == "bricks":
        row = torch.floor(cells * v)
        joint = ((cells * v) % 1 < 0.15) | ((cells * u / 2 + 0.5 * (row % 2)) % 1 < 0.08)
        return joint.float() + 0.3 * value_noise(rng, side, cells=side / 2)
    raise ValueError(f"expected the name of a texture, got {kind!r}")


def draw_texture(rng, kind, side, dark, bright):
    """Returns float (3, S, S): a pattern in two colors; a collage has shapes of random colors on top."""
    pattern = draw_pattern(rng, kind, side).clamp(0, 1)
    texture = plane(dark) + (plane(bright) - plane(dark)) * pattern
    if kind != "collage":
        return texture
    canvas = Image.fromarray((texture * 255).byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(8, 40))):
        cx, cy = rng.uniform(0, side, 2)
        radius = side * log_uniform(rng, 0.02, 0.2)
        fill = tuple(int(255 * c) for c in sample_color(rng))
        shape, angle = rng.choice(COLLAGE_SHAPES), rng.uniform(0, 2 * math.pi)
        draw_shape(rng, draw, shape, (cx, cy), radius, angle, fill)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


# Shapes

SYMMETRY = {"ellipse": 2, "square": 4, "bar": 2, "triangle": 3, "cross": 4}


def symmetry(shape, corners):
    """Returns how often a shape looks the same within one turn; 0 if its rotation is invisible."""
    if shape in ("disc", "ring"):
        return 0
    return corners if shape in ("polygon", "star") else SYMMETRY.get(shape, 1)


def polar_points(radii, angles):
    """Returns points (points, 2) at these distances and angles from the center."""
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]


def outline(rng, shape, corners, elongation):
    """Returns the corners (points, 2) of a shape within the unit circle; None if it is not a polygon."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.7
    if shape == "bar":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (0.95, 0.95 / elongation)
    if shape == "ellipse":
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        return polar_points(np.full(40, 0.95), angles) * (1, 1 / elongation)
    if shape in ("triangle", "polygon", "star", "shard", "blob"):
        count = {"triangle": 3, "polygon": corners, "star": 2 * corners, "shard": 5, "blob": 24}[shape]
        angles = np.arange(count) * 2 * math.pi / count
        radii = np.full(count, 0.95)
        if shape == "star":
            radii[1::2] = rng.uniform(0.3, 0.6)
        if shape == "shard":
            angles = angles + rng.uniform(-0.4, 0.4, count)
            radii = rng.uniform(0.3, 0.95, count)
        if shape == "blob":
            waves = [rng.uniform(0.08, 0.2) * np.cos(k * angles + rng.uniform(0, 6)) for k in (1, 2, 3)]
            radii = 0.55 + sum(waves)
        return polar_points(radii, angles)
    if shape == "arrow":
        n, h = rng.uniform(0.1, 0.3), rng.uniform(0.45, 0.8)  # half widths of neck and head
        return np.array([(-0.95, -n), (0.1, -n), (0.1, -h), (0.95, 0), (0.1, h), (0.1, n), (-0.95, n)])
    if shape == "cross":
        w = rng.uniform(0.12, 0.35)
        arm = np.array([(-w, -w), (-w, -0.95), (w, -0.95)])  # a quarter of the cross
        quarters = ((1, 0), (0, 1), (-1, 0), (0, -1))
        return np.concatenate([arm @ np.array([(c, s), (-s, c)]) for c, s in quarters])
    if shape == "corner":
        w = rng.uniform(0.2, 0.6) - 0.7
        return np.array([(-0.7, -0.7), (w, -0.7), (w, -w), (0.7, -w), (0.7, 0.7), (-0.7, 0.7)])
    if shape == "hand":  # of a clock
        w = rng.uniform(0.08, 0.25)
        return np.array([(-0.4, -w), (0.95, -w / 2), (0.95, w / 2), (-0.4, w)])
    if shape == "house":
        return np.array([(-0.6, 0.7), (-0.6, -0.1), (0, -0.9), (0.6, -0.1), (0.6, 0.7)])
    return None


def draw_shape(rng, draw, shape, center, radius, angle, fill, *, corners=5, elongation=2.0, glyphs="F"):
    """Draws a shape into a PIL image.

    Args:
        rng: Random number generator.
        draw: ImageDraw of the image.
        shape: Name of the shape.
        center: (x, y) in pixels.
        radius: Radius of the circumscribed circle in pixels.
        angle: Rotation.
        fill: PIL color.
        corners: Corners of a polygon or star.
        elongation: Length divided by width of a bar or ellipse.
        glyphs: Characters to choose a glyph from.

    Raises:
        ValueError: The shape is unknown.
    """
    center = np.asarray(center)
    ahead = np.array([math.cos(angle), math.sin(angle)]) * radius
    aside = np.array([-ahead[1], ahead[0]])
    box = [*(center - 0.95 * radius), *(center + 0.95 * radius)]
    points = outline(rng, shape, corners, elongation)
    if points is not None:
        draw.polygon([tuple(center + x * ahead + y * aside) for x, y in points], fill=fill)
    elif shape == "disc":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, int(radius * rng.uniform(0.12, 0.5))))
    elif shape == "pie":
        start = math.degrees(angle)
        draw.pieslice(box, start, start + rng.uniform(60, 300), fill=fill)
    elif shape == "crescent":
        draw.ellipse(box, fill=fill)
        bite = center + 0.5 * ahead
        draw.ellipse([*(bite - 0.75 * radius), *(bite + 0.75 * radius)], fill=0)
    elif shape == "key":
        width = max(2, int(radius * 0.22))
        head, tip, tooth = center - 0.6 * ahead, center + 0.9 * ahead, center + 0.8 * ahead
        draw.ellipse([*(head - 0.35 * radius), *(head + 0.35 * radius)], outline=fill, width=width)
        draw.line([tuple(center - 0.3 * ahead), tuple(tip)], fill=fill, width=width)
        draw.line([tuple(tooth), tuple(tooth + 0.4 * aside)], fill=fill, width=width)
    elif shape == "spiral":
        angles = np.linspace(0, 3 * math.pi, 60)
        points = polar_points(0.1 + 0.8 * angles / angles[-1], angles + angle) * radius + center
        draw.line([tuple(p) for p in points], fill=fill, width=max(2, int(radius * 0.18)))
    elif shape == "glyph":
        letter = str(rng.choice(list(glyphs)))
        pen = {"font": ImageFont.load_default(int(radius * 2)), "stroke_width": int(rng.integers(0, 5))}
        draw.text(tuple(center), letter, fill=fill, stroke_fill=fill, anchor="mm", **pen)
    else:
        raise ValueError(f"expected the name of a shape, got {shape!r}")


@dataclass(frozen=True)
class Sprite:
    """An object.

    Attributes:
        image: float (4, S, S): colors, premultiplied by alpha, and alpha.
        symmetry: How often it looks the same within one turn; 0 if its rotation is invisible.
    """

    image: torch.Tensor
    symmetry: int


def draw_sprite(rng, settings, *, avoid, distance, must_turn, textured):
    """Draws an object.

    Args:
        rng: Random number generator.
        settings: scenes.Settings: shapes, textures and glyphs to choose from.
        avoid: Colors of the background.
        distance: Minimum difference from these colors.
        must_turn: Whether a rotation of the object must be visible.
        textured: Whether the object has a texture instead of one color.
    """
    if textured and chance(rng, 0.12):
        return draw_photo(rng, avoid, distance)
    while True:
        shape = str(rng.choice(settings.shapes))
        corners = int(rng.integers(4, 7))
        if symmetry(shape, corners) or textured or not must_turn:
            break
    options = {"corners": corners, "elongation": log_uniform(rng, 1.6, 9), "glyphs": settings.glyphs}
    canvas = Image.new("L", (SPRITE_SIDE, SPRITE_SIDE))
    middle = SPRITE_SIDE / 2
    draw_shape(rng, ImageDraw.Draw(canvas), shape, (middle, middle), middle, 0.0, 255, **options)
    alpha = torch.from_numpy(np.array(canvas)).float() / 255  # (S, S)
    if not textured and shape in HOLLOW_SHAPES and chance(rng, 0.15):
        alpha = (alpha - shrunk(canvas, rng.uniform(0.6, 0.85))).clamp(min=0)  # an outline
    repeats = symmetry(shape, corners)
    first = sample_contrasting(rng, avoid, distance=distance)
    if settings.bright_on_dark:
        first = rng.uniform(0.6, 1, 3)
    if textured:
        colors, repeats = draw_surface(rng, settings, first, repeats, must_turn=must_turn)
    else:
        colors = plane(first).expand(3, *alpha.shape)
        if chance(rng, 0.15) and not settings.bright_on_dark:  # a rim in one color, the inside in another
            inner = shrunk(canvas, 0.7)
            colors = colors * (1 - inner) + plane(sample_color(rng)) * inner
    return Sprite(torch.cat([colors * alpha, alpha[None]]), repeats)  # (4, S, S)


def draw_surface(rng, settings, first, repeats, *, must_turn):
    """Returns the colors (3, S, S) of a textured object, and its symmetry with these colors."""
    second = sample_contrasting(rng, [first], distance=0.35)
    colors = draw_texture(rng, str(rng.choice(settings.textures)), SPRITE_SIDE, first, second)
    if chance(rng, 0.3):  # two halves in two colors
        right = torch.arange(SPRITE_SIDE) >= SPRITE_SIDE / 2
        side = right[None, :] if chance(rng, 0.5) else right[:, None]
        return torch.where(side, plane(first), plane(second)).expand(3, SPRITE_SIDE, SPRITE_SIDE), 1
    if repeats == 0 and must_turn:  # a disc needs a pattern that makes its rotation visible
        colors = draw_texture(rng, "collage", SPRITE_SIDE, first, second)
    return colors, max(1, repeats)


def draw_photo(rng, avoid, distance):
    """Draws a rectangle that contains a collage."""
    first = sample_contrasting(rng, avoid, distance=distance)
    second = sample_contrasting(rng, [first], distance=0.35)
    colors = draw_texture(rng, "collage", SPRITE_SIDE, first, second)
    alpha = torch.zeros(SPRITE_SIDE, SPRITE_SIDE)
    rows, columns = (int(SPRITE_SIDE * rng.uniform(0.02, 0.22)) for _ in range(2))
    alpha[rows:-rows, columns:-columns] = 1
    return Sprite(torch.cat([colors * alpha, alpha[None]]), 1)


def shrunk(canvas, factor):
    """Returns a PIL mask scaled down about its center, as float (S, S) in [0, 1]."""
    side, inner_side = canvas.width, int(canvas.width * factor)
    inner = Image.new("L", (side, side))
    inner.paste(canvas.resize((inner_side, inner_side)), ((side - inner_side) // 2,) * 2)
    return torch.from_numpy(np.array(inner)).float() / 255

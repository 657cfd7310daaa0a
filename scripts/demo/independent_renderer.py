"""A second renderer for evaluating the demo. It shares no code with the renderer that the demo was trained on.

    draw(label, style, seed)  ->  uint8 (T, H, W, 3)

Plain styles have one bright object on black or one dark object on white; hard styles have textures, noise, moving
backgrounds, several objects or other frame sizes. Lengths are in pixels and angles in degrees, clockwise on screen.
Each frame is drawn separately with PIL.

T: frames, H, W: frame height and width.
"""

import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

PLAIN_STYLES = (
    "white square",
    "white circle",
    "black on white",
    "white bar",
    "white triangle",
    "colored arrow",
)
HARD_STYLES = (
    "textured on noise",
    "textured on gradient",
    "over panning",
    "whole scene",
    "whole frame",
    "letters",
    "three alike",
    "portrait",
    "noisy dim",
    "tiny video",
    "eased",
    "crossing",
)
SIZES = ((320, 240), (320, 180), (240, 240), (426, 240))
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}


def smooth_noise(rng, size, grain):
    """Draws an image of colored clouds, or of random pixels if `grain` is 1."""
    small = (max(2, size[0] // grain), max(2, size[1] // grain))
    return Image.frombytes("RGB", small, rng.randbytes(3 * small[0] * small[1])).resize(size, Image.BICUBIC)


def gradient(size, first, second, *, horizontal):
    """Draws an image that changes from one color to another, horizontally or vertically."""
    ramp = Image.linear_gradient("L")
    ramp = (ramp.rotate(90) if horizontal else ramp).resize(size)
    return Image.composite(Image.new("RGB", size, second), Image.new("RGB", size, first), ramp)


def draw_town(rng, size):
    """Draws a scene to pan over: a sky, houses with lit windows, trees and a sign."""
    width, height = size
    scene = gradient(size, (30, 60, 140), (230, 190, 150), horizontal=False)
    pen = ImageDraw.Draw(scene)
    left = 0
    while left < width:
        house_width, top = rng.randint(width // 16, width // 6), rng.randint(height // 8, height // 2)
        pen.rectangle([left, top, left + house_width, height], fill=tuple(rng.randrange(30, 200) for _ in range(3)))
        for x in range(left + 4, left + house_width - 6, 14):
            for y in range(top + 6, height - 10, 18):
                if rng.random() < 0.6:
                    pen.rectangle([x, y, x + 6, y + 9], fill=(255, 240, rng.randrange(80, 220)))
        left += house_width + rng.randint(0, 12)
    for _ in range(12):
        x, y, r = rng.randrange(width), rng.randrange(height // 2, height), rng.randint(5, 25)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(20, rng.randrange(80, 180), 40))
    pen.text((width // 3, height // 3), "HOTEL", fill="red", font=ImageFont.load_default(height // 8))
    return scene


def draw_object(rng, kind, side, color):
    """Draws an object on a transparent square, `side` pixels wide: RGBA."""
    tile = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(tile)
    a, b = side * 0.08, side * 0.92
    if kind == "square":
        pen.rectangle([side * 0.16, side * 0.16, side * 0.84, side * 0.84], fill=color)
    elif kind == "circle":
        pen.ellipse([a, a, b, b], fill=color)
    elif kind == "bar":
        pen.rectangle([a, side * 0.38, b, side * 0.62], fill=color)
    elif kind == "triangle":
        pen.polygon([(side / 2, a), (b, side * 0.8), (a, side * 0.8)], fill=color)
    elif kind == "arrow":
        pen.line([(a, side / 2), (side * 0.7, side / 2)], fill=color, width=max(2, side // 7))
        pen.polygon([(side * 0.6, side * 0.2), (b, side / 2), (side * 0.6, side * 0.8)], fill=color)
    elif kind == "letter":
        font = ImageFont.load_default(int(side * 0.9))
        pen.text((side / 2, side / 2), rng.choice("FRGPLE47"), fill=color, font=font, anchor="mm")
    elif kind == "wheel":  # a disc of colored wedges
        for wedge in range(5):
            shade = tuple(rng.randrange(256) for _ in range(3)) + (255,)
            pen.pieslice([a, a, b, b], wedge * 72, wedge * 72 + 72, fill=shade)
    return tile


def progress(count, *, eased=False):
    """Returns `count` values from 0 to 1."""
    steps = [k / (count - 1) for k in range(count)]
    return [3 * p * p - 2 * p * p * p for p in steps] if eased else steps


def paste(tile, background, x, y, *, scale=1.0, degrees=0.0):
    """Returns the background with the scaled and rotated tile centered at (x, y)."""
    frame = background.copy()
    if degrees:
        tile = tile.rotate(-degrees, resample=Image.BICUBIC)
    side = max(2, round(tile.width * scale))
    tile = tile.resize((side, side), Image.BICUBIC)
    frame.paste(tile, (round(x - side / 2), round(y - side / 2)), tile)
    return frame


def poses(rng, label, size, side, count, *, symmetric=1, eased=False, crossing=False):
    """Returns x, y, scale and degrees of an object in each frame.

    Args:
        rng: Random number generator.
        label: The motion.
        size: Width and height of the frame.
        side: Side of the object.
        count: Number of frames.
        symmetric: How often the object looks the same within one turn.
        eased: Whether the motion accelerates and slows down.
        crossing: Whether a moving object enters and leaves the frame.
    """
    width, height = size
    steps = progress(count, eased=eased)
    x = rng.uniform(min(side, width / 2), max(width - side, width / 2))
    y = rng.uniform(min(side, height / 2), max(height - side, height / 2))
    if label in DIRECTIONS:
        dx, dy = DIRECTIONS[label]
        length = (width if dx else height) * rng.uniform(0.3, 0.7)
        if crossing:
            length = (width if dx else height) + side
        x0 = (width - dx * length) / 2 if dx else x
        y0 = (height - dy * length) / 2 if dy else y
        return [(x0 + dx * length * p, y0 + dy * length * p, 1, 0) for p in steps]
    if label in ("growing", "shrinking"):
        small, large = rng.uniform(0.35, 0.6), rng.uniform(1.1, 2.0)
        first, last = (small, large) if label == "growing" else (large, small)
        return [(x, y, first + (last - first) * p, 0) for p in steps]
    if label.startswith("turning"):
        fastest = 100 / symmetric  # degrees between two of sixteen frames, well below half a period
        total = rng.uniform(min(90, 8 * fastest), min(540, 15 * fastest) / (1.5 if eased else 1))
        start, sign = rng.uniform(0, 360), 1 if label == "turning clockwise" else -1
        return [(x, y, 1, start + sign * total * p) for p in steps]
    degrees, scale = rng.choice([0, rng.uniform(0, 360)]), rng.uniform(0.6, 1.4)
    return [(x, y, scale, degrees)] * count


def object_over(rng, label, size, count, kind, color, background_at, **motion):
    """Draws an object moving in front of a background, which is a function of the frame number."""
    turning = label.startswith("turning")
    if turning and kind == "circle":
        kind = "triangle"  # the rotation of a disc is invisible
    symmetric = {"square": 4, "bar": 2, "triangle": 1}.get(kind, 1)
    side = int(min(size) * rng.uniform(0.3 if turning else 0.2, 0.45))
    tile = draw_object(rng, kind, side, color)
    path = poses(rng, label, size, side, count, symmetric=symmetric, **motion)
    return [
        paste(tile, background_at(k), x, y, scale=scale, degrees=degrees)
        for k, (x, y, scale, degrees) in enumerate(path)
    ]


def camera_over_scene(rng, label, size, count):
    """Draws a large scene that a camera pans, zooms or rolls over; the label is the motion of the scene."""
    width, height = size
    scene = (
        draw_town(rng, (width * 3, height * 3))
        if rng.random() < 0.7
        else smooth_noise(rng, (width * 3, height * 3), 20)
    )
    x, y = 1.5 * width, 1.5 * height
    images = []
    length, zoom, total_degrees = rng.uniform(0.3, 0.9), rng.uniform(1.4, 2.5), rng.uniform(50, 200)
    for p in progress(count):
        cx, cy, scale, degrees = x, y, 1.0, 0.0
        if label in DIRECTIONS:  # the scene moves opposite to the camera
            cx -= DIRECTIONS[label][0] * (p - 0.5) * length * width
            cy -= DIRECTIONS[label][1] * (p - 0.5) * length * height
        elif label == "growing":
            scale = zoom ** (p - 0.5)
        elif label == "shrinking":
            scale = zoom ** (0.5 - p)
        elif label.startswith("turning"):
            degrees = total_degrees * (p - 0.5) * (1 if label == "turning clockwise" else -1)
        half_w, half_h = int(width * 0.85), int(height * 0.85)
        part = scene.crop((int(cx - half_w), int(cy - half_h), int(cx + half_w), int(cy + half_h)))
        if degrees:
            part = part.rotate(-degrees, resample=Image.BILINEAR)
        seen_w, seen_h = width / scale / 2, height / scale / 2
        images.append(
            part.resize(size, Image.BILINEAR, box=(half_w - seen_w, half_h - seen_h, half_w + seen_w, half_h + seen_h))
        )
    return images


def moving_photo(rng, label, size, count):
    """Draws an image that is shifted (with wrap-around), resized or rotated as a whole on black."""
    side = int(min(size) * 0.75)
    photo = draw_town(rng, (side, side)).convert("RGBA")
    black = Image.new("RGB", size)
    if label in DIRECTIONS:
        scene = draw_town(rng, size)
        dx, dy = DIRECTIONS[label]
        length = rng.uniform(0.4, 1.2)
        return [
            ImageChops.offset(scene, round(dx * length * size[0] * p), round(dy * length * size[1] * p))
            for p in progress(count)
        ]
    path = poses(rng, label, size, side, count, symmetric=2)
    return [
        paste(photo, black, size[0] / 2, size[1] / 2, scale=scale * 0.8, degrees=degrees)
        for _, _, scale, degrees in path
    ]


def draw(label, style, seed):
    """Draws one clip of 25 to 100 frames; equal arguments give equal clips, except for the noise of "noisy dim".

    Args:
        label: The motion.
        style: One of PLAIN_STYLES or HARD_STYLES.
        seed: Anything that formats as a string.

    Returns:
        uint8 (T, H, W, 3).

    Raises:
        ValueError: The style is unknown.
    """
    return np.stack([np.asarray(image) for image in _draw_images(label, style, seed)])


def _draw_images(label, style, seed):
    """Returns PIL images."""
    rng = random.Random(f"{label} {style} {seed}")
    size = rng.choice(SIZES)
    count = rng.randint(25, 100)
    black, white = Image.new("RGB", size), Image.new("RGB", size, "white")
    bright = tuple(rng.choice([(255, 80, 60), (80, 255, 90), (90, 160, 255), (255, 230, 60)]))

    def moving(kind, color, background_at, *, frame_size=size, **motion):
        return object_over(rng, label, frame_size, count, kind, color, background_at, **motion)

    if style in ("white square", "white circle", "white bar", "white triangle"):
        return moving(style.split()[1], "white", lambda k: black)
    if style == "black on white":
        return moving(rng.choice(["square", "bar", "arrow"]), "black", lambda k: white)
    if style == "colored arrow":
        return moving("arrow", bright, lambda k: black)
    if style == "textured on noise":
        noises = [smooth_noise(rng, size, rng.choice([1, 2, 4])) for _ in range(6)]
        dim = [ImageEnhance.Brightness(noise).enhance(0.5) for noise in noises]
        return moving("wheel", bright, lambda k: dim[k % len(dim)])
    if style == "textured on gradient":
        background = gradient(size, (20, 20, 60), (200, 160, 120), horizontal=rng.random() < 0.5)
        return moving("wheel", bright, lambda k: background)
    if style == "over panning":
        background = ImageEnhance.Brightness(draw_town(rng, size)).enhance(0.5)
        speed = rng.choice([-3, -2, -1, 1, 2, 3])
        kind = rng.choice(["arrow", "letter", "triangle"])
        return moving(kind, "white", lambda k: ImageChops.offset(background, speed * k, 0))
    if style == "whole scene":
        return camera_over_scene(rng, label, size, count)
    if style == "whole frame":
        return moving_photo(rng, label, size, count)
    if style == "letters":
        background = gradient(size, (0, 0, 0), (90, 90, 90), horizontal=True)
        return moving("letter", bright, lambda k: background)
    if style == "three alike":
        one = moving("letter", "white", lambda k: black)
        distance = size[0] // 3
        two = [ImageChops.lighter(image, ImageChops.offset(image, distance, 0)) for image in one]
        return [ImageChops.lighter(image, ImageChops.offset(other, 2 * distance, 0)) for image, other in zip(two, one)]
    if style == "portrait":
        size = (180, 320)
        background = Image.new("RGB", size, (40, 40, 50))
        return moving(rng.choice(["square", "arrow", "wheel"]), bright, lambda k: background, frame_size=size)
    if style == "noisy dim":
        images = moving("arrow", (150, 150, 150), lambda k: Image.new("RGB", size, (60,) * 3))
        noises = [Image.effect_noise(size, 40).convert("RGB") for _ in range(5)]
        return [Image.blend(image, noises[k % 5], 0.3) for k, image in enumerate(images)]
    if style == "tiny video":
        size = (80, 60)
        kind = rng.choice(["square", "arrow", "bar"])
        return moving(kind, "white", lambda k: Image.new("RGB", size, (30, 30, 90)), frame_size=size)
    if style == "eased":
        images = moving(rng.choice(["square", "arrow"]), bright, lambda k: black, eased=True)
        return [image.filter(ImageFilter.GaussianBlur(2)) for image in images]
    if style == "crossing":
        return moving(rng.choice(["circle", "square", "letter"]), "white", lambda k: black, crossing=True)
    raise ValueError(f"expected one of {PLAIN_STYLES + HARD_STYLES}, got {style!r}")

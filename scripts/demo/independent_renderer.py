"""Clips as somebody else would draw them: a second renderer, sharing no code with the demo's, to judge it by.

    draw(label, style, seed)  ->  list of PIL pictures
    to_bytes(pictures)         ->  a video file

Plain styles have one light thing on black, or one dark thing on white; the others are harder. Everything is
in pixels of the picture that is drawn, and each frame is drawn afresh with PIL.
"""

import io
import random

import av
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

PLAIN_STYLES = (
    "white square",
    "white circle",
    "black on white",
    "white bar",
    "white triangle",
    "coloured arrow",
)
HARD_STYLES = (
    "textured on noise",
    "textured on gradient",
    "over panning",
    "whole scene",
    "whole picture",
    "letters",
    "three alike",
    "portrait",
    "noisy dim",
    "tiny video",
    "eased",
    "crossing",
)
SIZES = ((320, 240), (320, 180), (240, 240), (426, 240))
MOVES = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}


def smooth_noise(dice, size, grain):
    """A picture of coloured clouds, or of pixels where `grain` is 1."""
    small = (max(2, size[0] // grain), max(2, size[1] // grain))
    return Image.frombytes("RGB", small, dice.randbytes(3 * small[0] * small[1])).resize(size, Image.BICUBIC)


def gradient(size, first, second, *, sideways):
    """From one colour to another, sideways or downwards."""
    ramp = Image.linear_gradient("L")
    ramp = (ramp.rotate(90) if sideways else ramp).resize(size)
    return Image.composite(Image.new("RGB", size, second), Image.new("RGB", size, first), ramp)


def town(dice, size):
    """A scene to pan over: a sky, houses with lit windows, trees and a sign."""
    width, height = size
    scene = gradient(size, (30, 60, 140), (230, 190, 150), sideways=False)
    pen = ImageDraw.Draw(scene)
    left = 0
    while left < width:
        wide, top = dice.randint(width // 16, width // 6), dice.randint(height // 8, height // 2)
        pen.rectangle([left, top, left + wide, height], fill=tuple(dice.randrange(30, 200) for _ in range(3)))
        for x in range(left + 4, left + wide - 6, 14):
            for y in range(top + 6, height - 10, 18):
                if dice.random() < 0.6:
                    pen.rectangle([x, y, x + 6, y + 9], fill=(255, 240, dice.randrange(80, 220)))
        left += wide + dice.randint(0, 12)
    for _ in range(12):
        x, y, r = dice.randrange(width), dice.randrange(height // 2, height), dice.randint(5, 25)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(20, dice.randrange(80, 180), 40))
    pen.text((width // 3, height // 3), "HOTEL", fill="red", font=ImageFont.load_default(height // 8))
    return scene


def stamp(dice, kind, side, colour):
    """An RGBA thing to paste, `side` pixels wide."""
    tile = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(tile)
    a, b = side * 0.08, side * 0.92
    if kind == "square":
        pen.rectangle([side * 0.16, side * 0.16, side * 0.84, side * 0.84], fill=colour)
    elif kind == "circle":
        pen.ellipse([a, a, b, b], fill=colour)
    elif kind == "bar":
        pen.rectangle([a, side * 0.38, b, side * 0.62], fill=colour)
    elif kind == "triangle":
        pen.polygon([(side / 2, a), (b, side * 0.8), (a, side * 0.8)], fill=colour)
    elif kind == "arrow":
        pen.line([(a, side / 2), (side * 0.7, side / 2)], fill=colour, width=max(2, side // 7))
        pen.polygon([(side * 0.6, side * 0.2), (b, side / 2), (side * 0.6, side * 0.8)], fill=colour)
    elif kind == "letter":
        font = ImageFont.load_default(int(side * 0.9))
        pen.text((side / 2, side / 2), dice.choice("FRGPLE47"), fill=colour, font=font, anchor="mm")
    elif kind == "quilt":  # a disc of coloured wedges
        for wedge in range(5):
            shade = tuple(dice.randrange(256) for _ in range(3)) + (255,)
            pen.pieslice([a, a, b, b], wedge * 72, wedge * 72 + 72, fill=shade)
    return tile


def progress(count, *, eased=False):
    """From 0 to 1 in `count` frames."""
    steps = [k / (count - 1) for k in range(count)]
    return [3 * p * p - 2 * p * p * p for p in steps] if eased else steps


def placed(tile, background, x, y, *, scale=1.0, degrees=0.0):
    """The background with the tile's middle at (x, y), scaled, and turned clockwise."""
    picture = background.copy()
    if degrees:
        tile = tile.rotate(-degrees, resample=Image.BICUBIC)
    wide = max(2, round(tile.width * scale))
    tile = tile.resize((wide, wide), Image.BICUBIC)
    picture.paste(tile, (round(x - wide / 2), round(y - wide / 2)), tile)
    return picture


def poses(dice, label, size, side, count, *, symmetric=1, eased=False, crossing=False):
    """x, y, scale and degrees of each frame."""
    width, height = size
    path = progress(count, eased=eased)
    x = dice.uniform(min(side, width / 2), max(width - side, width / 2))
    y = dice.uniform(min(side, height / 2), max(height - side, height / 2))
    if label in MOVES:
        dx, dy = MOVES[label]
        length = (width if dx else height) * dice.uniform(0.3, 0.7)
        if crossing:
            length = (width if dx else height) + side
        x0 = (width - dx * length) / 2 if dx else x
        y0 = (height - dy * length) / 2 if dy else y
        return [(x0 + dx * length * p, y0 + dy * length * p, 1, 0) for p in path]
    if label in ("growing", "shrinking"):
        small, large = dice.uniform(0.35, 0.6), dice.uniform(1.1, 2.0)
        first, last = (small, large) if label == "growing" else (large, small)
        return [(x, y, first + (last - first) * p, 0) for p in path]
    if label.startswith("turning"):
        fastest = 100 / symmetric  # degrees between two of sixteen frames, well below half of what looks the same
        whole = dice.uniform(min(90, 8 * fastest), min(540, 15 * fastest) / (1.5 if eased else 1))
        start, sign = dice.uniform(0, 360), 1 if label == "turning clockwise" else -1
        return [(x, y, 1, start + sign * whole * p) for p in path]
    degrees, scale = dice.choice([0, dice.uniform(0, 360)]), dice.uniform(0.6, 1.4)
    return [(x, y, scale, degrees)] * count


def thing_over(dice, label, size, count, kind, colour, background_at, **how):
    """One thing moving before backgrounds (a function of the frame's number)."""
    turning = label.startswith("turning")
    if turning and kind == "circle":
        kind = "triangle"  # a turning disc shows nothing
    symmetric = {"square": 4, "bar": 2, "triangle": 1}.get(kind, 1)
    side = int(min(size) * dice.uniform(0.3 if turning else 0.2, 0.45))
    tile = stamp(dice, kind, side, colour)
    way = poses(dice, label, size, side, count, symmetric=symmetric, **how)
    return [
        placed(tile, background_at(k), x, y, scale=scale, degrees=degrees)
        for k, (x, y, scale, degrees) in enumerate(way)
    ]


def view_of(dice, label, size, count):
    """A camera over a large scene: it pans, zooms, rolls or stands. The scene's movement is the label."""
    width, height = size
    scene = (
        town(dice, (width * 3, height * 3)) if dice.random() < 0.7 else smooth_noise(dice, (width * 3, height * 3), 20)
    )
    x, y = 1.5 * width, 1.5 * height
    pictures = []
    length, zoom, whole = dice.uniform(0.3, 0.9), dice.uniform(1.4, 2.5), dice.uniform(50, 200)
    for p in progress(count):
        cx, cy, scale, degrees = x, y, 1.0, 0.0
        if label in MOVES:  # the scene goes one way where the camera goes the other
            cx -= MOVES[label][0] * (p - 0.5) * length * width
            cy -= MOVES[label][1] * (p - 0.5) * length * height
        elif label == "growing":
            scale = zoom ** (p - 0.5)
        elif label == "shrinking":
            scale = zoom ** (0.5 - p)
        elif label.startswith("turning"):
            degrees = whole * (p - 0.5) * (1 if label == "turning clockwise" else -1)
        half_w, half_h = int(width * 0.85), int(height * 0.85)
        part = scene.crop((int(cx - half_w), int(cy - half_h), int(cx + half_w), int(cy + half_h)))
        if degrees:
            part = part.rotate(-degrees, resample=Image.BILINEAR)
        seen_w, seen_h = width / scale / 2, height / scale / 2
        pictures.append(
            part.resize(size, Image.BILINEAR, box=(half_w - seen_w, half_h - seen_h, half_w + seen_w, half_h + seen_h))
        )
    return pictures


def photo_on_black(dice, label, size, count):
    """A whole picture shifted, resized or turned as an editor would do it, black where it does not reach."""
    wide = int(min(size) * 0.75)
    photo = town(dice, (wide, wide)).convert("RGBA")
    black = Image.new("RGB", size)
    if label in MOVES:
        whole = town(dice, size)
        dx, dy = MOVES[label]
        length = dice.uniform(0.4, 1.2)
        return [
            ImageChops.offset(whole, round(dx * length * size[0] * p), round(dy * length * size[1] * p))
            for p in progress(count)
        ]
    way = poses(dice, label, size, wide, count, symmetric=2)
    return [
        placed(photo, black, size[0] / 2, size[1] / 2, scale=scale * 0.8, degrees=degrees)
        for _, _, scale, degrees in way
    ]


def draw(label, style, seed):
    """The pictures of one clip: 16 to 120 of them, the same for the same arguments."""
    dice = random.Random(f"{label} {style} {seed}")
    size = dice.choice(SIZES)
    count = dice.randint(25, 100)
    black, white = Image.new("RGB", size), Image.new("RGB", size, "white")
    bright = tuple(dice.choice([(255, 80, 60), (80, 255, 90), (90, 160, 255), (255, 230, 60)]))
    if style in ("white square", "white circle", "white bar", "white triangle"):
        return thing_over(dice, label, size, count, style.split()[1], "white", lambda k: black)
    if style == "black on white":
        return thing_over(dice, label, size, count, dice.choice(["square", "bar", "arrow"]), "black", lambda k: white)
    if style == "coloured arrow":
        return thing_over(dice, label, size, count, "arrow", bright, lambda k: black)
    if style == "textured on noise":
        noises = [smooth_noise(dice, size, dice.choice([1, 2, 4])) for _ in range(6)]
        dim = [ImageEnhance.Brightness(noise).enhance(0.5) for noise in noises]
        return thing_over(dice, label, size, count, "quilt", bright, lambda k: dim[k % len(dim)])
    if style == "textured on gradient":
        back = gradient(size, (20, 20, 60), (200, 160, 120), sideways=dice.random() < 0.5)
        return thing_over(dice, label, size, count, "quilt", bright, lambda k: back)
    if style == "over panning":
        back = ImageEnhance.Brightness(town(dice, size)).enhance(0.5)
        speed = dice.choice([-3, -2, -1, 1, 2, 3])
        return thing_over(
            dice,
            label,
            size,
            count,
            dice.choice(["arrow", "letter", "triangle"]),
            "white",
            lambda k: ImageChops.offset(back, speed * k, 0),
        )
    if style == "whole scene":
        return view_of(dice, label, size, count)
    if style == "whole picture":
        return photo_on_black(dice, label, size, count)
    if style == "letters":
        back = gradient(size, (0, 0, 0), (90, 90, 90), sideways=True)
        return thing_over(dice, label, size, count, "letter", bright, lambda k: back)
    if style == "three alike":
        once = thing_over(dice, label, size, count, "letter", "white", lambda k: black)
        apart = size[0] // 3
        twice = [ImageChops.lighter(picture, ImageChops.offset(picture, apart, 0)) for picture in once]
        return [
            ImageChops.lighter(picture, ImageChops.offset(other, 2 * apart, 0)) for picture, other in zip(twice, once)
        ]
    if style == "portrait":
        size = (180, 320)
        back = Image.new("RGB", size, (40, 40, 50))
        return thing_over(dice, label, size, count, dice.choice(["square", "arrow", "quilt"]), bright, lambda k: back)
    if style == "noisy dim":
        pictures = thing_over(
            dice, label, size, count, "arrow", (150, 150, 150), lambda k: Image.new("RGB", size, (60,) * 3)
        )
        grain = [Image.effect_noise(size, 40).convert("RGB") for _ in range(5)]
        return [Image.blend(picture, grain[k % 5], 0.3) for k, picture in enumerate(pictures)]
    if style == "tiny video":
        size = (80, 60)
        return thing_over(
            dice,
            label,
            size,
            count,
            dice.choice(["square", "arrow", "bar"]),
            "white",
            lambda k: Image.new("RGB", size, (30, 30, 90)),
        )
    if style == "eased":
        pictures = thing_over(
            dice, label, size, count, dice.choice(["square", "arrow"]), bright, lambda k: black, eased=True
        )
        return [picture.filter(ImageFilter.GaussianBlur(2)) for picture in pictures]
    if style == "crossing":
        return thing_over(
            dice,
            label,
            size,
            count,
            dice.choice(["circle", "square", "letter"]),
            "white",
            lambda k: black,
            crossing=True,
        )
    raise ValueError(f"expected one of {PLAIN_STYLES + HARD_STYLES}, got {style!r}")


def to_bytes(pictures, *, container="mp4", codec="libx264", fps=25):
    """A video file of these pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        stream.codec_context.thread_count = 1
        if codec.startswith("libvpx"):
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode())
    return file.getvalue()

"""Draws lots: random scenes of a label, in all the variety that a model should see through.

    sample_scene(rng, label=...)  ->  Scene, for motions.render

The label is the motion of the salient thing in the picture: of the objects, where there are any; of the whole
scene (a pan, a zoom, a turn), where there is none. A background that moves behind an object is a distraction.
"Still" is any of the other scenes, frozen at one moment, so each frame of it could stem from any other label.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from demo.motions import DIRECTIONS, LABELS, Effects, Layer, Path, Scene, Timing, extent, freeze, opaque
from demo.pictures import (
    MOST_CELLS,
    SCENE_SIDE,
    chance,
    draw_sprite,
    draw_texture,
    log_uniform,
    plane,
    sample_colour,
    sample_contrasting,
)

SAMPLED_FRAMES = 16  # what the model sees of a clip: turns must not alias between these
REGULAR_TEXTURES = ("checker", "plaid", "dots")
SCENE_TEXTURES = (  # those that show a motion in any direction, the richer ones more often
    "noise",
    "noise",
    "speckle",
    "collage",
    "collage",
    "collage",
    "marble",
    *REGULAR_TEXTURES,
)


@dataclass(frozen=True)
class Settings:
    """What scenes are made of: names of shapes and textures, and (low, high) ranges."""

    shapes: tuple[str, ...] = (
        "disc",
        "ellipse",
        "square",
        "bar",
        "triangle",
        "polygon",
        "star",
        "ring",
        "arrow",
        "glyph",
        "cross",
        "corner",
        "pie",
        "blob",
        "hand",
        "shard",
    )
    textures: tuple[str, ...] = (
        "noise",
        "speckle",
        "gradient",
        "checker",
        "plaid",
        "stripes",
        "dots",
        "collage",
        "marble",
    )
    glyphs: str = "ABCEFGJKLMPQRTUVWY2345679?&"
    size: tuple[float, float] = (0.05, 0.75)  # an object's diameter
    shift: tuple[float, float] = (0.12, 1.5)  # of the picture's side along the motion
    growth: tuple[float, float] = (1.3, 6.0)
    turn_degrees: tuple[float, float] = (40.0, 1080.0)
    off_centre: float = 0.85  # how far from the middle objects may be, as a share of the way to the edge
    bright_on_dark: bool = False
    noise: tuple[float, float] = (0.01, 0.16)  # standard deviation; white is 1
    aspect: tuple[float, float] = (0.45, 2.4)  # width / height
    plain_share: float = 0.3  # of scenes: one plain object on one plain colour, no effects
    scene_share: float = 0.2  # of the other scenes: no object, everything moves


TRAINING = Settings()
EASY = Settings(  # large bright things near the middle that move far: what training begins with
    shapes=("disc", "square", "bar", "triangle", "star", "arrow", "corner", "hand", "shard"),
    size=(0.3, 1.0),
    shift=(0.35, 0.9),
    growth=(2.0, 5.0),
    turn_degrees=(40.0, 270.0),
    off_centre=0.3,
    bright_on_dark=True,
    plain_share=1.0,
)
EVALUATION = Settings(  # more shapes, other textures and glyphs, and other ranges than in training
    shapes=(*TRAINING.shapes, "crescent", "house", "key", "spiral"),
    textures=(*TRAINING.textures[:-1], "bricks", "rings"),  # no marble
    glyphs="FGJLPRQ147@#$abdefghkrty",
    size=(0.08, 0.65),
    shift=(0.18, 1.3),
    growth=(1.4, 5.0),
    turn_degrees=(50.0, 900.0),
    noise=(0.01, 0.12),
    aspect=(0.5, 2.2),
)


@dataclass(frozen=True)
class Plan:
    """What is decided first about a scene; all its parts depend on it."""

    settings: Settings
    label: str
    motion: str  # the label, or what a still scene would show if it were not frozen
    aspect: float
    timing: Timing
    effects: Effects
    frames: int  # that will be seen
    hard: bool

    @property
    def half(self):
        """(half width, half height) of the picture."""
        return extent(self.aspect)

    @property
    def direction(self):
        """(x, y) of a motion along an axis, else None."""
        return DIRECTIONS.get(self.motion)

    @property
    def axis(self):
        """0 for a motion along x, 1 for one along y."""
        return 0 if self.direction[0] else 1

    @property
    def turning(self):
        """Whether the motion is a turn, either way."""
        return self.motion.startswith("turning")

    @property
    def sign(self):
        """1 for growing and for clockwise, -1 for shrinking and for counterclockwise."""
        return 1 if self.motion in ("growing", "turning clockwise") else -1


def sample_scene(rng, *, label=None, settings=TRAINING, frames=SAMPLED_FRAMES):
    """A random scene of a label (by default a random one).

    `frames` says how many different frames will be seen: turns keep clear of aliasing between them.
    """
    label = label or str(rng.choice(LABELS))
    motion = label if label != "still" else str(rng.choice(LABELS[:-1]))
    hard = not chance(rng, settings.plain_share)
    aspect = float(rng.choice([4 / 3, 16 / 9, 1.0, 9 / 16, log_uniform(rng, *settings.aspect)]))
    timing = sample_timing(rng) if hard else Timing()
    seed = int(rng.integers(2**31))
    effects = sample_effects(rng, settings) if hard else Effects()
    plan = Plan(settings, label, motion, aspect, timing, effects, frames, hard)
    if hard and chance(rng, settings.scene_share):
        background, objects = sample_moving_scene(rng, plan), ()
    else:
        background, objects = sample_objects(rng, plan)
    scene = Scene(label, aspect, background, objects, effects, seed)
    return scene if label != "still" else freeze(scene, rng.random(), background_too=not objects)


def sample_timing(rng):
    """How progress runs over a clip: evenly, or with rests, a pause and changes of speed."""
    if chance(rng, 0.45):
        return Timing()
    start, end, pause, ease_in, ease_out = 0.0, 1.0, (0.5, 0.0), 1.0, 1.0
    if chance(rng, 0.4):
        start = rng.uniform(0, 0.4)
    if chance(rng, 0.4):
        end = rng.uniform(max(0.6, start + 0.4), 1)
    if chance(rng, 0.3):
        pause = (rng.uniform(0.2, 0.6), rng.uniform(0.1, 0.35))
    if chance(rng, 0.5):
        ease_in = rng.uniform(0.7, 2.2)
    if chance(rng, 0.4):
        ease_out = rng.uniform(0.7, 2.2)
    return Timing(start, end, ease_in, ease_out, pause)


def sample_effects(rng, settings):
    """Noise, shake, flicker and the like; each of them on a few clips."""
    return Effects(
        noise=log_uniform(rng, *settings.noise) if chance(rng, 0.35) else 0.0,
        noise_grain=int(rng.integers(1, 4)),
        salt=rng.uniform(0.002, 0.04) if chance(rng, 0.05) else 0.0,
        shake=log_uniform(rng, 0.002, 0.012) if chance(rng, 0.15) else 0.0,
        flicker=rng.uniform(0.01, 0.1) if chance(rng, 0.15) else 0.0,
        fade=rng.uniform(-0.35, 0.35) if chance(rng, 0.15) else 0.0,
        contrast=rng.uniform(0.35, 1) if chance(rng, 0.25) else 1.0,
        blur=log_uniform(rng, 0.004, 0.03) if chance(rng, 0.2) else 0.0,
        grey=chance(rng, 0.15),
        film_grain_background=rng.uniform(0.05, 0.5) if chance(rng, 0.1) else 0.0,
        background_flicker=rng.uniform(0.02, 0.15) if chance(rng, 0.07) else 0.0,
    )


def sample_turn(rng, plan, repeats):
    """Radians of a turn whose direction shows in evenly sampled frames of a shape that repeats."""
    limit = 130 / repeats / plan.timing.longest_step(plan.frames)  # 180 would look the same either way
    low, high = plan.settings.turn_degrees
    high = min(high, limit)
    return math.radians(log_uniform(rng, min(low, high), high))


# Whole scenes


def sample_moving_scene(rng, plan):
    """A background that is panned, zoomed or turned."""
    kind = str(rng.choice([kind for kind in SCENE_TEXTURES if kind in plan.settings.textures]))
    first = sample_colour(rng)
    texture = draw_texture(rng, kind, SCENE_SIDE, first, sample_contrasting(rng, [first], distance=0.4))
    path = sample_scene_path(rng, plan, regular=kind in REGULAR_TEXTURES)
    return opaque(texture, path, plan.timing)


def sample_scene_path(rng, plan, *, regular):
    """The path of a whole scene; a regular pattern moves by less than half its period from frame to frame."""
    centre = tuple(rng.uniform(-0.4, 0.4, 2))
    half_size = max(plan.half) * rng.uniform(0.9, 1.6)
    path = Path(centre, half_size=half_size, angle=rng.uniform(0, 2 * math.pi))
    longest_step = plan.timing.longest_step(plan.frames)
    furthest = 0.3 * half_size * 2 / MOST_CELLS / longest_step if regular else math.inf
    if plan.direction:
        length = 2 * plan.half[plan.axis] * log_uniform(rng, 0.12, 1.5)
        length = min(length, furthest)
        drift = length * rng.uniform(-0.25, 0.25) if chance(rng, 0.3) else 0.0
        return replace(path, shift=along(plan, length, drift))
    if not plan.turning:
        growth = math.log(log_uniform(rng, 1.25, 4.0))
        return replace(path, log_growth=plan.sign * min(growth, 2 * furthest))
    turn = sample_turn(rng, plan, 4 if regular else 1)
    turn = min(turn, 2 * furthest, math.radians(25) / longest_step)  # fine patterns far out move fast
    return replace(path, turn=plan.sign * turn)


def along(plan, length, drift):
    """A shift (x, y): so far in the motion's direction, and so far to its side."""
    shift = [drift, drift]
    shift[plan.axis] = sum(plan.direction) * length
    return tuple(shift)


# Objects in front of a background


def sample_objects(rng, plan):
    """A background, and one object in front of it or several that move alike."""
    hard, effects = plan.hard, plan.effects
    moving_background = hard and chance(rng, 0.35)
    background, colours = sample_background(rng, plan, moving=moving_background)
    restless = moving_background or effects.film_grain_background > 0
    distance = 0.4 if restless else 0.3 if hard else 0.25
    count = int(rng.integers(2, 5)) if hard and chance(rng, 0.2) else 1
    textured = hard and chance(rng, 0.4)
    look = {"avoid": colours, "distance": distance, "must_turn": plan.turning, "textured": textured}
    sprites = [draw_sprite(rng, plan.settings, **look)]
    if chance(rng, 0.4):
        sprites += [draw_sprite(rng, plan.settings, **look) for _ in range(count - 1)]
    repeats = max(1, *(sprite.symmetry for sprite in sprites), 1)
    smallest = 0.2 if plan.turning or restless else 0.05
    if effects.noise > 0.05 or effects.salt:
        smallest = max(smallest, 0.12)
    if plan.turning and repeats > 3:
        smallest = 0.28
    wrap = plan.direction is not None and chance(rng, 0.1)
    path = sample_path(rng, plan, repeats, smallest=smallest, textured=textured, wrap=wrap)
    objects = [Layer(sprites[0].picture, path, plan.timing, wrap=wrap)]
    for number in range(1, count):
        other = beside(rng, plan, path)
        objects.append(Layer(sprites[number % len(sprites)].picture, other, plan.timing, wrap=wrap))
    if hard and chance(rng, 0.1) and path.half_size > 0.1 and not moving_background:
        look = {**look, "distance": 0.1, "must_turn": False}
        bystander = draw_sprite(rng, plan.settings, **look)
        centre = tuple(rng.uniform(-1, 1) * h for h in plan.half)
        place = Path(centre, half_size=path.half_size * rng.uniform(0.3, 0.8))
        objects.insert(0, Layer(bystander.picture, place, plan.timing))
    return background, tuple(objects)


def beside(rng, plan, path):
    """The path of another object that moves alike."""
    centre = [rng.uniform(-0.8, 0.8) * h for h in plan.half]
    if plan.direction:  # all of them cross the picture together
        centre[plan.axis] = path.centre[plan.axis] + rng.uniform(-0.4, 0.4)
    angle = path.angle + (rng.uniform(0, 2 * math.pi) if plan.turning else 0)
    return replace(path, centre=tuple(centre), angle=angle)


def sample_background(rng, plan, *, moving):
    """A background layer and the colours in it."""
    first = rng.uniform(0, 0.2, 3) if plan.settings.bright_on_dark else sample_colour(rng)
    if not plan.hard or (not moving and chance(rng, 0.3)):
        picture = plane(first).expand(3, 4, 4)
        return opaque(picture, Path(half_size=1.0), Timing()), [first]
    second = np.clip(first + rng.uniform(-1, 1, 3) * rng.uniform(0.05, 0.6), 0, 1)
    texture = draw_texture(rng, str(rng.choice(plan.settings.textures)), SCENE_SIDE, first, second)
    centre = tuple(rng.uniform(-0.3, 0.3, 2))
    path = Path(centre, half_size=rng.uniform(0.8, 1.6), angle=rng.uniform(0, 2 * math.pi))
    if moving:
        if chance(rng, 0.75):
            heading = rng.choice([0, 0.25, 0.5, 0.75, rng.random()]) * 2 * math.pi
            length = log_uniform(rng, 0.05, 1.6)
            path = replace(path, shift=(length * math.cos(heading), length * math.sin(heading)))
        elif chance(rng, 0.5):
            path = replace(path, log_growth=rng.uniform(-0.6, 0.6))
        else:
            path = replace(path, turn=rng.uniform(-0.8, 0.8))
    return opaque(texture, path, Timing()), [first, second]


def sample_path(rng, plan, repeats, *, smallest, textured, wrap):
    """A path that shows the motion within the picture."""
    diameter = log_uniform(rng, max(smallest, plan.settings.size[0]), plan.settings.size[1])
    if textured and chance(rng, 0.2):
        diameter = rng.uniform(0.7, 1.5)  # fills most of the picture
    spread = plan.settings.off_centre
    centre = tuple(rng.uniform(-spread, spread) * max(h - diameter / 2, 0.05) for h in plan.half)
    angle = rng.uniform(0, 2 * math.pi) if chance(rng, 0.6) else 0.0
    path = Path(centre, half_size=diameter / 2, angle=angle)
    if plan.direction:
        return translate(rng, plan, path, wrap=wrap)
    return turn(rng, plan, path, repeats) if plan.turning else scale(rng, plan, path)


def translate(rng, plan, path, *, wrap):
    """The path with a shift: within the picture for most of its way, drifting a little to the side."""
    half_side = plan.half[plan.axis]
    least, most = (share * 2 * half_side for share in plan.settings.shift)
    length = max(log_uniform(rng, least, most), 0.25 * path.half_size)
    length = min(length, max(least, 2 * half_side + 2 * path.half_size))
    drift = length * rng.uniform(-0.3, 0.3) if chance(rng, 0.4) else 0.0
    room = max(half_side - length / 2, 0.24 * half_side)  # for the middle of the way about the picture's
    centre = list(path.centre)
    centre[plan.axis] = rng.uniform(-room, room)
    path = replace(path, centre=tuple(centre))
    if chance(rng, 0.12):
        path = replace(path, log_growth=rng.uniform(-0.15, 0.15))
    if chance(rng, 0.12):
        path = replace(path, turn=rng.uniform(-0.35, 0.35))
    if wrap:  # up to three times as far, but under half a round from frame to frame
        period = 2 * half_side + 2 * path.half_size
        furthest = 0.28 * period / plan.timing.longest_step(plan.frames)
        length, drift = max(length * 0.5, min(length * rng.uniform(1, 3), furthest)), 0.0
    return replace(path, shift=along(plan, length, drift))


def scale(rng, plan, path):
    """The path with a change of size, about the thing's middle or another point of it."""
    growth = log_uniform(rng, *plan.settings.growth)
    largest = 2 * path.half_size * math.sqrt(growth)
    path = replace(path, half_size=path.half_size * min(max(largest, 0.15), 1.5) / largest)
    if chance(rng, 0.3):
        path = replace(path, pivot=tuple(rng.uniform(-0.7, 0.7, 2)))
    if chance(rng, 0.12):
        path = replace(path, turn=rng.uniform(-0.3, 0.3))
    if chance(rng, 0.15):
        path = replace(path, shift=tuple(rng.uniform(-0.06, 0.06, 2)))
    return replace(path, log_growth=plan.sign * math.log(growth))


def turn(rng, plan, path, repeats):
    """The path with a turn, about the thing's middle or another point of it."""
    path = replace(path, turn=plan.sign * sample_turn(rng, plan, repeats))
    if chance(rng, 0.35):
        far, around = rng.uniform(0, 1.0), rng.uniform(0, 2 * math.pi)
        path = replace(path, pivot=(far * math.cos(around), far * math.sin(around)))
    if chance(rng, 0.2):
        path = replace(path, shift=tuple(rng.uniform(-0.04, 0.04, 2)))
    return path

"""Samples random scenes of a label that vary in everything else.

    sample_scene(rng, label=...)  ->  Scene, for motions.render

The label is the motion of the objects or, in a scene without objects, of the whole scene (a pan, a zoom or a turn).
A background that moves behind an object does not affect the label. A "still" scene is a scene of another label frozen
at one moment, so a single frame does not reveal the label.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from demo.motions import DIRECTIONS, LABELS, Effects, Layer, Path, Scene, Timing, extent, freeze, opaque
from demo.sprites import (
    MAX_CELLS,
    SCENE_SIDE,
    chance,
    draw_sprite,
    draw_texture,
    log_uniform,
    plane,
    sample_color,
    sample_contrasting,
)

SAMPLED_FRAMES = 16  # frames that the model sees of a clip; turns must not alias between them
REGULAR_TEXTURES = ("checker", "plaid", "dots")
SCENE_TEXTURES = (  # these make motion in any direction visible; richer ones are more frequent
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
    """What scenes are made of: names of shapes and textures, and (low, high) ranges.

    Attributes:
        shapes: Names of shapes.
        textures: Names of textures.
        glyphs: Characters for the shape "glyph".
        size: Diameter of an object, in shorter sides of the frame.
        shift: Length of a translation, in sides of the frame along the motion.
        growth: Factor.
        turn_degrees: Angle of a turn.
        off_center: Distance of objects from the center, as a share of the distance to the edge.
        bright_on_dark: Whether objects are bright and backgrounds are dark.
        noise: Standard deviation; white is 1.
        aspect: Width divided by height.
        plain_share: Share of scenes with one plain object on one plain color and no effects.
        scene_share: Share of the other scenes without objects, in which everything moves.
    """

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
    size: tuple[float, float] = (0.05, 0.75)
    shift: tuple[float, float] = (0.12, 1.5)
    growth: tuple[float, float] = (1.3, 6.0)
    turn_degrees: tuple[float, float] = (40.0, 1080.0)
    off_center: float = 0.85
    bright_on_dark: bool = False
    noise: tuple[float, float] = (0.01, 0.16)
    aspect: tuple[float, float] = (0.45, 2.4)
    plain_share: float = 0.3
    scene_share: float = 0.2


TRAINING = Settings()
EASY = Settings(  # for the start of training: large bright objects near the center that move far
    shapes=("disc", "square", "bar", "triangle", "star", "arrow", "corner", "hand", "shard"),
    size=(0.3, 1.0),
    shift=(0.35, 0.9),
    growth=(2.0, 5.0),
    turn_degrees=(40.0, 270.0),
    off_center=0.3,
    bright_on_dark=True,
    plain_share=1.0,
)
EVALUATION = Settings(  # other shapes, textures, glyphs and ranges than in training
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
    """The properties of a scene that its parts depend on.

    Attributes:
        settings: Ranges to sample from.
        label: The label.
        motion: The label; for a still scene, the motion before it is frozen.
        aspect: Width divided by height.
        timing: Timing of the motion.
        effects: Degradations of the frames.
        frames: Number of frames that the model sees.
        hard: Whether it has more than a plain object on a plain background.
    """

    settings: Settings
    label: str
    motion: str
    aspect: float
    timing: Timing
    effects: Effects
    frames: int
    hard: bool

    @property
    def half(self):
        """(half width, half height) of the frame."""
        return extent(self.aspect)

    @property
    def direction(self):
        """(x, y) of a translation; None for other motions."""
        return DIRECTIONS.get(self.motion)

    @property
    def axis(self):
        """0 for a translation along x, 1 for one along y."""
        return 0 if self.direction[0] else 1

    @property
    def turning(self):
        """Whether the motion is a rotation."""
        return self.motion.startswith("turning")

    @property
    def sign(self):
        """1 for growing and clockwise, -1 for shrinking and counterclockwise."""
        return 1 if self.motion in ("growing", "turning clockwise") else -1


def sample_scene(rng, *, label=None, settings=TRAINING, frames=SAMPLED_FRAMES):
    """Samples a scene.

    Args:
        rng: Random number generator.
        label: One of motions.LABELS; random by default.
        settings: Ranges to sample from.
        frames: Number of different frames that the model sees; turns do not alias between them.
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
    """Samples a timing: constant speed, or rests at the ends, a pause and changes of speed."""
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
    """Samples noise, shake, flicker and other effects; each occurs in some clips."""
    return Effects(
        noise=log_uniform(rng, *settings.noise) if chance(rng, 0.35) else 0.0,
        noise_grain=int(rng.integers(1, 4)),
        salt=rng.uniform(0.002, 0.04) if chance(rng, 0.05) else 0.0,
        shake=log_uniform(rng, 0.002, 0.012) if chance(rng, 0.15) else 0.0,
        flicker=rng.uniform(0.01, 0.1) if chance(rng, 0.15) else 0.0,
        fade=rng.uniform(-0.35, 0.35) if chance(rng, 0.15) else 0.0,
        contrast=rng.uniform(0.35, 1) if chance(rng, 0.25) else 1.0,
        blur=log_uniform(rng, 0.004, 0.03) if chance(rng, 0.2) else 0.0,
        gray=chance(rng, 0.15),
        film_grain_background=rng.uniform(0.05, 0.5) if chance(rng, 0.1) else 0.0,
        background_flicker=rng.uniform(0.02, 0.15) if chance(rng, 0.07) else 0.0,
    )


def sample_turn(rng, plan, repeats):
    """Samples a turn in radians whose direction is visible in uniformly sampled frames of a symmetric shape."""
    limit = 130 / repeats / plan.timing.longest_step(plan.frames)  # at 180 both directions look the same
    low, high = plan.settings.turn_degrees
    high = min(high, limit)
    return math.radians(log_uniform(rng, min(low, high), high))


# Whole scenes


def sample_moving_scene(rng, plan):
    """Samples a background that pans, zooms or turns."""
    kind = str(rng.choice([kind for kind in SCENE_TEXTURES if kind in plan.settings.textures]))
    first = sample_color(rng)
    texture = draw_texture(rng, kind, SCENE_SIDE, first, sample_contrasting(rng, [first], distance=0.4))
    path = sample_scene_path(rng, plan, regular=kind in REGULAR_TEXTURES)
    return opaque(texture, path, plan.timing)


def sample_scene_path(rng, plan, *, regular):
    """Samples the path of a whole scene; a regular pattern moves by less than half its period between frames."""
    center = tuple(rng.uniform(-0.4, 0.4, 2))
    half_size = max(plan.half) * rng.uniform(0.9, 1.6)
    path = Path(center, half_size=half_size, angle=rng.uniform(0, 2 * math.pi))
    longest_step = plan.timing.longest_step(plan.frames)
    furthest = 0.3 * half_size * 2 / MAX_CELLS / longest_step if regular else math.inf
    if plan.direction:
        length = 2 * plan.half[plan.axis] * log_uniform(rng, 0.12, 1.5)
        length = min(length, furthest)
        drift = length * rng.uniform(-0.25, 0.25) if chance(rng, 0.3) else 0.0
        return replace(path, shift=along(plan, length, drift))
    if not plan.turning:
        growth = math.log(log_uniform(rng, 1.25, 4.0))
        return replace(path, log_growth=plan.sign * min(growth, 2 * furthest))
    turn = sample_turn(rng, plan, 4 if regular else 1)
    turn = min(turn, 2 * furthest, math.radians(25) / longest_step)  # patterns far from the center move fast
    return replace(path, turn=plan.sign * turn)


def along(plan, length, drift):
    """Returns a shift (x, y) by `length` in the motion's direction and by `drift` across it."""
    shift = [drift, drift]
    shift[plan.axis] = sum(plan.direction) * length
    return tuple(shift)


# Objects in front of a background


def sample_objects(rng, plan):
    """Samples a background, and one object or several that move alike in front of it."""
    hard, effects = plan.hard, plan.effects
    moving_background = hard and chance(rng, 0.35)
    background, colors = sample_background(rng, plan, moving=moving_background)
    is_busy = moving_background or effects.film_grain_background > 0
    distance = 0.4 if is_busy else 0.3 if hard else 0.25
    count = int(rng.integers(2, 5)) if hard and chance(rng, 0.2) else 1
    textured = hard and chance(rng, 0.4)
    options = {"avoid": colors, "distance": distance, "must_turn": plan.turning, "textured": textured}
    sprites = [draw_sprite(rng, plan.settings, **options)]
    if chance(rng, 0.4):
        sprites += [draw_sprite(rng, plan.settings, **options) for _ in range(count - 1)]
    repeats = max(1, *(sprite.symmetry for sprite in sprites), 1)
    smallest = 0.2 if plan.turning or is_busy else 0.05
    if effects.noise > 0.05 or effects.salt:
        smallest = max(smallest, 0.12)
    if plan.turning and repeats > 3:
        smallest = 0.28
    wrap = plan.direction is not None and chance(rng, 0.1)
    path = sample_path(rng, plan, repeats, smallest=smallest, textured=textured, wrap=wrap)
    objects = [Layer(sprites[0].image, path, plan.timing, wrap=wrap)]
    for number in range(1, count):
        other = sample_parallel_path(rng, plan, path)
        objects.append(Layer(sprites[number % len(sprites)].image, other, plan.timing, wrap=wrap))
    if hard and chance(rng, 0.1) and path.half_size > 0.1 and not moving_background:
        options = {**options, "distance": 0.1, "must_turn": False}
        distractor = draw_sprite(rng, plan.settings, **options)
        center = tuple(rng.uniform(-1, 1) * h for h in plan.half)
        distractor_path = Path(center, half_size=path.half_size * rng.uniform(0.3, 0.8))
        objects.insert(0, Layer(distractor.image, distractor_path, plan.timing))
    return background, tuple(objects)


def sample_parallel_path(rng, plan, path):
    """Samples the path of another object that moves alike."""
    center = [rng.uniform(-0.8, 0.8) * h for h in plan.half]
    if plan.direction:  # they cross the frame together
        center[plan.axis] = path.center[plan.axis] + rng.uniform(-0.4, 0.4)
    angle = path.angle + (rng.uniform(0, 2 * math.pi) if plan.turning else 0)
    return replace(path, center=tuple(center), angle=angle)


def sample_background(rng, plan, *, moving):
    """Samples a background layer; returns it and its colors."""
    first = rng.uniform(0, 0.2, 3) if plan.settings.bright_on_dark else sample_color(rng)
    if not plan.hard or (not moving and chance(rng, 0.3)):
        colors = plane(first).expand(3, 4, 4)
        return opaque(colors, Path(half_size=1.0), Timing()), [first]
    second = np.clip(first + rng.uniform(-1, 1, 3) * rng.uniform(0.05, 0.6), 0, 1)
    texture = draw_texture(rng, str(rng.choice(plan.settings.textures)), SCENE_SIDE, first, second)
    center = tuple(rng.uniform(-0.3, 0.3, 2))
    path = Path(center, half_size=rng.uniform(0.8, 1.6), angle=rng.uniform(0, 2 * math.pi))
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
    """Samples a path that makes the motion visible within the frame."""
    diameter = log_uniform(rng, max(smallest, plan.settings.size[0]), plan.settings.size[1])
    if textured and chance(rng, 0.2):
        diameter = rng.uniform(0.7, 1.5)  # fills most of the frame
    spread = plan.settings.off_center
    center = tuple(rng.uniform(-spread, spread) * max(h - diameter / 2, 0.05) for h in plan.half)
    angle = rng.uniform(0, 2 * math.pi) if chance(rng, 0.6) else 0.0
    path = Path(center, half_size=diameter / 2, angle=angle)
    if plan.direction:
        return add_translation(rng, plan, path, wrap=wrap)
    return add_turn(rng, plan, path, repeats) if plan.turning else add_growth(rng, plan, path)


def add_translation(rng, plan, path, *, wrap):
    """Adds a translation: within the frame for most of the time, with a slight drift across."""
    half_side = plan.half[plan.axis]
    least, most = (share * 2 * half_side for share in plan.settings.shift)
    length = max(log_uniform(rng, least, most), 0.25 * path.half_size)
    length = min(length, max(least, 2 * half_side + 2 * path.half_size))
    drift = length * rng.uniform(-0.3, 0.3) if chance(rng, 0.4) else 0.0
    margin = max(half_side - length / 2, 0.24 * half_side)  # the range of the center at half time
    center = list(path.center)
    center[plan.axis] = rng.uniform(-margin, margin)
    path = replace(path, center=tuple(center))
    if chance(rng, 0.12):
        path = replace(path, log_growth=rng.uniform(-0.15, 0.15))
    if chance(rng, 0.12):
        path = replace(path, turn=rng.uniform(-0.35, 0.35))
    if wrap:  # up to three times as far, but less than half a period between frames
        period = 2 * half_side + 2 * path.half_size
        furthest = 0.28 * period / plan.timing.longest_step(plan.frames)
        length, drift = max(length * 0.5, min(length * rng.uniform(1, 3), furthest)), 0.0
    return replace(path, shift=along(plan, length, drift))


def add_growth(rng, plan, path):
    """Adds a change of size about the object's center or another point of it."""
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


def add_turn(rng, plan, path, repeats):
    """Adds a turn about the object's center or another point of it."""
    path = replace(path, turn=plan.sign * sample_turn(rng, plan, repeats))
    if chance(rng, 0.35):
        distance, direction = rng.uniform(0, 1.0), rng.uniform(0, 2 * math.pi)
        path = replace(path, pivot=(distance * math.cos(direction), distance * math.sin(direction)))
    if chance(rng, 0.2):
        path = replace(path, shift=tuple(rng.uniform(-0.04, 0.04, 2)))
    return path

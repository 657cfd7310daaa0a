#!/usr/bin/env python3
"""Draws the clips in scripts/demo/clips: one per label, named after it, in three container formats.

scripts/demo/draw_bundled_clips.py
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
import itertools
from dataclasses import replace

import numpy as np

from demo.encoding import Encoding, encode
from demo.motions import LABELS, Effects, render
from demo.scenes import EVALUATION, sample_scene

ENCODINGS = {  # by file suffix
    "mp4": Encoding("mp4", "libx264", (("crf", "28"),)),
    "webm": Encoding("webm", "libvpx-vp9", (("crf", "36"), ("b", "0"))),
    "mkv": Encoding("matroska", "libx264", (("crf", "28"),)),
}
FPS, FRAMES, SHORTER_SIDE = 24, 48, 160
MAX_BYTES = 60_000
# Easy for people to see: one large object on a plain background, at a moderate speed.
SETTINGS = replace(EVALUATION, plain_share=1.0, size=(0.3, 0.5), shift=(0.4, 0.8), turn_degrees=(90.0, 240.0))


def draw(label: str, suffix: str, *, seed: int) -> bytes:
    """Draws scenes of a label until the file is smaller than MAX_BYTES; returns its bytes."""
    for attempt in itertools.count():
        rng = np.random.default_rng((seed, LABELS.index(label), attempt))
        scene = replace(sample_scene(rng, label=label, settings=SETTINGS), effects=Effects())
        height, width = (2 * round(max(1, side) * SHORTER_SIDE / 2) for side in (1 / scene.aspect, scene.aspect))
        frames = render(scene, np.arange(FRAMES) / (FRAMES - 1), height=height, width=width)
        video = encode(frames, encoding=ENCODINGS[suffix], fps=FPS)
        if len(video) < MAX_BYTES:
            return video
    raise AssertionError("unreachable: itertools.count() does not end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "clips",
        metavar="DIR",
        help="default: scripts/demo/clips",
    )
    parser.add_argument("--seed", type=int, default=12, metavar="N", help="default: 12, which training does not use")
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    for label, suffix in zip(LABELS, itertools.cycle(ENCODINGS)):
        path = options.output / f"{label.replace(' ', '-')}.{suffix}"
        path.write_bytes(draw(label, suffix, seed=options.seed))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

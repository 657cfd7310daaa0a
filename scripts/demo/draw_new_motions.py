#!/usr/bin/env python3
"""Draws a data set with two motions that the demo model does not know, to try `vivit finetune`.

    scripts/demo/draw_new_motions.py --output new-motions

"bouncing" objects move there and back, in any direction; "swinging" objects turn there and back. --output gets a folder
of mp4 files for each.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from demo.encoding import Encoding, encode
from demo.motions import DIRECTIONS, render
from demo.scenes import TRAINING, Settings, sample_scene

ENCODING = Encoding("mp4", "libx264", (("crf", "28"), ("preset", "veryfast")))
FPS, FRAMES, SHORTER_SIDE = 16, 32, 96
MOTIONS = {"bouncing": tuple(DIRECTIONS), "swinging": ("turning clockwise", "turning counterclockwise")}
SETTINGS = replace(TRAINING, plain_share=1.0, size=(0.3, 0.6), shift=(0.3, 0.8), turn_degrees=(60.0, 180.0))


def draw(labels: Sequence[str], number: int, *, seed: int, settings: Settings = SETTINGS) -> bytes:
    """Draws a motion there and back.

    Args:
        labels: labels of the demo; one of them, chosen at random, is the motion there.
        number: of the video.
        seed: of the random scene, with `number`.
        settings: ranges of the scene.

    Returns:
        The bytes of an mp4 file.
    """
    rng = np.random.default_rng((seed, number))
    scene = sample_scene(rng, label=str(rng.choice(labels)), settings=settings)
    height, width = (2 * round(max(1, side) * SHORTER_SIDE / 2) for side in (1 / scene.aspect, scene.aspect))
    times = 1 - np.abs(1 - 2 * np.arange(FRAMES) / (FRAMES - 1))  # 0 to 1 and back to 0
    return encode(render(scene, times, height=height, width=width), encoding=ENCODING, fps=FPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--videos", type=int, default=60, metavar="N", help="of each motion (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    options = parser.parse_args()
    for motion, labels in MOTIONS.items():
        folder = options.output / motion
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(options.videos):
            (folder / f"{number:03}.mp4").write_bytes(draw(labels, number, seed=options.seed))
        print(f"{folder}: {options.videos} videos")


if __name__ == "__main__":
    main()

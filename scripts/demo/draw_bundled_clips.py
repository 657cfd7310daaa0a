"""Draws the clips in scripts/demo/clips: one per label, in three containers; the file's name tells the label.

python scripts/demo/draw_bundled_clips.py
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from demo.encoding import Encoding, encode
from demo.motions import LABELS, Effects, render
from demo.scenes import EVALUATION, sample_scene

ENCODINGS = {
    "mp4": Encoding("mp4", "libx264", (("crf", "28"),)),
    "webm": Encoding("webm", "libvpx-vp9", (("crf", "36"), ("b", "0"))),
    "mkv": Encoding("matroska", "libx264", (("crf", "28"),)),
}
FPS, FRAMES, SHORTER_SIDE = 24, 48, 160
MOST_BYTES = 60_000
# For people to look at: one thing of a good size on a plain ground, that does not turn too fast to follow.
SETTINGS = replace(EVALUATION, plain_share=1.0, size=(0.3, 0.5), shift=(0.4, 0.8), turn_degrees=(90.0, 240.0))


def draw(label, ending, *, seed):
    """The first clip of a label that stays small, as the bytes of a file."""
    for attempt in itertools.count():
        rng = np.random.default_rng((seed, LABELS.index(label), attempt))
        scene = replace(sample_scene(rng, label=label, settings=SETTINGS), effects=Effects())
        height, width = (2 * round(max(1, side) * SHORTER_SIDE / 2) for side in (1 / scene.aspect, scene.aspect))
        frames = render(scene, np.arange(FRAMES) / (FRAMES - 1), height=height, width=width)
        video = encode(frames, encoding=ENCODINGS[ending], fps=FPS)
        if len(video) < MOST_BYTES:
            return video


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "clips")
    parser.add_argument("--seed", type=int, default=12, help="not one that was trained on")
    options = parser.parse_args()
    options.output.mkdir(exist_ok=True)
    for label, ending in zip(LABELS, itertools.cycle(ENCODINGS)):
        path = options.output / f"{label.replace(' ', '-')}.{ending}"
        path.write_bytes(draw(label, ending, seed=options.seed))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

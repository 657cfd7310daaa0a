"""Measures a checkpoint on clips that it was not trained on, in real files and through the serving pipeline.

    python scripts/demo/evaluate.py --clips 1800
    python scripts/demo/evaluate.py --independent --clips 810

The first draws with other seeds, shapes, textures and ranges than training (EVALUATION in scenes.py), at 8 to
60 frames a second, over 0.5 to 8 seconds, up to 1280 pixels wide. The second has the tests' own renderer
draw, which shares no code with the one that was trained on.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script: its own package is the folder

from demo.encoding import encode, sample_encoding
from demo.motions import LABELS, render
from demo.scenes import EVALUATION, SAMPLED_FRAMES, sample_scene
from handler.classifier import VideoClassifier

MOST_PIXELS = 20_000_000  # of all frames of a clip: a large and long one takes seconds to draw


def sample_clip(seed, number):
    """A clip's file as bytes, its label, and the words that tell what kind of clip it is."""
    rng = np.random.default_rng((seed, number))
    label = LABELS[number % len(LABELS)]
    fps = int(rng.choice([8, 10, 12, 15, 24, 25, 30, 50, 60]))
    duration_s = math.exp(rng.uniform(math.log(0.5), math.log(8)))
    frame_count = max(4, round(fps * duration_s))
    scene = sample_scene(rng, label=label, settings=EVALUATION, frames=min(frame_count, SAMPLED_FRAMES))
    longest = int(math.exp(rng.uniform(math.log(64), math.log(1280))))
    longest = min(longest, int(math.sqrt(MOST_PIXELS / frame_count)))
    ratio = scene.aspect
    width, height = (longest, longest / ratio) if ratio >= 1 else (longest * ratio, longest)
    width, height = (max(32, 2 * round(side / 2)) for side in (width, height))
    encoding = sample_encoding(rng)
    frames = render(scene, np.arange(frame_count) / (frame_count - 1), height=height, width=width)
    kind = f"{len(scene.objects) or 'no'} object(s)"
    return encode(frames, encoding=encoding, fps=fps), label, (encoding.codec, encoding.container, kind)


def independent_clip(seed, number):
    """As sample_clip, from the tests' renderer: all labels in all of its styles by turns."""
    from demo import independent_renderer as renderer  # not a package of ours: found only where the repository is

    styles = renderer.PLAIN_STYLES + renderer.HARD_STYLES
    label, style = LABELS[number % len(LABELS)], styles[number // len(LABELS) % len(styles)]
    codec, container = (("libx264", "mp4"), ("libvpx", "webm"), ("libvpx-vp9", "matroska"))[number % 3]
    pictures = renderer.draw(label, style, f"{seed} {number}")
    fps = (25, 30)[number % 2]
    return (
        renderer.to_bytes(pictures, container=container, codec=codec, fps=fps),
        label,
        (codec, container, style),
    )


def evaluate(classifier, *, draw, seed, clips):
    """(label, best guess, kinds) of clips drawn by `draw(seed, number)`."""
    results = []
    for number in range(clips):
        video, label, kinds = draw(seed, number)
        guess, _ = classifier.classify(video, top_k=1).predictions[0]
        results.append((label, guess, kinds))
    return results


def report(results):
    """Accuracy overall, per label and per kind of clip, and what was taken for what, as text."""
    right = sum(label == guess for label, guess, _ in results)
    lines = [f"{right} of {len(results)} right: {right / len(results):.1%}", ""]
    table = Counter((label, guess) for label, guess, _ in results)
    for label in LABELS:
        row = {guess: table[label, guess] for guess in LABELS if table[label, guess]}
        total = sum(row.values())
        wrong = ", ".join(f"{count} {guess}" for guess, count in row.items() if guess != label)
        lines.append(f"{label:25} {row.get(label, 0) / total:6.1%} of {total}" + (f"; else {wrong}" if wrong else ""))
    lines.append("")
    for kind in sorted({kind for _, _, kinds in results for kind in kinds}):
        of_kind = [label == guess for label, guess, kinds in results if kind in kinds]
        lines.append(f"{kind:25} {sum(of_kind) / len(of_kind):6.1%} of {len(of_kind)}")
    return "\n".join(lines)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seed", type=int, default=1_000_003)
    parser.add_argument("--clips", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--independent", action="store_true", help="judge on the tests' own renderer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    classifier = VideoClassifier.from_pretrained(options.checkpoint)
    draw = independent_clip if options.independent else sample_clip
    print(report(evaluate(classifier, draw=draw, seed=options.seed, clips=options.clips)))


if __name__ == "__main__":
    main()

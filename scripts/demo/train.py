#!/usr/bin/env python3
"""Trains the demo's ViViT on clips drawn during training, with the training loop of `vivit finetune`.

    scripts/demo/train.py --out first --textures 0.8 --easy 0.2 --epochs 20 --batch-size 40 --learning-rate 1e-3
    scripts/demo/train.py --init first --out second --epochs 100 --batch-size 40 --learning-rate 8e-4

A randomly initialized transformer stays at chance for a long time if only motion distinguishes the classes. Two
measures shorten that: the tubelet embedding is initialized with a whitened cosine transform, so that changes over time
weigh as much as static content; and a part of the clips are textures that move as a whole (`moving_textures.py`), from
which every token learns.

B: clips, T: frames, S: side of the frame in pixels, T', H', W': tubelets along time, height and width, D: hidden size.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
import math
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch.nn import functional as F

from demo.drawn_clips import FRAMES, SIDE, DrawnClips, Kinds
from demo.motions import LABELS
from demo.moving_textures import draw_moving_textures
from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.cli.command import choose_device
from handler.cli.finetune import add_recipe_arguments, read_recipe
from handler.threads import available_cores
from handler.training.distributed import start_group
from handler.training.loop import fit

PATCH, TUBELET_FRAMES = 8, 8


def model_config():
    """Returns the demo's architecture: 2 x 8 x 8 tubelets of 8 frames x 8 x 8 pixels."""
    return VivitConfig(
        image_size=SIDE,
        num_frames=FRAMES,
        tubelet_size=(TUBELET_FRAMES, PATCH, PATCH),
        hidden_size=160,
        num_attention_heads=5,
        intermediate_size=480,
        num_hidden_layers=7,
        id2label=dict(enumerate(LABELS)),
    )


def image_processor():
    """Returns a processor that resizes the whole frame to a square, in [-1, 1]; a crop could hide a motion."""
    return VivitImageProcessor(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 127.5,
        offset=True,
        do_normalize=False,
    )


# Initialization


def cosines(length):
    """Returns orthonormal cosines of increasing frequency: float (length, length)."""
    positions = (torch.arange(length) + 0.5) * math.pi / length
    waves = torch.cos(torch.arange(length)[:, None] * positions)
    return waves / waves.norm(dim=1, keepdim=True)


@torch.no_grad()
def initialize(embedding, pixels):
    """Initializes the embedding with cosines instead of noise.

    The tubelet filters become the smoothest cosines in space, time and color, scaled to unit standard deviation over
    the clips `pixels`, float (B, T, 3, S, S). The position embeddings become random mixtures of sine waves along the
    three axes.
    """
    projection = embedding.projection
    hidden, _, depth, height, width = projection.weight.shape
    colors = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]]), dim=1)
    orders = np.ndindex(3, depth, height, width)
    orders = sorted(orders, key=lambda k: 4 * (k[0] > 0) + 0.5 * k[1] + k[2] + k[3])  # smooth and gray first
    along_t, along_y, along_x = cosines(depth), cosines(height), cosines(width)
    for number, (c, t, y, x) in enumerate(orders[:hidden]):
        waves = colors[c], along_t[t], along_y[y], along_x[x]
        projection.weight[number] = torch.einsum("c,t,y,x->ctyx", *waves)
    projection.bias.zero_()
    deviation = projection(pixels.transpose(1, 2)).transpose(0, 1).flatten(1).std(1)  # (D,)
    projection.weight /= deviation[:, None, None, None, None]

    grid = (pixels.shape[1] // depth, pixels.shape[3] // height, pixels.shape[4] // width)
    frequencies = math.pi / 2 * 1.4 ** torch.arange(hidden // 6)
    positions = torch.meshgrid(*(torch.arange(n) / n for n in grid), indexing="ij")
    positions = torch.stack(positions, -1)  # (T', H', W', 3)
    angles = (positions[..., None] * frequencies).flatten(3).flatten(0, 2)  # (T' H' W', D / 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    mix = torch.randn(waves.shape[1], hidden) / math.sqrt(waves.shape[1])
    embedding.position_embeddings[0, 1:] = 0.7 * waves @ mix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint and the state"
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="checkpoint of the demo to continue from")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--clips", type=int, default=4000, metavar="N", help="clips per epoch (default: 4000)")
    parser.add_argument("--textures", type=float, default=0.2, metavar="X", help="share of textures (default: 0.2)")
    parser.add_argument("--easy", type=float, default=0.0, metavar="X", help="share of easy scenes (default: 0)")
    add_recipe_arguments(parser)
    parser.set_defaults(recipe="none")  # drawn clips are augmented together with their labels
    options = parser.parse_args()
    recipe, kinds = read_recipe(options), Kinds(options.textures, options.easy)
    torch.manual_seed(recipe.seed)
    if options.init:
        model = VivitForVideoClassification.from_pretrained(options.init)
    else:
        model = VivitForVideoClassification(model_config())
        generator = torch.Generator().manual_seed(recipe.seed)
        initialize(model.vivit.embedding, draw_moving_textures(64, generator, frames=FRAMES, side=SIDE)[0])
    options.out.mkdir(parents=True, exist_ok=True)
    processes = available_cores()
    with (
        ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=signal.signal,  # Ctrl-C is for this process, which finishes its step first
            initargs=(signal.SIGINT, signal.SIG_IGN),
        ) as executor,
        start_group(choose_device(None)) as group,
    ):
        try:
            fit(
                model,
                image_processor(),
                train=DrawnClips(options.clips, seed=recipe.seed, kinds=kinds, executor=executor),
                evaluation=DrawnClips(440, seed=recipe.seed + 1, kinds=Kinds(), executor=executor),
                out=options.out,
                recipe=recipe,
                group=group,
                arguments={
                    "init": str(options.init),
                    "clips": options.clips,
                    "textures": options.textures,
                    "easy": options.easy,
                },
                threads=2 * processes,
                resume=options.resume,
            )
        except KeyboardInterrupt:
            sys.exit("stopped; the same command with --resume continues")


if __name__ == "__main__":
    main()

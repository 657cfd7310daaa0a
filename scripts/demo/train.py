"""Trains the demo's ViViT from scratch on clips that `motions.py` draws meanwhile, and saves its checkpoint.

    python scripts/demo/train.py --output scripts/demo/checkpoint

A transformer that starts from noise sits at chance for long when all that tells the classes apart is motion. Three
things bring it off: the tubelet embedding starts as a whitened cosine transform, so changes in time weigh as much as
what stands still; a second head, thrown away in the end, has every token say how far its part of the picture moves; and
whole pictures move first (`drifts.py`), objects come later.

B: clips, T: frames, S: the picture's side, T', H', W': tubelets along time, height, width, D: hidden size.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a script: its own package is the folder

from demo.drifts import draw_drifts
from demo.encoding import decode_all, encode, sample_encoding, squash
from demo.motions import LABELS, REVERSED, cell_flow, render
from demo.scenes import EASY, TRAINING, sample_scene
from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor

FRAMES, SIDE, PATCH, TUBELET_FRAMES = 16, 64, 8, 8
PARTS = 2  # a token says for PARTS x PARTS parts of its patch how far they move
CELLS = SIDE // PATCH * PARTS
FLOW_UNITS = (1 / 32, 1 / 32, 0.05, 0.2)  # two pixels, 5 % and 11 degrees a frame
MOST_FLOW = 3.0  # in these units
HINT_WEIGHT = 1.5
DRIFT_SHARE = 0.2  # of a batch, once objects have come
STANDING_WEIGHT = 0.1  # most parts of most pictures stand still: saying so of all must not pay
REPLAY = 6000  # clips kept to be shown again, otherwise augmented: drawing costs as much as learning

TURNS = ("turning clockwise", "turning counterclockwise")
DRAWN = (*LABELS, *TURNS)  # by turns: what is told apart last is seen most


def relabel(*swapped):
    """Class numbers after a transformation that swaps these pairs of labels."""
    table = {a: b for pair in swapped for a, b in (pair, pair[::-1])}
    return tuple(LABELS.index(table.get(label, label)) for label in LABELS)


REVERSE = tuple(LABELS.index(REVERSED[label]) for label in LABELS)
MIRROR = relabel(("moving left", "moving right"), TURNS)
FLIP = relabel(("moving up", "moving down"), TURNS)
TRANSPOSE = relabel(("moving left", "moving up"), ("moving right", "moving down"), TURNS)


@dataclass(frozen=True)
class Example:
    """clip uint8 (T, 3, S, S), class number, flow (T - 1, cells, cells, 4) as motions.cell_flow says it."""

    clip: torch.Tensor
    label: int
    flow: torch.Tensor
    easy: bool


def model_config():
    """The demo's architecture: 2 x 8 x 8 tubelets of 8 frames x 8 x 8 pixels."""
    return VivitConfig(
        image_size=SIDE,
        num_frames=FRAMES,
        tubelet_size=(TUBELET_FRAMES, PATCH, PATCH),
        hidden_size=160,
        num_attention_heads=5,
        intermediate_size=480,
        id2label=dict(enumerate(LABELS)),
    )


def image_processor():
    """The whole picture squashed to a square, in [-1, 1]: nothing of a motion falls outside a crop."""
    return VivitImageProcessor(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 127.5,
        offset=True,
        do_normalize=False,
    )


# Data


def sample_indices(rng, frame_count):
    """(T,) frames of a video, evenly over all of it: from the first to the last, or within T equal parts."""
    if rng.random() < 0.5:
        places = np.linspace(0, frame_count - 1, FRAMES)
    else:
        places = (np.arange(FRAMES) + rng.uniform(0.3, 0.7)) * frame_count / FRAMES - 0.5
    return np.clip(np.round(places), 0, frame_count - 1).astype(int)


def sample_size(rng, aspect):
    """Height and width of a small video in this shape, in pixels: even, as most codecs want it."""
    side = int(rng.integers(64, 133))
    ratios = {"height": 1 / aspect, "width": aspect}
    return {name: max(32, 2 * round(side * math.sqrt(ratio) / 2)) for name, ratio in ratios.items()}


class TrainingClips(Dataset):
    """Endless clips, each drawn from (seed, its number) alone; the first ones mostly easy."""

    def __init__(self, *, seed, count, easy_until=0):
        self.seed, self.count, self.easy_until = seed, count, easy_until

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        easy = rng.random() > index / self.easy_until if self.easy_until else False
        coded = not easy and rng.random() < 0.12
        few = rng.random() < 0.12
        frame_count = int(rng.integers(5, FRAMES) if few else rng.integers(FRAMES, 41 if coded else 200))
        label, settings = DRAWN[index % len(DRAWN)], EASY if easy else TRAINING
        scene = sample_scene(rng, label=label, settings=settings, frames=min(FRAMES, frame_count))
        size = sample_size(rng, scene.aspect)
        indices = sample_indices(rng, frame_count)
        moments = np.arange(frame_count) / (frame_count - 1)
        if coded:
            frames = render(scene, moments, **size)
            frames = decode_all(encode(frames, encoding=sample_encoding(rng), fps=int(rng.integers(8, 61))))
            clip = squash(frames[np.minimum(indices, len(frames) - 1)], SIDE)
        else:
            kept, again = np.unique(indices, return_inverse=True)
            clip = squash(render(scene, moments[kept], **size), SIDE)[torch.from_numpy(again)]
        return Example(clip, LABELS.index(label), cell_flow(scene, moments[indices], cells=CELLS), easy)


def augment(rng, example):
    """The example played backwards, mirrored, flipped, transposed, in other colours; its label goes along."""
    clip, label, flow = example.clip, example.label, example.flow
    if rng.random() < 0.5:
        clip, label, flow = clip.flip(0), REVERSE[label], -flow.flip(0)
    if rng.random() < 0.5:
        clip, label, flow = clip.flip(3), MIRROR[label], flow.flip(2) * torch.tensor([-1, 1, 1, -1])
    if rng.random() < 0.5:
        clip, label, flow = clip.flip(2), FLIP[label], flow.flip(1) * torch.tensor([1, -1, 1, -1])
    if rng.random() < 0.5:
        clip, label = clip.transpose(2, 3), TRANSPOSE[label]
        flow = flow.transpose(1, 2)[..., [1, 0, 2, 3]] * torch.tensor([1, 1, 1, -1])
    if rng.random() < 0.5:
        clip = clip[:, torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.5 and not example.easy:  # easy ones stay bright on dark
        clip = 255 - clip
    return replace(example, clip=clip, label=label, flow=flow)


class Replay:
    """New examples, mixed with augmented ones that were seen before."""

    def __init__(self, rng, capacity):
        self.rng, self.capacity, self.examples = rng, capacity, []

    def batch(self, fresh, size):
        """`size` augmented examples: the fresh ones, which replace random old ones, and old ones."""
        for example in fresh:
            if len(self.examples) < self.capacity:
                self.examples.append(example)
            else:
                self.examples[int(self.rng.integers(self.capacity))] = example
        old = [self.examples[k] for k in self.rng.integers(0, len(self.examples), size - len(fresh))]
        return [augment(self.rng, example) for example in (*fresh, *old)]


def to_pixels(clips):
    """uint8 clips -> float in [-1, 1], as the image processor scales them."""
    return torch.stack(clips).float() / 127.5 - 1  # (B, T, 3, S, S)


def to_token_flow(flow):
    """Flow between frames -> mean flow within each tubelet, of all parts of a token's patch."""
    steps = flow / torch.tensor(FLOW_UNITS)  # (B, T - 1, cells, cells, 4)
    steps = steps.clamp(-MOST_FLOW, MOST_FLOW)
    steps = torch.cat([steps, torch.full_like(steps[:, :1], math.nan)], 1)  # (B, T, cells, cells, 4)
    steps = steps.unflatten(1, (-1, TUBELET_FRAMES)).nanmean(2)  # (B, T', cells, cells, 4)
    parts = steps.unflatten(3, (-1, PARTS)).unflatten(2, (-1, PARTS))  # (B, T', H', PARTS, W', PARTS, 4)
    return parts.transpose(3, 4).flatten(4).flatten(1, 3)  # (B, T' H' W', 4 PARTS^2)


def flow_loss(flow, target):
    """How wrong the tokens are about the motion of their parts, above all where something moves."""
    weight = STANDING_WEIGHT + (target.abs() > 0.02).float()
    return (weight * F.smooth_l1_loss(flow, target, beta=0.2, reduction="none")).sum() / weight.sum()


# Start


def cosines(length):
    """(length, length) orthonormal cosines of rising frequency."""
    places = (torch.arange(length) + 0.5) * math.pi / length
    waves = torch.cos(torch.arange(length)[:, None] * places)
    return waves / waves.norm(dim=1, keepdim=True)


@torch.no_grad()
def initialise(embedding, pixels):
    """Starts the embedding from order instead of noise.

    Tubelet filters: the smoothest cosines in space, time and colour, each scaled to unit deviation over the
    clips `pixels` (B, T, 3, S, S). Positions: waves along the three axes, mixed.
    """
    projection = embedding.projection
    width, _, depth, height, breadth = projection.weight.shape
    colours = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]]), dim=1)
    orders = np.ndindex(3, depth, height, breadth)
    orders = sorted(orders, key=lambda k: 4 * (k[0] > 0) + 0.5 * k[1] + k[2] + k[3])  # smooth and grey first
    along_t, along_y, along_x = cosines(depth), cosines(height), cosines(breadth)
    for number, (c, t, y, x) in enumerate(orders[:width]):
        waves = colours[c], along_t[t], along_y[y], along_x[x]
        projection.weight[number] = torch.einsum("c,t,y,x->ctyx", *waves)
    projection.bias.zero_()
    deviation = projection(pixels.transpose(1, 2)).transpose(0, 1).flatten(1).std(1)  # (D,)
    projection.weight /= deviation[:, None, None, None, None]

    grid = (pixels.shape[1] // depth, pixels.shape[3] // height, pixels.shape[4] // breadth)
    frequencies = math.pi / 2 * 1.4 ** torch.arange(width // 6)
    places = torch.meshgrid(*(torch.arange(n) / n for n in grid), indexing="ij")
    places = torch.stack(places, -1)  # (T', H', W', 3)
    angles = (places[..., None] * frequencies).flatten(3).flatten(0, 2)  # (T' H' W', D / 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    mix = torch.randn(waves.shape[1], width) / math.sqrt(waves.shape[1])
    embedding.position_embeddings[0, 1:] = 0.7 * waves @ mix


@torch.no_grad()
def deepened(model, layers):
    """The model with so many layers; those on top of its own begin by passing on what they get."""
    deep = VivitForVideoClassification(replace(model.config, num_hidden_layers=layers))
    deep.load_state_dict(model.state_dict(), strict=False)
    for layer in deep.vivit.layers[len(model.vivit.layers) :]:
        for last in (layer.attention.output, layer.mlp.down):
            last.weight.zero_()
            last.bias.zero_()
    return deep


# Training


def learning_rate(step, options):
    """A linear warm-up, then half a cosine down to nothing."""
    return options.learning_rate * min(1, step / 150) * (1 + math.cos(math.pi * step / options.steps)) / 2


@torch.no_grad()
def accuracy(model, examples):
    """The share of examples whose label the model finds, overall and per class."""
    parts = [examples[k : k + 60] for k in range(0, len(examples), 60)]
    guesses = torch.cat([model(to_pixels([e.clip for e in part])).logits.argmax(1) for part in parts])
    labels = torch.tensor([e.label for e in examples])
    right = (guesses == labels).float()
    return right.mean().item(), [right[labels == k].mean().item() for k in range(len(LABELS))]


def train(options):
    """Trains for `options.steps` steps; writes the model to `options.output` on the way and in the end."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    shape = {"frames": FRAMES, "side": SIDE, "cells": CELLS}
    watched = TrainingClips(seed=options.seed + 1, count=450)
    watched = [watched[k] for k in range(len(watched))]
    if options.start:
        model = deepened(VivitForVideoClassification.from_pretrained(options.start), options.layers).train()
    else:
        model = VivitForVideoClassification(replace(model_config(), num_hidden_layers=options.layers))
        initialise(model.vivit.embedding, draw_drifts(64, generator, **shape)[0])
    head = nn.Linear(model.config.hidden_size, 4 * PARTS**2)  # the hint: how each token's parts move
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    clips = TrainingClips(seed=options.seed, count=options.steps * options.fresh, easy_until=options.easy_clips)
    loader = iter(DataLoader(clips, batch_size=options.fresh, num_workers=1, prefetch_factor=8, collate_fn=list))
    replay = Replay(rng, REPLAY)
    started, loss_mean, hint_mean = time.monotonic(), math.log(len(LABELS)), 0.0
    for step in range(1, options.steps + 1):
        drifts = options.batch if step <= options.drift_steps else round(DRIFT_SHARE * options.batch)
        pixels, labels, flow = draw_drifts(drifts, generator, **shape)
        if drifts < options.batch:
            batch = replay.batch(next(loader), options.batch - drifts)
            pixels = torch.cat([pixels, to_pixels([e.clip for e in batch])])  # (B, T, 3, S, S)
            labels = torch.cat([labels, torch.tensor([e.label for e in batch])])
            flow = torch.cat([flow, torch.stack([e.flow for e in batch])])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.vivit(pixels).last_hidden_state  # (B, N, D)
            logits, hints = model.classifier(tokens[:, 0]).float(), head(tokens[:, 1:]).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=0.03)
        hint = flow_loss(hints, to_token_flow(flow))
        optimizer.zero_grad()
        (loss + HINT_WEIGHT * hint).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss_mean += 0.02 * (loss.item() - loss_mean)
        hint_mean += 0.02 * (hint.item() - hint_mean)
        if step % 100 == 0 or step == options.steps:
            save(model, options.output)
            overall, per_class = accuracy(model, watched)
            elapsed_s = time.monotonic() - started
            print(f"{elapsed_s:6.0f} s  step {step}  loss {loss_mean:.3f}  hint {hint_mean:.4f}", end="  ")
            print(f"watched {overall:.3f} ", *(f"{share:.2f}" for share in per_class), flush=True)
    return model


def save(model, directory):
    """config.json, preprocessor_config.json and model.safetensors, as published checkpoints have them."""
    model.save_pretrained(directory)
    image_processor().save_pretrained(directory)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--layers", type=int, default=5, help="no fewer than the checkpoint to go on from has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=3, help="for training; one more process draws clips")
    parser.add_argument("--batch", type=int, default=40, help="clips a step")
    parser.add_argument("--fresh", type=int, default=16, help="newly drawn clips among them")
    parser.add_argument("--drift-steps", type=int, default=350, help="steps before objects come")
    parser.add_argument("--easy-clips", type=int, default=4000, help="drawn until none is easy any more")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Trains the demo's ViViT from scratch on clips drawn during training, and saves its checkpoint.

    scripts/demo/train.py --output scripts/demo/checkpoint

A randomly initialized transformer stays at chance for a long time if only motion distinguishes the classes. Three
measures shorten that: the tubelet embedding is initialized with a whitened cosine transform, so that changes over time
weigh as much as static content; an auxiliary head, which is not saved, predicts from each token the optical flow of
its patch; and training starts with textures that move as a whole (`moving_textures.py`) before objects appear.

B: clips, T: frames, S: side of the frame in pixels, N: tokens, T', H', W': tubelets along time, height and width,
D: hidden size.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the packages in scripts/ importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])
import _checkout  # noqa: F401, I001  (may restart the script with .venv/bin/python)

import argparse
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from demo.encoding import decode_all, encode, resize, sample_encoding
from demo.motions import LABELS, REVERSED, cell_flow, render
from demo.moving_textures import draw_moving_textures
from demo.scenes import EASY, TRAINING, sample_scene
from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor

FRAMES, SIDE, PATCH, TUBELET_FRAMES = 16, 64, 8, 8
PARTS = 2  # a token predicts the flow of PARTS x PARTS parts of its patch
CELLS = SIDE // PATCH * PARTS
FLOW_UNITS = (1 / 32, 1 / 32, 0.05, 0.2)  # two pixels, 5 % and 11 degrees per frame
MAX_FLOW = 3.0  # in these units
FLOW_LOSS_WEIGHT = 1.5
TEXTURE_SHARE = 0.2  # of a batch, after the first steps
MOTIONLESS_WEIGHT = 0.1  # most parts of most frames do not move; predicting no flow everywhere must be costly
REPLAY_CLIPS = 6000  # clips to repeat with other augmentations, because drawing a clip takes as long as a training step

TURNS = ("turning clockwise", "turning counterclockwise")
DRAWN_LABELS = (*LABELS, *TURNS)  # drawn in this order; turns, the hardest labels, twice as often


def relabel(*swapped):
    """Returns the class indices after a transformation that swaps these pairs of labels."""
    table = {a: b for pair in swapped for a, b in (pair, pair[::-1])}
    return tuple(LABELS.index(table.get(label, label)) for label in LABELS)


REVERSE = tuple(LABELS.index(REVERSED[label]) for label in LABELS)
MIRROR = relabel(("moving left", "moving right"), TURNS)
FLIP = relabel(("moving up", "moving down"), TURNS)
TRANSPOSE = relabel(("moving left", "moving up"), ("moving right", "moving down"), TURNS)


@dataclass(frozen=True)
class Example:
    """A training example.

    Attributes:
        clip: uint8 (T, 3, S, S).
        label: Class index.
        flow: float (T - 1, cells, cells, 4), see motions.cell_flow.
        easy: Whether it was drawn with the settings EASY.
    """

    clip: torch.Tensor
    label: int
    flow: torch.Tensor
    easy: bool


def model_config():
    """Returns the demo's architecture: 2 x 8 x 8 tubelets of 8 frames x 8 x 8 pixels."""
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


# Data


def sample_indices(rng, frame_count):
    """Samples T frames uniformly: from the first to the last, or one from each of T equal parts."""
    if rng.random() < 0.5:
        positions = np.linspace(0, frame_count - 1, FRAMES)
    else:
        positions = (np.arange(FRAMES) + rng.uniform(0.3, 0.7)) * frame_count / FRAMES - 0.5
    return np.clip(np.round(positions), 0, frame_count - 1).astype(int)


def sample_size(rng, aspect):
    """Samples the height and width of a small video in pixels, even because most codecs require it."""
    side = int(rng.integers(64, 133))
    ratios = {"height": 1 / aspect, "width": aspect}
    return {name: max(32, 2 * round(side * math.sqrt(ratio) / 2)) for name, ratio in ratios.items()}


class TrainingClips(Dataset):
    """Clips that are drawn on access; clip `index` depends only on the seed and the index.

    Args:
        seed: Seed of all clips.
        count: Number of clips.
        easy_until: The share of easy clips falls linearly from all to none at this index.
    """

    def __init__(self, *, seed, count, easy_until=0):
        self.seed, self.count, self.easy_until = seed, count, easy_until

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        easy = rng.random() > index / self.easy_until if self.easy_until else False
        encoded = not easy and rng.random() < 0.12
        short = rng.random() < 0.12
        frame_count = int(rng.integers(5, FRAMES) if short else rng.integers(FRAMES, 41 if encoded else 200))
        label, settings = DRAWN_LABELS[index % len(DRAWN_LABELS)], EASY if easy else TRAINING
        scene = sample_scene(rng, label=label, settings=settings, frames=min(FRAMES, frame_count))
        size = sample_size(rng, scene.aspect)
        indices = sample_indices(rng, frame_count)
        times = np.arange(frame_count) / (frame_count - 1)
        if encoded:
            frames = render(scene, times, **size)
            frames = decode_all(encode(frames, encoding=sample_encoding(rng), fps=int(rng.integers(8, 61))))
            clip = resize(frames[np.minimum(indices, len(frames) - 1)], SIDE)
        else:
            unique, inverse = np.unique(indices, return_inverse=True)
            clip = resize(render(scene, times[unique], **size), SIDE)[torch.from_numpy(inverse)]
        return Example(clip, LABELS.index(label), cell_flow(scene, times[indices], cells=CELLS), easy)


def augment(rng, example):
    """Randomly reverses, mirrors, flips, transposes and recolors the example, and adapts label and flow."""
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
    if rng.random() < 0.5 and not example.easy:  # easy clips stay bright on dark
        clip = 255 - clip
    return replace(example, clip=clip, label=label, flow=flow)


class Replay:
    """A buffer of earlier examples, which are mixed with new ones."""

    def __init__(self, rng, capacity):
        self.rng, self.capacity, self.examples = rng, capacity, []

    def batch(self, fresh, size):
        """Stores the fresh examples, replacing random ones, and returns `size` augmented fresh and stored ones."""
        for example in fresh:
            if len(self.examples) < self.capacity:
                self.examples.append(example)
            else:
                self.examples[int(self.rng.integers(self.capacity))] = example
        stored = [self.examples[k] for k in self.rng.integers(0, len(self.examples), size - len(fresh))]
        return [augment(self.rng, example) for example in (*fresh, *stored)]


def to_pixels(clips):
    """Stacks uint8 clips and scales them to [-1, 1] like the image processor: float (B, T, 3, S, S)."""
    return torch.stack(clips).float() / 127.5 - 1  # (B, T, 3, S, S)


def to_token_flow(flow):
    """Averages the flow between frames over each tubelet: float (B, T' H' W', 4 PARTS^2)."""
    steps = flow / torch.tensor(FLOW_UNITS)  # (B, T - 1, cells, cells, 4)
    steps = steps.clamp(-MAX_FLOW, MAX_FLOW)
    steps = torch.cat([steps, torch.full_like(steps[:, :1], math.nan)], 1)  # (B, T, cells, cells, 4)
    steps = steps.unflatten(1, (-1, TUBELET_FRAMES)).nanmean(2)  # (B, T', cells, cells, 4)
    parts = steps.unflatten(3, (-1, PARTS)).unflatten(2, (-1, PARTS))  # (B, T', H', PARTS, W', PARTS, 4)
    return parts.transpose(3, 4).flatten(4).flatten(1, 3)  # (B, T' H' W', 4 PARTS^2)


def flow_loss(flow, target):
    """Returns the error of the predicted flow; parts that move have a larger weight."""
    weight = MOTIONLESS_WEIGHT + (target.abs() > 0.02).float()
    return (weight * F.smooth_l1_loss(flow, target, beta=0.2, reduction="none")).sum() / weight.sum()


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


@torch.no_grad()
def deepened(model, layers):
    """Returns a copy of the model with `layers` layers; the new ones start as identities."""
    deep = VivitForVideoClassification(replace(model.config, num_hidden_layers=layers))
    deep.load_state_dict(model.state_dict(), strict=False)
    for layer in deep.vivit.layers[len(model.vivit.layers) :]:
        for last in (layer.attention.output, layer.mlp.down):
            last.weight.zero_()
            last.bias.zero_()
    return deep


# Training


def learning_rate(step, options):
    """Returns the learning rate at a step: linear warm-up, then cosine decay to 0."""
    return options.learning_rate * min(1, step / 150) * (1 + math.cos(math.pi * step / options.steps)) / 2


@torch.no_grad()
def accuracy(model, examples):
    """Returns the accuracy overall and per class."""
    parts = [examples[k : k + 60] for k in range(0, len(examples), 60)]
    predicted = torch.cat([model(to_pixels([e.clip for e in part])).logits.argmax(1) for part in parts])
    labels = torch.tensor([e.label for e in examples])
    correct = (predicted == labels).float()
    return correct.mean().item(), [correct[labels == k].mean().item() for k in range(len(LABELS))]


def train(options):
    """Trains for `options.steps` steps; writes a checkpoint to `options.output` every 100 steps and at the end."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    shape = {"frames": FRAMES, "side": SIDE, "cells": CELLS}
    validation = list(TrainingClips(seed=options.seed + 1, count=450))
    if options.start:
        model = deepened(VivitForVideoClassification.from_pretrained(options.start), options.layers).train()
    else:
        model = VivitForVideoClassification(replace(model_config(), num_hidden_layers=options.layers))
        initialize(model.vivit.embedding, draw_moving_textures(64, generator, **shape)[0])
    head = nn.Linear(model.config.hidden_size, 4 * PARTS**2)  # the auxiliary head
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    clips = TrainingClips(seed=options.seed, count=options.steps * options.fresh, easy_until=options.easy_clips)
    loader = iter(DataLoader(clips, batch_size=options.fresh, num_workers=1, prefetch_factor=8, collate_fn=list))
    replay = Replay(rng, REPLAY_CLIPS)
    start_s, loss_mean, flow_loss_mean = time.monotonic(), math.log(len(LABELS)), 0.0
    for step in range(1, options.steps + 1):
        texture_count = options.batch if step <= options.drift_steps else round(TEXTURE_SHARE * options.batch)
        pixels, labels, flow = draw_moving_textures(texture_count, generator, **shape)
        if texture_count < options.batch:
            batch = replay.batch(next(loader), options.batch - texture_count)
            pixels = torch.cat([pixels, to_pixels([e.clip for e in batch])])  # (B, T, 3, S, S)
            labels = torch.cat([labels, torch.tensor([e.label for e in batch])])
            flow = torch.cat([flow, torch.stack([e.flow for e in batch])])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.vivit(pixels).last_hidden_state  # (B, N, D)
            logits, predicted_flow = model.classifier(tokens[:, 0]).float(), head(tokens[:, 1:]).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=0.03)
        auxiliary_loss = flow_loss(predicted_flow, to_token_flow(flow))
        optimizer.zero_grad()
        (loss + FLOW_LOSS_WEIGHT * auxiliary_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss_mean += 0.02 * (loss.item() - loss_mean)
        flow_loss_mean += 0.02 * (auxiliary_loss.item() - flow_loss_mean)
        if step % 100 == 0 or step == options.steps:
            save(model, options.output)
            overall, per_class = accuracy(model, validation)
            elapsed_s = time.monotonic() - start_s
            print(f"{elapsed_s:6.0f} s  step {step}  loss {loss_mean:.3f}  flow loss {flow_loss_mean:.4f}", end="  ")
            print(f"validation {overall:.3f} ", *(f"{share:.2f}" for share in per_class), flush=True)
    return model


def save(model, directory):
    """Writes config.json, preprocessor_config.json and model.safetensors."""
    model.save_pretrained(directory)
    image_processor().save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint", metavar="DIR")
    parser.add_argument("--start", type=Path, metavar="DIR", help="checkpoint to continue from")
    parser.add_argument("--layers", type=int, default=5, help="at least the layers of --start (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, default=2800, help="training steps (default: 2800)")
    parser.add_argument(
        "--threads", type=int, default=3, help="torch threads; one more process draws clips (default: 3)"
    )
    parser.add_argument("--batch", type=int, default=40, help="clips per step (default: 40)")
    parser.add_argument("--fresh", type=int, default=16, help="newly drawn clips per step (default: 16)")
    parser.add_argument(
        "--drift-steps", type=int, default=350, help="first steps, with moving textures only (default: 350)"
    )
    parser.add_argument(
        "--easy-clips", type=int, default=4000, help="number of clips after which none is easy (default: 4000)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="maximum learning rate (default: 1e-3)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

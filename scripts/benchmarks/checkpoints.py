"""Checkpoints of three sizes to measure, their input clips, and the arguments that select size, device and dtype."""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

from benchmarks.videos import draw_clip
from handler.assets import DEMO_CHECKPOINT
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.threads import available_cores

CONFIGS = {
    "base": VivitConfig(num_labels=400),  # ViViT-B/16x2 as published for Kinetics-400
    "tiny": VivitConfig(  # to check that the benchmark works; its numbers are meaningless
        image_size=32,
        num_frames=8,
        tubelet_size=(2, 8, 8),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=9,
    ),
}
SIZES = (*CONFIGS, "demo")
# Letters in shapes: B clips, T frames, C channels, h and w pixels of the model's input.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="base",
        help="base: ViViT-B/16x2 with random weights; demo: scripts/demo/checkpoint (default: base)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is a GPU",
    )


def add_matmul_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--matmul-side",
        type=int,
        metavar="N",
        help="rows and columns of the matrices (default: 8192 on a GPU, 4096 on a CPU)",
    )


def matmul_side(arguments: argparse.Namespace) -> int:
    """Returns --matmul-side, by default large enough to reach the peak rate of the device."""
    return arguments.matmul_side or (8192 if arguments.device == "cuda" else 4096)


def add_model_arguments(parser: argparse.ArgumentParser, *, batches: str) -> None:
    """Adds --size, --device, --dtypes, --batches and --threads.

    Args:
        parser: The parser of a sub-command.
        batches: The default batch sizes, as a text for the help.
    """
    add_arguments(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        metavar="DTYPE",
        help="dtypes for inference (default: float32 and float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help=f"batch sizes for inference (default: {batches})"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        metavar="N",
        help="torch threads on a CPU (default: the available cores)",
    )


def load_config(size: str) -> VivitConfig:
    return VivitConfig.from_pretrained(_demo_checkpoint()) if size == "demo" else CONFIGS[size]


def save_checkpoint(size: str, directory: Path) -> Path:
    """Returns the directory of a checkpoint of this size.

    Args:
        size: One of SIZES.
        directory: Where to write a checkpoint with random weights. The demo's checkpoint is used in place.

    Raises:
        FileNotFoundError: The demo's checkpoint is missing.
    """
    if size == "demo":
        return _demo_checkpoint()
    config = CONFIGS[size]
    torch.manual_seed(0)
    model = VivitForVideoClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():  # also those initialized to zero: biases and position embeddings
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(directory)
    side = config.image_height
    VivitImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(directory)
    return directory


def _demo_checkpoint() -> Path:
    if not (DEMO_CHECKPOINT / "config.json").is_file():
        raise FileNotFoundError(f"expected a checkpoint in {DEMO_CHECKPOINT}, found none; --size base needs no files")
    return DEMO_CHECKPOINT


def draw_input_clips(config: VivitConfig, count: int) -> np.ndarray:
    """Draws a different scene per clip at the model's input size: uint8 (B, T, C, h, w)."""
    clips = [
        _draw_input_clip(config.num_frames, config.image_height, config.image_width, seed) for seed in range(count)
    ]
    return np.stack(clips).transpose(0, 1, 4, 2, 3).copy()  # (B, T, C, h, w)


@functools.cache  # drawing takes longer than a GPU's forward pass
def _draw_input_clip(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    return draw_clip(frames, height=height, width=width, seed=seed)

"""Models to measure, of three sizes, and what is fed to them."""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.clips import draw_clip
from handler.assets import DEMO_CHECKPOINT as DEMO
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor

CONFIGS = {
    "base": VivitConfig(num_labels=400),  # ViViT-B/16x2 as published for Kinetics-400
    "tiny": VivitConfig(  # for trying the instrument, not for numbers
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="base",
        help="base: ViViT-B/16x2, random weights; demo: scripts/demo/checkpoint (default: base)",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is a GPU",
    )


def config_of(size: str) -> VivitConfig:
    return VivitConfig.from_pretrained(_demo()) if size == "demo" else CONFIGS[size]


def save_checkpoint(size: str, directory: Path) -> Path:
    """The checkpoint's directory: the demo's own, or `directory`, where one with random weights is written.

    Raises FileNotFoundError where the demo's has not been trained yet.
    """
    if size == "demo":
        return _demo()
    config = CONFIGS[size]
    torch.manual_seed(0)
    model = VivitForVideoClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and positions too, which are zeros in a new model
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(directory)
    side = config.image_height
    VivitImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(directory)
    return directory


def _demo() -> Path:
    if not (DEMO / "config.json").is_file():
        raise FileNotFoundError(f"expected a checkpoint in {DEMO}, found none: --size base needs no files")
    return DEMO


def draw_clips(config: VivitConfig, count: int) -> np.ndarray:
    """Different scenes at the model's size: uint8 (count, T, C, h, w)."""
    scenes = [
        draw_clip(config.num_frames, height=config.image_height, width=config.image_width, seed=seed)
        for seed in range(count)
    ]
    return np.stack(scenes).transpose(0, 1, 4, 2, 3).copy()


def clip_flops(config: VivitConfig) -> int:
    """Floating point operations of a forward pass over one clip, a multiply-add counted as two.

    With N tokens (one of them CLS), D wide, an MLP I wide, L layers, P patches of p values and K labels:

        2 P p D + L (2 N D 3D + 2 N N D + 2 N N D + 2 N D D + 2 N D I + 2 N I D) + 2 D K
        embedding    QKV        scores    mix       output    MLP up    MLP down    classifier

    These are the matrix products; LayerNorms, softmax and activations add under 1 %. What a faster way leaves
    out is counted all the same: it is the task that is counted, not the way.
    """
    patches, dim, mlp = config.num_patches, config.hidden_size, config.intermediate_size
    tokens = 1 + patches
    tubelet_frames, tubelet_height, tubelet_width = config.tubelet_size
    values = config.num_channels * tubelet_frames * tubelet_height * tubelet_width
    attention = 2 * tokens * dim * 3 * dim + 4 * tokens * tokens * dim + 2 * tokens * dim * dim
    layer = attention + 4 * tokens * dim * mlp
    return 2 * patches * values * dim + config.num_hidden_layers * layer + 2 * dim * config.num_labels

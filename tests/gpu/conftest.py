"""Tests on a GPU. They are skipped where there is none.

VIVIT_TEST_DEVICE=cpu runs those that a CPU can run, to try the tests themselves.
"""

import os

import numpy as np
import pytest
import torch

from benchmarks.checkpoints import CONFIGS, draw_input_clips, save_checkpoint
from handler import VideoClassifier
from handler.options import HandlerOptions

DEVICE = os.environ.get("VIVIT_TEST_DEVICE", "cuda")


@pytest.hookimpl(trylast=True)  # after the markers have been added
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") and (DEVICE == "cuda" or item.get_closest_marker("needs_cuda")):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory):
    """ViViT-B/16x2 with random weights; on a CPU a small model."""
    return save_checkpoint("base" if DEVICE == "cuda" else "tiny", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def clips():
    """Four different clips for base_checkpoint, uint8 (1, T, C, h, w) each."""
    return list(draw_input_clips(CONFIGS["base" if DEVICE == "cuda" else "tiny"], 4)[:, None])


@pytest.fixture(scope="session")
def expected(base_checkpoint, clips):
    """Logits of the clips in float32 on the CPU, (4, labels)."""
    options = HandlerOptions(dtype="float32")
    return VideoClassifier.from_pretrained(base_checkpoint, options=options).logits(clips)


@pytest.fixture
def load(base_checkpoint, device):
    """A function that loads base_checkpoint on the device with these options."""

    def load_with(**options):
        return VideoClassifier.from_pretrained(base_checkpoint, options=HandlerOptions(**options), device=device)

    return load_with


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of logits (B, labels) from the expected ones, relative to their norm."""
    return float((logits - expected).norm() / expected.norm())


def repeated(clips: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` clips, which repeat."""
    return [clips[index % len(clips)] for index in range(count)]

"""Markers and fixtures for all tests."""

import os

import pytest
import torch
import transformers

from handler.kernels import cpuinfo

# Models compute in float32 on any processor, unless a test fakes other features.
cpuinfo.CPUINFO_WORDS -= frozenset().union(*cpuinfo.HALF_PRECISION_FEATURES.values())

# Test processes and TorchServe share the cores; no model here needs all of them.
torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_collection_modifyitems(items):
    """Marks tests by folder, `unit`, `server` or `gpu`, and runs unit tests first."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(folder if folder in ("server", "gpu") else "unit")
    items.sort(key=lambda item: item.get_closest_marker("unit") is None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small ViViT checkpoint saved by transformers: a model with random weights, nine labels, and a processor."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.VivitConfig(
        image_size=32,
        num_frames=8,
        tubelet_size=[2, 8, 8],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=9,
    )
    model = transformers.VivitForVideoClassification(config)
    # Large values everywhere, including biases, LayerNorms and positions, make different videos score differently.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    transformers.VivitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(
        directory
    )
    return directory

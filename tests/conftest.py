"""Fixtures that several test files share."""

import pytest
import torch
import transformers

# Tests run beside servers and beside each other's threads; no model here needs all cores.
torch.set_num_threads(min(2, torch.get_num_threads()))

START_SERVERS = ("test_benchmark", "test_fuzz", "test_hostile", "test_operations", "test_quickstart", "test_server")


def pytest_collection_modifyitems(items):
    """What is quick comes first."""
    items.sort(key=lambda item: item.path.stem in START_SERVERS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small checkpoint with random weights, saved by transformers: model and image processor."""
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
    for parameter in model.parameters():  # biases, LayerNorms and positions too, and large enough to tell videos apart
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    transformers.VivitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(
        directory
    )
    return directory

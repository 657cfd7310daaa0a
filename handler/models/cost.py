"""The cost of a model: its parameters, and the multiply-adds of a forward pass over one clip."""

import math

import torch

from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification


def count_parameters(config: VivitConfig) -> int:
    """Returns the number of parameters of the classification model."""
    with torch.device("meta"):
        model = VivitForVideoClassification(config)
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(config: VivitConfig) -> int:
    """Returns the multiply-adds of a forward pass over one clip. A floating-point operation is half of one.

    As in table 2 of the paper, these are the products of all tokens with the weights, and in attention those of queries
    and keys and of weights and values. LayerNorm, softmax and activations, less than 1 %, are not counted. A model that
    computes only CLS in the last layer is credited with all tokens, because this is the cost of the task.
    """
    time, height, width = config.grid
    hidden, space, cls = config.hidden_size, height * width, int(config.has_cls_token)
    patch_frames = 1 if config.tubelet_embedding == "uniform_frames" else config.tubelet_size[0]
    patch_values = config.num_channels * patch_frames * math.prod(config.tubelet_size[1:])
    total = config.num_patches * patch_values * hidden + hidden * config.num_labels

    def layer(sequences: int, length: int, *, attended: float, attentions: int = 1) -> int:
        """Multiply-adds of a layer in which each token attends to `attended` tokens, with all heads."""
        projections = 4 * attentions * hidden * hidden  # query, key, value, output
        mlp = 2 * hidden * config.intermediate_size
        return int(sequences * length * (projections + mlp + 2 * attended * hidden))

    layers = config.num_hidden_layers
    if config.attention_type == "spatiotemporal":
        return total + layers * layer(1, cls + time * space, attended=cls + time * space)
    if config.attention_type == "factorised_encoder":
        assert config.num_temporal_layers is not None
        temporal = config.num_temporal_layers * layer(1, cls + time, attended=cls + time)
        return total + layers * layer(time, cls + space, attended=cls + space) + temporal
    if config.attention_type == "factorised_self_attention":
        return total + layers * layer(time, space, attended=time + space, attentions=2)
    return total + layers * layer(time, space, attended=(time + space) / 2)

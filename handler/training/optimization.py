"""Optimizer, learning rate, precision and memory of a training run."""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from handler.training.options import Recipe
from handler.validation import ConfigError

MOMENTUM = 0.9


def learning_rate(step: int, recipe: Recipe, *, steps_per_epoch: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0: a cosine times a linear warm-up."""
    steps = recipe.epochs * steps_per_epoch
    warmup_steps = max(1.0, min(recipe.warmup_epochs, recipe.epochs / 4) * steps_per_epoch)
    warmup = min(1.0, (step + 1) / warmup_steps)
    assert recipe.learning_rate is not None
    return recipe.learning_rate * warmup * (1 + math.cos(math.pi * step / steps)) / 2


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype that layers compute in.

    Args:
        precision: see Recipe.
        device: where they compute.

    Raises:
        ConfigError: float16 without a GPU.
    """
    if precision != "auto":
        if precision == "float16" and device.type != "cuda":
            raise ConfigError(f"precision float16 needs a GPU, got {device}: use bfloat16 or float32")
        return cast(torch.dtype, getattr(torch, precision))
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Returns the optimizer of the trained weights. Biases, norms, CLS and position embeddings have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim in (2, 5)]
    others = [parameter for parameter in trained if parameter.ndim not in (2, 5)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=0.0)


def checkpoint_layers(model: nn.Module) -> None:
    """Makes the layers of all encoders recompute their activations in the backward pass."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

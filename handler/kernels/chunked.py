"""The MLP, a chunk of tokens at a time, so that its wide hidden layer stays in the cache of a core."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from handler.kernels.int8 import Int8Linear, split_blocks
from handler.kernels.parallel import MIN_PARALLEL_TOKENS, apply_in_chunks, chunk_count, is_inference_float32
from handler.models.layers import MLP

# Larger chunks do not fit the cache, smaller ones multiply slower.
MAX_CHUNK_TOKENS = 512


class ChunkedMLP(MLP):
    """An MLP that computes large inputs in chunks, in parallel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1]
        if (
            tokens < MIN_PARALLEL_TOKENS
            or self.training
            or _has_hooks(self.up, self.down)
            or not is_inference_float32(x)
        ):
            return super().forward(x)
        # The chunks of int8 layers must be the blocks that they quantize.
        split = split_blocks if isinstance(self.up, Int8Linear) else split_tokens
        return apply_in_chunks(super().forward, x, out_features=x.shape[-1], split=split)


def split_tokens(x: torch.Tensor) -> list[torch.Tensor]:
    """Splits (..., D) into equal chunks (n, D) of at most MAX_CHUNK_TOKENS, the same number for each torch thread."""
    x = x.view(-1, x.shape[-1])
    return list(x.tensor_split(chunk_count(len(x), max_tokens=MAX_CHUNK_TOKENS)))


def _has_hooks(*modules: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for module in modules for name in hooks) or bool(
        _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch lacks annotations
    )

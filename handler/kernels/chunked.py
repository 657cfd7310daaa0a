"""The MLP, a chunk of tokens at a time, so that its wide hidden layer stays in the cache of a core."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from handler.kernels.int8 import Int8Linear, split_blocks
from handler.kernels.onednn import GELU_ALGORITHMS, OnednnLinear
from handler.kernels.parallel import MIN_PARALLEL_TOKENS, apply_in_chunks, chunk_count, is_plain_inference
from handler.models.activations import ACTIVATIONS
from handler.models.layers import MLP

# Larger chunks do not fit the cache, smaller ones multiply slower.
MAX_CHUNK_TOKENS = 512


class ChunkedMLP(MLP):
    """An MLP that computes large inputs in chunks, in parallel, and GELU together with the first layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or _has_hooks(self.up, self.down) or not is_plain_inference(x):
            return super().forward(x)
        if x.numel() // x.shape[-1] < MIN_PARALLEL_TOKENS:
            return self._compute(x)
        # The chunks of int8 layers must be the blocks that they quantize.
        split = split_blocks if isinstance(self.up, Int8Linear) else split_tokens
        return apply_in_chunks(self._compute, x, out_features=x.shape[-1], split=split)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        """Computes (..., D) from (..., D)."""
        gelu = GELU_ALGORITHMS.get(ACTIVATIONS[self.hidden_act])
        if gelu is None or not isinstance(self.up, OnednnLinear) or not self.up.is_supported(x):
            return super().forward(x)
        output: torch.Tensor = self.down(self.up.multiply(x, gelu=gelu))
        return output


def split_tokens(x: torch.Tensor) -> list[torch.Tensor]:
    """Splits (..., D) into equal chunks (n, D) of at most MAX_CHUNK_TOKENS, the same number for each torch thread."""
    x = x.view(-1, x.shape[-1])
    return list(x.tensor_split(chunk_count(len(x), max_tokens=MAX_CHUNK_TOKENS)))


def _has_hooks(*modules: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for module in modules for name in hooks) or bool(
        _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch lacks annotations
    )

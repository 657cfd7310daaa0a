"""Int8 quantization: linear layers with 8-bit weights and activations."""

import math
import warnings

import torch
from torch import nn

from handler.kernels.cpuinfo import CPUINFO_WORDS
from handler.kernels.parallel import apply_in_chunks

# Smaller blocks round more finely, but multiply slower.
MAX_BLOCK_TOKENS = 256


class Int8Linear(nn.Module):
    """A linear layer that multiplies 8-bit integers.

    Weights have one scale per output. Activations have one scale and zero point per block of up to MAX_BLOCK_TOKENS
    tokens of one sequence: of a clip, or of a time step. Blocks depend on the length of sequences only, so the output
    for a clip does not depend on the other clips of a batch nor on the number of threads.

    Args:
        linear: the layer to quantize.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny).double() / 127
        zero_points = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch plans to remove quantized tensors
            weight = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes (..., N, out_features) from sequences (..., N, in_features)."""
        return apply_in_chunks(self._multiply, x, out_features=self.out_features, split=split_blocks)

    def _multiply(self, block: torch.Tensor) -> torch.Tensor:
        # Without VNNI the sum of two products must fit into 16 bits, so activations get 7 bits.
        reduce_range = "avx512_vnni" not in CPUINFO_WORDS
        output: torch.Tensor = torch.ops.quantized.linear_dynamic(block, self.packed, reduce_range=reduce_range)
        return output


def split_blocks(x: torch.Tensor) -> list[torch.Tensor]:
    """Splits each sequence of (..., N, D) into equal blocks (n, D) of at most MAX_BLOCK_TOKENS."""
    blocks = math.ceil(x.shape[-2] / MAX_BLOCK_TOKENS)
    return [block for sequence in x.view(-1, *x.shape[-2:]) for block in sequence.tensor_split(blocks)]


def quantize_linears(module: nn.Module) -> None:
    """Replaces every nn.Linear inside `module` by an Int8Linear, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)

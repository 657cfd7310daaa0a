"""Float32 linear layers and attention by oneDNN.

Torch multiplies float32 matrices with MKL, which uses AVX-512 only on Intel processors. oneDNN, which torch includes as
well, also uses it on AMD processors and is twice as fast there.
"""

from itertools import product

import torch
from torch import nn

from handler.kernels.cpuinfo import CPUINFO_WORDS
from handler.kernels.parallel import MIN_PARALLEL_TOKENS, is_inference_float32, run_parallel
from handler.models.layers import sdpa_attention

IS_FASTER = (
    {"AuthenticAMD", "avx512f"} <= CPUINFO_WORDS
    and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch lacks annotations
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch lacks annotations
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operator, which may be removed
)
# The attention scores of this many queries (3 MB for ViViT-B/16x2) stay in a core's cache until they are used.
MAX_BLOCK_QUERIES = 256


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear for a contiguous weight: (..., out_features) from (..., in_features)."""
    # Rows that are not contiguous would make oneDNN hundreds of times slower.
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return output


class OnednnLinear(nn.Linear):
    """nn.Linear by oneDNN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or not is_inference_float32(x):
            return super().forward(x)
        return linear(x, self.weight, self.bias)


def replace_linears(module: nn.Module) -> None:
    """Makes every nn.Linear child of `module` an OnednnLinear, in place."""
    for child in module.children():
        if type(child) is nn.Linear:
            child.__class__ = OnednnLinear  # a new module would lose hooks


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA by oneDNN for inference with many queries, otherwise by torch. See AttentionFunction."""
    batch, heads, queries, width = q.shape
    if training or queries < MIN_PARALLEL_TOKENS or not is_inference_float32(q):
        return sdpa_attention(q, k, v, dropout_prob=dropout_prob, training=training)
    k = (k * width**-0.5).contiguous()  # (B, h, N, d)
    v = v.transpose(2, 3).contiguous()  # (B, h, d, N)
    values = q.new_empty(batch, queries, heads, width)  # the order that the output layer reads

    def attend(clip: int, head: int) -> None:
        for start in range(0, queries, MAX_BLOCK_QUERIES):
            block = slice(start, start + MAX_BLOCK_QUERIES)
            weights = linear(q[clip, head, block], k[clip, head]).softmax(-1)  # (block, N)
            values[clip, block, head] = linear(weights, v[clip, head])  # (block, d)

    run_parallel(attend, product(range(batch), range(heads)))
    return values.transpose(1, 2), None  # (B, h, M, d)

"""Linear layers by oneDNN, with GELU, in the dtypes in which it is faster than torch's default; float32 attention.

Torch multiplies float32 matrices with MKL, which uses AVX-512 only on Intel processors. oneDNN, which torch includes as
well, also uses it on AMD processors and is twice as fast there. Torch multiplies half-precision matrices with oneDNN,
but reorders the weights and copies the bias for every product, and computes GELU on rounded values afterwards.
"""

import functools
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from handler.kernels.cpuinfo import CPUINFO_WORDS, half_precision_features
from handler.kernels.parallel import MIN_PARALLEL_TOKENS, is_plain_inference, run_parallel
from handler.models.activations import ACTIVATIONS
from handler.models.layers import sdpa_attention

# The attention scores of this many queries (3 MB for ViViT-B/16x2) stay in a core's cache until they are used.
MAX_BLOCK_QUERIES = 256

# The activation functions that oneDNN applies to the float32 sums of a product, before they are rounded.
GELU_ALGORITHMS = {ACTIVATIONS["gelu"]: "none", ACTIVATIONS["gelu_pytorch_tanh"]: "tanh"}


@functools.cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether linear layers of this dtype are faster by oneDNN on this processor."""
    if dtype is torch.float32:
        has_features = (
            {"AuthenticAMD", "avx512f"} <= CPUINFO_WORDS and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch lacks annotations
        )
    else:
        has_features = bool(half_precision_features(dtype))
    return has_features and works(dtype)


def works(dtype: torch.dtype) -> bool:
    """Whether this torch offers the private operators that this module uses, for `dtype` on this processor."""
    ones, bias = torch.ones(16, 16, dtype=dtype), torch.full((16,), -15, dtype=dtype)
    try:
        output = linear(ones, pack(ones), bias, gelu="tanh")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(output.float(), torch.tensor(0.8412), atol=0.01)  # GELU(1)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gelu: str | None = None
) -> torch.Tensor:
    """F.linear, and GELU if `gelu` is one of GELU_ALGORITHMS: (..., out_features) from (..., in_features).

    Args:
        weight: (out_features, in_features), contiguous or packed.
    """
    activation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    # Rows that are not contiguous would make oneDNN hundreds of times slower.
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, activation, [], algorithm)
    return output


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Copies a weight (out_features, in_features) to the order in which oneDNN reads it fastest."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), MIN_PARALLEL_TOKENS)
    return packed


class OnednnLinear(nn.Linear):
    """nn.Linear by oneDNN.

    Half-precision weights are kept a second time, packed.
    """

    _packed: tuple[object, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x) if self.is_supported(x) else super().forward(x)

    def is_supported(self, x: torch.Tensor) -> bool:
        """Whether `multiply` computes what the layer computes for `x` at the moment."""
        return not self.training and is_plain_inference(x) and x.dtype == self.weight.dtype and is_faster(x.dtype)

    def multiply(self, x: torch.Tensor, *, gelu: str | None = None) -> torch.Tensor:
        """The layer's output (..., out_features), after GELU if `gelu` is one of GELU_ALGORITHMS."""
        return linear(x, self._fastest_weight(), self.bias, gelu=gelu)

    def _fastest_weight(self) -> torch.Tensor:
        weight = self.weight
        if weight.dtype is torch.float32:
            return weight
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version)
        if self._packed is None or self._packed[0] != key:
            self._packed = key, pack(weight)
        return self._packed[1]

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}  # it cannot be pickled


def replace_linears(module: nn.Module) -> None:
    """Makes every nn.Linear child of `module` an OnednnLinear, in place."""
    for child in module.children():
        if type(child) is nn.Linear:
            child.__class__ = OnednnLinear  # a new module would lose hooks


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA by oneDNN for float32 inference with many queries, otherwise by torch. See AttentionFunction."""
    batch, heads, queries, width = q.shape
    if training or queries < MIN_PARALLEL_TOKENS or q.dtype is not torch.float32 or not is_plain_inference(q):
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

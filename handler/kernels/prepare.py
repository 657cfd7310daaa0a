"""Replaces the modules of a model by faster ones."""

import torch
from torch import nn

import handler.kernels.onednn as onednn
from handler.kernels.chunked import ChunkedMLP
from handler.kernels.int8 import quantize_linears
from handler.kernels.parallel import start_threads
from handler.models.layers import MLP, Attention, sdpa_attention


def prepare_for_inference(model: nn.Module, *, int8: bool = False) -> None:
    """Replaces modules of a float32, float16 or bfloat16 model on a CPU by faster ones, in place.

    Args:
        model: contains Attention and MLP modules.
        int8: whether to quantize the linear layers of these modules, which must be float32, to 8 bits. This cannot be
            undone, and the state dict loses their weights.
    """
    for module in list(model.modules()):
        if not isinstance(module, (Attention, MLP)):
            continue
        dtype = next(module.parameters()).dtype
        if int8:
            quantize_linears(module)
        elif onednn.is_faster(dtype):
            onednn.replace_linears(module)
        if isinstance(module, MLP):
            module.__class__ = ChunkedMLP  # a new module would lose hooks
        elif dtype is torch.float32 and onednn.is_faster(dtype) and module.attention_function is sdpa_attention:
            module.attention_function = onednn.attention
    start_threads()

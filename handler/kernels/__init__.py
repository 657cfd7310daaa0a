"""Faster ways to compute a model on a CPU, for inference only.

    prepare_for_inference   replaces modules of a loaded model
    start_threads           starts the threads that the replacements use

    parallel    tasks in threads that each use a single torch thread
    chunked     the MLP, a chunk of tokens at a time
    onednn      float32 linear layers and attention by oneDNN, where it is faster than MKL
    int8        quantized linear layers: 8-bit weights and activations

The replacements compute like the original modules in train mode, with gradients, under autocast, with hooks on their
submodules, and while they are traced or compiled. Except for int8, they keep the parameters and the state dict.
"""

from torch import nn

from handler.kernels import onednn
from handler.kernels.chunked import ChunkedMLP
from handler.kernels.int8 import quantize_linears
from handler.kernels.parallel import start_threads
from handler.models.layers import MLP, Attention, sdpa_attention

__all__ = ["prepare_for_inference", "start_threads"]


def prepare_for_inference(model: nn.Module, *, int8: bool = False) -> None:
    """Replaces modules of a float32 model on a CPU by faster ones, in place.

    Args:
        model: contains Attention and MLP modules.
        int8: whether to quantize the linear layers of these modules to 8 bits. This cannot be undone, and the state
            dict loses their weights.
    """
    for module in list(model.modules()):
        if not isinstance(module, (Attention, MLP)):
            continue
        if int8:
            quantize_linears(module)
        elif onednn.IS_FASTER:
            onednn.replace_linears(module)
        if isinstance(module, MLP):
            module.__class__ = ChunkedMLP  # a new module would lose hooks
        elif onednn.IS_FASTER and module.attention_function is sdpa_attention:
            module.attention_function = onednn.attention
    start_threads()

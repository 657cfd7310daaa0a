"""Faster ways to compute a model on a CPU, for inference only.

    choose_dtype            decides between float32 and half precision
    has_float16_range       whether a model's weights and activations fit into float16
    prepare_for_inference   replaces modules of a loaded model
    start_threads           starts the threads that the replacements use

    parallel    tasks in threads that each use a single torch thread
    chunked     the MLP, a chunk of tokens at a time
    onednn      linear layers and attention by oneDNN, where it is faster than torch's default
    int8        quantized linear layers: 8-bit weights and activations
    precision   how fast one layer is in each dtype, and which dtypes have the range for a model
    cpuinfo     the processor

The replacements compute like the original modules in train mode, with gradients, under autocast, with hooks on their
submodules, and while they are traced or compiled. Except for int8, they keep the parameters and the state dict.
"""

from handler.kernels.onednn import is_faster as is_onednn_faster
from handler.kernels.parallel import start_threads
from handler.kernels.precision import DtypeChoice, choose_dtype, has_float16_range
from handler.kernels.prepare import prepare_for_inference

__all__ = [
    "DtypeChoice",
    "choose_dtype",
    "has_float16_range",
    "is_onednn_faster",
    "prepare_for_inference",
    "start_threads",
]

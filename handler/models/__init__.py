"""ViViT models and their configuration.

This file and config.py import no torch, so that options and configurations can be read before torch is imported.
"""

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")

# The keys of activations.ACTIVATIONS.
ACTIVATION_NAMES = (
    "gelu",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

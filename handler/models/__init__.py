"""ViViT models and their configuration. This file imports no torch, because options.py imports it too."""

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")

"""ViViT models and their configuration. This file loads no torch: the deployment options read it too."""

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")

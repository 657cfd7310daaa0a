"""Checkpoints: where their files are found, how they are read and written, and how tensor names are converted.

hub      a local directory or a repository on the Hugging Face Hub; the errors of checkpoints
files    safetensors and PyTorch pickles, whole or sharded
names    published names of tensors and ours
flax     files that Flax wrote, without Flax
scenic   parameters of the original code, which uses Flax
"""

"""Loading, saving and initialization, for all models."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from handler.checkpoints.files import load_state_dict, save_state_dict
from handler.checkpoints.hub import HubOptions
from handler.checkpoints.names import match_state_dict
from handler.models.config import VivitConfig

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PretrainedModel(nn.Module):
    """Base class of the models: configuration, weight initialization, loading and saving."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        config: VivitConfig | None = None,
        attn_implementation: str = "sdpa",
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        add_pooling_layer: bool | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Loads a model from a local directory or a hub repository.

        Loading is strict: the weights must be exactly those of the model, except for a pooling layer or a classifier
        that the model does not have. To put a new head on a trained encoder, create a new model and set its `vivit` to
        `VivitModel.from_pretrained(name_or_path, add_pooling_layer=False)`.

        Args:
            name_or_path: a local directory or a hub id.
            config: replaces the checkpoint's config.json.
            attn_implementation: "sdpa" or "eager", see VivitModel.
            torch_dtype, dtype: two names of one option. None loads float32, whatever the files contain; "auto" keeps
                the dtype of the files; otherwise a floating point dtype or its name, such as "float16".
            add_pooling_layer: for VivitModel only. Default: whether the checkpoint has a pooling layer.
            **hub: see `handler.checkpoints.hub.fetch`.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            CheckpointError: the checkpoint is missing, unreadable or does not match the model.
            ValueError: an option is not valid.
        """
        if torch_dtype is not None and dtype is not None:
            raise ValueError("expected torch_dtype or dtype, got both: they are two names of one option")
        if config is None:
            config = VivitConfig.from_pretrained(name_or_path, **hub)
        state = load_state_dict(name_or_path, **hub)
        options: dict[str, Any] = {"attn_implementation": attn_implementation}
        if add_pooling_layer is not None:
            options["add_pooling_layer"] = add_pooling_layer
        with torch.device("meta"):  # allocates and initializes nothing, since the weights are replaced below
            model = cls._for_tensors(config, state, **options)
        state = match_state_dict(state, model.state_dict(), source=name_or_path)
        resolved_dtype = _resolve_dtype(torch_dtype or dtype, state)
        # The tensors of a safetensors file are memory-mapped. Copies keep the model unchanged when the file is
        # overwritten, for example by save_pretrained.
        state = {
            name: tensor.to(resolved_dtype, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors with the published names, which transformers reads too."""
        self.config.save_pretrained(directory, architecture=type(self).__name__)
        save_state_dict(self.state_dict(), directory)

    @classmethod
    def _for_tensors(cls, config: VivitConfig, names: Collection[str], **options: Any) -> Self:
        """Creates the model for a checkpoint with tensors of these names."""
        return cls(config, **options)

    def _init_weights(self, module: nn.Module) -> None:
        # On the meta device there is nothing to initialize, and torch would import its decompositions for it: 1 s.
        if isinstance(module, (nn.Linear, nn.Conv3d)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _resolve_dtype(dtype: torch.dtype | str | None, state: Mapping[str, torch.Tensor]) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":  # the widest one of mixed files, to lose no precision
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating point dtype such as 'float16', got {dtype!r}")
    return resolved

"""ViViT with joint space-time attention: model 1 of the paper, arXiv 2103.15691.

B  clips                H, W  pixels
T  frames of a clip     N  tokens of a clip, including CLS
C  color channels      D  hidden size
h  attention heads
"""

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
from handler.models import ATTENTION_IMPLEMENTATIONS
from handler.models.activations import ACTIVATIONS
from handler.models.config import VivitConfig
from handler.models.layers import Layer, TubeletEmbedding, run_layers
from handler.models.losses import classification_loss
from handler.models.outputs import VideoClassifierOutput, VivitOutput

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


class VivitModel(PretrainedModel):
    """The encoder: one token per tubelet, and CLS for the whole clip.

    Args:
        config: see VivitConfig.
        attn_implementation: "sdpa" uses torch's fused attention. "eager" computes attention step by step, which takes
            memory for weights of shape (B, h, N, N) and can return them.
        add_pooling_layer: whether to add a pooling layer on CLS.

    Raises:
        ValueError: attn_implementation is unknown.
    """

    def __init__(
        self, config: VivitConfig, *, attn_implementation: str = "sdpa", add_pooling_layer: bool = True
    ) -> None:
        super().__init__(config)
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            known = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(f"attn_implementation must be one of {known}, got {attn_implementation!r}")
        self.attn_implementation = attn_implementation
        self.embedding = TubeletEmbedding(config)
        self.layers = nn.ModuleList(
            Layer(config, attn_implementation=attn_implementation) for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = nn.Linear(config.hidden_size, config.pooler_output_size) if add_pooling_layer else None
        self.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        cls_only: bool = False,
    ) -> VivitOutput:
        """Encodes clips.

        Args:
            pixel_values: (B, T, C, H, W) of the model's dtype, as returned by VivitImageProcessor.
            interpolate_pos_encoding: whether to interpolate position embeddings, so that T, H and W may be other
                multiples of the tubelet than the configuration's.
            output_hidden_states: whether to return hidden states.
            output_attentions: whether to return attention weights; requires eager attention.
            cls_only: whether the last layer computes CLS only. last_hidden_state and the last of hidden_states are then
                (B, 1, D).

        Raises:
            ValueError: pixel_values has the wrong shape, or SDPA cannot return attention weights.
        """
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                "output_attentions requires attn_implementation='eager': "
                f"{self.attn_implementation!r} does not compute attention weights"
            )
        x = self.embedding(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)  # (B, N, D)
        encoded = run_layers(
            self.layers,
            x,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cls_only=cls_only,
        )
        x = self.layernorm(encoded.last_hidden_state)  # (B, N, D)
        pooled = None
        if self.pooler is not None:
            pooled = ACTIVATIONS[self.config.pooler_act](self.pooler(x[:, 0]))  # (B, pooler_output_size)
        return VivitOutput(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @classmethod
    def _for_tensors(
        cls,
        config: VivitConfig,
        names: Collection[str],
        *,
        add_pooling_layer: bool | None = None,
        **options: Any,
    ) -> Self:
        if add_pooling_layer is None:
            add_pooling_layer = any(name.startswith("vivit.pooler.") for name in names)
        return cls(config, add_pooling_layer=add_pooling_layer, **options)


class VivitForVideoClassification(PretrainedModel):
    """The encoder with a linear classifier on CLS. The arguments are those of VivitModel."""

    def __init__(self, config: VivitConfig, *, attn_implementation: str = "sdpa") -> None:
        super().__init__(config)
        self.vivit = VivitModel(config, attn_implementation=attn_implementation, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_weights(self.classifier)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> VideoClassifierOutput:
        """Classifies clips. `labels` is as in `classification_loss`; the rest and the errors as in VivitModel."""
        outputs = self.vivit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            # Only CLS feeds the classifier: this saves 7 % of the work of ViViT-B/16x2.
            cls_only=not (output_hidden_states or output_attentions),
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])  # (B, num_labels)
        loss = None
        if labels is not None:
            heads = self.config.label_heads
            loss = classification_loss(logits, labels, self.config.problem_type, label_heads=heads)
        return VideoClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _resolve_dtype(dtype: torch.dtype | str | None, state: Mapping[str, torch.Tensor]) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":  # the widest one of mixed files, to lose no precision
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating point dtype such as 'float16', got {dtype!r}")
    return resolved

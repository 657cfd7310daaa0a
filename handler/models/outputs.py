"""What the models return: by attribute, by name or by position, as in transformers.

B  clips            N  tokens of a sequence, including CLS
D  hidden size      h  attention heads
T'  time steps      S  tokens of a time step, including CLS if it has its own
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class ModelOutput(Mapping[str, Any]):
    """A model's outputs: `outputs.logits`, `outputs["logits"]` or `outputs[0]`.

    Names and positions skip the fields that are None, as in transformers.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values that are not None, in the order of the fields."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True, eq=False, kw_only=True)
class VivitOutput(ModelOutput):
    """Outputs of the encoder.

    Attributes:
        last_hidden_state: (B, N, D), after the final LayerNorm. The tokens are those of the clip, for the factorised
            encoder those of the time steps.
        pooler_output: (B, pooler_output_size); None without a pooling layer.
        hidden_states: num_hidden_layers + 1 tensors (B, N, D): the embedding and the output of each layer, the last
            one before the final LayerNorm. For the factorised encoder these are (B, T', S, D), and
            num_temporal_layers + 1 tensors (B, N, D) follow. None unless requested.
        attentions: the attention weights after dropout, in the order of computation. None unless requested.
            spatiotemporal: num_hidden_layers tensors (B, h, N, N).
            factorised_encoder: num_hidden_layers tensors (B, T', h, S, S), then num_temporal_layers (B, h, N, N).
            factorised_self_attention: two tensors for each layer, (B, S, h, T', T') along time and (B, T', h, S, S)
            along space, in the order of `attention_order`.
            factorised_dot_product: two tensors for each layer, (B, S, h / 2, T', T') and (B, T', h / 2, S, S).
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoClassifierOutput(ModelOutput):
    """Outputs of the classification model.

    Attributes:
        loss: a scalar; None without labels.
        logits: (B, num_labels).
        hidden_states, attentions: see VivitOutput.
        features: (B, D), see VivitForVideoClassification. None unless requested.
    """

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    features: torch.Tensor | None = None

"""What the models return: by attribute, by name or by position, as in transformers.

B  clips            N  tokens of a clip, including CLS
D  hidden size      h  attention heads
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
        last_hidden_state: (B, N, D), after the final LayerNorm.
        pooler_output: (B, pooler_output_size); None without a pooling layer.
        hidden_states: num_hidden_layers + 1 tensors (B, N, D): the embedding and the output of each layer, the last
            one before the final LayerNorm. None unless requested.
        attentions: num_hidden_layers tensors (B, h, N, N), the attention weights after dropout. None unless requested.
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
    """

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None

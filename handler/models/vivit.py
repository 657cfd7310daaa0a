"""The four ViViT models, arXiv 2103.15691: an encoder, and a classifier on it.

    pixels (B, T, C, H, W)
      -> tokens           TubeletEmbedding             (B, N, D), factorised (B, T', S, D)
      -> hidden states    layers, then layernorm       the same shape
      -> time steps       factorised encoder only: CLS or mean of each time step   (B, T', D)
      -> hidden states    TemporalEncoder, likewise                                (B, N, D)
      -> logits           CLS or mean, then classifier                             (B, num_labels)

    spatiotemporal               model 1, section 3.3.1: attention along all N tokens of a clip
    factorised_encoder           model 2, section 3.3.2: along the S tokens of each time step, then along time steps
    factorised_self_attention    model 3, section 3.3.3: along T', then along S, in each layer
    factorised_dot_product       model 4, section 3.3.4: along T' in half of the heads, along S in the others

B  clips                H, W  pixels
T  frames of a clip     T'  time steps: tubelets along time
C  color channels      S  tokens of a time step
h  attention heads      N  tokens of a sequence, including CLS
D  hidden size
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from handler.models import ATTENTION_IMPLEMENTATIONS
from handler.models.activations import ACTIVATIONS
from handler.models.config import VivitConfig
from handler.models.embedding import TemporalEmbedding, TubeletEmbedding
from handler.models.layers import SPACE, TIME, EncoderOutput, make_layers, run_layers
from handler.models.losses import classification_loss
from handler.models.outputs import VideoClassifierOutput, VivitOutput
from handler.models.pretrained import PretrainedModel

if TYPE_CHECKING:
    from typing_extensions import Self

# The axes of its tokens that each model attends along, see Attention. Layers of model 3 have an attention for each.
_ATTENTION_AXES = {
    "spatiotemporal": (1,),
    "factorised_encoder": (SPACE,),
    "factorised_self_attention": (TIME, SPACE),
    "factorised_dot_product": (TIME, SPACE),
}


class TemporalEncoder(nn.Module):
    """The second encoder of the factorised encoder: a transformer over the time steps of a clip (section 3.3.2)."""

    def __init__(self, config: VivitConfig, *, attn_implementation: str) -> None:
        super().__init__()
        assert config.num_temporal_layers is not None
        self.embedding = TemporalEmbedding(config)
        self.layers = make_layers(config, count=config.num_temporal_layers, attn_implementation=attn_implementation)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, **outputs: bool) -> EncoderOutput:
        """Encodes the vectors of time steps (B, T', D). The arguments and results are those of run_layers."""
        return run_layers(self.layers, self.embedding(x), **outputs)


class VivitModel(PretrainedModel):
    """The encoder of one of the four models: one token per tubelet, and CLS.

    Args:
        config: see VivitConfig.
        attn_implementation: "sdpa" uses torch's fused attention. "eager" computes attention step by step, which takes
            memory for the weights and can return them.
        add_pooling_layer: whether to add a pooling layer on CLS, or on the mean of the tokens.

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
        self.layers = make_layers(
            config,
            count=config.num_hidden_layers,
            attn_implementation=attn_implementation,
            axes=_ATTENTION_AXES[config.attention_type],
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal = None
        if config.attention_type == "factorised_encoder":
            self.temporal = TemporalEncoder(config, attn_implementation=attn_implementation)
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
                (B, 1, D). For the factorised encoder this applies to the last layer of both encoders.

        Raises:
            ValueError: pixel_values has the wrong shape, SDPA cannot return attention weights, or cls_only is given for
                a model without CLS.
        """
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                "output_attentions requires attn_implementation='eager': "
                f"{self.attn_implementation!r} does not compute attention weights"
            )
        if cls_only and not self.config.has_cls_token:
            raise ValueError("cls_only requires a model with a CLS token: this one has classifier_pooling 'mean'")
        requested = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        x = self.embedding(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)  # (B, N, D), (B, T', S, D)
        encoded = run_layers(self.layers, x, cls_only=cls_only, **requested)
        hidden_states, attentions = encoded.hidden_states, encoded.attentions
        x = self.layernorm(encoded.last_hidden_state)  # (B, N, D), (B, T', S, D)
        if self.temporal is not None:
            encoded = self.temporal(self.pool(x), cls_only=cls_only, **requested)
            hidden_states, attentions = hidden_states + encoded.hidden_states, attentions + encoded.attentions
            x = self.temporal.layernorm(encoded.last_hidden_state)  # (B, N, D)
        if self.config.has_token_grid:
            x, hidden_states = x.flatten(1, 2), tuple(state.flatten(1, 2) for state in hidden_states)  # (B, N, D)
        pooled = None
        if self.pooler is not None:
            pooled = ACTIVATIONS[self.config.pooler_act](self.pooler(self.pool(x)))  # (B, pooler_output_size)
        return VivitOutput(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Returns CLS, or the mean of the tokens of a model without CLS: (..., D) from (..., N, D)."""
        return x[..., 0, :] if self.config.has_cls_token else x.mean(-2)

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
    """The encoder with a linear classifier on CLS or the mean of the tokens. The arguments are those of VivitModel."""

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
        output_features: str | None = None,
    ) -> VideoClassifierOutput:
        """Classifies clips.

        Args:
            labels: see `classification_loss`.
            output_features: "pooled" returns the input of the classifier, CLS or the mean of the tokens after the last
                LayerNorm; "mean" returns the mean of the tokens other than CLS, which takes slightly longer.

        The other arguments and the errors are those of VivitModel.
        """
        outputs = self.vivit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            # Only CLS feeds the classifier: this saves 7 % of the work of ViViT-B/16x2.
            cls_only=self.config.has_cls_token
            and not (output_hidden_states or output_attentions or output_features == "mean"),
        )
        features = self.vivit.pool(outputs.last_hidden_state)  # (B, D)
        logits = self.classifier(features)  # (B, num_labels)
        if output_features == "mean":
            features = outputs.last_hidden_state[:, int(self.config.has_cls_token) :].mean(1)
        loss = None
        if labels is not None:
            heads = self.config.label_heads
            loss = classification_loss(logits, labels, self.config.problem_type, label_heads=heads)
        return VideoClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            features=None if output_features is None else features,
        )

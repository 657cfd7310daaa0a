"""The building blocks of the encoders: attention, MLP, layer, and a stack of layers.

B  clips                        D  hidden size
N  tokens of a sequence         h  attention heads of d = D / h channels each
T'  time steps of a clip        S  tokens of a time step
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from handler.models.activations import ACTIVATIONS
from handler.models.config import VivitConfig

# The axes of tokens (B, T', S, D).
TIME, SPACE = 1, 2

# CUDA's kernels take at most this many sequences at a time.
MAX_SDPA_SEQUENCES = 65535


class AttentionFunction(Protocol):
    """An implementation of scaled dot-product attention."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from M queries to N keys.

        Args:
            q: (B, h, M, d).
            k, v: (B, h, N, d).
            dropout_prob: of the attention weights, in training only.
            training: whether the module is in train mode.

        Returns:
            (B, h, M, d), and the attention weights (B, h, M, N) if the implementation computes them, otherwise None.
        """
        ...


def sdpa_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's fused attention, which never holds all weights in memory. See AttentionFunction."""
    dropout_prob = dropout_prob if training else 0.0
    if len(q) <= MAX_SDPA_SEQUENCES:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_prob), None
    parts = zip(*(torch.split(tensor, MAX_SDPA_SEQUENCES) for tensor in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_prob) for q, k, v in parts]), None


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in separate steps, which returns the weights after dropout. See AttentionFunction."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, M, N)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, dropout_prob, training)
    return weights @ v, weights  # (B, h, M, d), (B, h, M, N)


ATTENTION_FUNCTIONS: dict[str, AttentionFunction] = {"sdpa": sdpa_attention, "eager": eager_attention}


class Attention(nn.Module):
    """Multi-head self-attention along the axes of a grid of tokens.

    Args:
        config: see VivitConfig.
        attn_implementation: key of ATTENTION_FUNCTIONS.
        axes: of the tokens, (B, N, D) or (B, T', S, D). Each axis gets an equal share of the heads, which attend along
            it (section 3.3.4); the first heads along the first axis.

    Attributes:
        attention_function: the one that `attn_implementation` names. An inference kernel may replace it.
    """

    def __init__(self, config: VivitConfig, *, attn_implementation: str, axes: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.axes = axes
        self.heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attention_function = ATTENTION_FUNCTIONS[attn_implementation]
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, *, cls_only: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Attends from every token to all tokens of its sequence along each axis.

        Args:
            x: (B, N, D) or (B, T', S, D).
            cls_only: whether only CLS attends, the first token along the last axis.

        Returns:
            A tensor of the shape of `x`, with `cls_only` (B, 1, D) or (B, T', 1, D). For each axis the weights of eager
            attention, otherwise None: (B, h, N, N), (B, S, h, T', T') for time, (B, T', h, S, S) for space;
            with `cls_only` (B, h, 1, N) or (B, T', h, 1, S).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, ..., 3, h, d)
        groups = qkv.chunk(len(self.axes), dim=-2)  # (B, ..., 3, h / axes, d) for each axis
        attended, weights = zip(
            *(self._attend(group, axis, cls_only=cls_only) for axis, group in zip(self.axes, groups, strict=True))
        )
        values = attended[0] if len(attended) == 1 else torch.cat(attended, dim=-2)  # (B, ..., h, d)
        return self.output(values.flatten(-2)), weights  # (B, ..., D)

    def _attend(self, qkv: torch.Tensor, axis: int, *, cls_only: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes (B, ..., h, d) and the weights from queries, keys and values (B, ..., 3, h, d) of some heads."""
        # The axis moves beside the channels, and all axes before the heads become the batch.
        qkv = qkv.movedim((-3, axis), (0, -2))  # (3, B, [T' or S,] h, N, d)
        sequences = qkv.shape[1:-3]
        q, k, v = qkv.flatten(1, -4)  # 3 x (sequences, h, N, d)
        if cls_only:
            q = q[:, :, :1]  # (sequences, h, 1, d)
        values, weights = self.attention_function(q, k, v, dropout_prob=self.dropout_prob, training=self.training)
        values = values.view(*sequences, *values.shape[1:]).movedim(-2, axis)  # (B, ..., h, d)
        return values, None if weights is None else weights.view(*sequences, *weights.shape[1:])


class MLP(nn.Module):
    """Two linear layers with an activation in between, applied to each token separately."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes (..., D) from (..., D)."""
        output: torch.Tensor = self.down(ACTIVATIONS[self.hidden_act](self.up(x)))
        return output


class Layer(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each after a LayerNorm and with a residual (section 3.1).

    A layer of model 3 has two attentions, one along time and one along space (section 3.3.3).

    Args:
        config: see VivitConfig.
        attn_implementation: key of ATTENTION_FUNCTIONS.
        axes: of attention, see Attention.
        drop_path_prob: probability to drop a residual branch for a clip, in training (stochastic depth).
    """

    def __init__(
        self,
        config: VivitConfig,
        *,
        attn_implementation: str,
        axes: tuple[int, ...] = (1,),
        drop_path_prob: float = 0.0,
    ) -> None:
        super().__init__()

        def layernorm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

        def attention(*axes: int) -> Attention:
            return Attention(config, attn_implementation=attn_implementation, axes=axes)

        self.attention_order = config.attention_order
        if self.attention_order is None:
            self.layernorm_before, self.attention = layernorm(), attention(*axes)
        else:
            self.layernorm_time, self.attention_time = layernorm(), attention(TIME)
            self.layernorm_space, self.attention_space = layernorm(), attention(SPACE)
        self.layernorm_after = layernorm()
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path_prob = drop_path_prob

    @property
    def attentions(self) -> tuple[tuple[nn.LayerNorm, Attention], ...]:
        """The attentions in the order of computation, each with the LayerNorm before it."""
        if self.attention_order is None:
            return ((self.layernorm_before, self.attention),)
        time, space = (self.layernorm_time, self.attention_time), (self.layernorm_space, self.attention_space)
        return (time, space) if self.attention_order == "time_space" else (space, time)

    def forward(
        self, x: torch.Tensor, *, cls_only: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Computes the next hidden state. The arguments and results are those of Attention.

        The second result has the weights of all attentions in the order of computation.
        """
        all_weights: tuple[torch.Tensor | None, ...] = ()
        for layernorm, attention in self.attentions:
            attended, weights = attention(layernorm(x), cls_only=cls_only)
            x = self._add(x[..., :1, :] if cls_only else x, attended)
            all_weights += weights
        return self._add(x, self.mlp(self.layernorm_after(x))), all_weights

    def _add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """Adds a residual branch (B, ..., D). Branches that are not dropped are scaled up, to keep their mean."""
        branch = self.dropout(branch)
        if self.training and self.drop_path_prob > 0:
            kept = branch.new_ones(len(branch), *[1] * (branch.dim() - 1))  # (B, 1, ...)
            branch = branch * F.dropout(kept, self.drop_path_prob)
        return x + branch


def make_layers(
    config: VivitConfig, *, count: int, attn_implementation: str, axes: tuple[int, ...] = (1,)
) -> nn.ModuleList:
    """Creates the layers of one encoder. The probability to drop a branch grows linearly with the layer."""
    return nn.ModuleList(
        Layer(
            config,
            attn_implementation=attn_implementation,
            axes=axes,
            drop_path_prob=config.drop_path_rate * index / max(1, count - 1),
        )
        for index in range(count)
    )


class EncoderOutput(NamedTuple):
    """The result of a stack of layers, before the final LayerNorm.

    Attributes:
        last_hidden_state: (B, N, D) or (B, T', S, D).
        hidden_states: the input and each layer's output; empty unless requested.
        attentions: the weights of each attention, see Attention; empty unless requested.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]


def run_layers(
    layers: Iterable[nn.Module],
    x: torch.Tensor,
    *,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    cls_only: bool = False,
) -> EncoderOutput:
    """Runs tokens (B, N, D) or (B, T', S, D) through a stack of layers.

    Args:
        output_hidden_states: whether to return hidden states.
        output_attentions: whether to return attention weights; requires eager attention.
        cls_only: whether the last layer computes CLS only: (B, 1, D) or (B, T', 1, D).
    """
    layers = list(layers)
    hidden_states = [x] if output_hidden_states else []
    attentions: list[torch.Tensor] = []
    for index, layer in enumerate(layers, start=1):
        x, weights = layer(x, cls_only=cls_only and index == len(layers))
        if output_hidden_states:
            hidden_states.append(x)
        if output_attentions:
            attentions.extend(weights)
        del weights  # eager attention's weights are large: free them before the next layer
    return EncoderOutput(last_hidden_state=x, hidden_states=tuple(hidden_states), attentions=tuple(attentions))

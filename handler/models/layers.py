"""The building blocks of ViViT: tubelet embedding, attention, MLP and encoder layer.

B  clips                T', H', W'  tubelets along time, height and width
T  frames of a clip     N  tokens of a clip: CLS, then T' * H' * W' tubelets
C  color channels      D  hidden size
H, W  pixels            h  attention heads of d = D / h channels each
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from handler.models.activations import ACTIVATIONS
from handler.models.config import VivitConfig


class TubeletEmbedding(nn.Module):
    """Projects each tubelet of a clip to a token, prepends CLS and adds position embeddings (section 3.2)."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Conv3d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.tubelet_size,
            stride=config.tubelet_size,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, *, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Computes the tokens (B, N, D) of clips (B, T, C, H, W).

        Args:
            interpolate_pos_encoding: whether T, H and W may differ from the configuration.

        Raises:
            ValueError: the shape is not supported.
        """
        self._check_shape(tuple(pixel_values.shape), interpolate_pos_encoding)
        x = self.project_tubelets(pixel_values)  # (B, T', H', W', D)
        time, height, width = x.shape[1:4]
        positions = interpolate_positions(
            self.position_embeddings, grid=self.config.grid, new_grid=(time, height, width)
        )  # (1, N, D)
        x = x.flatten(1, 3)  # (B, N - 1, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        embedded: torch.Tensor = self.dropout(x + positions)
        return embedded

    def project_tubelets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projects the tubelets of clips (B, T, C, H, W), without positions, to (B, T', H', W', D)."""
        clips, frames, channels, height, width = pixel_values.shape
        t, h, w = self.config.tubelet_size
        x = pixel_values.reshape(clips, frames // t, t, channels, height // h, h, width // w, w)
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, T', H', W', C, t, h, w)
        # Tubelets do not overlap, so the convolution is one matrix product, which is much faster on some devices.
        grid = x.shape[1:4]
        x = x.flatten(4).flatten(1, 3)  # (B, N - 1, C * t * h * w)
        x = F.linear(x, self.projection.weight.flatten(1), self.projection.bias)  # (B, N - 1, D)
        return x.view(clips, *grid, -1)  # (B, T', H', W', D)

    def _check_shape(self, shape: tuple[int, ...], interpolate_pos_encoding: bool) -> None:
        config = self.config
        expected = (config.num_frames, config.num_channels, config.image_height, config.image_width)
        mismatch = f"expected pixel_values of shape (B, {', '.join(map(str, expected))}), got {shape}"
        if len(shape) != 5 or shape[2] != config.num_channels:
            raise ValueError(f"{mismatch}; the axes are (clips, frames, channels, height, width)")
        if shape[1:] != expected and not interpolate_pos_encoding:
            raise ValueError(f"{mismatch}; interpolate_pos_encoding=True allows other frames, height and width")
        lengths, tubelet = (shape[1], shape[3], shape[4]), config.tubelet_size
        if any(length < unit or length % unit for length, unit in zip(lengths, tubelet)):
            raise ValueError(f"expected frames, height and width in multiples of the tubelet {tubelet}, got {lengths}")


def interpolate_positions(
    positions: torch.Tensor, *, grid: tuple[int, int, int], new_grid: tuple[int, int, int]
) -> torch.Tensor:
    """Resizes position embeddings (1, N, D) from one (T', H', W') grid to another. CLS keeps its embedding.

    Both grids cover the same frame area and the same time span, so the cells' centers are aligned, not their corners.
    Height and width are interpolated bicubically within each time step, as is usual for vision transformers. Time is
    interpolated linearly: it has few steps, and a cubic would overshoot the learned values. An axis whose length stays
    the same is not changed.

    Returns:
        (1, 1 + T' * H' * W' of the new grid, D), of the same dtype. Half precision is interpolated in float32.
    """
    if new_grid == grid:
        return positions
    (time, height, width), channels = grid, positions.shape[-1]
    float_dtype = torch.promote_types(positions.dtype, torch.float32)
    table = positions[:, 1:].to(float_dtype).view(time, height, width, channels)  # (T', H', W', D)
    if new_grid[1:] != grid[1:]:
        table = table.permute(0, 3, 1, 2)  # (T', D, H', W')
        table = F.interpolate(table, size=new_grid[1:], mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)  # (T', H', W', D)
    if new_grid[0] != time:
        table = table.flatten(1).t()[None]  # (1, H' * W' * D, T')
        table = F.interpolate(table, size=new_grid[0], mode="linear", align_corners=False)
        table = table[0].t()  # (T', H' * W' * D)
    table = table.reshape(1, -1, channels).to(positions.dtype)  # (1, N - 1, D)
    return torch.cat([positions[:, :1], table], dim=1)  # (1, N, D)


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
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_prob if training else 0.0), None


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
    """Multi-head self-attention.

    Attributes:
        attention_function: the one that `attn_implementation` names. An inference kernel may replace it.
    """

    def __init__(self, config: VivitConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attention_function = ATTENTION_FUNCTIONS[attn_implementation]
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, *, cls_only: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends from every token to all tokens of its clip.

        Args:
            x: (B, N, D).
            cls_only: whether only CLS attends.

        Returns:
            (B, N, D), and the attention weights (B, h, N, N) of eager attention, otherwise None. With `cls_only`
            (B, 1, D) and (B, h, 1, N).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d)
        if cls_only:
            q = q[:, :, :1]  # (B, h, 1, d)
        values, weights = self.attention_function(q, k, v, dropout_prob=self.dropout_prob, training=self.training)
        return self.output(values.transpose(1, 2).flatten(2)), weights  # (B, N, D), (B, h, N, N)


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
    """Pre-norm transformer layer: attention and MLP, each after a LayerNorm and with a residual (section 3.1)."""

    def __init__(self, config: VivitConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, attn_implementation=attn_implementation)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, *, cls_only: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the next hidden state (B, N, D). The arguments and the second result are those of `Attention`."""
        attended, weights = self.attention(self.layernorm_before(x), cls_only=cls_only)
        x = (x[:, :1] if cls_only else x) + self.dropout(attended)  # (B, N, D)
        x = x + self.dropout(self.mlp(self.layernorm_after(x)))  # (B, N, D)
        return x, weights


class EncoderOutput(NamedTuple):
    """The result of a stack of layers, before the final LayerNorm.

    Attributes:
        last_hidden_state: (B, N, D).
        hidden_states: the input and each layer's output, or None.
        attentions: each layer's attention weights (B, h, N, N), or None.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


def run_layers(
    layers: Iterable[nn.Module],
    x: torch.Tensor,
    *,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    cls_only: bool = False,
) -> EncoderOutput:
    """Runs tokens (B, N, D) through a stack of layers.

    Args:
        output_hidden_states: whether to return hidden states.
        output_attentions: whether to return attention weights; requires eager attention.
        cls_only: whether the last layer computes CLS only: (B, 1, D).
    """
    layers = list(layers)
    hidden_states = [x] if output_hidden_states else []
    attentions: list[torch.Tensor] = []
    for index, layer in enumerate(layers, start=1):
        x, weights = layer(x, cls_only=cls_only and index == len(layers))  # (B, N, D), (B, h, N, N)
        if output_hidden_states:
            hidden_states.append(x)
        if output_attentions:
            attentions.append(weights)
        del weights  # eager attention's weights are large: free them before the next layer
    return EncoderOutput(
        last_hidden_state=x,
        hidden_states=tuple(hidden_states) if output_hidden_states else None,
        attentions=tuple(attentions) if output_attentions else None,
    )

"""From pixels to tokens (section 3.2 of the paper): projection of tubelets or patches, CLS and positions.

B  clips                T', H', W'  tubelets along time, height and width
T  frames of a clip     N  tokens of a sequence: CLS, if the model has it, then tubelets
C  color channels      D  hidden size
H, W  pixels            S  tokens of a time step: CLS, if it has its own, then H' * W' tubelets
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from handler.models.config import VivitConfig


class SequenceEmbedding(nn.Module):
    """CLS, if the model has it, and the position embeddings of a sequence.

    Args:
        config: see VivitConfig.
        grid: (T', H', W') of the sequence.
    """

    def __init__(self, config: VivitConfig, *, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid = grid
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.has_cls_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.has_cls_token + math.prod(grid), width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def add_cls_and_positions(self, x: torch.Tensor, *, grid: tuple[int, int, int]) -> torch.Tensor:
        """Computes (..., N, D) from the tubelets (..., T' * H' * W', D) of any `grid`."""
        positions = interpolate_positions(self.position_embeddings, grid=self.grid, new_grid=grid)  # (1, N, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(*x.shape[:-2], 1, -1), x], dim=-2)  # (..., N, D)
        embedded: torch.Tensor = self.dropout(x + positions)
        return embedded


class TemporalEmbedding(SequenceEmbedding):
    """Makes a sequence of the time steps of a clip, for the second of the factorised encoders (section 3.3.2)."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__(config, grid=(config.grid[0], 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes (B, N, D) from one vector for each time step, (B, T', D)."""
        return self.add_cls_and_positions(x, grid=(x.shape[1], 1, 1))


class TubeletEmbedding(SequenceEmbedding):
    """Projects each tubelet of a clip to a token, prepends CLS and adds position embeddings (section 3.2).

    The factorised encoder has CLS and positions for each time step; those of the other models are for the whole clip.
    """

    def __init__(self, config: VivitConfig) -> None:
        time, height, width = config.grid
        if config.attention_type == "factorised_encoder":
            time = 1
        super().__init__(config, grid=(time, height, width))
        self.config = config
        frames, height, width = config.tubelet_size
        self.patch = (1 if config.tubelet_embedding == "uniform_frames" else frames, height, width)
        self.projection = nn.Conv3d(config.num_channels, config.hidden_size, kernel_size=self.patch, stride=self.patch)

    def forward(self, pixel_values: torch.Tensor, *, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Computes the tokens of clips (B, T, C, H, W).

        Args:
            interpolate_pos_encoding: whether T, H and W may differ from the configuration.

        Returns:
            (B, N, D); with an attention type that is factorised (B, T', S, D).

        Raises:
            ValueError: the shape is not supported.
        """
        self._check_shape(tuple(pixel_values.shape), interpolate_pos_encoding)
        x = self.project_tubelets(pixel_values)  # (B, T', H', W', D)
        time, height, width = x.shape[1:4]
        if self.config.attention_type == "factorised_encoder":
            return self.add_cls_and_positions(x.flatten(2, 3), grid=(1, height, width))  # (B, T', S, D)
        x = self.add_cls_and_positions(x.flatten(1, 3), grid=(time, height, width))  # (B, N, D)
        return x.view(len(x), time, height * width, -1) if self.config.has_token_grid else x

    def project_tubelets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projects the tubelets of clips (B, T, C, H, W), without positions, to (B, T', H', W', D)."""
        if self.config.tubelet_embedding == "uniform_frames":
            frames = pixel_values.shape[1]
            indices = uniform_frame_indices(frames, count=frames // self.config.tubelet_size[0])
            pixel_values = pixel_values[:, indices]  # (B, T', C, H, W)
        clips, frames, channels, height, width = pixel_values.shape
        t, h, w = self.patch
        x = pixel_values.reshape(clips, frames // t, t, channels, height // h, h, width // w, w)
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, T', H', W', C, t, h, w)
        # Tubelets do not overlap, so the convolution is one matrix product, which is much faster on some devices.
        grid = x.shape[1:4]
        x = x.flatten(4).flatten(1, 3)  # (B, T' * H' * W', C * t * h * w)
        x = F.linear(x, self.projection.weight.flatten(1), self.projection.bias)  # (B, T' * H' * W', D)
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


def uniform_frame_indices(frames: int, *, count: int) -> list[int]:
    """Returns the indices of `count` of `frames` frames, at equal distances from each other and from both ends.

    All frames if `count` is their number.
    """
    if count == frames:
        return list(range(frames))
    return [round(number * frames / (count + 1)) for number in range(1, count + 1)]


def interpolate_positions(
    positions: torch.Tensor, *, grid: tuple[int, int, int], new_grid: tuple[int, int, int]
) -> torch.Tensor:
    """Resizes position embeddings (1, N, D) from one (T', H', W') grid to another. CLS, if any, keeps its embedding.

    Both grids cover the same frame area and the same time span, so the cells' centers are aligned, not their corners.
    Height and width are interpolated bicubically within each time step, as is usual for vision transformers. Time is
    interpolated linearly: it has few steps, and a cubic would overshoot the learned values. An axis whose length stays
    the same is not changed.

    Returns:
        (1, [1 +] T' * H' * W' of the new grid, D), of the same dtype. Half precision is interpolated in float32.
    """
    if new_grid == grid:
        return positions
    (time, height, width), channels = grid, positions.shape[-1]
    float_dtype = torch.promote_types(positions.dtype, torch.float32)
    cls_tokens = positions.shape[1] - math.prod(grid)  # 0 or 1
    table = positions[:, cls_tokens:].to(float_dtype).view(time, height, width, channels)  # (T', H', W', D)
    if new_grid[1:] != grid[1:]:
        table = table.permute(0, 3, 1, 2)  # (T', D, H', W')
        table = F.interpolate(table, size=new_grid[1:], mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)  # (T', H', W', D)
    if new_grid[0] != time:
        table = table.flatten(1).t()[None]  # (1, H' * W' * D, T')
        table = F.interpolate(table, size=new_grid[0], mode="linear", align_corners=False)
        table = table[0].t()  # (T', H' * W' * D)
    table = table.reshape(1, -1, channels).to(positions.dtype)  # (1, T' * H' * W', D)
    return torch.cat([positions[:, :cls_tokens], table], dim=1)  # (1, N, D)

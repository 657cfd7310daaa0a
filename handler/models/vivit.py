"""ViViT with spatio-temporal attention: model 1 of the paper, arXiv 2103.15691. Reads from the bottom up.

B  clips               T', H', W'  tubelets along time, height and width
T  frames of a clip    N  tokens: 1 + T' * H' * W', the first of them CLS
C  colour channels     D  hidden size
H, W  pixels           h  attention heads, each d = D / h wide
"""

import functools
import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from handler.checkpoints.files import load_state_dict, save_state_dict
from handler.checkpoints.names import match_state_dict
from handler.kernels import cpu
from handler.models import ATTENTION_IMPLEMENTATIONS
from handler.models.activations import ACTIVATIONS
from handler.models.config import VivitConfig


class ModelOutput(Mapping):
    """What a model returns: `outputs.logits`, `outputs["logits"]` or `outputs[0]`.

    By name and by number only what is not None is there, as in transformers.
    """

    def to_tuple(self) -> tuple:
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
    """
    last_hidden_state  (B, N, D), after the final LayerNorm
    pooler_output      (B, pooler_output_size), or None without a pooling layer
    hidden_states      None, or num_hidden_layers + 1 of (B, N, D): the embedding and what each layer gives,
                       the last one before the final LayerNorm
    attentions         None, or num_hidden_layers of (B, h, N, N); in training they have dropout applied
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoClassifierOutput(ModelOutput):
    """
    loss    a scalar, or None without labels
    logits  (B, num_labels)
    hidden_states, attentions  as in VivitOutput
    """

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


class TubeletEmbedding(nn.Module):
    """Cuts a clip into tubelets, makes a token of each, and adds CLS and positions (section 3.2)."""

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

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        self._check(tuple(pixel_values.shape), interpolate_pos_encoding)
        frames, height, width = self.config.tubelet_size
        x = pixel_values.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(1, (-1, frames))
        grid = (x.shape[1], x.shape[4], x.shape[6])
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7)  # (B, T', H', W', C, frames, height, width of a tubelet)
        # Tubelets do not overlap, so the convolution is one matrix product, which some devices are much faster at.
        x = x.flatten(4).flatten(1, 3)  # (B, N - 1, C * frames * height * width)
        x = F.linear(x, self.projection.weight.flatten(1), self.projection.bias)  # (B, N - 1, D)
        positions = interpolate_positions(self.position_embeddings, self.config.grid, grid)  # (1, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        return self.dropout(x + positions)

    def _check(self, shape: tuple[int, ...], interpolate_pos_encoding: bool) -> None:
        config = self.config
        own = (config.num_frames, config.num_channels, config.image_height, config.image_width)
        told = f"expected pixel_values of shape (B, {', '.join(map(str, own))}), got {shape}"
        if len(shape) != 5 or shape[2] != config.num_channels:
            raise ValueError(f"{told}; the axes are (clips, frames, channels, height, width)")
        if shape[1:] != own and not interpolate_pos_encoding:
            raise ValueError(f"{told}; interpolate_pos_encoding=True permits other frames, height and width")
        sides, units = (shape[1], shape[3], shape[4]), config.tubelet_size
        if any(side < unit or side % unit for side, unit in zip(sides, units)):
            raise ValueError(f"expected frames, height and width in multiples of the tubelet {units}, got {sides}")


def interpolate_positions(
    positions: torch.Tensor, grid: tuple[int, int, int], new_grid: tuple[int, int, int]
) -> torch.Tensor:
    """Position embeddings (1, N, D) of a (T', H', W') grid, made to fit another; CLS keeps its own.

    Both grids cover the same picture and the same span of time, so their cells' centres are aligned, and not
    their corners. Pictures are resized by a bicubic of each time step, the field's way with a ViT. Time is
    linear: there are few steps, and a cubic would overshoot what was learned. An axis that keeps its length
    keeps its values.
    """
    if new_grid == grid:
        return positions
    (steps, height, width), dim = grid, positions.shape[-1]
    full_precision = torch.promote_types(positions.dtype, torch.float32)
    table = positions[:, 1:].to(full_precision).view(steps, height, width, dim)  # (T', H', W', D)
    if new_grid[1:] != grid[1:]:
        table = table.permute(0, 3, 1, 2)  # (T', D, H', W')
        table = F.interpolate(table, size=new_grid[1:], mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)  # (T', H', W', D)
    if new_grid[0] != steps:
        table = table.flatten(1).t()[None]  # (1, H' * W' * D, T')
        table = F.interpolate(table, size=new_grid[0], mode="linear", align_corners=False)
        table = table[0].t()  # (T', H' * W' * D)
    table = table.reshape(1, -1, dim).to(positions.dtype)  # (1, N - 1, D)
    return torch.cat([positions[:, :1], table], dim=1)  # (1, N, D)


class Attention(nn.Module):
    """Multi-headed attention of all tokens to all tokens."""

    def __init__(self, config: VivitConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attn_implementation = attn_implementation
        self.qkv = cpu.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.output = cpu.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, attentions: list[torch.Tensor] | None = None, cls_only: bool = False
    ) -> torch.Tensor:
        """(B, N, D) to the same, or with `cls_only` to the (B, 1, D) of the CLS token.

        Eager attention appends its (B, h, N, N) weights to `attentions`, if any.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d)
        if cls_only:
            q = q[:, :, :1]  # (B, h, 1, d)
        if self.attn_implementation == "sdpa":
            dropout_prob = self.dropout_prob if self.training else 0.0
            x = cpu.attention(q, k, v, dropout_prob=dropout_prob)  # (B, h, N, d)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, N, N)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
            weights = F.dropout(weights, self.dropout_prob, self.training)
            if attentions is not None:
                attentions.append(weights)
            x = weights @ v  # (B, h, N, d)
        return self.output(x.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two layers for each token by itself."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.up = cpu.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act
        self.down = cpu.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ACTIVATIONS[self.hidden_act](self.up(x)))  # (B, N, D)


class Layer(nn.Module):
    """Attention, then the MLP: each behind a LayerNorm, each added to what came in (section 3.1)."""

    def __init__(self, config: VivitConfig, *, attn_implementation: str) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, attn_implementation=attn_implementation)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, x: torch.Tensor, attentions: list[torch.Tensor] | None = None, cls_only: bool = False
    ) -> torch.Tensor:
        """(B, N, D) to the same, or with `cls_only` to the (B, 1, D) of the CLS token."""
        attended = self.attention(self.layernorm_before(x), attentions, cls_only)
        x = (x[:, :1] if cls_only else x) + self.dropout(attended)  # (B, N, D)
        return cpu.by_rows(self._transform, x)  # (B, N, D)

    def _transform(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to the same: every token by itself."""
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


class PretrainedModel(nn.Module):
    """What both models share: a configuration, initial weights, files to come from and to go to."""

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        config: VivitConfig | None = None,
        attn_implementation: str = "sdpa",
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **model_options: Any,
    ) -> "PretrainedModel":
        """The model of a local directory or hub repository, on the CPU, in evaluation mode.

        config               takes the place of the checkpoint's config.json
        attn_implementation  "sdpa" or "eager", see VivitModel
        torch_dtype, dtype   two names of one option. None: float32 whatever the files have; "auto": what they
                             have; or a floating point dtype, or the name of one such as "float16"
        revision, cache_dir, token, local_files_only  see `hub.fetch`
        model_options        add_pooling_layer of VivitModel, by default whether the checkpoint has one

        Strict: `match_state_dict` lists all that the weights have too much or too little. To put another head
        on a trained encoder, make a new model and set its `vivit` to
        `VivitModel.from_pretrained(name_or_path, add_pooling_layer=False)`.

        Raises CheckpointError, and ValueError for an option that makes no sense.
        """
        if torch_dtype is not None and dtype is not None:
            raise ValueError("torch_dtype and dtype are two names of one option: give one of them")
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        if config is None:
            config = VivitConfig.from_pretrained(name_or_path, **hub)
        state = load_state_dict(name_or_path, **hub)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            options = {"attn_implementation": attn_implementation, **model_options}
            model = cls._for_tensors(config, state, **options)
        state = match_state_dict(state, model.state_dict(), source=name_or_path)
        model = model.to(_resolve_dtype(torch_dtype or dtype, state)).to_empty(device="cpu")
        # Copied and not assigned: a safetensors file's tensors are the file itself, mapped into memory. Who
        # writes the file again, and that may be our own save_pretrained, would change the model.
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors, under the published names; transformers reads them too."""
        self.config.save_pretrained(directory, architecture=type(self).__name__)
        save_state_dict(self.state_dict(), directory)

    @classmethod
    def _for_tensors(cls, config: VivitConfig, names: Collection[str], **options: Any) -> "PretrainedModel":
        """The model for a checkpoint that has tensors of these names."""
        return cls(config, **options)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class VivitModel(PretrainedModel):
    """The encoder: a token for each tubelet and CLS for the clip, pooled if there is a pooling layer.

    attn_implementation  "sdpa" is torch's fused attention. "eager" is written out: it needs memory for
                         (B, h, N, N) weights, and is the one that can return them
    add_pooling_layer    whether there is one
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
        """
        pixel_values              (B, T, C, H, W) of the model's dtype, as VivitImageProcessor makes them
        interpolate_pos_encoding  permits T, H and W other than the configuration's, multiples of the tubelet
        cls_only                  the last layer computes the CLS token alone: last_hidden_state is (B, 1, D), and
                                  so is the last of hidden_states

        Raises ValueError for another shape, and where SDPA is asked for attentions.
        """
        if output_attentions and self.attn_implementation != "eager":
            raise ValueError(
                "output_attentions needs attn_implementation='eager': "
                f"{self.attn_implementation!r} never holds the attention weights"
            )
        hidden_states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None
        x = self.embedding(pixel_values, interpolate_pos_encoding)  # (B, N, D)
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, attentions, cls_only and layer is self.layers[-1])  # (B, N, D)
        if hidden_states is not None:
            hidden_states.append(x)
        x = self.layernorm(x)  # (B, N, D)
        pooled = None
        if self.pooler is not None:
            pooled = ACTIVATIONS[self.config.pooler_act](self.pooler(x[:, 0]))  # (B, pooler_output_size)
        return VivitOutput(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    @classmethod
    def _for_tensors(
        cls,
        config: VivitConfig,
        names: Collection[str],
        *,
        add_pooling_layer: bool | None = None,
        **options: Any,
    ) -> "VivitModel":
        if add_pooling_layer is None:
            add_pooling_layer = any(name.startswith("vivit.pooler.") for name in names)
        return cls(config, add_pooling_layer=add_pooling_layer, **options)


class VivitForVideoClassification(PretrainedModel):
    """The encoder, and a linear classifier of its CLS token."""

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
        """`labels` as in `classification_loss`; the others, and the errors, as in `VivitModel.forward`."""
        outputs = self.vivit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            # Nobody looks at the other tokens of the last layer: 7 % of the work of a ViViT-B/16x2.
            cls_only=not (output_hidden_states or output_attentions),
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])  # (B, num_labels)
        return VideoClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """A scalar, the mean over the batch, for (B, num_labels) logits. What labels are depends on the problem:

    single_label_classification  cross entropy; (B,) numbers of classes, of which -100 is ignored
    multi_label_classification   binary cross entropy; (B, num_labels) from 0 to 1
    regression                   mean squared error; (B, num_labels), or (B,) for a single output
    None                         regression for a single output, else single-label for labels of int32 or
                                 int64, else multi-label

    Raises ValueError for labels of another size.
    """
    batch, num_labels = logits.shape
    if problem_type is None and num_labels == 1:
        problem_type = "regression"
    elif problem_type is None:
        is_number = labels.dtype in (torch.int32, torch.int64)
        problem_type = "single_label_classification" if is_number else "multi_label_classification"
    expected = (batch,) if problem_type == "single_label_classification" else (batch, num_labels)
    if labels.numel() != math.prod(expected):
        raise ValueError(f"expected labels of shape {expected} for {problem_type}, got {tuple(labels.shape)}")
    labels = labels.to(logits.device).view(expected)  # (B,) or (B, num_labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.long())
    if problem_type == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _resolve_dtype(dtype: torch.dtype | str | None, state: Mapping[str, torch.Tensor]) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":  # of a mixed file the widest, so that nothing is lost
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a floating point dtype such as 'float16', got {dtype!r}")
    return resolved

"""Reads image ViTs, in timm's or transformers' format, as ViViTs whose clips have one frame.

An image ViT is a ViViT with joint attention, tubelets of one frame and a single time step: all parameters have the same
meaning and, apart from the patch projection, the same shapes.

D  hidden size      N  tokens of an image: CLS, then H' * W' patches
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from handler.checkpoints.files import load_state_dict, read_tensors
from handler.checkpoints.hub import CheckpointMismatchError, CheckpointNotFoundError, fetch, read_json
from handler.checkpoints.names import canonical_name
from handler.models.config import CONFIG_FILE, VivitConfig

PROJECTION = "vivit.embeddings.patch_embeddings.projection.weight"
POSITIONS = "vivit.embeddings.position_embeddings"
FIRST_LAYER = "vivit.encoder.layer.0."

MODEL_TYPES = ("deit", "vit", "vit_msn")  # transformers' models that have exactly this architecture
TRANSFORMERS_EPS, TIMM_EPS = 1e-12, 1e-6  # defaults of the two libraries

# Up to ViT-L, heads have 64 channels. The heads of larger models differ: 80 in ViT-H, 88 in ViT-g, 104 in ViT-G.
HEAD_CHANNELS, MAX_HIDDEN_SIZE_OF_DEFAULT_HEADS = 64, 1024

# timm's name of a module or parameter, and the published ViViT name without prefix. {} is the layer number.
TIMM_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.{}.norm1", "encoder.layer.{}.layernorm_before"),
    ("blocks.{}.attn.proj", "encoder.layer.{}.attention.output.dense"),
    ("blocks.{}.norm2", "encoder.layer.{}.layernorm_after"),
    ("blocks.{}.mlp.fc1", "encoder.layer.{}.intermediate.dense"),
    ("blocks.{}.mlp.fc2", "encoder.layer.{}.output.dense"),
    ("norm", "layernorm"),
)
TIMM_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")

# Parameters that follow the encoder or are used in pretraining only.
DROPPED = re.compile(r"(head|fc|pre_logits\.fc|embeddings\.mask_token)(\.weight|\.bias)?")

# What some vision transformers have in addition, by the names of its parameters.
UNSUPPORTED = (
    (r"\bls[12]\.|layer_?scale|gamma_[12]", "LayerScale"),
    (r"reg_token|register_tokens", "register tokens"),
    (r"dist_token|distillation_token|head_dist", "a distillation token"),
    (r"\b[qk]_norm\b|layernorm_[qk]\b", "normalization of queries and keys"),
    (r"mlp\.(w\d+|fc1_[gx])\b|weights_in|gate_proj", "a gated MLP (SwiGLU)"),
    (r"norm_pre|pre_layr?norm", "a LayerNorm before the encoder"),
    (r"fc_norm", "mean pooling (fc_norm)"),
    (r"attn_pool", "attention pooling"),
    (r"rel_pos|relative_position", "relative position embeddings"),
    (r"pos_embed_win", "window position embeddings"),
)


def load_image_vit(init: str | Path, *, num_attention_heads: int | None) -> tuple[VivitConfig, dict[str, torch.Tensor]]:
    """Reads an image ViT.

    Args:
        init: a directory, a hub id, or one .safetensors file.
        num_attention_heads: replaces the number in config.json. Without either, heads have HEAD_CHANNELS channels.

    Returns:
        The configuration of the same model for clips of one frame, and the tensors by their published ViViT names, with
        a projection of shape (D, C, 1, h, w). Whether they fit the configuration is not checked.

    Raises:
        CheckpointError: files are missing or unreadable, or the model has parts that ViViT lacks.
    """
    values = read_config(init)
    if values.get("model_type", "vit") not in MODEL_TYPES:
        expected = ", ".join(MODEL_TYPES)
        raise CheckpointMismatchError(
            f"{init}: expected a ViViT or an image ViT (model_type {expected}), got model_type {values['model_type']!r}"
        )
    path = Path(init)
    stored = read_tensors(path) if path.is_file() else load_state_dict(init)
    state = {re.sub(r"^(vit|deit)\.", "", name): tensor for name, tensor in stored.items()}
    _reject_unsupported(init, state)
    is_timm = any(name.startswith("blocks.") for name in state)
    state = _from_timm(state) if is_timm else {canonical_name(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not DROPPED.fullmatch(name)}
    sizes = _read_sizes(init, state, values)
    heads = num_attention_heads or _read_heads(init, values, hidden_size=sizes["hidden_size"])
    state[PROJECTION] = state[PROJECTION].unsqueeze(2)  # (D, C, 1, h, w)
    config = VivitConfig(
        **sizes,
        num_attention_heads=heads,
        hidden_act=values.get("hidden_act", "gelu"),
        layer_norm_eps=values.get("layer_norm_eps", TIMM_EPS if is_timm else TRANSFORMERS_EPS),
    )
    return config, state


def read_config(init: str | Path) -> dict[str, Any]:
    """Returns the content of a checkpoint's config.json, or nothing if it has none.

    Args:
        init: a directory, a hub id, or a file beside which config.json may be.

    Raises:
        CheckpointError: the file is unreadable, or the hub cannot be used.
    """
    path = Path(init)
    try:
        return read_json(fetch(path.parent if path.is_file() else init, CONFIG_FILE))
    except CheckpointNotFoundError:
        return {}


def read_normalization(
    values: Mapping[str, Any], config_values: Mapping[str, Any]
) -> tuple[list[float], list[float]] | None:
    """Returns (mean, std) of pixels in [0, 1] that an image ViT expects, or None if its files do not state them.

    Args:
        values: content of preprocessor_config.json, empty if there is none.
        config_values: content of config.json, in which timm stores them.
    """
    if values:
        if not values.get("do_normalize", True):
            return [0.0], [1.0]
        if "image_mean" in values and "image_std" in values:
            return list(values["image_mean"]), list(values["image_std"])
    timm_values = config_values.get("pretrained_cfg", config_values)
    if "mean" in timm_values and "std" in timm_values:
        return list(timm_values["mean"]), list(timm_values["std"])
    return None


def _reject_unsupported(init: str | Path, names: Iterable[str]) -> None:
    for pattern, description in UNSUPPORTED:
        for name in names:
            if re.search(pattern, name):
                raise CheckpointMismatchError(f"{init}: ViViT has no equivalent of {description}: {name}")


def _from_timm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts timm's names to published ViViT names. Unknown names are kept."""
    patterns = dict(TIMM_NAMES)
    published: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if match := TIMM_QKV.fullmatch(name):
            layer, suffix = match.groups()
            for part, values in zip(("query", "key", "value"), tensor.chunk(3)):
                published[f"vivit.encoder.layer.{layer}.attention.attention.{part}.{suffix}"] = values
            continue
        module, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups("")  # type: ignore[union-attr]
        layer = next(iter(re.findall(r"^blocks\.(\d+)\.", module)), "")
        pattern = patterns.get(re.sub(r"^blocks\.\d+\.", "blocks.{}.", module))
        published[name if pattern is None else f"vivit.{pattern.format(layer)}{suffix}"] = tensor
    return published


def _read_sizes(init: str | Path, state: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of VivitConfig that follow from the shapes of the tensors."""
    projection, positions = state.get(PROJECTION), state.get(POSITIONS)
    hidden = state.get(f"{FIRST_LAYER}intermediate.dense.weight")
    output = state.get(f"{FIRST_LAYER}output.dense.weight")
    if projection is None or hidden is None or output is None:
        raise CheckpointMismatchError(f"{init} is not an image ViT: it has no patch projection, or no encoder layer 0")
    if projection.ndim != 4:
        raise CheckpointMismatchError(
            f"{init}: expected a patch projection of shape (D, C, h, w), got {tuple(projection.shape)}; "
            "a ViViT needs a directory whose config.json has model_type 'vivit'"
        )
    if len(hidden) != output.shape[-1]:
        raise CheckpointMismatchError(f"{init}: ViViT has no equivalent of a gated MLP (SwiGLU)")
    if positions is None or "vivit.embeddings.cls_token" not in state:
        raise CheckpointMismatchError(f"{init}: expected learned position embeddings and a CLS token")
    hidden_size, channels, *patch = projection.shape
    layers = {int(match[1]) for name in state if (match := re.match(r"vivit\.encoder\.layer\.(\d+)\.", name))}
    return {
        "num_frames": 1,
        "tubelet_size": (1, *patch),
        "image_size": _read_image_size(init, values, patch=patch, patches=positions.shape[-2] - 1),
        "num_channels": channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": len(hidden),
        "qkv_bias": f"{FIRST_LAYER}attention.attention.query.bias" in state,
    }


def _read_image_size(
    init: str | Path, values: Mapping[str, Any], *, patch: list[int], patches: int
) -> int | tuple[int, int]:
    """Returns the image size in pixels from config.json, by default that of a square, and checks its patches."""
    timm_values = values.get("pretrained_cfg", values)
    size = values.get("image_size") or timm_values.get("input_size", ())[-2:]
    if size:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
    else:
        side = math.isqrt(patches)
        height, width = side * patch[0], side * patch[1]
    if (height // patch[0]) * (width // patch[1]) != patches:
        raise CheckpointMismatchError(
            f"{init}: expected position embeddings of CLS and a grid of patches, got {patches + 1} for images of "
            f"{height}x{width} pixels and patches of {patch[0]}x{patch[1]}"
        )
    return height if height == width else (height, width)


def _read_heads(init: str | Path, values: Mapping[str, Any], *, hidden_size: int) -> int:
    heads = values.get("num_attention_heads") or (values.get("model_args") or {}).get("num_heads")
    if heads is not None:
        return int(heads)
    if hidden_size % HEAD_CHANNELS or hidden_size > MAX_HIDDEN_SIZE_OF_DEFAULT_HEADS:
        raise CheckpointMismatchError(
            f"{init}: the tensors do not show the number of attention heads of hidden size {hidden_size}, and "
            f"{CONFIG_FILE} does not state it: set num_attention_heads"
        )
    return hidden_size // HEAD_CHANNELS

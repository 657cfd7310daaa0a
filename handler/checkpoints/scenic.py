"""Converts the parameters of checkpoints of the original code, scenic (github.com/google-research/scenic).

    converted = convert(load_parameters(file), image_size=224)    # see checkpoints/flax.py
    VivitConfig(**converted.config), converted.tensors

Names of parameters are those of Flax, with "/" between modules. D hidden size, h heads, d = D / h, (t, h, w) tubelet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handler.checkpoints.flax import Parameters
from handler.checkpoints.hub import CheckpointMismatchError

# What the released checkpoints were trained with. Used where the number of position embeddings allows it.
DEFAULT_IMAGE_SIZE, DEFAULT_NUM_FRAMES = 224, 32
MAX_SUGGESTIONS = 5

ENCODERS = {"Transformer": "", "SpatialTransformer": "", "TemporalTransformer": "temporal_"}
ATTENTION = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "output.dense"}
LAYER = {
    "LayerNorm_0": "layernorm_before",
    "LayerNorm_1": "layernorm_after",
    "MlpBlock_0/Dense_0": "intermediate.dense",
    "MlpBlock_0/Dense_1": "output.dense",
    # factorised self-attention
    "LayerNorm_time": "layernorm_time",
    "LayerNorm_space": "layernorm_space",
    "LayerNorm_mlp": "layernorm_after",
    "MlpBlock/Dense_0": "intermediate.dense",
    "MlpBlock/Dense_1": "output.dense",
    **{
        f"MultiHeadDotProductAttention_{suffix}/{part}": f"{attention}.{published}"
        for suffix, attention in (("0", "attention"), ("time", "attention_time"), ("space", "attention_space"))
        for part, published in ATTENTION.items()
    },
}
MODULES = {"embedding": "vivit.embeddings.patch_embeddings.projection", "output_projection": "classifier"}
CLS_TOKENS = {
    "cls": "vivit.embeddings.cls_token",
    "cls_SpatialTransformer": "vivit.embeddings.cls_token",
    "cls_TemporalTransformer": "vivit.temporal_embeddings.cls_token",
}
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


class Converted(NamedTuple):
    """A converted checkpoint.

    Attributes:
        config: fields of VivitConfig.
        tensors: float32, by their published names.
    """

    config: dict[str, Any]
    tensors: Parameters


def convert(
    parameters: Mapping[str, NDArray[np.float32]],
    *,
    image_size: int | None = None,
    num_frames: int | None = None,
    attention_type: str | None = None,
    attention_order: str | None = None,
) -> Converted:
    """Converts the parameters of a ViViT.

    Everything that they determine is read from them. Optional arguments that they determine are checked.

    Args:
        parameters: see `handler.checkpoints.flax.load_parameters`.
        image_size: height and width of a frame in pixels. Default: 224 if that fits, otherwise the size that fits.
        num_frames: frames per clip. Default: 32 if that fits, otherwise the number that fits.
        attention_type: see VivitConfig; required where the parameters do not determine it.
        attention_order: of factorised self-attention, see VivitConfig; other models have none. Default: "time_space".

    Raises:
        CheckpointMismatchError: the parameters are not those of a ViViT that VivitConfig can describe, or do not fit
            the arguments.
    """
    _check_kind(parameters)
    found_type = _attention_type(parameters, attention_type)
    config: dict[str, Any] = {"attention_type": found_type, **_widths(parameters)}
    if found_type == "factorised_self_attention":
        config["attention_order"] = attention_order or "time_space"
    config.update(_grid(parameters, image_size=image_size, num_frames=num_frames))
    tensors: Parameters = {}
    unknown = []
    for name, array in parameters.items():
        published = _published_name(name)
        if published is None or published in tensors:
            unknown.append(name)
        else:
            tensors[published] = _published_layout(name, array)
    if unknown:
        raise CheckpointMismatchError(
            f"the checkpoint has parameters that no ViViT has, or has twice: {_enumerate(unknown)}"
        )
    if not config["qkv_bias"]:  # Flax omits the bias of the output as well, but VivitConfig always has it
        for name in [name for name in tensors if re.search(r"\.attention\w*\.output\.dense\.weight$", name)]:
            bias = np.zeros(len(tensors[name]), np.float32)
            tensors.setdefault(name.removesuffix("weight") + "bias", bias)
    return Converted(config, tensors)


# Configuration


def _check_kind(parameters: Mapping[str, NDArray[np.float32]]) -> None:
    """Rejects models that are not a ViViT, and options of scenic that VivitConfig does not have."""
    problem = None
    if not any(re.match(r"(Spatial)?Transformer/encoderblock_0/", name) for name in parameters):
        problem = f"it has no Transformer/encoderblock_0, but {_enumerate(parameters)}"
    elif not (kernel := parameters.get("embedding/kernel", np.zeros(0))).size or kernel.ndim not in (4, 5):
        problem = "it has no embedding/kernel of 4 or 5 axes"
    elif any(name.startswith("pre_logits/") for name in parameters):
        problem = "it has a layer between encoder and classifier (pre_logits, of `representation_size`)"
    elif "SpatialTransformer/encoderblock_0/LayerNorm_0/scale" in parameters and not any(
        name.startswith("TemporalTransformer/") for name in parameters
    ):
        problem = "it has no TemporalTransformer (`spatial_only_baseline`)"
    elif not all(f"{encoder}/posembed_input/pos_embedding" in parameters for encoder in _encoders(parameters)):
        problem = "it has no learned position embeddings (posembed_input); sinusoidal ones are not supported"
    elif "output_projection/kernel" not in parameters:
        problem = "it has no classifier (output_projection)"
    if problem:
        raise CheckpointMismatchError(f"the checkpoint is not a ViViT classifier that can be converted: {problem}")


def _encoders(parameters: Mapping[str, NDArray[np.float32]]) -> list[str]:
    return [encoder for encoder in ENCODERS if any(name.startswith(f"{encoder}/") for name in parameters)]


def _attention_type(parameters: Mapping[str, NDArray[np.float32]], requested: str | None) -> str:
    if "TemporalTransformer" in _encoders(parameters):
        possible = ["factorised_encoder"]
    elif "Transformer/encoderblock_0/LayerNorm_time/scale" in parameters:
        possible = ["factorised_self_attention"]
    elif "cls" in parameters:
        possible = ["spatiotemporal"]
    else:
        possible = ["spatiotemporal", "factorised_dot_product"]
    if requested is None and len(possible) > 1:
        raise CheckpointMismatchError(
            f"without a CLS token, {' and '.join(possible)} models have the same parameters: state which of them it is "
            "(--attention-type)"
        )
    if requested not in (None, *possible):
        raise CheckpointMismatchError(
            f"expected the attention type {' or '.join(possible)}, because of the parameters, got {requested}"
        )
    return requested or possible[0]


def _widths(parameters: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Returns the fields of VivitConfig that follow from shapes and names alone."""
    layers = {encoder: _count_layers(parameters, encoder) for encoder in _encoders(parameters)}
    first = f"{next(iter(layers))}/encoderblock_0"
    queries = {name: array for name, array in parameters.items() if name.endswith("/query/kernel")}
    heads = sorted({_with_axes(name, array, 3).shape[1] for name, array in queries.items()})
    mlp = [name for name in parameters if re.fullmatch(rf"{first}/MlpBlock(_0)?/Dense_0/kernel", name)]
    if not heads or not mlp:
        raise CheckpointMismatchError(f"expected {first} to have attention and an MLP, got neither or one of them")
    if len(heads) > 1:
        raise CheckpointMismatchError(f"expected as many heads in all layers, got {' and '.join(map(str, heads))}")
    embedding, classifier = parameters["embedding/kernel"], parameters["output_projection/kernel"]
    config = {
        "num_channels": embedding.shape[-2],
        "hidden_size": embedding.shape[-1],
        "num_hidden_layers": next(iter(layers.values())),
        "num_attention_heads": heads[0],
        "intermediate_size": _with_axes(mlp[0], parameters[mlp[0]], 2).shape[1],
        "qkv_bias": any(name.endswith("/query/bias") for name in parameters),
        "num_labels": _with_axes("output_projection/kernel", classifier, 2).shape[1],
        "classifier_pooling": "cls" if CLS_TOKENS.keys() & parameters.keys() else "mean",
        "tubelet_embedding": "tubelet" if embedding.ndim == 5 else "uniform_frames",
    }
    if "TemporalTransformer" in layers:
        config["num_temporal_layers"] = layers["TemporalTransformer"]
    return config


def _count_layers(parameters: Mapping[str, NDArray[np.float32]], encoder: str) -> int:
    return len({match[1] for name in parameters if (match := re.match(rf"{encoder}/encoderblock_(\d+)/", name))})


class _ClipSize(NamedTuple):
    image_size: int  # height and width in pixels
    num_frames: int
    time_steps: int  # T'


def _grid(
    parameters: Mapping[str, NDArray[np.float32]], *, image_size: int | None, num_frames: int | None
) -> dict[str, Any]:
    """Returns image_size, num_frames and tubelet_size such that there is a position embedding for every tubelet."""
    fitting = list(_fitting_sizes(parameters, num_frames))
    chosen = [
        size for size in fitting if image_size in (None, size.image_size) and num_frames in (None, size.num_frames)
    ]
    default = [size for size in chosen if size[:2] == (DEFAULT_IMAGE_SIZE, DEFAULT_NUM_FRAMES)]
    if len(default or chosen) != 1:
        wanted = image_size or DEFAULT_IMAGE_SIZE, num_frames or DEFAULT_NUM_FRAMES
        raise CheckpointMismatchError(_describe_mismatch(parameters, fitting, wanted))
    size = (default or chosen)[0]
    return {
        "image_size": size.image_size,
        "num_frames": size.num_frames,
        "tubelet_size": (size.num_frames // size.time_steps, *_patch(parameters)),
    }


def _fitting_sizes(parameters: Mapping[str, NDArray[np.float32]], num_frames: int | None) -> Iterator[_ClipSize]:
    """Yields the sizes of clips that have as many tubelets as there are position embeddings, without those of CLS."""
    height, width = _patch(parameters)
    positions, time_steps = _positions(parameters)
    unit = math.lcm(height, width)
    for image_size in range(unit, unit * (positions + 1), unit):
        places = (image_size // height) * (image_size // width)  # H' * W'
        if places > positions:
            return
        if positions % places or (time_steps and places != positions):
            continue
        steps = time_steps or positions // places
        frames = steps * len(parameters["embedding/kernel"]) if _has_tubelets(parameters) else num_frames
        frames = frames or DEFAULT_NUM_FRAMES
        # A model of one sampled frame is one for images.
        if _has_tubelets(parameters) or (steps > 1 and frames % steps == 0):
            yield _ClipSize(image_size, frames, steps)


def _has_tubelets(parameters: Mapping[str, NDArray[np.float32]]) -> bool:
    """Whether tubelets are embedded, not patches of sampled frames."""
    return parameters["embedding/kernel"].ndim == 5


def _patch(parameters: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
    height, width = parameters["embedding/kernel"].shape[-4:-2]
    return height, width


def _positions(parameters: Mapping[str, NDArray[np.float32]]) -> tuple[int, int | None]:
    """Returns the number of position embeddings of the only or spatial encoder, and of the temporal one."""
    cls_tokens = 1 if CLS_TOKENS.keys() & parameters.keys() else 0
    names = [f"{encoder}/posembed_input/pos_embedding" for encoder in _encoders(parameters)]
    counts = [_with_axes(name, parameters[name], 3).shape[1] - cls_tokens for name in names]
    return counts[0], counts[1] if len(counts) > 1 else None


def _describe_mismatch(
    parameters: Mapping[str, NDArray[np.float32]], fitting: list[_ClipSize], size: tuple[int, int]
) -> str:
    image_size, num_frames = size
    height, width = _patch(parameters)
    positions, time_steps = _positions(parameters)
    tubelet = "x".join(map(str, parameters["embedding/kernel"].shape[:-2]))
    found = f"{positions} tubelets of {tubelet}" + (f" in each of {time_steps} time steps" if time_steps else "")
    expected = f"{image_size / height:g}x{image_size / width:g} tubelets"
    if _has_tubelets(parameters):
        expected += f" in each of {num_frames / len(parameters['embedding/kernel']):g} time steps"
    else:
        expected += f" in each sampled frame, and the number of sampled frames must be > 1 and divide {num_frames}"
    nearest = sorted(fitting, key=lambda size: (abs(size.image_size - image_size), size))[:MAX_SUGGESTIONS]
    sizes = ", or ".join(f"--image-size {size.image_size} --num-frames {size.num_frames}" for size in nearest)
    return (
        f"the checkpoint has position embeddings for {found}, but {num_frames} frames of {image_size}x{image_size} "
        f"pixels have {expected}. {f'What fits: {sizes}' if sizes else 'No other size of square frames fits'}"
    )


# Names and layouts


def _published_name(name: str) -> str | None:
    """Returns the published name of a parameter, or None if no ViViT has it."""
    if name in CLS_TOKENS:
        return CLS_TOKENS[name]
    encoder, _, inner = name.partition("/")
    module, _, kind = name.rpartition("/")
    if encoder in ENCODERS:
        prefix, (module, _, kind) = ENCODERS[encoder], inner.rpartition("/")
        if inner == "posembed_input/pos_embedding":
            return f"vivit.{prefix}embeddings.position_embeddings"
        if module == "encoder_norm" and kind in SUFFIXES:
            return f"vivit.{prefix}layernorm{SUFFIXES[kind]}"
        match = re.fullmatch(r"encoderblock_(\d+)/(.+)", module)
        if match and match[2] in LAYER and kind in SUFFIXES:
            return f"vivit.{prefix}encoder.layer.{match[1]}.{LAYER[match[2]]}{SUFFIXES[kind]}"
    elif module in MODULES and kind in SUFFIXES:
        return MODULES[module] + SUFFIXES[kind]
    return None


def _published_layout(name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns a parameter with the axes of the published checkpoints: outputs come before inputs."""
    *_, module, kind = f"/{name}".split("/")
    if kind == "kernel" and module == "embedding":
        kernel = array if array.ndim == 5 else array[None]  # frames are embedded one by one
        return np.transpose(kernel, (4, 3, 0, 1, 2))  # (D, C, t, h, w)
    if kind == "kernel" and module in ATTENTION:
        inputs = _with_axes(name, array, 3).shape[: 2 if module == "out" else 1]  # of (h, d, D), or (D, h, d)
        return np.transpose(array.reshape(math.prod(inputs), -1))  # (D, D)
    if kind == "kernel":
        return np.transpose(array)
    return array.reshape(-1) if kind == "bias" else array


def _with_axes(name: str, array: NDArray[np.float32], axes: int) -> NDArray[np.float32]:
    if array.ndim != axes or 0 in array.shape:
        raise CheckpointMismatchError(f"expected {name} to have {axes} axes, none of them empty, got {array.shape}")
    return array


def _enumerate(names: Mapping[str, Any] | list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - MAX_SUGGESTIONS} more" if len(names) > MAX_SUGGESTIONS else ""
    return (", ".join(names[:MAX_SUGGESTIONS]) or "nothing") + more

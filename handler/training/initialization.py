"""Creates the model that fine-tuning starts from: section 3.4 of the ViViT paper, arXiv 2103.15691.

The start is a ViViT of any variant and size, or an image ViT, which is read as a ViViT for clips of one frame. One set
of rules covers all combinations of start and target:

    tubelet projection      copied; from one frame to several by central-frame initialization or filter inflation
    position embeddings     interpolated between grids; repeated in time from one time step to several, averaged over
                            time for the spatial encoder of a factorised encoder; CLS keeps its own
    temporal encoder        of a factorised encoder: copied from one, random otherwise
    temporal attention      of factorised self-attention: copied from one. Otherwise query, key and value are those of
                            the spatial attention and the output projection is zero, so the block computes what the
                            image model's does. The paper sets all of these weights to zero. Then the gradients of the
                            value and of the output projection, each of which is proportional to the weights of the
                            other, would be zero as well, and the weights could not be trained.
    classifier              copied if the labels are the same, zero otherwise, as in the original
    everything else         copied

T', H', W'  tubelets along time, height and width      D  hidden size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from handler.checkpoints.files import load_state_dict
from handler.checkpoints.hub import CheckpointNotFoundError, fetch, read_json
from handler.checkpoints.names import canonical_name, match_state_dict, to_published
from handler.models.config import MODEL_TYPE, VivitConfig
from handler.models.embedding import interpolate_positions
from handler.models.vivit import VivitForVideoClassification, VivitModel
from handler.processing.image_processor import PROCESSOR_FILES, VivitImageProcessor
from handler.training.image_vit import PROJECTION, load_image_vit, read_config, read_normalization
from handler.validation import ConfigError, broken_rule, check_choice, describe_unknown

TUBELET_INITS = ("central_frame", "filter_inflation")

# Of clips made for an image ViT, as in the paper.
DEFAULT_NUM_FRAMES, DEFAULT_TUBELET_FRAMES = 32, 2
RESIZE_RATIO = 256 / 224  # shorter side of the resized frames / side of the crop

LABEL_FIELDS = ("id2label", "label2id", "num_labels")
HEAD_FIELDS = ("label_heads", "problem_type")  # describe the classifier
VARIANT_FIELDS = ("num_temporal_layers", "attention_order", "classifier_pooling")  # defaults depend on the attention
SIZE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
    "qkv_bias",
)


@dataclass(frozen=True)
class _Source:
    """A checkpoint to start from.

    Attributes:
        config: its configuration.
        state: its tensors by published names, without a pooler.
        is_image_model: whether it is an image ViT.
    """

    config: VivitConfig
    state: dict[str, torch.Tensor]
    is_image_model: bool


def initialize_model(
    init: str | Path,
    *,
    labels: Sequence[str],
    changes: Mapping[str, Any],
    tubelet_init: str = "central_frame",
) -> VivitForVideoClassification:
    """Creates a model for `labels` with the weights of a checkpoint.

    New weights are drawn from torch's global generator.

    Args:
        init: a directory or hub id of a ViViT or an image ViT (timm or transformers), or a .safetensors file of an
            image ViT, beside which a config.json may be.
        labels: in the order of the classifier's outputs.
        changes: fields of VivitConfig that differ from those of `init`, such as num_frames, image_size and
            attention_type. Where the attention type changes, the fields that depend on it get its defaults. For an
            image ViT the defaults are DEFAULT_NUM_FRAMES and DEFAULT_TUBELET_FRAMES; num_attention_heads is needed
            where config.json does not state it and heads do not have 64 channels.
        tubelet_init: how a projection of single frames becomes one of tubelets: "central_frame" uses it for the
            central frame and zeros for the others; "filter_inflation" uses 1/t of it for each of the t frames.

    Returns:
        The model on the CPU, float32, in eval mode.

    Raises:
        CheckpointError: `init` is missing, unreadable, or has unexpected or missing tensors.
        ConfigError: an argument is invalid, or `changes` are not possible for these weights.
    """
    check_choice("tubelet_init", tubelet_init, TUBELET_INITS)
    source = _load_source(init, num_attention_heads=changes.get("num_attention_heads"))
    config = _target_config(source, labels=labels, changes=changes)
    model = VivitForVideoClassification(config)
    with torch.no_grad():
        for name, parameter in _published(model).items():
            parameter.copy_(_initial_value(name, parameter, source=source, config=config, tubelet_init=tubelet_init))
    return model.eval()


def initialize_processor(init: str | Path, *, config: VivitConfig) -> VivitImageProcessor:
    """Returns the image processor for a model that `initialize_model` made of `init`.

    The processor of a ViViT is kept, with sizes in proportion if `config` has another image size. For an image ViT,
    frames are resized and cropped as in the paper and normalized with its own mean and standard deviation, or to
    [-1, 1] if its files do not state them.

    Raises:
        CheckpointError: a file is unreadable, or a ViViT has no preprocessor_config.json.
    """
    config_values = read_config(init)
    if config_values.get("model_type") == MODEL_TYPE:
        processor = VivitImageProcessor.from_pretrained(init)
        old_size = VivitConfig.from_dict(config_values)
        return _with_size(processor, old_size=(old_size.image_height, old_size.image_width), config=config)
    directory = Path(init).parent if Path(init).is_file() else init
    try:
        values = read_json(fetch(directory, PROCESSOR_FILES[0]))
    except CheckpointNotFoundError:
        values = {}
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": round(RESIZE_RATIO * max(config.image_height, config.image_width))},
        "crop_size": {"height": config.image_height, "width": config.image_width},
    }
    mean, std = read_normalization(values, config_values) or ([0.5], [0.5])
    if set(mean) == set(std) == {0.5}:
        return VivitImageProcessor(**sizes, do_normalize=False)  # [-1, 1]
    return VivitImageProcessor(**sizes, rescale_factor=1 / 255, offset=False, image_mean=mean, image_std=std)


def _load_source(init: str | Path, *, num_attention_heads: int | None) -> _Source:
    """Reads a checkpoint and checks that its encoder is complete."""
    is_image_model = read_config(init).get("model_type") != MODEL_TYPE
    if is_image_model:
        config, state = load_image_vit(init, num_attention_heads=num_attention_heads)
    else:
        config, state = VivitConfig.from_pretrained(init), load_state_dict(init)
    with torch.device("meta"):
        encoder = VivitModel(config, add_pooling_layer=False)
    match_state_dict(state, encoder.state_dict(), source=init)
    return _Source(config, state, is_image_model)


def _target_config(source: _Source, *, labels: Sequence[str], changes: Mapping[str, Any]) -> VivitConfig:
    known = {field.name for field in dataclasses.fields(VivitConfig)}.difference(LABEL_FIELDS)
    for name in changes:
        if name not in known:
            raise ConfigError(f"changes has an unknown field {name!r}: {describe_unknown(name, known)}")
    values = {name: getattr(source.config, name) for name in known}
    if source.is_image_model:
        values["num_frames"] = DEFAULT_NUM_FRAMES
        values["tubelet_size"] = (DEFAULT_TUBELET_FRAMES, *source.config.tubelet_size[1:])
    replaced: set[str] = set()
    if list(labels) != list(source.config.id2label.values()):
        replaced.update(HEAD_FIELDS)
    if changes.get("attention_type", source.config.attention_type) != source.config.attention_type:
        replaced.update(VARIANT_FIELDS)
    values = {name: value for name, value in values.items() if name not in replaced}
    config = VivitConfig(**{**values, **changes, "id2label": dict(enumerate(labels))})
    for name in (*SIZE_FIELDS, *(["num_temporal_layers"] if _has_temporal_encoder(source.config, config) else [])):
        value, initial_value = getattr(config, name), getattr(source.config, name)
        if value != initial_value:
            raise broken_rule(name, value, f"that of the initial weights ({initial_value})")
    if config.tubelet_size[1:] != source.config.tubelet_size[1:]:
        height, width = source.config.tubelet_size[1:]
        raise broken_rule("tubelet_size", config.tubelet_size, f"of {height}x{width} pixels, as of the initial weights")
    return config


def _has_temporal_encoder(*configs: VivitConfig) -> bool:
    return all(config.attention_type == "factorised_encoder" for config in configs)


def _published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, or views of them, by canonical published names."""
    return {canonical_name(name): tensor for name, tensor in to_published(model.state_dict()).items()}


def _initial_value(
    name: str, random: torch.Tensor, *, source: _Source, config: VivitConfig, tubelet_init: str
) -> torch.Tensor:
    """Returns the initial value of the parameter with a published name, by the rules at the top of this module.

    Args:
        random: the value that the new model has.
    """
    if name.startswith("classifier."):
        has_same_labels = config.id2label == source.config.id2label
        return source.state[name] if has_same_labels and name in source.state else torch.zeros_like(random)
    if name.startswith("vivit.temporal_") and not _has_temporal_encoder(source.config):
        # As in the original. With positions of zero, the order of the time steps would have no effect at first.
        is_table = name.endswith("position_embeddings")
        return torch.randn_like(random) * config.initializer_range if is_table else random
    if name.endswith("cls_token"):
        return source.state.get(name, random)
    if name.endswith("position_embeddings"):
        return _initial_positions(name, random, source=source, config=config)
    if name == PROJECTION:
        return _initial_projection(source.state[name], frames=random.shape[2], tubelet_init=tubelet_init)
    if name in source.state:
        return source.state[name]
    if ".attention_time.output." in name:
        return torch.zeros_like(random)
    return source.state[_other_variant_name(name)]


def _other_variant_name(name: str) -> str:
    """Returns what a parameter of a layer is called where only one of two variants is factorised self-attention."""
    if ".layernorm_before." in name:
        return name.replace(".layernorm_before.", ".layernorm_space.")
    if ".attention." in name and ".attention_" not in name:
        return name.replace(".attention.", ".attention_space.", 1)
    for axis in ("_time", "_space"):
        name = name.replace(f".layernorm{axis}.", ".layernorm_before.").replace(f".attention{axis}.", ".attention.")
    return name


def _initial_projection(weight: torch.Tensor, *, frames: int, tubelet_init: str) -> torch.Tensor:
    """Returns the weight (D, C, frames, h, w) of a projection with any number of frames or with one."""
    if weight.shape[2] == frames:
        return weight
    if weight.shape[2] != 1:
        raise broken_rule("tubelet_size", frames, f"of {weight.shape[2]} frames, as of the initial weights")
    if tubelet_init == "filter_inflation":
        return weight.expand(-1, -1, frames, -1, -1) / frames
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[3:])
    inflated[:, :, frames // 2] = weight[:, :, 0]
    return inflated


def _initial_positions(name: str, random: torch.Tensor, *, source: _Source, config: VivitConfig) -> torch.Tensor:
    """Returns position embeddings (1, [1 +] T' * H' * W', D) for the grid and the pooling of `config`."""
    grid, new_grid = _grid(name, source.config), _grid(name, config)
    cls, table = _split_cls(source.state[name].float(), source.config)
    new_cls, _ = _split_cls(random, config)
    if grid[0] > 1 and new_grid[0] == 1:
        table = table.view(1, *grid, -1).mean(1).flatten(1, 2)  # (1, H' * W', D)
        grid = (1, *grid[1:])
    table = interpolate_positions(table, grid=grid, new_grid=new_grid)
    return torch.cat([cls if cls.shape == new_cls.shape else new_cls, table], dim=1)


def _split_cls(positions: torch.Tensor, config: VivitConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits position embeddings into that of CLS (1, 0 or 1, D) and those of the tubelets (1, T' * H' * W', D)."""
    return positions[:, : config.has_cls_token], positions[:, config.has_cls_token :]


def _grid(name: str, config: VivitConfig) -> tuple[int, int, int]:
    """The grid (T', H', W') that the position embeddings with a published name belong to."""
    time, height, width = config.grid
    if name.startswith("vivit.temporal_"):
        return time, 1, 1
    return (1 if config.attention_type == "factorised_encoder" else time), height, width


def _with_size(
    processor: VivitImageProcessor, *, old_size: tuple[int, int], config: VivitConfig
) -> VivitImageProcessor:
    """Changes the output size of an image processor, and the size before cropping in proportion."""
    new_size = config.image_height, config.image_width
    if new_size == old_size:
        return processor
    size = dict(cast("Mapping[str, int]", processor.size))  # a mapping after creation
    if "shortest_edge" in size:
        size = {"shortest_edge": round(size["shortest_edge"] * max(new_size) / max(old_size))}
    else:
        size = {
            "height": round(size["height"] * new_size[0] / old_size[0]),
            "width": round(size["width"] * new_size[1] / old_size[1]),
        }
    crop_size = {"height": new_size[0], "width": new_size[1]}
    return dataclasses.replace(processor, size=size, crop_size=crop_size)

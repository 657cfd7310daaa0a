"""The configuration of a ViViT model, validated on creation."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.hub import CheckpointFileError, HubOptions, fetch, read_json, write_json
from handler.models import ACTIVATION_NAMES
from handler.validation import (
    ConfigError,
    broken_rule,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    is_integer,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_FILE = "config.json"
MODEL_TYPE = "vivit"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

ATTENTION_TYPES = ("spatiotemporal", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")
# The paper's models 3 and 4, whose tokens form a (time, space) grid that CLS does not fit into.
GRID_ATTENTION_TYPES = ("factorised_self_attention", "factorised_dot_product")
ATTENTION_ORDERS = ("time_space", "space_time")
CLASSIFIER_POOLINGS = ("cls", "mean")
TUBELET_EMBEDDINGS = ("tubelet", "uniform_frames")
DEFAULT_TEMPORAL_LAYERS = 4

# The fields that transformers lacks, with the values of its model. Files contain other values only.
OMITTED_VALUES = {
    "attention_type": "spatiotemporal",
    "num_temporal_layers": None,
    "attention_order": None,
    "classifier_pooling": "cls",
    "tubelet_embedding": "tubelet",
    "drop_path_rate": 0.0,
    "label_heads": None,
}


@dataclass(frozen=True, kw_only=True)
class VivitConfig:
    """Architecture and class labels of a ViViT model, with the fields and defaults of transformers (ViViT-B/16x2).

    The fields from `attention_type` to `drop_path_rate` select the paper's other models, which transformers does not
    have:

        spatiotemporal               model 1, section 3.3.1: all tokens of a clip attend to each other
        factorised_encoder           model 2, section 3.3.2: an encoder for each time step, then one over the time steps
        factorised_self_attention    model 3, section 3.3.3: each layer attends over time and over space, in turn
        factorised_dot_product       model 4, section 3.3.4: half of the heads attend over time, half over space

    Labels can be given as any of `id2label`, `label2id` and `num_labels`; all three are set afterwards. If `label2id`
    disagrees with `id2label`, a warning is issued and `id2label` is used, as in transformers.

    Source: section 3 of the ViViT paper, arXiv 2103.15691.

    Attributes:
        image_size: height and width of a frame in pixels; a single number for square frames.
        num_frames: frames per clip.
        tubelet_size: (frames, height, width) of a tubelet, the part of a clip that one token represents.
        num_channels: color channels of a frame.
        hidden_size: embedding dimension D, a multiple of `num_attention_heads`.
        num_hidden_layers: encoder layers.
        num_attention_heads: attention heads per layer.
        intermediate_size: width of the hidden layer of the MLPs.
        hidden_act: activation of the MLPs, one of ACTIVATION_NAMES.
        hidden_dropout_prob: dropout after the embedding, attention and MLPs, in training.
        attention_probs_dropout_prob: dropout of attention weights, in training.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: epsilon of all LayerNorms.
        qkv_bias: whether the query, key and value projections have biases.
        attention_type: one of ATTENTION_TYPES.
        num_temporal_layers: layers of the second encoder of factorised_encoder, by default 4. Otherwise None.
        attention_order: of factorised_self_attention, one of ATTENTION_ORDERS, by default "time_space". Otherwise None.
        classifier_pooling: what is classified: "cls", the CLS token, or "mean", the mean of the tokens of a model
            without CLS. Default: "cls" if the attention type has a CLS token; models 3 and 4 have none.
        tubelet_embedding: "tubelet" projects tubelets (section 3.2). "uniform_frames" projects the patches of as many
            frames as a clip has tubelets along time, sampled uniformly; tubelet_size[0] is then the number of frames
            per sampled one.
        drop_path_rate: stochastic depth in training: the probability to drop a residual branch for a clip. Grows
            linearly from 0 in the first layer to this value in the last one of each encoder.
        pooler_output_size: width of the pooling layer. Default: `hidden_size`.
        pooler_act: activation of the pooling layer, one of ACTIVATION_NAMES.
        label_heads: for a model that answers several questions at once, such as which noun and which verb: name of the
            head -> number of its labels, in the order of the classifier's outputs. Also a list of pairs, which is how
            config.json stores it. Needs `problem_type` None or single_label_classification. None: one head.
        id2label: class index -> label. Keys are 0 to `num_labels` - 1, in order. With several heads, a label must be
            unique within its head only.
        label2id: label -> class index; empty if two heads share a label.
        num_labels: number of classes, of all heads together. Without labels, these are named LABEL_0, LABEL_1, ...
            Default: 2.
        problem_type: training loss, one of PROBLEM_TYPES. None: inferred from the training labels.

    Raises:
        ConfigError: A value is invalid.
    """

    image_size: int | tuple[int, int] = 224
    num_frames: int = 32
    tubelet_size: tuple[int, int, int] = (2, 16, 16)
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_fast"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    attention_type: str = "spatiotemporal"
    num_temporal_layers: int | None = None
    attention_order: str | None = None
    # Here and below, the types are those after creation: __post_init__ replaces None.
    classifier_pooling: str = None  # type: ignore[assignment]
    tubelet_embedding: str = "tubelet"
    drop_path_rate: float = 0.0
    label_heads: dict[str, int] | None = None
    pooler_output_size: int = None  # type: ignore[assignment]
    pooler_act: str = "tanh"
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    num_labels: int = None  # type: ignore[assignment]
    problem_type: str | None = None

    def __post_init__(self) -> None:
        heads = _resolve_heads(self.label_heads)
        labels = _resolve_labels(self.id2label, self.label2id, self.num_labels, heads)
        resolved: dict[str, Any] = {
            "tubelet_size": _lengths("tubelet_size", self.tubelet_size, "(frames, height, width)"),
            "label_heads": heads,
            "id2label": labels,
            "label2id": _invert(labels),
            "num_labels": len(labels),
        }
        if isinstance(self.image_size, (list, tuple)):
            resolved["image_size"] = _lengths("image_size", self.image_size, "(height, width)")
        if self.pooler_output_size is None:
            resolved["pooler_output_size"] = self.hidden_size
        if self.num_temporal_layers is None and self.attention_type == "factorised_encoder":
            resolved["num_temporal_layers"] = DEFAULT_TEMPORAL_LAYERS
        if self.attention_order is None and self.attention_type == "factorised_self_attention":
            resolved["attention_order"] = "time_space"
        if self.classifier_pooling is None:
            resolved["classifier_pooling"] = "mean" if self.has_token_grid else "cls"
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # plain assignment fails because the class is frozen
        self._check_fields()
        self._check_consistency()

    def _check_fields(self) -> None:
        for name in (
            "num_frames",
            "num_channels",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "pooler_output_size",
        ):
            check_integer(name, getattr(self, name), minimum=1)
        if not isinstance(self.image_size, tuple):
            check_integer("image_size", self.image_size, minimum=1)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        check_number("initializer_range", self.initializer_range, minimum=0)
        check_number("layer_norm_eps", self.layer_norm_eps, minimum=0, exclude_minimum=True)
        for name in ("hidden_act", "pooler_act"):
            check_choice(name, getattr(self, name), ACTIVATION_NAMES)
        check_bool("qkv_bias", self.qkv_bias)
        check_choice("problem_type", self.problem_type, (*PROBLEM_TYPES, None))
        check_choice("attention_type", self.attention_type, ATTENTION_TYPES)
        check_choice("classifier_pooling", self.classifier_pooling, CLASSIFIER_POOLINGS)
        check_choice("tubelet_embedding", self.tubelet_embedding, TUBELET_EMBEDDINGS)
        if self.attention_type == "factorised_encoder":
            check_integer("num_temporal_layers", self.num_temporal_layers, minimum=1)
        if self.attention_type == "factorised_self_attention":
            check_choice("attention_order", self.attention_order, ATTENTION_ORDERS)

    def _check_consistency(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            rule = f"a multiple of num_attention_heads ({self.num_attention_heads})"
            raise broken_rule("hidden_size", self.hidden_size, rule)
        for name, attention_type in (
            ("num_temporal_layers", "factorised_encoder"),
            ("attention_order", "factorised_self_attention"),
        ):
            value = getattr(self, name)
            if value is not None and self.attention_type != attention_type:
                raise broken_rule(name, value, f"None unless attention_type is {attention_type!r}")
        if self.has_token_grid and self.has_cls_token:
            rule = f"'mean' for the attention_type {self.attention_type!r}, which has no CLS token"
            raise broken_rule("classifier_pooling", self.classifier_pooling, rule)
        if self.attention_type == "factorised_dot_product" and self.num_attention_heads % 2:
            rule = "even for the attention_type 'factorised_dot_product', half of the heads for time and half for space"
            raise broken_rule("num_attention_heads", self.num_attention_heads, rule)
        frames, height, width = self.tubelet_size
        if self.num_frames % frames:
            raise broken_rule("num_frames", self.num_frames, f"a multiple of the {frames} frames of a tubelet")
        if self.image_height % height or self.image_width % width:
            raise broken_rule("image_size", self.image_size, f"a multiple of the {height}x{width} pixels of a tubelet")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise broken_rule("num_labels", 1, ">= 2 for single_label_classification")
        if self.label_heads is not None and self.problem_type not in (None, "single_label_classification"):
            raise broken_rule("problem_type", self.problem_type, "single_label_classification with label_heads")

    @property
    def image_height(self) -> int:
        """Height of a frame in pixels."""
        return self.image_size[0] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def image_width(self) -> int:
        """Width of a frame in pixels."""
        return self.image_size[1] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tubelets along (time, height, width), the axes of the token sequence in this order."""
        frames, height, width = self.tubelet_size
        return self.num_frames // frames, self.image_height // height, self.image_width // width

    @property
    def num_patches(self) -> int:
        """Number of tubelets of a clip, which is the number of tokens without CLS."""
        return math.prod(self.grid)

    @property
    def labels_of_heads(self) -> dict[str, list[str]]:
        """Name of each head -> its labels, in the order of the classifier's outputs. Empty if there is one head."""
        labels = iter(self.id2label.values())
        return {name: list(islice(labels, size)) for name, size in (self.label_heads or {}).items()}

    @property
    def has_cls_token(self) -> bool:
        """Whether each encoder has a CLS token, which is then what is classified."""
        return self.classifier_pooling == "cls"

    @property
    def has_token_grid(self) -> bool:
        """Whether the tokens of a clip form a (time, space) grid in all layers, as in the paper's models 3 and 4."""
        return self.attention_type in GRID_ATTENTION_TYPES

    @property
    def sequence_length(self) -> int:
        """Number of tokens in the longest sequence that attends to itself."""
        if self.attention_type == "spatiotemporal":
            return self.has_cls_token + self.num_patches
        time, height, width = self.grid
        return max(self.has_cls_token + height * width, time if self.has_token_grid else self.has_cls_token + time)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a clip in the layers that follow the embedding, including CLS."""
        cls_tokens = self.grid[0] if self.attention_type == "factorised_encoder" else 1
        return self.num_patches + self.has_cls_token * cls_tokens

    @property
    def has_placeholder_labels(self) -> bool:
        """Whether the classes are named LABEL_0, LABEL_1, ..., i.e. the checkpoint has no labels."""
        return all(label == f"LABEL_{index}" for index, label in self.id2label.items())

    def with_labels(self, labels: Sequence[str]) -> VivitConfig:
        """Returns a copy with other class labels, in the order of the classes.

        Raises:
            ConfigError: There are not exactly `num_labels` labels, or one is repeated within a head.
        """
        id2label = dict(enumerate(labels))
        return replace(self, id2label=id2label, label2id=_invert(id2label))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VivitConfig:
        """Creates a configuration from the content of a config.json. Unknown keys are ignored.

        Raises:
            ConfigError: A value is invalid, or `model_type` is not "vivit".
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise broken_rule("model_type", values["model_type"], repr(MODEL_TYPE))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json, readable by `from_dict` and, for the published model, transformers."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if name not in OMITTED_VALUES or value != OMITTED_VALUES[name]
        }
        del values["num_labels"]  # implied by id2label
        if self.label_heads is not None:  # pairs, because the keys of objects are sorted in the file
            values["label_heads"] = [[name, size] for name, size in self.label_heads.items()]
        return {"model_type": MODEL_TYPE, **values}

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> VivitConfig:
        """Loads the config.json of a checkpoint.

        Args:
            name_or_path: a local directory or a hub id.
            **hub: see `handler.checkpoints.hub.fetch`.

        Raises:
            CheckpointError: The errors of `fetch`; CheckpointFileError for an unreadable or invalid file.
        """
        path = fetch(name_or_path, CONFIG_FILE, **hub)
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise CheckpointFileError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str], *, architecture: str | None = None) -> None:
        """Writes config.json.

        Args:
            directory: created if missing.
            architecture: name of the model class, stored as `architectures`.
        """
        values = self.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        write_json(Path(directory, CONFIG_FILE), values)


def _lengths(name: str, value: Any, axes: str) -> tuple[int, ...]:
    count = axes.count(",") + 1
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(is_integer(v, minimum=1) for v in value):
        raise broken_rule(name, value, f"{count} integers {axes}, each >= 1")
    return tuple(value)


def _resolve_heads(label_heads: Any) -> dict[str, int] | None:
    """Returns the sizes of the heads, given as a mapping or as pairs."""
    if label_heads is None:
        return None
    pairs = list(label_heads.items()) if isinstance(label_heads, Mapping) else label_heads
    is_list = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    )
    if not is_list or len(pairs) < 2:
        raise broken_rule("label_heads", label_heads, "the names and numbers of labels of two or more heads")
    for name, size in pairs:
        if not isinstance(name, str) or not name.strip():
            raise broken_rule("label_heads", name, "named with strings that are not empty")
        check_integer(f"label_heads[{name!r}]", size, minimum=1)
    heads = dict(pairs)
    if len(heads) < len(pairs):
        raise broken_rule("label_heads", label_heads, "heads with different names")
    return heads


def _resolve_labels(
    id2label: Mapping[Any, str] | None,
    label2id: Mapping[str, Any] | None,
    num_labels: int | None,
    heads: Mapping[str, int] | None,
) -> dict[int, str]:
    """Returns the complete `id2label` for any combination of the four parameters."""
    for name, mapping in (("id2label", id2label), ("label2id", label2id)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise broken_rule(name, mapping, "a mapping")
    if num_labels is not None:
        check_integer("num_labels", num_labels, minimum=1)
    if id2label is not None:
        labels = _sort_labels("id2label", id2label.items())
        if label2id is not None:
            _warn_if_stale(label2id, labels)
    elif label2id is not None:
        labels = _sort_labels("label2id", [(index, label) for label, index in label2id.items()])
    else:
        default = 2 if heads is None else sum(heads.values())
        labels = {index: f"LABEL_{index}" for index in range(default if num_labels is None else num_labels)}
    if num_labels not in (None, len(labels)):
        raise broken_rule("num_labels", num_labels, f"the number of labels ({len(labels)})")
    if heads is not None and sum(heads.values()) != len(labels):
        raise broken_rule("label_heads", heads, f"sizes with the sum of num_labels ({len(labels)})")
    _check_unique(labels, heads)
    return labels


def _check_unique(labels: Mapping[int, str], heads: Mapping[str, int] | None) -> None:
    remaining = iter(labels.values())
    for head, size in (heads or {"": len(labels)}).items():
        counts = Counter(islice(remaining, size))
        if repeated := sorted(label for label, count in counts.items() if count > 1):
            where = f" within the head {head!r}" if head else ""
            raise broken_rule("id2label", repeated, f"a mapping of unique class labels{where}")


def _invert(labels: Mapping[int, str]) -> dict[str, int]:
    """Returns label -> index, or nothing if two heads share a label."""
    indices = {label: index for index, label in labels.items()}
    return indices if len(indices) == len(labels) else {}


def _warn_if_stale(label2id: Mapping[str, Any], labels: Mapping[int, str]) -> None:
    # Fine-tuning scripts often rename the classes in id2label only.
    expected = {label: str(index) for label, index in _invert(labels).items()}
    given = {label: str(index) for label, index in label2id.items()}  # some files store the indices as strings
    if expected and given != expected:
        label = next(label for label in {**expected, **given} if expected.get(label) != given.get(label))
        warnings.warn(
            f"label2id disagrees with id2label and is ignored: the class {label!r} has the index {given.get(label)} in "
            f"label2id and {expected.get(label)} in id2label",
            stacklevel=5,  # the caller of the constructor
        )


def _sort_labels(name: str, pairs: Collection[tuple[Any, Any]]) -> dict[int, str]:
    """Returns the labels of (index, label) pairs in the order of their indices."""
    labels = dict(sorted(((_label_index(name, index), label) for index, label in pairs), key=lambda pair: pair[0]))
    if not pairs or list(labels) != list(range(len(pairs))):
        raise broken_rule(name, list(labels), f"numbered 0 to {max(len(pairs) - 1, 0)} without gaps")
    for label in labels.values():
        if not isinstance(label, str):
            raise broken_rule(name, label, "a mapping of class labels, all of them strings")
    return labels


def _label_index(name: str, value: Any) -> int:
    """Returns a class index as an integer. JSON keys are strings, and so are the values of some label2id."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not is_integer(value, minimum=0):
        raise broken_rule(name, value, "numbered with integers")
    return int(value)

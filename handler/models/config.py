"""The model's configuration: a frozen dataclass, validated where it is made. No torch here.

ConfigError (ValueError)   a field has a value that breaks a rule: the message names field, value and rule
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from handler.checkpoints.hub import CheckpointFileError, fetch, read_json
from handler.validation import ConfigError, broken_rule

CONFIG_FILE = "config.json"
MODEL_TYPE = "vivit"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# The names, among those of transformers, of functions without parameters; model.py has the functions.
ACTIVATIONS = frozenset(
    {
        "gelu",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "swish",
        "tanh",
    }
)


@dataclass(frozen=True, kw_only=True)
class VivitConfig:
    """The shape of a ViViT and the names of its classes: the published fields and defaults.

    image_size                    pixels: one number for a square, or (height, width)
    num_frames                    frames of a clip
    tubelet_size                  (frames, pixels of height, pixels of width) that one token covers
    num_channels                  3 for RGB
    hidden_size                   width D of a token, a multiple of num_attention_heads
    num_hidden_layers             layers, each of attention and MLP
    intermediate_size             width of the MLP's hidden layer
    hidden_act, pooler_act        of the MLP and of the pooling layer, each one of ACTIVATIONS
    hidden_dropout_prob           after the embedding, the attention and the MLP; in training only
    attention_probs_dropout_prob  of the attention weights; in training only
    layer_norm_eps                added to the variance in every LayerNorm
    initializer_range             standard deviation of new weights
    qkv_bias                      whether query, key and value have biases
    pooler_output_size            None becomes hidden_size
    id2label, label2id            class number -> name and back; each is derived from the other
    num_labels                    without names: this many, LABEL_0 and so on; None is two, as published
    problem_type                  the loss in training, one of PROBLEM_TYPES; None: told from the labels

    Once made, `id2label` (keys 0 to num_labels - 1 in order), `label2id` and `num_labels` are all there.
    Raises ConfigError. Source: section 3 of the ViViT paper, arXiv 2103.15691; by default ViViT-B/16x2.
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
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    num_labels: int | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        labels = _resolve_labels(self.id2label, self.label2id, self.num_labels)
        resolved = {
            "tubelet_size": _lengths("tubelet_size", self.tubelet_size, "(frames, height, width)"),
            "id2label": labels,
            "label2id": {label: index for index, label in labels.items()},
            "num_labels": len(labels),
        }
        if isinstance(self.image_size, (list, tuple)):
            resolved["image_size"] = _lengths("image_size", self.image_size, "(height, width)")
        if self.pooler_output_size is None:
            resolved["pooler_output_size"] = self.hidden_size
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # the one way to complete a frozen instance
        self._check_fields()
        self._check_agreement()

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
            _check_length(name, getattr(self, name))
        if not isinstance(self.image_size, tuple):
            _check_length("image_size", self.image_size)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _check_number(name, getattr(self, name), "from 0 to 1", lambda value: 0 <= value <= 1)
        _check_number("initializer_range", self.initializer_range, "0 or more", lambda value: value >= 0)
        _check_number("layer_norm_eps", self.layer_norm_eps, "more than 0", lambda value: value > 0)
        for name in ("hidden_act", "pooler_act"):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in ACTIVATIONS:
                raise broken_rule(name, getattr(self, name), f"one of {', '.join(sorted(ACTIVATIONS))}")
        if not isinstance(self.qkv_bias, bool):
            raise broken_rule("qkv_bias", self.qkv_bias, "true or false")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise broken_rule("problem_type", self.problem_type, f"None or one of {', '.join(PROBLEM_TYPES)}")

    def _check_agreement(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            rule = f"a multiple of num_attention_heads, {self.num_attention_heads}"
            raise broken_rule("hidden_size", self.hidden_size, rule)
        frames, height, width = self.tubelet_size
        if self.num_frames % frames:
            raise broken_rule("num_frames", self.num_frames, f"a multiple of the tubelet's {frames} frames")
        if self.image_height % height or self.image_width % width:
            rule = f"a multiple of the tubelet's {height}x{width} pixels"
            raise broken_rule("image_size", self.image_size, rule)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise broken_rule("num_labels", 1, "2 or more for single_label_classification")

    @property
    def image_height(self) -> int:
        """Pixels."""
        return self.image_size[0] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def image_width(self) -> int:
        """Pixels."""
        return self.image_size[1] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets along (time, height, width), the order in which their tokens are laid out."""
        frames, height, width = self.tubelet_size
        return self.num_frames // frames, self.image_height // height, self.image_width // width

    @property
    def num_patches(self) -> int:
        """Tubelets of a clip: the tokens but CLS."""
        return math.prod(self.grid)

    @property
    def has_placeholder_labels(self) -> bool:
        """Whether every class n is called LABEL_n: the checkpoint does not say what its classes are."""
        return all(label == f"LABEL_{index}" for index, label in self.id2label.items())

    def with_labels(self, labels: Sequence[str]) -> "VivitConfig":
        """The same model, its classes named in this order, as many as it has. Raises ConfigError."""
        return replace(self, id2label=dict(enumerate(labels)), label2id=None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VivitConfig":
        """From the content of a config.json; what is no field is ignored, older and newer files have more.

        Raises ConfigError, also for another `model_type` than "vivit".
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise broken_rule("model_type", values["model_type"], repr(MODEL_TYPE))
        own = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in own})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json: `from_dict` of it equals this, and transformers reads it too."""
        values = asdict(self)
        del values["num_labels"]  # id2label says it
        return {"model_type": MODEL_TYPE, **values}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "VivitConfig":
        """From the config.json of a local directory or hub repository; the options are those of `hub.fetch`.

        Raises CheckpointError: those of `hub.fetch`, and CheckpointFileError where the content breaks a rule.
        """
        hub = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        path = fetch(name_or_path, CONFIG_FILE, revision=revision, **hub)
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise CheckpointFileError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike, *, architecture: str | None = None) -> None:
        """Write config.json into `directory`, made if missing; `architecture` names a model class."""
        values = self.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, sort_keys=True)
        Path(directory, CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_length(field: str, value: Any) -> None:
    if not _is_length(value):
        raise broken_rule(field, value, "a whole number, 1 or more")


def _check_number(field: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):
        raise broken_rule(field, value, f"a number, {rule}")


def _lengths(field: str, value: Any, names: str) -> tuple[int, ...]:
    wanted = names.count(",") + 1
    if not isinstance(value, (list, tuple)) or len(value) != wanted or not all(map(_is_length, value)):
        raise broken_rule(field, value, f"{wanted} whole numbers {names}, each 1 or more")
    return tuple(value)


def _resolve_labels(
    id2label: Mapping[Any, str] | None, label2id: Mapping[str, Any] | None, num_labels: int | None
) -> dict[int, str]:
    """The id2label that everything given agrees with."""
    for field, mapping in (("id2label", id2label), ("label2id", label2id)):
        if mapping is not None and not isinstance(mapping, Mapping):
            raise broken_rule(field, mapping, "a mapping")
    if num_labels is not None:
        _check_length("num_labels", num_labels)
    if id2label is None and label2id is None:
        return {index: f"LABEL_{index}" for index in range(2 if num_labels is None else num_labels)}
    forth = None if id2label is None else _in_order("id2label", id2label.items())
    back = None if label2id is None else _in_order("label2id", [(i, label) for label, i in label2id.items()])
    labels = back if forth is None else forth
    if back not in (None, labels):
        index = min(index for index in {**labels, **back} if labels.get(index) != back.get(index))
        rule = f"the inverse of id2label, where class {index} is {labels.get(index)!r}"
        raise broken_rule("label2id", back.get(index), rule)
    if num_labels not in (None, len(labels)):
        raise broken_rule("num_labels", num_labels, f"the number of classes named, {len(labels)}")
    return labels


def _in_order(field: str, pairs: Collection[tuple[Any, Any]]) -> dict[int, str]:
    labels = dict(sorted(((_index(field, i), label) for i, label in pairs), key=lambda pair: pair[0]))
    if not pairs or list(labels) != list(range(len(pairs))):
        raise broken_rule(field, list(labels), f"numbered 0 to {max(len(pairs) - 1, 0)} without a gap")
    for label in labels.values():
        if not isinstance(label, str):
            raise broken_rule(field, label, "names of classes, each a string")
    if twice := sorted(label for label, count in Counter(labels.values()).items() if count > 1):
        raise broken_rule(field, twice, "names of classes, each used once")
    return labels


def _index(field: str, value: Any) -> int:
    """JSON makes strings of all keys, and some published files have strings as values of label2id too."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise broken_rule(field, value, "numbered with whole numbers")
    return value

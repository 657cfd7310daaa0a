"""Recipe: everything that determines the result of a training run, apart from the data and the initial checkpoint.

The defaults are the regularization of the paper's Kinetics models with an optimizer, a batch size and a learning rate
for fine-tuning on a small data set. `PRESETS` has the paper's recipes: the table of hyperparameters in the appendix of
arXiv 2103.15691, and the configurations of the original code (scenic/projects/vivit/configs).

Imports no torch, so that `vivit finetune --help` is fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from handler.validation import ConfigError, broken_rule, check_bool, check_choice, check_integer, check_number

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LEARNING_RATES = MappingProxyType({"adamw": 1e-4, "sgd": 0.01})  # for `learning_rate=None`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: passes over the training videos.
        batch_size: clips per optimizer step, in all processes together. An epoch whose number of videos is no multiple
            of it repeats a few of them in its last step.
        micro_batch_size: clips per forward pass of one process; the gradients of a step are accumulated. None: one
            forward pass per step.
        optimizer: "adamw", or "sgd" with momentum 0.9, the paper's.
        learning_rate: the maximum; None: that of the optimizer in LEARNING_RATES. A cosine lowers it to 0.
        warmup_epochs: epochs in which the learning rate rises linearly from 0, at most a quarter of `epochs`.
        weight_decay: applies to weight matrices, not to biases, norms, CLS and position embeddings.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        random_crop: whether clips are cropped at a random position, and taken at a random position in time.
        stride_frames: distance between the frames of a training clip. None: the clip covers the whole video, as in
            serving. The paper's: 2 for Kinetics, 1 for EPIC-Kitchens and SSv2.
        scale_jitter: smallest and largest random factor of the size before cropping. A factor that would not cover the
            crop is raised.
        flip: probability that a clip is mirrored left to right. 0 if that changes labels, as in "moving left".
        color_jitter: probability of random brightness, contrast, saturation and hue.
        color_drop: probability that a clip is converted to gray.
        rand_augment_layers: random operations per clip, see augmentation.py.
        rand_augment_magnitude: strength of these operations, from 0 to 30.
        mixup: alpha of the Beta distribution of the share of the other clip in a mix of two. 0: no mixing.
        label_smoothing: share of the target that is spread over all labels.
        drop_path_rate: stochastic depth: probability that a residual branch of the last layer is skipped. It rises
            linearly from 0 in the first layer.
        freeze_backbone: whether only the classifier is trained.
        checkpoint_activations: whether activations are recomputed in the backward pass, to save memory.
        precision: of the forward pass. "auto": bfloat16 on a GPU that has it, float16 on others, float32 on a CPU.
        seed: determines all random numbers.

    Raises:
        ConfigError: A value is invalid.
    """

    epochs: int = 30
    batch_size: int = 16
    micro_batch_size: int | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    warmup_epochs: float = 2.5
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    random_crop: bool = True
    stride_frames: int | None = None
    scale_jitter: tuple[float, float] = (0.9, 1.33)
    flip: float = 0.5
    color_jitter: float = 0.8
    color_drop: float = 0.1
    rand_augment_layers: int = 0
    rand_augment_magnitude: float = 15.0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    drop_path_rate: float = 0.0
    freeze_backbone: bool = False
    checkpoint_activations: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("epochs", 1), ("batch_size", 1), ("rand_augment_layers", 0), ("seed", 0)):
            check_integer(name, getattr(self, name), minimum=minimum)
        for name in ("micro_batch_size", "stride_frames"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        for name in ("random_crop", "freeze_backbone", "checkpoint_activations"):
            check_bool(name, getattr(self, name))
        for name in ("flip", "color_jitter", "color_drop"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        for name in ("warmup_epochs", "weight_decay", "mixup"):
            check_number(name, getattr(self, name), minimum=0)
        for name in ("label_smoothing", "drop_path_rate"):
            check_number(name, getattr(self, name), minimum=0, maximum=0.99)
        check_number("max_grad_norm", self.max_grad_norm, minimum=0, exclude_minimum=True)
        check_number("rand_augment_magnitude", self.rand_augment_magnitude, minimum=0, maximum=30)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimizer])
        check_number("learning_rate", self.learning_rate, minimum=0, exclude_minimum=True)
        object.__setattr__(self, "scale_jitter", tuple(self.scale_jitter))  # JSON has no tuples
        smallest, largest = self.scale_jitter
        if not 0.1 <= smallest <= largest <= 10:
            raise broken_rule("scale_jitter", self.scale_jitter, "two factors from 0.1 to 10, the smaller one first")
        size = self.micro_batch_size or self.batch_size
        if self.mixup and (self.batch_size % 2 or size % 2):
            raise broken_rule("batch_size and micro_batch_size", (self.batch_size, size), "even for mixup")

    def to_dict(self) -> dict[str, Any]:
        """Returns the values by name, as JSON types."""
        return {**dataclasses.asdict(self), "scale_jitter": list(self.scale_jitter)}


_PUBLISHED = {"optimizer": "sgd", "batch_size": 64, "weight_decay": 0.0}
_STRONG = {**_PUBLISHED, "color_jitter": 0.0, "color_drop": 0.0, "rand_augment_layers": 2}
# Fields that differ from the defaults of Recipe.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        "none": {
            "random_crop": False,
            "scale_jitter": (1.0, 1.0),
            "flip": 0.0,
            "color_jitter": 0.0,
            "color_drop": 0.0,
        },
        "kinetics400": {
            **_PUBLISHED,
            "learning_rate": 0.1,
            "stride_frames": 2,
        },
        "epic-kitchens": {
            **_STRONG,
            "epochs": 50,
            "learning_rate": 0.5,
            "stride_frames": 1,
            "rand_augment_magnitude": 15.0,
            "mixup": 0.1,
            "label_smoothing": 0.2,
            "drop_path_rate": 0.2,
        },
        "ssv2": {
            **_STRONG,
            "epochs": 35,
            "learning_rate": 0.4,
            "stride_frames": 1,
            "flip": 0.0,  # many labels have a direction, such as "pulling something from left to right"
            "rand_augment_magnitude": 20.0,
            "mixup": 0.3,
            "label_smoothing": 0.3,
            "drop_path_rate": 0.3,
        },
    }
)


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the values that differ: "epochs is 20, was 10; seed is 1, was 0", empty if none does."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} is {new.get(name)}, was {old.get(name)}" for name in names)


def check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a run that is resumed has the arguments with which it started."""
    if differences := describe_differences(old, new):
        raise ConfigError(f"--resume needs the arguments of the first start: {differences}")

"""Loads a checkpoint strictly, runs it once and describes it, for `vivit build`, `vivit check` and `vivit convert`."""

from pathlib import Path

import numpy as np

from handler.assets import LABELS
from handler.classifier import VideoClassifier
from handler.cli.command import BuildError
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.validation import ConfigError

GRAY = 127


def load_model(checkpoint: str, *, revision: str | None) -> VivitForVideoClassification:
    """Loads a model in the dtype of its weights.

    Raises:
        CheckpointError, ValueError: weights are missing, unexpected or have other shapes, or a file is invalid.
    """
    return VivitForVideoClassification.from_pretrained(checkpoint, torch_dtype="auto", revision=revision)


def load_image_processor(checkpoint: str, *, revision: str | None) -> VivitImageProcessor:
    """Loads an image processor.

    Raises:
        CheckpointError, ValueError: preprocessor_config.json is missing or invalid.
    """
    return VivitImageProcessor.from_pretrained(checkpoint, revision=revision)


def set_labels(model: VivitForVideoClassification, labels: str) -> None:
    """Gives the classes of a model new names.

    Args:
        model: whose configuration is replaced.
        labels: see `read_labels`.

    Raises:
        BuildError: the number of names is not the number of classes, or a name is repeated within a label head.
    """
    names = read_labels(labels)
    if len(names) != model.config.num_labels:
        raise BuildError(f"the checkpoint has {model.config.num_labels} classes, but --labels names {len(names)}")
    try:
        model.config = model.config.with_labels(names)
    except ConfigError as error:
        raise BuildError(f"--labels {labels}: {error}") from error


def read_labels(labels: str) -> list[str]:
    """Reads the names of the classes.

    Args:
        labels: the name of a list that the package contains, or a text file with one name per line.

    Raises:
        BuildError: no such file.
    """
    path = Path(labels)
    bundled = LABELS / f"{labels}.txt"
    if bundled.is_file():
        path = bundled
    elif not path.is_file():
        names = ", ".join(sorted(file.stem for file in LABELS.glob("*.txt")))
        raise BuildError(f"--labels must be one of [{names}] or a text file; {labels!r} is not a file")
    # utf-8-sig: editors on Windows write a byte order mark.
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def describe_model(config: VivitConfig) -> str:
    """Returns the attention type, the sizes and the tokens of a model."""
    layers = f"{config.num_hidden_layers} layers"
    if config.num_temporal_layers is not None:
        layers += f" for each time step and {config.num_temporal_layers} over time"
    frames, height, width = config.tubelet_size
    tokens = f"tubelets of {frames} x {height} x {width} (frames x height x width)"
    if config.tubelet_embedding == "uniform_frames":
        tokens = f"patches of {height} x {width} (height x width) of {config.grid[0]} frames"
    return (
        f"attention type {config.attention_type}, {layers}, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {tokens}"
    )


def describe_input(config: VivitConfig) -> str:
    """Returns the number and size of the frames of a clip."""
    return f"{config.num_frames} frames of {config.image_height} x {config.image_width} pixels (H x W)"


def describe_placeholder_labels(model: VivitForVideoClassification) -> str | None:
    """Returns a warning if the classes only have the names LABEL_0, LABEL_1, ..."""
    if not model.config.has_placeholder_labels:
        return None
    last = model.config.num_labels - 1
    return (
        f"the classes are only named LABEL_0 ... LABEL_{last}, and so will predictions be: use --labels kinetics400 or "
        "--labels FILE"
    )


def run_once(classifier: VideoClassifier) -> None:
    """Classifies a gray clip.

    Raises:
        BuildError: the logits are not finite.
    """
    try:
        classifier.logits([gray_clip(classifier)])
    except FloatingPointError as error:
        raise BuildError(
            "the logits of a gray clip are NaN or infinite: the weights are corrupt, or too large for their dtype"
        ) from error


def gray_clip(classifier: VideoClassifier) -> np.ndarray:
    """Returns one view of the size that the model expects, uint8 (1, T, C, h, w)."""
    config = classifier.config
    shape = (1, config.num_frames, config.num_channels, config.image_height, config.image_width)
    return np.full(shape, GRAY, np.uint8)

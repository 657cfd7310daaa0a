"""Describes a training run: figures, and the model card, which is the checkpoint's README.md."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from handler import __version__
from handler.checkpoints.files import WEIGHTS_FILE
from handler.checkpoints.hub import HUB_ID
from handler.models.config import VivitConfig
from handler.training.evaluation import TOP, Evaluation
from handler.training.state import SKIPPED_FILE

logger = logging.getLogger(__name__)

CARD_FILE, CURVES_FILE, CONFUSION_FILE = "README.md", "curves.png", "confusion.png"
FIGURE_DPI = 120
MAX_ROWS = 50  # of a table of labels in the model card

Log = Sequence[Mapping[str, Any]]


def write_report(
    directory: str | os.PathLike[str],
    *,
    log: Log,
    evaluation: Evaluation | None,
    recipe: Mapping[str, Any],
    data: Mapping[str, Mapping[str, int]],
    skipped: int,
) -> None:
    """Writes the model card README.md, curves.png and confusion.png to the directory of a trained checkpoint.

    Without matplotlib, there are no figures, and a warning is logged.

    Args:
        directory: contains config.json and model.safetensors.
        log: one entry per epoch: epoch, train_loss, train_accuracy, eval_loss, eval_top1, eval_top5, learning_rate and
            videos_per_s. Values may be missing, None or nan.
        evaluation: of the checkpoint in the directory; None if there was nothing to evaluate.
        recipe: all options by name. "init" is the checkpoint that the training started from.
        data: number of videos by split and label.
        skipped: number of these videos that could not be decoded.

    Raises:
        CheckpointError: config.json is missing or invalid.
        OSError: the weights cannot be read, or a file cannot be written.
    """
    directory = Path(directory)
    config = VivitConfig.from_pretrained(directory)
    figures = _write_figures(directory, log=log, evaluation=evaluation, labels=list(config.id2label.values()))
    sections = [
        _header(config, evaluation, init=recipe.get("init")),
        _introduction(directory, config, data, init=recipe.get("init")),
        _accuracy_section(config, log, evaluation, figures),
        _data_section(config, data, skipped=skipped),
        _training_section(log, recipe, figures),
        _reproduction_section(directory),
    ]
    (directory / CARD_FILE).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _write_figures(directory: Path, *, log: Log, evaluation: Evaluation | None, labels: list[str]) -> list[str]:
    """Draws what there is to draw and returns the names of the files."""
    try:
        from handler.training import figures
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        logger.warning("no curves and no confusion matrix are drawn without matplotlib: pip install matplotlib")
        return []
    drawn = {}
    if log:
        drawn[CURVES_FILE] = figures.draw_curves(log)
    if evaluation is not None and evaluation.count:
        drawn[CONFUSION_FILE] = figures.draw_confusion(evaluation.confusion, labels)
    for name, figure in drawn.items():
        figure.savefig(directory / name, dpi=FIGURE_DPI, facecolor="white")
    return list(drawn)


def _header(config: VivitConfig, evaluation: Evaluation | None, *, init: Any) -> str:
    """The metadata that the Hugging Face Hub reads, YAML between two lines of dashes."""
    # transformers has only the first of the paper's models.
    library = "transformers" if config.attention_type == "spatiotemporal" else "vivit-torchserve"
    lines = ["---", f"library_name: {library}", "pipeline_tag: video-classification", "tags:", "- vivit"]
    if evaluation is not None:
        lines += ["metrics:", "- accuracy"]
    if isinstance(init, str) and HUB_ID.fullmatch(init) and not Path(init).exists():
        lines += [f"base_model: {init}"]
    return "\n".join([*lines, "---"])


def _introduction(directory: Path, config: VivitConfig, data: Mapping[str, Mapping[str, int]], *, init: Any) -> str:
    tubelet = " x ".join(map(str, config.tubelet_size))
    layers = f"{config.num_hidden_layers} layers"
    if config.num_temporal_layers is not None:
        layers = f"{config.num_hidden_layers} spatial and {config.num_temporal_layers} temporal layers"
    model = (
        f"{config.attention_type.replace('_', ' ')}, {layers}, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, tubelets of {tubelet} (frames x height x width)"
    )
    size = f"{config.num_frames} frames of {config.image_height} x {config.image_width} pixels (height x width)"
    start = f" It was initialized from `{init}`." if init else ""
    return (
        f"# {_escape(directory.resolve().name)}\n\n"
        f"A ViViT that classifies videos with {config.num_labels} labels, trained on "
        f"{sum(data.get('train', {}).values()):,} videos.{start}\n\n"
        + _table(("", ""), [("architecture", model), ("input", size)])
        + "\n\nTo serve it, `vivit build DIRECTORY` or `vivit serve DIRECTORY`. In Python:\n\n"
        "```python\n"
        "from handler import VideoClassifier\n\n"
        'classifier = VideoClassifier.from_pretrained("DIRECTORY")\n'
        'print(classifier.classify("clip.mp4", top_k=3).predictions)\n'
        "```"
    )


def _accuracy_section(config: VivitConfig, log: Log, evaluation: Evaluation | None, figures: list[str]) -> str:
    if evaluation is None or not evaluation.count:
        return "## Accuracy\n\nThe model was not evaluated: there were no videos for it."
    rows = [("top-1", _percent(evaluation.top1))]
    if config.num_labels > TOP:
        rows.append((f"top-{TOP}", _percent(evaluation.top5)))
    rows += [("videos", f"{evaluation.count:,}"), ("chance", _percent(1 / config.num_labels))]
    text = "## Accuracy\n\n" + _table(("", ""), rows)
    if CONFUSION_FILE in figures:
        text += f"\n\n![Confusion matrix]({CONFUSION_FILE})"
    counts, accuracy = evaluation.confusion.sum(1), evaluation.per_class
    order = [int(index) for index in np.argsort(accuracy, kind="stable") if counts[index]]  # worst first
    title = "By label, worst first"
    if len(order) > MAX_ROWS:
        title += f" ({MAX_ROWS} of {len(order)})"
    label_rows = [(config.id2label[i], _percent(accuracy[i]), f"{counts[i]:,}") for i in order[:MAX_ROWS]]
    return f"{text}\n\n{title}:\n\n" + _table(("label", "top-1", "videos"), label_rows)


def _data_section(config: VivitConfig, data: Mapping[str, Mapping[str, int]], *, skipped: int) -> str:
    labels = list(config.id2label.values())
    shown = labels[:MAX_ROWS]
    rows = [("all", *(f"{sum(counts.values()):,}" for counts in data.values()))]
    rows += [(label, *(f"{counts.get(label, 0):,}" for counts in data.values())) for label in shown]
    text = "## Data\n\nNumber of videos by label and split"
    if len(labels) > len(shown):
        text += f", for {len(shown)} of {len(labels)} labels"
    text += ":\n\n" + _table(("label", *data), rows)
    if skipped:
        text += f"\n\n{skipped:,} of these videos could not be decoded and were left out; `{SKIPPED_FILE}` lists them."
    return text


def _training_section(log: Log, recipe: Mapping[str, Any], figures: list[str]) -> str:
    text = "## Training"
    if CURVES_FILE in figures:
        text += f"\n\n![Loss, accuracy and learning rate over the epochs]({CURVES_FILE})"
    rates = [entry["videos_per_s"] for entry in log if entry.get("videos_per_s")]
    if rates:
        text += (
            f"\n\n{len(log)} epochs were trained, at {np.median(rates):.3g} videos per second (median of the epochs)."
        )
    rows = [(f"`{name}`", f"`{_json_text(value)}`") for name, value in recipe.items()]
    return text + "\n\nAll options:\n\n" + _table(("option", "value"), rows)


def _reproduction_section(directory: Path) -> str:
    with open(directory / WEIGHTS_FILE, "rb") as weights:
        digest = hashlib.sha256()
        while chunk := weights.read(1 << 20):
            digest.update(chunk)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    rows = [
        (f"SHA-256 of {WEIGHTS_FILE}", f"`{digest.hexdigest()}`"),
        ("vivit-torchserve", __version__),
        ("torch", torch.__version__),
        ("PyAV", av.__version__),
        ("Python", platform.python_version()),
        ("device", device),
    ]
    return "## Reproduction\n\n" + _table(("", ""), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _json_text(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)

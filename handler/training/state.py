"""The files of a run: the state that it continues from, the best checkpoint, the log.

The state has weights, optimizer, position and results so far, but no states of random generators: every random number
of a run derives from the seed and the position, see loop.py.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from handler.checkpoints.files import WEIGHTS_FILE
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.training.evaluation import Evaluation
from handler.training.options import check_same
from handler.validation import ConfigError

STATE_FILE = Path("training", "state.pt")
LOG_FILE = Path("training", "log.jsonl")
SKIPPED_FILE = Path("skipped.csv")
TENSORBOARD_FOLDER = Path("training", "tensorboard")


@dataclass
class Progress:
    """How far a run is. All values are plain, so that the file can be read without unpickling objects.

    Attributes:
        arguments: recipe, initial checkpoint and data set, which must not change.
        step: optimizer steps done, in all epochs.
        loss_sum: of the clips of the current epoch.
        correct: of these clips, how many were classified correctly.
        count: number of these clips.
        train_s: seconds that the current epoch has taken.
        log: a line for each finished epoch.
        best: of the epoch whose weights were kept: its number and its evaluation, see `keep_best`.
        skipped: code and message of videos that could not be decoded, by path.
    """

    arguments: dict[str, Any]
    step: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    count: float = 0.0
    train_s: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def keep_best(self, evaluation: Evaluation | None, *, epoch: int, loss: float) -> bool:
        """Returns whether an epoch is the best so far, and keeps its evaluation if so.

        The best epoch has the highest top-1 accuracy and, among equal ones, the smallest loss. Without evaluation it is
        the last one.
        """
        top1 = evaluation.top1 if evaluation else 0.0
        if self.best and evaluation and (top1, -loss) <= (self.best["top1"], -self.best["loss"]):
            return False
        self.best = {"epoch": epoch, "top1": top1, "loss": loss}
        if evaluation:
            confusion = torch.from_numpy(evaluation.confusion)
            self.best |= {"confusion": confusion, "top5": evaluation.top5, "errors": dict(evaluation.errors)}
        return True

    def best_evaluation(self) -> Evaluation | None:
        """Returns the evaluation of the kept weights."""
        if "confusion" not in self.best:
            return None
        return Evaluation(confusion=self.best["confusion"].numpy(), top5=self.best["top5"], errors=self.best["errors"])


def save_state(out: Path, progress: Progress, tensors: Mapping[str, Any]) -> None:
    """Writes the state of a run. A kill at any time leaves the former or the new file, never a part of one.

    Args:
        out: the folder of the run.
        progress: see Progress.
        tensors: state dicts by name.
    """
    path = out / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"progress": asdict(progress), **tensors}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_state(out: Path, arguments: Mapping[str, Any], *, resume: bool) -> tuple[Progress, dict[str, Any]]:
    """Reads the state of the run in `out`, if it has one.

    Args:
        out: the folder of the run.
        arguments: those of this start.
        resume: whether a run in `out` is continued.

    Returns:
        The progress, and the state dicts by name; these are empty if there is nothing to continue.

    Raises:
        ConfigError: `out` has a run or a checkpoint and is not to be resumed, or a run with other arguments, or the
            file is unreadable.
    """
    path = out / STATE_FILE
    if not path.is_file():
        if not resume and (out / WEIGHTS_FILE).exists():
            raise ConfigError(f"{out} has a checkpoint, which training would replace: choose another --out")
        return Progress(dict(arguments)), {}
    if not resume:
        raise ConfigError(f"{out} has a run already: --resume continues it; otherwise choose another --out")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # unpickles no code
        progress = Progress(**tensors.pop("progress"))
    except Exception as error:  # corrupt files raise many different exceptions
        raise ConfigError(f"{path} cannot be read: {error}") from error
    check_same(progress.arguments, arguments)
    return progress, tensors


def save_checkpoint(model: VivitForVideoClassification, processor: VivitImageProcessor, out: Path) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json, each of them at once."""
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=out) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, out / file.name)


def write_log(out: Path, progress: Progress) -> None:
    """Writes the log, one JSON object per epoch, the skipped videos, and TensorBoard's events if it is installed."""
    (out / LOG_FILE).parent.mkdir(parents=True, exist_ok=True)
    (out / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in progress.log))
    with (out / SKIPPED_FILE).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "code", "message"))
        writer.writerows((name, *error) for name, error in sorted(progress.skipped.items()))
    if find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        line = progress.log[-1]
        with SummaryWriter(str(out / TENSORBOARD_FOLDER)) as events:
            for name, value in line.items():
                if value is not None:
                    events.add_scalar(name, value, line["epoch"])

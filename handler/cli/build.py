#!/usr/bin/env python3
"""Builds the archive (.mar) that TorchServe serves: configuration, image processor, weights, labels and handler.

    scripts/build_archive.py --checkpoint DIR_OR_HUB_ID --name vivit --version 1.0

The checkpoint is loaded, checked and run once before anything is written, so a broken one is refused here and not by a
worker. Workers never touch the hub: all that they need is inside.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from handler.assets import LABELS, MODEL_CONFIG
from handler.checkpoints.hub import CheckpointError
from handler.classifier import VideoClassifier
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor

HANDLER = Path(__file__).resolve().parents[1]
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # what TorchServe accepts in a URL
# What TorchServe 0.12 itself reads of a model-config.yaml (org.pytorch.serve.archive.model.ModelConfig).
TORCHSERVE_KEYS = (
    "asyncCommunication",
    "batchSize",
    "clientTimeoutInMills",
    "continuousBatching",
    "deviceIds",
    "deviceType",
    "jobQueueSize",
    "maxBatchDelay",
    "maxNumSequence",
    "maxRetryTimeoutInSec",
    "maxSequenceJobQueueSize",
    "maxWorkers",
    "minWorkers",
    "parallelLevel",
    "parallelType",
    "responseTimeout",
    "sequenceBatching",
    "sequenceMaxIdleMSec",
    "sequenceTimeoutMSec",
    "startupTimeout",
    "torchrun",
    "useJobTicket",
    "useVenv",
)
# Sections for handlers. Ours reads `handler`; the others are those of TorchServe's own, and hurt nobody.
SECTIONS = ("handler", "dali", "deepspeed", "micro_batching", "pippy", "pt2", "rpc")


class BuildError(Exception):
    """The archive cannot be built; the message says why and what to do."""


def main() -> int:
    arguments = parse_arguments()
    try:
        archive = build_archive(**vars(arguments))
    except (BuildError, CheckpointError, ValueError, OSError) as error:
        print(f"build_archive: {error}", file=sys.stderr)
        return 1
    print(f"built {archive} ({archive.stat().st_size / 1e6:.1f} MB)")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a directory, or an id on the Hugging Face hub")
    parser.add_argument("--name", required=True, help="the model's name in URLs, and the file's: NAME.mar")
    parser.add_argument("--version", required=True, help="the model's version, e.g. 1.0")
    parser.add_argument("--export-path", type=Path, default=Path("model_store"), help="default: model_store")
    parser.add_argument(
        "--config", type=Path, default=MODEL_CONFIG, help="default: the one that comes with the package"
    )
    parser.add_argument("--labels", help="kinetics400, or a text file with a label a line in the order of classes")
    parser.add_argument("--revision", help="of the hub repository: a branch, tag or commit")
    parser.add_argument("--force", action="store_true", help="replace an archive of that name")
    return parser.parse_args()


def build_archive(
    *,
    checkpoint: str,
    name: str,
    version: str,
    export_path: Path = Path("model_store"),
    config: Path = MODEL_CONFIG,
    labels: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Builds NAME.mar in `export_path` and returns its path.

    Raises:
        BuildError, CheckpointError, ValueError, OSError: a bad name, labels, options, processor or checkpoint, or an
            archive in the way.
    """
    archive = export_path / f"{name}.mar"
    for flag, value in (("--name", name), ("--version", version)):
        check_fits_into_urls(flag, value)
    if archive.exists() and not force:
        raise BuildError(f"{archive} exists already; --force replaces it")
    options = read_options(config)
    with tempfile.TemporaryDirectory(prefix="vivit-archive-") as temporary:
        contents = Path(temporary) / "contents"
        shutil.copytree(
            HANDLER,
            contents / "handler",
            ignore=shutil.ignore_patterns(
                # The archiver puts the entry file and the configuration at the archive's root.
                "__pycache__",
                "vivit_handler.py",
                "assets",
                "cli",
            ),
        )
        save_checkpoint(checkpoint, contents, labels=labels, revision=revision)
        check_runs(contents, options)
        shutil.copy(config, Path(temporary) / "model-config.yaml")
        weights = contents / "model.safetensors"
        weights.rename(Path(temporary) / weights.name)
        export_path.mkdir(parents=True, exist_ok=True)
        run_archiver(Path(temporary), name=name, version=version, export_path=export_path)
    return archive


def check_fits_into_urls(flag: str, value: str) -> None:
    if not NAME_PATTERN.fullmatch(value):
        raise BuildError(
            f"{flag} becomes part of URLs: it must be of letters, digits, '_', '-' and '.', and begin with a letter or "
            f"a digit; got {value!r}"
        )


def read_options(config: Path) -> HandlerOptions:
    """The `handler:` section of a model-config.yaml; refuses what a worker would stumble over."""
    try:
        settings = yaml.safe_load(config.read_text()) or {}
    except yaml.YAMLError as error:
        raise BuildError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("handler") or {}, dict):
        raise BuildError(f"{config} must hold `key: value` lines, and `handler:` such lines below it")
    check_keys(settings, config)
    try:
        return HandlerOptions.from_dict(settings.get("handler") or {})
    except ValueError as error:
        raise BuildError(f"{config}: {error}") from error


def check_keys(settings: dict, config: Path) -> None:
    """TorchServe passes over a key that it does not know without a word, and so would a typo change nothing."""
    known = (*TORCHSERVE_KEYS, *SECTIONS)
    options = {field.name for field in dataclasses.fields(HandlerOptions)}
    for key in settings:
        if key in options:
            raise BuildError(f"{config}: {key!r} must stand below `handler:`, indented")
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise BuildError(f"{config}: unknown key {key!r}: {hint}")


def save_checkpoint(checkpoint: str, directory: Path, *, labels: str | None, revision: str | None) -> None:
    """Loads the checkpoint strictly and writes it in one layout, whatever it came in: sharded, pickled, renamed."""
    model = VivitForVideoClassification.from_pretrained(checkpoint, torch_dtype="auto", revision=revision)
    if labels is not None:
        names = read_labels(labels)
        if len(names) != model.config.num_labels:
            raise BuildError(f"the checkpoint has {model.config.num_labels} classes, but --labels names {len(names)}")
        model.config = model.config.with_labels(names)
    elif model.config.has_placeholder_labels:
        last = model.config.num_labels - 1
        print(
            f"build_archive: the checkpoint names its classes only LABEL_0 ... LABEL_{last}, and so will the answers: "
            "--labels kinetics400 or --labels FILE puts names on them",
            file=sys.stderr,
        )
    model.save_pretrained(directory)
    VivitImageProcessor.from_pretrained(checkpoint, revision=revision).save_pretrained(directory)


def read_labels(labels: str) -> list[str]:
    path = Path(labels)
    known = LABELS / f"{labels}.txt"
    if known.is_file():
        path = known
    elif not path.is_file():
        names = ", ".join(sorted(file.stem for file in LABELS.glob("*.txt")))
        raise BuildError(f"--labels must be one of [{names}] or a text file; there is no file {labels!r}")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BuildError(f"{path} must name every class once, but has {twice!r} more than once")
    return names


def check_runs(directory: Path, options: HandlerOptions) -> None:
    """Runs what a worker will run, once, on a grey clip."""
    # On the CPU whatever the deployment's device is; half precision there is slow or missing and tells nothing more.
    options = dataclasses.replace(options, dtype="float32", compile=False)
    classifier = VideoClassifier.from_pretrained(directory, options=options)
    config = classifier.config
    grey = np.full((config.num_frames, config.num_channels, config.image_height, config.image_width), 127, np.uint8)
    try:
        classifier.logits([grey[None]])
    except FloatingPointError as error:
        message = "the checkpoint gives NaN or infinite logits for a grey clip: its weights are damaged"
        raise BuildError(message) from error


def run_archiver(staging: Path, *, name: str, version: str, export_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "model_archiver.model_packaging",
        "--model-name",
        name,
        "--version",
        version,
        "--handler",
        str(HANDLER / "vivit_handler.py"),
        "--serialized-file",
        str(staging / "model.safetensors"),
        "--extra-files",
        str(staging / "contents"),
        "--config-file",
        str(staging / "model-config.yaml"),
        # Weights do not compress; storing them makes building and starting a worker faster.
        "--archive-format",
        "zip-store",
        "--export-path",
        str(export_path),
        "--force",
    ]
    # The archiver works in the temporary folder under the model's name: with one each, two builds cannot collide.
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(staging)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"torch-model-archiver failed: {done.stderr.strip() or done.stdout.strip()}")


if __name__ == "__main__":
    sys.exit(main())

"""Builds an archive (.mar) for TorchServe: configuration, image processor, weights, labels and handler.

    vivit build --checkpoint DIRECTORY_OR_HUB_ID --name vivit --version 1.0

The checkpoint is loaded strictly and run once before anything is written. Workers never contact the hub: the archive
contains everything they need. TorchServe takes batching and workers from config.properties: an entry that is missing
there is printed, and `--update-config` writes it.
"""

import argparse
import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.cli.command import BuildError, run_command
from handler.cli.properties import add_model, format_entry, has_model, model_entries, read_properties
from handler.options import HandlerOptions
from handler.validation import describe_unknown

logger = logging.getLogger(__name__)

HANDLER = Path(__file__).resolve().parents[1]
DEFAULT_EXPORT_PATH = Path("model_store")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")  # what TorchServe accepts in a URL
# Files of the package that are not copied to the archive. The archiver adds vivit_handler.py at the archive's root.
NOT_ARCHIVED = ("__pycache__", "vivit_handler.py", "assets", "cli", "training", "corpus", "*.md", "py.typed")
TIMEOUTS = ("responseTimeout", "startupTimeout")
# All keys of a model-config.yaml that TorchServe 0.12 reads (org.pytorch.serve.archive.model.ModelConfig).
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
# Sections for handlers: this one reads `handler`, TorchServe's own handlers read the others.
SECTIONS = ("handler", "dali", "deepspeed", "micro_batching", "pippy", "pt2", "rpc")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit build ARGV` and returns the exit status."""
    arguments = parse_arguments(argv)
    return run_command("build", lambda: build(arguments))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of `vivit build`."""
    parser = argparse.ArgumentParser(
        prog="vivit build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a directory, or an id on the Hugging Face hub")
    parser.add_argument("--name", required=True, help="name of the model in URLs, and of the file: NAME.mar")
    parser.add_argument("--version", required=True, help="version of the model, e.g. 1.0")
    add_build_arguments(parser)
    parser.add_argument(
        "--export-path",
        type=Path,
        default=DEFAULT_EXPORT_PATH,
        metavar="DIR",
        help=f"directory for the archive (default: {DEFAULT_EXPORT_PATH})",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing archive")
    parser.add_argument(
        "--update-config",
        type=Path,
        metavar="FILE",
        help="add the model to `models` and `load_models` of this config.properties",
    )
    return parser.parse_args(argv)


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `vivit build` and `vivit serve` share."""
    parser.add_argument(
        "--config", type=Path, default=MODEL_CONFIG, metavar="FILE", help="model-config.yaml (default: the package's)"
    )
    parser.add_argument("--labels", help="names of the classes: kinetics400, or a text file with one name per line")
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")


def build(arguments: argparse.Namespace) -> int:
    """Builds the archive and prints or writes its entry in config.properties."""
    archive = build_archive(
        checkpoint=arguments.checkpoint,
        name=arguments.name,
        version=arguments.version,
        export_path=arguments.export_path,
        config=arguments.config,
        labels=arguments.labels,
        revision=arguments.revision,
        force=arguments.force,
    )
    print(f"built {archive} ({archive.stat().st_size / 1e6:.1f} MB)")
    if arguments.update_config:
        changed = add_model(arguments.update_config, name=arguments.name, version=arguments.version)
        print(f"{arguments.update_config} {'now has' if changed else 'already has'} {archive.stem} {arguments.version}")
    else:
        print_missing_entry(name=arguments.name, version=arguments.version)
    return 0


def print_missing_entry(*, name: str, version: str) -> None:
    """Prints what ./config.properties, or the shipped one, lacks for this model."""
    local = Path(SERVER_CONFIG.name)
    config = local if local.is_file() else SERVER_CONFIG
    properties = read_properties(config)
    if has_model(properties, name=name, version=version):
        return
    print(
        f"\n{config} has no entry for {name} {version}. Without one, TorchServe does not load the archive at startup "
        "and does not batch its requests.\nSet these two entries, or let --update-config FILE do it:\n"
    )
    for key, value in model_entries(properties, name=name, version=version).items():
        print(format_entry(key, value))


def build_archive(
    *,
    checkpoint: str,
    name: str,
    version: str,
    export_path: Path = DEFAULT_EXPORT_PATH,
    config: Path = MODEL_CONFIG,
    labels: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Path:
    """Builds NAME.mar.

    Args:
        checkpoint: a directory, or an id on the hub.
        name: of the model.
        version: of the model.
        export_path: directory for the archive.
        config: a model-config.yaml.
        labels: `kinetics400`, or a text file with one name per line; None keeps the checkpoint's names.
        revision: branch, tag or commit of the hub repository.
        force: whether an existing archive is replaced.

    Returns:
        The path of the archive.

    Raises:
        CommandError, CheckpointError, ValueError, OSError: the name, the labels, the options, the image processor or
            the checkpoint is invalid, or the archive exists.
    """
    # Imported here because they load torch, which `vivit build --help` and `vivit serve ARCHIVE` do not need.
    from handler.classifier import VideoClassifier
    from handler.cli import checkpoint as checkpoints

    archive = export_path / f"{name}.mar"
    for flag, value in (("--name", name), ("--version", version)):
        check_url_part(flag, value)
    if archive.exists() and not force:
        raise BuildError(f"{archive} exists already; --force replaces it")
    options = read_options(config)
    with tempfile.TemporaryDirectory(prefix="vivit-archive-") as temporary:
        staging = Path(temporary)
        contents = staging / "contents"
        shutil.copytree(HANDLER, contents / "handler", ignore=shutil.ignore_patterns(*NOT_ARCHIVED))

        logger.info("loading %s ...", checkpoint)
        model = checkpoints.load_model(checkpoint, revision=revision)
        if labels is not None:
            checkpoints.set_labels(model, labels)
        if warning := checkpoints.describe_placeholder_labels(model):
            logger.warning("warning: %s", warning)
        # Saved in one layout, whatever the checkpoint's: sharded, pickled, with other names.
        model.save_pretrained(contents)
        checkpoints.load_image_processor(checkpoint, revision=revision).save_pretrained(contents)

        logger.info("running the model once ...")
        # On the CPU, whatever the deployment's device: half precision is slow or missing there.
        options = dataclasses.replace(options, dtype="float32", compile=False)
        checkpoints.run_once(VideoClassifier.from_pretrained(contents, options=options))

        logger.info("writing %s ...", archive)
        write_model_config(config, staging / "model-config.yaml")
        (contents / "model.safetensors").rename(staging / "model.safetensors")
        export_path.mkdir(parents=True, exist_ok=True)
        # Beside the old archive, which stays usable until the new one is complete.
        with tempfile.TemporaryDirectory(prefix=".building-", dir=export_path) as unfinished:
            run_archiver(staging, name=name, version=version, export_path=Path(unfinished))
            os.replace(Path(unfinished) / archive.name, archive)
    return archive


def check_url_part(flag: str, value: str) -> None:
    """Raises BuildError unless TorchServe accepts the value in a URL."""
    if not NAME_PATTERN.fullmatch(value):
        raise BuildError(
            f"{flag} becomes part of URLs: it must consist of letters, digits, '_', '-' and '.', and start with a "
            f"letter or digit; got {value!r}"
        )


def read_options(config: Path) -> HandlerOptions:
    """Returns the `handler:` section of a model-config.yaml.

    Raises:
        BuildError: the file is not valid YAML, or has an unknown key or an invalid option.
    """
    settings = _read_yaml(config)
    known = (*TORCHSERVE_KEYS, *SECTIONS)
    options = {field.name for field in dataclasses.fields(HandlerOptions)}
    for key in settings:
        if key in options:
            raise BuildError(f"{config}: {key!r} must be below `handler:`, indented")
        if key not in known:  # TorchServe would ignore it
            raise BuildError(f"{config}: unknown key {key!r}: {describe_unknown(key, known)}")
    try:
        return HandlerOptions.from_dict(settings.get("handler") or {})
    except ValueError as error:
        raise BuildError(f"{config}: {error}") from error


def write_model_config(config: Path, target: Path) -> None:
    """Copies a model-config.yaml and adds the timeouts that it omits: TorchServe's default of 120 s is too short."""
    settings, defaults = _read_yaml(config), _read_yaml(MODEL_CONFIG)
    missing = {key: defaults[key] for key in TIMEOUTS if settings.get(key) is None}
    if missing:
        target.write_text(yaml.safe_dump({**settings, **missing}, sort_keys=False))
    else:
        shutil.copy(config, target)


def run_archiver(staging: Path, *, name: str, version: str, export_path: Path) -> None:
    """Runs torch-model-archiver.

    Args:
        staging: a directory with model.safetensors, model-config.yaml and contents/.
        name: of the model.
        version: of the model.
        export_path: directory for the archive.

    Raises:
        BuildError: the archiver failed.
    """
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
        # Weights do not compress: uncompressed archives are built and loaded faster.
        "--archive-format",
        "zip-store",
        "--export-path",
        str(export_path),
        "--force",
    ]
    # The archiver works in TMPDIR/NAME: a directory per build, so that two builds cannot collide.
    finished = subprocess.run(command, env={**os.environ, "TMPDIR": str(staging)}, capture_output=True, text=True)
    if finished.returncode != 0:
        raise BuildError(f"torch-model-archiver failed: {finished.stderr.strip() or finished.stdout.strip()}")


def _read_yaml(config: Path) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(config.read_text()) or {}
    except yaml.YAMLError as error:
        raise BuildError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("handler") or {}, dict):
        raise BuildError(f"{config} must consist of `key: value` lines, with further ones below `handler:`")
    return settings


if __name__ == "__main__":
    sys.exit(main())

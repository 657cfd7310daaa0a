"""Converts a checkpoint of the original code, scenic, into a directory that the other commands read.

    vivit convert vivit_large_factorised_encoder/ --out vivit-l-fe-k400 --labels kinetics400

CHECKPOINT is a file that Flax wrote, or a folder with checkpoint_STEP (the largest STEP counts) or checkpoint. What the
checkpoint does not state has an option; the command fails if it needs one. Mean pooling (classifier "gap") is assumed
where there is no CLS token: checkpoints with the classifiers "gmp", "gsp" and "0" look the same and are not supported.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handler.checkpoints import scenic
from handler.checkpoints.flax import find_checkpoint, load_parameters
from handler.checkpoints.names import match_state_dict
from handler.cli.checkpoint import describe_input, describe_model, read_labels
from handler.cli.command import CommandError, integer, run_command
from handler.models.config import ATTENTION_ORDERS, ATTENTION_TYPES, VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor

logger = logging.getLogger(__name__)

# crop_size and min_resize of the original's configurations; other sizes get the ratio of the first.
SHORTER_SIDES = {224: 256, 256: 288}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit convert ARGV` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vivit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a file that Flax wrote, or its folder")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="directory for the result")
    parser.add_argument(
        "--image-size",
        type=integer(minimum=1),
        metavar="N",
        help="height and width of a frame (default: 224 if it fits)",
    )
    parser.add_argument(
        "--num-frames", type=integer(minimum=1), metavar="N", help="frames per clip (default: 32 if it fits)"
    )
    parser.add_argument(
        "--attention-type",
        choices=ATTENTION_TYPES,
        help="needed without a CLS token, where spatiotemporal and factorised_dot_product have the same parameters",
    )
    parser.add_argument(
        "--attention-order", choices=ATTENTION_ORDERS, help="of factorised self-attention (default: time_space)"
    )
    parser.add_argument(
        "--heads", type=_heads, metavar="NAME=N,...", help="label heads in order, e.g. noun=300,verb=97 (EPIC-Kitchens)"
    )
    parser.add_argument(
        "--labels",
        help="names of the classes: kinetics400, or a text file with one name per line; NAME=FILE,... with --heads",
    )
    parser.add_argument("--force", action="store_true", help="replace the files of a checkpoint in DIR")
    arguments = parser.parse_args(argv)
    return run_command("convert", lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> int:
    """Converts the checkpoint and prints what it is."""
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file, expected a directory")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise CommandError(f"{out} is not empty; --force replaces the files of a checkpoint in it")
    file = find_checkpoint(arguments.checkpoint)
    logger.info("reading %s ...", file)
    fields, tensors = scenic.convert(
        load_parameters(file),
        image_size=arguments.image_size,
        num_frames=arguments.num_frames,
        attention_type=arguments.attention_type,
        attention_order=arguments.attention_order,
    )
    config = make_config(fields, heads=arguments.heads, labels=arguments.labels)
    model = make_model(config, tensors, source=file)
    write(model, make_image_processor(config), out)
    print(f"converted {file} to {out}\n{describe_model(config)}; {describe_input(config)}; {describe_labels(config)}")
    if config.attention_type == "factorised_self_attention":
        if arguments.attention_order is None:
            print("assumed: --attention-order time_space, which the checkpoint does not state")
    elif arguments.attention_order is not None:
        print("--attention-order has no effect: only factorised self-attention has an order")
    if config.classifier_pooling == "mean":
        print("assumed: mean pooling (classifier gap), because there is no CLS token")
    return 0


def make_config(fields: Mapping[str, Any], *, heads: Mapping[str, int] | None, labels: str | None) -> VivitConfig:
    """Returns the configuration of a converted checkpoint.

    Args:
        fields: of VivitConfig, without labels.
        heads: numbers of labels of each label head, if there are several.
        labels: the argument --labels.

    Raises:
        CommandError: the numbers of heads, labels and outputs of the classifier differ.
        ConfigError: a field is invalid.
    """
    outputs = fields["num_labels"]
    if heads is not None and sum(heads.values()) != outputs:
        raise CommandError(f"the classifier has {outputs} outputs, but --heads has {sum(heads.values())}")
    names = None
    if heads is not None and (labels is None or "=" in labels):
        names = _labels_of_heads(heads, labels)
    elif labels is not None:
        names = read_labels(labels)
        if len(names) != outputs:
            raise CommandError(f"the classifier has {outputs} outputs, but --labels names {len(names)}")
    config = VivitConfig(**fields, label_heads=None if heads is None else dict(heads))
    return config if names is None else config.with_labels(names)


def make_model(
    config: VivitConfig, tensors: Mapping[str, np.ndarray], *, source: str | os.PathLike[str]
) -> VivitForVideoClassification:
    """Returns the model with these weights.

    Args:
        config: of the model.
        tensors: weights by their published names.
        source: the checkpoint, for error messages.

    Raises:
        CheckpointMismatchError: the weights are not exactly those of the model.
    """
    with torch.device("meta"):
        model = VivitForVideoClassification(config)
    published = {name: torch.from_numpy(array).contiguous() for name, array in tensors.items()}
    model.load_state_dict(match_state_dict(published, model.state_dict(), source=source), assign=True)
    return model


def make_image_processor(config: VivitConfig) -> VivitImageProcessor:
    """Returns the original's preprocessing for evaluation: DMVR's resize_smallest, central crop and zero centering."""
    size = config.image_height
    return VivitImageProcessor(
        size={"shortest_edge": SHORTER_SIDES.get(size, round(size * SHORTER_SIDES[224] / 224))},
        crop_size=size,
        antialias=False,
        do_normalize=False,
    )


def write(model: VivitForVideoClassification, image_processor: VivitImageProcessor, out: Path) -> None:
    """Writes a checkpoint to a directory, which has either all of its files or none if this fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=out.parent) as temporary:
        unfinished = Path(temporary, "checkpoint")
        model.save_pretrained(unfinished)
        image_processor.save_pretrained(unfinished)
        if out.exists() and any(out.iterdir()):
            for file in unfinished.iterdir():
                os.replace(file, out / file.name)
        else:
            os.replace(unfinished, out)


def describe_labels(config: VivitConfig) -> str:
    """Returns the number of labels, of each head if there are several."""
    heads = ", ".join(f"{name} {size}" for name, size in (config.label_heads or {}).items())
    return f"{config.num_labels} labels" + (f" ({heads})" if heads else "")


def _labels_of_heads(heads: Mapping[str, int], labels: str | None) -> list[str]:
    """Returns the labels of all heads, from NAME=FILE,... or numbered."""
    if labels is None:
        return [f"{head}_{index}" for head, size in heads.items() for index in range(size)]
    files = dict(pair.partition("=")[::2] for pair in labels.split(","))
    if files.keys() != heads.keys():
        raise CommandError(f"--labels must have a file for each of the heads {', '.join(heads)}, got {labels!r}")
    names: list[str] = []
    for head, size in heads.items():
        of_head = read_labels(files[head])
        if len(of_head) != size:
            raise CommandError(f"the head {head} has {size} labels, but {files[head]} names {len(of_head)}")
        names += of_head
    return names


def _heads(text: str) -> dict[str, int]:
    """An argparse type: noun=300,verb=97."""
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    if len(dict(pairs)) != len(pairs) or not all(name and size.isdecimal() for name, size in pairs):
        raise argparse.ArgumentTypeError(f"must be different names and numbers such as noun=300,verb=97, got {text!r}")
    return {name: int(size) for name, size in pairs}


if __name__ == "__main__":
    sys.exit(main())

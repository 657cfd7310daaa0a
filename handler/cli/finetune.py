"""Trains a checkpoint on your own videos.

    vivit finetune --data videos --init google/vivit-b-16x2-kinetics400 --out my-model
    vivit build --checkpoint my-model --name my-model --version 1.0

--data is a folder with a folder of videos per label, or a .csv or .parquet file with the columns path, label and
optionally split. --out gets the best checkpoint, and everything that --resume needs after an interruption. Under
torchrun (`torchrun -m handler.cli finetune ...`), all its processes train one model.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.checkpoints.hub import CheckpointError
from handler.cli.command import INTERRUPTED, choose_device, integer, run_command
from handler.models.config import ATTENTION_ORDERS, ATTENTION_TYPES
from handler.threads import available_cores
from handler.training.options import LEARNING_RATES, OPTIMIZERS, PRECISIONS, PRESETS, Recipe

logger = logging.getLogger(__name__)

DEFAULT_EVAL_FRACTION = 0.2
# Options of the model: fields of VivitConfig.
MODEL_FIELDS = (
    "num_frames",
    "image_size",
    "tubelet_size",
    "num_attention_heads",
    "attention_type",
    "num_temporal_layers",
    "attention_order",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit finetune ARGV` and returns the exit status."""
    arguments = parse_arguments(argv)
    return run_command("finetune", lambda: finetune(arguments))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of `vivit finetune`. Those of the recipe and of the model are set only if they are given."""
    parser = argparse.ArgumentParser(
        prog="vivit finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder, .csv or .parquet file")
    parser.add_argument(
        "--init", required=True, metavar="CHECKPOINT", help="a ViViT or an image ViT: directory or hub id"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    parser.add_argument(
        "--eval-fraction",
        type=float,
        default=DEFAULT_EVAL_FRACTION,
        metavar="X",
        help=f"share of the videos to evaluate on, if --data has no split (default: {DEFAULT_EVAL_FRACTION})",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if torch finds a GPU, otherwise cpu)")
    parser.add_argument(
        "--workers", type=integer(minimum=1), metavar="N", help="decoder processes (default: one per core)"
    )
    add_recipe_arguments(parser)
    model = parser.add_argument_group("model", "default: as --init").add_argument
    model("--num-frames", type=int, default=argparse.SUPPRESS, metavar="N", help="frames per clip")
    model("--image-size", type=int, default=argparse.SUPPRESS, metavar="N", help="side of a frame in pixels")
    model("--tubelet-size", type=int, nargs=3, default=argparse.SUPPRESS, metavar="N", help="frames, height, width")
    model("--num-attention-heads", type=int, default=argparse.SUPPRESS, metavar="N", help="if --init does not state it")
    model("--attention-type", choices=ATTENTION_TYPES, default=argparse.SUPPRESS, help="one of the paper's models")
    model("--num-temporal-layers", type=int, default=argparse.SUPPRESS, metavar="N", help="of a factorised encoder")
    model("--attention-order", choices=ATTENTION_ORDERS, default=argparse.SUPPRESS, help="of factorised self-attention")
    model(
        "--tubelet-init",
        default="central_frame",
        metavar="NAME",
        help="how tubelets start from an image ViT: central_frame (default) or filter_inflation",
    )
    return parser.parse_args(argv)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --recipe and an option for each field of Recipe."""
    group = parser.add_argument_group("recipe", "the fields of handler.training.options.Recipe")
    group.add_argument(
        "--recipe",
        choices=tuple(PRESETS),
        default="default",
        help="values of the options below that are not given (default: default, which is shown below)",
    )

    def add(name: str, text: str, **options: Any) -> None:
        flag = "--" + name.replace("_", "-")
        default = getattr(Recipe, name)
        values = default if isinstance(default, tuple) else (default,)
        shown = "" if default is None else f" (default: {' '.join(map(str, values))})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **options)

    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    add("epochs", "passes over the training videos", type=int, metavar="N")
    add("batch_size", "clips per step, in all processes together", type=int, metavar="N")
    add("micro_batch_size", "clips per forward pass; gradients are accumulated (default: all)", type=int, metavar="N")
    add("optimizer", "sgd has momentum 0.9", choices=OPTIMIZERS)
    add("learning_rate", f"maximum learning rate (default: {rates})", type=float, metavar="X")
    add("warmup_epochs", "epochs of warm-up, at most a quarter of all", type=float, metavar="X")
    add("weight_decay", "weight decay of weight matrices", type=float, metavar="X")
    add("max_grad_norm", "norm to which larger gradients are scaled down", type=float, metavar="X")
    add(
        "stride_frames",
        "distance of sampled frames (default: clips cover the video, as in serving)",
        type=int,
        metavar="N",
    )
    add("scale_jitter", "smallest and largest random scale before cropping", type=float, nargs=2, metavar="X")
    add("flip", "probability of mirroring", type=float, metavar="P")
    add("color_jitter", "probability of random colors", type=float, metavar="P")
    add("color_drop", "probability of gray", type=float, metavar="P")
    add("rand_augment_layers", "RandAugment operations per clip; the paper's: 2", type=int, metavar="N")
    add("rand_augment_magnitude", "strength of these operations; the paper's: 15 or 20", type=float, metavar="X")
    add("mixup", "alpha of mixup; the paper's: 0.1 or 0.3", type=float, metavar="X")
    add(
        "label_smoothing",
        "share of the target spread over all labels; the paper's: 0.2 or 0.3",
        type=float,
        metavar="X",
    )
    add("drop_path_rate", "stochastic depth; the paper's: 0.2 or 0.3", type=float, metavar="X")
    add("precision", "dtype of the forward pass", choices=PRECISIONS)
    add("seed", "determines all random numbers, and the split if --data has none", type=int, metavar="N")
    for flag, name, value, text in (
        ("--no-flip", "flip", 0.0, "do not mirror: needed if labels have a direction, such as 'moving left'"),
        ("--no-random-crop", "random_crop", False, "train on the clip that is served"),
        ("--freeze-backbone", "freeze_backbone", True, "train the classifier only"),
        ("--checkpoint-activations", "checkpoint_activations", True, "save memory: compute activations twice"),
    ):
        group.add_argument(flag, dest=name, action="store_const", const=value, default=argparse.SUPPRESS, help=text)


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe that --recipe and the other options make together.

    Raises:
        ConfigError: a value is invalid.
    """
    given = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe) if field.name in arguments
    }
    return Recipe(**{**PRESETS[arguments.recipe], **given})


def finetune(arguments: argparse.Namespace) -> int:
    """Trains, and writes the report."""
    # Imported here because they load torch, which `vivit finetune --help` does not need.
    import torch

    from handler.models.config import VivitConfig
    from handler.training.data import VideoClips, read_data, start_decoders
    from handler.training.distributed import start_group
    from handler.training.initialization import initialize_model, initialize_processor
    from handler.training.loop import fit
    from handler.training.report import write_report

    recipe = read_recipe(arguments)
    data = read_data(arguments.data, eval_fraction=arguments.eval_fraction, seed=recipe.seed)
    data.check_training()
    with contextlib.suppress(ValueError, CheckpointError):  # an image ViT, or an error that initialize_model reports
        data = data.with_label_order(list(VivitConfig.from_pretrained(arguments.init).id2label.values()))
    changes = {name: getattr(arguments, name) for name in MODEL_FIELDS if name in arguments}
    if recipe.drop_path_rate:
        changes["drop_path_rate"] = recipe.drop_path_rate
    fixed = {
        **changes,
        "tubelet_init": arguments.tubelet_init,
        "init": str(arguments.init),
        "data": data.fingerprint(),
    }
    device = choose_device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with start_group(device) as group, contextlib.ExitStack() as stack:
        logger.info(
            "%d labels, %d videos to train on, %d to evaluate", len(data.labels), len(data.train), len(data.evaluation)
        )
        torch.manual_seed(recipe.seed)
        model = initialize_model(
            arguments.init, labels=data.labels, changes=changes, tubelet_init=arguments.tubelet_init
        )
        processor = initialize_processor(arguments.init, config=model.config)
        processes = arguments.workers or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        pool = start_decoders(model.config, processor, processes=processes)
        stack.callback(pool.close)
        try:
            progress = fit(
                model,
                processor,
                train=VideoClips(data.train, pool),
                evaluation=VideoClips(data.evaluation, pool),
                out=arguments.out,
                recipe=recipe,
                group=group,
                arguments=fixed,
                threads=processes,
                resume=arguments.resume,
            )
        except KeyboardInterrupt:
            if group.is_main:
                logger.info("stopped; the same command with --resume continues")
            return INTERRUPTED
        if group.is_main:
            write_report(
                arguments.out,
                log=progress.log,
                evaluation=progress.best_evaluation(),
                recipe=progress.arguments,
                data=data.count_videos(),
                skipped=len(progress.skipped),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checks a checkpoint before it is served: loads it strictly, runs it once, and estimates memory and speed.

    vivit check google/vivit-b-16x2-kinetics400 --labels kinetics400

Prints what the checkpoint contains and lists its problems. The exit status is 0 if it can be served, and 1 otherwise.
"""

import argparse
import contextlib
import resource
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence

import torch

from handler.checkpoints.hub import CheckpointError
from handler.classifier import VideoClassifier
from handler.cli import checkpoint as checkpoints
from handler.cli.build import add_build_arguments, read_options
from handler.cli.command import CommandError, choose_device, run_command
from handler.models.cost import count_multiply_adds
from handler.models.vivit import VivitForVideoClassification

NAME_WIDTH = 12
SHOWN_LABELS = 3
MINIMUM_RUNS = 3
MINIMUM_TIME_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit check ARGV` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vivit check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory, or an id on the Hugging Face hub")
    add_build_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if torch finds a GPU, otherwise cpu)")
    arguments = parser.parse_args(argv)
    return run_command("check", lambda: check(arguments))


def check(arguments: argparse.Namespace) -> int:
    """Prints a report on a checkpoint and returns 0 if it can be served, otherwise 1."""
    options = read_options(arguments.config)
    device = choose_device(arguments.device)
    problems: list[str] = []
    model = image_processor = warning = None
    _print_row("checkpoint", arguments.checkpoint)
    with _collect(problems):
        model = checkpoints.load_model(arguments.checkpoint, revision=arguments.revision)
    with _collect(problems):
        image_processor = checkpoints.load_image_processor(arguments.checkpoint, revision=arguments.revision)
    if model is not None:
        with _collect(problems):
            if arguments.labels is not None:
                checkpoints.set_labels(model, arguments.labels)
        warning = checkpoints.describe_placeholder_labels(model)
        _print_model(model)
        if image_processor is not None:
            with _collect(problems):
                classifier = VideoClassifier(model, image_processor, options=options, device=device)
                _print_row("dtype", f"{_dtype_name(classifier.dtype)}; {classifier.dtype_reason}")
                checkpoints.run_once(classifier)
                _print_row("output", "finite for a gray clip")
                _print_row("memory", _measure_memory(device))
                _print_row("speed", _measure_speed(classifier))
    if warning is not None:
        _print_row("warning", warning)
    for problem in problems:
        _print_row("problem", problem)
    print(f"\n{'This checkpoint cannot be served.' if problems else 'This checkpoint can be served.'}")
    return 1 if problems else 0


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Appends the message of an error to `problems`, so that one report lists all problems."""
    try:
        yield
    except (CommandError, CheckpointError, ValueError, OSError, RuntimeError) as error:
        problems.append(str(error))


def _print_model(model: VivitForVideoClassification) -> None:
    config = model.config
    _print_row("model", checkpoints.describe_model(config))
    parameters = list(model.parameters())
    size_bytes = sum(parameter.nbytes for parameter in parameters)
    _print_row(
        "weights",
        f"{sum(parameter.numel() for parameter in parameters):,} parameters, {_dtype_name(model.dtype)}, "
        f"{size_bytes / 1e6:,.1f} MB",
    )
    _print_row("work", f"{count_multiply_adds(config) / 1e9:,.4g} billion multiply-adds per clip")
    _print_row("input", checkpoints.describe_input(config))
    heads = [f"{name}, {_list_labels(labels)}" for name, labels in config.labels_of_heads.items()]
    _print_row("labels", "\n".join(heads) or _list_labels(list(config.id2label.values())))


def _list_labels(labels: list[str]) -> str:
    shown = ", ".join(labels[:SHOWN_LABELS]) + (", ..." if len(labels) > SHOWN_LABELS else "")
    return f"{len(labels)}: {shown}"


def _measure_memory(device: torch.device) -> str:
    """Describes the peak of this process, which has loaded the model and run one clip, as a worker does."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    host = f"about {peak_bytes / 1e9:.1f} GB per worker, without its decoder processes"
    if device.type != "cuda":
        return host
    return f"{host}; {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory for one clip"


def _measure_speed(classifier: VideoClassifier) -> str:
    """Describes the median of several forward passes of one clip."""
    clip = checkpoints.gray_clip(classifier)
    times_s: list[float] = []
    while len(times_s) < MINIMUM_RUNS or sum(times_s) < MINIMUM_TIME_S:
        start_s = time.perf_counter()
        classifier.logits([clip])
        times_s.append(time.perf_counter() - start_s)
    where = f"{torch.get_num_threads()} CPU threads" if classifier.device.type == "cpu" else str(classifier.device)
    dtype = _dtype_name(classifier.dtype)
    return f"about {1 / statistics.median(times_s):.3g} clips/s, one at a time, on {where} in {dtype}, without decoding"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_row(name: str, text: str) -> None:
    print(textwrap.indent(text, " " * NAME_WIDTH).replace(" " * NAME_WIDTH, f"{name:<{NAME_WIDTH}}", 1), flush=True)


if __name__ == "__main__":
    sys.exit(main())

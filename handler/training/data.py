"""Labeled videos: how they are listed, split and made into clips.

    data = read_data(Path("videos"), eval_fraction=0.2, seed=0)
    clips = VideoClips(data.train, start_decoders(config, processor, processes=4))
    clip, label = clips.load(0, views)

Videos are decoded by the decoder processes of the server (handler/sandbox). So training and serving see the same
frames, and a file that crashes a decoder, hangs or takes too much memory is an error of that file only.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from handler.clips import Clip, ClipSettings
from handler.models.config import VivitConfig
from handler.processing.image_processor import VivitImageProcessor
from handler.sandbox import DecoderPool, DecoderSettings
from handler.validation import ConfigError, broken_rule, describe_unknown
from handler.video import Limits, VideoError
from handler.views import ONE_VIEW, Views

TRAIN, EVALUATION = "train", "eval"
SPLITS = {"train": TRAIN, "eval": EVALUATION, "val": EVALUATION, "validation": EVALUATION, "test": EVALUATION}
COLUMNS = ("path", "label", "split")
MAX_LISTED = 10  # missing files in a message

# A file that is skipped because the machine is busy would change the result. So these limits are far above those of a
# server: they only stop decoders that hang.
LIMITS = Limits(max_frame_pixels=2**28)
MAX_DECODE_S = 600.0
MAX_MEMORY_BYTES = 8 * 2**30

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video file and the index of its label."""

    path: Path
    label: int


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        labels: names of the labels.
        train: videos to train on.
        evaluation: videos to evaluate on; may be empty.
    """

    labels: tuple[str, ...]
    train: tuple[Sample, ...]
    evaluation: tuple[Sample, ...]

    def check_training(self) -> None:
        """Raises ConfigError unless a classifier can be trained: there are two labels, each with a training video."""
        if len(self.labels) < 2:
            raise ConfigError(f"training needs videos of at least two labels, found only {self.labels[0]!r}")
        seen = {sample.label for sample in self.train}
        if unseen := [label for index, label in enumerate(self.labels) if index not in seen]:
            raise ConfigError(f"training needs videos of every label, found none of {', '.join(map(repr, unseen))}")

    def with_label_order(self, labels: Sequence[str]) -> Data:
        """Returns the data with its labels in the order of `labels`, if these are the same; otherwise unchanged."""
        if set(labels) != set(self.labels):
            return self
        index = [list(labels).index(label) for label in self.labels]
        train, evaluation = (
            tuple(Sample(sample.path, index[sample.label]) for sample in split)
            for split in (self.train, self.evaluation)
        )
        return Data(tuple(labels), train, evaluation)

    def count_videos(self) -> dict[str, dict[str, int]]:
        """Returns the number of videos by split and label."""
        splits = {TRAIN: self.train, EVALUATION: self.evaluation}
        counts = {split: Counter(sample.label for sample in samples) for split, samples in splits.items()}
        return {
            split: {label: by_index[index] for index, label in enumerate(self.labels)}
            for split, by_index in counts.items()
        }

    def fingerprint(self) -> str:
        """Returns a hash of the labels, the paths and their order."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for split in (self.train, self.evaluation):
            for sample in split:
                digest.update(
                    f"{sample.path.parent.name}/{sample.path.name}\0{sample.label}\n".encode("utf-8", "replace")
                )
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def read_data(source: Path, *, eval_fraction: float, seed: int) -> Data:
    """Lists the videos of a data set.

    Args:
        source: a folder with a folder of videos per label, or with the folders `train` and `val` (or `eval`, `test`)
            that have them; or a .csv or .parquet file with the columns path, label and optionally split. Relative paths
            are relative to the file.
        eval_fraction: share of the videos of each label to evaluate on, in [0, 1), if there is no such split.
        seed: determines which these are.

    Raises:
        ConfigError: the data are not usable. The message names the file or label.
        OSError: a file cannot be read.
    """
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"--eval-fraction must be in [0, 1), got {eval_fraction}")
    if source.is_dir():
        rows = _read_folders(source)
    elif source.suffix.lower() in (".csv", ".parquet") and source.is_file():
        rows = _read_table(source)
    else:
        raise ConfigError(f"{source} is neither a folder nor an existing .csv or .parquet file")
    labels = sorted({label for _, label, _ in rows})
    index = {label: position for position, label in enumerate(labels)}
    train = [Sample(path, index[label]) for path, label, split in rows if split != EVALUATION]
    evaluation = [Sample(path, index[label]) for path, label, split in rows if split == EVALUATION]
    if not evaluation:
        train, evaluation = _hold_out(train, eval_fraction, seed)
    return Data(tuple(labels), tuple(train), tuple(evaluation))


Row = tuple[Path, str, str | None]  # path, label, split


def _read_folders(folder: Path) -> list[Row]:
    splits = {child: SPLITS[child.name] for child in _folders_in(folder) if child.name in SPLITS}
    if TRAIN not in splits.values():  # then these are names of labels
        return _read_label_folders(folder, None)
    if others := [child.name for child in _folders_in(folder) if child not in splits]:
        raise ConfigError(
            f"{folder} has the folder train, so only {', '.join(SPLITS)} may be beside it, not {others[0]!r}"
        )
    return [row for child, split in splits.items() for row in _read_label_folders(child, split)]


def _read_label_folders(folder: Path, split: str | None) -> list[Row]:
    rows: list[Row] = []
    labels = _folders_in(folder)
    if not labels:
        raise ConfigError(f"{folder} must have a folder of videos per label, found no folder")
    for label in labels:
        files = [path for path in sorted(label.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        if not files:
            raise ConfigError(f"{label} has no video")
        rows += [(path, label.name, split) for path in files]
    return rows


def _folders_in(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _read_table(file: Path) -> list[Row]:
    records = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
    rows: list[Row] = []
    for line, record in enumerate(records, start=1):
        path, label, split = (str(record.get(column) or "") for column in COLUMNS)
        label, split = label.strip(), split.strip()
        if not path or not label:
            raise ConfigError(f"{file}: row {line} has no {'label' if path else 'path'}")
        if split and split not in SPLITS:
            raise ConfigError(f"{file}: row {line} has the split {split!r}: {describe_unknown(split, SPLITS)}")
        rows.append((file.parent / path, label, SPLITS[split] if split else None))
    if not rows:
        raise ConfigError(f"{file} has no rows")
    if repeated := [str(path) for path, count in Counter(path for path, _, _ in rows).items() if count > 1]:
        raise ConfigError(f"{file} lists {repeated[0]} more than once")
    if missing := [str(path) for path, _, _ in rows if not path.is_file()]:
        listed = "\n  ".join(missing[:MAX_LISTED])
        more = f"\n  and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise ConfigError(f"{file} lists {len(missing)} files that do not exist:\n  {listed}{more}")
    return rows


def _read_csv(file: Path) -> Iterable[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:  # editors on Windows write a byte order mark
        reader = csv.DictReader(opened, restkey="(more fields than columns)")
        _check_columns(file, reader.fieldnames or [])
        records = list(reader)
    for line, record in enumerate(records, start=1):
        if reader.restkey in record:
            raise ConfigError(f"{file}: row {line} has more fields than columns: quote values with commas")
    return records


def _read_parquet(file: Path) -> Iterable[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet needs pyarrow: pip install pyarrow, or use a .csv file") from error
    table = parquet.read_table(file)
    _check_columns(file, table.column_names)
    records: list[dict[str, Any]] = table.to_pylist()
    return records


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    for column in COLUMNS[:2]:
        if column not in columns:
            raise ConfigError(f"{file} must have the columns path and label, found {', '.join(columns) or 'none'}")
    for column in columns:
        if column not in COLUMNS:
            raise ConfigError(f"{file} has the unknown column {column!r}: {describe_unknown(column, COLUMNS)}")


def _hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits off a share of each label, at least one video if there are several, and never all of them."""
    held_out: set[int] = set()
    indices: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        indices.setdefault(sample.label, []).append(index)
    for label, of_label in indices.items():
        count = min(max(round(fraction * len(of_label)), 1 if fraction else 0), len(of_label) - 1)
        held_out.update(np.random.default_rng((seed, label)).permutation(of_label)[:count].tolist())
    kept = [sample for index, sample in enumerate(samples) if index not in held_out]
    return kept, [samples[index] for index in sorted(held_out)]


class Clips(Protocol):
    """Labeled clips by index. `load` is called by several threads at the same time."""

    @property
    def names(self) -> Sequence[str]:
        """What the clips are called in skipped.csv; as many as there are clips."""
        ...

    def load(self, index: int, views: Views, rng: np.random.Generator | None) -> tuple[NDArray[np.uint8], int]:
        """Makes a clip.

        Args:
            index: which clip.
            views: which part of it, a single view. A set that draws its clips may ignore it.
            rng: source of randomness for a set that draws its clips; None in evaluation.

        Returns:
            uint8 (T, 3, h, w), and the index of its label.

        Raises:
            VideoError: this clip cannot be made, and is skipped.
        """
        ...


class MissingFileError(VideoError):
    """The file cannot be read."""

    code = "no_file"


class VideoClips:
    """Clips of video files.

    Args:
        samples: the files.
        pool: decoder processes, made by `start_decoders`.

    Attributes:
        names: the paths.
    """

    def __init__(self, samples: Sequence[Sample], pool: DecoderPool) -> None:
        self.names = [str(sample.path) for sample in samples]
        self._samples = samples
        self._pool = pool

    def load(
        self, index: int, views: Views = ONE_VIEW, rng: np.random.Generator | None = None
    ) -> tuple[NDArray[np.uint8], int]:
        """Decodes a video. See `Clips`."""
        clip, label = self.load_views(index, views)
        return clip.pixels[0], label

    def load_views(self, index: int, views: Views) -> tuple[Clip, int]:
        """Decodes a video.

        Returns:
            The clip with all views, and the index of its label.

        Raises:
            VideoError: this clip cannot be made, and is skipped.
        """
        sample = self._samples[index]
        try:
            source = sample.path.read_bytes()
        except OSError as error:
            raise MissingFileError(f"cannot be read: {error.strerror}") from error
        (clip,) = self._pool.load_clips([source], views=[views])
        if isinstance(clip, Exception):
            raise clip
        return clip, sample.label


def start_decoders(config: VivitConfig, processor: VivitImageProcessor, *, processes: int) -> DecoderPool:
    """Starts decoder processes that make the clips that serving makes with its default options.

    Args:
        config: of the model.
        processor: of the checkpoint.
        processes: files that are decoded at the same time.

    Raises:
        ConfigError: the processor does not make the frames that the model takes.
    """
    # A processor may resize to the exact size and not crop. Zoomed frames must be cropped, too.
    size = processor.resize_crop.output_size(1080, 1920)
    if size != (config.image_height, config.image_width):
        raise broken_rule(
            "size of the image processor", size, f"{(config.image_height, config.image_width)}, the model's"
        )
    resize_crop = dataclasses.replace(processor.resize_crop, crop_to=size)
    settings = DecoderSettings(
        clip=ClipSettings(num_frames=config.num_frames, resize_crop=resize_crop, limits=LIMITS),
        max_decode_s=MAX_DECODE_S,
        max_batch_decode_s=MAX_DECODE_S,
        max_memory_bytes=MAX_MEMORY_BYTES,
    )
    return DecoderPool(settings, processes=processes, threads=1)

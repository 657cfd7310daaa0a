"""The whole pipeline in one place, usable without any server:

    classifier = VideoClassifier.from_pretrained("checkpoint/", device="cuda")
    for prediction in classifier.classify("clip.mp4").predictions: ...

    source (bytes | path)
      -> Clip               load_clip: sample the frames, decode just those, resize and crop   uint8 (V, T, C, h, w)
      -> logits             logits: normalised on the device, micro-batched over all clips     float32 (N, labels)
      -> [(label, score)]   top_k

Shapes: N clips of V views each, T frames, C colour channels, h x w the model's picture size.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from handler.clips import Clip, ClipSettings, load_clip
from handler.kernels import cpu
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions, OptionError
from handler.processing.image_processor import VivitImageProcessor
from handler.threads import available_cores, useful_inference_threads
from handler.video import Limits

logger = logging.getLogger(__name__)

# What the original was trained on: [-1, 1]. The published preprocessor_config.json normalises once more.
PAPER_SCALE, PAPER_BIAS = 1 / 127.5, -1.0

# After a micro-batch that did not fit into memory: others on the device come and go.
OOM_COOLDOWN_S = 60


class DeviceError(RuntimeError):
    """The GPU does nothing any more for this process; a new process may find it well."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """`predictions`: (label, score) pairs, best first; `clip`: what was looked at."""

    predictions: list[tuple[str, float]]
    clip: Clip


class VideoClassifier:
    """A model, its image processor and one deployment's options.

    Args:
        model: in eval mode.
        image_processor: the checkpoint's own; its output must have the model's picture size.
        options: see HandlerOptions.
        device: where the model runs.

    Attributes:
        useful_threads: of a CPU that the model is worth.

    Raises:
        ValueError: the image processor's pictures do not fit the model, or the device cannot do what the options say.
    """

    def __init__(
        self,
        model: VivitForVideoClassification,
        image_processor: VivitImageProcessor,
        *,
        options: HandlerOptions = HandlerOptions(),
        device: str | torch.device = "cpu",
    ):
        check_pictures(model.config, image_processor)
        self.config = model.config
        self.image_processor = image_processor
        self.options = options
        self.device = torch.device(device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        if self.dtype is torch.int8 and self.device.type != "cpu":
            raise OptionError(f"dtype int8 is for CPUs, got the device {self.device}: choose float16 there")
        self.useful_threads = useful_inference_threads(
            parameters=sum(parameter.numel() for parameter in model.parameters()), tokens=model.config.num_patches
        )
        between_layers = torch.float32 if self.dtype is torch.int8 else self.dtype
        self.model = model.to(device=self.device, dtype=between_layers).eval()
        if self.dtype is torch.int8:
            cpu.quantize_linears(self.model.vivit.layers)
        scale, bias = _scale_and_bias(image_processor, options)
        # (C, 1, 1), to broadcast over (N, T, C, h, w)
        self._scale = torch.as_tensor(scale, dtype=between_layers, device=self.device)[:, None, None]
        self._bias = torch.as_tensor(bias, dtype=between_layers, device=self.device)[:, None, None]
        self._short_size, self._is_short_until_s = 1, -math.inf  # clips at once while memory is short
        self._sizes, self._run = [], self._normalize_and_run  # sizes that micro-batches are padded to
        if options.compile:
            self._sizes = compiled_sizes(options.micro_batch_clips)
            self._run = torch.compile(self._run, fullgraph=True, dynamic=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        options: HandlerOptions = HandlerOptions(),
        device: str | torch.device = "cpu",
    ) -> "VideoClassifier":
        """Loads config.json, preprocessor_config.json and the weights from a directory, or from the hub by an id.

        Raises:
            CheckpointError, ValueError: as VivitForVideoClassification and VivitImageProcessor raise them.
        """
        model = VivitForVideoClassification.from_pretrained(
            name_or_path, attn_implementation=options.attn_implementation
        )
        image_processor = VivitImageProcessor.from_pretrained(name_or_path)
        return cls(model, image_processor, options=options, device=device)

    def warm_up(self) -> None:
        """Runs micro-batches once, so that no request pays for lazy initialisation.

        Compiled ones of every size that there is, else the smallest and, on a GPU, the largest: a CPU would take many
        seconds for that, and gain nothing.

        Raises:
            FloatingPointError: the logits are not finite.
        """
        config = self.config
        blank = np.zeros((config.num_frames, config.num_channels, config.image_height, config.image_width), np.uint8)
        sizes = {1} if self.device.type == "cpu" else {1, self.options.micro_batch_clips}
        for batch in self._sizes or sizes:
            self.logits([blank[None]] * batch)

    @property
    def clip_settings(self) -> ClipSettings:
        """What clips the model takes, and of which videos."""
        return ClipSettings(
            num_frames=self.config.num_frames,
            resize_crop=dataclasses.replace(self.image_processor.resize_crop, is_fast=self.options.resize == "fast"),
            limits=Limits(
                max_duration_s=self.options.max_video_s,
                max_frame_pixels=self.options.max_frame_pixels,
                max_frames=self.options.max_frames,
            ),
            sampling=self.options.sampling,
            video_stream=self.options.video_stream,
        )

    def load_clip(self, source: bytes | str | Path, *, threads: int = 1) -> Clip:
        """Samples, decodes, resizes and crops one video: bytes of a file, or its path.

        Raises:
            VideoError: the source is not a video that can be used.
        """
        return load_clip(source, self.clip_settings, threads=threads)

    def logits(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        """Runs the model over clips of any number, `micro_batch_clips` of them at a time.

        Args:
            clips: uint8 (V, T, C, h, w) each: the views of one video.

        Returns:
            float32 (N, labels) on the CPU, in the order of `clips`: the mean over each one's views.

        Raises:
            Whatever a forward pass raises, such as torch.cuda.OutOfMemoryError.
        """
        results = self.logits_or_errors(clips)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return torch.stack(results) if results else torch.empty(0, self.config.num_labels)

    def logits_or_errors(self, clips: Sequence[np.ndarray]) -> list[torch.Tensor | Exception]:
        """Like `logits`, but a clip that fails even when it is alone is an exception in its own place.

        A micro-batch that fails, for want of memory or by the fault of one clip, is halved and tried again. After want
        of memory they are smaller for a minute.

        Raises:
            DeviceError: this process cannot use its GPU any more.
        """
        size = self.options.micro_batch_clips
        if time.monotonic() < self._is_short_until_s:
            size = min(size, self._short_size)
        views = [view for clip in clips for view in clip]
        results = []
        for start in range(0, len(views), size):
            results += self._forward_or_halve(views[start : start + size])
        remaining = iter(results)
        return [_mean_or_error(list(islice(remaining, len(clip)))) for clip in clips]

    @torch.inference_mode()
    def _forward_or_halve(self, views: Sequence[np.ndarray]) -> list[torch.Tensor | Exception]:
        try:
            return [_finite(row) for row in self._forward(np.stack(views))]
        except Exception as error:
            if is_broken(self.device):
                raise DeviceError(f"{self.device} has failed for good: {error}") from error
            if len(views) == 1:
                return [error]
            logger.warning("a micro-batch of %d clips failed and is halved: %s", len(views), error)
            if is_out_of_memory(error):
                self._short_size = len(views) // 2
                self._is_short_until_s = time.monotonic() + OOM_COOLDOWN_S
        # Outside the except clause, whose traceback would keep the failed attempt's tensors alive.
        middle = len(views) // 2
        return self._forward_or_halve(views[:middle]) + self._forward_or_halve(views[middle:])

    def _forward(self, pixels: np.ndarray) -> torch.Tensor:
        # Bytes travel to the device, a quarter of what floats would take; there one multiply-add normalises them.
        pixels = torch.from_numpy(pixels).to(self.device)  # (N, T, C, h, w)
        clips = len(pixels)
        size = next((size for size in self._sizes if size >= clips), clips)
        if size > clips:
            pixels = F.pad(pixels, (0, 0) * 4 + (0, size - clips))  # (size, T, C, h, w), black clips behind
        return self._run(pixels)[:clips].float().cpu()  # (N, labels)

    def _normalize_and_run(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._scale.dtype)  # (size, T, C, h, w)
        return self.model(torch.addcmul(self._bias, pixels, self._scale)).logits  # (size, labels)

    def top_k(self, logits: torch.Tensor, *, k: int) -> list[tuple[str, float]]:
        """The `k` best (label, score) pairs of one clip's logits (labels,), best first.

        Scores are a softmax over all classes, or a sigmoid each where the checkpoint's problem_type says that
        several labels may hold at once; of a regression they are the values themselves.
        """
        if self.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
        elif self.config.problem_type == "regression" or len(logits) == 1:  # as the loss takes a single label
            scores = logits
        else:
            scores = logits.softmax(-1)
        best = scores.topk(min(k, len(scores)))
        labels = [self.config.id2label[index] for index in best.indices.tolist()]
        return list(zip(labels, best.values.tolist()))

    def classify(self, source: bytes | str | Path, *, top_k: int | None = None) -> Classification:
        """Classifies one video.

        Args:
            top_k: predictions to return, from 1 to the number of labels; None: as the options say.

        Raises:
            VideoError: the source is not a video that can be used.
            ValueError: top_k is out of range.
        """
        labels = self.config.num_labels
        if top_k is None:
            top_k = min(self.options.top_k, labels)
        if not 1 <= top_k <= labels:
            raise ValueError(f"top_k must be from 1 to {labels}, got {top_k}")
        clip = self.load_clip(source, threads=available_cores())
        logits = self.logits([clip.pixels])[0]  # (labels,)
        return Classification(self.top_k(logits, k=top_k), clip)


def _mean_or_error(views: list[torch.Tensor | Exception]) -> torch.Tensor | Exception:
    """The mean of a video's logits over its views, or the first error."""
    for view in views:
        if isinstance(view, Exception):
            return view
    return torch.stack(views).mean(0)  # (labels,)


def _finite(logits: torch.Tensor) -> torch.Tensor | Exception:
    """One clip's logits, or what is wrong with them."""
    if logits.isfinite().all():
        return logits
    return FloatingPointError(
        "the model gave logits that are not finite: weights that are broken, or too large for "
        "the dtype; bfloat16 has the range of float32"
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA, where it is several times faster, and float32 elsewhere; other names are obeyed."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def compiled_sizes(largest: int) -> list[int]:
    """Clips in a compiled micro-batch, ascending: `largest` and its halves, as many sizes as torch.compile keeps."""
    return sorted({max(1, largest >> halvings) for halvings in range(8)})


def is_broken(device: torch.device) -> bool:
    """Whether a GPU does nothing any more for this process: after an illegal address or a failed assertion on it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass failed for want of memory, on the device or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # Plain RuntimeErrors, of the allocator on the host, of libraries and of the driver on a GPU.
    return any(words in str(error) for words in ("can't allocate memory", "_ALLOC_FAILED", "error: out of memory"))


def check_pictures(config, image_processor: VivitImageProcessor) -> None:
    """Raises ValueError unless what the processor makes of any video is what the model was built for."""
    if config.num_channels != 3:
        raise ValueError(f"a video has 3 colour channels, but the model takes num_channels {config.num_channels}")
    expected = (config.image_height, config.image_width)
    # Two shapes, since a processor that neither crops nor fixes the size lets the video decide.
    sizes = {image_processor.resize_crop.output_size(height, width) for height, width in ((1080, 1920), (1920, 1080))}
    if sizes != {expected}:
        raise ValueError(
            f"the model takes pictures of {expected} (height, width), but the image processor makes "
            f"{' or '.join(map(str, sorted(sizes)))} of 1080p video: check size and crop_size in "
            "preprocessor_config.json"
        )


def _scale_and_bias(image_processor: VivitImageProcessor, options: HandlerOptions) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel (scale, bias), float32 (C,) each: the model is fed uint8 * scale + bias."""
    if options.normalization == "paper":
        channels = 3
        return np.full(channels, PAPER_SCALE, np.float32), np.full(channels, PAPER_BIAS, np.float32)
    return image_processor.scale_and_bias()

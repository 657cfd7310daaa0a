"""The whole pipeline, usable without a server:

    classifier = VideoClassifier.from_pretrained("checkpoint/", device="cuda")
    for label, score in classifier.classify("clip.mp4").predictions: ...

    source (bytes | path)
      -> Clip               load_clip: sample, decode, resize and crop frames                  uint8 (V, T, C, h, w)
      -> logits             view_logits_or_errors: normalize on the device, micro-batches      float32 (V, labels)
      -> Classification     rank: labels and scores of the mean, and of each view
      or Explanation        explain_clip: how much each part of the clip supports a label

N  clips                T  frames of a clip     h, w  height and width of the model's frames, in pixels
V  views of one video   C  color channels      B  views in a micro-batch
"""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from handler import kernels
from handler.checkpoints.files import weights_sha256
from handler.clips import Clip, ClipSettings, View, load_clip
from handler.models.config import VivitConfig
from handler.models.embedding import uniform_frame_indices
from handler.models.layers import Layer
from handler.models.vivit import TemporalEncoder, VivitForVideoClassification, VivitModel
from handler.options import HandlerOptions, OptionError
from handler.processing.image_processor import VivitImageProcessor
from handler.protocol import render_answer
from handler.ranking import SEPARATOR, Ranking
from handler.threads import available_cores, useful_inference_threads
from handler.validation import describe_unknown
from handler.views import Views

if TYPE_CHECKING:
    from handler.explanation.result import Explanation
    from handler.features import Embedding

logger = logging.getLogger(__name__)

# The original was trained on pixels in [-1, 1]. The published preprocessor_config.json normalizes a second time.
PAPER_SCALE, PAPER_BIAS = 1 / 127.5, -1.0

# Micro-batches stay smaller for this long after one ran out of memory. Other users of the device may free some by then.
OOM_COOLDOWN_S = 60

# Micro-batches with more tokens are not faster on a CPU and take more memory.
CPU_MICRO_BATCH_TOKENS = 1024

MAX_COMPILED_SIZES = 8  # torch.compile's default limit of recompilations per function


class DeviceError(RuntimeError):
    """The GPU no longer works in this process. A new process may be able to use it."""


@dataclasses.dataclass(frozen=True)
class ClassifiedView(View):
    """A view and its own labels.

    Attributes:
        frame_indices, times_s, crop: see View.
        predictions: (label, score) pairs of this view alone, best first.
    """

    predictions: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Classification(Ranking):
    """The result of classifying one video.

    Attributes:
        predictions, labels, heads: see Ranking; of the mean of the logits of all views.
        clip: the frames that were classified, and facts about the video.
        views: the V views, in the order of `Clip.views`.
    """

    clip: Clip
    views: list[ClassifiedView]

    @property
    def agreement(self) -> float:
        """The share of the views whose best label is that of the video, from 0 to 1."""
        return sum(view.predictions[0][0] == self.predictions[0][0] for view in self.views) / len(self.views)

    def to_answer(self) -> dict[str, Any]:
        """Returns the body of a server's response."""
        views = [{"predictions": view.predictions, "times_s": view.times_s, "crop": view.crop} for view in self.views]
        return render_answer(
            self.predictions,
            labels=self.labels,
            heads=self.heads,
            video=dataclasses.asdict(self.clip.info),
            frame_times_s=self.clip.times_s,
            warnings=self.clip.warnings,
            views=views,
            agreement=self.agreement if len(views) > 1 else None,
        )

    def __repr__(self) -> str:
        views, frames, height, width = len(self.views), self.clip.num_frames, *self.clip.crops[0][2:]
        info = self.clip.info
        predictions = ", ".join(f"({label!r}, {score:.4f})" for label, score in self.predictions)
        return (
            f"Classification(predictions=[{predictions}], clip=<{views} x {frames} frames of {width}x{height} from "
            f"{info.duration_s:.1f} s of {info.codec} {info.width}x{info.height}>)"
        )


class VideoClassifier:
    """A model, its image processor and the options of one deployment.

    Args:
        model: a float32 model. It is modified in place: moved to the device, converted to the dtype and prepared for
            inference.
        image_processor: the one of the checkpoint. Its output size must be the model's.
        options: see HandlerOptions.
        device: where the model runs.

    Attributes:
        config: the model's configuration.
        dtype: the dtype that the model computes in; torch.int8 for layers with 8-bit weights and activations.
        dtype_reason: why it was chosen.
        useful_threads: number of CPU threads that a forward pass can make use of.

    Raises:
        ValueError: the image processor's output does not fit the model, or the device does not support the options.
    """

    def __init__(
        self,
        model: VivitForVideoClassification,
        image_processor: VivitImageProcessor,
        *,
        options: HandlerOptions = HandlerOptions(),
        device: str | torch.device = "cpu",
    ) -> None:
        _check_compatibility(model.config, image_processor)
        self.config = model.config
        self.image_processor = image_processor
        self.options = options
        self.device = torch.device(device)
        scale, bias = _scale_and_bias(image_processor, options)
        choice = choose_dtype(model, options=options, device=self.device, scale=scale, bias=bias)
        self.dtype, self.dtype_reason = choice.dtype, choice.reason
        logger.info("the model computes in %s; %s", self.dtype, self.dtype_reason)
        if self.dtype is torch.int8 and self.device.type != "cpu":
            raise OptionError(f"dtype int8 requires a CPU, got device {self.device}: use float16 there")
        self.useful_threads = useful_inference_threads(
            parameters=sum(parameter.numel() for parameter in model.parameters()), tokens=model.config.num_patches
        )
        hidden_dtype = torch.float32 if self.dtype is torch.int8 else self.dtype
        self.model = model.to(device=self.device, dtype=hidden_dtype).eval()
        self._uses_kernels = self.device.type == "cpu" and not options.compile
        if self._uses_kernels:
            kernels.prepare_for_inference(self.model, int8=self.dtype is torch.int8)
        # (C, 1, 1), to broadcast over (B, T, C, h, w)
        self._scale = torch.as_tensor(scale, dtype=hidden_dtype, device=self.device)[:, None, None]
        self._bias = torch.as_tensor(bias, dtype=hidden_dtype, device=self.device)[:, None, None]
        self._reduced_batch_size, self._reduced_until_s = 1, -math.inf  # after running out of memory
        self._checkpoint: str | Path | None = None
        self._compiled_sizes: list[int] = []
        self._run = self._normalize_and_run
        if options.compile:
            self._compiled_sizes = compiled_sizes(options.micro_batch_clips)
            self._run = torch.compile(self._run, fullgraph=True, dynamic=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        options: HandlerOptions = HandlerOptions(),
        device: str | torch.device = "cpu",
    ) -> "VideoClassifier":
        """Loads the configuration, the weights and the image processor from a directory or a hub repository.

        Raises:
            CheckpointError: a file is missing, unreadable or does not match the model.
            ValueError: see VideoClassifier.
        """
        with _single_torch_thread():
            model = VivitForVideoClassification.from_pretrained(
                name_or_path, attn_implementation=options.attn_implementation
            )
        image_processor = VivitImageProcessor.from_pretrained(name_or_path)
        classifier = cls(model, image_processor, options=options, device=device)
        classifier._checkpoint = name_or_path
        return classifier

    def warm_up(self) -> None:
        """Runs blank micro-batches, so that lazy initialization does not delay the first requests.

        A compiled model runs every compiled size. Otherwise one clip is run, and on a GPU also the largest micro-batch.
        Where oneDNN computes the linear layers on a CPU, it generates code for each shape. There two layers of each
        encoder are run for every other size as well, one like all the others and the last one, which may compute CLS
        only.

        Raises:
            FloatingPointError: the logits are not finite.
        """
        config = self.config
        shape = (1, config.num_frames, config.num_channels, config.image_height, config.image_width)
        blank = np.zeros(shape, np.uint8)  # (1, T, C, h, w)
        sizes = {1} if self.device.type == "cpu" else {1, self._max_micro_batch_clips}
        for size in self._compiled_sizes or sizes:
            self.logits([blank] * size)
        # Torch computes half precision with oneDNN, too.
        hidden_dtype = self._scale.dtype
        if self._uses_kernels and (hidden_dtype is not torch.float32 or kernels.is_onednn_faster(hidden_dtype)):
            for size in range(2, self._max_micro_batch_clips + 1):
                self._run_two_layers(torch.from_numpy(np.concatenate([blank] * size)))

    @torch.inference_mode()
    def _run_two_layers(self, pixels: torch.Tensor) -> None:
        """Runs uint8 pixels (B, T, C, h, w) through the first and last layer of each encoder."""
        vivit = self.model.vivit
        encoders: list[VivitModel | TemporalEncoder] = [vivit] if vivit.temporal is None else [vivit, vivit.temporal]
        all_layers = [encoder.layers for encoder in encoders]
        try:
            for encoder, layers in zip(encoders, all_layers):
                encoder.layers = nn.ModuleList([layers[0], layers[-1]])
            self._normalize_and_run(pixels)
        finally:
            for encoder, layers in zip(encoders, all_layers):
                encoder.layers = layers

    @property
    def _max_micro_batch_clips(self) -> int:
        limit = self.options.micro_batch_clips
        if self.device.type != "cpu" or self._compiled_sizes:
            return limit
        return min(limit, math.ceil(CPU_MICRO_BATCH_TOKENS / self.config.num_tokens))

    @property
    def clip_settings(self) -> ClipSettings:
        """The clips that the model takes, and the videos that are accepted."""
        return self.options.clip_settings(
            num_frames=self.config.num_frames, resize_crop=self.image_processor.resize_crop
        )

    def load_clip(self, source: bytes | str | Path, *, views: Views | None = None, threads: int = 1) -> Clip:
        """Samples, decodes, resizes and crops frames of one video.

        Args:
            source: the content of a file, or its path.
            views: which frames, and which parts of them. None: those of the options.
            threads: number of threads that decode, and of threads that resize.

        Raises:
            VideoError: the source is not a supported video.
        """
        views = views or self.options.view_defaults.resolve()
        return load_clip(source, self.clip_settings, views=views, threads=threads)

    def logits(self, clips: Sequence[Sequence[np.ndarray] | np.ndarray]) -> torch.Tensor:
        """Runs the model on clips, in micro-batches of up to `micro_batch_clips` views, on a CPU fewer long ones.

        Args:
            clips: the views of N videos: arrays uint8 (V, T, C, h, w), or `Clip.inputs`. V may differ between videos.

        Returns:
            float32 (N, labels) on the CPU: for each clip the mean over its views.

        Raises:
            Exception: the first error of `logits_or_errors`, such as torch.cuda.OutOfMemoryError.
        """
        rows = []
        for result in self.logits_or_errors(clips):
            if isinstance(result, Exception):
                raise result
            rows.append(result)
        return torch.stack(rows) if rows else torch.empty(0, self.config.num_labels)  # (N, labels)

    def logits_or_errors(self, clips: Sequence[Sequence[np.ndarray] | np.ndarray]) -> list[torch.Tensor | Exception]:
        """Like `logits`, but returns the error of a clip that fails, and the logits (labels,) of the others.

        Raises:
            DeviceError: the GPU no longer works in this process.
        """
        results = self.view_logits_or_errors(clips)
        return [each if isinstance(each, Exception) else each.mean(0) for each in results]

    def view_logits_or_errors(
        self, clips: Sequence[Sequence[np.ndarray] | np.ndarray]
    ) -> list[torch.Tensor | Exception]:
        """Like `logits_or_errors`, but returns the logits (V, labels) of each view. See `view_outputs_or_errors`."""
        results = self.view_outputs_or_errors(clips)
        return [each if isinstance(each, Exception) else each[0] for each in results]

    def view_outputs_or_errors(
        self, clips: Sequence[Sequence[np.ndarray] | np.ndarray], *, with_mean: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor] | Exception]:
        """Returns the logits (V, labels) and the features (V, D) of the views of each clip, or the error of a clip.

        Args:
            clips: see `logits`.
            with_mean: whether the features are the mean of the tokens also if the model classifies by CLS. The compiled
                model is not used then.

        The views of all clips are in one queue, so that a micro-batch may have views of several. Only the pixels of one
        micro-batch are copied at a time.

        A micro-batch that fails is split in half and retried, until the clip that causes the error is alone. After one
        ran out of memory, micro-batches stay smaller for OOM_COOLDOWN_S.

        Raises:
            DeviceError: the GPU no longer works in this process.
        """
        if self._uses_kernels:
            kernels.start_threads()
        size = self._max_micro_batch_clips
        if time.monotonic() < self._reduced_until_s:
            size = min(size, self._reduced_batch_size)
        views = [(clip, number) for clip in clips for number in range(len(clip))]
        results: list[torch.Tensor | Exception] = []
        for start in range(0, len(views), size):
            results += self._forward_or_split(views[start : start + size], with_mean=with_mean)
        remaining = iter(results)
        outputs = [_stack_or_error(list(islice(remaining, len(clip)))) for clip in clips]  # (V, labels + D)
        labels = self.config.num_labels
        return [each if isinstance(each, Exception) else (each[:, :labels], each[:, labels:]) for each in outputs]

    @torch.inference_mode()
    def _forward_or_split(
        self, views: Sequence[tuple[Sequence[np.ndarray] | np.ndarray, int]], *, with_mean: bool
    ) -> list[torch.Tensor | Exception]:
        """Returns logits and features (labels + D,) or the error of each view, given as a clip and its number there."""
        try:
            pixels = [clip[number] for clip, number in views]
            return [_check_finite(row) for row in self._forward(self._copy_to_device(pixels), with_mean=with_mean)]
        except Exception as error:
            if is_device_broken(self.device):
                raise DeviceError(f"{self.device} no longer works: {error}") from error
            if len(views) == 1:
                return [error]
            logger.warning("a micro-batch of %d views failed and is split: %s", len(views), error)
            if is_out_of_memory(error):
                self._reduced_batch_size = len(views) // 2
                self._reduced_until_s = time.monotonic() + OOM_COOLDOWN_S
        # Outside the except clause, because the traceback keeps the tensors of the failed attempt alive.
        middle = len(views) // 2
        first = self._forward_or_split(views[:middle], with_mean=with_mean)
        return first + self._forward_or_split(views[middle:], with_mean=with_mean)

    def _copy_to_device(self, views: Sequence[np.ndarray]) -> torch.Tensor:
        """Stacks uint8 views (T, C, h, w) on the device: (B, T, C, h, w)."""
        # A GPU reads page-locked memory directly. torch keeps such buffers for later calls, and reuses none before the
        # asynchronous copy from it is complete. Bytes take a quarter of the time to copy that float32 would.
        on_gpu = self.device.type == "cuda"
        pixels = torch.empty((len(views), *views[0].shape), dtype=torch.uint8, pin_memory=on_gpu)  # (B, T, C, h, w)
        np.stack(views, out=pixels.numpy())
        return pixels.to(self.device, non_blocking=on_gpu)

    def _forward(self, pixels: torch.Tensor, *, with_mean: bool) -> torch.Tensor:
        """Computes float32 logits and features (B, labels + D) of uint8 views (B, T, C, h, w) on the device."""
        if with_mean:
            return self._normalize_and_run(pixels, features="mean").float().cpu()
        batch = len(pixels)
        size = next((size for size in self._compiled_sizes if size >= batch), batch)
        if size > batch:
            pixels = F.pad(pixels, (0, 0) * 4 + (0, size - batch))  # (size, T, C, h, w), black clips at the end
        return self._run(pixels)[:batch].float().cpu()  # (B, labels + D)

    def _normalize_and_run(self, pixels: torch.Tensor, features: str = "pooled") -> torch.Tensor:
        outputs = self.model(self._normalize(pixels), output_features=features)
        return torch.cat([outputs.logits, outputs.features], dim=-1)  # (size, labels + D), copied from a GPU at once

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        # One multiply-add: (size, T, C, h, w).
        return torch.addcmul(self._bias, pixels.to(self._scale.dtype), self._scale)

    @property
    def max_top_k(self) -> int:
        """Largest number of predictions: the number of labels. With several heads that of the largest one."""
        heads = self.config.label_heads
        return self.config.num_labels if heads is None else max(heads.values())

    def top_k(self, logits: torch.Tensor, *, k: int) -> Ranking:
        """Returns the `k` best labels of one clip.

        Scores are the softmax over all labels. For the problem type multi_label_classification they are the sigmoid of
        each label, and for regression the values themselves. With several label heads each has a softmax of its own.

        Args:
            logits: (labels,).
            k: number of predictions, and of labels per head; larger numbers return all.
        """
        scores = self._scores(logits)
        if self.config.label_heads is not None:
            parts = torch.split(scores, list(self.config.label_heads.values()))
            labels_of_heads = self.config.labels_of_heads.items()
            heads = {name: _best(part, labels, k) for (name, labels), part in zip(labels_of_heads, parts)}
            return Ranking.of_heads(heads, k=k)
        return Ranking(predictions=_best(scores, self.config.id2label, k))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The score of each label (labels,), see `top_k`."""
        if self.config.label_heads is not None:
            parts = torch.split(logits, list(self.config.label_heads.values()))
            return torch.cat([part.softmax(-1) for part in parts])
        if self.config.problem_type == "multi_label_classification":
            return logits.sigmoid()
        if self.config.problem_type == "regression" or len(logits) == 1:  # the loss treats one label as a regression
            return logits
        return logits.softmax(-1)

    def rank(self, clip: Clip, logits: torch.Tensor, *, k: int) -> Classification:
        """Returns the `k` best labels of a clip and of each of its views, see `top_k`.

        Args:
            clip: of one video.
            logits: (V, labels), of its views.
            k: number of predictions.
        """
        views = [
            ClassifiedView(**vars(view), predictions=self.top_k(row, k=k).predictions)
            for view, row in zip(clip.views, logits)
        ]
        return Classification(**vars(self.top_k(logits.mean(0), k=k)), clip=clip, views=views)

    def classify(
        self,
        source: bytes | str | Path,
        *,
        top_k: int | None = None,
        views: str | None = None,
        stride_frames: int | None = None,
        sampling: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> Classification:
        """Classifies one video, or a part of it.

        The scores are those of the mean of the logits of all views. `views="4x3", sampling="dense", stride_frames=2` is
        the protocol of the paper.

        Args:
            source: the content of a file, or its path.
            top_k: number of predictions, from 1 to `max_top_k`. None uses the options' `top_k`, limited to `max_top_k`.
            views: clips in time x crops along the longer side. None uses the options' `views`.
            stride_frames: distance between the frames of a clip, for "dense" only. None uses the options'.
            sampling: "uniform", "segment", "keyframes" or "dense", see `sample_views`. None uses the options'.
            start_s: only frames that are displayed from this time on, in seconds from the first frame.
            end_s: only frames that are displayed before this time.

        Raises:
            VideoError: the source is not a supported video.
            EmptyPartError: the video has no frame from `start_s` to `end_s`.
            ValueError: an argument is out of range, or there are more views than the options' `max_views`.
        """
        if top_k is None:
            top_k = min(self.options.top_k, self.max_top_k)
        if not 1 <= top_k <= self.max_top_k:
            raise ValueError(f"top_k must be from 1 to {self.max_top_k}, got {top_k}")
        chosen = self.options.view_defaults.resolve(
            views=views, stride_frames=stride_frames, sampling=sampling, start_s=start_s, end_s=end_s
        )
        clip = self.load_clip(source, views=chosen, threads=available_cores())
        (logits,) = self.view_logits_or_errors([clip.inputs])  # (V, labels)
        if isinstance(logits, Exception):
            raise logits
        return self.rank(clip, logits, k=top_k)

    def embed(
        self,
        source: bytes | str | Path,
        *,
        pooling: str | None = None,
        normalize: bool = False,
        views: str | None = None,
        stride_frames: int | None = None,
        sampling: str | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> "Embedding":
        """Computes a vector that represents a video, or a part of it.

        Args:
            source: the content of a file, or its path.
            pooling: "cls", the CLS token after the last LayerNorm; or "mean", the mean of the other tokens. None: what
                the model classifies by.
            normalize: whether to divide the vector by its length.
            views, stride_frames, sampling, start_s, end_s: see `classify`. The vector is the mean over the views.

        Raises:
            VideoError: the source is not a supported video.
            ValueError: an argument is out of range, or the model has no CLS token.
        """
        self.check_pooling(pooling)
        chosen = self.options.view_defaults.resolve(
            views=views, stride_frames=stride_frames, sampling=sampling, start_s=start_s, end_s=end_s
        )
        clip = self.load_clip(source, views=chosen, threads=available_cores())
        with_mean = pooling == "mean" and self.config.has_cls_token
        (result,) = self.view_outputs_or_errors([clip.inputs], with_mean=with_mean)
        if isinstance(result, Exception):
            raise result
        return self.embedding(clip, result[1], pooling=pooling, normalize=normalize)

    def embedding(
        self, clip: Clip, features: torch.Tensor, *, pooling: str | None = None, normalize: bool = False
    ) -> "Embedding":
        """Returns the embedding of a clip from the features (V, D) of its views; see `embed`."""
        from handler.features import Embedding  # predictions do not need it

        vector = features.mean(0)  # (D,)
        return Embedding(
            vector=(F.normalize(vector, dim=0) if normalize else vector).numpy(),
            pooling=pooling or ("cls" if self.config.has_cls_token else "mean"),
            is_normalized=normalize,
            weights_sha256=self.weights_sha256,
            clip=clip,
        )

    def check_pooling(self, pooling: str | None) -> None:
        """Raises ValueError if the model has no such pooling, see `embed`."""
        if pooling not in (None, "cls", "mean"):
            raise ValueError(f"pooling must be cls or mean, got {pooling!r}")
        if pooling == "cls" and not self.config.has_cls_token:
            raise ValueError("pooling must be mean for a model without a CLS token, got 'cls'")

    @functools.cached_property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the checkpoint's weights; None if the model was not loaded by `from_pretrained`."""
        return None if self._checkpoint is None else weights_sha256(self._checkpoint)

    def explain(
        self, source: bytes | str | Path, *, label: str | None = None, method: str = "rollout"
    ) -> "Explanation":
        """Computes how much each part of a video supports a label.

        Args:
            source: the content of a file, or its path.
            label: see `label_indices`. None explains the best prediction.
            method: "rollout" is gradient-weighted attention rollout. "occlusion" covers parts of the clip and
                classifies it up to 257 times. It is independent of how the model works and serves as a check.

        Raises:
            VideoError: the source is not a supported video.
            ValueError: the model does not have this label, or the method is unknown.
            FloatingPointError: logits or gradients are not finite.
        """
        indices = None if label is None else self.label_indices(label)
        views = self.options.view_defaults.resolve(views="1x1")
        clip = self.load_clip(source, views=views, threads=available_cores())
        return self.explain_clip(clip, indices=indices, method=method)

    def explain_clip(
        self, clip: Clip, *, indices: Sequence[int] | None = None, method: str = "rollout"
    ) -> "Explanation":
        """Computes how much each part of a clip supports a label.

        Args:
            clip: with one view, see `load_clip`.
            indices: the label, see `label_indices`. None explains the best prediction.
            method: see `explain`, which has the same errors.

        Raises:
            DeviceError: the GPU no longer works in this process.
        """
        # Predictions do not need these modules.
        from handler.explanation.occlusion import occlude
        from handler.explanation.result import METHODS, Explanation, normalize_heat
        from handler.explanation.rollout import rollout

        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if len(clip.views) > 1:
            clip = clip.first_view()
        pixels, config = clip.pixels, self.config  # (1, T, C, h, w)

        def choose_labels(logits: torch.Tensor) -> Sequence[int]:
            return self._best_indices(logits) if indices is None else indices

        if method == "occlusion":
            logits = self.logits([pixels])[0]  # (labels,)
            relevance = occlude(self.logits, pixels, labels=choose_labels(logits), grid=config.grid)
        else:
            if self._uses_kernels:
                kernels.start_threads()
            try:
                pixel_values = self._normalize(self._copy_to_device([pixels[0]]))
                logits, heat = rollout(self.model, pixel_values, choose_labels)
            except Exception as error:
                if is_device_broken(self.device):
                    raise DeviceError(f"{self.device} no longer works: {error}") from error
                raise
            relevance = heat.numpy()
        explained = list(choose_labels(logits))
        return Explanation(
            label=SEPARATOR.join(config.id2label[index] for index in explained),
            score=float(self._scores(logits)[explained].prod()),
            method=method,
            heat=normalize_heat(relevance),
            step_times_s=self._step_times_s(clip.times_s),
            region=self.image_processor.resize_crop.region(clip.info.height, clip.info.width, clip.crops[0]),
            logits=logits,
            clip=clip,
        )

    def label_indices(self, label: str) -> list[int]:
        """Returns the indices of a label among the logits: one, or of a combination one for each head.

        Args:
            label: a label of the model. With several heads a label of one of them, or a combination as in predictions.

        Raises:
            ValueError: the model does not have this label, or several heads do.
        """
        labels, heads = list(self.config.id2label.values()), self.config.labels_of_heads
        indices = [index for index, name in enumerate(labels) if name == label]
        if len(indices) == 1:
            return indices
        if indices:
            raise ValueError(
                f"several heads have the label {label!r}: expected one label of each, joined by {SEPARATOR!r}"
            )
        parts = label.split(SEPARATOR)
        if len(parts) != len(heads) or not all(part in names for part, names in zip(parts, heads.values())):
            raise ValueError(f"the model has no label {label!r}: {describe_unknown(label, labels)}")
        first = 0
        for part, names in zip(parts, heads.values()):
            indices.append(first + names.index(part))
            first += len(names)
        return indices

    def _best_indices(self, logits: torch.Tensor) -> list[int]:
        """The index of the best label among logits (labels,), with several heads of each."""
        first, indices = 0, []
        for part in torch.split(logits, list((self.config.label_heads or {"": len(logits)}).values())):
            indices.append(first + int(part.argmax()))
            first += len(part)
        return indices

    def _step_times_s(self, times_s: np.ndarray) -> np.ndarray:
        """The mean time of the frames of each time step, (T',), from the times of all frames (T,)."""
        frames, steps = len(times_s), self.config.grid[0]
        if self.config.tubelet_embedding == "uniform_frames":
            times_s = times_s[uniform_frame_indices(frames, count=steps)]  # (T',)
        mean: np.ndarray = times_s.reshape(steps, -1).mean(1)
        return mean


def choose_dtype(
    model: VivitForVideoClassification,
    *,
    options: HandlerOptions,
    device: torch.device,
    scale: np.ndarray,
    bias: np.ndarray,
) -> kernels.DtypeChoice:
    """Returns the dtype that the options mean for a model on a device.

    `auto` is float16 on CUDA, where it is several times faster. On a CPU it is what `kernels.choose_dtype` chooses, and
    elsewhere float32.

    Args:
        scale, bias: (C,), the model's input is uint8 * scale + bias.
    """
    if options.dtype != "auto":
        return kernels.DtypeChoice(getattr(torch, options.dtype), f"the option dtype is {options.dtype}")
    if device.type != "cpu":
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        return kernels.DtypeChoice(dtype, f"auto: the default on {device.type}")
    if options.compile:
        return kernels.DtypeChoice(torch.float32, "auto: the default for a compiled model on a CPU")

    def has_float16_range() -> bool:
        config = model.config
        shape = (1, config.tubelet_size[0], config.num_channels, config.image_height, config.image_width)
        noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)  # (1, t, C, h, w)
        pixel_values = torch.from_numpy(noise * scale[:, None, None] + bias[:, None, None])
        return kernels.has_float16_range(model, pixel_values.to(model.dtype))

    layer = model.vivit.layers[0]
    assert isinstance(layer, Layer)
    return kernels.choose_dtype(layer, tokens=model.config.sequence_length, has_float16_range=has_float16_range)


def compiled_sizes(largest: int) -> list[int]:
    """Returns the sizes of compiled micro-batches in ascending order: `largest`, its half, its quarter, and so on."""
    return sorted({max(1, largest >> halvings) for halvings in range(MAX_COMPILED_SIZES)})


def is_device_broken(device: torch.device) -> bool:
    """Whether a GPU no longer works in this process, e.g. after an illegal memory access or a failed assertion."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: Exception) -> bool:
    """Whether a forward pass ran out of memory, on the device or on the host."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # The host's allocator, CUDA's libraries and its driver raise plain RuntimeErrors.
    return any(text in str(error) for text in ("can't allocate memory", "_ALLOC_FAILED", "error: out of memory"))


def _best(scores: torch.Tensor, labels: Sequence[str] | Mapping[int, str], k: int) -> list[tuple[str, float]]:
    """The `k` best (label, score) pairs of the scores (labels,), best first."""
    best = scores.topk(min(k, len(scores)))
    return [(labels[index], score) for index, score in zip(best.indices.tolist(), best.values.tolist())]


@contextlib.contextmanager
def _single_torch_thread() -> Iterator[None]:
    """Limits torch to the calling thread: copying weights is no faster with more, and the others wait in busy loops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stack_or_error(views: list[torch.Tensor | Exception]) -> torch.Tensor | Exception:
    """The logits (V, labels) of one video's views, or their first error."""
    logits = []
    for view in views:
        if isinstance(view, Exception):
            return view
        logits.append(view)
    return torch.stack(logits)  # (V, labels)


def _check_finite(logits: torch.Tensor) -> torch.Tensor | Exception:
    """One view's logits (labels,), or an error if they are not finite."""
    if logits.isfinite().all():
        return logits
    return FloatingPointError(
        "expected finite logits, got inf or nan: the weights are corrupt, or their values too large for the dtype "
        "(bfloat16 has the range of float32)"
    )


def _check_compatibility(config: VivitConfig, image_processor: VivitImageProcessor) -> None:
    """Raises ValueError unless the processor's output for videos of any size is what the model takes."""
    if config.num_channels != 3:
        raise ValueError(f"expected a model with num_channels 3, as video has, got num_channels {config.num_channels}")
    expected = (config.image_height, config.image_width)
    # Two shapes, because without cropping the output may depend on the video's aspect ratio.
    sizes = {image_processor.resize_crop.output_size(height, width) for height, width in ((1080, 1920), (1920, 1080))}
    if sizes != {expected}:
        raise ValueError(
            f"the model takes frames of {expected} (height, width), but the image processor makes "
            f"{' or '.join(map(str, sorted(sizes)))} from 1080p video: check size and crop_size in "
            "preprocessor_config.json"
        )


def _scale_and_bias(image_processor: VivitImageProcessor, options: HandlerOptions) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, bias), float32 (C,) each: the model's input is uint8 * scale + bias."""
    if options.normalization == "paper":
        channels = 3
        return np.full(channels, PAPER_SCALE, np.float32), np.full(channels, PAPER_BIAS, np.float32)
    return image_processor.scale_and_bias()

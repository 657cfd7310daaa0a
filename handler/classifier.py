"""The whole pipeline, usable without a server:

    classifier = VideoClassifier.from_pretrained("checkpoint/", device="cuda")
    for label, score in classifier.classify("clip.mp4").predictions: ...

    source (bytes | path)
      -> Clip               load_clip: sample, decode, resize and crop frames                  uint8 (V, T, C, h, w)
      -> logits             view_logits_or_errors: normalize on the device, micro-batches      float32 (V, labels)
      -> Classification     rank: labels and scores of the mean, and of each view
      or Explanation        explain_clip: how much each part of the clip supports a label

N  clips                T  frames of a clip     h, w  height and width of the model's frames, in pixels
V  views of one video   C  color channels      D  size of a feature vector
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from handler import scoring
from handler.checkpoints.files import weights_sha256
from handler.classification import Classification, ClassifiedView
from handler.clips import Clip, ClipSettings, load_clip
from handler.inference import ModelRunner
from handler.models.config import VivitConfig
from handler.models.embedding import uniform_frame_indices
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.ranking import SEPARATOR, Ranking
from handler.threads import available_cores
from handler.views import Views

if TYPE_CHECKING:
    from handler.explanation.result import Explanation
    from handler.features import Embedding

# The original was trained on pixels in [-1, 1]. The published preprocessor_config.json normalizes a second time.
PAPER_SCALE, PAPER_BIAS = 1 / 127.5, -1.0


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
        runner: runs the model.
        model, device, dtype, dtype_reason, useful_threads: those of the runner, see ModelRunner.

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
        self.runner = ModelRunner(model, scale=scale, bias=bias, options=options, device=self.device)
        self.model = self.runner.model
        self.dtype, self.dtype_reason = self.runner.dtype, self.runner.dtype_reason
        self.useful_threads = self.runner.useful_threads
        self._checkpoint: str | Path | None = None

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
        """Runs blank clips, so that the first requests are not delayed, see `ModelRunner.warm_up`."""
        self.runner.warm_up()

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
        """Like `view_logits_or_errors`, but with features (V, D), see `ModelRunner.view_outputs_or_errors`."""
        return self.runner.view_outputs_or_errors(clips, with_mean=with_mean)

    @property
    def max_top_k(self) -> int:
        """Largest number of predictions: the number of labels. With several heads that of the largest one."""
        heads = self.config.label_heads
        return self.config.num_labels if heads is None else max(heads.values())

    def top_k(self, logits: torch.Tensor, *, k: int) -> Ranking:
        """Returns the `k` best labels of one clip from its logits (labels,), see `scoring.top_k`."""
        return scoring.top_k(logits, self.config, k=k)

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
            return scoring.best_indices(logits, config) if indices is None else indices

        if method == "occlusion":
            logits = self.logits([pixels])[0]  # (labels,)
            relevance = occlude(self.logits, pixels, labels=choose_labels(logits), grid=config.grid)
        else:
            logits, heat = self.runner.apply(
                lambda model, pixel_values: rollout(model, pixel_values, choose_labels), pixels[0]
            )
            relevance = heat.numpy()
        explained = list(choose_labels(logits))
        return Explanation(
            label=SEPARATOR.join(config.id2label[index] for index in explained),
            score=float(scoring.scores_of(logits, config)[explained].prod()),
            method=method,
            heat=normalize_heat(relevance),
            step_times_s=self._step_times_s(clip.times_s),
            region=self.image_processor.resize_crop.region(clip.info.height, clip.info.width, clip.crops[0]),
            logits=logits,
            clip=clip,
        )

    def label_indices(self, label: str) -> list[int]:
        """Returns the indices of a label among the logits, see `scoring.label_indices`."""
        return scoring.label_indices(label, self.config)

    def _step_times_s(self, times_s: np.ndarray) -> np.ndarray:
        """The mean time of the frames of each time step, (T',), from the times of all frames (T,)."""
        frames, steps = len(times_s), self.config.grid[0]
        if self.config.tubelet_embedding == "uniform_frames":
            times_s = times_s[uniform_frame_indices(frames, count=steps)]  # (T',)
        mean: np.ndarray = times_s.reshape(steps, -1).mean(1)
        return mean


@contextlib.contextmanager
def _single_torch_thread() -> Iterator[None]:
    """Limits torch to the calling thread: copying weights is no faster with more, and the others wait in busy loops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

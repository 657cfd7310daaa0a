"""Runs a model on a device: dtype, micro-batches, compilation, warm-up and errors of the device.

T  frames of a clip       V  views of one video       h, w  height and width of the model's frames, in pixels
C  color channels         B  views in a micro-batch   D  size of a feature vector
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from handler import kernels
from handler.models.layers import Layer
from handler.models.vivit import TemporalEncoder, VivitForVideoClassification, VivitModel
from handler.options import HandlerOptions, OptionError
from handler.threads import useful_inference_threads

logger = logging.getLogger(__name__)

# Micro-batches stay smaller for this long after one ran out of memory. Other users of the device may free some by then.
OOM_COOLDOWN_S = 60

# Micro-batches with more tokens are not faster on a CPU and take more memory.
CPU_MICRO_BATCH_TOKENS = 1024

MAX_COMPILED_SIZES = 8  # torch.compile's default limit of recompilations per function

Result = TypeVar("Result")


class DeviceError(RuntimeError):
    """The GPU no longer works in this process. A new process may be able to use it."""


class ModelRunner:
    """A model that is prepared for inference on one device.

    Args:
        model: a float32 model. It is modified in place: moved to the device, converted to the dtype and prepared for
            inference.
        scale, bias: float32 (C,), the model's input is uint8 * scale + bias.
        options: of the deployment, see HandlerOptions.
        device: where the model runs.

    Attributes:
        model, config: the model, as modified, and its configuration.
        device: see above.
        dtype: the dtype that the model computes in; torch.int8 for layers with 8-bit weights and activations.
        dtype_reason: why it was chosen.
        useful_threads: number of CPU threads that a forward pass can make use of.

    Raises:
        OptionError: the device does not support the options.
    """

    def __init__(
        self,
        model: VivitForVideoClassification,
        *,
        scale: np.ndarray,
        bias: np.ndarray,
        options: HandlerOptions,
        device: torch.device,
    ) -> None:
        self.config = model.config
        self.device = device
        choice = choose_dtype(model, options=options, device=device, scale=scale, bias=bias)
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
        self._micro_batch_clips = options.micro_batch_clips
        self._compiled_sizes: list[int] = []
        self._run = self._normalize_and_run
        if options.compile:
            self._compiled_sizes = compiled_sizes(options.micro_batch_clips)
            self._run = torch.compile(self._run, fullgraph=True, dynamic=False)

    def warm_up(self) -> None:
        """Runs blank micro-batches, so that lazy initialization does not delay the first requests.

        A compiled model runs every compiled size. Otherwise one clip is run, and on a GPU also the largest micro-batch.
        Where oneDNN computes the linear layers on a CPU, it generates code for each shape. There two layers of each
        encoder are run for every other size as well, one like all the others and the last one, which may compute CLS
        only.

        Raises:
            FloatingPointError: the logits are not finite.
            DeviceError: the GPU no longer works in this process.
        """
        config = self.config
        shape = (1, config.num_frames, config.num_channels, config.image_height, config.image_width)
        blank = np.zeros(shape, np.uint8)  # (1, T, C, h, w)
        sizes = {1} if self.device.type == "cpu" else {1, self._max_micro_batch_clips}
        for size in self._compiled_sizes or sizes:
            for result in self.view_outputs_or_errors([blank] * size):
                if isinstance(result, Exception):
                    raise result
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
        limit = self._micro_batch_clips
        if self.device.type != "cpu" or self._compiled_sizes:
            return limit
        return min(limit, math.ceil(CPU_MICRO_BATCH_TOKENS / self.config.num_tokens))

    def view_outputs_or_errors(
        self, clips: Sequence[Sequence[np.ndarray] | np.ndarray], *, with_mean: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor] | Exception]:
        """Returns the logits (V, labels) and the features (V, D) of the views of each clip, or the error of a clip.

        Args:
            clips: the views of each video, uint8 (T, C, h, w) each. V may differ between videos.
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

    def apply(
        self, function: Callable[[VivitForVideoClassification, torch.Tensor], Result], pixels: np.ndarray
    ) -> Result:
        """Returns `function(model, pixel_values)`, for computations other than a forward pass.

        Args:
            function: takes the model and one view (1, T, C, h, w): normalized, on the device, of the model's dtype.
            pixels: the view, uint8 (T, C, h, w).

        Raises:
            DeviceError: the GPU no longer works in this process.
            Exception: other errors of `function`.
        """
        if self._uses_kernels:
            kernels.start_threads()
        try:
            return function(self.model, self._normalize(self._copy_to_device([pixels])))
        except Exception as error:
            self._check_device(error)
            raise

    def _check_device(self, error: Exception) -> None:
        """Raises DeviceError if the GPU no longer works after `error`."""
        if is_device_broken(self.device):
            raise DeviceError(f"{self.device} no longer works: {error}") from error

    @torch.inference_mode()
    def _forward_or_split(
        self, views: Sequence[tuple[Sequence[np.ndarray] | np.ndarray, int]], *, with_mean: bool
    ) -> list[torch.Tensor | Exception]:
        """Returns logits and features (labels + D,) or the error of each view, given as a clip and its number there."""
        try:
            pixels = [clip[number] for clip, number in views]
            return [_check_finite(row) for row in self._forward(self._copy_to_device(pixels), with_mean=with_mean)]
        except Exception as error:
            self._check_device(error)
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

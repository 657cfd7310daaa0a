"""Forward passes of a training run: from examples to logits, on the device, in one process or several.

B  examples     T  frames of a clip     h, w  height and width of the model's frames, in pixels
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.training.data import Clips
from handler.training.distributed import Group
from handler.training.examples import Example, served_examples
from handler.training.optimization import resolve_precision


@dataclass(frozen=True)
class Batch:
    """Examples as tensors. Clips are on the CPU, the rest is on the model's device.

    Attributes:
        clips: uint8 (B, T, 3, h, w), black where there is no clip.
        labels: int64 (B,).
        weights: float (B,), 1, or 0 where there is no clip.
        shares: float (B,), see `sample_share`.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor


class ClipModel:
    """A model on its device that takes clips as they are decoded.

    Args:
        model: float32; moved to the device of the group.
        processor: whose normalization the model expects.
        group: the processes of the run. If there are several, they exchange gradients.
        precision: see Recipe.

    Attributes:
        model: the model itself.
        dtype: that layers compute in.
    """

    def __init__(
        self, model: VivitForVideoClassification, processor: VivitImageProcessor, group: Group, *, precision: str
    ) -> None:
        self.dtype = resolve_precision(precision, group.device)
        self.model = model.to(group.device)
        self._device = group.device
        self._parallel: nn.Module = model
        if group.size > 1:
            devices = [group.device] if group.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(model, device_ids=devices)
        # (3, 1, 1)
        self._scale, self._bias = (
            torch.from_numpy(values).to(group.device)[:, None, None] for values in processor.scale_and_bias()
        )

    def stack(self, examples: Sequence[Example]) -> Batch:
        """Makes tensors of examples."""
        config = self.model.config
        blank = np.zeros((config.num_frames, config.num_channels, config.image_height, config.image_width), np.uint8)
        clips = np.stack([blank if example.clip is None else example.clip for example in examples])
        return Batch(
            clips=torch.from_numpy(clips),
            labels=torch.tensor([example.label for example in examples]).to(self._device),
            weights=torch.tensor([float(example.clip is not None) for example in examples]).to(self._device),
            shares=torch.tensor([example.share for example in examples]).to(self._device),
        )

    def normalize(self, clips: torch.Tensor) -> torch.Tensor:
        """Normalizes uint8 clips as in serving: float32 (B, T, 3, h, w) on the device."""
        return torch.addcmul(self._bias, clips.to(self._device).float(), self._scale)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Computes float32 logits (B, labels) of normalized clips."""
        # DistributedDataParallel may communicate in each pass, and without gradients processes may have different
        # numbers of passes.
        module = self._parallel if torch.is_grad_enabled() else self.model
        with torch.autocast(self._device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits: torch.Tensor = module(pixels).logits
        return logits.float()

    def accumulation(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """In this context a backward pass adds up gradients. After the last one of a step, processes exchange them."""
        if is_last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[None]", self._parallel.no_sync())


@dataclass(frozen=True)
class Answers:
    """Logits for clips, in this process.

    Attributes:
        logits: float32 (N, labels) on the CPU.
        labels: int64 (N,), the true ones.
        errors: code and message by name, of clips that could not be made.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    errors: dict[str, tuple[str, str]]


@torch.no_grad()
def classify_clips(
    model: ClipModel, clips: Clips, group: Group, *, batch_size: int, threads: int, is_stopped: Callable[[], bool]
) -> Answers:
    """Runs the model in eval mode on the clips that serving would make: this process's share of them.

    Args:
        model: see ClipModel.
        clips: to be classified.
        group: the processes that share the clips.
        batch_size: clips per forward pass.
        threads: calls of `clips.load` at the same time.
        is_stopped: whether to leave out the rest.
    """
    model.model.eval()
    logits, labels = [torch.empty(0, model.model.config.num_labels)], [torch.empty(0, dtype=torch.int64)]
    errors: dict[str, tuple[str, str]] = {}
    mine = range(group.rank, len(clips.names), group.size)
    with contextlib.closing(served_examples(clips, mine, threads=threads)) as examples:
        while not is_stopped() and (part := list(islice(examples, batch_size))):
            errors |= {example.name: example.error for example in part if example.error}
            if decoded := [example for example in part if not example.error]:
                batch = model.stack(decoded)
                logits.append(model.logits(model.normalize(batch.clips)).cpu())
                labels.append(batch.labels.cpu())
    return Answers(torch.cat(logits), torch.cat(labels), errors)

"""The oracle for scores: what transformers computes for the same frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from handler.video import decode_frames


def assert_scores_match_transformers(
    scores: Mapping[str, float], *, checkpoint: Path, clip: Path, times_s: Sequence[float] | np.ndarray, fps: float
) -> None:
    """Compares the scores of all labels.

    Args:
        scores: Score by label.
        checkpoint: Directory of the classification checkpoint.
        clip: The classified video.
        times_s: Times of the classified frames.
        fps: Frame rate of the video, which must be constant.
    """
    processor = transformers.VivitImageProcessor.from_pretrained(checkpoint)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    frames = decode_frames(clip, np.rint(np.asarray(times_s) * fps).astype(int))
    with torch.no_grad():
        expected = model(**processor(list(frames), return_tensors="pt")).logits[0].softmax(-1)
    found = torch.tensor([scores[label] for _, label in sorted(model.config.id2label.items())])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

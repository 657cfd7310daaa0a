"""The oracle for models: small models of transformers, and the scores that transformers computes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from handler.video import decode_frames

TINY = {
    "image_size": 32,
    "num_frames": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


def published(model_class=transformers.VivitForVideoClassification, **config) -> transformers.PreTrainedModel:
    """A model of transformers in which all parameters are random, also those that are initialized with 0 or 1.

    Args:
        model_class: Its class.
        config: Changes to TINY with five labels.
    """
    torch.manual_seed(0)
    model = model_class(transformers.VivitConfig(**{**TINY, "num_labels": 5, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.normal_(std=scale)
            if "layernorm" in name and name.endswith("weight"):
                parameter.add_(1)
    model.set_attn_implementation("eager")
    return model.eval()


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
